"""The experiments of five lab reports: run again, and what was reported beside what is measured.

    python -m lab reproduce        # lists the experiments and what they cost
    python -m lab reproduce 4.1 --data=shapes --limit=256 --epochs=1

experiments.toml says what is run and what was claimed, results.csv what was measured so far;
docs/results.md shows both.
"""

import collections
import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import os
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
from data import (
    Table,
    check_ours,
    fingerprint_of,
    parse,
    parse_value,
    show,
    text_of,
    write_atomically,
)
from lab import smoothness
from train import Config

RESULTS = Path(__file__).with_name("results.csv")
# What is told of a run in one line.
RESULT = ("test/accuracy", "test/accuracy_tta", "val/accuracy", "seconds")
MODULES = {f"{module.__name__}.py": module
           for module in (data_module, network, train, visualize, deconv)} | {"-m": smoothness}
# {name} in a figure's line is the folder of a run of the same experiment, {id/name} of another.
PLACEHOLDER = re.compile(r"\{(?:([^{}/]+)/)?([^{}]+)\}")


# ---------------------------------------------------------------------------- experiments.toml


@dataclass(frozen=True)
class Run:
    """A training run of an experiment: its command line, the settings that this asks for, the
    accuracies that are reported of it, in per cent (None where the report says nothing), and
    whether it takes more than a CPU can do in a day."""

    experiment: str
    name: str
    line: str
    config: Config
    reported: dict[str, float | None]
    gpu: bool

    @property
    def state(self):
        """What is said in place of an accuracy that is not there."""
        return "waits for a GPU" if self.gpu else "not measured"

    def folder(self, out, seed=0):
        """The run's folder in the folder `out`; the first seed's has no number."""
        return Path(out) / f"{self.experiment}-{self.name}{f'-seed{seed}' if seed else ''}"


@dataclass(frozen=True)
class Figure:
    """A command line of an experiment, as words, and the runs that its {…} stand for."""

    experiment: str
    words: tuple[str, ...]
    runs: dict[str, Run]

    @property
    def command(self):
        """The command's name: the word behind "visualize.py" or "-m lab"."""
        return self.words[3 if self.words[1] == "-m" else 2]

    def folder(self, out):
        """Where it is drawn if its runs are in the folder `out`: beside other figures of its first
        run, but apart from those of other experiments, which the same command may have drawn."""
        run = next(iter(self.runs.values()), None)
        return (run.folder(out) if run else Path(out)) / "figures" / self.experiment

    def mark(self, out):
        """The file that says which `training` it was drawn of."""
        return self.folder(out) / f".of-{digest_of(' '.join(self.words).encode())}"

    def training(self, out):
        """What tells its runs, in the folder `out`, from earlier ones there: digests of what they
        logged."""
        files = (run.folder(out) / "metrics.csv" for run in self.runs.values())
        return "\n".join(digest_of(file.read_bytes()) for file in files if file.is_file())

    def filled(self, out):
        """The words with the runs' folders, which are in `out`: word by word, so that spaces and
        backslashes of a path mean nothing but themselves."""
        return [PLACEHOLDER.sub(lambda match: str(self.runs[match[0]].folder(out)), word)
                for word in self.words]


# An entry of experiments.toml, with its `Run`s by their names and its `Figure`s.
Experiment = collections.namedtuple("Experiment", "id report shows note runs figures")
# All that experiments.toml says: experiments by id, and titles of the reports.
Book = collections.namedtuple("Book", "experiments reports")


@functools.cache
def book():
    """The `Book` of this folder, read and parsed once."""
    content = tomllib.loads(Path(__file__).with_name("experiments.toml").read_text("utf-8"))
    runs = {}
    for entry in content["experiment"]:
        for name, line in entry.get("runs", {}).items():
            claims = entry.get("reported", {}).get(name, {"test": False})
            runs[entry["id"], name] = Run(
                entry["id"], name, line, config_of(line),
                {part: claim or None for part, claim in claims.items()},
                name in entry.get("gpu", ()))

    def figure(experiment, line):
        named = {match[0]: runs[match[1] or experiment, match[2]]
                 for match in PLACEHOLDER.finditer(line)}
        return Figure(experiment, tuple(shlex.split(line)), named)

    return Book({entry["id"]: Experiment(
        entry["id"], entry["report"], entry["shows"], entry.get("note", ""),
        {name: runs[entry["id"], name] for name in entry.get("runs", {})},
        tuple(figure(entry["id"], line) for line in entry.get("figures", ())))
        for entry in content["experiment"]}, content["reports"])


