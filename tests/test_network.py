"""Networks: shapes and parameter counts of the papers and reports; checkpoints that stay whole."""

import io
import os
import re
import runpy
import sys
import zipfile
from functools import reduce
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_fuzz import signed
from torch import nn

import data
import deconv
import network
import train
import visualize

# Parameters worked out by hand from the layers, or published.
PARAMETERS = {
    "lenet": 62_006, "vgg16_1x1": 10_195_786, "convnet": 890_410, "convnet_large": 7_472_970,
    "simple_cnn": 296_130, "lenet5_color": 744_328, "trial_3conv": 803_671,
    "trial_4conv": 702_799, "trial_4conv_late_pool": 1_635_919, "vgg_a": 9_750_922,
    "vgg11": 9_225_610, "resnet18": 11_173_962, "resnet34": 21_282_122, "resnet50": 23_520_842,
    "resnet20": 269_722, "resnet56": 853_018, "resnet18_imagenet": 11_181_642,
    "speednet": 1_881_760,
}


def on_meta(name, classes=10, image_size=None, **options):
    with torch.device("meta"):
        return network.build(name, classes, image_size, **options)


@pytest.mark.parametrize("name", network.NETWORKS)
def test_every_network_maps_images_to_logits(name):
    size = network.image_size_of(name)
    with torch.device("meta"):
        assert network.build(name, 7)(torch.zeros(2, 3, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name, count", PARAMETERS.items())
def test_parameter_counts(name, count):
    assert network.count_parameters(on_meta(name)) == count


def test_structure_table_of_resnet18_imagenet():
    rows = {row[0]: row[1:3] for row in network.stages(on_meta("resnet18_imagenet"), 224)}
    assert rows == {
        "conv1": ((64, 112, 112), 9_536), "conv2_x": ((64, 56, 56), 147_968),
        "conv3_x": ((128, 28, 28), 525_568), "conv4_x": ((256, 14, 14), 2_099_712),
        "conv5_x": ((512, 7, 7), 8_393_728), "pool": ((512, 1, 1), 0), "flatten": ((512,), 0),
        "fc": ((10,), 5_130),
    }


def test_whitening_decorrelates_the_patches_it_was_fitted_to():
    mixed = torch.randn(50, 3, 8, 8) * torch.tensor([1.0, 0.5, 2.0])[:, None, None]
    images = 30 * (torch.nn.functional.avg_pool2d(mixed, 3, 1) + mixed[:, :1, 1:-1, 1:-1])
    layer = network.WhiteningConv()
    layer.fit(images)
    with torch.no_grad():
        outputs = layer(images).transpose(0, 1).flatten(1)
    assert torch.allclose(outputs[:12].cov(), torch.eye(12), atol=0.05)
    assert torch.allclose(outputs[12:], -outputs[:12], atol=1e-5)
    assert layer.weight.grad is None and not layer.weight.requires_grad


def test_mixed_pool_is_the_mean_of_maximum_and_average():
    images = torch.tensor([[0.0, 4, 1], [0, 0, 1], [9, 9, 9]]).reshape(1, 1, 3, 3)
    assert network.MixedPool(2)(images).item() == (4 + 1) / 2
    assert network.MixedPool()(images).item() == pytest.approx((9 + 33 / 9) / 2)


def test_speednet_takes_images_of_any_size_that_leaves_something():
    for size in (9, 24, 40):
        images = torch.zeros(2, 3, size, size, device="meta")
        assert on_meta("speednet", image_size=size).eval()(images).shape == (2, 10)


def test_multiply_adds_of_lenet_by_hand():
    by_hand = 28 * 28 * 6 * 75 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    assert network.multiply_adds(on_meta("lenet"), 32) == by_hand


@pytest.mark.parametrize("name, options, inputs", [
    ("lenet", {}, [400, 120, 84]), ("vgg16_1x1", {}, [512, 256, 256]),
    ("convnet", {"dropout": 0.2}, [1600, 512]), ("convnet_large", {}, [6400, 1024, 512]),
    ("simple_cnn", {}, [4608, 64]), ("simple_cnn", {"channels": (18, 25)}, [1225, 64]),
    ("simple_cnn", {"channels": (18, 300), "hidden": (200, 50)}, [14700, 200, 50]),
    ("lenet5_color", {}, [1728, 360, 252, 30]), ("trial_3conv", {}, [1728, 360, 252, 99, 30]),
    ("trial_4conv", {}, [864, 360, 252, 99, 30]), ("vgg_a", {}, [512, 512, 512]),
    ("trial_4conv_late_pool", {}, [3456, 360, 252, 99, 30]),
])
def test_linear_layers_of_the_reports(name, options, inputs):
    linear = [module for module in on_meta(name, **options).modules()
              if isinstance(module, torch.nn.Linear)]
    assert [layer.in_features for layer in linear] == inputs


def test_resnet18_imagenet_is_torchvisions_resnet18():
    ours, theirs = network.build("resnet18_imagenet").eval(), torchvision.models.resnet18(
        num_classes=10).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -1, 1)
            torch.nn.init.uniform_(module.weight, 0.5, 1)
    # Shortcuts stand last in our blocks and in theirs, so the tensors come in the same order.
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values())))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments, complaint", [
    (dict(name="lenet6"), "lenet6"), (dict(name="lenet", width=3), "dropout"),
    (dict(name="lenet", image_size=8), "8×8"), (dict(name="convnet", dropout=1.0), "dropout=1"),
    (dict(name="resnet18", activation="tanh"), "leaky_relu"),
    (dict(name="resnet18", width=10**9), "256"), (dict(name="resnet18", width="a"), "width=a"),
    (dict(name="resnet18", activation=[]), "leaky_relu"),
    (dict(name="speednet", image_size=8), "8×8"),
    (dict(name="speednet", image_size=64, channels=(2048,) * 5), "memory"),
    (dict(name="lenet", image_size=7), "lenet cannot take 7×7 images: "),
    (dict(name="lenet", image_size=7, dropout=0.5), "cannot take 7×7 images with dropout=0.5: "),
    *((dict(name=name), f"model={name}: no such network; did you mean {meant}") for name, meant in (
        ("ResNet18", "resnet18"), ("resnet-18", "resnet18"), ("VGG16_BN", "vgg16_bn"),
        ("lenet5", "lenet"), ("speed_net", "speednet"))),
])
def test_build_errors_say_what_is_allowed(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        network.build(**arguments)


def test_a_networks_own_operations_and_lists_of_modules_count():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Conv2d(3, 2, 1)])
            self.weight = nn.Parameter(torch.randn(10, 2 * 8 * 8))

        def forward(self, x):
            return F.linear(self.blocks[0](x).flatten(1), self.weight)

    assert network.multiply_adds(Functional(), 8) == 3 * 2 * 8 * 8 + 10 * 2 * 8 * 8
    assert network.stages(Functional(), 8) == [("blocks", (), 8, 0)]


