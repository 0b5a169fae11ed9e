"""Training: schedules by hand, runs that resume exactly, files that hold what they should."""

import contextlib
import copy
import csv
import dataclasses
import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy
import pytest
import torch

import data
import network
import train
import visualize

ROOT = Path(__file__).parent.parent
TINY = {"data": "shapes", "limit": 96, "batch_size": 16, "epochs": 2, "save_minutes": 0.0,
        "dropout": 0.2, "augment": ("flip", "crop"), "keep": 3}


def tiny(tmp_path, name="run", **changes):
    return train.Config.create(**{**TINY, "model": "lenet", "out": str(tmp_path), "name": name,
                                  **changes})


def steady_rows(folder):
    """metrics.csv without what depends on the clock."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items()
                 if name not in ("seconds", "images_per_second")} for row in csv.DictReader(file)]


def steady_result(folder):
    result = json.loads((folder / "result.json").read_text())
    result["settings"].pop("name")
    return {name: value for name, value in result.items() if name not in ("seconds", "command")}


def event_steps(folder):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    return sorted((value.tag, event.step) for path in folder.glob("events.*")
                  for event in EventFileLoader(str(path)).Load() for value in event.summary.value)


def assert_same_run(one, two):
    first, second = network.read(one / "last.pth"), network.read(two / "last.pth")
    assert first["step"] == second["step"]
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    assert steady_rows(one) == steady_rows(two)
    assert steady_result(one) == steady_result(two)
    assert event_steps(one) == event_steps(two)


def test_learning_rate_by_hand():
    def at(step, schedule):
        return train.learning_rate(step, 100, 0, 1.0, schedule)
    assert [at(step, "step") for step in (0, 49, 50, 75)] == pytest.approx([1, 1, 0.1, 0.01])
    assert [at(step, "linear") for step in (0, 50, 75)] == pytest.approx([1, 0.5, 0.25])
    assert [at(step, "cosine") for step in (0, 50, 25)] == pytest.approx(
        [1, 0.5, 0.5 + math.sqrt(0.125)])
    assert at(99, "constant") == 1 and at(0, "onecycle") == pytest.approx(1 / 26)
    assert max(range(100), key=lambda step: at(step, "onecycle")) == 25
    # It takes the highest rate once.
    for total, warmup in ((10, 0), (10, 3.7), (3, 0), (1, 0), (1, 1), (10, 10), (10, 99)):
        assert max(train.learning_rate(step, total, warmup, 1.0, "onecycle")
                   for step in range(total)) == 1
    # Also where the warm-up ends within a step, or would be longer than the run.
    for schedule, warmup in itertools.product(("linear", "cosine", "constant"), (2.5, 10, 99)):
        assert max(train.learning_rate(step, 10, warmup, 1.0, schedule)
                   for step in range(10)) == 1
    after = [train.learning_rate(step, 400, 40, 1.0, "step") for step in (219, 220, 309, 310)]
    assert after == pytest.approx([1, 0.1, 0.1, 0.01])  # of the 360 steps after the warm-up
    assert [train.learning_rate(step, 100, 4, 1.0, "constant") for step in range(5)] == \
        pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("changes, complaint", [
    ({"lr": -1.0}, "lr=-1"), ({"epochs": 0}, "epochs=0"), ({"optimizer": "sdg"}, "adamw"),
    ({"augment": ("flop",)}, "flop"), ({"schedule": "cos"}, "cosine"), ({"widht": 3}, "widht"),
    ({"dropout": 1.5}, "dropout"), ({"model": "lenet6"}, "lenet6"), ({"epochs": "3"}, "epochs"),
    ({"name": "x" * 5000}, "name: a text of more than 4096"),
    ({"data": os.fsdecode(b"f\xfcr")}, "data='f.*no text in UTF-8"),
])
def test_settings_are_checked(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        train.Config.create(**{"model": "lenet", **changes})


@pytest.mark.parametrize("model", network.NETWORKS)
def test_every_network_has_a_recipe(model):
    assert model in train.RECIPES
    train.Config.create(model)


def test_flags_of_the_environment_are_added_and_win(monkeypatch):
    monkeypatch.setenv("TRAIN_FLAGS", "--data=shapes --epochs 2 --batch-size=8 --out=~/runs")
    assert train.parse_flags({"epochs": "30", "lr": "0.1"}) == {
        "epochs": 2, "lr": 0.1, "data": "shapes", "batch_size": 8,
        "out": os.path.expanduser("~/runs")}
    for flags in ("--limit", "--model", "--limit=8 '", "hello", "--nonsense=3",
                  "--epochs=2 --epochs=3", "--epochs=abc"):
        monkeypatch.setenv("TRAIN_FLAGS", flags)
        with pytest.raises(ValueError, match=f"TRAIN_FLAGS={flags}: "):
            train.parse_flags({})


def test_score_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    result = train.score(logits, torch.tensor([0, 0, 1]), 2)
    low, high = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert result["loss"] == pytest.approx((low + 2 * high) / 3)
    assert result["accuracy"] == pytest.approx(1 / 3) and result["per_class"] == [0.5, 0]
    absent = train.score(torch.eye(3)[:2], torch.tensor([0, 1]), 3)
    assert absent["accuracy"] == 1 and absent["per_class"] == [1, 1, None]
    sick = train.score(torch.tensor([[math.nan, 0], [1, 0]]), torch.tensor([0, 0]), 2)
    assert math.isnan(sick["loss"]) and sick["accuracy"] == 0.5


def test_calibration_by_hand():
    # Probabilities 3/4 (right), 3/4 (wrong) and 9/10 (right): gaps of 1/4 for two and 1/10 for one.
    odds = torch.tensor([3.0, 3.0, 9.0]).log()
    logits = torch.stack([odds, torch.zeros(3)], 1)
    images, confidence, accuracy, error = train.calibration(logits, torch.tensor([0, 1, 0]))
    assert error == pytest.approx((2 * 0.25 + 1 * 0.1) / 3)
    assert images[11] == 2 and images[13] == 1 and sum(images) == 3
    assert accuracy[11] == 0.5 and confidence[13] == pytest.approx(0.9) and accuracy[0].isnan()
    images, *_, error = train.calibration(torch.tensor([[100.0, 0.0]]), torch.tensor([0]))
    assert error == 0 and images[14] == 1
    many = train.figures(torch.arange(12.0).expand(12, 12), torch.arange(12), range(12))
    assert many["test/top5_accuracy"] == 5 / 12
    assert train.figures(torch.eye(2), torch.arange(2), "ab")["test/top5_accuracy"] is None


@pytest.mark.parametrize("shape, dtype", [
    ((3, 32, 32), "uint8"), ((2, 1, 32, 32), "uint8"), ((2, 4, 32, 32), "uint8"),
    ((0, 3, 32, 32), "uint8"), ((2, 3, 32, 32), "int64"), ((2, 3, 32, 32), "bool")])
def test_predictions_are_of_bytes_of_three_colours(shape, dtype):
    images = torch.ones(shape, dtype=getattr(torch, dtype))
    told = rf"torch\.{dtype}, {'×'.join(map(str, shape))}: must be bytes \(torch\.uint8\), N×3×H×W"
    with pytest.raises(ValueError, match=told):
        train.predict(network.build("lenet"), images, data.Preprocessing(32, (0.5,) * 3, (1,) * 3))


def test_mixed_images_by_hand():
    logits, labels = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    objective, sums = train.measure(logits, [(labels, 0.75), (labels.flip(0), 0.25)], 0.0)
    low, high = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert objective.item() == pytest.approx(low + high) and sums[2] == 2
    assert sums[1] == pytest.approx(0.75 + 0.25)
    sides = ((8, 8), (4, 8), (12, 8))
    for step, (height, width) in itertools.product(range(20), sides):
        zeros, ones = torch.zeros(3, height, width), torch.ones(3, height, width)
        images = torch.stack([zeros, ones])
        mixed, ((_, share), (others, rest)) = data.mix(images, labels, ("mixup",), 0, step)
        assert torch.allclose(mixed[0], ones * rest) and share + rest == 1
        assert torch.allclose(mixed[1], ones * share)
        mixed, ((_, share), (others, rest)) = data.mix(images, labels, ("cutmix",), 0, step)
        assert mixed[0].mean() == pytest.approx(rest) and set(mixed.unique().tolist()) <= {0, 1}
        assert others.tolist() == [1, 0]
    assert not images[0].any() and images[1].all()  # as they were


@pytest.mark.parametrize("changes", [
    {"augment": ("flip", "mixup", "cutmix"), "label_smoothing": 0.1}, {"ema": 0.9, "clip": 0.01},
    {"ema": 0.9, "on_nan": "skip"}])
def test_what_is_off_by_default_goes_on_where_it_stopped(changes, tmp_path, monkeypatch):
    train.train(tiny(tmp_path, "whole", **changes))
    real_step, seen = train.train_step, []

    def failing_step(*arguments):
        seen.append(1)
        if len(seen) == 9:
            raise RuntimeError("power cut")
        real_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", failing_step)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(tiny(tmp_path, "cut", **changes))
    train.train(tiny(tmp_path, "cut", **changes), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    train.train(tiny(tmp_path, "plain"))
    weights = [network.read(tmp_path / name / "last.pth")["weights"]["fc.4.bias"]
               for name in ("whole", "plain")]
    assert not torch.equal(*weights)


def step_state(config, value):
    """A `State` of one weight, of `value`, and its optimizer."""
    one = torch.nn.Linear(1, 2, bias=False)
    torch.nn.init.constant_(one.weight, value)
    return train.State(one, copy.deepcopy(one), train.make_optimizer(config, one), torch.zeros(4))


def test_the_mean_of_the_weights_after_three_steps():
    state, expected = step_state(train.Config.create(), 0.0), 0.0
    for step, value in enumerate((1.0, 2.0, 4.0)):
        state.step = step
        torch.nn.init.constant_(state.network.weight, value)
        state.follow(0.15)
        kept = (0.1, 0.15, 0.15)[step]  # (1 + 0) / (10 + 0) in the first step
        expected = kept * expected + (1 - kept) * value
    assert state.evaluated.weight.flatten().tolist() == pytest.approx([expected] * 2)
    assert expected == pytest.approx(0.15 * (0.15 * 0.9 + 0.85 * 2) + 0.85 * 4)
    assert state.network.weight.flatten().tolist() == [4, 4]


def test_a_clipped_step_is_as_long_as_it_may_be():
    config = train.Config.create(clip=0.5, momentum=0.0, weight_decay=0.0)
    state = step_state(config, 0.0)
    train.train_step(state, torch.full((4, 1), 100.0), torch.tensor([0, 0, 0, 1]), config,
                     train.Workers(), 1.0, 4)
    assert state.network.weight.norm().item() == pytest.approx(0.5, rel=1e-4)


def test_patience_ends_a_run_where_it_should(tmp_path, monkeypatch):
    accuracies = {1: 0.2, 2: 0.3, 3: 0.3, 4: 0.1, 5: 0.9}
    real_score = train.score
    monkeypatch.setattr(train, "score", lambda *a: {**real_score(*a),
                                                    "accuracy": accuracies[epoch[0]]})
    epoch, real_end = [0], train.end_epoch

    def end(state, *rest):
        epoch[0] = state.epoch + 1
        real_end(state, *rest)
        if killed == [state.epoch]:
            killed.clear()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "end_epoch", end)
    killed = []
    result = train.train(tiny(tmp_path, epochs=9, patience=2))
    assert result["epochs"] == 4 and result["epoch"] == 2
    for at in (3, 4):
        killed = [at]
        with pytest.raises(SystemExit):
            train.train(tiny(tmp_path, f"cut{at}", epochs=9, patience=2))
        train.train(tiny(tmp_path, f"cut{at}", epochs=9, patience=2), resume=True)
        assert_same_run(tmp_path / "run", tmp_path / f"cut{at}")
    few = image_folder(tmp_path / "few", "ab")  # of which a tenth is none
    for config in (tiny(tmp_path, "none", patience=2, val=0),
                   tiny(tmp_path, "small", patience=2, data=few, val=None,
                        root=str(tmp_path / "root"))):
        with pytest.raises(ValueError, match="patience: needs images"):
            train.train(config)
        assert not config.folder.exists()


def test_snapshots_are_the_weights_of_their_epochs(tmp_path):
    config = tiny(tmp_path, epochs=3, snapshots=(1, 3), keep=0)
    train.train(config)
    names = {path.name for path in config.folder.glob("snapshot-*")}
    assert names == {"snapshot-00001.pth", "snapshot-00003.pth"}
    for name, other in (("snapshot-00001.pth", "step-000000006.pth"),
                        ("snapshot-00003.pth", "last.pth")):
        kept, about = network.load(config.folder / name)
        whole, _ = network.load(config.folder / other)
        assert about.epoch == int(name[9:14])
        for one, two in zip(kept.parameters(), whole.parameters()):
            assert one.dtype == torch.float32 and torch.allclose(one, two, atol=2e-4)
    small = network.build("lenet")
    assert train.snapshot_epochs(tiny(tmp_path, epochs=20), small) == {2, 5, 8, 10, 12, 15, 18, 20}
    assert train.snapshot_epochs(tiny(tmp_path, epochs=2), small) == {0, 1, 2}
    assert not train.snapshot_epochs(tiny(tmp_path), network.build("resnet18"))


def test_rows_fit_80_columns(tmp_path, capsys):
    train.train("lenet", data="shapes", limit=32, epochs=1, out=str(tmp_path), batch_size=16)
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.split()[:1] == ["epoch"])
    assert head.split() == ["epoch", "step", "loss", "acc", "val_loss", "val_acc", "lr", "time"]
    row = lines[lines.index(head) + 1]
    assert len(row) == len(head) <= 80 and row.split()[:2] == ["1", "2"]
    train.train("lenet", resume=True, data="shapes", limit=32, epochs=1, out=str(tmp_path),
                batch_size=16)
    out = capsys.readouterr().out
    assert "all 1 epochs are done, at step 2" in out and "resuming" not in out


def test_predict_names_the_likeliest_classes(tmp_path):
    ab = image_folder(tmp_path / "ab", "ab")
    config = tiny(tmp_path, data=ab, val=0, limit=None, epochs=1, image_size=32, batch_size=4,
                  root=str(tmp_path / "cache"))
    train.train(config)
    folder, csv_file = Path(ab, "test"), tmp_path / "table.csv"
    table, path = train.predict_command(str(config.folder), str(folder), top=2, out=str(csv_file))
    loaded, about = train.open_network(config.folder)  # on the device that the command takes
    images = torch.stack([data.read_image(row[0]) for row in table.rows])
    shares = train.predict(loaded, images, about.preprocessing).softmax(1)
    rows = list(csv.DictReader(path.open()))
    assert len(table.rows) == 8 and len(rows) == 16
    for number, row in enumerate(rows):
        share = shares[number // 2, about.classes.index(row["class"])].item()
        assert float(row["probability"]) == pytest.approx(share, abs=1e-5)
    assert rows[0]["probability"] >= rows[1]["probability"] and rows[1]["rank"] == "2"
    (tmp_path / "none").mkdir()
    assert train.predict_command(str(config.folder), ab)[0].header == ("image", "1", "2")
    for images, top, complaint in (([str(tmp_path / "none")], 1, "no picture"), ([ab], 0, "top=0"),
                                   ([str(tmp_path / "x.png")], 1, "no such image")):
        with pytest.raises((ValueError, OSError), match=complaint):
            train.predict_command(str(config.folder), *images, top=top)


def test_predict_goes_on_past_what_is_no_picture(tmp_path, capsys):
    config = tiny(tmp_path)
    train.train(config)
    pictures = Path(image_folder(tmp_path / "ab", "ab"), "test")
    (pictures / "a" / "broken.png").write_bytes(b"no picture")
    (pictures / "a" / "._0.png").write_bytes(b"what a Mac leaves beside 0.png")
    (pictures / "sprite.png").write_bytes(next(pictures.rglob("*.png")).read_bytes())
    (pictures / "tensors.tsv").touch()  # the sprites of TensorBoard's Projector lie beside one
    for name in ("dog.heic", "noext"):
        (pictures / "a" / name).touch()
    (pictures / "a" / "link.png").symlink_to(tmp_path / "nowhere")
    (pictures / ".thumbs").mkdir()
    shutil.copy(pictures / "a" / "0.png", pictures / ".thumbs")
    (pictures / "more").symlink_to(tmp_path / "ab" / "train")
    table, error = train.predict_command(str(config.folder), str(pictures))
    assert len(table.rows) == 8 and "broken.png: cannot be read" in str(error)
    assert "link.png: no such image file" in str(error)
    assert "._0.png" not in str(error)
    assert (f"{pictures}: left out files of TensorBoard's Projector (2), files of type .heic (1), "
            f"files of type unknown (1), hidden files (2), links to folders (1)\n"
            in capsys.readouterr().err)
    with pytest.raises(SystemExit) as leave:
        data.command_line(train.COMMANDS, argv=["predict", str(config.folder), str(pictures)])
    shown = capsys.readouterr()
    assert leave.value.code == 2 and "broken.png" in shown.err and "test image" not in shown.err
    assert shown.out.count("%") == 3 * 8


@pytest.mark.parametrize("line, answer", [
    ("--model=resnet18 --dropout=0.2", "--dropout: resnet18 has no such option; its options are"),
    ("--batch_size 8 16", "16: a word too many"), ("evaluate x --tta=flp", "did you mean flip?"),
    ("data=shapes", "did you mean --data=shapes?"), ("epoch=3", "did you mean --epochs=3?"),
    ("--device=gpu", "--device=gpu: must be of auto, cpu, cuda, mps; did you mean cuda?"),
    ("reproduce 4.1", "reproduce has moved: python -m lab reproduce"),
    ("--early=0.5", "--early: is now called --early_share")])
def test_a_mistyped_setting_is_answered_with_what_was_meant(line, answer, capsys):
    with pytest.raises(SystemExit) as leave:
        data.command_line(train.COMMANDS, "train", line.split(), moved=train.MOVED)
    assert leave.value.code == 2 and answer in capsys.readouterr().err


@pytest.mark.parametrize("content, complaint", [
    ("epoch\n" + "9" * 200_000, r"metrics\.csv: damaged"),
    ("epoch;step\n1;5\n2;10\n", r"metrics\.csv: damaged \(its first line is not epoch,step"),
    ("epoch,step\n1,2\n".encode("utf-16").decode("latin1"), r"metrics\.csv: damaged"),
    ("", r"no rows in metrics\.csv"), ("\0\0", r"no rows in metrics\.csv"),
    (",".join(train.COLUMNS) + "\n1,1,2", r"no rows in metrics\.csv"),
    (None, r"metrics\.csv: not a regular file")])
def test_damaged_metrics_are_named(content, complaint, tmp_path):
    path = tmp_path / "metrics.csv"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content.encode("latin1"))
    with pytest.raises((ValueError, OSError), match=complaint):
        train.read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError, match="no run with a finished epoch"):
        train.read_metrics(path)  # a file, as a checkpoint is


RESAVED = [lambda text: re.sub("(?m)^([0-9]+),([0-9]+),", r"\1.0,\2.0,", text),  # pandas, a join
           lambda text: re.sub("([^,\n]+)", r'"\1"', text),  # a spreadsheet that quotes all
           lambda text: "\ufeff" + text.replace("\n", "\r\n")]  # one of Windows


@pytest.mark.parametrize("change", RESAVED)
def test_metrics_that_another_program_saved_are_read(change, tmp_path):
    text = ",".join(train.COLUMNS) + "\n1,5,1.5,0.5,,,0.1,2,99,\n2,10,1.25,0.5,,,0.1,2,99,\n"
    (tmp_path / "metrics.csv").write_text(change(text), newline="")
    rows = train.read_metrics(tmp_path)
    assert rows["epoch"] == [1, 2] and rows["step"] == [5, 10] and rows["lr"] == [0.1, 0.1]
    assert rows["train/loss"] == [1.5, 1.25] and math.isnan(rows["val/loss"][0])


def test_the_arrays_of_cifar_10_1_and_cifar_10_c_are_measured(tmp_path):
    import numpy
    random = numpy.random.default_rng(0)
    images = random.integers(0, 256, (20, 32, 32, 3), dtype="uint8")
    labels = random.integers(0, 10, 20)
    numpy.save(tmp_path / "cifar10.1_v6_data.npy", images)
    numpy.save(tmp_path / "cifar10.1_v6_labels.npy", labels)
    corrupted = tmp_path / "CIFAR-10-C"
    corrupted.mkdir()
    for name in ("fog", "snow"):
        numpy.save(corrupted / f"{name}.npy", images)
    numpy.save(corrupted / "labels.npy", labels.astype("uint8"))
    config = tiny(tmp_path)
    built = network.build("lenet")
    description = {"model": "lenet", "options": {}, "classes": list(reversed(data.CIFAR10)),
                   "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "epoch": 1, "step": 1,
                   "settings": dataclasses.asdict(config)}
    path = tmp_path / "a.pth"
    network.save(path, {**description, "weights": built.state_dict()})
    loaded, about = network.load(path)
    test = train.open_test(about, str(tmp_path / "cifar10.1_v6_data.npy"))
    assert test.images.permute(0, 2, 3, 1).tolist() == images.tolist()
    assert test.labels.tolist() == (9 - labels).tolist()  # by their names
    right = train.predict(loaded, test.images, about.preprocessing).argmax(1) == test.labels
    table = train.evaluate(str(path), data=str(corrupted))
    assert [row[0] for row in table.rows] == ["fog", "snow", "mean of 2"]
    expected = [f"{part.double().mean().item():.1%}" for part in (*right.split(4), right)]
    assert [*table.rows[0][1:]] == [*table.rows[2][1:]] == expected
    numpy.save(corrupted / "spatter.npy", images[::-1])  # which does not count
    table = train.evaluate(str(path), data=str(corrupted))
    assert table.rows[3] == ("mean of 2", *expected)
    with open(tmp_path / "archive_data.npy", "wb") as file:
        numpy.savez(file, images)
    with pytest.raises(ValueError, match=r"archive_data\.npy: is an archive of arrays"):
        train.open_test(about, str(tmp_path / "archive_data.npy"))
    for kind in ("uint16", "int64"):
        numpy.save(tmp_path / "deep_data.npy", images.astype(kind))
        numpy.save(tmp_path / "deep_labels.npy", labels)
        with pytest.raises(ValueError, match=rf"deep_data\.npy: must be .*×3 uint8, is {kind}"):
            train.open_test(about, str(tmp_path / "deep_data.npy"))
    head = "{'descr': '|u1', 'fortran_order': False, 'shape': "
    for header in ("(", head + "(-1,)}", head + "(1 << 70,)}", head + "(99999999999999999999,)}",
                   "{'descr': [('a',)], 'fortran_order': False, 'shape': (1,)}", "PK"):
        text = header.encode()
        (tmp_path / "archive_data.npy").write_bytes(
            b"PK\3\4" if header == "PK" else
            b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(9))
        with pytest.raises(ValueError, match=r"archive_data\.npy: not an array of NumPy"):
            train.open_test(about, str(tmp_path / "archive_data.npy"))
    for name, array in (("cifar10.1_v6_labels.npy", labels + 5), ("cifar10.1_v6_labels.npy",
                        labels[:3]), ("cifar10.1_v6_data.npy", images[:, :5])):
        numpy.save(tmp_path / name, array)
        with pytest.raises(ValueError, match="must be"):
            train.open_test(about, str(tmp_path / "cifar10.1_v6_data.npy"))


class OnePixel(torch.nn.Module):
    """Two logits: 0 and the value of the red pixel in the second row and column, less 10."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        pixel = images[:, 0, 1, 1] * self.scale - 10
        return torch.stack([torch.zeros_like(pixel), pixel], 1)


