"""The experiments of five lab reports: run again, and what was reported beside what is measured.

    python -m lab reproduce        # lists the experiments and what they cost
    python -m lab reproduce 4.1 --data=shapes --limit=256 --epochs=1

experiments.toml says what is run and what was claimed, results.csv what was measured so far.
"""

import csv
import dataclasses
import functools
import re
import shlex
import statistics
import tomllib
import typing
from dataclasses import dataclass
from pathlib import Path

import data as data_module
import deconv
import network
import train
import visualize
from data import Table, parse, parse_value, read_json, show, write_atomically
from train import Config

RESULTS = Path(__file__).with_name("results.csv")
RESULT = ("test/accuracy", "val/accuracy", "seconds")  # what is told of a run in one line
MODULES = {f"{module.__name__}.py": module
           for module in (data_module, network, train, visualize, deconv)}
# {name} in a figure's line is the folder of a run of the same experiment, {id/name} of another.
PLACEHOLDER = re.compile(r"\{(?:([^{}/]+)/)?([^{}]+)\}")


# ---------------------------------------------------------------------------- experiments.toml


@dataclass(frozen=True)
class Run:
    """A training run of an experiment: its command line, the settings that this asks for, and the
    accuracies that are reported of it, in per cent; None where the report says nothing."""

    experiment: str
    name: str
    line: str
    config: Config
    reported: dict[str, float | None]

    def folder(self, out, seed=0):
        """The run's folder in the folder `out`; the first seed's has no number."""
        return Path(out) / f"{self.experiment}-{self.name}{f'-seed{seed}' if seed else ''}"


@dataclass(frozen=True)
class Figure:
    """A command line of an experiment, as words, and the runs that its {…} stand for."""

    experiment: str
    words: tuple[str, ...]
    runs: dict[str, Run]

    def filled(self, out):
        """The words with the runs' folders, which are in `out`: word by word, so that spaces and
        backslashes of a path mean nothing but themselves."""
        return [PLACEHOLDER.sub(lambda match: str(self.runs[match[0]].folder(out)), word)
                for word in self.words]


@dataclass(frozen=True)
class Experiment:
    """An entry of experiments.toml."""

    id: str
    report: str
    shows: str
    note: str
    runs: dict[str, Run]
    figures: tuple[Figure, ...]


class Book(typing.NamedTuple):
    """All that experiments.toml says: experiments by id, titles of the reports, and why accuracies
    on other images than the reports' may lie below theirs."""

    experiments: dict[str, Experiment]
    reports: dict[str, str]
    images: dict[str, str]


@functools.cache
def book():
    """The `Book` of this folder, read and parsed once."""
    content = tomllib.loads(Path(__file__).with_name("experiments.toml").read_text("utf-8"))
    runs = {(entry["id"], name): Run(entry["id"], name, line, config_of(line),
                                     entry.get("reported", {}).get(name, {"test": None}))
            for entry in content["experiment"] for name, line in entry.get("runs", {}).items()}

    def figure(experiment, line):
        named = {match[0]: runs[match[1] or experiment, match[2]]
                 for match in PLACEHOLDER.finditer(line)}
        return Figure(experiment, tuple(shlex.split(line)), named)

    return Book({entry["id"]: Experiment(
        entry["id"], entry["report"], entry["shows"], entry.get("note", ""),
        {name: runs[entry["id"], name] for name in entry.get("runs", {})},
        tuple(figure(entry["id"], line) for line in entry.get("figures", ())))
        for entry in content["experiment"]}, content["reports"], content["images"])


def config_of(line):
    """The settings that a command line of train.py asks for."""
    flags = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(line)[2:])
    return Config.create(**train.parse_flags(flags))


def choose(what):
    """The experiments that `what` means: an id, a report's name, or `all`.

    An id and a run's name, such as 2.7/adam, mean that experiment with this run only.
    """
    what, _, run = what.partition("/")
    known = book().experiments
    chosen = [experiment for experiment in known.values()
              if what in ("all", experiment.id, experiment.report)]
    if not chosen:
        raise ValueError(f"{what}: no such experiment; there are all, "
                         f"{', '.join([*book().reports, *known])}")
    if not run:
        return chosen
    runs = known[what].runs if what in known else {}
    if run not in runs:
        raise ValueError(f"{what}/{run}: no such run; {what} has {', '.join(runs) or 'none'}")
    return [dataclasses.replace(chosen[0], runs={run: runs[run]}, figures=())]


# ---------------------------------------------------------------------------- running