def test_find_layer():
    lenet = on_meta("lenet")
    assert network.find_layer(lenet, "conv1.0") is lenet.conv1[0]
    lenet.again = lenet.conv1  # a second name of one module
    assert network.find_layer(lenet, "again.0") is lenet.conv1[0]
    with pytest.raises(ValueError, match="conv1, conv2"):
        network.find_layer(lenet, "conv9")


def checkpoint_of(name="lenet", **options):
    built = network.build(name, **options)
    return {"model": name, "options": options, "classes": list("abcdefghij"), "image_size": 32,
            "mean": [0.5] * 3, "std": [0.25] * 3, "weights": built.state_dict(),
            "settings": {"seed": 0}, "epoch": 1, "step": 2}


def test_checkpoint_round_trip(tmp_path):
    saved = checkpoint_of("simple_cnn", channels=(18, 25))
    network.save(tmp_path / "a.pth", saved)
    loaded, description = network.load(tmp_path / "a.pth")
    assert description.settings == {"seed": 0} and not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, saved["weights"][name])
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    torch.load(tmp_path / "a.pth", weights_only=True)  # stays an ordinary PyTorch file


def test_every_flipped_or_missing_byte_is_noticed(tmp_path):
    network.save(tmp_path / "a.pth", checkpoint_of())
    content = (tmp_path / "a.pth").read_bytes()
    for place in torch.randint(0, len(content), (200,)).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "b.pth").write_bytes(damaged if place % 2 else content[:place])
        with pytest.raises(OSError, match=r"b\.pth.*damaged"):
            network.load(tmp_path / "b.pth")


class Bomb:
    exploded = False

    def __reduce__(self):
        return exec, ("import test_network; test_network.Bomb.exploded = True",)


DEEP = reduce(lambda inner, _: {"a": inner}, range(150), {})
BILLION = reduce(lambda inner, _: [inner] * 10, range(9), 0)  # ten lists in memory, 10⁹ in print


@pytest.mark.parametrize("change, complaint", [
    ({"model": "lenet6"}, "lenet6"), ({"options": {"width": 2}}, "width"),
    ({"classes": "abc"}, "classes"), ({"image_size": 10**6}, "image_size"),
    ({"image_size": 16}, "16×16|weights"), ({"weights": {}}, "conv1"),
    ({"mean": [1.0]}, "mean=1.0: must be three"), ({"std": [1.0, 2.0, 0.0]}, "above 0"),
    ({"options": {"batch_norm": True}}, "weights"), ({"weights": {"conv1.0.weight": 3}}, "conv1"),
    ({"bomb": Bomb()}, "not a checkpoint"), ({"settings": DEEP}, r"a\.pth.*nested too deeply"),
    ({"options": DEEP}, r"a\.pth.*nested too deeply"),
    ({"settings": {"epochs": BILLION}}, "nested too deeply"), ({"mean": BILLION}, "too deeply"),
    ({"options": {"dropout": BILLION}}, r"a\.pth.*nested too deeply"),
])
def test_a_checkpoint_that_lies_is_refused(change, complaint, tmp_path):
    network.save(tmp_path / "a.pth", {**checkpoint_of(), **change})
    with pytest.raises(ValueError, match=complaint):
        network.load(tmp_path / "a.pth")
    assert not Bomb.exploded


