"""The lab: experiments that can all be run, tables that say the same, pages, sweeps, benchmark."""

import dataclasses
import html.parser
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
import visualize
from lab import __main__ as lab_module
from lab import benchmark, report, reproduce, sweep
from lab import gpu as lab_gpu
from lab.__main__ import COMMANDS, MEANINGS

ROOT = Path(__file__).parent.parent
EXPERIMENTS = [*reproduce.book().experiments.values()]
pytestmark = pytest.mark.usefixtures("coarse_figures")


def never_replaced(path, write):
    """See that `write` leaves `path` alone when it is somebody else's, or was changed."""
    kept = path.read_text()
    for mine, said in (("my own", "is not from here"), (f"{kept}\nMy notes.", "was changed since")):
        path.write_text(mine)
        with pytest.raises(FileExistsError, match=rf"{path.name}: {said}"):
            write()
        assert path.read_text() == mine
    path.unlink()
    os.mkfifo(path)  # which would keep its reader waiting
    with pytest.raises(FileExistsError, match=rf"{path.name}: is not from here"):
        write()
    path.unlink()
    path.write_text(kept)


def lab(*words):
    """Run a command line of the lab in this process."""
    data.command_line(COMMANDS, argv=words, meanings=MEANINGS)


# ---------------------------------------------------------------------------- experiments.toml


def test_ids_are_unique_and_selections_work():
    text = (ROOT / "lab" / "experiments.toml").read_text(encoding="utf-8")
    assert len(EXPERIMENTS) == text.count("[[experiment]]")  # so no id is there twice
    assert [experiment.id for experiment in reproduce.choose("4.11")] == ["4.11"]
    assert len(reproduce.choose("cnn-trials")) == 11
    assert reproduce.choose("all") == EXPERIMENTS
    only, = reproduce.choose("2.7/adam")
    assert list(only.runs) == ["adam"] and not only.figures
    for wrong, answer in (("4.12", r"4\.12: no such experiment; did you mean .*4\.11.*\(python -m"),
                          ("cnn-trails", "did you mean cnn-trials"),
                          ("nine", r"nine: no such experiment \(python"),
                          ("2.7/x", "2.7/x.*batch22, adam, large"),
                          ("2.1/x", "none"), ("all/x", "none")):
        with pytest.raises(ValueError, match=answer):
            reproduce.choose(wrong)
    with pytest.raises(ValueError, match="seeds=0"):
        reproduce.reproduce("4.1", seeds=0)


@pytest.mark.parametrize("entry", EXPERIMENTS, ids=lambda entry: entry.id)
def test_every_run_is_a_valid_line_and_every_claim_belongs_to_a_run(entry):
    for run in entry.runs.values():
        assert run.line.startswith("python train.py --model=")
        assert run.config == reproduce.config_of(run.line)
    raw = next(raw for raw in reproduce.tomllib.loads(
        (ROOT / "lab" / "experiments.toml").read_text(encoding="utf-8"))["experiment"]
        if raw["id"] == entry.id)
    assert set(raw.get("reported", {})) <= set(entry.runs)
    assert entry.runs or entry.figures


def test_what_a_report_says_does_not_change_with_a_recipe():
    for run in (run for entry in EXPERIMENTS for run in entry.runs.values()):
        if "--schedule=" in run.line:  # the report's settings, not the network's own recipe
            flags = dict(word[2:].split("=") for word in shlex.split(run.line)[2:])
            options = {name: flags.pop(name) for name in run.config.options if name in flags}
            bare = train.Config(**train.parse_flags(flags), options=run.config.options)
            assert bare == run.config and options.keys() == run.config.options.keys(), run.line


def test_every_figure_is_a_known_command_on_known_runs():
    known = {(entry.id, name): run for entry in EXPERIMENTS for name, run in entry.runs.items()}
    for entry in EXPERIMENTS:
        for figure in entry.figures:
            _, script, *words = figure.filled("a folder\\1")
            module = reproduce.MODULES[script]
            data.parse(module.COMMANDS, words[script == "-m":],
                       "train" if module is train else None)
            for run in figure.runs.values():
                assert known[run.experiment, run.name] is run
            assert not [word for word in words if "{" in word]
            assert bool(figure.runs) == any("a folder\\1" in word for word in words)


def test_reproduce_alone_lists_the_experiments_with_their_cost_and_trains_nothing(
        capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "train", None)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results.csv")
    reproduce.keep_results(reproduce.RESULTS, [
        reproduce.Row("1.1", "lenet", "test", seconds=50.9),
        *(reproduce.Row("4.2", "conv2_25", part, seconds=230.0) for part in ("test", "val")),
        reproduce.Row("4.3", "conv2_30", "test", measured=69.0)])  # beside other work
    table = reproduce.reproduce()
    rows = {row[0]: row[-1] for row in table.rows}
    assert [*rows] == [entry.id for entry in EXPERIMENTS]
    assert rows["1.1"] == "50.9 s" and rows["2.4"] == "figures only"
    assert rows["4.2"] == "4 min, 1 not measured"
    assert rows["4.3"] == "1 not timed, 1 not measured"
    assert rows["3.3"] == "2 not measured, 1 waits for a GPU"
    lab("reproduce")
    assert "4.11" in capsys.readouterr().out


