"""Lab reports: the page of a run, or of experiments with what was reported beside it.

    python -m lab report runs/convnet
    python -m lab report 4.1
    python -m lab results

What is computed and drawn is here; what is said of it, and in which order, in run.j2,
experiments.j2 and results.j2; how it looks in report.html.j2, report.md.j2 and report.css.
"""

import collections
import dataclasses
import itertools
import os
import re
import shlex
import statistics
import textwrap
from base64 import b64encode
from pathlib import Path

import torch
from torch import nn

import deconv
import network as networks
import train
import visualize
from data import (
    Table,
    check_regular,
    generator,
    name_of,
    note,
    parse,
    plain,
    read_text,
    text_of,
    write_atomically,
)
from lab import reproduce
from lab.reproduce import duration

PAGES = ("report.html", "report.md")
PAGE_SIGN = "<!-- Written by python -m lab report"  # the end follows, see `reproduce.SEAL`
MAIN_SETTINGS = ("model", "data", "image_size", "epochs", "batch_size", "optimizer", "lr", "seed")
REPRODUCE_FLAGS = ("data", "limit", "epochs", "precision")  # and `seeds`
RESULTS_SIGN = "Written by `python -m lab results` from lab/results.csv"


def report(what: str, runs: str = "runs/reproduce", out: str | None = None,
           data: str | None = None, root: str | None = None, device: str = "auto"):
    """Write a lab report: report.html, one page that holds its figures, and report.md.

    WHAT is the folder of a finished run; or a report or an id of experiments.toml, for a table of
    what was reported beside what the runs in the folder RUNS measured, and their figures. It goes
    to the run's folder, to RUNS/WHAT, or to OUT. `--data` and `--root` say where a run's images
    are if they have moved: its page tells of those that it was measured on, with its --limit.
    """
    if out and Path(out).suffix.lower() in (".html", ".htm", ".md", ".pdf"):
        raise ValueError(f"out={out}: must be a folder; {' and '.join(PAGES)} are written there")
    what, runs, out = (path and os.path.expanduser(path) for path in (what, runs, out))
    # A page's folder may be called as the experiments that are on it.
    known = {"all", *reproduce.book().experiments, *reproduce.book().reports}
    one = train.is_run(Path(what)) or (
        Path(what).is_dir() and what.partition("/")[0] not in known)
    folder = Path(out or (what if one else Path(runs, what)))
    for name in PAGES:
        reproduce.check_unchanged(folder / name, PAGE_SIGN)  # before any work is done
    if one:
        visualize.refuse("is for experiments", runs=runs if runs != "runs/reproduce" else None)
        return report_of_run(Path(what), folder, {"data": data, "root": root, "device": device})
    visualize.refuse("is for the page of a run", data=data, root=root,
                     device=device if device != "auto" else None)
    return report_of_lab(what, runs, folder)


# ---------------------------------------------------------------------------- any report