def reproduce(what: str | None = None, data: str | None = None, root: str | None = None,
              limit: int | None = None, epochs: int | None = None, precision: str | None = None,
              seeds: int = 1, out: str = "runs/reproduce", results: str | None = None):
    """Run the experiments of the lab reports: WHAT is an id such as 4.11, a report, or all.

    Without WHAT they are listed, with the time they took where that is known. An id and a run's
    name (2.7/adam) mean this run alone, without figures. Finished runs are skipped and stopped
    ones resumed. `--data`, `--root`, `--limit`, `--epochs` and `--precision` take the place of
    what the entries say; `--seeds` repeats every run. Ends in a table of reported and measured
    accuracies; `--results=FILE` keeps each of them in a CSV file once it is known.
    """
    if what is None:
        return costs()
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: must be at least 1")
    given = {"data": data, "root": root, "limit": limit, "epochs": epochs, "precision": precision}
    given = {name: value for name, value in given.items() if value is not None}
    rows = []
    for experiment in choose(what):
        print(f"\n{experiment.id}  {experiment.shows}", flush=True)
        for run in experiment.runs.values():
            measured = compare(run, [perform(run, given, out, seed) for seed in range(seeds)])
            rows += measured
            if results:
                keep_results(Path(results), measured)
        for figure in experiment.figures:
            for run in figure.runs.values():  # of other experiments: made if missing
                perform(run, given, out)
            draw(figure, given, out)
    return comparison(rows, ON_SCREEN) if rows else None


def perform(run, given, out, seed=0):
    """The result of a run in the folder `out`, made now or before; settings `given` come first."""
    folder, config = run.folder(out, seed), run.config
    values = {**given, "seed": seed, "out": str(folder.parent), "name": folder.name}
    if config.limit and "limit" in given:
        values["limit"] = min(config.limit, given["limit"])
    if "limit" in given or given.get("data") == "shapes":  # too few to hold out 10 000: a tenth
        values["val"] = 0 if config.val == 0 else None
    config = dataclasses.replace(config, **values)
    return finished_result(config) or train.train(config, resume=True)


def finished_result(config):
    """The result of the run of `config` if it is there and complete, else None."""
    path = config.folder / "result.json"
    if not path.exists():
        return None
    train.check_same_run(config)
    result, epochs, *_ = read_json(path, lambda result: (  # complains of what is not there
        result, int(result["epochs"]), *(train.format_cell(result[name]) for name in RESULT)))
    return result if epochs >= config.epochs else None


def draw(figure, given, out):
    """Do what the line of a `Figure` says, in this process, and show what it made."""
    _, script, *words = figure.filled(out)
    module, command = MODULES[script], words[0]
    if "limit" in given:  # a trial of the line, not a measurement
        words = [re.sub(r"^--steps=\d+$", "--steps=2", word) for word in words]
    if not figure.runs and module is not network:  # no run tells which images, and where it goes
        words += [f"--{name}={given[name]}" for name in ("data", "root") if name in given]
        if module is visualize:
            words.append(f"--out={Path(out) / f'{figure.experiment}-{command}'}")
    show(parse(module.COMMANDS, words, "train" if module is train else None)())


def costs():
    """The experiments and the time that their runs took where they were measured."""
    seconds = {(row.id, row.run): row.seconds for row in read_results(RESULTS).values()}
    rows = []
    for name, experiment in book().experiments.items():
        known = [taken for run in experiment.runs if (taken := seconds.get((name, run)))]
        missing = len(experiment.runs) - len(known)
        cost = duration(sum(known)) if known else "not measured" if missing else "figures only"
        rows.append((name, experiment.report, experiment.shows, ", ".join(experiment.runs) or "–",
                     cost + f", {missing} not measured" * bool(known and missing)))
    return Table(("id", "report", "shows", "runs", "time"), rows,
                 "python -m lab reproduce ID | ID/RUN | REPORT | all")


# ---------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Row:
    """An accuracy that is reported of a run beside the measured one, in per cent.

    All before `limit` is kept in results.csv; `std` is over several seeds. `state` is said in
    place of an accuracy that is not there.
    """

    id: str
    run: str
    accuracy: str
    reported: float | None = None
    measured: float | None = None
    std: float | None = None
    seeds: int | None = None
    epochs: int | None = None
    seconds: float | None = None
    device: str | None = None
    data: str | None = None
    commit: str | None = None
    limit: int | None = None
    state: str = "not measured"


KINDS = dict([*typing.get_type_hints(Row).items()][:12])  # the columns of results.csv
COLUMNS = ("id", "run", "accuracy", "reported %", "measured %", "difference", "epochs", "time",
           "images", "note")