def test_what_waits_for_a_gpu_is_left_out_unless_named(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(reproduce, "perform", lambda run, *_: made.append(run.name))
    monkeypatch.setattr(reproduce, "compare", lambda run, _done: reproduce.claims(run, "made"))
    monkeypatch.setattr(reproduce, "draw", lambda figure, *_: made.append(figure.words[2]))
    monkeypatch.setattr(train, "choose_device", lambda *_: torch.device("cpu"))
    table = reproduce.reproduce("3.3")
    assert made == ["width32", "width8", "width8", "leaky_relu_quarter_width", "width32", "curves"]
    assert [row[4] for row in table.rows] == ["made", "waits for a GPU", "made"]
    for what, given in (("3.3/width128", {}), ("3.5", {"limit": 40})):
        made.clear()
        reproduce.reproduce(what, **given)
        assert made in (["width128"], ["final"])
    monkeypatch.setattr(train, "choose_device", lambda *_: torch.device("cuda"))
    reproduce.reproduce("3.1")
    assert made[1:4] == ["relu", "leaky_relu", "elu"]


# ---------------------------------------------------------------------------- results


def test_the_page_of_results_shows_what_was_measured(tmp_path):
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert text == reproduce.sealed(report.results_markdown(ROOT / "lab" / "results.csv"))
    claims = [row for entry in EXPERIMENTS for run in entry.runs.values()
              for row in reproduce.claims(run)]
    assert len(re.findall(r"^\| (\d|recipes)", text, re.MULTILINE)) == len(claims)
    (tmp_path / "results.csv").write_text(",".join(reproduce.COLUMNS))
    bare = report.results_markdown(tmp_path / "results.csv")
    assert "| 3.5 | final | train | 99.99 | waits for a GPU | – |" in bare
    assert "| 4.1 | base | test | 64.86 | not measured | – |" in bare
    for row in reproduce.read_results(ROOT / "lab" / "results.csv").values():
        assert row.data.startswith("cifar10") and "jpeg" not in row.data and row.commit
        assert row.precision and row.seeds and (row.threads or "cpu" not in row.device)


def test_the_readme_says_what_was_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [*reproduce.read_results(reproduce.RESULTS).values()]
    for row in rows:
        if row.id == "recipes":
            assert row.epochs == row.planned.epochs and row.data == "cifar10"
            assert f"{reproduce.comparison([row], ['measured %']).rows[0][0]} %" in text
    said = re.findall(r"^\| (\d\.\d+) \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    known = reproduce.comparison(rows, ["id", "reported %", "measured %"]).rows
    assert said and {*said} <= {*map(tuple, known)}


def test_results_are_written_and_never_over_another_file(tmp_path, capsys):
    path = tmp_path / "a folder" / "results.md"
    for _ in range(2):
        lab("results", f"--out={path}")
        assert path.read_text() == reproduce.sealed(report.results_markdown(reproduce.RESULTS))
    assert capsys.readouterr().out == f"{path}\n{path}\n"
    never_replaced(path, lambda: report.results(out=str(path)))
    assert len([*path.parent.iterdir()]) == 1


def test_results_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "results.csv")  # which would keep its reader waiting
    with pytest.raises(OSError, match=r"results\.csv: not a regular file"):
        reproduce.read_results(tmp_path / "results.csv")


def measured(said=(), **values):
    """The row of experiment 1.1 of a run with these settings, whose result has `said` too."""
    entry, = reproduce.choose("1.1/lenet")
    config = dataclasses.replace(entry.runs["lenet"].config, **values)
    result = {"test/accuracy": 0.5, "epochs": 1, "seconds": 9.0, "commit": "abc",
              "device": "cpu, 1 threads, AMD EPYC", "settings": dataclasses.asdict(config)}
    row, = reproduce.compare(entry.runs["lenet"], [{**result, **dict(said)}])
    return row


def test_a_row_says_how_and_on_what_it_was_measured(tmp_path):
    row, path = measured(precision="bf16"), tmp_path / "results.csv"
    assert (row.device, row.threads, row.precision) == ("cpu, AMD EPYC", 1, "bf16")
    assert measured().precision == "fp32" and row.measured == 50
    gpu = {"device": "Tesla T4", "precision": "fp32"}  # what `auto` comes to without bf16
    assert measured(said=gpu).precision == "fp32" and measured(said=gpu).threads is None
    reproduce.keep_results(path, [row])
    assert reproduce.read_results(path) == {("1.1", "lenet", "test"): row}
    assert ("| 57.20 | 50.00 | 1 of 2 epochs | 1 | 1 of 2 | 9.0 s | cifar10 | 1 | bf16 | abc |"
            in report.results_markdown(path))


def test_results_of_two_commands_at_once_are_all_kept(tmp_path, monkeypatch):
    path, read, others = tmp_path / "results.csv", reproduce.read_results, []
    first, second, third = (reproduce.Row("4.2", "conv2_25", part) for part in "abc")
    reproduce.keep_results(path, [first])

    def while_another_comes(path):
        rows = read(path)
        if not others:
            others.append(threading.Thread(target=reproduce.keep_results, args=(path, [third])))
            others[0].start()
            others[0].join(0.5)  # it would be done by then, if it did not wait
        return rows
    monkeypatch.setattr(reproduce, "read_results", while_another_comes)
    reproduce.keep_results(path, [second])
    others[0].join()
    assert [*read(path).values()] == [first, second, third]
    assert [*tmp_path.iterdir()] == [path]


def test_other_images_than_the_reports_are_not_compared(tmp_path):
    for values, images in (({"data": "shapes"}, "shapes"), ({"data": "x/cifar10-jpeg"},
                           "cifar10-jpeg"), ({"limit": 40}, "cifar10, limit 40")):
        reproduce.keep_results(tmp_path / "results.csv", [measured(**values)])
        assert (f"| 57.20 | 50.00 | not as reported | 1 | 1 of 2 | 9.0 s | {images} |"
                in report.results_markdown(tmp_path / "results.csv"))
    row = measured(lr=0.5, batch_size=64, seed=1, epochs=1)  # as TRAIN_FLAGS may have it
    assert row.data == "cifar10, batch_size 64, lr 0.5" and row.difference is None
    planned = reproduce.book().experiments["1.3"].runs["vgg16_1x1"].config
    assert reproduce.images_of(planned) == "cifar10, limit 8000"  # the report's own limit
    row = reproduce.Row("1.3", "vgg16_1x1", "test", 24.5, 30.0, epochs=3,
                        data="cifar10, limit 8000")
    assert reproduce.comparison([row]).rows[0][5] == "+5.50"


def test_a_trial_by_the_environment_is_of_other_images(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAIN_FLAGS", "--data=shapes --limit=32 --epochs=1 --val=0")
    reproduce.book.cache_clear()
    table = reproduce.reproduce("1.1/lenet", out=str(tmp_path))
    assert [row[3:6] for row in table.rows] == [["57.20", table.rows[0][4], "not as reported"]]
    reproduce.book.cache_clear()


@pytest.mark.parametrize("environment, held_out", [("", None), (" --val=8", 8)])
def test_the_environment_wins_over_the_flags_of_reproduce(tmp_path, monkeypatch, environment,
                                                          held_out):
    monkeypatch.setenv("TRAIN_FLAGS", "--data=shapes --limit=32 --epochs=1" + environment)
    reproduce.reproduce("4.1/base", epochs=2, limit=64, out=str(tmp_path))
    config = train.read_config(tmp_path / "4.1-base" / "config.json")
    assert (config.data, config.limit, config.epochs, config.val) == ("shapes", 32, 1, held_out)
    assert len(reproduce.reproduce().rows) == len(reproduce.book().experiments)  # as ever


def test_texts_without_a_seal_and_tables_without_a_page_stay(tmp_path):
    path = tmp_path / "results.md"
    reproduce.replace(path, report.results_markdown(reproduce.RESULTS), report.RESULTS_SIGN)
    path.write_text(mine := re.sub("<!--.*-->", "mine", path.read_text()))
    with pytest.raises(FileExistsError, match=r"results\.md: was changed"):
        reproduce.replace(path, "other", report.RESULTS_SIGN)
    (tmp_path / "g").mkdir()
    sheet = tmp_path / "g" / "sweep.csv"
    sheet.write_text("lr,seconds\n0.3,811\n")
    with pytest.raises(FileExistsError, match=r"sweep\.csv: is there without sweep\.md"):
        sweep.sweep(data="shapes", limit="32", epochs="1", lr="0.1,0.01", out=str(tmp_path),
                    name="g")
    assert path.read_text() == mine and sheet.read_text().endswith("811\n")


def test_a_mean_of_seeds_says_of_how_many_it_is():
    entry, = reproduce.choose("1.1/lenet")
    config = dataclasses.replace(entry.runs["lenet"].config, patience=1)
    results = [{"test/accuracy": accuracy, "epochs": epochs, "seconds": 1.0, "commit": "abc",
                "device": "cpu, 1 thread, x", "settings": dataclasses.asdict(config)}
               for accuracy, epochs in ((0.5, 2), (None, 3), (0.7, 1))]
    row, = reproduce.compare(entry.runs["lenet"], results)
    assert (row.measured, row.seeds, row.epochs) == (60, 2, 1) and "patience 1" in row.data


def test_fewer_epochs_than_planned_are_not_compared():
    entry, = reproduce.choose("1.1/lenet")
    assert measured(epochs=1).difference is None  # of 2
    assert measured({"epochs": 2}).difference == pytest.approx(50 - 57.2)
    assert reproduce.comparison([measured()]).rows[0][5] == "1 of 2 epochs"
    more = measured({"epochs": 50})
    assert more.difference is None and reproduce.comparison([more]).rows[0][5] == "50 of 2 epochs"
    assert more.weight < measured().weight < measured({"epochs": 2}).weight
    grown = measured({"epochs": 2, "history": "planned for 1 epoch up to step 9"})
    assert grown.difference is None and "planned" in grown.data and grown.elsewhere
    run = dataclasses.replace(entry.runs["lenet"], reported={"test": 57.2, "tta": 57.2})
    config = dataclasses.replace(run.config, tta="flip")
    plain, views = reproduce.compare(run, [{
        "test/accuracy": 0.5, "test/accuracy_tta": 0.5, "epochs": 2, "seconds": 1.0, "commit": "a",
        "device": "cpu, 1 thread, x", "settings": dataclasses.asdict(config)}])
    assert (plain.data, views.data) == ("cifar10", "cifar10, tta flip")


def test_commands_of_several_processes():
    config = train.Config.create("lenet", data="shapes")
    assert train.command_of(config) == "python train.py --model=lenet --data=shapes"
    assert report.commands_of(config, 2).startswith(
        "torchrun --standalone --nproc_per_node=2 train.py --model=lenet \\\n")
    assert report.commands_of(config, None).startswith("python train.py")


def test_values_of_a_sweep_that_share_a_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="would be the folder of two runs"):
        sweep.grid_of({"data": "x/pets,x_pets"})


def test_a_sweep_says_which_runs_grew(tmp_path):
    grid = {"data": "shapes", "limit": "32", "batch_size": "16", "seed": "0,1",
            "out": str(tmp_path)}
    sweep.sweep(**grid, epochs="1")
    states = [row[-1] for row in sweep.sweep(**grid, epochs="2")[0].rows]
    assert states == ["finished, planned for 1 epoch up to step 2"] * 2


def test_commas_in_a_sweep(tmp_path, refused):
    pets = tmp_path / "a,b"
    pets.mkdir()
    choices, configs = sweep.grid_of({"data": str(pets), "lr": "0.1,0.01"})
    assert [config.data for config in configs] == [str(pets)] * 2 and [*choices[0]] == ["lr"]
    assert "must have no comma" in refused(lab_module.COMMANDS, [
        "sweep", "--lr=0.1,0.01", f"--root={tmp_path}/x,y"])


@pytest.mark.parametrize("words, said", [
    (["reproduce", "--limit=32"], "which experiment?"), (["reproduce", "--seeds=3"], "which exp"),
    (["reproduce", "--out=x"], "which experiment?"),
    (["results", "--out=x.PNG"], "out=x.PNG: must be a file whose name ends in .md"),
    (["reproduce", "1.1", "--results=x.json"], "results=x.json: must be a file whose name ends in"),
    (["report", "1.1", "--out=x.htm"], "out=x.htm: must be a folder"),
    (["report", "1.1", "--device=cpu"], "--device=cpu: is for the page of a run"),
    (["report", "tests", "--runs=x"], "--runs=x: is for experiments")])
def test_what_is_written_is_what_the_suffix_says(words, said, refused):
    assert said in refused(lab_module.COMMANDS, words)


def test_a_folder_that_is_called_cifar10_is_another_data_set():
    assert data.name_of("cifar10") == "cifar10" and data.name_of("x/pets/") == "pets"
    row = measured(data="x/cifar10")
    assert row.data == "folder cifar10" and row.difference is None


def test_a_sweep_is_not_changed_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAIN_FLAGS", "--limit=32 --epochs=1")
    with pytest.raises(ValueError, match="epochs=2: TRAIN_FLAGS in the environment makes it 1 for"):
        sweep.sweep(data="shapes", epochs="1,2", out=str(tmp_path))
    assert not [*tmp_path.iterdir()]
    monkeypatch.setenv("TRAIN_FLAGS", "--model=simple_cnn")  # and is called what it trains
    _, configs = sweep.grid_of({"lr": "0.1,0.01"})
    assert {config.folder.parent.name for config in configs} == {"sweep-simple_cnn-lr"}


def test_a_sweep_says_which_runs_were_on_images_that_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pets"
    for part in ("train/a", "train/b", "test/a", "test/b"):
        (folder / part).mkdir(parents=True)
        for number in range(2):
            visualize.image_grid([torch.rand(3, 4, 4)]).savefig(folder / part / f"{number}.png")
    again = partial(sweep.sweep, data="pets", image_size="32", val="0", epochs="1", batch_size="2")
    assert [row[-1] for row in again(seed="0,1")[0].rows] == ["finished"] * 2
    (folder / "test" / "a" / "1.png").unlink()
    old, new = again(seed="1,2")[0].rows
    assert (old[-1], new[-1]) == ("finished, on images that have changed since", "finished")
    once = partial(reproduce.reproduce, "1.1", "pets", limit=4, epochs=1, out="again")
    assert once().rows[0][4] != "failed"
    (folder / "test" / "b" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"again/1.1-lenet: was measured on images that have ch"):
        once()
    folder.rename(tmp_path / "moved")  # gone, they may be the same
    assert [row[-1] for row in again(seed="0,1")[0].rows] == ["finished"] * 2
    with pytest.raises(ValueError, match="2 of 2 runs failed"):  # found, they are not
        again(data="moved", seed="0,1")
    text = (tmp_path / "runs" / "sweep-lenet-seed" / "sweep.md").read_text()
    assert "failed: --data=moved: files were added, removed" in text and "changed_data" not in text


@pytest.mark.parametrize("flag", ["seed=5", "out=there", "name=x"])
def test_what_an_experiment_says_itself_is_not_said_by_the_environment(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAIN_FLAGS", f"--limit=32 --epochs=1 --{flag}")
    with pytest.raises(ValueError, match=f"TRAIN_FLAGS: `{flag.split('=')[0]}` has no effect"):
        reproduce.reproduce("4.1/base", data="shapes", out="runs")
    assert not any(tmp_path.iterdir())


def test_a_sweep_goes_on_where_its_images_were_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part, name in itertools.product(("train", "test"), "ab"):
        (tmp_path / "pets" / part / name).mkdir(parents=True)
        visualize.image_grid([torch.rand(3, 4, 4)]).savefig(f"pets/{part}/{name}/0.png")
    again = partial(sweep.sweep, image_size=32, val=0, epochs=1, batch_size=2, seed=range(2))
    first = again(data="pets")[0].rows
    Path("pets").rename("moved")
    assert again(data="moved")[0].rows == first and first[0][-1] == "finished"
    with pytest.raises(ValueError, match="must lie apart"):
        again(data="moved", out="moved/train", name="c")
    assert not Path("moved", "train", "c").exists()
    with pytest.raises(ValueError, match="must lie apart"):  # of any of its runs
        again(data="shapes,moved", out=".", name="moved")
    assert sorted(path.name for path in Path("moved").iterdir()) == ["test", "train"]


@pytest.mark.parametrize("flag, values, labels", [
    ("lr", torch.tensor([0.5, 0.25]).numpy(), ["0.5", "0.25"]), ("seed", range(2), ["0", "1"]),
    ("augment", [("flip",), ("flip", "crop")], ["flip", "flip+crop"]),
    ("augment", ["flip", "flip+crop"], ["flip", "flip+crop"]),
    ("lr", [0.5, 0.25], ["0.5", "0.25"]), ("model", ("lenet", "convnet"), ["lenet", "convnet"])])
def test_axes_of_a_sweep_from_python(flag, values, labels):
    choices, _ = sweep.grid_of({flag: values, "data": "shapes"})
    assert [choice[flag] for choice in choices] == labels


def test_results_are_kept_in_place_of_older_ones_of_the_same_run(tmp_path):
    path = tmp_path / "results.csv"
    rows = [reproduce.Row(name, run, "test", 57.2, 55.0, seeds=1, epochs=2, data="cifar10")
            for name, run in (("1.1", "lenet"), ("4.1", "base"), ("4.11", "stopped"))]
    reproduce.keep_results(path, rows[::-1])
    before = path.read_bytes()
    reproduce.keep_results(path, rows[1:2])
    assert path.read_bytes() == before
    reproduce.keep_results(path, [dataclasses.replace(rows[0], measured=99.0, std=0.5, seeds=2)])
    assert path.read_text().splitlines()[1].startswith("1.1,lenet,test,57.2,99.0,0.5,2,2,,")
    assert "| 57.20 | 99.00 ± 0.50 | +41.80 | 2 |" in report.results_markdown(path)
    before = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + before)  # as Excel writes it
    reproduce.keep_results(path, rows[1:2])
    assert path.read_bytes() == before
    for less in ({"seeds": 1}, {"epochs": 1, "seeds": 5}, {"data": "shapes", "epochs": 9}):
        reproduce.keep_results(path, [dataclasses.replace(rows[0], **{"seeds": 2, **less})])
        assert path.read_bytes() == before
    path.write_text(twice := path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(ValueError, match=r"results\.csv: .*several rows of 1\.1/lenet/test\)"):
        reproduce.keep_results(path, rows)
    assert path.read_text() == twice
    for foreign in ("a,b\n1,2\n", "", ",".join(reproduce.COLUMNS) + "\n1.1,x\n", '"' + 9 * "a"):
        path.write_text(foreign)
        for change in (lambda: reproduce.keep_results(path, rows),
                       lambda: reproduce.reproduce("4.1", results=str(path))):
            with pytest.raises(ValueError, match=r"results\.csv: no table of measured results"):
                change()
        assert path.read_text() == foreign


# ---------------------------------------------------------------------------- running


def test_a_page_shows_no_figure_of_an_earlier_result(tmp_path, capsys):
    given = ["--data=shapes", "--limit=40", "--epochs=1"]
    lab("reproduce", "1.2", *given, f"--out={tmp_path}")
    lab("report", "1.2", f"--runs={tmp_path}")
    assert "pr_curves" in (tmp_path / "1.2" / "report.md").read_text()
    train.train("lenet", data="shapes", limit=40, epochs=2, out=str(tmp_path), name="1.1-lenet",
                overwrite=True)
    capsys.readouterr()
    lab("report", "1.2", f"--runs={tmp_path}")
    assert re.search("pr_curves.png: was drawn of another training", capsys.readouterr().err)
    assert "pr_curves" not in (tmp_path / "1.2" / "report.md").read_text().partition("```")[0]


def test_letters_that_are_no_text_are_not_replaced_in_results(tmp_path):
    path, columns = tmp_path / "results.csv", ",".join(reproduce.COLUMNS)
    path.write_bytes(f"{columns}\n4.2,conv2_25,test,,,,,,,,,,AMD® EPYC,\n".encode("cp1252"))
    with pytest.raises(ValueError, match="no table of measured results"):
        reproduce.keep_results(path, [measured()])
    assert "®".encode("cp1252") in path.read_bytes()


def test_an_experiment_is_run_drawn_and_reported_in_a_folder_with_a_space(tmp_path, capsys):
    out = tmp_path / "my runs\\1"
    line = ["reproduce", "4.1", "--data=shapes", "--limit=40", "--epochs=1", f"--out={out}"]
    lab(*line, "--seeds=2", f"--results={tmp_path / 'kept' / 'results.csv'}")
    printed = capsys.readouterr().out
    assert "4.1  base: one convolution" in printed
    assert f"{out / '4.1-base' / 'figures' / '4.1' / 'curves.png'}\n" in printed
    assert re.search(r"│ 4\.1 +│ base │ test +│ 64\.86 +│ [\d.]+ ± [\d.]+", printed)
    assert (out / "4.1-base-seed1" / "result.json").exists()
    assert len((tmp_path / "kept" / "results.csv").read_text().splitlines()) == 4
    before = os.path.getmtime(out / "4.1-base" / "last.pth")
    lab(*line)
    assert os.path.getmtime(out / "4.1-base" / "last.pth") == before
    capsys.readouterr()
    lab("report", "4.1", f"--runs={out}")
    assert capsys.readouterr().out == "".join(
        f"{out / '4.1' / name}\n" for name in ("report.html", "report.md"))
    _, _, text = read_report(out / "4.1")
    assert " ± " in text and "--seeds=2" in text
    assert "python visualize.py curves runs/reproduce/4.1-base\n" in text
    results = [json.loads((folder / "result.json").read_text())
               for folder in (out / "4.1-base", out / "4.1-base-seed1")]
    for what, value_of in (("all for validation", lambda result: result["val/accuracy"]),
                           ("disc", lambda result: result["per_class"]["disc"])):
        assert f"| {what} | {sum(map(value_of, results)) / 2:.1%} |" in text


def test_experiments_go_on_where_a_run_or_a_figure_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "draw_curves", lambda *_: ValueError("no curves"))
    def perform(run, *_):
        if run.name == "fc200_50":
            raise ValueError("the loss is not\nfinite")
        return made[run.name]

    config = train.Config.create(model="simple_cnn", data="shapes")
    made = {name: {"settings": dataclasses.asdict(config), "device": "cpu", "commit": None,
                   "seconds": 1.0, "epochs": 1, "test/accuracy": 0.5, "train/accuracy": 0.5}
            for name in ("lenet5_color", "base")}
    monkeypatch.setattr(reproduce, "perform", perform)
    monkeypatch.setattr(reproduce, "choose", lambda _what: [
        reproduce.book().experiments[name] for name in ("4.7", "4.8")])
    with pytest.raises(SystemExit, match="2"):
        lab("reproduce", "x", f"--out={tmp_path}")
    printed, error = capsys.readouterr()
    assert re.search(r"4\.7 .* failed +│", printed) and re.search(r"4\.8 .* 50\.00 +│", printed)
    assert error.startswith("error: 3 failed. 4.7/fc200_50: the loss is not finite; vis")
    assert error.count("\n") == 1


def test_a_figure_without_a_run_is_told_the_data_and_where_to_go(tmp_path, capsys):
    lab("reproduce", "2.1", "--data=shapes", f"--out={tmp_path}")
    assert (tmp_path / "figures" / "2.1" / "samples-shapes.png").exists()
    assert f"{tmp_path / 'figures' / '2.1' / 'samples-shapes.png'}\n" in capsys.readouterr().out


def test_an_experiment_shows_its_own_figures_and_structure(tmp_path):
    drawn = tmp_path / "5.2-size64" / "figures"
    for name in ("5.6/reconstruct-a.png", "5.7/reconstruct-b.png"):  # one command, of one run
        data.write_atomically(drawn / name, b"Matplotlib")
    first = reproduce.book().experiments["5.6"]
    assert [path.name for path in report.figures_of(first, tmp_path, tmp_path / "page")] == [
        "report-5.6-reconstruct-a.png"]
    other = tmp_path / "5.2-resnet18_imagenet" / "figures" / "5.6"
    data.write_atomically(drawn / "5.6" / "reconstruct.png", b"Matplotlib 1")
    data.write_atomically(other / "reconstruct.png", b"Matplotlib 2")  # the other network's
    data.write_atomically(other / "reconstruct> <img src=x>.png", b"Matplotlib 3")  # nobody's
    data.write_atomically(tmp_path / "secret", b"Matplotlib 4")
    (other / "reconstruct-b.png").symlink_to(tmp_path / "secret")
    shown = report.figures_of(first, tmp_path, tmp_path / "page")
    assert {path.name: (path.read_bytes(), caption) for path, caption in shown.items()} == {
        "report-5.6-reconstruct-a.png": (b"Matplotlib", "reconstruct-a, 5.2-size64"),
        "report-5.6-5.2-size64-reconstruct.png": (b"Matplotlib 1", "reconstruct, 5.2-size64"),
        "report-5.6-5.2-resnet18_imagenet-reconstruct.png": (
            b"Matplotlib 2", "reconstruct, 5.2-resnet18_imagenet")}
    tables = report.tables_of(reproduce.book().experiments["5.2"], tmp_path)
    assert tables["resnet18_imagenet, input 3×224×224"].rows[-1][2] == "11,181,642"


def test_nothing_in_the_lab_starts_another_process():
    for path in {*(ROOT / "lab").glob("*.py")} - {ROOT / "lab" / "gpu.py"}:  # which kills one
        assert not re.search(r"\b(subprocess|os\.system|popen|multiprocessing)\b",
                             path.read_text(encoding="utf-8")), path


# ---------------------------------------------------------------------------- reports


class Page(html.parser.HTMLParser):
    """What is in a page: its headings and what it refers to; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.links, self.code = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]
        self.open += [tag] if tag not in ("meta", "img") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.headings += [text] if self.open and self.open[-1] == "h2" else []
        self.code += [text] if self.open and self.open[-1] == "code" else []


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run on a few shapes."""
    out = tmp_path_factory.mktemp("trained")
    train.train(train.Config.create(model="lenet", data="shapes", limit=40, epochs=1,
                                    out=str(out), name="<b>"))
    return out / "<b>"


def read_report(folder):
    """The page and the Markdown of a report, after what holds for every one."""
    page, text = ((folder / f"report.{kind}").read_text() for kind in ("html", "md"))
    parsed = Page(page)
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    code = "\n".join(parsed.code)
    assert code == "\n".join(re.findall(r"^```+sh\n(.*?)\n```+$", text, re.MULTILINE | re.DOTALL))
    for line in code.replace("\\\n", " ").splitlines():  # all of it runs
        words = shlex.split(line)
        _, script, *words = words[2:] if words[0] == "env" else words
        module = {**reproduce.MODULES, "-m": lab_module}[script]
        data.parse(module.COMMANDS, words[script == "-m":], "train" if module is train else None)
    assert "http" not in page and "url(" not in page and "@import" not in page
    figures = re.findall(r"!\[.*\]\(<(.*)>\)", text)
    assert len(figures) == len(parsed.links) and all((folder / name).exists() for name in figures)
    assert str(folder.parent) not in page + text
    assert "\n\n\n" not in text and "{{" not in page + text
    return parsed, page, text


@pytest.mark.parametrize("names", [("4.3-conv2_30", "4.3-conv2_40"), "abcdefg", ("n" * 30, "m")])
def test_the_legend_of_a_page_is_as_wide_as_the_page(names, monkeypatch):
    rows = [{name: [0.5, 0.6] for name in train.COLUMNS}]
    monkeypatch.setattr(visualize, "group_runs", lambda _: dict.fromkeys(names, rows))
    figure = report.draw_curves([])
    figure.savefig(io.BytesIO(), dpi=20)
    [legend] = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == 2 * len(names)
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1


def test_the_report_of_a_run_has_every_section_and_needs_no_other_file(finished, tmp_path, capsys):
    paths = report.report(str(finished), out=str(tmp_path / "report"))
    assert paths == [tmp_path / "report" / "report.html", tmp_path / "report" / "report.md"]
    assert not capsys.readouterr().out
    parsed, page, text = read_report(tmp_path / "report")
    assert parsed.headings == ["Result", "Predictions", "Why", "Inside the network", "Structure",
                               "Images and settings",
                               "Hardware, versions, and how to make it again"]
    assert len(parsed.links) >= 10 and "of 40 test images of shapes correctly" in page
    assert parsed.code == ["python train.py --model=lenet --data=shapes --limit=40 --epochs=1\n"
                           "python -m lab report runs/lenet"]
    assert "| total |  | 62,006 |" in text and "| ---: |" in text
    first, layers, folded = text.split("<details>")
    assert "| conv1.0 | Conv2d | 5×5 | 1 |" in layers.partition("</details>")[0]
    assert "| limit | 40 |" in layers.partition("</details>")[2]
    assert "| momentum |" not in first + layers and "| momentum | 0.9 |" in folded


def test_a_report_s_figures_are_of_the_images_that_its_text_tells_of(finished, tmp_path,
                                                                    coarse_figures, monkeypatch):
    looked, open_test = [], train.open_test
    monkeypatch.setattr(train, "open_test", lambda *given: looked.append(open_test(*given))
                        or looked[-1])
    report.report(str(finished), out=str(tmp_path), data="shapes")
    assert "of 40 test images of shapes correctly" in (tmp_path / "report.md").read_text()
    own = data.load("shapes", limit=40).test.images
    assert looked and all(torch.equal(test.images, own) for test in looked)


def test_a_class_may_be_called_as_the_whole_is():
    result = {"train/accuracy": 0.5, "val/accuracy": None, "test/accuracy": 0.25,
              "per_class": {"all for test": 1.0, "a": 0.0}}
    assert report.accuracies(result) == {
        "all for training, last epoch": 0.5, "all for validation": None, "all for test": 0.25,
        "a": 0.0}


def test_a_report_means_nothing_but_what_is_in_it():
    assert data.plain("`x` *1* a|b <i> a_b _c_\n# d") == (
        r"\`x\` \*1\* a\|b &lt;i&gt; a_b \_c\_ \# d")
    assert data.plain("$1$ ~~2~~ http://x WWW.x a@b.c ![](y)") == (
        r"\$1\$ \~\~2\~\~ http\://x WWW\.x a\@b.c !\[\](y)")
    assert [report.fence(text) for text in ("", "`x`", "a\n````\nb")] == ["```", "```", "`````"]
    words = ["ls", "my runs/a\\b", "x\ny'\x1b", "/a/b", "\\xe9\n\xe9\xa0f\u200b\U0001f600"]
    assert report.shell(words[:4]) == r"ls 'my runs/a\b' $'x\ny\'\x1b' /a/b"
    assert report.shell(words[4:]) == (
        r"$'\\xe9\n\xc3\xa9\xc2\xa0f\xe2\x80\x8b\xf0\x9f\x98\x80'")
    assert subprocess.run(["bash", "-c", report.shell(["printf", "%s", *words[1:]])], check=True,
                          capture_output=True, text=True).stdout == "".join(words[1:])


ATTACK = "x\n```\n# gone\n![y](http://a.b/c.png) <script>alert(1)</script> [z](http://a.b) www.a.b"


def test_texts_from_outside_stay_texts_on_the_page(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    result = json.loads((run / "result.json").read_text())
    result |= {"device": ATTACK, "command": ATTACK, "commit": ATTACK,
               "versions": {ATTACK: ATTACK}, "per_class": {ATTACK: 1.0}}
    (run / "result.json").write_text(json.dumps(result))
    report.report(str(run))
    page, text = ((run / f"report.{kind}").read_text() for kind in ("html", "md"))
    parsed = Page(page)
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert "gone" not in "".join([*parsed.headings, *parsed.code]) and "<script" not in page + text
    assert not re.search(r"^# gone|^```$\n#|http://|(?<!\\)\]\(http|www\.", text, re.MULTILINE)
    assert len(re.findall("^# ", text, re.MULTILINE)) == 1


@pytest.mark.parametrize("damage", [
    [], None, 3, "text", {}, {"device": None}, {"device": ["a"]}, {"versions": []},
    {"versions": {"torch": None}}, {"per_class": []}, {"per_class": {"a": "b"}}, {"seconds": "9"},
    {"seconds": True}, {"epochs": -1}, {"epochs": 10**400}, {"commit": 5},
    {"test/accuracy": float("nan")}, {"test/accuracy": None},
    {"settings": None}, {"settings": {"model": []}}, {"parameters": [1]}])
def test_a_damaged_result_is_one_line(damage, finished, tmp_path, refused):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    result = json.loads((run / "result.json").read_text())
    damaged = {**result, **damage} if isinstance(damage, dict) and damage else damage
    (run / "result.json").write_text(json.dumps(damaged))
    line = refused(COMMANDS, ["report", str(run)])
    assert line.startswith(f"error: {run / 'result.json'}: damaged (") and len(line) < 400
    assert not (run / "report.html").exists()


def test_a_report_never_replaces_what_is_not_one(finished, tmp_path):
    (tmp_path / "4.1").mkdir()
    report.report("4.1", runs=str(tmp_path))
    report.report("4.1", runs=str(tmp_path))
    for name in ("report.html", "report.md"):
        never_replaced(tmp_path / "4.1" / name, lambda: report.report("4.1", runs=str(tmp_path)))


def test_an_id_is_no_folder_unless_a_run_is_there(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert report.report("4.1", runs="rep", out="4.1")[0] == Path("4.1", "report.html")
        assert "| 64.86 | not measured |" in Path("4.1", "report.md").read_text()
    shutil.copytree(finished, "4.2")
    assert report.report("4.2") == [Path("4.2", "report.html"), Path("4.2", "report.md")]


def test_a_class_without_test_images_has_no_accuracy():
    table = report.per_class_table(torch.tensor([[3, 1], [0, 0]]), ["a", "b"])
    assert table.rows == [("a", "4", "3", "75.0%", "b (1)"), ("b", "0", "0", "–", "–")]


def test_a_lab_report_of_nothing_says_so(tmp_path):
    report.report("4.9", runs=str(tmp_path / "none"))
    _, _, text = read_report(tmp_path / "none" / "4.9")
    assert "again as reported: 0;" in " ".join(text.split())
    assert "| 72.82 | not measured |" in text


def test_a_lab_report_shows_what_was_measured_and_says_what_was_not(finished, tmp_path,
                                                                    monkeypatch):
    shutil.copytree(finished, tmp_path / "4.1-base")
    for name in ("config.json", "result.json"):  # as `reproduce --precision=bf16` leaves them
        path = tmp_path / "4.1-base" / name
        path.write_text(path.read_text().replace('"precision": "auto"', '"precision": "bf16"'))
    report.report("cnn-trials", runs=str(tmp_path))
    parsed, page, text = read_report(tmp_path / "cnn-trials")
    assert len(parsed.links) == 1 and parsed.headings[1].startswith("4.1 ")
    assert re.search(r"\| 4.1 \| base \| test \| 64.86 \| [\d.]+ \| not as reported \| 1 \|", text)
    assert "again as reported: 0;" in " ".join(text.split()) and "reported elsewhere" not in text
    assert r"| 4.2 | conv2_25 | test | 68.07 | not measured |" in text
    again = " ".join(page.replace("\\\n", " ").split())
    assert "reproduce cnn-trials --data=shapes --limit=40 --epochs=1 --precision=bf16" in again
    assert "python train.py --model=simple_cnn --optimizer=adam \\\n    --schedule" in page
    assert "--out=runs/reproduce --name=4.1-base" in page
    # Of runs with different flags each experiment has its own line, also of what it only shows.
    for name, more in (("4.1-base-seed1", ""), ("1.1-lenet", "lenet-vgg")):
        shutil.copytree(tmp_path / "4.1-base" if not more else finished, tmp_path / name)
    for name in ("config.json", "result.json"):
        path = tmp_path / "4.1-base-seed1" / name
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    lines = report.made_again("x", reproduce.choose("4.1") + reproduce.choose("lenet-vgg"),
                              tmp_path).replace("\\\n    ", "").split("\n")
    # The run has settings of its own, which these flags do not tell.
    assert lines[0].startswith("env 'TRAIN_FLAGS=--augment=flip --batch_norm=false ")
    lines = [line[line.index("python"):] for line in lines]
    assert lines[:3] == ["python -m lab reproduce 4.1 --data=shapes --limit=40 --epochs=1 "
                         "--precision=bf16 --seeds=2",
                         *(f"python -m lab reproduce 1.{number} --data=shapes --limit=40 --epochs=1"
                           for number in (1, 2))]
    with monkeypatch.context() as patch:  # one that was run as planned has no flags
        patch.setattr(report, "flags_of", lambda experiment, _: {
            "4.1": {}, "4.2": {"limit": 40}}.get(experiment.id))
        lines = report.made_again("cnn-trials", reproduce.choose("cnn-trials"), tmp_path)
    assert lines.split("\n")[:3] == ["python -m lab reproduce 4.1", "python -m lab reproduce 4.2 "
                                     "--limit=40", "python -m lab reproduce 4.3"]


def test_a_mean_is_of_seeds_of_the_same_settings_each_once(finished, tmp_path):
    def put(name, **changes):
        shutil.copytree(finished, tmp_path / name)
        for file in ("config.json", "result.json"):
            content = json.loads((tmp_path / name / file).read_text())
            content.get("settings", content).update(changes, name=name)
            (tmp_path / name / file).write_text(json.dumps(content))
        return tmp_path / name

    folders = [put("4.1-base"), put("4.1-base-seed1", seed=1, root="x"),
               put("4.1-base-seed12", seed=12, out="y", device="cpu")]
    for name, changes in (("seed1-backup", {"seed": 1}), ("seed3", {"seed": 3, "epochs": 2}),
                          ("seed4", {"seed": 4, "lr": 0.5}), ("seed5", {"seed": 1}),
                          ("seeds", {"seed": 6}), ("seed0", {})):
        put(f"4.1-base-{name}", **changes)
    assert report.with_seeds(tmp_path / "4.1-base") == folders
    entry, = reproduce.choose("4.1")
    assert [result["settings"]["seed"] for result in report.results_of(
        entry.runs["base"], tmp_path)] == [0, 1, 12]
    shutil.rmtree(tmp_path / "4.1-base")  # the first that is there tells the settings
    assert report.with_seeds(tmp_path / "4.1-base")[1:] == folders[1:]
    # The same folder may be written in several ways.
    folders = [put("a", data="pets"), put("a-seed1", seed=1, data=os.path.abspath("pets"))]
    put("a-seed2", seed=2, data="x/pets")
    assert report.with_seeds(tmp_path / "a") == folders
    assert [*visualize.group_runs(folders)] == ["a and 1 more seed"]


@pytest.mark.parametrize("words, message", [
    (["report", "FOLDER"], "no finished run"),
    (["report", "nothing"], r"nothing: no such run or experiment \(python -m lab"),
    (["report", "FOLDER/typo"], r"typo: no such run or experiment; did you mean \S+/typed\?"),
    (["reproduce", "nothing"], "nothing: no such experiment"),
    (["reproduce", "4.1", "--epohcs=1"], "epohcs"),
    (["results", "--path=FOLDER/none.csv"], "none.csv"),
    (["sweep", "--lr=0.1"], "no flag has several values"),
    (["sweep", "--lr=0.1,0.2", "--data=FOLDER", "--out=FOLDER", "--name=my,grid"],
     "error: --name=my,grid: is of the whole grid and must have no comma"),
    (["sweep", "--lr=0.1,0.2", "--data=FOLDER", "--out=FOLDER/a,b"],
     r"error: --out=\S+a,b: is of the whole grid and must have no comma"),
    (["report", "FOLDER", "--out=FOLDER/page.html"], r"out=\S+page\.html: must be a folder"),
])
def test_bad_input_is_one_line_and_exit_2(words, message, tmp_path, refused):
    (tmp_path / "typed").mkdir()
    (tmp_path / "typed" / "config.json").touch()
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    assert re.search(message, refused(COMMANDS, words))


def test_help_names_every_command_and_every_setting_of_a_sweep(capsys):
    for words in (["--help"], ["sweep", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            lab(*words)
    printed = capsys.readouterr().out
    assert "reproduce, report, results, sweep, smoothness, benchmark, gpu" in printed
    assert "--label_smoothing=" in printed


# ---------------------------------------------------------------------------- benchmark and sweep


def test_benchmark_compares_the_loop_with_its_bounds(capsys):
    lab("benchmark", "--rounds=1", "--seconds=0.02", "--batch_size=16")
    text = capsys.readouterr().out
    rows = re.findall(r"([abcd]): [\w ]+ │ (\d+) ", text)
    assert [name for name, _ in rows] == list("abcd") and all(int(rate) > 0 for _, rate in rows)
    assert re.search(r"a/b \d\.\d+ +a/c \d+\.\d+", text)
    with pytest.raises(ValueError, match="batch_size"):
        benchmark.benchmark(batch_size=0)
    with pytest.raises(ValueError, match=r"augment=cutout.*crop, flip"):
        benchmark.benchmark(augment=("flip", "cutout"))


def test_the_benchmark_compares_the_same_steps(few_shapes, monkeypatch):
    seen = {"package": [], "others": []}

    def noting(name, step, place):
        return lambda *given: (seen[name].append(given[place].shape), step(*given))[1]

    monkeypatch.setattr(train, "train_step", noting("package", train.train_step, 1))
    monkeypatch.setattr(benchmark, "take_step", noting("others", benchmark.take_step, 2))
    benchmark.benchmark("speednet", batch_size=4, rounds=1, seconds=0.01)
    assert {*seen["package"]} == {*seen["others"]} == {(4, 3, 32, 32)}
    for images in seen.values():
        images.clear()
    table, _ = benchmark.benchmark("lenet", batch_size=1_000, rounds=1, seconds=0.01)
    # All 500 are one batch, and an epoch one step: beside it a first one and three to time, and
    # two for the usual pipeline to be as warm.
    assert [len(images) for images in seen.values()] == [1, 4 + 2 + 2 + 1]
    assert "batch 500, flip,crop, 1 steps" in table.title


def test_the_usual_pipeline_has_a_network_of_its_own(monkeypatch):
    layouts, step = [], benchmark.take_step

    def noting(config, state, *batch):
        layouts.append([weights.is_contiguous(memory_format=torch.channels_last)
                        for weights in state.network.parameters() if weights.ndim == 4])
        return step(config, state, *batch)

    monkeypatch.setattr(benchmark, "take_step", noting)
    benchmark.benchmark("lenet", batch_size=16, rounds=2, seconds=1e-9)  # three steps a round
    assert layouts[0] == layouts[6] == [True, True]  # the bare step
    assert layouts[-1] == [False, False] and layouts.count([False, False]) == 2 + 2 * 3


def test_the_benchmark_flatters_nobody(monkeypatch):
    waited, products = [], []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("cuda"))
    for name in ("mps", "cuda", "cpu"):
        benchmark.timed(lambda name=name: waited.append(f"work on {name}"), torch.device(name))
    assert waited == ["mps", "work on mps", "mps", "cuda", "work on cuda", "cuda", "work on cpu"]

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operator, _types, arguments=(), flags=None):
            products.append((str(operator), arguments[0].dtype if torch.is_tensor(arguments[0])
                             else None, torch.backends.cuda.matmul.allow_tf32))
            return operator(*arguments, **flags or {})

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    cpu, dataset = torch.device("cpu"), data.load("shapes", limit=20)
    before = torch.backends.cuda.matmul.allow_tf32
    for precision, kind in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        products.clear()
        with Seen():
            assert benchmark.matrix_rate(cpu, precision, size=8) > 0
        assert products[1:] == [("aten.mm.default", kind, True)] * (1 + 5)
    assert torch.backends.cuda.matmul.allow_tf32 == before
    config = train.Config.create(batch_size=4)
    assert benchmark.usual_loader(config, dataset, 2, torch.device("cuda")).pin_memory
    loader = benchmark.usual_loader(config, dataset, 2, cpu)
    assert not loader.pin_memory and len(loader) == 2


def test_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = {"data": "shapes", "limit": "32", "epochs": "1", "lr": "0.1,0.01",
             "augment": "flip+crop,none"}
    sweep.sweep(**flags)
    folder = tmp_path / "runs" / "sweep-lenet-lr-augment"
    lines = (folder / "sweep.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in lines] == ["augment", *["flip+crop", "none"] * 2]
    assert (folder / "sweep.md").read_text().startswith("| lr | augment | test/accuracy |")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "sweep.csv").read_text()
    (folder / "sweep.csv").write_text(noted := table.replace("state", "state,note", 1))
    with pytest.raises(FileExistsError, match=r"sweep\.csv: is no table of lr, augment"):
        sweep.sweep(**flags)
    assert (folder / "sweep.csv").read_text() == noted
    (folder / "sweep.csv").write_text(longer := f"{table}1,none,0.9,,1,mine\n")
    with pytest.raises(FileExistsError, match=r"sweep\.csv: was changed since it was written"):
        sweep.sweep(**flags)
    assert (folder / "sweep.csv").read_text() == longer
    page = (folder / "sweep.md").read_text()  # as earlier versions wrote it
    (folder / "sweep.md").write_text(reproduce.sealed(re.sub("<!-- sweep.csv.*\n", "", page)))
    sweep.sweep(**flags)
    assert (folder / "sweep.md").read_text().partition("<!--")[0] == page.partition("<!--")[0]
    assert (folder / "sweep.csv").read_text() == table
    before = os.path.getmtime(folder / "lr=0.1_augment=none" / "last.pth")
    capsys.readouterr()
    lab("sweep", *(f"--{name}={text}" for name, text in flags.items()))
    assert os.path.getmtime(folder / "lr=0.1_augment=none" / "last.pth") == before
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"runs/sweep-lenet-lr-augment/{name}" for name in ("sweep.csv", "sweep.md", "curves.png")]


@pytest.mark.parametrize("killed", ["replace", "write_atomically"])  # page and sheet
def test_a_sweep_killed_between_its_two_tables_goes_on(killed, tmp_path, monkeypatch):
    flags = {"data": "shapes", "limit": "32", "out": str(tmp_path), "lr": "0.1,0.01"}
    sweep.sweep(**flags, epochs="1")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, killed, lambda *_: sys.exit(1))
        with pytest.raises(SystemExit):
            sweep.sweep(**flags, epochs="2")
    sheet = tmp_path / "sweep-lenet-lr" / "sweep.csv"
    before = sheet.read_text()
    sweep.sweep(**flags, epochs="2")
    assert sheet.read_text() != before
    sheet.write_text(sheet.read_text().replace("0.1", "0.2", 1))  # somebody's
    with pytest.raises(FileExistsError, match=r"sweep\.csv: was changed"):
        sweep.sweep(**flags, epochs="2")


def test_a_sweep_goes_on_where_a_run_fails_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["sweep", "--data=shapes", "--limit=32", "--epochs=1", "--batch_size=4",
            "--warmup_epochs=0", "--lr=1e4,0.01", "--name=[/x] :cat:"]
    folder = tmp_path / "runs" / "[/x] :cat:"
    for _ in range(2):  # repeating it tries the failed run again and skips the other
        with pytest.raises(SystemExit, match="2"):
            lab(*line)
        printed, error = capsys.readouterr()
        assert error == f"error: 1 of 2 runs failed; {'runs/[/x] :cat:/sweep.md'} says why\n"
        assert "runs/[/x] :cat:/curves.png\n" in printed
        header, failed, finished = (folder / "sweep.csv").read_text().splitlines()
        assert header == "lr,test/accuracy,val/accuracy,seconds,state"
        assert re.match(r'1e4,,,,"?failed: .*not finite', failed)
        assert re.match(r"0\.01,[\d.]+,[\d.]+,[\d.]+,finished$", finished)
    monkeypatch.setattr(train, "train", lambda *_, **__: pytest.fail("nothing is to be trained"))
    lab(*line[:-2], "--lr=0.01,0.01", line[-1])
    _, grid = sweep.grid_of({"lr": [0.1, 0.01], "epochs": 1, "augment": ("flip", "crop")})
    assert [config.augment for config in grid] == [("flip", "crop")] * 2  # as Python has them
    again = partial(sweep.sweep, **dict(word[2:].split("=") for word in line[1:]))
    never_replaced(folder / "sweep.md", again)
    for name in ("sweep.md", "sweep.csv"):
        (folder / name).unlink()
    (folder / "curves.png").write_text("my curves")
    with pytest.raises(FileExistsError, match=r"curves\.png: is no figure made here"):
        again()
    assert (folder / "curves.png").read_text() == "my curves" and not (folder / "sweep.md").exists()


def test_a_sweep_of_networks_and_of_views(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shared = ["--data=shapes", "--limit=64", "--epochs=1"]
    lab("sweep", "--model=lenet, convnet", "--dropout=0.1", *shared)
    folder = tmp_path / "runs" / "sweep-models-model"
    assert [train.read_config(path).model for path in sorted(folder.glob("*/config.json"))] == [
        "convnet", "lenet"]
    lab("sweep", "--tta=none,full", *shared, "--name=views")
    lab("sweep", "--tta=flip,full", *shared, "--name=views")
    header, flip, full = (line.split(",") for line in (
        tmp_path / "runs" / "views" / "sweep.csv").read_text().splitlines())
    assert header[:3] == ["tta", "test/accuracy", "test/accuracy_tta"]
    for row in (flip, full):
        result = json.loads((tmp_path / f"runs/views/tta={row[0]}/result.json").read_text())
        assert float(row[2]) == pytest.approx(result["test/accuracy_tta"], abs=1e-4)
    # A finished run is measured again when other views are asked for, and not trained.
    config = train.Config.create(data="shapes", limit=64, epochs=1, name="views/tta=flip")
    before = (config.folder / "best.pth").read_bytes()
    assert train.finished(config.folder, config) is None
    assert train.train(config, resume=True)["test/accuracy_tta"] is None
    assert train.finished(config.folder, config)
    assert (config.folder / "best.pth").read_bytes() == before


def test_a_run_killed_before_its_board_was_written_is_not_finished(tmp_path, monkeypatch):
    config = train.Config.create(data="shapes", limit=32, epochs=1, out=str(tmp_path))
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "write_board", killed)
        train.train(config)
    assert train.finished(config.folder, config) is None
    train.train(config, resume=True)
    assert train.finished(config.folder, config) and [*(config.folder / "test").glob("events*")]


def test_a_run_that_patience_ended_is_finished(tmp_path):
    config = train.Config.create(data="shapes", limit=64, epochs=4, lr=0.0, patience=1,
                                 out=str(tmp_path))
    assert train.train(config)["epochs"] == 2
    assert train.finished(config.folder, config)["epochs"] == 2


@pytest.mark.slow
def test_two_sweeps_share_a_grid(tmp_path):
    line = [sys.executable, "-m", "lab", "sweep", "--data=shapes", "--limit=96", "--batch_size=16",
            "--epochs=3", "--save_minutes=0", "--dropout=0.2", "--seed=7", "--lr=0.1,0.05,0.02"]
    sweeps = [subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(2)]
    printed = [sweep.communicate(timeout=240)[0] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0]
    assert "".join(printed).count("nothing to resume; starting") == 3
    assert "".join(printed).count("resuming at") == 0


# ---------------------------------------------------------------------------- on a GPU


def test_gpu_tells_all_it_tried_and_what_failed(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(lab_gpu, "killed", lambda base, out: f"the same weights on {base}")
    monkeypatch.setattr(lab_gpu, "speednet", fails)
    monkeypatch.setattr(lab_gpu, "run_tests", lambda device: f"1 passed on {device}")
    text = lab_gpu.gpu("cpu", models=("lenet",), rounds=1, seconds=0.01)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0][2:] for row in rows] == [
        "tests on the device", "speednet, seed 0", "speednet, seed 1", "lenet, fp32", "lenet, bf16",
        "killed and resumed, bit for bit"]
    assert rows[0][1] == "1 passed on cpu"
    assert rows[1][1] == "FAILED: RuntimeError: out of memory"
    assert re.match(r"images/s: a \d+, b \d+, c \d+; a/b", rows[3][1])