def render(template, sign, parts=None, **content):
    """The text of a page: `template` with its `content`, and `sign` to know it by. `parts` is the
    template of the parts that it is made of, report.html.j2 or report.md.j2."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    counts = collections.Counter()
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True,
                        lstrip_blocks=True, undefined=StrictUndefined,
                        autoescape=parts == "report.html.j2")
    pages.globals |= {"sign": sign,  # and which table or figure this is
                      "number": lambda kind: counts.update([kind]) or counts[kind]}
    pages.filters |= {function.__name__: function for function in (
        plain, fence, width, base64, thousands, duration)}
    if parts:
        content["page"] = pages.get_template(parts).module
    text = pages.get_template(template).render(**content)
    # Where a condition does not hold, the empty lines around it are left; one says as much.
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def write_report(folder, template, **content):
    """Write `template` with its `content` as report.html and report.md; return their paths."""
    paths = [folder / name for name in PAGES]
    for path in paths:
        page = render(template, f"{PAGE_SIGN} -->", f"{path.name}.j2", **content)
        reproduce.replace(path, page, PAGE_SIGN)
    return paths


def keep_figures(folder, name, *figures):
    """The paths of matplotlib figures among those of the report in `folder`; captions say what
    their titles would, which are gone."""
    paths = []
    for number, figure in enumerate(figures):
        figure.suptitle("").set_in_layout(False)
        paths.append(folder / "figures" / f"report-{name}{number or ''}.png")
        visualize.save_figure(figure, None, name, str(paths[-1]))
    return paths


def arranged(figure, axes, width, height, columns=1):
    """`figure` at width×height inches with `axes` alone, in so many columns: narrow enough for the
    page of a phone to show its text."""
    # A figure of a command is wider than a page: its axes are laid out anew, titles and all.
    for one in {*figure.axes} - {*axes}:
        one.remove()
    cells = figure.add_gridspec(-(-len(axes) // columns), columns)
    for index, one in enumerate(axes):
        one.set_subplotspec(cells[divmod(index, columns)])
        one.title.set_fontsize(8)
    figure.set_size_inches(width, height)
    for legend in [*figure.legends]:  # whose columns were for another width
        legend.remove()
        visualize.add_legend(figure, {text.get_text(): handle for text, handle in zip(
            legend.get_texts(), legend.legend_handles)})
    return figure


def fence(text):
    """Backticks, more than `text` has in a row: what begins and ends a block of code."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def base64(png):
    """A PNG file as text, for an address that holds its data."""
    return b64encode(png.read_bytes()).decode()


def width(png):
    """The width in CSS pixels that a PNG file was drawn for."""
    return int.from_bytes(png.read_bytes()[16:20], "big") * 96 // visualize.DPI


def shell(*commands):
    """Command lines, given as words; long lines go on in a next one, as a shell takes them."""
    def quoted(word):
        if word.isprintable():
            return shlex.quote(word)
        # Beyond ASCII as bytes of UTF-8: what Python calls \xe9 is a single byte for a shell.
        text = "".join(letter.encode("unicode_escape").decode() if letter.isascii() else "".join(
            f"\\x{byte:02x}" for byte in letter.encode(errors="surrogateescape"))
            for letter in word)
        return "$'" + text.replace("'", "\\'") + "'"

    lines = [" ".join(map(quoted, words)) for words in commands]
    return "\n".join(text if "'" in text else " \\\n    ".join(textwrap.wrap(
        text, 70, break_long_words=False, break_on_hyphens=False)) for text in lines)


def thousands(number):
    """A whole number, its thousands apart."""
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


# ---------------------------------------------------------------------------- the report of a run


def report_of_run(run, folder, given):
    """Write the report of a run. `given` are flags: data, root and device."""
    result = train.finished(run)
    if not result:
        raise ValueError(f"{run}: holds no finished run (python train.py --resume={run} goes on "
                         f"with one that was stopped)")
    # Not `data`, of which all would be taken: split as it was, wherever the images are. The figures
    # look at them the same way.
    given = {"moved": given["data"], "root": given["root"], "device": given["device"]}
    network, description = train.open_network(run, given["device"], moved=given["moved"])
    dataset = train.open_dataset(description, root=given["root"])
    test, config = dataset.test, train.Config.from_json(result["settings"])
    logits = train.predict(network, test.images, description.preprocessing,
                           bar=f"predicting {len(test.labels)} images")
    guesses, name = logits.argmax(1), name_of(dataset.name)
    right = guesses == test.labels
    matrix = visualize.confusion_matrix(test.labels, guesses, len(dataset.classes))
    # The first right and the first wrong prediction: none is picked for its looks.
    shown = [verdict.int().argmax().item() for verdict in (right, ~right) if verdict.any()]
    size = description.preprocessing.image_size
    layers = layers_to_show(network, size)
    *bins, _ = train.calibration(logits, test.labels)
    confusion = visualize.draw_confusion(matrix, dataset.classes, "")
    figures = {"curves": [draw_curves([run])],
               # The accuracy of each class, which stands beside it there, is in a table here.
               "confusion": [arranged(confusion, confusion.axes[:1], 5.4, 5.2)],
               "reliability": [visualize.draw_reliability(*bins, "")],
               **draw_predictions(test, description, logits, right),
               **draw_commands(run, folder, layers, shown, given),
               "gallery": draw_gallery(network, layers[-1], test, description)}
    hardware = [("device", result["device"]), ("processes", f"{result['processes'] or 1}"),
                ("time", duration(result["seconds"])),
                *result["versions"].items(), ("commit", result["commit"] or "unknown")]
    return write_report(
        folder, "run.j2", config=config, name=name, result=result, dataset=dataset,
        description=description, right=right.sum().item(), layers=layers,
        shown=[f"test image {index} ({description.classes[test.labels[index]]}"
               + (")" if right[index] else f", taken for {description.classes[guesses[index]]})")
               for index in shown],
        measured=train.figures(logits, test.labels, dataset.classes),
        figures={key: keep_figures(folder, key, *drawn) for key, drawn in figures.items()},
        settings=settings_tables(config, name, size), stages=networks.stages_table(network, size),
        structure=networks.layers_table(network, size),
        per_class=per_class_table(matrix, dataset.classes),
        hardware=Table(("what", "value"), hardware),
        commands=commands_of(config, result["processes"]))