def test_a_compressed_archive_is_refused(tmp_path):
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.save(checkpoint_of(), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(
            packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry))
    (tmp_path / "a.pth").write_bytes(signed(packed.getvalue()))
    with pytest.raises(ValueError, match="put together wrongly") as refused:
        network.load(tmp_path / "a.pth")
    assert str(refused.value.__cause__) == "it is compressed"  # not its folder's name


def test_a_disk_error_leaves_the_file_before_it(tmp_path, monkeypatch):
    network.save(tmp_path / "a.pth", checkpoint_of())
    before = (tmp_path / "a.pth").read_bytes()

    def full(_file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"a\.pth.*No space"):
        network.save(tmp_path / "a.pth", checkpoint_of())
    assert (tmp_path / "a.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("line", [
    "nix", "summary", "summary [3]", "summary lenet extra", "summary lenet --image_size=abc",
    "summary lenet --dropout=x", "summary vgg_a --batch_norm=maybe", "list --x=3"])
def test_a_mistaken_command_is_one_line(line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["network.py", *line.split()])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(network.__file__, run_name="__main__")
    assert re.fullmatch("error: .+\n", capsys.readouterr().err)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_are_brought_to_a_networks_type_and_channels(dtype):
    grey = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2)).to(dtype)
    images = torch.rand(2, 3, 8, 8)
    expected = grey(images.mean(1, keepdim=True).to(dtype))
    assert torch.equal(network.forward(grey, images), expected)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).to(dtype)
    assert network.forward(flat, images).dtype == dtype

    # As x.view(-1, 1, 8, 8).
    numbers = nn.Sequential(nn.Unflatten(1, (-1, 1)), nn.Flatten(0, 1), *grey)
    assert torch.equal(network.forward(numbers, images), expected)

    class Own(nn.Module):  # a convolution of its own; 64 = 8·8, but it is not the first
        def __init__(self):
            super().__init__()
            self.kernel, self.fc = nn.Parameter(torch.ones(4, 3, 5, 5)), nn.Linear(64, 2)

        def forward(self, x):
            return self.fc(F.conv2d(x, self.kernel).flatten(1))

    assert network.forward(Own().to(dtype), images).shape == (2, 2)
    normed = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 2)).to(dtype).eval()
    assert network.forward(normed, images).shape == (2, 2)
    assert network.forward(nn.ReLU(), images).dtype == torch.float32
    assert network.device_of(nn.ReLU()) == torch.device("cpu")
    first = nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.Unflatten(1, (4, 4, 4)),
                          nn.Conv2d(4, 2, 4), nn.Flatten()).to(dtype)  # a linear layer comes first
    assert network.forward(first, torch.rand(2, 3, 16, 16)).shape == (2, 2)


@pytest.mark.parametrize("built, message", [
    (nn.Bilinear(3, 3, 2), "missing 1 required positional argument"),
    (nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), "2×3×8×8.*shapes cannot be multiplied"),
    (nn.Conv2d(4, 2, 3), "2×3×8×8.*4 channels")])
def test_images_a_network_cannot_take_are_one_line(built, message):
    with pytest.raises(ValueError, match=message) as failed:
        network.forward(built, torch.rand(2, 3, 8, 8))
    assert "\n" not in str(failed.value)


def test_what_a_network_does_before_its_forward_is_done():
    hooked = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    hooked.register_forward_pre_hook(lambda _, given: (F.avg_pool2d(given[0], 2),))
    assert network.forward(hooked, torch.rand(2, 3, 16, 16)).shape == (2, 2)
    assert network.largest_output(hooked, 16) == 3 * 16 * 16


def test_an_output_that_is_no_logits_is_said():
    images = torch.rand(2, 3, 8, 8)
    assert network.logits_of(nn.Sequential(nn.Flatten(), nn.Linear(192, 5).half()),
                             images).dtype == torch.float32
    for built, message in ((nn.Conv2d(3, 2, 3), "2×2×6×6"), (nn.LSTM(8, 8), "cannot take"),
                           (nn.Flatten(0), "returns 384"),
                           (nn.MaxPool2d(2, return_indices=True), "a tuple")):
        with pytest.raises(ValueError, match=message):
            network.logits_of(built, images)