def test_views_are_averaged_by_hand():
    images = torch.arange(9.0).view(1, 1, 3, 3).expand(1, 3, 3, 3).contiguous()
    whole = data.Preprocessing(3, (0.0,) * 3, (1 / 255,) * 3)  # pixels as they are
    images = images.to(torch.uint8).expand(2, 3, 3, 3)
    # 4 in the middle; moved by a pixel, what is above it to the left, 0, or below to the right, 8.
    for tta, value in (("none", 4), ("flip", 4), ("full", (4 + 4) / 4 + (0 + 2 + 6 + 8) / 8)):
        logits = train.predict(OnePixel(), images, whole, tta)
        assert logits[:, 1].tolist() == pytest.approx([value - 10] * 2), tta
        assert sum(share for share, _ in train.tta_views(images.float(), tta)) == 1
    with pytest.raises(ValueError, match="2×2"):
        train.Config.create("resnet20", image_size=1, tta="full")


def test_the_loss_of_training_is_the_plain_cross_entropy(tmp_path):
    plain, smooth = (tiny(tmp_path, name, label_smoothing=amount, lr=0.0, val=0, epochs=1)
                     for name, amount in (("plain", 0.0), ("smooth", 0.3)))
    for config in (plain, smooth):
        train.train(config)
    one, two = (train.read_metrics(config.folder) for config in (plain, smooth))
    assert one["train/loss"] == two["train/loss"] and math.isnan(one["train/objective"][0])
    logits = torch.tensor([[1.0, 0.0]])
    objective, sums = train.measure(logits, [(torch.tensor([0]), 1.0)], 0.2)
    low, high = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert objective.item() == pytest.approx(0.9 * low + 0.1 * high)
    assert sums.tolist() == pytest.approx([low, 1, 1, 0.9 * low + 0.1 * high])