def commands_of(config, processes):
    """The commands that make a run and its report again, wherever the package is."""
    config = dataclasses.replace(config, out=train.Config.out, name=None, root=train.Config.root,
                                 device=train.Config.device)
    return shell(shlex.split(train.command_of(config, processes)),
                 ["python", "-m", "lab", "report", str(config.folder)])


def layers_to_show(network, image_size):
    """The first, the middle and the last stage whose convolutions make maps of several pixels."""
    sides = {name: shape[-1] for name, shape, *_ in networks.stages(network, image_size)
             if len(shape) == 3 and any(isinstance(module, nn.Conv2d) for module
                                        in network.get_submodule(name).modules())}
    layers = [name for name, side in sides.items() if side > 1] or [*sides]
    return tuple(dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]]))


def draw_curves(runs):
    """Loss above accuracy of `runs`."""
    figure = visualize.draw_curves(visualize.group_runs(runs))
    return arranged(figure, figure.axes, 5.2, 6.2)


def draw_predictions(test, description, logits, right):
    """{"right": figures, "wrong": figures}: four predictions of each, drawn at random."""
    # The seed is fixed: who makes the page again gets the same.
    order, drawn = torch.randperm(len(right), generator=generator(0, "predictions")), {}
    for name, kept in (("right", right), ("wrong", ~right)):
        figures = [visualize.draw_predictions(
            description.preprocessing.pictures(test.images[[index]]), test.labels[[index]],
            logits[[index]], description.classes, "", columns=1)
            for index in order[kept[order]][:4].tolist()]
        drawn |= {name: figures} if figures else {}
    return drawn


def draw_commands(run, folder, layers, shown, given):
    """{name: figures} that commands draw: filters, what the first test image of `shown` excites,
    and why all of these are taken for what they are."""
    def draw(name, command, **flags):
        figure = command(str(run), out=str(folder / "figures" / f"report-{name}.png"), **flags,
                         **given)
        return figure[0] if isinstance(figure, list) else figure

    ends, first = dict.fromkeys((layers[0], layers[-1])), shown[0]
    # Fifteen maps and the image itself are four rows of four.
    drawn = {f"features-{layer}": [draw(f"features-{layer}", visualize.features, layers=(layer,),
                                        maps=15, index=first)] for layer in ends}
    drawn["filters"] = [draw("filters", visualize.filters, layer=layers[0])]
    back = draw("reconstruct", deconv.reconstruct, layers=layers, index=first)
    drawn["reconstruct"] = [arranged(back, back.axes, 5.4, 1.9 * len(layers), 3)]
    drawn["where"] = [draw("where", visualize.where, index=index) for index in shown]
    for figure in drawn["where"]:
        figure.set_size_inches(4.2, 2.6)
        figure.axes[1].set_title(figure.axes[1].get_title().replace(" (", "\n("), fontsize=9)
    hidden = [draw("occlusion", deconv.occlusion, index=index) for index in shown]
    drawn["occlusion"] = [arranged(figure, figure.axes, 4.4, 7.2, 2) for figure in hidden]
    return drawn


