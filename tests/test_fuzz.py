"""Files and command lines that nobody meant: each is understood, or refused in one line.

FUZZ sets how many of each kind are tried.
"""

import contextlib
import copy
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import random
import zipfile

import pytest
import torch
from PIL import Image

import data
import deconv
import network
import train
import visualize

COUNT = int(os.environ.get("FUZZ", 150))
STRANGE = [None, 0, -1, 10**18, -1.5, float("nan"), float("inf"), True, "", "x", "1" * 5000, [], {},
           [None], {"a": 1}, [[]], "../../etc", "\0", b"bytes", (1, 2), torch.zeros(2),
           (2048,) * 19, ["a"] * 10, torch.zeros((), dtype=torch.half).expand(2**20, 2**20)]
REFUSALS = (ValueError, OSError)


def mutated(content, dice):
    """`content` with a few bytes changed, cut out or repeated."""
    content = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        place, size = dice.randrange(len(content) + 1), dice.randint(1, 40)
        kind = dice.randrange(4)
        if kind == 0:
            content[place:place + 1] = bytes([dice.randrange(256)])
        elif kind == 1:
            del content[place:place + size]
        elif kind == 2:
            content[place:place] = content[place:place + size]
        else:
            content[place:place + size] = dice.randbytes(size)
    return bytes(content)


def strange(value, dice):
    """A deep copy of a nested dictionary in which a few entries are replaced or gone."""
    value = copy.deepcopy(value)
    for _ in range(dice.randint(1, 3)):
        place = value
        while True:
            key = dice.choice(list(place))
            inner = place[key]
            if isinstance(inner, dict) and inner and dice.random() < 0.7:
                place = inner
                continue
            if dice.random() < 0.2:
                del place[key]
            else:
                place[key] = dice.choice(STRANGE)
            break
        if not value:
            break
    return value


def small_checkpoint():
    config = train.Config.create("lenet")
    about = {"model": "lenet", "options": {"dropout": 0.1}, "classes": list("abcdefghij"),
             "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3,
             "settings": train.dataclasses.asdict(config), "epoch": 1, "step": 2}
    state = train.new_state(config, {**about, "options": {}}, torch.device("cpu"))
    state.network(torch.zeros(2, 3, 32, 32)).sum().backward()
    state.optimizer.step()
    return {**about, "weights": state.network.state_dict(),
            "training": train.training_state(state)}


def signed(content):
    """`content` with a checksum that is right, as somebody who means harm would write it."""
    content = bytearray(content)
    content[-2:] = (32).to_bytes(2, "little")
    return bytes(content + hashlib.sha256(content).digest())


def test_fuzz_checkpoint_bytes(tmp_path):
    buffer, dice, opened = io.BytesIO(), random.Random(1), 0
    torch.save(small_checkpoint(), buffer)
    # What describes the network lies in the first kilobytes and the archive's directory.
    content = buffer.getvalue()
    for number in range(COUNT):
        head = dice.randrange(2) and 6_000
        changed = (mutated(content[:head], dice) + content[head:] if head
                   else content[:-4_000] + mutated(content[-4_000:], dice))
        (tmp_path / "a.pth").write_bytes(signed(changed) if number % 8 else changed)
        try:
            train.open_network(tmp_path / "a.pth", "cpu")
            opened += 1
        except REFUSALS as error:
            assert "a.pth" in str(error)
    assert opened < COUNT


def test_fuzz_checkpoint_contents(tmp_path):
    dice, whole = random.Random(2), small_checkpoint()
    for _ in range(COUNT):
        network.save(tmp_path / "a.pth", strange(whole, dice))
        try:
            loaded, description = train.open_network(tmp_path / "a.pth", "cpu")
            train.predict(loaded, torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
                          description.preprocessing)
        except REFUSALS as error:
            assert "a.pth" in str(error), error