def test_a_lack_of_memory_stays_one_whose_caller_tells_what_helps(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(nn.Flatten, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        network.logits_of(nn.Flatten(), torch.rand(2, 3, 8, 8))


def test_probabilities_become_the_logits_of_the_same_probabilities():
    images, softmax = torch.rand(2, 3, 8, 8), nn.Sequential(nn.Flatten(), nn.Linear(192, 5),
                                                            nn.Softmax(dim=1))
    softmax[1].weight.data *= 20
    for dtype, error in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)):
        shares = softmax.to(dtype)(images.to(dtype)).float()
        assert torch.allclose(network.logits_of(softmax, images).softmax(1), shares, atol=error)
    logits = softmax.float()[:2]  # which are no probabilities, though they add up to 1
    logits[1].weight.data.zero_()
    logits[1].bias.data = torch.tensor([2.0, -1.0, 0, 0, 0])
    assert network.logits_of(logits, images)[0].tolist() == [2, -1, 0, 0, 0]
    logits[1].bias.data = torch.tensor([0.25, 0.75, 0, 0, 0])
    with torch.autocast("cpu", torch.bfloat16):  # as networks of this package are used
        assert network.logits_of(logits, images)[0].tolist() == [0.25, 0.75, 0, 0, 0]
    for count in (2, 10, 1000):
        shares = nn.Sequential(nn.Flatten(), nn.Linear(192, count), nn.Softmax(1))
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            assert network.logits_of(shares.to(dtype), torch.randn(50, 3, 8, 8)).max() <= 0


class Grey(nn.Module):
    """Takes colour images, and makes what its one-channel convolution sees itself."""

    def __init__(self, make, channels):
        super().__init__()
        self.make, self.conv, self.fc = make, nn.Conv2d(1, 4, 3), nn.Linear(4 * channels, 2)
        self.register_buffer("luma", torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1))

    def forward(self, x):
        maps = self.conv(self.make(self, x)).mean((2, 3))
        return self.fc(maps.view(len(x), -1))


@pytest.mark.parametrize("make, channels", [
    (lambda self, x: (x * self.luma).sum(1, keepdim=True), 1),
    (lambda _, x: 0.3 * x[:, 0:1] + 0.6 * x[:, 1:2] + 0.1 * x[:, 2:3], 1),
    (lambda _, x: x.reshape(-1, 1, *x.shape[2:]), 3)])
def test_a_network_that_makes_grey_itself_gets_colours(make, channels):
    built, images = Grey(make, channels).eval(), torch.randn(3, 3, 8, 8)
    assert torch.equal(network.forward(built, images), built(images))
    with network.capture(built, ["conv"]) as outputs:
        network.forward(built, images)
    assert len(outputs["conv"]) == 3 * channels
    signal = deconv.project(built, "fc", images)
    assert signal.shape == images.shape and signal.any()
    if channels == 1 and "luma" in make.__code__.co_names:
        fields = network.receptive_fields(built, "conv", 8)
        assert fields[0, 2, 2].tolist() == [2, 2, 5, 5]
    built.fc = nn.Sequential(nn.BatchNorm1d(4 * channels), built.fc)
    built.train()  # one image alone has no statistics
    assert not network.takes_grey(built, images[:1])


def test_other_code_gets_its_images_from_python_as_they_usually_lie():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3 * 64, 2)

        def forward(self, x):
            return self.fc(x.view(-1, 3 * 64))

    built = Flat().eval()
    built.weight = nn.Parameter(torch.randn(2, 2, 2, 2).permute(3, 2, 0, 1))  # as of Keras
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    seen = data.Preprocessing(8, (0.5,) * 3, (0.25,) * 3)
    expected = built(((images / 255 - 0.5) / 0.25).contiguous())
    torch.testing.assert_close(train.predict(built, images, seen), expected.detach())
    assert network.class_gradient(built, seen(images), 1).any()


@pytest.mark.parametrize("end", [
    lambda z: z.softmax(1) + 1e-5, lambda z: z.softmax(1).clamp(1e-4),
    lambda z: sum((z + shift).bfloat16().softmax(1).float() for shift in torch.arange(30).view(
        3, 1, 10)) / 3,
    lambda z: z.softmax(1), lambda z: z.half().softmax(1).float(),
    lambda z: z.bfloat16().softmax(1).float(), lambda z: z.softmax(1).clamp(1e-6, 1 - 1e-6),
    lambda z: z.softmax(1) + 1e-6])
def test_probabilities_are_told_as_they_are(end):
    built = nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False), nn.Identity()).eval()
    images = 10 * torch.randn(20, 3, 8, 8)
    shares = end(built(images))
    built[2].forward = end
    told = network.logits_of(built, images).softmax(1)
    alone = torch.cat([network.logits_of(built, image[None]).softmax(1) for image in images])
    torch.testing.assert_close(alone, told, rtol=0, atol=1e-5)
    torch.testing.assert_close(told, shares / shares.sum(1, keepdim=True), rtol=0, atol=1e-5)