def draw_gallery(network, layer, test, description):
    """A figure for each of three units of `layer`: its strongest patches and what comes back."""
    seen = description.preprocessing
    units = visualize.choose_units(network, layer, seen.image_size, (), 3)
    found = deconv.top_reconstructions(network, layer, test.images, seen, units, 9)
    return [deconv.draw_gallery(*(part[index:index + 1] for part in (*found, units)), "")
            for index in range(len(units))]


def settings_tables(config, data, image_size):
    """The settings of a run that bear on its outcome, with what they mean, in two tables: those
    that matter most or have not their default, and the others."""
    meanings = {name: f"{flag.meaning} {' | '.join(flag.choices) * (len(flag.choices) < 10)}"
                for name, flag in train.settings_flags([f"--model={config.model}"]).items()}
    values = {**dataclasses.asdict(config), **config.all_settings(), "data": data,
              "image_size": image_size}
    usual = train.Config(model=config.model).all_settings()
    first, rest = [], []
    for name, value in values.items():
        # What a resumed run may change does not bear on the outcome, but for how long it trains.
        if name in ("epochs", "patience") or name not in (*train.MAY_CHANGE, "options"):
            shown = name in MAIN_SETTINGS or value != usual[name]
            (first if shown else rest).append((name, text_of(value), meanings[name]))
    return [Table(("setting", "value", "meaning"), rows) for rows in (first, rest)]


def per_class_table(matrix, classes):
    """The accuracy of each class, from a confusion matrix."""
    wrong = matrix - matrix.diagonal().diag()
    return Table(("class", "test images", "right", "accuracy", "most often taken for"), [
        (name, f"{counts.sum()}", f"{hits}", f"{hits / counts.sum():.1%}" if counts.any() else "–",
         f"{classes[taken.argmax()]} ({taken.max()})" if taken.any() else "–")
        for name, counts, hits, taken in zip(classes, matrix, matrix.diagonal(), wrong)])


# ---------------------------------------------------------------------------- experiments


def report_of_lab(what, runs, folder):
    """Write the report of the experiments `what`, whose runs are in the folder `runs`."""
    beside = [str(path.parent) for path in Path(what).parent.glob("*/config.json")]
    # What was meant may have been a run: those beside it are named too.
    experiments = reproduce.choose(what, "run or experiment", beside)
    rows = [row for experiment in experiments for row in lab_rows(experiment, runs)]
    done = [row for row in rows if row.data]
    return write_report(
        folder, "experiments.j2", title=reproduce.book().reports.get(what, f"Experiments: {what}"),
        experiments=experiments, rows=rows,
        comparison=reproduce.comparison(rows, reproduce.ON_PAGE),
        others=sorted({row.data for row in rows if row.elsewhere}),
        machines=sorted({", ".join(filter(None, [  # with a GPU nobody counts the threads
            row.device, row.threads and f"{row.threads} thread{'s' * (row.threads != 1)}",
            row.precision, f"commit {row.commit or 'unknown'}"])) for row in done}),
        commands={experiment.id: commands_for(experiment) for experiment in experiments},
        tables={experiment.id: tables_of(experiment, runs) for experiment in experiments},
        figures={experiment.id: figures_of(experiment, runs, folder) for experiment in experiments},
        again=made_again(what, experiments, runs))