def test_a_run_of_skipped_steps_is_no_run(tmp_path):
    config = tiny(tmp_path, on_nan="skip", lr=0.0, epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        real_loss = train.F.cross_entropy
        patch.setattr(train.F, "cross_entropy", lambda *a, **k: real_loss(*a, **k) * math.nan)
        with pytest.raises(ValueError, match="every step of epoch 1 was skipped"):
            train.train(config)
    assert not steady_rows(config.folder)


def test_weights_that_are_no_numbers_are_not_measured(tmp_path):
    train.train(tiny(tmp_path, val=0, epochs=1, limit=16))
    path = tmp_path / "run" / "last.pth"
    checkpoint = network.read(path)
    weights = checkpoint["weights"]
    for value, complaint in ((math.nan, "not finite numbers"), (3e38, "outputs are not finite")):
        weights["fc.4.weight"].fill_(value)
        weights["fc.4.bias"].fill_(3e38)
        network.save(path, checkpoint)
        with pytest.raises(ValueError, match=complaint):
            train.evaluate(str(path))


def test_memory_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(train, "train_step", full)
    with pytest.raises(OSError, match="out of memory: a smaller `batch_size` than 16"):
        train.train(tiny(tmp_path))


def test_a_port_that_is_taken_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_script(*TINY_LINE, f"--out={tmp_path}", "--device=cpu", env={
            **os.environ, "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1])})
    assert done.returncode == 2 and "cannot meet at 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_whitening_is_fitted_to_as_many_pixels_of_larger_images(monkeypatch):
    seen = []
    monkeypatch.setattr(network.WhiteningConv, "fit", lambda _, images: seen.append(images.shape))
    for side, size in ((32, 32), (32, 96), (4, 4)):
        images = torch.zeros(10_000, 3, 1, 1, dtype=torch.uint8).expand(-1, -1, side, side)
        dataset = types.SimpleNamespace(train=data.Split(images, None), mean=(0.5,) * 3,
                                        std=(0.5,) * 3)
        train.fit_first_layer(network.build("speednet"), dataset, size)
    assert seen == [(5000, 3, 32, 32), (556, 3, 96, 96), (5000, 3, 4, 4)]


def test_whitening_filters_are_fitted_to_images_as_the_network_sees_them():
    split = data.draw_shapes(500, 1)
    dataset = data.Dataset("shapes", data.SHAPES, split, None, split,
                           *data.pixel_statistics(split.images))
    for size in (32, 16):
        built = network.build("speednet", 10, size, channels=(8,))
        train.fit_first_layer(built, dataset, size)
        seen = data.Preprocessing(size, dataset.mean, dataset.std)(split.images)
        with torch.no_grad():
            spread = built.conv1[0](seen)[:, :12].var((0, 2, 3))
        assert spread.max() == pytest.approx(1, abs=0.05)  # less where there is next to nothing


def test_metrics_are_whole_again_whatever_became_of_them(tmp_path):
    config = tiny(tmp_path)
    first, path = train.train(config), config.folder / "metrics.csv"
    assert first["train/accuracy"] == train.read_metrics(config.folder)["train/accuracy"][-1]
    text = path.read_text()
    for damaged in ("epoch\n" + "9" * 200_000, "", "\0\0", None,
                    ",".join(train.COLUMNS) + "\n1,1,2", text.rpartition("\n2,")[0],
                    *(change(text) for change in RESAVED)):
        path.unlink()
        if damaged is None:
            os.mkfifo(path)
        else:
            path.write_text(damaged)
        result = train.train(config, resume=True)
        assert path.read_text() == text and train.checked(result)
        assert result["train/accuracy"] == first["train/accuracy"]
    for mine in (text.replace("objective\n", "objective,my note\n"), "loss,acc\n1,2\n",
                 text.replace("train/objective", "my note"), "epoch;step\n1;5\n2;10\n",
                 RESAVED[1](text).replace("objective\"\n", "objective\",\"my note\"\n")):
        path.write_text(mine)
        with pytest.raises(ValueError, match=r"metrics\.csv: has a column .* of somebody else's"):
            train.train(config, resume=True)
        assert path.read_text() == mine


def test_a_run_of_an_earlier_version_is_gone_on_with(tmp_path):
    for name in ("new", "old"):
        train.train(tiny(tmp_path, name))
    folder = tmp_path / "old"
    checkpoint = network.read(folder / "last.pth")
    training = checkpoint["training"]
    for name in ("totals", "logged"):  # of one loss, as a tensor
        training[name] = torch.tensor(training[name][:3])
    training["optimizer"]["param_groups"] = [{"lr": 0.1, "params": [0]}]
    del training["metrics"], checkpoint["fingerprint"], checkpoint["commit"]
    settings = checkpoint["settings"]
    for before, now in train.RENAMED.items():
        settings[before] = settings.pop(now)
    network.save(folder / "last.pth", checkpoint)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / ".run").unlink()
    lines = (folder / "metrics.csv").read_text().splitlines()  # without what a step lowers
    lines = [line.rpartition(",")[0] for line in lines]
    (folder / "metrics.csv").write_text("\r\n".join([*lines, "3,"]), "utf-8-sig")
    for name in ("new", "old"):
        train.train(tiny(tmp_path, name, epochs=3), resume=True)
    assert_same_run(tmp_path / "new", folder)


def test_other_images_of_the_same_names_and_sizes_are_refused(tmp_path):
    pets = image_folder(tmp_path / "pets", ("cat", "dog"), kind="bmp")
    values = {"data": pets, "val": 0, "limit": None, "batch_size": 4,
              "root": str(tmp_path / "cache")}
    train.train(tiny(tmp_path / "runs", **values))
    path = Path(pets, "train", "cat", "0.bmp")
    path.write_bytes(path.read_bytes().replace(b"\0" * 9, b"\xff" * 9))
    with pytest.raises(ValueError, match=r"files were added, removed or changed.*`changed_data`"):
        train.train(tiny(tmp_path / "runs", **values, epochs=3), resume=True)


@pytest.mark.parametrize("kind", ["bmp", "tif", "png"])
def test_images_of_one_size_that_changed_places_are_others(kind, tmp_path):
    from PIL import Image

    pets = image_folder(tmp_path / "pets", ("cat", "dog"), kind=kind)
    for path in Path(pets).rglob("*.png"):
        Image.open(path).save(path, compress_level=0)
    before = data.fingerprint_of(pets)
    assert data.same_files(before.partition("-")[0], before)  # an earlier version's
    shutil.copytree(pets, tmp_path / "copy")
    for name, other in (("cat", "x"), ("dog", "cat"), ("x", "dog")):
        Path(pets, "test", name).rename(Path(pets, "test", other))
    assert data.fingerprint_of(str(tmp_path / "copy")) == before != data.fingerprint_of(pets)


def test_what_a_run_was_told_late_is_said(tmp_path):
    values = {"val": 32, "epochs": 6, "lr": 0.3}
    first = train.train(tiny(tmp_path, **values, patience=1))
    step = first["epochs"] * 6
    assert first["epochs"] < 6
    again = train.train(tiny(tmp_path, **{**values, "epochs": 60}, patience=1), resume=True)
    assert again["history"] == f"planned for 6 epochs up to step {step}"  # though it is over
    train.train(tiny(tmp_path, "late", **{**values, "epochs": 2}))
    late = train.train(tiny(tmp_path, "late", **{**values, "epochs": 2}, patience=1), resume=True)
    assert late["history"] == "with a patience of 0 up to step 12"


def test_how_many_processes_took_earlier_steps_is_said(tmp_path):
    values = {"val": 0, "schedule": "constant", "warmup_epochs": 0}
    train.train(config := tiny(tmp_path, **values))
    path = config.folder / "last.pth"
    network.save(path, {**network.read(path), "processes": 2})
    again = train.train(config, resume=True)  # measured anew alone
    assert again["history"] is None and again["command"].startswith("torchrun --standalone")
    result = train.train(tiny(tmp_path, **values, epochs=3), resume=True)
    assert result["history"] == "in 2 processes up to step 12"


@pytest.mark.parametrize("schedule, warmup, said", [
    ("cosine", 1, "planned for 2 epochs up to step 12"), ("constant", 1, None),
    ("constant", 3, "planned for 2 epochs up to step 12")])
def test_a_run_that_grew_says_so(schedule, warmup, said, tmp_path):
    values = {"schedule": schedule, "val": 0, "warmup_epochs": warmup}
    train.train(tiny(tmp_path, **values))
    more = tiny(tmp_path, **values, epochs=4)
    result = train.train(more, resume=True)
    assert result["history"] == said and train.finished(more.folder)["history"] == said
    assert train.train(more, resume=True)["history"] == said  # once
    fresh = train.train(tiny(tmp_path, "fresh", **values, epochs=4))
    assert fresh["history"] is None
    same = steady_rows(more.folder) == steady_rows(tmp_path / "fresh")
    assert same == (said is None)
    assert len(visualize.group_runs([more.folder, tmp_path / "fresh"])) == 2


def test_a_run_whose_images_changed_says_so(tmp_path):
    pets = image_folder(tmp_path / "pets", ("cat", "dog"), images=6)
    values = {"data": pets, "val": 0, "limit": None, "batch_size": 4, "schedule": "constant",
              "root": str(tmp_path / "cache")}
    train.train(tiny(tmp_path / "runs", **values))
    Path(pets, "train", "cat", "0.png").unlink()
    more = tiny(tmp_path / "runs", **values, epochs=3)
    result = train.train(more, resume=True, changed_data=True)
    assert result["history"] == "on other images up to step 6"


def test_seeds_are_of_the_same_images_wherever_these_lie(tmp_path, monkeypatch):
    runs = []
    for place, images in (("A", 4), ("B", 4), ("C", 8)):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        image_folder(Path("pets"), ("cat", "dog"), images=images)
        config = tiny(Path("runs"), data="pets", val=0, limit=None, batch_size=4, seed=len(runs))
        train.train(config)
        runs.append(config.folder.absolute())
    assert [len(members) for members in visualize.group_runs(runs).values()] == [2, 1]


def test_a_path_names_no_built_in_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_folder(Path("shapes"), data.SHAPES, images=2)
    data.say_once.cache_clear()
    assert len(data.load("shapes", limit=64).train.labels) == 64
    assert "--data=./shapes is the folder here" in capsys.readouterr().err
    for given in ("./shapes", Path("./shapes"), Path("shapes")):
        assert len(data.load(given, val=0, root="cache").train.labels) == 20
        assert data.folder_of(train.Config(data=given).data) == tmp_path / "shapes"
    config = tiny(Path("runs"), data=Path("shapes"), val=0, root="cache")
    train.train(config)
    Path("shapes/test/disc/0.png").unlink()
    with pytest.raises(ValueError, match=r"--data=\./shapes measures it"):
        train.evaluate(str(config.folder))


def test_a_run_goes_on_where_its_images_were_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, size in (("pets", 32), ("others", 31)):
        image_folder(Path(name), ("cat", "dog"), size=size)
    values = {"val": 0, "limit": None, "batch_size": 4, "image_size": 32, "root": "cache"}
    first = tiny(tmp_path / "runs", **values, data="pets")
    train.train(first)
    for written in ("pets/", "./pets", str(tmp_path / "pets")):  # the same folder
        assert train.finished(first.folder, dataclasses.replace(first, data=written))
    Path("pets").rename("moved")
    more = {**values, "epochs": 3}
    with pytest.raises(ValueError, match="files were added, removed or changed"):
        train.train(tiny(tmp_path / "runs", **more, data="others"), resume=True)
    with pytest.raises(ValueError, match=r"data=shapes: the run in .* has pets"):
        train.train(tiny(tmp_path / "runs", **more, data="shapes"), resume=True)
    train.train(tiny(tmp_path / "runs", **more, data="moved"), resume=True)
    assert train.read_config(first.folder / "config.json").data == "moved"
    with pytest.raises(ValueError, match=r"data=pets: the run in .* has moved"):
        train.finished(first.folder, tiny(tmp_path / "runs", **more, data="pets"))  # it is gone
    # Whose images nobody has compared yet; who goes on with it does.
    assert train.finished(first.folder, tiny(tmp_path / "runs", **more, data="others")) is None
    Path("moved").rename("again")
    train.train(tiny(tmp_path / "runs", **more, data="again"), resume=True)
    assert train.finished(first.folder)["settings"]["data"] == "again"
    old = network.read(first.folder / "last.pth")
    del old["fingerprint"]  # as checkpoints of earlier versions
    network.save(first.folder / "last.pth", old)
    with pytest.raises(ValueError, match=r"data=others: the run in .* has moved"):
        train.train(tiny(tmp_path / "runs", **more, data="others"), resume=True)


def test_a_run_may_be_called_as_its_images_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.train(tiny(".", "shapes", epochs=1))
    assert train.train(tiny(".", "shapes"), resume=True)["epochs"] == 2


def test_without_its_best_checkpoint_a_run_is_that_of_its_last_epoch(tmp_path, capsys):
    train.train(config := tiny(tmp_path, lr=0.0))  # no epoch is better than the first
    (config.folder / "best.pth").unlink()
    result = train.train(config, resume=True)
    assert "best.pth is gone" in capsys.readouterr().out and train.checked(result)
    assert (result["checkpoint"], result["epoch"], result["val/accuracy"]) == ("last.pth", 2, None)


def test_points_stay_in_order_where_the_clock_was_set_back(tmp_path, monkeypatch):
    train.train(tiny(tmp_path))
    monkeypatch.setattr(train.time, "time", lambda: 1e9)
    train.train(tiny(tmp_path, epochs=3), resume=True)
    first, last = sorted((tmp_path / "run").glob("events.*"))
    assert last.name.endswith(".000000012") and first.name.endswith(".000000000")


@pytest.mark.parametrize("diverged", [(1,), (2,), (1, 2)])
def test_an_epoch_whose_outputs_are_not_finite_has_no_accuracy(diverged, tmp_path, monkeypatch,
                                                               capsys):
    epochs, predict, one = itertools.count(1), train.predict, (0, 1)

    def predicted(network, images, *more):
        logits = predict(network, images, *more)
        if len(images) == 8 and next(epochs) in diverged:  # the validation images
            logits[one] = math.inf
        return logits

    monkeypatch.setattr(train, "predict", predicted)
    result = train.train(tiny(tmp_path, val=8, on_nan="skip"))
    rows = train.read_rows(tmp_path / "run")
    assert [math.isnan(row["val/accuracy"]) for row in rows] == [n in diverged for n in (1, 2)]
    assert (tmp_path / "run" / "best.pth").exists() == (len(diverged) < 2)
    assert result["epoch"] == (1 if 1 not in diverged else 2)
    assert (result["val/accuracy"] is None) == (len(diverged) == 2)
    assert ("no epoch is known to be the best" in capsys.readouterr().out) == (len(diverged) == 2)


def test_images_that_changed_since_the_run_began_are_refused(tmp_path):
    pets = image_folder(tmp_path / "pets", ("cat", "dog"))
    values = {"data": pets, "val": 0, "limit": None, "batch_size": 4, "image_size": 32,
              "root": str(tmp_path / "cache")}
    train.train(tiny(tmp_path / "runs", **values))
    Path(pets, "train", "cat", "0.png").unlink()
    more = tiny(tmp_path / "runs", **values, epochs=3)
    with pytest.raises(ValueError, match=r"files were added, removed or changed.*`changed_data`"):
        train.train(more, resume=True)
    _, about = train.open_network(more.folder)
    with pytest.raises(ValueError, match=r"files were added, .*since the network was trained"):
        train.open_dataset(about, root=values["root"])  # split as it was then: it cannot be
    with pytest.raises(ValueError, match=r"--data=\S+ measures it on them as they are now"):
        train.open_test(about, root=values["root"])
    assert len(train.open_test(about, pets, values["root"]).labels) == 8
    assert len(train.open_dataset(about, pets, Path(values["root"])).train.labels) == 7
    train.train(more, resume=True, changed_data=True)
    train.train(tiny(tmp_path / "runs", **values, epochs=4), resume=True)  # known from now on
    old = network.read(tmp_path / "runs" / "run" / "last.pth")
    del old["fingerprint"], old["commit"]  # as checkpoints of earlier versions
    network.save(tmp_path / "runs" / "run" / "last.pth", old)
    Path(pets, "train", "cat", "1.png").unlink()
    train.train(tiny(tmp_path / "runs", **values, epochs=5), resume=True)


def test_after_images_have_changed_the_best_epoch_is_one_on_the_new(tmp_path):
    pets = image_folder(tmp_path / "pets", ("cat", "dog"))
    values = {"data": pets, "val": 2, "limit": None, "batch_size": 4, "image_size": 32,
              "root": str(tmp_path / "cache")}
    train.train(config := tiny(tmp_path / "runs", **values))
    best = network.read(config.folder / "last.pth")
    best["training"]["best_accuracy"] = 1.0  # which no epoch can beat
    network.save(config.folder / "last.pth", best)
    Path(pets, "train", "cat", "0.png").unlink()
    result = train.train(tiny(tmp_path / "runs", **values, epochs=3), resume=True,
                         changed_data=True)
    assert result["epoch"] == 3
    train.evaluate(str(config.folder), root=values["root"])  # of the images as they are
    Path(pets, "train", "dog", "0.png").unlink()
    more = tiny(tmp_path / "runs", **values, epochs=3)
    assert train.train(more, resume=True, changed_data=True)["val/accuracy"] is None
    assert train.finished(more.folder, more)["epochs"] == 3
    train.train(more, resume=True)  # known from now on


def test_a_best_epoch_on_images_that_changed_is_not_shown_for_the_last(tmp_path):
    """None is held out of 8 images: the old best one would be exported beside another's figures."""
    pets = image_folder(tmp_path / "pets", ("cat", "dog"), images=6)
    values = {"data": pets, "val": None, "limit": None, "batch_size": 4, "image_size": 32,
              "root": str(tmp_path / "cache")}
    train.train(config := tiny(tmp_path / "runs", **values))
    assert (config.folder / "best.pth").exists()
    for number, name in itertools.product(range(2), ("cat", "dog")):
        Path(pets, "train", name, f"{number}.png").unlink()
    done = train.train(tiny(tmp_path / "runs", **values), resume=True, changed_data=True)
    assert done["checkpoint"] == "best.pth"  # no epoch of the images as they are
    more = tiny(tmp_path / "runs", **values, epochs=config.epochs + 1)
    result = train.train(more, resume=True)
    assert result["epoch"] == more.epochs and result["checkpoint"] == "last.pth"
    assert network.read(train.export(str(config.folder), str(tmp_path / "out.pth")))[
        "epoch"] == more.epochs
    _, about = train.open_network(config.folder)
    assert about.epoch == more.epochs


@pytest.mark.parametrize("val", [0, 4])
def test_a_network_wants_its_images_as_it_did_before_they_changed(val, tmp_path):
    from PIL import Image

    pets = image_folder(tmp_path / "pets", ("cat", "dog"), images=10)
    values = {"data": pets, "val": val, "limit": None, "batch_size": 4, "image_size": 32,
              "root": str(tmp_path / "cache")}
    before = train.train(config := tiny(tmp_path / "runs", **values))
    wishes = train.open_network(config.folder / "last.pth")[1].preprocessing
    for number, name in itertools.product(range(20), ("cat", "dog")):
        Image.new("L", (32, 32), 255).save(Path(pets, "train", name, f"white{number}.png"))
    # No epoch follows: the same network has the same figures on the same test images.
    after = train.train(config, resume=True, changed_data=True)
    assert [after[name] for name in ("test/loss", "checkpoint")] == [
        before[name] for name in ("test/loss", "checkpoint")]
    more = tiny(tmp_path / "runs", **values, epochs=4)
    train.train(more, resume=True)  # the images are known
    assert train.open_network(config.folder / "last.pth")[1].preprocessing == wishes
    assert train.evaluate(str(config.folder), root=values["root"])
    for name in ("cat", "dog"):  # of the same size, with the same name
        path = Path(pets, "train", name, "0.png")
        size = path.stat().st_size
        Image.new("L", (32, 32), 254).save(path)
        path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(ValueError, match=r"files were added, removed or changed.*`changed_data`"):
        train.train(tiny(tmp_path / "runs", **values, epochs=5), resume=True)


def test_a_file_called_as_the_best_checkpoint_is_no_epoch_of_a_run_without_validation(tmp_path):
    train.train(config := tiny(tmp_path, val=0))
    other = tiny(tmp_path, val=0, name="other", lr=0.1)
    shutil.copy(train.train(other) and other.folder / "last.pth", config.folder / "best.pth")
    result = train.train(tiny(tmp_path, val=0, epochs=3), resume=True)
    assert result["checkpoint"] == "last.pth" and result["epoch"] == 3
    assert (config.folder / "best.pth").read_bytes() == (other.folder / "last.pth").read_bytes()


def test_a_file_of_a_run_knows_where_its_images_were_moved(tmp_path):
    pets = image_folder(tmp_path / "pets", ("cat", "dog"))
    values = {"val": 0, "limit": None, "batch_size": 4, "image_size": 32,
              "root": str(tmp_path / "cache")}
    train.train(config := tiny(tmp_path / "runs", **values, data=pets))
    Path(pets).rename(tmp_path / "moved")
    train.train(tiny(tmp_path / "runs", **values, data=str(tmp_path / "moved")), resume=True)
    for name in ("", "last.pth", "snapshot-00001.pth"):
        assert train.evaluate(str(config.folder / name), root=values["root"])
    shutil.copy(config.folder / "last.pth", config.folder / "mine.pth")  # maybe another run's
    with pytest.raises(FileNotFoundError, match="no such data set or folder"):
        train.evaluate(str(config.folder / "mine.pth"), root=values["root"])
    train.export(str(config.folder), str(tmp_path / "out.pth"))
    (tmp_path / "moved").rename(tmp_path / "again")
    train.train(tiny(tmp_path / "runs", **values, data=str(tmp_path / "again"), epochs=3),
                resume=True)
    train.export(str(config.folder), str(tmp_path / "out.pth"))  # its own, of fewer epochs
    assert network.read(tmp_path / "out.pth")["epoch"] == 3


def test_a_run_goes_on_from_its_last_checkpoint_alone(tmp_path):
    train.train(config := tiny(tmp_path, epochs=1))
    for name in ("best.pth", "metrics.csv"):
        with pytest.raises(FileNotFoundError, match=rf"resume=.*{name}: .*last\.pth"):
            train.train_command(resume=str(config.folder / name), epochs="2")
    train.train_command(resume=str(config.folder / "last.pth"), epochs="2")
    assert network.read(config.folder / "last.pth")["epoch"] == 2


def test_a_built_in_set_is_not_taken_for_a_folder_with_the_same_classes(tmp_path, few_shapes):
    shapes = image_folder(tmp_path / "mine", data.SHAPES, images=2)
    train.train(config := tiny(tmp_path, data=shapes, val=0, limit=None, image_size=32,
                               root=str(tmp_path / "cache")))
    _, about = train.open_network(config.folder, moved="shapes")
    for opened in (train.open_dataset, train.open_test):
        with pytest.raises(ValueError, match="data=shapes: files were added, removed or changed"):
            opened(about, root=str(tmp_path / "cache"))


def test_changed_images_are_of_a_run_that_goes_on(tmp_path):
    with pytest.raises(ValueError, match="`changed_data`: is of a run that goes on"):
        train.train(tiny(tmp_path), changed_data=True)
    assert not (tmp_path / "run").exists()


def test_steps_are_numbered_on_where_an_epoch_has_fewer_of_them(tmp_path):
    """5 steps an epoch, then 2: of the epochs that are done no checkpoint and no point goes."""
    pets = image_folder(tmp_path / "pets", ("cat", "dog"), images=10)
    values = {"data": pets, "val": 0, "limit": None, "batch_size": 4, "image_size": 32, "keep": 0,
              "save_minutes": 60.0, "schedule": "linear", "warmup_epochs": 0,
              "root": str(tmp_path / "cache")}
    train.train(config := tiny(tmp_path / "runs", **values, epochs=3))
    second = (config.folder / "step-000000010.pth").read_bytes()
    for number, name in itertools.product(range(6), ("cat", "dog")):
        Path(pets, "train", name, f"{number}.png").unlink()
    more = {"resume": True, "changed_data": True}
    train.train(tiny(tmp_path / "runs", **values, epochs=6), **more)
    rows, steps = train.read_rows(config.folder), [5, 10, 15, 17, 19, 21]
    assert [row["step"] for row in rows] == steps
    assert [step for tag, step in event_steps(config.folder) if tag == "loss/train"] == steps
    assert [network.read(path)["epoch"] for path in train.checkpoints_before(config.folder)] == [
        5, 4, 3, 2, 1]
    assert (config.folder / "step-000000010.pth").read_bytes() == second
    # The schedule goes by epochs of the images there are: the last of its 12 steps is at 1 − 11/12.
    assert rows[-1]["lr"] == pytest.approx(config.lr / 12, rel=1e-4)
    train.train(tiny(tmp_path / "runs", **values, epochs=7), **more)
    assert network.read(config.folder / "last.pth")["step"] == 23


def test_a_limited_run_s_images_are_the_same_where_they_were_moved(tmp_path):
    pets, cache = image_folder(tmp_path / "pets", ("cat", "dog")), str(tmp_path / "cache")
    train.train(config := tiny(tmp_path / "runs", data=pets, val=2, limit=4, batch_size=4,
                               image_size=32, root=cache))
    _, about = train.open_network(config.folder)
    before = train.open_dataset(about, root=cache)
    copy = shutil.copytree(pets, tmp_path / "copy")
    for data_set in (pets, str(copy)):  # one that is named is taken whole, whatever its path
        assert len(train.open_test(about, data_set, cache).labels) == 8
        assert len(train.open_dataset(about, data_set, cache).train.labels) == 8
        _, line = train.evaluate(str(config.folder), data_set, cache)
        assert line.endswith("; 8 images")
    assert train.evaluate(str(config.folder), root=cache)[1].endswith("; 4 images")
    moved = Path(pets).rename(tmp_path / "moved")
    _, about = train.open_network(config.folder, moved=moved)
    after = train.open_dataset(about, root=cache)
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(before, part).images[:], getattr(after, part).images[:])


def test_an_earlier_split_of_unequal_classes_is_not_gone_on_with(tmp_path):
    pets = image_folder(tmp_path / "pets", ("cat", "dog"), images=12)
    for number in range(8):
        Path(pets, "train", "dog", f"{number}.png").unlink()
    config = tiny(tmp_path / "runs", data=pets, val=8, limit=None, batch_size=4, image_size=32,
                  root=str(tmp_path / "cache"))
    train.train(config)
    more = dataclasses.replace(config, epochs=3)
    train.train(more, resume=True)
    old = network.read(config.folder / "last.pth")
    assert old.pop("held_out") == [6, 2]  # and it was 4 of each
    network.save(config.folder / "last.pth", old)
    with pytest.raises(ValueError, match="an earlier version began this run and held out others"):
        train.train(more, resume=True)


def test_going_on_with_other_code_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "commit_of_code", lambda: "abc123")
    train.train(tiny(tmp_path))
    train.train(tiny(tmp_path, epochs=3), resume=True)
    assert "abc123" not in capsys.readouterr().out
    monkeypatch.setattr(train, "commit_of_code", lambda: "def456")
    train.train(tiny(tmp_path, epochs=4), resume=True)
    assert "saved by the code of commit abc123; this is def456" in capsys.readouterr().out