def config_of(line, environment=False):
    """The settings that a command line of train.py asks for, alone or in this `environment`."""
    flags = dict(word.removeprefix("--").split("=", 1) for word in shlex.split(line)[2:])
    return Config.create(**(train.parse_flags if environment else train.typed)(flags))


def choose(what, kind="experiment", others=()):
    """The experiments that `what` means: an id, a report's name, or `all`.

    An id and a run's name, such as 2.7/adam, mean that experiment with this run only. ValueError
    says that there is no such `kind` of thing, and which of them or of `others` has a name like it.
    """
    known, (first, _, run) = book().experiments, what.partition("/")
    chosen = [experiment for experiment in known.values()
              if first in ("all", experiment.id, experiment.report)]
    if not chosen:
        near = difflib.get_close_matches(
            what, ["all", *book().reports, *known, *others], cutoff=0.5)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"{what}: no such {kind}{hint} (python -m lab reproduce lists the "
                         f"experiments)")
    if not run:
        return chosen
    runs = known[first].runs if first in known else {}
    if run not in runs:
        raise ValueError(f"{what}: no such run; {first} has {', '.join(runs) or 'none'}")
    return [chosen[0]._replace(figures=(), runs={
        run: dataclasses.replace(runs[run], gpu=False)})]  # asked for by name, it waits for nothing


# ---------------------------------------------------------------------------- running


def reproduce(what: str | None = None, data: str | None = None, root: str | None = None,
              limit: int | None = None, epochs: int | None = None, precision: str | None = None,
              seeds: int = 1, out: str = "runs/reproduce", results: str | None = None):
    """Run the experiments of the lab reports: WHAT is an id such as 4.11, a report, or all.

    Without WHAT they are listed, with the time they took where that is known. An id and a run's
    name (2.7/adam) mean this run alone, without figures. Finished runs are skipped and stopped
    ones resumed; what takes days without a GPU is left out where there is none, unless a run is
    named or `--limit` makes it small. `--data`, `--root`, `--limit`, `--epochs` and `--precision`
    take the place of what the entries say; `--seeds` repeats every run. Ends in a table of reported
    and measured accuracies; `--results=FILE` keeps each of them in a CSV file once it is known.
    Where a run or a figure fails, the others go on, and the end is an error.
    """
    flags = {"data": data, "root": root, "limit": limit, "epochs": epochs, "precision": precision}
    given = {name: value for name, value in flags.items() if value is not None}
    if what is None and (given or results or seeds != 1 or out != "runs/reproduce"):
        raise ValueError("which experiment? Without WHAT no flag counts, and all are listed")
    if what is None:
        return costs()
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: must be at least 1")
    out, more = os.path.expanduser(out), train.parse_flags({})  # TRAIN_FLAGS win, here too
    if lost := {"seed", "out", "name"} & {*more}:
        raise ValueError(f"TRAIN_FLAGS: `{min(lost)}` has no effect on experiments")
    given |= {name: value for name, value in more.items() if name in flags}
    # A trial of a few images shows that a line works, and needs no GPU.
    able = "limit" in given or train.choose_device().type == "cuda"
    rows, failed, kept = [], {}, Path(os.path.expanduser(results)) if results else None
    if kept:  # complains of another table before anything is trained
        train.check_output(kept, ".csv", "results")
        if kept.exists():
            read_results(kept)
    for experiment in choose(what):
        data_module.show(f"\n{experiment.id}  {experiment.shows}")
        for run in experiment.runs.values():
            if run.gpu and not able:
                rows += claims(run)
                continue
            # Stands in the table if the run fails; else the measured ones take its place.
            measured = claims(run, "failed")
            with noted(failed, f"{experiment.id}/{run.name}"):
                measured = compare(run, [perform(run, given, out, seed) for seed in range(seeds)])
                if kept:
                    keep_results(kept, measured)
            rows += measured
        for figure in experiment.figures:
            if able or not any(run.gpu for run in figure.runs.values()):
                with noted(failed, " ".join(figure.filled(out)[1:])):
                    for run in figure.runs.values():  # of other experiments: made if missing
                        perform(run, given, out)
                    draw(figure, given, out)
    table = comparison(rows, ON_SCREEN) if rows else None
    if failed:
        show(table)
        raise ValueError(f"{len(failed)} failed. " + "; ".join(
            f"{name}: {error}" for name, error in failed.items()))
    return table