def commands_for(experiment, out="runs/reproduce"):
    """The commands that make an experiment's runs, those of others that it shows, and its figures:
    with the settings and in the folder that `reproduce` takes unless told otherwise."""
    runs = {run.folder(out): run for run in with_others(experiment)}
    return shell(*([*shlex.split(run.line), f"--out={out}", f"--name={folder.name}"]
                   for folder, run in runs.items()),
                 *(figure.filled(out) for figure in experiment.figures))


def with_others(experiment):
    """The runs of an experiment, then those of others that its figures show."""
    shown = [run for figure in experiment.figures for run in figure.runs.values()]
    return [*experiment.runs.values(), *(run for run in shown if run.experiment != experiment.id)]


def with_seeds(folder):
    """The folder of a run and those of its repetitions, which have another seed and otherwise the
    same settings, wherever and on what they were run: those of them that have begun."""
    seeds, first = {}, None
    for path in [folder, *sorted(folder.parent.glob(f"{folder.name}-seed*"))]:
        number = path.name.removeprefix(folder.name)  # a copy's name goes on behind it
        if re.fullmatch("(-seed[0-9]+)?", number) and (path / "config.json").exists():
            config = train.read_config(path / "config.json")
            first = first or config
            others = train.differing(config.all_settings(), first.all_settings())
            if {*others} <= {"seed"} and config.epochs == first.epochs:
                seeds.setdefault(config.seed, path)
    return [*seeds.values()]


def results_of(run, runs):
    """The results of a run of an experiment that is in the folder `runs`, and of its repetitions
    with other seeds: those that are finished, on the same images, in the same way."""
    done = [result for result in map(train.finished, with_seeds(run.folder(runs))) if result]
    return [result for result in done if all(
        result.get(name) == done[0].get(name) for name in ("fingerprint", "processes", "history"))]


def lab_rows(experiment, runs):
    """The rows of an experiment's comparison, from the runs in the folder `runs`."""
    rows = []
    for run in experiment.runs.values():
        done, begun = results_of(run, runs), run.folder(runs).exists()
        rows += reproduce.compare(run, done) if done else reproduce.claims(
            run, "not finished" if begun else None)
    return rows or [reproduce.Row(experiment.id, "–", "figures", state="–")]


def made_again(what, experiments, runs):
    """The command lines that make the runs of a page again, and the page: one for all of `what`,
    unless its experiments were run with different flags."""
    given = {experiment.id: flags_of(experiment, runs) for experiment in experiments}
    kinds = [flags for flags in given.values() if flags is not None]
    if all(flags == kinds[0] for flags in kinds):
        given = {what: kinds[0] if kinds else None}

    def line(name, flags):
        own, others = [], []
        for flag, value in flags.items():
            (own if flag in (*REPRODUCE_FLAGS, "seeds") else others).append(
                f"--{flag}={text_of(value)}")
        return [*["env", f"TRAIN_FLAGS={shlex.join(others)}"] * bool(others),
                "python", "-m", "lab", "reproduce", name, *own]

    return shell(*(line(name, flags or {}) for name, flags in given.items()),
                 ["python", "-m", "lab", "report", what])


def flags_of(experiment, runs):
    """The flags, of `reproduce` and of TRAIN_FLAGS, that make the very runs in the folder `runs`,
    those that an experiment shows of others too: what is not as experiments.toml has it, as in a
    trial. None where there is none."""
    flags = None
    for run in with_others(experiment):
        if done := results_of(run, runs):
            planned, config = run.config, train.Config.from_json(done[0]["settings"])
            its = {key: getattr(config, key) for key in REPRODUCE_FLAGS
                   if getattr(config, key) != getattr(planned, key)}
            its |= reproduce.other_settings(config, planned)
            own = run.experiment == experiment.id
            its |= {"seeds": len(done)} if len(done) > 1 and own else {}
            flags = its | (flags or {})  # its own runs come first, and have the last word
    return flags


def accuracies(result):
    """{images: accuracy} of a run's result: of each part of its data set, and of each class."""
    whole = {"all for training, last epoch": result["train/accuracy"],
             "all for validation": result["val/accuracy"], "all for test": result["test/accuracy"]}
    return {**whole, **result["per_class"], **whole}  # whatever a class is called