def test_one_batch_is_overfitted(tmp_path):
    config = tiny(tmp_path, limit=16, epochs=80, dropout=0.0, augment=(), val=0, optimizer="adam",
                  lr=3e-3, weight_decay=0.0)
    assert train.train(config)["train/accuracy"] == 1.0


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_and_resumes(optimizer, tmp_path):
    config = tiny(tmp_path, optimizer=optimizer, epochs=1, lr=1e-3, val=0)
    train.train(config)
    rows = train.read_metrics(config.folder)
    assert math.isfinite(rows["train/loss"][0]) and math.isnan(rows["val/loss"][0])
    train.train(tiny(tmp_path, optimizer=optimizer, epochs=2, lr=1e-3, val=0), resume=True)
    assert len(train.read_metrics(config.folder)["epoch"]) == 2


def test_a_compiled_network_trains_to_the_end(tmp_path, monkeypatch):
    compile_it = torch.nn.Module.compile  # without the C++ compiler that the default asks for
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_it(self, backend="eager"))
    plain, compiled = (train.train(tiny(tmp_path, name=name, compile=name == "compiled"))
                       for name in ("plain", "compiled"))
    assert compiled["test/loss"] == pytest.approx(plain["test/loss"], rel=1e-4)


@pytest.mark.parametrize("model", ["lenet", "resnet20", "speednet"])
def test_a_network_is_compiled_as_a_whole(model):
    graphs = []

    def compiler(graph, _inputs):
        graphs.append(graph)
        return graph

    built = network.build(model)
    built.compile(backend=compiler)
    built(torch.zeros(2, 3, 32, 32))
    convolutions = [node for node in graphs[0].graph.nodes
                    if node.op == "call_function" and "conv" in str(node.target)]
    assert len(graphs) == 1 and len(convolutions) == sum(
        isinstance(layer, torch.nn.Conv2d) for layer in built.modules())


def test_earlier_networks_do_not_keep_one_from_being_compiled(tmp_path, monkeypatch):
    graphs, compile_it = [], torch.nn.Module.compile

    def compiler(graph, _inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_it(self, backend=compiler))
    for channels in range(4, 10):  # PyTorch keeps eight of one function, freed networks' too
        before = len(graphs)
        train.train(tiny(tmp_path, f"{channels}", model="simple_cnn", options={
            "channels": (channels,)}, epochs=1, compile=True))
        assert len(graphs) > before


