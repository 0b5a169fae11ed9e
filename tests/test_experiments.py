"""experiments.toml: every line can be run; results.csv and README's table say the same."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

import deconv
import network
import train
import visualize

ROOT = Path(__file__).parent.parent
ENTRIES = train.read_experiments()


def test_ids_are_unique_and_selections_work():
    ids = [entry["id"] for entry in ENTRIES]
    assert len(set(ids)) == len(ids)
    assert [entry["id"] for entry in train.read_experiments("4.11")] == ["4.11"]
    assert len(train.read_experiments("cnn-trials")) == 11
    only, = train.read_experiments("2.7/adam")
    assert list(only["runs"]) == ["adam"] and not only["figures"]
    for wrong, answer in (("9.9", r"9\.9.*cnn-trials"), ("2.7/x", "2.7/x.*batch22, adam, large"),
                          ("2.1/x", "none"), ("all/x", "none")):
        with pytest.raises(ValueError, match=answer):
            train.read_experiments(wrong)
    with pytest.raises(ValueError, match="seeds=0"):
        train.reproduce("4.1", seeds=0)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["id"])
def test_every_run_is_a_valid_line_and_every_claim_belongs_to_a_run(entry):
    for line in entry.get("runs", {}).values():
        start, script, *_ = shlex.split(line)
        assert (start, script) == ("python", "train.py")
        train.config_of(line)
    assert set(entry.get("reported", {})) <= set(entry.get("runs", {}))
    assert entry.get("runs") or entry.get("figures")


def test_every_figure_is_a_known_command_on_known_runs():
    known = {(entry["id"], name) for entry in ENTRIES for name in entry.get("runs", {})}
    modules = {"visualize.py": visualize, "deconv.py": deconv, "train.py": train,
               "network.py": network, "data.py": train.datasets}
    for entry in ENTRIES:
        for line in entry.get("figures", ()):
            _, script, command, *_ = shlex.split(line)
            assert command.startswith("--") or hasattr(modules[script], command), line
            for run in re.findall(r"\{([^}]+)\}", line):
                owner, _, name = run.rpartition("/")
                assert (owner or entry["id"], name) in known, line


def test_the_readme_shows_what_was_measured():
    table = train.comparison_markdown(ROOT / "results.csv")
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.count("\n") > len(ENTRIES)


def test_a_row_measured_after_fewer_epochs_or_in_bf16_says_so(tmp_path):
    entry, = train.read_experiments("1.1/lenet")
    config = train.Config.create(data="cifar10-jpeg", precision="bf16")
    result = {"test/accuracy": 0.5, "epochs": 1, "seconds": 9.0, "device": "cpu", "commit": "abc",
              "settings": dataclasses.asdict(config)}
    row, = train.compare(entry, "lenet", [result])
    assert row["device"] == "cpu, bf16" and row["measured"] == 50
    train.keep_results(tmp_path / "results.csv", [row])
    assert "| 50.0 after 1 of 2 epochs |" in train.comparison_markdown(tmp_path / "results.csv")