@contextlib.contextmanager
def noted(failed, name):
    """A context whose errors become `failed[name]`: what comes after it goes on."""
    try:
        yield
    except (ValueError, OSError) as error:
        failed[name] = str(error)  # the error itself would hold the run's network


def perform(run, given, out, seed=0):
    """The result of a run in the folder `out`, made now or before; settings `given` come first."""
    folder, config = run.folder(out, seed), config_of(run.line, environment=True)
    values = {**given, "seed": seed, "out": str(folder.parent), "name": folder.name}
    if config.limit and "limit" in given:
        values["limit"] = min(config.limit, given["limit"])
    if "limit" in given or given.get("data") == "shapes":  # too few to hold out 10 000: a tenth
        values["val"] = None if config.val == run.config.val != 0 else config.val
    config = dataclasses.replace(config, **values)
    result = train.finished(config.folder, config)
    if result and changed_since(result):
        raise ValueError(f"{config.folder}: was measured on images that have changed since; "
                         f"`out=FOLDER` measures it anew")
    return result or train.train(config, resume=True)


def changed_since(result, now=fingerprint_of):
    """Whether the images of a run's result have changed since; `now` tells what they are now."""
    with contextlib.suppress(OSError, ValueError):  # they may be gone, which changes nothing
        return not data_module.same_files(result.get("fingerprint"),
                                          now(result["settings"]["data"]))
    return False


def draw(figure, given, out):
    """Do what the line of a `Figure` says, in this process, and show what it made."""
    _, script, *words = figure.filled(out)
    module, command, words = MODULES[script], figure.command, words[script == "-m":]
    if "limit" in given:  # a trial of the line, not a measurement
        words = [re.sub(r"^--steps=\d+$", "--steps=2", word) for word in words]
    if not figure.runs and module is not network:  # no run tells which images
        words += [f"--{name}={given[name]}" for name in ("data", "root") if name in given]
    if module in (visualize, deconv, smoothness) and command != "projector":  # a TensorBoard log
        words.append(f"--out={figure.folder(out)}/")
    show(parse(module.COMMANDS, words, "train" if module is train else None)())
    if figure.folder(out).is_dir():
        write_atomically(figure.mark(out), figure.training(out))


def costs():
    """The experiments and the time that their runs took where they were measured."""
    seconds = {(row.id, row.run): row.seconds for row in read_results(RESULTS).values()}
    rows = []
    for name, experiment in book().experiments.items():
        known = [taken for run in experiment.runs if (taken := seconds.get((name, run)))]
        missing = collections.Counter(
            "not timed" if (name, run.name) in seconds else run.state
            for run in experiment.runs.values() if not seconds.get((name, run.name)))
        cost = [duration(sum(known))] if known else []
        cost += [f"{count} {state}" for state, count in missing.items()]
        rows.append((name, experiment.report, experiment.shows, ", ".join(experiment.runs) or "–",
                     ", ".join(cost) or "figures only"))
    return Table(("id", "report", "shows", "runs", "time"), rows,
                 "python -m lab reproduce ID | ID/RUN | REPORT | all")