def test_where_no_gradient_reaches_the_images_it_is_said():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                maps = self.backbone(x)
            return self.fc(maps.mean((2, 3)))

    for ask in (network.class_gradient, network.smooth_gradient, network.integrated_gradients):
        with pytest.raises(ValueError, match="no gradient reaches the images"):
            ask(Frozen(), torch.randn(1, 3, 8, 8), 1)


class Frozen(dict):
    """As some keep their settings."""

    def update(self, *_):
        raise TypeError("cannot be changed")


def test_a_look_keeps_settings_and_what_observers_have_seen():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.settings, self.conv = Frozen(width=4), nn.Conv2d(3, 4, 3)
            self.register_buffer("largest", torch.zeros(()))
            self.seen = []

        def forward(self, x):
            self.largest.copy_(torch.maximum(self.largest, x.max()))
            self.seen.append(len(x))
            return self.conv(x).mean((2, 3))

    built, images = Own(), torch.randn(2, 3, 8, 8)
    network.grad_cam(built, images, 1)
    network.receptive_fields(built, "conv", 8)
    visualize.feature_maps(built, ["conv"], images)
    network.layers(built, 8)
    built.register_buffer("kernel", torch.ones(1, 1, 3, 3).expand(4, 1, 3, 3))
    network.class_gradient(built, images, 1)  # an expanded buffer
    assert built.settings == {"width": 4} and not built.largest and built.seen == []


def test_lazy_layers_are_run_once_or_refused(tmp_path, monkeypatch):
    (tmp_path / "lazy_net.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.LazyConv2d(4, 3), "
        "nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))")
    monkeypatch.syspath_prepend(str(tmp_path))
    opened, _ = network.load("lazy_net:make", image_size=8)
    assert type(opened[3]) is nn.Linear and opened[3].in_features == 144
    torch.save(opened.state_dict(), tmp_path / "lazy.pth")
    again, _ = network.load("lazy_net:make", tmp_path / "lazy.pth", image_size=8)
    assert torch.equal(again[3].weight, opened[3].weight)
    assert deconv.project(again, "3", torch.randn(1, 3, 8, 8)).any()
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    torch.save(grey.state_dict(), tmp_path / "grey.pth")
    again, _ = network.load("lazy_net:make", tmp_path / "grey.pth", image_size=8)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network.forward(again, images), grey(images.mean(1, True)))
    lazy = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
    for look in (lambda: network.grad_cam(lazy, torch.randn(1, 3, 8, 8), 1),
                 lambda: visualize.feature_maps(lazy, ["0"], torch.randn(1, 3, 8, 8))):
        with pytest.raises(ValueError, match="lazy layers"):
            look()
    assert lazy(torch.randn(1, 3, 8, 8)).shape == (1, 2)


def test_what_runs_in_vmap_is_not_looked_into():
    class Ensemble(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
            self.stacked = nn.ParameterList([nn.Parameter(torch.stack([value.detach()] * 3))
                                             for value in self.base.parameters()])

        def forward(self, x):
            names = [name for name, _ in self.base.named_parameters()]
            return torch.vmap(lambda weights: torch.func.functional_call(
                self.base, weights, (x,)))(dict(zip(names, self.stacked))).mean(0)

    with pytest.raises(ValueError, match=r"torch\.vmap"):
        visualize.feature_maps(Ensemble(), ["base.0"], torch.randn(1, 3, 8, 8))


def test_a_name_makes_no_network_quantised():
    kind = type("Net", (nn.Linear,), {"__module__": "my.quantized_nets"})
    assert not network.is_quantized(nn.Sequential(kind(2, 2)))


@pytest.mark.filterwarnings("ignore")
def test_images_are_as_torchvisions_weights_want_them(tmp_path, monkeypatch):
    from torchvision import models

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    weights = models.GoogLeNet_Weights.DEFAULT
    torch.save(models.googlenet(init_weights=False).state_dict(),
               tmp_path / "checkpoints" / Path(weights.url).name)
    theirs, images = models.get_model("googlenet", weights=weights).eval(), torch.rand(1, 3, 64, 64)
    theirs.to(memory_format=torch.channels_last)  # as ours is, so that both round alike
    opened, about = network.load("torchvision:googlenet")
    assert opened.transform_input and about.preprocessing.image_size == 224
    assert torch.equal(opened(images), theirs(images))
    for name, side, mean in (("inception_v3", 299, 0.485), ("efficientnet_v2_l", 480, 0.5),
                             ("vit_h_14", 224, 0.485), ("vgg16", 224, 0.485)):
        _, seen = network._torchvision_weights(name, "any.pth")
        assert (seen.image_size, seen.mean[0]) == (side, mean)
    for version in models.ViT_B_16_Weights:  # by the name of the file
        _, seen = network._torchvision_weights("vit_b_16", f"a/{Path(version.url).name}")
        assert [seen.image_size] == version.transforms().crop_size


def test_a_list_of_modules_has_no_operations_of_its_own():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)])

        def forward(self, x):
            return self.parts[1](self.parts[0](x)).mean((2, 3))

    assert [(row.name, row.multiply_adds) for row in network.layers(Listed(), 8)] == [
        ("parts.0", 4 * 27 * 36), ("parts.1", 2 * 36 * 16)]


