"""The lab: experiments that can all be run, tables that say the same, pages, sweeps, benchmark."""

import dataclasses
import html.parser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
import train
import visualize
from lab import benchmark, report, reproduce, sweep
from lab.__main__ import COMMANDS, MEANINGS

ROOT = Path(__file__).parent.parent
EXPERIMENTS = [*reproduce.book().experiments.values()]


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    monkeypatch.setattr(visualize, "DPI", 30)


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
    for wrong, answer in (("9.9", r"9\.9.*cnn-trials"), ("2.7/x", "2.7/x.*batch22, adam, large"),
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


def test_every_figure_is_a_known_command_on_known_runs():
    known = {(entry.id, name): run for entry in EXPERIMENTS for name, run in entry.runs.items()}
    for entry in EXPERIMENTS:
        for figure in entry.figures:
            _, script, *words = figure.filled("a folder\\1")
            module = reproduce.MODULES[script]
            data.parse(module.COMMANDS, words, "train" if module is train else None)
            for run in figure.runs.values():
                assert known[run.experiment, run.name] is run
            assert not [word for word in words if "{" in word]
            assert bool(figure.runs) == any("a folder\\1" in word for word in words)


def test_reproduce_alone_lists_the_experiments_with_their_cost_and_trains_nothing(capsys,
                                                                                  monkeypatch):
    monkeypatch.setattr(train, "train", None)
    table = reproduce.reproduce()
    rows = {row[0]: row for row in table.rows}
    assert [*rows] == [entry.id for entry in EXPERIMENTS]
    assert rows["1.1"][-1] == "50.9 s" and rows["3.1"][-1] == "not measured"
    assert rows["4.2"][-1] == "4 min, 1 not measured" and rows["2.4"][-1] == "figures only"
    lab("reproduce")
    assert "4.11" in capsys.readouterr().out


# ---------------------------------------------------------------------------- results


def test_the_readme_shows_what_was_measured():
    table = reproduce.results_markdown(ROOT / "lab" / "results.csv")
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.count("\n") > len(EXPERIMENTS)


def test_results_go_between_the_markers_of_a_markdown_file(tmp_path, capsys):
    path = tmp_path / "the readme.md"
    path.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    lab("results", f"--readme={path}")
    table = reproduce.results_markdown(reproduce.RESULTS)
    assert path.read_text() == (f"before\n<!-- results -->\n{table}"
                                f"<!-- end of results -->\nafter\n")
    assert capsys.readouterr().out == f"{path}\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        reproduce.results(readme=str(path))


def test_a_row_measured_after_fewer_epochs_or_in_bf16_says_so(tmp_path):
    entry, = reproduce.choose("1.1/lenet")
    config = train.Config.create(data="cifar10-jpeg", precision="bf16")
    result = {"test/accuracy": 0.5, "epochs": 1, "seconds": 9.0, "device": "cpu", "commit": "abc",
              "settings": dataclasses.asdict(config)}
    row, = reproduce.compare(entry.runs["lenet"], [result])
    assert row.device == "cpu, bf16" and row.measured == 50
    reproduce.keep_results(tmp_path / "results.csv", [row])
    markdown = reproduce.results_markdown(tmp_path / "results.csv")
    assert "| 57.20 | 50.00 | −7.20 | 1 of 2 | 9.0 s | cifar10-jpeg |" in markdown
    assert "cifar10-jpeg lie below the report's: images re-encoded as JPEG" in markdown


def test_results_are_kept_in_place_of_older_ones_of_the_same_run(tmp_path):
    path = tmp_path / "results.csv"
    shutil.copy(reproduce.RESULTS, path)
    rows = [*reproduce.read_results(path).values()]
    reproduce.keep_results(path, rows[3:5])
    assert path.read_bytes() == reproduce.RESULTS.read_bytes()
    reproduce.keep_results(path, [dataclasses.replace(rows[0], measured=99.0, std=0.5, seeds=2)])
    assert path.read_text().splitlines()[1].startswith("1.1,lenet,test,57.2,99.0,0.5,2,2,50.9,")
    assert "| 57.20 | 99.00 ± 0.50 | +41.80 |" in reproduce.results_markdown(path)


# ---------------------------------------------------------------------------- running


def test_an_experiment_is_run_drawn_and_reported_in_a_folder_with_a_space(tmp_path, capsys):
    out = tmp_path / "my runs\\1"
    line = ["reproduce", "4.1", "--data=shapes", "--limit=40", "--epochs=1", f"--out={out}"]
    lab(*line, "--seeds=2", f"--results={tmp_path / 'kept' / 'results.csv'}")
    printed = capsys.readouterr().out
    assert "4.1  base: one convolution" in printed
    assert f"{out / '4.1-base' / 'figures' / 'curves.png'}\n" in printed
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
    assert " ± " in text and "--seeds=2" in text and "python visualize.py curves 4.1-base" in text


def test_a_figure_without_a_run_is_told_the_data_and_where_to_go(tmp_path, capsys):
    lab("reproduce", "2.1", "--data=shapes", f"--out={tmp_path}")
    assert "2.1-samples" in capsys.readouterr().out
    assert (tmp_path / "2.1-samples" / "samples-shapes.png").exists()


def test_nothing_in_the_lab_starts_another_process():
    for path in (ROOT / "lab").glob("*.py"):
        assert not re.search(r"\b(subprocess|os\.system|popen|multiprocessing)\b",
                             path.read_text(encoding="utf-8")), path


# ---------------------------------------------------------------------------- reports


class Page(html.parser.HTMLParser):
    """What is in a page: its headings and what it refers to; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.links = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset")]
        self.open += [tag] if tag not in ("meta", "img") else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.headings += [text] if self.open and self.open[-1] == "h2" else []


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
    assert "http" not in page and "url(" not in page and "@import" not in page
    figures = re.findall(r"!\[.*\]\(<(.*)>\)", text)
    assert len(figures) == len(parsed.links) and all((folder / name).exists() for name in figures)
    assert str(folder.parent) not in page + text
    assert "\n\n\n" not in text and "{{" not in page + text
    return parsed, page, text


def test_the_report_of_a_run_has_every_section_and_needs_no_other_file(finished, tmp_path, capsys):
    paths = report.report(str(finished), out=str(tmp_path / "report"))
    assert paths == [tmp_path / "report" / "report.html", tmp_path / "report" / "report.md"]
    assert not capsys.readouterr().out
    parsed, page, text = read_report(tmp_path / "report")
    assert parsed.headings == ["Images and settings", "Structure", "Training", "Predictions",
                               "Inside the network", "Hardware, versions, and how to make it again"]
    assert len(parsed.links) >= 7 and "python train.py --model=lenet --data=shapes" in text
    assert "of 40 test images correctly" in page and str(finished.parent) not in page
    assert "python -m lab report &#39;&lt;b&gt;&#39;" in page.replace("trained0/", "")
    assert "| total |  | 62\N{NARROW NO-BREAK SPACE}006 |" in text and "| ---: |" in text


def test_a_report_means_nothing_but_what_is_in_it(tmp_path):
    assert report.plain("`x` *1* a|b <i> a_b _c_") == r"\`x\` \*1\* a\|b &lt;i&gt; a_b \_c\_"
    words = ["python", "visualize.py", "curves", f"{tmp_path}/my runs/a", "--out=/x/y.png"]
    assert report.shell(words) == "python visualize.py curves a --out=y.png"
    assert report.shell(["ls", "my runs/a\\b"]) == "ls 'my runs/a\\b'"


def test_a_lab_report_of_nothing_says_so(tmp_path):
    report.report("4.9", runs=str(tmp_path / "none"))
    _, _, text = read_report(tmp_path / "none" / "4.9")
    assert "0 were measured again" in text and "| 72.82 | not measured |" in text


def test_a_lab_report_shows_what_was_measured_and_says_what_was_not(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "4.1-base")
    report.report("cnn-trials", runs=str(tmp_path))
    parsed, page, text = read_report(tmp_path / "cnn-trials")
    assert len(parsed.links) == 1 and parsed.headings[1].startswith("4.1 ")
    assert re.search(r"\| 4.1 \| base \| test \| 64.86 \| [\d.]+ \| −", text)
    assert r"| 4.2 | conv2_25 | test | 68.07 | not measured |" in text
    assert "reproduce cnn-trials --data=shapes --limit=40 --epochs=1" in page
    assert "python train.py --model=simple_cnn --optimizer=adam \\\n    --schedule" in page


@pytest.mark.parametrize("words, message", [
    (["report", "FOLDER"], "no finished run"),
    (["report", "nothing"], "no folder nothing.*cnn-trials.*4.11"),
    (["reproduce", "nothing"], "nothing: no such experiment.*cnn-trials.*4.11"),
    (["reproduce", "4.1", "--epohcs=1"], "epohcs"),
    (["results", "--path=FOLDER/none.csv"], "none.csv"),
    (["sweep", "--lr=0.1"], "no flag has several values"),
])
def test_bad_input_is_one_line_and_exit_2(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as leave:
        lab(*[word.replace("FOLDER", str(tmp_path)) for word in words])
    lines = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and re.search(message, lines[0])


def test_help_names_every_command_and_every_setting_of_a_sweep(capsys):
    for words in (["--help"], ["sweep", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            lab(*words)
    printed = capsys.readouterr().out
    assert "reproduce, report, results, sweep, benchmark" in printed
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
    before = os.path.getmtime(folder / "lr=0.1_augment=none" / "last.pth")
    capsys.readouterr()
    lab("sweep", *(f"--{name}={text}" for name, text in flags.items()))
    assert os.path.getmtime(folder / "lr=0.1_augment=none" / "last.pth") == before
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"runs/sweep-lenet-lr-augment/{name}" for name in ("sweep.csv", "sweep.md", "curves.png")]


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