# ---------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Row:
    """An accuracy that is reported of a run beside the measured one, in per cent.

    All before `state` are the columns of results.csv. `std` is over several seeds, `seconds` are
    those of one run; `data` also tells a limit, and settings that are not as planned. `state` is
    said in place of an accuracy that is not there.
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
    threads: int | None = None
    precision: str | None = None
    data: str | None = None
    device: str | None = None
    commit: str | None = None
    state: str = "–"

    @property
    def planned(self):
        """The settings of the run as its experiment asks for them."""
        return book().experiments[self.id].runs[self.run].config

    @property
    def elsewhere(self):
        """Whether it was measured on other images than the report's, or with other settings."""
        return self.data is not None and self.data != images_of(self.planned)

    @property
    def unlike(self):
        """Whether it has other epochs than its experiment asks for, and did not end by itself."""
        return self.epochs is not None and self.epochs != self.planned.epochs and not (
            self.planned.patience and self.epochs < self.planned.epochs)

    @property
    def weight(self):
        """What measures a run better is greater: on the report's images, nearer to its epochs, more
        seeds."""
        return not self.elsewhere, -abs((self.epochs or 0) - self.planned.epochs), self.seeds or 0

    @property
    def difference(self):
        """Points above the reported accuracy; None where the two cannot be compared."""
        known = None not in (self.reported, self.measured) and not (self.elsewhere or self.unlike)
        return round(self.measured - self.reported, 2) if known else None


COLUMNS = dict([*typing.get_type_hints(Row).items()][:-1])  # of results.csv, and their types
HEADER = ("id", "run", "accuracy", "reported %", "measured %", "difference", "seeds", "epochs",
          "time", "images", "threads or GPU", "precision", "commit")
ON_SCREEN, ON_PAGE = HEADER[:6], HEADER[:10]

def claims(run, state=None):
    """A `Row` for each accuracy that is reported of a run, with nothing measured yet."""
    return [Row(run.experiment, run.name, part, claim, state=state or run.state)
            for part, claim in run.reported.items()]


def compare(run, done):
    """The rows of a run with what was measured of it: results of one seed or several."""
    config = Config.from_json(done[0]["settings"])
    # "cpu, 2 threads, a processor" as `train.environment` writes it, or a GPU's name.
    device, *threads = re.split(r", (\d+) threads?", done[0]["device"])  # name, number, name
    precision, device = config.precision, device + "".join(threads[1:])
    if precision == "auto":  # earlier versions did not say what that came to; on a CPU it is clear
        precision = done[0].get("precision") or ("fp32" if threads else "auto")
    others = [f"{name} {text_of(value)}" for name, value
              in other_settings(config, run.config).items()]
    now = functools.cache(fingerprint_of)  # of all seeds the same images
    changed = ["images that have changed since"] * any(changed_since(each, now) for each in done)
    rows = []
    for row in claims(run, state="–"):
        name = "test/accuracy_tta" if row.accuracy == "tta" else f"{row.accuracy}/accuracy"
        measured = [100 * result[name] for result in done if result[name] is not None]
        rows.append(dataclasses.replace(
            row, measured=round(statistics.mean(measured), 2) if measured else None,
            # Over n − 1: seeds are a sample.
            std=round(statistics.stdev(measured), 2) if len(measured) > 1 else None,
            seeds=len(measured) or len(done), epochs=min(result["epochs"] for result in done),
            seconds=round(statistics.mean(result["seconds"] for result in done), 1),
            threads=int(threads[0]) if threads else None, precision=precision,
            data=", ".join([images_of(config), *others, *(
                [f"tta {config.tta}"] if row.accuracy == "tta" and config.tta != run.config.tta
                else []), *dict.fromkeys(result["history"] for result in done
                                         if result.get("history")), *changed]),
            device=device, commit=done[0]["commit"]))
    return rows


def images_of(config):
    """On which images a run is trained and measured."""
    return data_module.name_of(config.data) + (f", limit {config.limit}" if config.limit else "")


def other_settings(config, planned):
    """{name: value} of a run's settings that make it another one than `planned`, beside what the
    flags of `reproduce` say."""
    now, plan = config.all_settings(), planned.all_settings()
    flags = {"data", "limit", "seed", "precision", "deterministic"}
    flags |= {"image_size"} if config.size == planned.size else set()
    # Of other or fewer images another number is held out, see `perform`.
    flags |= {"val"} if images_of(config) != images_of(planned) else set()
    names = train.differing(now, plan) + ["patience"] * (config.patience != planned.patience)
    return {name: now[name] for name in names if name in now and name not in flags}