ON_SCREEN = ("id", "run", "accuracy", "reported %", "measured %", "difference", "time")


def claims(run, state="not measured"):
    """A `Row` for each accuracy that is reported of a run, with nothing measured yet."""
    return [Row(run.experiment, run.name, part, claim, state=state)
            for part, claim in run.reported.items()]


def compare(run, done):
    """The rows of a run with what was measured of it: results of one seed or several."""
    config = Config.from_json(done[0]["settings"])
    rows = []
    for row in claims(run, state="–"):
        measured = [100 * result[f"{row.accuracy}/accuracy"] for result in done
                    if result[f"{row.accuracy}/accuracy"] is not None]
        rows.append(dataclasses.replace(
            row, measured=round(statistics.mean(measured), 2) if measured else None,
            std=round(statistics.stdev(measured), 2) if len(measured) > 1 else None,
            seeds=len(done), epochs=done[0]["epochs"],
            seconds=round(statistics.mean(result["seconds"] for result in done), 1),
            device=done[0]["device"] + ", bf16" * (config.precision == "bf16"),
            data=Path(config.data).name, limit=config.limit, commit=done[0]["commit"]))
    return rows


def comparison(rows, columns=COLUMNS):
    """The table of reported beside measured: on the screen, in Markdown and on a page."""
    lines, noted = [], set()
    for row in rows:
        experiment = book().experiments[row.id]
        known = None not in (row.reported, row.measured)
        std = "" if row.std is None else f" ± {row.std:.2f}"
        planned = experiment.runs[row.run].config.epochs if row.epochs else None
        lines.append(dict(zip(COLUMNS, (
            row.id, row.run, row.accuracy,
            "–" if row.reported is None else f"{row.reported:.2f}",
            row.state if row.measured is None else f"{row.measured:.2f}{std}",
            f"{row.measured - row.reported:+.2f}".replace("-", "−") if known else "–",
            f"{row.epochs or '–'}" + f" of {planned}" * (row.epochs != planned),
            "–" if row.seconds is None else duration(row.seconds), images_of(row),
            "" if row.id in noted else experiment.note))))
        noted.add(row.id)  # an experiment's note is in its first row
    return Table(columns, [[line[name] for name in columns] for line in lines])


def images_of(row):
    """On which images something was measured."""
    return f"{row.data or '–'}" + (f", limit {row.limit}" if row.limit else "")


def explanations(rows):
    """A sentence for each kind of images on which something measured lies below the report."""
    below = {row.data for row in rows if None not in (row.reported, row.measured)
             and row.measured < row.reported}
    return [f"Where figures on {name} lie below the report's: "
            f"{book().images.get(name, 'not explained')}." for name in sorted(below)]


def duration(seconds):
    """Seconds in the unit that suits them."""
    return (f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"
            if seconds >= 120 else f"{seconds:.1f} s")


def read_results(path):
    """{(id, run, accuracy): `Row`} of a CSV file of measured results."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [Row(**{name: parse_value(name, line.get(name) or "none", kind)
                       for name, kind in KINDS.items()}) for line in csv.DictReader(file)]
    return {(row.id, row.run, row.accuracy): row for row in rows}


def keep_results(path, rows):
    """Put `rows` into the CSV file of measured results, in place of older rows of the same runs."""
    kept = read_results(path) if path.exists() else {}
    kept |= {(row.id, row.run, row.accuracy): row for row in rows}
    order = [*book().experiments]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, Table([*KINDS], [
        ["" if (value := getattr(row, name)) is None else str(value) for name in KINDS]
        for row in sorted(kept.values(), key=lambda row: order.index(row.id))]).csv())


def results(path: str | None = None, readme: str = "README.md"):
    """Write the table of measured results from PATH into README, between its two markers."""
    text = Path(readme).read_text(encoding="utf-8")
    start, end = "<!-- results -->\n", "<!-- end of results -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{readme}: needs the lines {start.strip()} and {end} once each")
    before, after = text.split(start)[0], text.split(end)[1]
    write_atomically(readme, before + start + results_markdown(path or RESULTS) + end + after)
    return Path(readme)


def results_markdown(path):
    """All runs of the experiments with what the CSV file `path` says of them, as Markdown."""
    measured = read_results(path)
    rows = [measured.get((row.id, row.run, row.accuracy), row)
            for experiment in book().experiments.values()
            for run in experiment.runs.values() for row in claims(run)]
    return comparison(rows).markdown() + "".join(f"\n{text}\n" for text in explanations(rows))