def test_layers_of_lenet_by_hand():
    rows = {row.name: row[1:] for row in network.layers(on_meta("lenet"), 32)}
    assert rows["conv1.0"] == ("Conv2d", "5×5", "1", "0", (6, 28, 28), 456, 28 * 28 * 6 * 75)
    assert rows["conv2.2"] == ("MaxPool2d", "2×2", "2", "0", (16, 5, 5), 0, 0)
    assert rows["fc.0"] == ("Linear", "", "", "", (120,), 48_120, 48_000)
    assert [*rows][:3] == ["conv1.0", "conv1.1", "conv1.2"] and [*rows][-1] == "fc.4"


@pytest.mark.parametrize("build", [
    lambda: network.build("resnet20"), lambda: network.build("speednet"),
    lambda: torchvision.models.vit_b_16(image_size=32, num_classes=10)])
def test_layers_add_up_to_the_network(build):
    with torch.device("meta"):
        built = build()
    rows = network.layers(built, 32)
    assert sum(row.parameters for row in rows) == network.count_parameters(built)
    assert len({row.name for row in rows}) == len(rows)
    if isinstance(built, torch.nn.Sequential):
        assert sum(row.multiply_adds for row in rows) == network.multiply_adds(built, 32)


def test_the_whole_maps_maximum_has_the_gradient_of_its_first_place():
    x = torch.randint(0, 3, (4, 5, 3, 3)).float()  # many equal values
    pools, gradients = (network.MixedPool(), torch.nn.AdaptiveMaxPool2d(1)), []
    average = torch.nn.functional.adaptive_avg_pool2d(x, 1)
    assert torch.allclose(pools[0](x), (pools[1](x) + average) / 2)
    for pool, rest in zip(pools, (1 / 9, 0)):
        leaf = x.clone().requires_grad_()
        pool(leaf).sum().backward()
        gradients.append(leaf.grad * (2 if rest else 1) - rest)
    assert torch.allclose(*gradients)


@pytest.mark.parametrize("line, shown", [
    (["simple_cnn", "--channels=32"], "32×16×16"), (["simple_cnn", "--channels=32+64"], "64×7×7"),
    (["vgg_a", "--batch_norm=false"], "9,750,922"), (["vgg_a", "--batch-norm"], "9,756,426"),
    (["resnet18", "--width=none"], "11,173,962"), (["--model", "lenet"], "conv1.0"),
])
def test_summary_takes_what_training_takes(line, shown, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    network.command_line(network.COMMANDS, argv=["summary", *line])
    printed = capsys.readouterr().out
    assert shown in printed and max(map(len, printed.splitlines())) <= 80
    network.command_line(network.COMMANDS, argv=["summary", *line, "--stages"])
    assert "conv1.0" not in capsys.readouterr().out


def test_list_shows_every_name_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    network.command_line(network.COMMANDS, argv=["list"])
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in network.NETWORKS)


def test_weights_of_another_program_are_told_from_damage(tmp_path):
    for legacy in (False, True):
        torch.save({"a": torch.zeros(2)}, tmp_path / "theirs.pth",
                   _use_new_zipfile_serialization=not legacy)
        with pytest.raises(OSError, match=r"another program.*`network=torchvision:NAME`"):
            network.load(tmp_path / "theirs.pth")