def test_fuzz_checkpoints_that_a_run_goes_on_from(tmp_path, capsys):
    dice, whole = random.Random(10), {
        **small_checkpoint(), **train.environment(torch.device("cpu")), "precision": "fp32",
        "processes": 1}
    for _ in range(COUNT // 3):
        network.save(tmp_path / "last.pth", strange(whole, dice))
        with contextlib.suppress(*REFUSALS):
            found = train.newest_checkpoint(tmp_path, print)
            told = {name: found[name] for name in train.TRAINED_BY if name in found}
            assert json.dumps(told)  # in result.json
    network.save(tmp_path / "last.pth", whole)
    assert train.newest_checkpoint(tmp_path, print)["device"] == whole["device"]


def test_a_time_that_is_no_number_is_none(tmp_path):
    whole = small_checkpoint()
    whole["training"]["epoch_seconds"] = torch.ones(2)
    network.save(tmp_path / "a.pth", whole)
    assert not network.load(tmp_path / "a.pth")[1].within_epoch


def test_fuzz_resumed_training_state():
    dice, whole = random.Random(3), small_checkpoint()
    description = {name: whole[name] for name in ("classes", "image_size")}
    for number in range(COUNT // 3):
        state = train.new_state(train.Config.create("lenet"), description, torch.device("cpu"))
        if not number:
            train.restore(state, whole, 2)  # as it is, it is gone on from
            continue
        with contextlib.suppress(*REFUSALS):
            train.restore(state, {**whole, "training": strange(whole["training"], dice)}, 2)
            state.network(torch.zeros(2, 3, 32, 32)).sum().backward()
            state.optimizer.step()


@pytest.mark.parametrize("change", [
    torch.Tensor.double, torch.Tensor.to_sparse, lambda weight: weight.to("meta"),
    lambda weight: weight[0, 0].clone().expand(weight.shape), lambda weight: weight[1:],
])
def test_weights_of_another_kind_are_refused(change, tmp_path):
    whole = small_checkpoint()
    whole["weights"]["fc.0.weight"] = change(whole["weights"]["fc.0.weight"])
    network.save(tmp_path / "a.pth", whole)
    with pytest.raises(ValueError, match=r"a\.pth.*(fc\.0\.weight|claim more memory)"):
        network.load(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["x" * 256, "x" * 10**7, "a\nb", "\x1b[2J"])
def test_class_names_that_no_table_can_show_are_refused(name, tmp_path):
    network.save(tmp_path / "a.pth", {**small_checkpoint(), "classes": [name, *"bcdefghij"]})
    with pytest.raises(ValueError, match=r"a\.pth.*names of the classes.*255") as refusal:
        network.load(tmp_path / "a.pth")
    assert len(str(refusal.value)) < 300


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path):
    before, after = io.BytesIO(), io.BytesIO()
    torch.save(small_checkpoint(), before)
    with zipfile.ZipFile(before) as archive, zipfile.ZipFile(after, "w") as changed:
        for entry in archive.infolist():
            content = archive.read(entry)
            changed.writestr(entry.filename, content[:4] if len(content) == 1800 else content)
    (tmp_path / "a.pth").write_bytes(signed(after.getvalue()))
    with pytest.raises(ValueError, match=r"a\.pth"):
        network.load(tmp_path / "a.pth")


@pytest.mark.parametrize("name, options", [
    ("convnet_large", {}), ("simple_cnn", {"channels": (2048,)}), ("resnet50", {"width": 4096}),
    ("simple_cnn", {"hidden": (2048,) * 100}),
])
def test_networks_of_absurd_size_are_refused(name, options):
    with pytest.raises(ValueError, match=r"memory|must be"):
        network.build(name, image_size=1024, **options)


@pytest.mark.parametrize("changes", [
    {"model": "simple_cnn", "options": {"channels": (2048,) * 19}},
    {"model": "resnet50", "options": {"width": 256}}, {"classes": ["a"] * 10},
    {"weights": {"fc.0.weight": torch.zeros((), dtype=torch.half).expand(2**20, 2**20)}},
    {"settings": {"epochs": torch.zeros(()).expand(2**20, 2**20)}},
    {"options": {"dropout": torch.zeros(2**20, 2**20, device="meta")}},
    {"mean": [torch.zeros(2, 2).to_sparse()] * 3},
])
def test_a_file_never_takes_more_memory_than_it_holds(changes, tmp_path, monkeypatch):
    build = network.build

    def build_nothing(*arguments, **options):
        assert torch.get_default_device().type == "meta", "nothing is built of a wrong description"
        return build(*arguments, **options)

    network.save(tmp_path / "a.pth", {**small_checkpoint(), **changes})
    monkeypatch.setattr(network, "build", build_nothing)
    with pytest.raises(ValueError, match=r"a\.pth"):
        network.load(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff"])
def test_fuzz_images(kind, tmp_path):
    dice, buffer = random.Random(kind), io.BytesIO()
    pixels = bytes(dice.randrange(256) for _ in range(24 * 24 * 3))
    Image.frombytes("RGB", (24, 24), pixels).save(buffer, kind)
    for _ in range(COUNT):
        (tmp_path / "a.img").write_bytes(mutated(buffer.getvalue(), dice))
        try:
            image = data.read_image(tmp_path / "a.img", 16)
            assert image.shape == (3, 16, 16) and image.dtype == torch.uint8
        except OSError as error:
            assert "a.img" in str(error)


def test_fuzz_cache(tmp_path, capsys):
    """Whatever became of a cache of decoded images, the images are the right ones."""
    dice, folder = random.Random(7), tmp_path / "images"
    for number, name in enumerate(["train/a/0.png", "train/a/1.png", "test/a/2.gif"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 5), (number, 60, 7)).save(folder / name)
    whole = data.load(str(folder), tmp_path / "other", val=0)
    data.load(str(folder), tmp_path / "cache", val=0)
    caches = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    for number in range(COUNT // 3):
        for path, content in caches.items():
            path.write_bytes(mutated(content, dice))
        found = data.load(str(folder), tmp_path / "cache", val=0, writes=number % 2 == 0)
        assert torch.equal(found.train.images, whole.train.images)
        assert torch.equal(found.test.images, whole.test.images)
        assert torch.equal(found.train.labels, whole.train.labels)
    assert "Traceback" not in capsys.readouterr().err


NAMES = ["a", "A", "é", "日本", "-", "--x", "$1_$2", "[x]", "a,b", "a b", "'", '"', "|", "%s", "{}",
         "a" * 255, "<b>", "&amp;", "\t", "x\ny", os.fsdecode(b"\xff"), ":cat:", "None"]


def test_fuzz_names_in_a_folder(tmp_path, capsys):
    """Class and file names that a file system permits are read, or refused in one line."""
    dice = random.Random(8)
    for number in range(COUNT // 5):
        folder, names = tmp_path / str(number), dice.sample(NAMES, 2)
        for part in ("train", "test"):
            for name in names:
                (folder / part / name).mkdir(parents=True)
                Image.new("RGB", (4, 4)).save(folder / part / name / "0.png")
                with contextlib.suppress(OSError):
                    (folder / part / name / "0.png").rename(
                        folder / part / name / f"{dice.choice(NAMES)}.{dice.choice(NAMES)}.PNG")
        try:
            dataset = data.load(str(folder), tmp_path / "cache", val=0)
            assert dataset.classes == tuple(sorted(names)) and len(dataset.test.labels) == 2
            dataset.fingerprint.encode()
        except REFUSALS as error:
            assert "cannot be shown" in str(error) and "\n" not in str(error)
        capsys.readouterr().err.encode()


@pytest.mark.filterwarnings("error::UserWarning")  # that there is no room, or no such letter
def test_fuzz_names_in_figures():
    """Whatever classes and runs are called, all figures are drawn."""
    dice = random.Random(11)
    for _ in range(max(1, COUNT // 50)):
        names = [name for name in dice.sample(NAMES, 8) if name.isprintable()]
        count, logits = len(names), torch.randn(4, len(names))
        for figure in (visualize.draw_confusion(torch.eye(count), names, dice.choice(names)),
                       visualize.draw_predictions(torch.zeros(4, 3, 4, 4), torch.arange(4) % count,
                                                  logits, names, dice.choice(names)),
                       visualize.draw_pr_curves([(torch.ones(2), torch.ones(2), 1.0)] * count,
                                                names, dice.choice(names))):
            figure.savefig(io.BytesIO(), dpi=20)


def test_fuzz_settings(tmp_path):
    dice = random.Random(4)
    settings = train.dataclasses.asdict(train.Config.create("resnet18", width=32))
    text, path = json.dumps(settings).encode(), tmp_path / "config.json"
    for number in range(COUNT):
        if number % 2:
            path.write_bytes(mutated(text, dice))
        else:
            path.write_text(json.dumps(strange(settings, dice), default=str))
        try:
            train.read_config(path)
        except REFUSALS as error:
            assert "config.json" in str(error)


def test_fuzz_result(tmp_path):
    dice, path = random.Random(9), tmp_path / "result.json"
    result = {"epoch": 1, "epochs": 2, "parameters": 3, "seconds": 2.5, "train/accuracy": 0.5,
              "val/accuracy": None, "test/accuracy": 0.5, "device": "cpu", "commit": None,
              "versions": {"torch": "2"}, "per_class": {"a": 1.0},
              "settings": train.dataclasses.asdict(train.Config.create("lenet"))}
    for number in range(COUNT):
        path.write_bytes(mutated(json.dumps(result).encode(), dice) if number % 2 else
                         json.dumps(strange(result, dice), default=str).encode())
        try:
            made = data.read_json(path, train.checked)
            assert isinstance(made["device"], str) and 0 <= made["seconds"] < math.inf
        except REFUSALS as error:
            assert "result.json" in str(error)


def test_fuzz_metrics(tmp_path):
    dice, path = random.Random(5), tmp_path / "metrics.csv"
    rows = [",".join(train.COLUMNS)] + [f"{n},{n * 7},1.5,0.5,,,0.1,2.0,99," for n in range(1, 9)]
    for _ in range(COUNT):
        path.write_bytes(mutated("\n".join(rows).encode(), dice))
        with contextlib.suppress(*REFUSALS):
            assert set(train.read_metrics(tmp_path)) == set(train.COLUMNS)


WORDS = ["train", "evaluate", "sweep", "--model=resnet18", "--model", "lenet", "--lr=0.1",
         "--lr", "--lr=1,2", "--epochs=-3", "--epochs=1e9", "--resume", "--resume=", "--=3", "-",
         "--", "-x", "---lr=3", "--augment=", "--augment=flip,,crop", "--options={}",
         "--channels=1", "--dropout=nan", "--seed=99999999999999999999", "--name=../x",
         "--name=/etc", "'", "\n", "--device=gpu", "--batch_size=1_0", "--nolr", "--config",
         "__class__", "--width=64", "é", "--image_size=32", "--limit=0", "--val=-1", "--help"]


def test_fuzz_command_lines(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", lambda *_, **__: {"epochs": 1})
    commands = {"train": train.train_command, "evaluate": train.evaluate}
    dice = random.Random(6)
    for _ in range(COUNT):
        line = dice.sample(WORDS, dice.randint(1, 5))
        try:
            data.command_line(commands, default="train", argv=line)
        except SystemExit as leave:
            assert leave.code in (0, 2), line
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err and printed.err.count("\n") <= 1, line


VALUES = {
    "layer": ["conv1", "conv1.0", "fc", "nosuch"], "layers": ["conv1,fc", "all", "conv1,,conv2"],
    "data": ["pets", "shapes", "nosuch"], "image": ["pets/test/a/0.png", "pets", "mine.txt"],
    "class": ["a", "$b_", "9"], "format": ["pdf", "xyz"], "units": ["0,1", "99", "a"],
    "out": ["figures.svg", "F.JPG", "new/folder", "pets", "pets/test/a/0.png", "mine.txt",
            "run/last.pth", "run/figure.xyz", "run"]}
NUMBERS = ["1", "2", "5", "-1", "0", "1.5", "1e9", "none", "true", "", "é[x]"]


def test_fuzz_commands_that_look_at_a_run(tmp_path, monkeypatch, capsys, coarse_figures):
    """Each draws, or says in one line why not; what was there before stays as it is."""
    monkeypatch.chdir(tmp_path)
    for part, name in itertools.product(("train", "test"), ("a", "$b_")):
        (tmp_path / "pets" / part / name).mkdir(parents=True)
        for number in range(4):
            picture = Image.new("RGB", (32, 32), (40 * number, 9 * len(name), 99))
            picture.save(tmp_path / "pets" / part / name / f"{number}.png")
    (tmp_path / "mine.txt").write_text("mine")
    train.train("lenet", data="pets", epochs=1, batch_size=4, name="run", out=".")
    dice, commands = random.Random(12), {**visualize.COMMANDS, **deconv.COMMANDS}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for _ in range(COUNT // 5):
        name = dice.choice(list(commands))
        flags = [flag for flag in inspect.signature(commands[name]).parameters
                 if flag not in ("ckpt", "runs", "network") and dice.random() < 0.2]
        line = [name, "run", *(f"--{flag}={dice.choice(VALUES.get(flag, NUMBERS))}"
                               for flag in flags)]
        try:
            data.command_line(commands, argv=line)
        except SystemExit as leave:
            assert leave.code in (0, 2), line
            assert leave.code == 0 or capsys.readouterr().err.splitlines()[-1][:7] == "error: "
        assert all(path.read_bytes() == content for path, content in before.items()), line
