import dataclasses
import os
import signal

import pytest
import torch

import data
import train
import visualize


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption("--device", default="cpu", help="what runs train on: cpu, cuda or mps")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of a command in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # quicker for networks this small, and steady on a busy machine
    if config.getoption("--device") == "cuda":  # read once, before the first matrix product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def coarse_figures(monkeypatch):
    """Figures of few pixels, which are quickly drawn."""
    monkeypatch.setattr(visualize, "DPI", 30)


@pytest.fixture
def few_shapes(monkeypatch):
    """A twentieth of the built-in images."""
    draw = data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda count, seed: draw(count // 20, seed))


@pytest.fixture
def refused(capsys):
    """A function of commands and a command line: the one line in which they refuse it."""
    def line_of(commands, words):
        with pytest.raises(SystemExit) as leave:
            data.command_line(commands, argv=words)
        printed, error = capsys.readouterr()
        assert leave.value.code == 2 and not printed
        assert error.startswith("error: ") and error.index("\n") == len(error) - 1
        return error
    return line_of


@pytest.fixture(autouse=True)
def on_the_device(request, monkeypatch):
    """What trains on `auto` trains on `--device`, the same again each time."""
    device, choose, repeat = (request.config.getoption("--device"), train.choose_device,
                              train.repeatable)
    monkeypatch.setattr(train, "choose_device",
                        lambda name="auto": choose(device if name == "auto" else name))
    if device != "cpu":
        monkeypatch.setattr(train, "repeatable", lambda config, chosen: repeat(
            dataclasses.replace(config, deterministic=True), chosen))