def comparison(rows, columns=HEADER):
    """The table of reported beside measured: on the screen, in Markdown and on a page."""
    lines = []
    for row in rows:
        std = "" if row.std is None else f" ± {row.std:.2f}"
        fewer = f" of {row.planned.epochs}" if row.data and row.epochs != row.planned.epochs else ""
        short = f"{row.epochs}{fewer} epochs" if row.unlike else ""
        cells = {
            "reported %": row.reported and f"{row.reported:.2f}", "images": row.data,
            "measured %": row.state if row.measured is None else f"{row.measured:.2f}{std}",
            "difference": "not as reported" if row.elsewhere else short or (
                row.difference is not None and f"{row.difference:+.2f}".replace("-", "−")),
            "epochs": row.epochs and f"{row.epochs}{fewer}",
            "time": row.seconds and duration(row.seconds),
            "threads or GPU": row.threads or row.device}
        lines.append([str(cells.get(name, getattr(row, name, None)) or "–") for name in columns])
    return Table(columns, lines)


def duration(seconds):
    """Seconds in the unit that suits them."""
    return (f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"
            if seconds >= 120 else f"{seconds:.1f} s")


# In a text that people may add to, a digest of it is put before the end of this comment.
SEAL = re.compile("(<!-- Written by python -m lab [a-z]+)(: [0-9a-f]{16})? -->")


def sealed(text):
    """A text with a digest of itself, which tells whether it was changed since it was written."""
    bare = SEAL.sub(r"\1 -->", text, count=1)
    return SEAL.sub(rf"\1: {digest_of(bare.encode())} -->", bare, count=1)


def digest_of(content):
    """The digest of bytes that a seal has."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def check_unchanged(path, sign):
    """FileExistsError if there is a file `path` without the text `sign`, which is none of ours, or
    one that somebody has changed: it is never replaced."""
    check_ours(path, sign)
    text = Path(path).read_text("utf-8", "replace") if Path(path).exists() else ""
    seal = SEAL.search(text)
    if text and (not seal or (seal[2] and sealed(text) != text)):
        raise FileExistsError(f"{path}: was changed since it was written and stays as it is; move "
                              f"it away or choose another place")


def replace(path, content, sign):
    """Write a file that this package makes: all or nothing, and never over one that is not ours or
    was changed (see `check_unchanged`)."""
    check_unchanged(path, sign)
    write_atomically(path, sealed(content))


def read_results(path):
    """{(id, run, accuracy): `Row`} of a CSV file of measured results; ValueError for another."""
    data_module.check_regular(path)  # Excel's files begin with a mark of their encoding
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            header, *lines = csv.reader(file, strict=True)
            if header != [*COLUMNS] or {len(line) for line in lines} - {len(header)}:
                raise ValueError(f"its columns must be {','.join(COLUMNS)}")
            rows = [Row(**{name: parse_value(name, text or "none", kind)
                           for (name, kind), text in zip(COLUMNS.items(), line)})
                    for line in lines]
            keys = collections.Counter((row.id, row.run, row.accuracy) for row in rows)
            if twice := ["/".join(map(str, key)) for key, count in keys.items() if count > 1]:
                raise ValueError(f"several rows of {', '.join(twice)}")
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}: no table of measured results ({error})") from error
    return dict(zip(keys, rows))


def keep_results(path, rows):
    """Put `rows` into the CSV file of measured results, in place of older rows of the same runs
    that weigh no more."""
    # In the order of experiments.toml, so that a new row changes one place of the file.
    order = {name: number for number, name in enumerate(book().experiments)}
    # Held from reading to writing: of two commands at once, one would drop the other's rows.
    with data_module.lock(path.parent, f".{path.name}.lock", waits="writing results"):
        kept = read_results(path) if path.exists() else {}
        for row in rows:
            key = (row.id, row.run, row.accuracy)
            if key in kept and kept[key].weight > row.weight:
                data_module.show(f"{path}: the row of {row.id}/{row.run} stays as it is: it is of "
                                 f"the report's images, of more epochs or of more seeds")
            else:
                kept[key] = row
        write_atomically(path, Table([*COLUMNS], [
            ["" if (value := getattr(row, name)) is None else str(value) for name in COLUMNS]
            for row in sorted(kept.values(), key=lambda row: order.get(row.id, len(order)))
        ]).csv())
