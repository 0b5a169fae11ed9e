"""All that has to be seen on a real GPU once, in one command."""

import contextlib
import dataclasses
import itertools
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import network as networks
import train
from data import Table
from lab.benchmark import benchmark

ROOT = Path(__file__).parent.parent


def gpu(device: str = "auto", data: str = "cifar10", root: str = "data",
        models: tuple[str, ...] = ("lenet", "convnet", "resnet18"), rounds: int = 3,
        seconds: float = 1.0, epochs: int | None = None, limit: int | None = None,
        tests: bool = True):
    """Try this package on the GPU of this machine: a summary in Markdown.

    The tests of training, on the device; speednet with two seeds; `benchmark` of MODELS in fp32 and
    bf16, with and without torch.compile; and a run killed by SIGKILL and resumed, which must end in
    the very weights of an undisturbed one (--deterministic). It takes about a quarter of an hour.
    What fails is told, and the rest goes on. `--device=cpu`, with few epochs and images, is a
    rehearsal.
    """
    chosen = train.choose_device(device)
    if device == "auto" and chosen.type == "cpu":
        raise ValueError("device=auto: there is no GPU on this machine (a rehearsal: --device=cpu "
                         "--data=shapes --limit=256 --epochs=1 --models=lenet)")
    base = {"device": chosen.type, "root": root, "limit": limit}
    rows = []
    # What runs and tests print goes to standard error; the summary alone is standard output.
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        attempts = {}
        if tests:
            attempts["tests on the device"] = partial(run_tests, chosen.type)
        for seed in (0, 1):
            attempts[f"speednet, seed {seed}"] = partial(speednet, base, data, epochs, seed, out)
        # Nothing is compiled in a rehearsal: it may have no compiler, and has no time.
        for model, precision, compiled in itertools.product(
                models, ("fp32", "bf16"), (False, True) if chosen.type != "cpu" else (False,)):
            name = f"{model}, {precision}{', compiled' * compiled}"
            attempts[name] = partial(bench, model, precision, compiled, rounds, seconds,
                                     chosen.type)
        attempts["killed and resumed, bit for bit"] = partial(killed, base, Path(out))
        for name, attempt in attempts.items():
            started = time.perf_counter()
            try:
                found = attempt()
            except (Exception, SystemExit) as error:  # told, and the rest is tried
                found = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            rows.append((name, found, f"{time.perf_counter() - started:.0f}"))
            print(": ".join(rows[-1]), "s", flush=True)  # what was found stays, if it is stopped
    about = train.environment(chosen)
    title = (f"{about['device']}, torch {about['versions']['torch']}, commit {about['commit']}, "
             f"{sum(int(row[2]) for row in rows) / 60:.1f} minutes")
    return f"{title}\n\n{Table(('what', 'found', 'seconds'), rows).markdown()}"


def bench(model, precision, compiled, rounds, seconds, device):
    """Images/s of the training loop of `model`, and what `benchmark` compares it with."""
    table, ratios = benchmark(model, rounds=rounds, seconds=seconds, device=device,
                              precision=precision, compile=compiled)
    rates = ", ".join(f"{row[0][0]} {row[1]}" for row in table.rows[:3])
    return f"images/s: {rates}; {ratios}"


def run_tests(device):
    """The last line of pytest's report on the tests of training, on the device."""
    done = subprocess.run([sys.executable, "-m", "pytest", f"--device={device}", "--no-header",
                           "tests/test_train.py", "tests/test_devices.py"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):  # neither all passed nor some failed
        said = (done.stderr.splitlines() or done.stdout.splitlines() or [""])[-1]
        raise RuntimeError(f"pytest ended with status {done.returncode}: {said}")
    lines = done.stdout.splitlines()
    return "; ".join([*(line for line in lines if line.startswith(("FAILED", "ERROR"))), lines[-1]])


def killed(base, out):
    """Whether a run killed by SIGKILL in its second epoch and resumed ends in the weights and the
    losses of a whole one."""
    config = train.Config.create(
        "speednet", **{**base, "limit": min(base["limit"] or 4096, 4096)}, data="shapes",
        batch_size=64, epochs=3, save_minutes=0.0, deterministic=True, out=str(out), name="cut")

    def line_of(config, *more):
        return [sys.executable, str(ROOT / "train.py"),
                *shlex.split(train.command_of(config))[2:], *more]

    process = subprocess.Popen(line_of(config), stdout=subprocess.DEVNULL)
    # Its first row is there: the second epoch, with a checkpoint after each step, has begun.
    while process.poll() is None and len(train.read_rows(config.folder)) < 1:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = networks.read(config.folder / "last.pth")["step"]
    # Each in a process of its own: what is asked of cuBLAS is read before its first product.
    for line in (line_of(config, "--resume"), line_of(dataclasses.replace(config, name="whole"))):
        subprocess.run(line, stdout=subprocess.DEVNULL, check=True)
    one, two = (networks.read(out / name / "last.pth")["weights"] for name in ("cut", "whole"))
    same = all(torch.equal(one[name], two[name]) for name in two)
    losses = [train.read_metrics(out / name)["train/loss"] for name in ("cut", "whole")]
    return (f"{'the same weights' if same else 'FAILED: OTHER WEIGHTS'}, "
            f"{'the same losses' if losses[0] == losses[1] else 'FAILED: OTHER LOSSES'} "
            f"(killed after step {step})")


def speednet(base, data, epochs, seed, out):
    """Accuracies and seconds of speednet's recipe with `seed`."""
    short = {} if epochs is None else {"epochs": epochs}
    result = train.train(train.Config.create("speednet", **base, **short, data=data, seed=seed,
                                             out=out, name=f"speednet-{seed}"))
    return (f"{result['test/accuracy']:.2%}, {result['test/accuracy_tta']:.2%} with tta, "
            f"{result['seconds']:.1f} s of training, {result['epochs']} epochs")