@pytest.mark.parametrize("own", [False, True])
def test_what_must_be_repeatable_is_so_while_it_trains_alone(tmp_path, own, monkeypatch, request):
    always = request.config.getoption("--device") != "cpu"
    seen, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *given: (
        seen.append(torch.are_deterministic_algorithms_enabled()), step(*given)))
    torch.use_deterministic_algorithms(own, warn_only=own)
    before = torch.get_rng_state()
    try:
        for wanted in (True, False):
            seen.clear()
            train.train(tiny(tmp_path, name=f"{wanted}", deterministic=wanted))
            assert {*seen} == {wanted or always}
            assert torch.are_deterministic_algorithms_enabled() is own
            assert torch.is_deterministic_algorithms_warn_only_enabled() is own
            assert torch.equal(torch.get_rng_state(), before)  # nor are the caller's numbers
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [False, True])
def test_only_what_must_be_repeatable_on_a_gpu_pays_for_it(deterministic, monkeypatch, request):
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    always = request.config.getoption("--device") != "cpu"
    with train.repeatable(train.Config(deterministic=deterministic), torch.device("cuda")):
        assert torch.backends.cudnn.benchmark is not (deterministic or always)
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is (deterministic or always)


def test_a_compiler_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    missing = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _: None)

    def fail(*_):
        raise missing("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBO")

    monkeypatch.setattr(train, "train_step", fail)
    with pytest.raises(OSError, match=r"\(InvalidCxx.* found\); leave out `compile`"):
        train.train(tiny(tmp_path, compile=True))


def test_orthogonalize():
    for shape in ((2, 16, 54), (3, 54, 16)):
        values = torch.linalg.svdvals(train.orthogonalize(torch.randn(shape)))
        assert values.min() > 0.6 and values.max() < 1.3
    diagonal = torch.diag(torch.tensor([3.0, -2.0]))[None]  # nearest orthogonal matrix: its signs
    assert torch.allclose(train.orthogonalize(diagonal), diagonal.sign(), atol=0.35)
    assert not train.orthogonalize(torch.zeros(1, 3, 4)).any()
    matrices = torch.randn(2, 5, 20) * torch.tensor([1.0, 100.0])[:, None, None]
    for matrix, found in zip(matrices, train.orthogonalize(matrices)):
        published = matrix / matrix.norm()
        for _ in range(5):
            gram = published @ published.T
            published = 3.4445 * published + (-4.7750 * gram + 2.0315 * gram @ gram) @ published
        assert torch.allclose(found, published, atol=1e-4)


def test_muon_moves_filters_by_a_share_of_their_norm_and_all_else_as_nesterov_sgd():
    filters, bias = (torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 3, 2, 2), (8,)))
    twin = torch.nn.Parameter(bias.detach().clone())
    free = torch.nn.Parameter(filters.detach().clone())  # without weight decay
    idle = torch.nn.Parameter(torch.ones(8, 3, 2, 2))  # without a gradient it stays
    without = train.Muon([free, idle], lr=0.1, momentum=0.9, weight_decay=0.0)
    muon = train.Muon([filters, bias], lr=0.1, momentum=0.9, weight_decay=0.01)
    sgd = torch.optim.SGD([twin], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    for _ in range(3):
        before = filters.detach().clone()
        for parameter in (filters, bias):
            parameter.grad = torch.randn_like(parameter)
        twin.grad, free.grad = bias.grad.clone(), filters.grad.clone()
        for optimizer in (muon, sgd, without):
            optimizer.step()
        assert torch.equal(bias.grad, twin.grad) and torch.equal(filters.grad, free.grad)
        assert filters.norm().item() == pytest.approx(before.norm().item(), rel=1e-5)
        moved = (filters - before).norm() / before.norm()
        assert 0.09 < moved < 0.11
    assert torch.allclose(bias, twin) and torch.equal(filters, free) and idle.min() == 1


def test_speednet_sees_small_images_first_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    sizes, real_step = [], train.train_step

    def spy(state, images, *rest):
        sizes.append(images.shape[2])
        real_step(state, images, *rest)
        if len(sizes) == 7:
            raise RuntimeError("power cut")

    values = {"data": "shapes", "limit": 96, "batch_size": 16, "epochs": 2, "channels": (8, 8, 8),
              "early_size": 16, "early_share": 0.5, "save_minutes": 0.0, "tta": "full",
              "out": str(tmp_path)}
    result = train.train(train.Config.create("speednet", **values, name="whole"))
    assert result["epoch"] == 2 and result["checkpoint"] == "last.pth"  # nothing is held out
    assert 0 <= result["test/accuracy_tta"] <= 1
    cut = train.Config.create("speednet", **values, name="cut")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", spy)
        with pytest.raises(RuntimeError, match="power cut"):
            train.train(cut)
    train.train(cut, resume=True)
    assert sizes == [16] * 6 + [32]
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_last_epochs_see_whole_images(tmp_path, monkeypatch):
    seen, plan = [], data.Batches.plan

    def spy(batches, epoch, crop):
        seen.append((epoch, crop))
        return plan(batches, epoch, crop)

    monkeypatch.setattr(data.Batches, "plan", spy)
    train.train(tiny(tmp_path, epochs=3, uncropped_epochs=2))
    assert seen == [(0, True), (1, False), (2, False)]


def test_early_size_needs_a_network_that_takes_any_size(tmp_path):
    with pytest.raises(ValueError, match="16×16"):
        train.train(tiny(tmp_path, early_size=16))
    assert not (tmp_path / "run" / "last.pth").exists()


def test_run_folder_and_result(tmp_path):
    config = tiny(tmp_path)
    result = train.train(config)
    names = {path.name for path in config.folder.iterdir()}
    assert {"config.json", "metrics.csv", "last.pth", "best.pth", "result.json", "test"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    rows = train.read_metrics(config.folder)
    assert rows["epoch"] == [1, 2] and rows["step"] == [6, 12]
    assert result["val/accuracy"] == pytest.approx(max(rows["val/accuracy"]), abs=1e-4)
    assert len(result["per_class"]) == 10 and result["parameters"] == 62_006
    assert result["test/accuracy"] == pytest.approx(sum(result["per_class"].values()) / 10, abs=0.1)
    logged = event_steps(config.folder)
    assert ("accuracy/val", 12) in logged and len(logged) == len(set(logged))
    assert {("weights/conv1.0.weight", 6), ("gradients/fc.4.weight", 12)} <= set(logged)
    assert ("custom_scalars__config__", 0) in logged
    tested = event_steps(config.folder / "test")
    measured = network.read(config.folder / "best.pth")["step"]  # may be that of the first epoch
    assert {(tag, measured) for tag in ("pr_curve/disc", "accuracy/test", "loss/test")} <= {*tested}
    tags = {tag for tag, _ in tested}
    assert sum(tag.startswith("wrong/") for tag in tags) == 25
    shown = [*train.shown_settings(config)]
    assert shown[:5] == sorted(shown)[:5] == [
        "1 model", "2 optimizer", "3 lr", "4 batch_size", "5 epochs"]
    assert {*shown[5:]} == {"dropout", "data", "limit", "save_minutes", "augment", "keep"}
    assert (config.folder / "test" / "projector_config.pbtxt").read_text().count("sprite") == 4


def test_same_command_twice_gives_identical_files(tmp_path):
    for name in ("a", "b"):
        train.train(tiny(tmp_path, name))
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("step, number", [(3, None), (6, signal.SIGTERM), (9, signal.SIGINT)])
@pytest.mark.parametrize("read_steps", [{"cpu": 1}, {}], ids=["as a CPU", "as a GPU"])
def test_an_interrupted_run_ends_in_the_same_weights(step, number, read_steps, tmp_path,
                                                     monkeypatch):
    monkeypatch.setattr(train, "READ_STEPS", read_steps)
    train.train(tiny(tmp_path, "whole"))
    real_step, seen = train.train_step, []

    def failing_step(*arguments):
        seen.append(1)
        if len(seen) == step + 1:
            if number is None:
                raise RuntimeError("power cut")
            os.kill(os.getpid(), number)
        real_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", failing_step)
        with pytest.raises((RuntimeError, SystemExit), match=f"power cut|{128 + (number or 0)}"):
            train.train(tiny(tmp_path, "cut"))
    train.train(tiny(tmp_path, "cut"), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with train.catch_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, capsys):
    train.train(tiny(tmp_path, "whole", epochs=3))
    train.train(tiny(tmp_path, "cut", epochs=2))
    last = tmp_path / "cut" / "last.pth"
    last.write_bytes(last.read_bytes()[:-100])
    train.train(tiny(tmp_path, "cut", epochs=3), resume=True)
    assert f"{last}: not a checkpoint of this package, or damaged" in capsys.readouterr().out
    assert len(steady_rows(tmp_path / "cut")) == 3


@pytest.mark.parametrize("change, complaint", [
    ({"classes": [["a"]] * 10}, "names of the classes"), ({"commit": torch.ones(3)}, "its commit"),
    ({"classes": [*range(10)]}, "names of the classes"), ({"totals": ()}, "does not fit this run"),
    ({"totals": ("x",) * 4}, "does not fit this run")])
def test_a_checkpoint_of_other_kinds_is_not_gone_on_from(change, complaint, tmp_path, capsys):
    train.train(config := tiny(tmp_path, keep=1))
    path = config.folder / "last.pth"
    checkpoint = network.read(path)
    (checkpoint["training"] if "totals" in change else checkpoint).update(change)
    network.save(path, checkpoint)
    with pytest.raises((OSError, ValueError), match=r"no checkpoint to go on|does not fit") as said:
        train.train(tiny(tmp_path, keep=1, epochs=3), resume=True)
    assert complaint in f"{capsys.readouterr().out} {said.value}"


@pytest.mark.parametrize("commit", ["\x1b[2Jabc", "abc\nerror: all is lost", "a" * 81])
def test_a_commit_that_is_none_is_not_printed(commit, tmp_path, capsys):
    train.train(config := tiny(tmp_path))
    path = config.folder / "last.pth"
    network.save(path, {**network.read(path), "commit": commit})
    train.train(tiny(tmp_path, epochs=3), resume=True)
    out = capsys.readouterr().out
    assert "the code of commit that cannot be shown; this is" in out and commit not in out


def test_epochs_may_grow_and_nothing_else_may_change(tmp_path):
    train.train(tiny(tmp_path))
    for changes, complaint in (({"lr": 0.5}, "lr=0.5"), ({"dropout": 0.3}, "dropout=0.3"),
                               ({"epochs": 1}, "may grow")):
        with pytest.raises(ValueError, match=complaint):
            train.train(tiny(tmp_path, **changes), resume=True)
    with pytest.raises(FileExistsError, match=r"`resume`.*`name=NAME`.*`overwrite`"):
        train.train(tiny(tmp_path))


def test_a_result_tells_where_the_run_was_trained_not_where_it_was_measured(tmp_path, monkeypatch):
    result = train.train(config := tiny(tmp_path))
    elsewhere = {"versions": {"python": "3", "torch": "9"}, "device": "a GPU", "commit": "abc"}
    monkeypatch.setattr(train, "environment", lambda device: elsewhere)
    again = train.train(dataclasses.replace(config, tta="flip"), resume=True)  # takes no step
    told = ("commit", *train.TRAINED_BY)
    assert [again[name] for name in told] == [result[name] for name in told]
    longer = train.train(tiny(tmp_path, epochs=3), resume=True)
    assert {name: longer[name] for name in elsewhere} == elsewhere
    train.train(config := tiny(tmp_path, "other"))
    checkpoint = network.read(path := config.folder / "last.pth")
    network.save(path, {**checkpoint, "versions": {"torch": torch.zeros(2)}})
    assert train.newest_checkpoint(config.folder, print)["step"] < checkpoint["step"]


def test_the_home_of_nobody_is_a_place_as_any_other(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert "~nobodyhere/run" in refused(train.COMMANDS, ["evaluate", "~nobodyhere/run"])
    root = "~nobodyhere/data"
    train.train(tiny(tmp_path, root=root))
    assert train.train(tiny(tmp_path, root=root, epochs=3), resume=True)["epochs"] == 3
    assert train.root_of(tiny(tmp_path, root=root, data="pets")) == "data"


def test_a_link_that_leads_to_itself_is_told_in_one_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for place in ({"out": str(tmp_path / "loop")}, {"root": str(tmp_path / "loop")}):
        with contextlib.suppress(OSError):  # "shapes" needs no root
            train.train(tiny(tmp_path, **place))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that have a name")
def test_a_pipe_where_tensorboard_writes_is_refused_before_any_work(tmp_path):
    train.train(config := tiny(tmp_path))
    place = next((config.folder / "test").rglob("tensors.tsv"))
    place.unlink()
    os.mkfifo(place)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match=r"tensors\.tsv: is neither a file nor a folder"):
            train.train(config, **how)
    assert (config.folder / "result.json").exists()


def test_more_epochs_that_were_not_begun_can_be_taken_back(tmp_path, monkeypatch):
    train.train(config := tiny(tmp_path))
    before = (config.folder / "last.pth").read_bytes()
    monkeypatch.setattr(train, "train_epoch", lambda *_: 1 / 0)  # as killed in the first step
    with pytest.raises(ZeroDivisionError):
        train.train(tiny(tmp_path, epochs=100), resume=True)
    assert train.read_config(config.folder / "config.json").epochs == 100
    assert train.train(config, resume=True)["epochs"] == 2
    assert (config.folder / "last.pth").read_bytes() == before and train.finished(config.folder)


def test_checkpoints_that_a_larger_keep_kept_stay(tmp_path):
    for epochs, keep in ((4, 0), (6, 2), (8, 2)):
        config = tiny(tmp_path, epochs=epochs, keep=keep, save_minutes=60)
        train.train(config, resume=True)
    assert [int(path.stem[5:]) // 6 for path in sorted(config.folder.glob("step-*.pth"))] == [
        1, 2, 3, 7]


def test_the_run_before_survives_a_failed_overwrite(tmp_path):
    train.train(tiny(tmp_path))
    with pytest.raises(OSError, match="no such data set"):
        train.train(tiny(tmp_path, data="nowhere"), overwrite=True)
    assert (tmp_path / "run" / "result.json").exists()


def image_folder(folder, classes, images=4, size=32, kind="png"):
    """`images` files in each of `folder`/{train,test}/`classes`, of one grey a class."""
    from PIL import Image
    for part, (number, name) in itertools.product(("train", "test"), enumerate(classes)):
        (folder / part / name).mkdir(parents=True)
        for index in range(images):
            Image.new("L", (size, size), 40 * number + index).save(
                folder / part / name / f"{index}.{kind}")
    return str(folder)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("changes, complaint", [
    ({"name": "pets"}, "must lie apart"), ({"name": "pets/runs/a"}, "must lie apart"),
    ({"name": "photos"}, "not the folder of a run"), ({"name": "photos", "data": "shapes"},
                                                      "not the folder of a run"),
    ({"name": "file"}, "not the folder of a run"), ({"name": "a", "root": "{}/a/data"}, "root="),
])
def test_a_folder_that_no_run_made_is_left_alone(changes, complaint, overwrite, tmp_path):
    pets = image_folder(tmp_path / "pets", ("cat", "dog"))
    (tmp_path / "photos" / "test").mkdir(parents=True)
    for name in ("test/cat.png", "best.pth", "config.json", "metrics.csv", "events.txt"):
        (tmp_path / "photos" / name).write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    values = {name: text.format(tmp_path) for name, text in changes.items()}
    with pytest.raises((ValueError, OSError), match=complaint):
        train.train(tiny(tmp_path, **{"data": pets, **values}), overwrite=overwrite)
    assert contents(tmp_path) == before and not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", [".lock", "test", "test/00000", "test/00000/pixels",
                                  "events.out.tfevents.9999999999.000000012"])
