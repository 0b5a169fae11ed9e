"""A grid of runs: python -m lab sweep --model=lenet --lr=0.1,0.01 --augment=flip+crop,none"""

import itertools
import time

import train
import visualize
from data import Busy, Table, check_ours, show
from lab.reproduce import RESULT, finished_result, replace


def sweep(**flags):
    """Train a grid of runs: every flag with several values, separated by commas, is an axis.

    Within a value of a list, as of --augment, the parts are joined by + (--augment=flip+crop,none).
    Finished runs are skipped and stopped ones resumed; several sweeps can share a grid. The table
    is written to runs/<name>/sweep.csv and .md, the overlaid curves to curves.png. A run that fails
    is a row that says why; the others go on, and the sweep ends with an error.
    """
    choices, configs = grid_of(flags)
    folder, done = configs[0].folder.parent, {}
    signs = {folder / "sweep.csv": ",".join(RESULT), folder / "sweep.md": " | ".join(RESULT)}
    for path, sign in signs.items():
        check_ours(path, sign)  # before anything is trained
    visualize.check_figure(folder / "curves.png")
    while len(done) < len(configs):
        for number, config in enumerate(configs):
            if number not in done:
                try:
                    done[number] = finished_result(config) or train.train(config, resume=True)
                except Busy:  # another process trains it
                    continue
                except (ValueError, OSError) as error:
                    done[number] = error
        if len(done) < len(configs):
            time.sleep(5)
    rows = [[*choice.values(), *row_of(done[number])] for number, choice in enumerate(choices)]
    table = Table([*choices[0], *RESULT, "state"], rows, str(folder))
    for (path, sign), content in zip(signs.items(), (table.csv(), table.markdown())):
        replace(path, content, sign)
    made = [table, *signs]
    if drawn := [config.folder for config in configs if train.read_rows(config.folder)]:
        curves = visualize.draw_curves(visualize.group_runs(drawn))
        made.append(visualize.save_figure(curves, None, "curves", folder / "curves.png"))
    if failed := sum(isinstance(result, Exception) for result in done.values()):
        show(made)
        raise ValueError(f"{failed} of {len(configs)} runs failed; {folder / 'sweep.md'} says why")
    return made


def row_of(result):
    """The cells of a run in the table: of its result, or of the error that it ended in."""
    if isinstance(result, Exception):
        return [*[""] * len(RESULT), f"failed: {' '.join(str(result).split())}"]
    return [*(train.format_cell(result[name]) for name in RESULT), "finished"]


def grid_of(flags):
    """What each run of a grid is told apart by, {flag: text}, and the runs' settings."""
    axes = {name: text.split(",") for name, text in flags.items() if "," in text}
    if not axes:
        raise ValueError("no flag has several values (for example `lr=0.1,0.01`)")
    fixed = {name: text for name, text in flags.items() if name not in axes}
    model = fixed.get("model", "models" if "model" in axes else train.Config.model)
    name = fixed.pop("name", "-".join(["sweep", model, *axes]))
    choices = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    configs = []
    for choice in choices:
        label = "_".join(f"{axis}={value}" for axis, value in choice.items()).replace("/", "_")
        flags = {**fixed, **choice, "name": f"{name}/{label}"}
        configs.append(train.Config.create(**train.parse_flags(flags)))
    return choices, configs


sweep.flags = train.settings_flags  # it takes every setting of a run
