"""The experiments of the lab, their reports, and measurements: python -m lab COMMAND."""

import sys

from data import command_line
from lab.benchmark import benchmark
from lab.gpu import gpu
from lab.report import report, results
from lab.reproduce import reproduce
from lab.smoothness import smoothness
from lab.sweep import sweep
from train import settings_flags

COMMANDS = {command.__name__: command for command in (
    reproduce, report, results, sweep, smoothness, benchmark, gpu)}
MEANINGS = {name: flag.meaning for name, flag in settings_flags([]).items()} | {
    "what": "an id such as 4.11, id/run, a report's name, or all; report: a run's folder too",
    "seeds": "runs of each kind, with seeds 0, 1, …",
    "out": "folder of the runs; report: of the report; results: the Markdown file",
    "runs": "folder of the experiments' runs",
    "results": "CSV file that keeps what was measured",
    "path": "CSV file of measured results; none: the lab's results.csv",
    "models": "networks that are measured, separated by commas",
    "tests": "run the tests of training on the device too",
    "rounds": "how often each way is measured",
    "seconds": "how long each time takes, about",
    "steps": "training steps of each run",
    "every": "steps between two measurements along the gradient",
    "lrs": "learning rates, one run each; along the gradient the first is measured",
    "format": "of the figure, where --out is no file:"}

if __name__ == "__main__":
    sys.argv[0] = "-m lab"  # what help calls this program
    command_line(COMMANDS, meanings=MEANINGS)