def test_links_in_the_folder_of_a_run_are_not_written_through(name, tmp_path):
    train.train(tiny(tmp_path, "real"))
    (tmp_path / "run").symlink_to("real")  # the folder itself may be one
    train.train(tiny(tmp_path, epochs=3), resume=True)
    link, mine = tmp_path / "run" / name, tmp_path / "mine"
    for path in [link, *link.rglob("*")][::-1] if link.exists() else ():
        path.rmdir() if path.is_dir() else path.unlink()
    link.symlink_to(mine)
    for there in (False, True):  # a link that leads nowhere, too
        if there:
            mine.touch() if link.suffix else mine.mkdir()
        before = contents(tmp_path)
        for how in ("resume", "overwrite"):
            with pytest.raises(FileExistsError, match=f"{re.escape(str(link))}: is a link"):
                train.train(tiny(tmp_path, epochs=4), **{how: True})
        assert contents(tmp_path) == before and mine.exists() == there


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", ".", ""])
def test_a_name_does_not_lead_out_of_the_folder_of_all_runs(name):
    with pytest.raises(ValueError, match="name="):
        train.Config.create(name=name)


def test_overwrite_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    config = tiny(tmp_path)
    train.train(config)
    left = set(contents(config.folder)) - set(train.written_by_a_run(config.folder))
    assert not left  # a file that the run wrote and does not know as its own
    mine = [config.folder / name for name in ("notes.txt", "my.pth", "step-1.pth", "events.txt",
                                              "test/disc/1.png", "test/00000/mine.txt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    train.train(tiny(tmp_path, epochs=1), overwrite=True)
    assert all(path.read_text() == "mine" for path in mine)
    assert len(steady_rows(config.folder)) == 1


def test_empty_folders_of_others_stay_also_behind_a_link(tmp_path):
    for config in (tiny(tmp_path, epochs=1), tiny(tmp_path, "linked", epochs=1)):
        train.train(config)
        mine = config.folder / "test" / "mine"
        if config.name == "linked":
            shutil.rmtree(config.folder / "test")
            (tmp_path / "elsewhere").mkdir()
            (config.folder / "test").symlink_to(tmp_path / "elsewhere")
        mine.mkdir()
        train.remove_written(config.folder, lambda name: name.startswith("test/"))
        assert [*(config.folder / "test").iterdir()] == [mine]
        refused = pytest.raises(FileExistsError, match="test: is a link")
        with refused if config.name == "linked" else contextlib.nullcontext():
            train.train(config, overwrite=True)
        assert mine.is_dir()


@pytest.mark.parametrize("gone", [("last.pth", "step-*"), ("last.pth", "step-*", "result.json")])
def test_weights_from_which_no_run_goes_on_are_not_removed(gone, tmp_path):
    config = tiny(tmp_path)
    train.train(config)
    for path in [path for name in gone for path in config.folder.glob(name)]:
        path.unlink()
    before = contents(config.folder)
    with pytest.raises(OSError, match=r"no checkpoint to go on from.*`overwrite`"):
        train.train(config, resume=True)
    assert contents(config.folder) == before
    train.train(config, overwrite=True)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    config = tiny(tmp_path, epochs=1)
    train.train(config)
    for name in ("last.pth", "result.json"):  # between best.pth and last.pth
        (config.folder / name).unlink()
    assert train.train(config, resume=True)["epochs"] == 1
    train.train(config := tiny(tmp_path, "slow"))  # written while the second epoch went on
    for path in (*config.folder.glob("*.pth"), config.folder / "result.json"):
        path.unlink()
    assert train.train(config, resume=True)["epochs"] == 2


@pytest.mark.parametrize("place, name", [(Path, "read_bytes"), (network, "check_regular")])
def test_an_error_that_may_pass_is_no_damaged_checkpoint(place, name, tmp_path, monkeypatch):
    train.train(config := tiny(tmp_path))
    before, usual = contents(config.folder), getattr(place, name)

    def fails(path, *limit):
        if path.name == "last.pth":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return usual(path, *limit)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fails)
        with pytest.raises(OSError, match=r"last\.pth") as caught:
            train.train(config, resume=True)
    assert caught.value.errno == errno.EIO and contents(config.folder) == before


def test_what_a_run_measured_is_kept_where_its_weights_are_gone(tmp_path):
    train.train(config := tiny(tmp_path, epochs=3))
    for path in (*config.folder.glob("*.pth"), config.folder / "result.json"):
        path.unlink()
    before = contents(config.folder)
    with pytest.raises(OSError, match=r"no checkpoint to go on from.*`overwrite`"):
        train.train(config, resume=True)
    assert contents(config.folder) == before


def test_a_few_settings_make_no_run(tmp_path):
    """Another program's folder may have a config.json and weights of the same names."""
    config = tiny(tmp_path)
    config.folder.mkdir()
    (config.folder / "config.json").write_text('{"lr": 0.1, "epochs": 10}')
    for name in ("last.pth", "best.pth", "metrics.csv"):
        (config.folder / name).write_text(name)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is not the folder of a run"):
            train.train(config, overwrite=overwrite)
    assert (config.folder / "best.pth").read_text() == "best.pth"


def test_what_is_of_epochs_behind_the_checkpoint_goes(tmp_path, monkeypatch):
    """A run that goes on from the checkpoint before, for more epochs, has other ones."""
    config = tiny(tmp_path, epochs=4, keep=0)
    train.train(config)
    best = network.read(config.folder / "best.pth") | {"epoch": 4, "step": 24}
    network.save(config.folder / "best.pth", best)
    (config.folder / "last.pth").write_bytes(b"")  # damaged
    (config.folder / "step-000000018.pth").write_bytes(b"")
    state = train.newest_checkpoint(config.folder, print)
    kept = {path.name for path in config.folder.glob("snapshot-*.pth")
            if network.read(path)["epoch"] <= state["epoch"]}
    seen = []
    real = train.RunFolder.row

    def row(self, *given):
        seen.append({path.name for path in self.path.glob("*.pth")})
        return real(self, *given)

    monkeypatch.setattr(train.RunFolder, "row", row)
    train.train(tiny(tmp_path, epochs=8, keep=0), resume=True)
    assert "best.pth" not in seen[0] and {
        name for name in seen[0] if name.startswith("snapshot")} == kept


def test_settings_from_python_know_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = train.Config(data="shapes", out="~/runs", root="~/data", snapshots=[1])
    assert (config.out, config.root, config.snapshots) == (
        f"{tmp_path}/runs", f"{tmp_path}/data", (1,))


def test_points_of_an_earlier_version_s_board_go(tmp_path):
    train.train(tiny(tmp_path))
    board, = (tmp_path / "run" / "test").glob("events*")
    board.rename(earlier := board.with_name(board.name.removesuffix(train.BOARD_SUFFIX)))
    train.train(tiny(tmp_path, epochs=3), resume=True)
    assert not earlier.exists() and len([*(tmp_path / "run" / "test").glob("events*")]) == 1


def test_a_result_of_other_settings_is_no_result(tmp_path):
    train.train(config := tiny(tmp_path))
    path = config.folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": {}}))
    with pytest.raises(ValueError, match=r"result\.json: is of another .* than config\.json"):
        train.finished(config.folder)


def test_somebody_s_points_in_the_folder_of_the_board_stay(tmp_path):
    train.train(tiny(tmp_path))
    before = {path.name for path in (tmp_path / "run" / "test").glob("events*")}
    others = tmp_path / "run" / "test" / "events.out.tfevents.1795648157.host.17.0"
    others.write_bytes(data.event_bytes(file_version="brain.Event:2"))
    train.train(tiny(tmp_path, epochs=3), resume=True)
    after = {path.name for path in (tmp_path / "run" / "test").glob("events*")}
    assert others.exists() and len(after) == len(before) + 1 and not before & after


def test_a_run_killed_while_it_is_measured_again_has_no_result(tmp_path, monkeypatch):
    train.train(config := tiny(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_board", lambda *_: sys.exit(1))
        with pytest.raises(SystemExit):
            train.train(config, resume=True)
    assert train.finished(config.folder) is None
    train.train(config, resume=True)
    assert train.finished(config.folder)


def test_what_may_not_be_read_is_not_removed(tmp_path, monkeypatch):
    path = tmp_path / "events.out.tfevents.1795648157.000000000"
    path.write_bytes(data.event_bytes(file_version="brain.Event:2"))
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(PermissionError()))
    with pytest.raises(PermissionError):
        data.trim_events([path], 0)
    assert path.exists()


def test_only_a_torn_last_record_is_cut_from_a_file_of_points(tmp_path, capsys):
    from tensorboard.compat.proto.summary_pb2 import Summary

    value = Summary(value=[Summary.Value(tag="a", simple_value=1.0)])
    path, aside = (tmp_path / f"{name}.1795648157.000000000"
                   for name in ("events.out.tfevents", "damaged-events"))
    first, *points = records = [data.event_bytes(file_version="brain.Event:2"), *(
        data.event_bytes(step=step, summary=value) for step in range(4))]
    whole, start = b"".join(records), len(first)

    def steps_kept(content):
        path.write_bytes(content)
        data.trim_events([path], 2)
        content = path.read_bytes() if path.exists() else b""
        return [step for step, point in enumerate(points) if point in content]
    for size in (1, 11, 12, len(points[3]) - 1):  # a kill leaves the first bytes of a record
        assert steps_kept(whole[:-len(points[3])] + points[3][:size]) == [0, 1, 2]
    assert steps_kept(whole) == [0, 1, 2] and not capsys.readouterr().err and not aside.exists()
    assert steps_kept(first + points[3]) == [] and not path.exists()
    # A byte of the event: that point is lost. One of its length: all behind it.
    for place, kept in ((start + 20, [1, 2]), (start + len(points[0]), [0]), (start, []), (0, [])):
        damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:]
        assert steps_kept(damaged) == kept and path.exists() == bool(kept)
        said, = re.fullmatch(rf"{path}: damaged; .* ({aside.parent}.*)\n",
                             capsys.readouterr().err).groups()
        assert Path(said).read_bytes() == damaged
    assert aside.exists() and len([*tmp_path.glob("damaged-events*")]) == 4  # none replaced another


def test_what_others_log_in_the_folder_of_a_run_stays(tmp_path):
    train.train(tiny(tmp_path))
    mine = tmp_path / "run" / "events.out.tfevents.1795648157.host.1544.0"
    mine.write_bytes(data.event_bytes(file_version="brain.Event:2"))
    before = mine.read_bytes()
    train.train(tiny(tmp_path, epochs=3), resume=True)
    assert mine.read_bytes() == before


def test_a_run_folder_made_before_there_was_a_marker_is_a_run(tmp_path):
    train.train(tiny(tmp_path))
    (tmp_path / "run" / ".run").unlink()
    train.train(tiny(tmp_path, epochs=1), overwrite=True)
    assert (tmp_path / "run" / ".run").exists()


def operations_of(config, monkeypatch, fatal=None):
    """Overwrite the run, or stop right before its file operation number `fatal`; how many."""
    count = itertools.count(1)

    def counted(operation):
        def run(*arguments, **keywords):
            if next(count) == fatal:
                raise KeyboardInterrupt
            return operation(*arguments, **keywords)
        return run

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        patch.setattr(train, "train_epoch", lambda *_: sys.exit(0))
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            train.train(config, overwrite=True)
    return next(count) - 1


def test_a_killed_overwrite_leaves_the_old_run_or_the_new(tmp_path, monkeypatch):
    old, new = tiny(tmp_path, epochs=1), tiny(tmp_path, epochs=1, lr=0.5)
    train.train(new)
    expected = network.read(new.folder / "last.pth")["weights"]
    train.train(old, overwrite=True)
    shutil.copytree(old.folder, tmp_path / "old")
    operations, seen = operations_of(new, monkeypatch), set()
    for fatal in range(1, operations):
        shutil.rmtree(old.folder)
        shutil.copytree(tmp_path / "old", old.folder)
        operations_of(new, monkeypatch, fatal)
        config = train.read_config(new.folder / "config.json")
        seen.add(config.lr)
        assert config == old or not (new.folder / "result.json").exists()  # which is the old one's
        train.train(config, resume=True)
        checkpoint = network.read(new.folder / "last.pth")
        assert checkpoint["settings"]["lr"] == config.lr
        same = all(torch.equal(expected[name], checkpoint["weights"][name]) for name in expected)
        assert same == (config == new)
    assert seen == {old.lr, new.lr} and operations > 8


def test_a_checkpoint_knows_its_settings_without_config_json(tmp_path):
    train.train(tiny(tmp_path))
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"lr=0\.5"):
        train.train(tiny(tmp_path, lr=0.5), resume=True)
    train.train(tiny(tmp_path, epochs=3), resume=True)