@pytest.mark.parametrize("status, out, error, told", [
    (0, "...\n3 passed\n", "", "3 passed"),
    (1, "FAILED a - b\nERROR c - d\n1 failed, 1 error\n", "",
     "FAILED a - b; ERROR c - d; 1 failed, 1 error"),
    (-11, "....\n", "Fatal Python error: Segmentation fault\n", "status -11: Fatal Python error")])
def test_gpu_tells_of_tests_that_crash(status, out, error, told, monkeypatch):
    monkeypatch.setattr(lab_gpu.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(
        words, status, out, error))
    if status in (0, 1):
        assert lab_gpu.run_tests("cuda") == told
    else:
        with pytest.raises(RuntimeError, match=told):
            lab_gpu.run_tests("cuda")


def test_gpu_without_one_is_one_line(monkeypatch, refused):
    monkeypatch.setattr(train, "choose_device", lambda _name: torch.device("cpu"))
    assert "no GPU" in refused(COMMANDS, ["gpu"])


@pytest.mark.slow
def test_gpu_rehearsed_on_the_cpu(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the killed process rounds as this one does
    text = lab_gpu.gpu("cpu", "shapes", models=(), limit=256, epochs=1, tests=False)
    assert "the same weights, the same losses (killed after step" in text
    assert text.count("% with tta") == 2
    assert "FAILED" not in text