def tables_of(experiment, runs):
    """{caption: `Table`} of an experiment: the accuracies of its runs on each kind of images and on
    each class, side by side, and the structure of a network."""
    done = {run.name if run.experiment == experiment.id else f"{run.experiment}/{run.name}": found
            for run in with_others(experiment) if (found := results_of(run, runs))}
    tables = {}
    if {*experiment.runs} & {*done}:
        columns, rows = [[*map(accuracies, results)] for results in done.values()], []
        for what in dict.fromkeys(itertools.chain(*itertools.chain(*columns))):
            known = [[result[what] for result in column if result.get(what) is not None]
                     for column in columns]
            rows.append((what, *(f"{statistics.mean(values):.1%}" if values else "–"
                                 for values in known)))  # of several seeds the mean
        tables["accuracy on the images of each kind, and of each class on the test images"] = Table(
            ("images", *done), rows)
    for figure in experiment.figures:
        if figure.words[1] == "network.py":
            short, whole = parse(networks.COMMANDS, figure.words[2:])()
            tables |= {short.title: short, whole.title: whole}
    return tables


def figures_of(experiment, runs, folder):
    """{path: caption} of an experiment: its curves in one plot, and what its commands drew."""
    found, captions = {}, {}
    plotted = {run.folder(runs): None for run in experiment.runs.values()}
    for figure in experiment.figures:
        folders = [run.folder(runs) for run in figure.runs.values()]
        if figure.command == "curves":
            plotted |= dict.fromkeys(folders)
        else:
            name = folders[0].name if folders else experiment.id
            # As the commands call them; the page would show whatever a link leads to.
            drawn = [path for path in sorted(figure.folder(runs).glob("*.png"))
                     if re.fullmatch(rf"{figure.command}[\w.,=+-]*", path.name)
                     and not path.is_symlink()]
            mark = figure.mark(runs)
            if drawn and mark.is_file() and read_text(mark) != figure.training(runs):
                note(f"{drawn[0]}: was drawn of another training than the one that is there now, "
                     f"and is left out")
                continue
            found |= dict.fromkeys(drawn, name)
    folders = [one for first in plotted for one in with_seeds(first) if train.read_rows(one)]
    if folders:
        path, = keep_figures(folder, f"{experiment.id}-curves", draw_curves(folders))
        captions[path] = "loss and accuracy after each epoch"
    files = collections.Counter(path.name for path in found)
    for path, name in found.items():
        # A copy, so that the page stays whole where the runs are removed or made anew. Of several
        # runs the same command draws files of one name.
        file = path.name if files[path.name] == 1 else f"{name}-{path.name}"
        copy = folder / "figures" / f"report-{experiment.id}-{file}"
        visualize.check_figure(copy)
        check_regular(path)  # to open a pipe could take for ever
        write_atomically(copy, path.read_bytes())
        captions[copy] = f"{path.stem}, {name}"
    return captions


# ---------------------------------------------------------------------------- all results


def results(path: str | None = None, out: str = "docs/results.md"):
    """Write the measured results in the CSV file PATH beside the reported ones, as Markdown."""
    out = Path(os.path.expanduser(out))
    train.check_output(out, ".md")
    path = Path(os.path.expanduser(path)) if path else reproduce.RESULTS
    reproduce.replace(out, results_markdown(path), RESULTS_SIGN)
    return out


def results_markdown(path):
    """All runs of the experiments with what the CSV file `path` says of them, as Markdown."""
    measured, reports = reproduce.read_results(path), []
    for report, title in reproduce.book().reports.items():
        experiments = reproduce.choose(report)
        rows = [measured.get((row.id, row.run, row.accuracy), row) for experiment in experiments
                for run in experiment.runs.values() for row in reproduce.claims(run)]
        if rows:
            reports.append((title, reproduce.comparison(rows), experiments))
    return render("results.j2", RESULTS_SIGN, reports=reports)