def test_a_refused_command_leaves_nothing(tmp_path):
    absent = "mps" if torch.cuda.is_available() else "cuda"
    for flags in ({"data": "nowhere"}, {"data": str(tmp_path)}, {"device": absent}):
        with pytest.raises((ValueError, OSError)):
            train.train(tiny(tmp_path / "runs" / "deep", root=str(tmp_path / "data"), **flags))
    assert not list(tmp_path.iterdir())


def test_classes_are_told_by_their_names(tmp_path):
    ab, cab, b, bc = (image_folder(tmp_path / "-".join(names), names)
                      for names in ("ab", "cab", "b", "bc"))
    config = tiny(tmp_path / "runs", data=ab, val=0, limit=None, epochs=30, lr=0.02,
                  root=str(tmp_path / "cache"), image_size=32)
    train.train(config)
    _, about = train.open_network(config.folder)
    table, _ = train.evaluate(str(config.folder), data=b)
    assert [row[0] for row in table.rows] == ["a", "b"] and table.rows[0][1] == "–"
    assert train.open_test(about, b).labels.tolist() == [1] * 4
    assert train.open_dataset(about, b).classes == ("a", "b")
    for other, complaint in ((bc, "unknown to the network: c; known to it and missing here: a"),
                             (cab, "unknown to the network: c"), ("shapes", "disc")):
        for opened in (train.open_test, train.open_dataset):
            with pytest.raises(ValueError, match=complaint):
                opened(about, other)
    told = train.difference(["caf\u00e9", "tea"], ["cafe\u0301", "tea"])
    assert told.isascii() and "'tea'" not in told
    Path(ab, "train", "a").rename(Path(ab, "train", "z"))  # comes after b now
    Path(ab, "test", "a").rename(Path(ab, "test", "z"))
    with pytest.raises(ValueError, match=r"unknown to the network: z; .*missing here: a"):
        train.train(dataclasses.replace(config, epochs=31), resume=True)


def test_a_saved_root_is_no_new_place_to_write_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tiny(tmp_path, data=image_folder(tmp_path / "ab", "ab"), root=str(tmp_path / "cache"),
                  image_size=32, limit=None, val=0, batch_size=4, epochs=1)
    train.train(config)
    again = {"resume": str(config.folder)}
    train.train_command(**again, epochs="2")  # there, it is read
    assert not Path("data").exists() and not capsys.readouterr().err
    (tmp_path / "cache").rename(tmp_path / "gone")
    train.train_command(**again, epochs="3", root="mine")
    assert [*Path("mine").glob("*.cache")] and not Path("data").exists()
    Path("mine").rename("theirs")
    capsys.readouterr()
    train.train_command(**again, epochs="4")
    assert [*Path("data").glob("*.cache")] and not Path("mine").exists()
    assert capsys.readouterr().err.startswith("root=mine: holds no data set or cache of ours")
    saved = {"data": "cifar10", "root": "nowhere"}
    assert train.root_of(dataclasses.replace(config, **saved)) == "data"
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("names, numbers", [
    (("10", "3"), [10, 3]), (("10", "03"), [10, 3]), (("a", "b"), [0, 1])])
def test_classes_called_by_numbers_are_these_of_a_network_from_elsewhere(names, numbers, capsys):
    elsewhere = network.Description("module:function", (), None)
    split = data.Split(torch.zeros(2, 3, 4, 4), torch.arange(2))
    assert train.as_named(split, names, elsewhere, "folder").labels.tolist() == numbers
    assert train.as_named(None, names, elsewhere, "folder") is None
    assert capsys.readouterr().err == ("" if names[0] == "10" else (
        "folder: the classes a, b are taken for those that the network has at numbers 0 to 1\n"))
    with pytest.raises(ValueError, match="data=pets: its classes 01, 1 must be of different num"):
        train.as_named(split, ("01", "1", "2"), elsewhere, "pets")


@pytest.mark.parametrize("source", ["folder", "cifar10"])
def test_a_stranger_s_checkpoint_writes_and_downloads_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_args, **_more: pytest.fail("download"))
    images = image_folder(tmp_path / "images", "ab") if source == "folder" else source
    config = tiny(tmp_path, data=images, root=str(tmp_path / "elsewhere"), limit=None)
    description = {"model": "lenet", "options": {}, "classes": ["a", "b"], "image_size": 32,
                   "mean": [0.5] * 3, "std": [0.25] * 3, "settings": dataclasses.asdict(config)}
    network.save(tmp_path / "a.pth", {**description, "epoch": 0, "step": 0,
                                      "weights": network.build("lenet", 2).state_dict()})
    for command in (train.evaluate, visualize.predictions, visualize.confusion):
        with (contextlib.nullcontext() if source == "folder" else
              pytest.raises(FileNotFoundError, match="`root=FOLDER`")):
            command(str(tmp_path / "a.pth"), **({} if command is train.evaluate else
                                                {"out": str(tmp_path / "figures")}))
    assert not (tmp_path / "elsewhere").exists()


def test_other_images_are_measured_without_the_run_s_limit(tmp_path):
    names = data.SHAPES
    train.train(tiny(tmp_path / "runs", limit=20, epochs=1))
    _, about = train.open_network(tmp_path / "runs" / "run")
    assert len(train.open_test(about).labels) == 20
    other = image_folder(tmp_path / "other", names)
    assert len(train.open_test(about, other, str(tmp_path)).labels) == 40


def test_a_second_process_is_refused(tmp_path):
    config = tiny(tmp_path)
    with data.lock(config.folder), pytest.raises(ValueError, match="another"):
        train.train(config)


@pytest.mark.parametrize("read_steps", [{"cpu": 1}, {}], ids=["as a CPU", "as a GPU"])
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_gradient_that_is_not_finite(on_nan, read_steps, tmp_path, monkeypatch, capsys):
    at_once = train.choose_device().type in read_steps  # else it is seen when the step is saved
    monkeypatch.setattr(train, "READ_STEPS", read_steps)
    config = tiny(tmp_path, on_nan=on_nan)
    real_loss, calls = train.F.cross_entropy, []

    def sick_loss(logits, labels, **keywords):
        calls.append(1)
        loss = real_loss(logits, labels, **keywords)
        return loss * math.nan if len(calls) == 9 else loss  # the 7th call is the validation's

    monkeypatch.setattr(train.F, "cross_entropy", sick_loss)
    if on_nan == "skip":
        assert math.isfinite(train.train(config)["test/loss"])
        told = re.findall("1 of the epoch's 6 steps were skipped", capsys.readouterr().out)
        assert len(told) == 1  # of its two epochs one
        return
    rate = "learning rate.*" if at_once else ""
    with pytest.raises(ValueError, match=rf"not finite at step 8.*{rate}last\.pth"):
        train.train(config)
    checkpoint = network.read(config.folder / "last.pth")
    assert all(tensor.isfinite().all() for tensor in checkpoint["weights"].values())


def test_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    train.train(tiny(tmp_path, "whole"))
    real_fsync, calls = os.fsync, []

    def full_disk(number):
        calls.append(number)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(number)

    config = tiny(tmp_path, "cut")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match=rf"{config.folder}.*: cannot be written \(No space"):
            train.train(config)
    assert network.read(config.folder / "last.pth")["step"] > 0
    assert not list(config.folder.glob("*.tmp"))
    train.train(config, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_keeps_the_saved_settings(tmp_path, capsys):
    train.train(tiny(tmp_path))
    train.train_command(resume=str(tmp_path / "run"), epochs="3")
    assert train.read_config(tmp_path / "run" / "config.json") == tiny(tmp_path, epochs=3)
    train.train_command(resume=True, out=str(tmp_path), name="run", model="lenet", dropout="0.2")
    assert "all 3 epochs are done, at step 18" in capsys.readouterr().out
    kept = {"data": "shapes", "limit": 60, "batch_size": 20, "out": str(tmp_path), "name": "kept"}
    train.train("lenet", keep=0, epochs=2, **kept)
    before = {*(tmp_path / "kept").glob("step-*.pth")}
    train.train("lenet", resume=True, epochs=3, **kept)
    assert before and before < {*(tmp_path / "kept").glob("step-*.pth")}
    with pytest.raises(ValueError, match="name=3: must be"):
        train.train("lenet", name=3)


def run_script(*words, timeout=120, **more):
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *words], capture_output=True,
                          text=True, timeout=timeout, **more)


@pytest.mark.parametrize("words, complaint", [
    (["--epohcs=3"], "--epohcs"), (["--lr=abc"], "--lr=abc"), (["--resume=nowhere"], "nowhere"),
    (["evaluate", "nothing.pth"], "nothing.pth"),
])
def test_bad_command_lines_exit_2_with_one_line(words, complaint, tmp_path):
    done = run_script(*words, cwd=tmp_path)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


TINY_LINE = ["--data=shapes", "--limit=96", "--batch_size=16", "--epochs=3", "--save_minutes=0",
             "--dropout=0.2", "--seed=7"]


def train_until(config, fatal):
    """Train, or die by SIGKILL right before the run's file operation of that number."""
    operations = itertools.count(1)

    def watch(event, arguments):
        if (event in ("open", "os.rename", "os.remove", "shutil.rmtree", "os.mkdir")
                and str(config.folder) in str(arguments[0]) and next(operations) == fatal):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train.train(config, resume=True)


@pytest.mark.slow
def test_killed_anywhere(tmp_path):
    """SIGKILL at random instants, resume, until the run ends: as if nothing had happened.

    Every other kill comes right before a file is opened, renamed or removed.
    """
    processes = multiprocessing.get_context("forkserver")  # imports are made once
    processes.set_forkserver_preload(["train", "torch.utils.tensorboard"])
    whole = processes.Process(target=train.train, args=(tiny(tmp_path, "whole", epochs=3),))
    started = time.monotonic()
    whole.start()
    whole.join()
    seconds, dice, kills, rounds = time.monotonic() - started, random.Random(1), 0, 0
    while kills < int(os.environ.get("KILLS", 20)):
        config, rounds, over = tiny(tmp_path, f"cut{rounds}", epochs=3), rounds + 1, False
        while not over:
            fatal = dice.randrange(1, 150) * (kills % 2)
            process = processes.Process(target=train_until, args=(config, fatal))
            process.start()
            process.join(None if fatal else dice.uniform(0.1, 1.5) * seconds)
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            over = process.exitcode == 0
            kills += not over
        assert_same_run(tmp_path / "whole", config.folder)
        assert not list(config.folder.glob("*.tmp"))
    print(f"{kills} kills in {rounds} runs")


@pytest.mark.slow
def test_two_processes_train_on_the_same_batches(tmp_path):
    line = [*TINY_LINE[:-2], f"--out={tmp_path}", "--device=cpu"]
    assert run_script(*line, "--name=one").returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, str(ROOT / "train.py"), *line, "--name=two"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (train.read_metrics(tmp_path / name) for name in ("one", "two"))
    assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
    assert two["val/accuracy"] == pytest.approx(one["val/accuracy"], abs=0.011)
    done = run_script(*[word.replace("epochs=3", "epochs=4") for word in line], "--name=two",
                      "--resume")
    assert done.returncode == 0, done.stderr
    assert len(train.read_metrics(tmp_path / "two")["epoch"]) == 4


KILLED = """
import atexit, os, pathlib, signal, sys, train
def leftovers():
    threads = [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in thread for thread in threads):
        print("left at the end:", *threads)
atexit.register(leftovers)
real_step = train.train_step
def step(state, *arguments):
    if state.step == 9 and os.environ["RANK"] + os.environ["TORCHELASTIC_RESTART_COUNT"] == "10":
        os.kill(os.getpid(), signal.SIGKILL)
    real_step(state, *arguments)
train.train_step = step
train.data.command_line({"train": train.train_command}, default="train")
"""


