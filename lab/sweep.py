"""A grid of runs: python -m lab sweep --model=lenet --lr=0.1,0.01 --augment=flip+crop,none"""

import functools
import itertools
import os
import re
import time
import typing
from pathlib import Path

import train
import visualize
from data import (
    Busy,
    Table,
    as_typed,
    check_columns,
    fingerprint_of,
    say_once,
    show,
    text_of,
    value_in,
    write_atomically,
)
from lab.reproduce import RESULT, changed_since, check_unchanged, digest_of, replace

SIGN = " | ".join(RESULT[-2:])  # a sweep.md without it is somebody else's


def sweep(**flags):
    """Train a grid of runs: every flag with several values, separated by commas, is an axis.

    Within a value of a list, as of --augment, the parts are joined by + (--augment=flip+crop,none).
    Finished runs are skipped and stopped ones resumed; several sweeps can share a grid. The table
    is written to runs/<name>/sweep.csv and .md, the overlaid curves to curves.png. A run that fails
    is a row that says why; the others go on, and the sweep ends with an error.
    """
    choices, configs = grid_of(flags)
    folder, done = configs[0].folder.parent, {}
    told = [name for name in RESULT if name != "test/accuracy_tta" or any(
        config.tta != "none" for config in configs)]
    page, sheet = folder / "sweep.md", folder / "sweep.csv"
    columns = [*choices[0], *RESULT, "state"]
    for config in configs:  # before anything is trained
        train.check_apart(config, resume=True)
    check_unchanged(page, SIGN)
    check_sheet(sheet, page, columns)
    visualize.file_of(folder / "curves.png")  # complains of one that is none of ours
    while len(done) < len(configs):  # again and again: another process may hold a run, and die
        for number, config in enumerate(configs):
            if number not in done:
                try:
                    done[number] = (train.finished(config.folder, config)
                                    or train.train(config, resume=True))
                except Busy as error:  # another process trains it
                    say_once(f"{error}; waiting")
                    continue
                except (ValueError, OSError) as error:  # without what it holds: a whole network
                    done[number] = ValueError(str(error))
        if len(done) < len(configs):
            time.sleep(5)
    now = functools.cache(fingerprint_of)  # the runs of a sweep mostly have the same images
    rows = [[*choice.values(), *row_of(done[number], told, now)]
            for number, choice in enumerate(choices)]
    table = Table([*choices[0], *told, "state"], rows, str(folder), len(choices[0]))
    content = table.csv().encode("utf-8", "surrogateescape")
    check_sheet(sheet, page, columns, content)
    # The page first, which knows both sheets: killed in between, it finds the one before.
    sheets = [content, sheet.read_bytes() if sheet.exists() else content]
    digests = " or ".join(dict.fromkeys(map(digest_of, sheets)))
    replace(page, f"{table.markdown()}\n<!-- sweep.csv: {digests} -->\n"
                  f"<!-- Written by python -m lab sweep -->\n", SIGN)
    write_atomically(sheet, content)
    made = [table, sheet, page]
    if drawn := [config.folder for config in configs if train.read_rows(config.folder)]:
        curves = visualize.draw_curves(visualize.group_runs(drawn))
        made.append(visualize.save_figure(curves, None, "curves", folder / "curves.png"))
    if failed := sum(isinstance(result, Exception) for result in done.values()):
        show(made)
        raise ValueError(f"{failed} of {len(configs)} runs failed; {page} says why")
    return made


def check_sheet(sheet, page, columns, new=None):
    """FileExistsError if the file `sheet` is no table of these `columns`, or was changed since
    `page` was written, which has its digest and that of the one before. It may be the `new` one:
    another sweep's."""
    check_columns(sheet, columns, some=True)
    text = page.read_text("utf-8", "replace") if page.exists() else ""
    told = re.search("<!-- sweep.csv: ([0-9a-f]{16}.*) -->", text)  # earlier versions' had none
    if not sheet.exists() or (now := sheet.read_bytes()) == new:
        return
    if not text:
        raise FileExistsError(f"{sheet}: is there without {page.name}, which would tell whether it "
                              f"is as it was written; move it away or choose another `name`")
    if told and digest_of(now) not in told[1]:
        raise FileExistsError(f"{sheet}: was changed since it was written and stays as it is; move "
                              f"it away or choose another `name`")


def row_of(result, told, now):
    """The cells of a run in the table: what is `told` of its result, or of the error that it ended
    in. `now` is `fingerprint_of`."""
    if isinstance(result, Exception):
        return [*[""] * len(told), f"failed: {as_typed(result, {'sweep': sweep}, ['sweep'], None)}"]
    state = ", ".join(["finished", *filter(None, [result["history"]]),
                       *["on images that have changed since"] * changed_since(result, now)])
    return [*(train.format_cell(result[name]) for name in told), state]


def split(text):
    """The values of an axis."""
    return [part.strip() for part in text.split(",")]


def axis_of(value, of_lists):
    """What one would type for a `value` that Python gives for a flag whose values are lists, or
    are not: an axis, where it is a list of lists, of texts as one would type them, or of anything
    else."""
    if not of_lists:
        return text_of(value)
    parts = value if isinstance(value, tuple) and any(
        isinstance(part, tuple) or "+" in str(part) for part in value) else [value]
    return ",".join(text_of(part).replace(",", "+") for part in parts)


def grid_of(flags):
    """What each run of a grid is told apart by, {flag: text}, and the runs' settings."""
    known = train.settings_flags(["--resume"])  # those of all networks
    # From Python numbers come, and lists: an axis, or one value of a setting that is a list.
    lists = {name for name, flag in known.items() if typing.get_origin(flag.kind) is tuple}
    flags = {name: value if isinstance(value, str) else axis_of(train.as_setting(value), name in
             lists) for name, value in flags.items()}
    for name in ("name", "out", "root"):
        if "," in flags.get(name, ""):
            raise ValueError(f"{name}={flags[name]}: is of the whole grid and must have no comma")
    axes = {name: split(text) for name, text in flags.items()  # a folder's name may have one
            if "," in text and not (name == "data" and Path(os.path.expanduser(text)).exists())}
    if not axes:
        raise ValueError("no flag has several values (for example `lr=0.1,0.01`)")
    fixed = {name: text for name, text in flags.items() if name not in axes}
    model = "models" if "model" in axes else train.parse_flags(fixed).get(
        "model", train.Config.model)
    name = fixed.pop("name", "-".join(["sweep", model, *axes]))
    choices = [dict(zip(axes, values)) for values in itertools.product(*axes.values())]
    configs = []
    for choice in choices:
        label = "_".join(f"{axis}={value}" for axis, value in choice.items()).replace("/", "_")
        own = {**choice, "name": f"{name}/{label}"}
        settings = train.parse_flags({**fixed, **own})
        for axis, value in train.typed(own).items():
            if settings[axis] != value:
                raise ValueError(f"{axis}={own[axis]}: TRAIN_FLAGS in the environment makes it "
                                 f"{text_of(settings[axis])} for all runs")
        configs.append(train.Config.create(**settings))
    for config, other in itertools.combinations(configs, 2):  # of a/b and a_b, say
        if config.folder == other.folder and config != other:
            raise ValueError(f"{config.folder}: would be the folder of two runs; rename what they "
                             f"are told apart by")
    return choices, configs


def flags_of_grid(words):
    """Every setting of a run, and the options of all networks in the grid."""
    models = split(value_in(words, "model") or train.Config.model)
    return {name: flag for model in models for name, flag in train.settings_flags(
        words if len(models) == 1 else (), model).items()}


sweep.flags = flags_of_grid
