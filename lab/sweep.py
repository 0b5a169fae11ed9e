"""A grid of runs: python -m lab sweep --model=lenet --lr=0.1,0.01 --augment=flip+crop,none"""

import contextlib
import itertools
import time

import train
import visualize
from data import Busy, Table, write_atomically
from lab.reproduce import RESULT, finished_result


def sweep(**flags):
    """Train a grid of runs: every flag with several values, separated by commas, is an axis.

    Within a value of a list, as of --augment, the parts are joined by + (--augment=flip+crop,none).
    Finished runs are skipped and stopped ones resumed; several sweeps can share a grid. The table
    is written to runs/<name>/sweep.csv and .md, the overlaid curves to curves.png.
    """
    choices, configs = grid_of(flags)
    results = {}
    while len(results) < len(configs):
        for number, config in enumerate(configs):
            if number not in results:
                with contextlib.suppress(Busy):
                    results[number] = finished_result(config) or train.train(config, resume=True)
        if len(results) < len(configs):
            time.sleep(5)  # what is left is being trained by another process
    folder = configs[0].folder.parent
    table = Table([*choices[0], *RESULT], [
        [*choice.values(), *(train.format_cell(results[number][name]) for name in RESULT)]
        for number, choice in enumerate(choices)], str(folder))
    for kind, content in (("csv", table.csv()), ("md", table.markdown())):
        write_atomically(folder / f"sweep.{kind}", content)
    curves = visualize.draw_curves(visualize.group_runs([config.folder for config in configs]))
    visualize.save_figure(curves, None, "curves", folder / "curves.png")
    return table, folder / "sweep.csv", folder / "sweep.md", curves


def grid_of(flags):
    """What each run of a grid is told apart by, {flag: text}, and the runs' settings."""
    axes = {name: text.split(",") for name, text in flags.items() if "," in text}
    if not axes:
        raise ValueError("sweep: no flag has several values (for example --lr=0.1,0.01)")
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