def test_files_without_end_are_not_read(tmp_path):
    with open(tmp_path / "sparse.pth", "wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(OSError, match=r"sparse\.pth.*too many"):
        network.load(tmp_path / "sparse.pth")
    with open(tmp_path / "half.pth", "wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(OSError, match=r"half\.pth.*damaged"):
        network.load(tmp_path / "half.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(OSError, match=r"pipe\.pth.*not a regular file"):
        network.load(tmp_path / "pipe.pth")
    with pytest.raises(OSError, match=r"none\.pth: No such file"):
        network.load(tmp_path / "none.pth")


@pytest.mark.parametrize("wrapped", [
    lambda weights: weights,
    lambda weights: {"net": {f"module.{name}": weights[name] for name in weights}, "acc": 95.2},
    lambda weights: {"state_dict": {f"model.{name}": weights[name] for name in weights}},
    lambda weights: {"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, "state_dict": {
        f"module._orig_mod.{name}": weights[name] for name in weights}}])
def test_weights_as_other_programs_save_them(wrapped, tmp_path, monkeypatch):
    (tmp_path / "their_net.py").write_text(
        "import network\ndef make():\n    return network.build('lenet')")
    monkeypatch.syspath_prepend(str(tmp_path))
    weights = network.build("lenet").state_dict()
    torch.save(wrapped(weights), tmp_path / "ckpt.pth")
    colours = {"mean": torch.tensor([0.4914, 0.4822, 0.4465]).double(),
               "std": (0.2023, 0.1994, 0.201)}
    opened, about = network.load("their_net:make", tmp_path / "ckpt.pth", image_size=32, **colours)
    assert all(torch.equal(value, weights[name]) for name, value in opened.state_dict().items())
    black = about.preprocessing(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0, :, 0, 0]
    assert black.tolist() == pytest.approx([-0.4914 / 0.2023, -0.4822 / 0.1994, -0.4465 / 0.201])


def test_of_several_state_dicts_none_is_taken():
    built = network.build("lenet")
    with pytest.raises(ValueError, match="several state dicts, ema, model: save the one"):
        network.state_dict_in({"ema": built.state_dict(), "model": built.state_dict()}, built)


def test_code_of_others_has_images_to_itself_as_they_usually_lie(tmp_path, monkeypatch):
    (tmp_path / "tutorial.py").write_text("""
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 8 * 8, 10)
    def forward(self, x):
        x = x.mul_(2).sub_(1) if self.in_place else x * 2 - 1
        x = torch.max_pool2d(self.conv(x), 2)
        return self.fc(x.view(x.size(0), -1))
def make():
    return torch.manual_seed(0) and Net(True)
def careful():
    return torch.manual_seed(0) and Net(False)
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    images, logits = data.draw_shapes(20, seed=1).images, []
    for name in ("make", "careful"):
        opened, about = train.open_network(f"tutorial:{name}", image_size=16)
        logits.append(train.predict(opened, images, about.preprocessing, "full"))
        fields = network.receptive_fields(opened, "fc", 16)
        assert fields.tolist() == [[[[0, 0, 16, 16]]]] * 10
    assert torch.equal(*logits)


def test_weights_keep_the_versions_of_their_modules(tmp_path):
    theirs = torchvision.models.mnasnet0_5(weights=None).state_dict()  # needs its version
    torch.save(theirs, tmp_path / "own.pth")
    opened, _ = network.load("torchvision:mnasnet0_5", tmp_path / "own.pth")
    assert torch.equal(opened.state_dict()["layers.0.weight"], theirs["layers.0.weight"])
    assert opened.layers[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_network_that_was_saved_whole_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "their_lenet.py").write_text(
        "import network, torch\ndef make():\n    return torch.compile(network.build('lenet'))")
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save(network.build("lenet"), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"whole\.pth: ValueError: damaged, or .*state_dict"):
        network.load("their_lenet:make", tmp_path / "whole.pth")
    weights = network.build("lenet").state_dict()
    torch.save({"net": {f"_orig_mod.{name}": weights[name] for name in weights}},
               tmp_path / "a.pth")
    before = torch.get_rng_state()
    opened, _ = network.load("their_lenet:make", tmp_path / "a.pth", image_size=32)
    assert torch.equal(torch.get_rng_state(), before)
    assert [*dict(opened.named_children())] == ["conv1", "conv2", "flatten", "fc"]
    assert torch.equal(opened.fc[0].weight, weights["fc.0.weight"])


def test_one_logit_is_none_of_two():
    about = network.Description("mine:net", (), None)
    assert about.class_names(2) == ("0", "1")
    with pytest.raises(ValueError, match="mine:net: returns one number an image"):
        about.class_names(1)


@pytest.mark.parametrize("head", [[nn.Flatten(2)], [nn.Flatten(2), nn.Conv1d(4, 4, 1, groups=4)]])
def test_maps_whose_rows_were_put_behind_each_other(head):
    convolution = nn.Conv2d(3, 4, 2, 2)  # patches, as in many a transformer
    layers = nn.Sequential(nn.Sequential(convolution, *head), nn.Flatten(), nn.Linear(4 * 64, 2))
    images = torch.rand(2, 3, 16, 16)
    with network.capture(layers, ["0", "0.0"]) as outputs:
        network.forward(layers, images)
    maps = network.captured_maps(layers, outputs, "0", 2)
    assert torch.equal(maps.flatten(2), outputs["0"]) and maps.shape == (2, 4, 8, 8)


class Patches(nn.Module):
    """Tokens N×L×C of an image, as tutorials of transformers make them."""

    def __init__(self):
        super().__init__()
        self.patcher, self.flatten = nn.Conv2d(3, 9, 4, 4), nn.Flatten(2, 3)

    def forward(self, x):
        """N×3×16×16 to N×16×9."""
        return self.flatten(self.patcher(x)).permute(0, 2, 1)


def test_what_a_module_does_with_its_parts_they_do_not_tell():
    layers = nn.Sequential(Patches(), nn.Flatten(), nn.Linear(9 * 16, 2))
    with network.capture(layers, ["0", "0.patcher"]) as outputs:
        network.forward(layers, torch.rand(2, 3, 16, 16))
    maps = network.captured_maps(layers, outputs, "0", 2)
    assert torch.equal(maps, outputs["0.patcher"])


def test_square_maps_of_as_many_channels_as_rows_are_told_by_what_is_inside():
    class Block(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 1

    last = nn.Sequential(nn.Conv2d(3, 8, 2, 2), torchvision.ops.Permute([0, 2, 3, 1]),
                         Block(nn.Linear(8, 8)))
    first = nn.Sequential(nn.Conv2d(3, 8, 2, 2), nn.Identity(), Block(nn.Conv2d(8, 8, 1)))
    for layers, turned in ((last, True), (first, False)):
        with network.capture(layers, ["2"]) as outputs:
            layers(torch.rand(2, 3, 16, 16))
        maps = network.captured_maps(layers, outputs, "2", 2)
        kept = outputs["2"]
        assert torch.equal(maps, kept.permute(0, 3, 1, 2) if turned else kept)


@pytest.mark.parametrize("shortcut", [nn.Identity(), nn.Sequential(), nn.Dropout()])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_look_at_what_hands_its_input_on_changes_nothing(shortcut, in_place):
    class Preactivated(nn.Module):
        def __init__(self):
            super().__init__()
            self.shortcut, self.act = shortcut, nn.ReLU(in_place)
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            kept = self.shortcut(x)
            return self.conv(self.act(x)) + kept  # which the activation may have changed

    block, images = Preactivated().eval(), torch.randn(2, 3, 8, 8)
    expected, kept = block(images.clone()), images.requires_grad_()
    with network.capture(block, ["shortcut", "act"]) as outputs:
        found = block(kept.clone())
    assert torch.equal(found, expected)
    assert torch.equal(outputs["shortcut"], images)  # as it was when the layer gave it
    assert torch.equal(outputs["act"], images.relu())
    if not in_place:  # and gradients reach it
        assert torch.autograd.grad(found.sum(), outputs["shortcut"])[0].eq(1).all()


def test_a_look_at_a_layer_that_works_in_place_changes_nothing():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

        def forward(self, x):
            maps = self.conv(x)
            rectified = self.act(maps)  # the very same tensor
            rectified += 1
            return (maps + rectified).mean((2, 3))

    block, images = Shared().eval(), torch.randn(2, 3, 8, 8)
    expected, kept = block(images), block.conv(images).relu()
    logits, maps = network.logits_and_maps(block, ["act"], images)
    assert torch.equal(logits, expected) and torch.equal(maps["act"], kept)


def test_gradients_reach_what_is_added_to_in_place_afterwards():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.drop, self.fc = nn.Conv2d(3, 3, 1), nn.Dropout(), nn.Linear(3, 2)

        def forward(self, x):
            y = self.drop(self.conv(x))
            y += x  # as behind the stochastic depth of an EfficientNet
            return self.fc(y.square().mean((2, 3)))

    block, images = Residual().eval(), torch.randn(2, 3, 8, 8)
    maps = block.conv(images)
    slopes = (2 * (maps + images) * block.fc.weight[1, :, None, None] / 64).mean((2, 3), True)
    found, layer = network.grad_cam(block, images, 1, "drop")
    assert layer == "drop"
    torch.testing.assert_close(found, (slopes * maps).sum(1).clamp(min=0).detach())


@pytest.mark.parametrize("wish, said", [
    ({"mean": (0.5,)}, "mean=0.5: must be three numbers, one a colour$"),
    ({"std": (1.0, 1.0, 0.0)}, "std=1.0,1.0,0.0: must be three numbers, one a colour, above 0"),
    ({"mean": (0.5, float("nan"), 0.5)}, "mean="), ({"mean": 0.5}, "mean=0.5: must be three"),
    ({"std": ("a", 1, 2)}, "std=a,1,2: must be three numbers"), ({"std": ()}, "std=none: must be"),
    ({"image_size": 0}, "image_size=0: must be at")])
def test_images_that_no_network_wants_are_one_line(wish, said):
    with pytest.raises(ValueError, match=said):
        network.load("torchvision:resnet18", **wish)


MODULES = {"leaves": "import sys; print('hello'); sys.exit(3)", "number": "def make(): return 3",
           "parses": "import argparse; argparse.ArgumentParser().parse_args(['--no'])",
           "wants": "def make(x): pass", "broken": "def make(:", "raises": "raise KeyError('x')"}


@pytest.mark.parametrize("name", [*MODULES, "missing"])
def test_a_module_that_gives_no_network_is_one_line(name, tmp_path, monkeypatch, capsys):
    if name in MODULES:
        (tmp_path / f"odd_{name}.py").write_text(MODULES[name])
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=f"^network=odd_{name}:make: [^\n]+$"):
        network.load(f"odd_{name}:make")
    printed = capsys.readouterr()
    assert not printed.out and not printed.err