@pytest.mark.slow
def test_torchrun_goes_on_after_a_process_was_killed(tmp_path):
    (tmp_path / "killed.py").write_text(KILLED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node=2", "--max-restarts=1"]
    for script, name in ((ROOT / "train.py", "whole"), (tmp_path / "killed.py", "cut")):
        done = subprocess.run([*torchrun, str(script), *TINY_LINE, f"--out={tmp_path}",
                               "--resume", "--device=cpu", "--batch_norm", f"--name={name}"],
                              timeout=120, capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and any(told in done.stderr for told in (
        "another process of this run is gone", "closing signal"))  # of torchrun, if that is quicker
    assert "resuming at step" in done.stdout and "left at the end" not in done.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_an_exported_network_answers_as_its_run_and_says_how_it_was_made(tmp_path):
    config = tiny(tmp_path)
    result = train.train(config)
    path = train.export(str(config.folder), str(tmp_path / "given.pth"))
    assert path.stat().st_size < 0.6 * (config.folder / "best.pth").stat().st_size
    made = network.read(path)["made"]
    assert made["test/accuracy"] == result["test/accuracy"]
    assert "--model=lenet" in made["command"] and str(tmp_path) not in made["command"]
    images = data.draw_shapes(20, seed=5).images
    logits = [train.predict(loaded, images, description.preprocessing)
              for loaded, description in map(train.open_network, (path, config.folder))]
    assert torch.allclose(*logits, atol=1e-2)
    train.train(tiny(tmp_path, epochs=3), resume=True)
    made = network.read(train.export(str(config.folder), str(path)))["made"]  # the same run
    assert made["epochs"] == 3
    other = tiny(tmp_path, "other", seed=1)
    train.train(other)
    train.train(tiny(tmp_path, "trial"))  # the same, for fewer epochs
    for run in (other.folder, tmp_path / "trial"):
        with pytest.raises(FileExistsError, match="was not exported from this run"):
            train.export(str(run), str(path))
    assert network.read(path)["made"] == made
    before = network.read(path)
    network.save(path, {**before, "fingerprint": "of other images"})
    with pytest.raises(FileExistsError, match="was not exported from this run"):
        train.export(str(config.folder), str(path))
    for epochs in ("3", None, [3], math.nan):  # none of ours
        network.save(path, {**before, "made": {**made, "epochs": epochs}})
        with pytest.raises(FileExistsError, match="was not exported from this run"):
            train.export(str(config.folder), str(path))


def test_no_network_takes_the_place_of_one_of_other_classes(tmp_path):
    ab, given = image_folder(tmp_path / "ab", "ab"), tmp_path / "given.pth"
    config = tiny(tmp_path, data=ab, val=0, limit=None, epochs=1, image_size=32, batch_size=4,
                  root=str(tmp_path / "cache"))
    train.train(config)
    for _ in range(2):
        train.export(str(config.folder), str(given))
    before = given.read_bytes()
    for part in ("train", "test"):
        Path(ab, part, "b").rename(Path(ab, part, "c"))
    train.train(config, overwrite=True)
    with pytest.raises(FileExistsError, match=r"given\.pth: .* was not exported from this run"):
        train.export(str(config.folder), str(given))
    assert given.read_bytes() == before


def test_no_network_is_exported_with_the_result_of_another(tmp_path):
    first = train.train(config := tiny(tmp_path))
    result = (config.folder / "result.json").read_text()
    train.train(more := tiny(tmp_path, epochs=4), resume=True)
    made = network.read(train.export(str(more.folder), str(tmp_path / "given.pth")))
    assert "--epochs=4" in made["made"]["command"] and made["settings"]["epochs"] == 4
    (config.folder / "result.json").write_text(result)  # as it is while the run goes on
    with pytest.raises(ValueError, match=r"holds no finished run \(python train.py --resume="):
        train.export(str(more.folder), str(tmp_path / "again.pth"))
    assert first["epochs"] == 2 and not (tmp_path / "again.pth").exists()


@pytest.mark.parametrize("value", [math.nan, 1e5])  # more than half precision takes
def test_no_weights_are_exported_that_are_no_numbers(value, tmp_path):
    train.train(config := tiny(tmp_path, val=0, epochs=1, limit=16))
    checkpoint = network.read(config.folder / "last.pth")
    checkpoint["weights"]["fc.4.weight"][0] = value
    network.save(config.folder / "last.pth", checkpoint)
    with pytest.raises(ValueError, match="not finite numbers"):
        train.export(str(config.folder), str(tmp_path / "given.pth"))
    assert not (tmp_path / "given.pth").exists()


def test_nothing_is_exported_with_a_result_that_is_damaged(tmp_path):
    result = train.train(config := tiny(tmp_path))
    for name, value in (("seconds", None), ("device", ["x"]), ("test/accuracy", "1"),
                        ("precision", 16)):
        whole = {**result, name: value} if value else {
            key: kept for key, kept in result.items() if key != name}
        (config.folder / "result.json").write_text(json.dumps(whole))
        with pytest.raises(ValueError, match=f"result.json: damaged.*{name}"):
            train.export(str(config.folder), str(tmp_path / "given.pth"))
    assert not (tmp_path / "given.pth").exists()
    del result["commit"], result["precision"], result["val/accuracy"]  # what may be None may lack
    (config.folder / "result.json").write_text(json.dumps(result))
    train.export(str(config.folder), str(tmp_path / "given.pth"))
    assert network.read(tmp_path / "given.pth")["made"]["commit"] is None
    assert train.finished(config.folder)["val/accuracy"] is None


def test_options_are_of_their_types_however_they_are_given():
    config = train.Config(model="simple_cnn", options={"dropout": numpy.float32(0.25),
                                                       "channels": ["8", 16]})
    assert config.options == {"dropout": 0.25, "channels": (8, 16)}
    assert train.Config.from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert train.Config.create("simple_cnn", dropout=0.995).options == {"dropout": 0.995}
    with pytest.raises(ValueError, match=r"dropout=1\.0: must be from 0 to 0\.9999"):
        train.Config(model="simple_cnn", options={"dropout": 1})


def test_a_file_to_write_is_neither_a_picture_nor_a_file_of_a_run(tmp_path):
    config = tiny(tmp_path)
    train.train(config)
    last, picture = config.folder / "last.pth", tmp_path / "cat.png"
    picture.write_bytes(b"a picture")
    before = last.read_bytes(), picture.read_bytes()
    (tmp_path / "link").symlink_to(config.folder)
    absent = config.folder / "snapshot-00007.pth"  # one that a run may write
    for path in (last, tmp_path / "link" / "last.pth", absent, picture):
        with pytest.raises(ValueError, match=f"out=.*{path.name}"):
            train.export(str(config.folder), str(path))
    for path in (picture, config.folder / "metrics.csv"):
        with pytest.raises(ValueError, match=f"out=.*{path.name}"):
            train.predict_command(str(config.folder), str(picture), out=str(path))
    table, weights, pipe = (tmp_path / name for name in ("mine.csv", "mine.pth", "pipe.csv"))
    table.write_text("a,b\n1,2\n")
    torch.save({"made": torch.ones(2)}, weights)
    os.mkfifo(pipe)
    kept = table.read_bytes(), weights.read_bytes()
    for path in (table, pipe):
        with pytest.raises(FileExistsError, match=path.name):
            train.predict_command(str(config.folder), str(picture), out=str(path))
    with pytest.raises(FileExistsError, match=r"out=.*mine\.pth"):
        train.export(str(config.folder), str(weights))
    assert (table.read_bytes(), weights.read_bytes()) == kept and pipe.is_fifo()
    for _ in range(2):  # what was made here may be made anew
        train.export(str(config.folder), str(tmp_path / "given.pth"))
    assert (last.read_bytes(), picture.read_bytes()) == before and not absent.exists()
    train.export(str(config.folder), str(config.folder / "given.pth"))
    train.export(str(config.folder), str(tmp_path / "new" / "folder" / "given.pth"))


def test_resume_of_a_folder_takes_no_other_name(tmp_path):
    train.train(tiny(tmp_path))
    for flags in ({"name": "other"}, {"out": str(tmp_path / "elsewhere")}):
        with pytest.raises(ValueError, match=f"leave out `{next(iter(flags))}`"):
            train.train_command(resume=str(tmp_path / "run"), epochs="3", **flags)


def test_a_run_goes_on_behind_a_link(tmp_path, monkeypatch):
    for name, out in (("exp1", tmp_path / "store"), ("exp1", tmp_path / "runs")):
        train.train(tiny(out, name))
    (tmp_path / "runs" / "link").symlink_to("../store/exp1")
    monkeypatch.chdir(tmp_path)
    train.train_command(resume="runs/link", epochs="3")
    assert [len(train.read_metrics(tmp_path / out / "exp1")["epoch"])
            for out in ("store", "runs")] == [3, 2]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"exp1", "link"}


@pytest.mark.parametrize("words", [
    ["--resume=RUN"], ["--resume", "RUN"], ["--resume", "--out=OUT", "--name=run"],
    ["--resume=True", "--out=OUT", "--name=run"],
    ["--model=simple_cnn", "--resume", "--out=OUT", "--name=run"],
    ["-model=simple_cnn", "--resume", "--out=OUT", "--name=run"]])
def test_a_resumed_run_takes_the_options_of_its_network(words, tmp_path, capsys):
    options = {"model": "simple_cnn", "channels": (4,), "augment": ("flip",)}
    config = train.Config.create(**{**TINY, **options, "out": str(tmp_path), "name": "run"})
    train.train(config)
    words = [word.replace("RUN", str(config.folder)).replace("OUT", str(tmp_path))
             for word in words]
    data.command_line(train.COMMANDS, "train", [*words, "--channels=4"])
    assert "at step 12; measuring" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        data.command_line(train.COMMANDS, "train", [*words, "--channels=4", "--width=3"])
    assert "error: --width" in capsys.readouterr().err


def test_a_run_that_the_environment_names_is_gone_on_with(tmp_path, monkeypatch, capsys):
    config = tiny(tmp_path, model="convnet")
    train.train(config)
    monkeypatch.setenv("TRAIN_FLAGS", f"--out={tmp_path} --name=run")
    data.command_line(train.COMMANDS, "train", ["--resume"])
    assert "at step 12; measuring" in capsys.readouterr().out
    monkeypatch.setenv("TRAIN_FLAGS", "--dropout=0.2 --batch_norm=false")
    data.command_line(train.COMMANDS, "train", [f"--resume={config.folder}"])
    monkeypatch.setenv("TRAIN_FLAGS", "--channels=4")
    config = train.Config.create(**{**TINY, "model": "simple_cnn", "out": str(tmp_path),
                                    "name": "trial", "channels": (4,)})
    train.train(config)
    data.command_line(train.COMMANDS, "train", [f"--resume={config.folder}"])
    assert "at step 12; measuring" in capsys.readouterr().out


def test_a_network_that_is_not_there_is_not_blamed_on_the_environment():
    with pytest.raises(ValueError, match=r"^model=foo: no such network"):
        train.train("foo")


def test_settings_from_python(tmp_path, monkeypatch):
    assert train.Config.create("simple_cnn", channels=numpy.array([2, 3]), snapshots=(
        numpy.int64(3),)).all_settings().items() >= {"channels": (2, 3), "snapshots": (3,)}.items()
    config = tiny(tmp_path, augment=["flip"], out=tmp_path, batch_size=numpy.int64(8))
    assert (config.augment, config.out, config.batch_size) == (("flip",), str(tmp_path), 8)
    train.train(config, epochs=1, dropout=0.3)
    assert train.read_config(config.folder / "config.json").options == {"dropout": 0.3}
    with pytest.raises(ValueError, match=r"resume='runs/a': must be True or False; `out` and"):
        train.train(config, resume="runs/a")
    monkeypatch.setenv("TRAIN_FLAGS", "--model=simple_cnn --channels=4")
    assert train.parse_flags({})["channels"] == (4,)
    monkeypatch.setenv("HOME", "/home/me")
    assert train.Config.create(out="~/runs", name="a~").folder == Path("/home/me/runs/a~")


def test_a_run_goes_on_from_within_its_folder(tmp_path, monkeypatch):
    train.train(tiny(tmp_path))
    monkeypatch.chdir(tmp_path / "run")
    train.train_command(resume=".", epochs="3")
    assert len(steady_rows(tmp_path / "run")) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert not (tmp_path / "run" / "data").exists()
    (tmp_path / "run" / "data").mkdir()  # as a folder's cache makes it there
    train.train_command(resume=".", epochs="4")
    assert len(train.read_metrics(tmp_path / "run")["epoch"]) == 4


# ---------------------------------------------------------------------------- found by use


def test_a_device_may_be_given_as_one():
    assert train.choose_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="device=None: must be of auto, "):
        train.choose_device(None)


def test_a_run_to_go_on_with_may_be_given_as_a_path(tmp_path):
    train.train(tiny(tmp_path))
    train.train_command(resume=tmp_path / "run", epochs=3)
    assert train.finished(tmp_path / "run")["epochs"] == 3


@pytest.mark.parametrize("flag", ["resume", "overwrite", "changed_data"])
def test_a_text_is_no_yes(flag, tmp_path):
    train.train(tiny(tmp_path))
    before = network.read(tmp_path / "run" / "last.pth")["step"]
    with pytest.raises(ValueError, match=f"{flag}='false': must be True or False"):
        train.train(tiny(tmp_path, epochs=1), **{flag: "false"})
    assert network.read(tmp_path / "run" / "last.pth")["step"] == before


def test_predictions_to_which_somebody_has_added_are_never_replaced(tmp_path):
    ab = image_folder(tmp_path / "ab", "ab")
    config = tiny(tmp_path, data=ab, val=0, limit=None, epochs=1, image_size=32, batch_size=4,
                  root=str(tmp_path / "cache"))
    train.train(config)
    out = tmp_path / "table.csv"

    def predict():
        train.predict_command(str(config.folder), str(Path(ab, "test")), out=str(out))

    predict()
    written = out.read_text()
    predict()  # its own file is
    header, *rows = written.splitlines()
    for changed in (f"{header},note\n" + "".join(f"{row},mine\n" for row in rows),
                    f"{written}a,b,c\n", f"{written}my notes\n", "", "a,b\n",
                    "image,class\ncat.png,cat\n", "image\ncat.png\n"):
        out.write_text(changed)
        with pytest.raises(FileExistsError, match=r"table\.csv: is no table of image, rank"):
            predict()
        assert out.read_text() == changed


def test_a_run_whose_images_were_moved_knows_where_to(tmp_path):
    ab = image_folder(tmp_path / "ab", "ab")
    config = tiny(tmp_path, data=ab, val=2, limit=None, epochs=1, image_size=32, batch_size=2,
                  root=str(tmp_path / "cache"), lr=0.0)  # so that the first epoch stays the best
    train.train(config)
    Path(ab).rename(tmp_path / "moved")
    moved = dataclasses.replace(config, data=str(tmp_path / "moved"), epochs=2)
    train.train(moved, resume=True)
    assert network.read(config.folder / "best.pth")["settings"]["data"] == ab
    _, about = train.open_network(config.folder)
    assert len(train.open_dataset(about).test.labels) == 8
    assert train.evaluate(str(config.folder))


def test_no_run_begins_where_another_keeps_its_test_images(tmp_path):
    train.train(tiny(tmp_path))
    kept = sorted((tmp_path / "run" / "test").iterdir())
    for name in ("run/test", "run/./test"):
        with pytest.raises(FileExistsError, match="keeps TensorBoard's files"):
            train.train(tiny(tmp_path, name=name), overwrite=True)
    assert sorted((tmp_path / "run" / "test").iterdir()) == kept
    train.train(tiny(tmp_path, name="test"))


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_run_killed_while_its_marker_was_written_begins_anew(how, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", ".run.123.tmp"):
        (folder / name).touch()
    assert train.train(tiny(tmp_path), **{how: True})["epochs"] == 2
    assert not (folder / ".run.123.tmp").exists()
