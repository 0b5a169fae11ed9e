"""Figures and what they show: answers worked out by hand, or found a second time by brute force."""

import copy
import csv
import dataclasses
import io
import math
import os
import re
import runpy
import shutil
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.colors import to_rgba
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
import deconv
import network
import train
import visualize

pytestmark = pytest.mark.usefixtures("coarse_figures")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with an untrained LeNet that takes the built-in shapes."""
    folder = tmp_path_factory.mktemp("runs") / "lenet"
    folder.mkdir()
    torch.manual_seed(0)
    lenet = network.build("lenet")
    config = train.Config.create(model="lenet", data="shapes", limit=60, name="lenet")
    for step in range(4):  # one weight moves along a bent line
        lenet.conv1[0].weight.data[0, 0, 0, 0] += 0.1 * step
        lenet.conv1[0].weight.data[1, 0, 0, 0] += 0.1 * (step == 2)
        network.save(folder / f"step-{step:09}.pth", {
            "model": "lenet", "options": {}, "classes": list(data.SHAPES), "image_size": 32,
            "mean": [0.5] * 3, "std": [0.25] * 3, "weights": lenet.state_dict(),
            "settings": dataclasses.asdict(config), "epoch": 1, "step": step})
    (folder / f"step-{3:09}.pth").rename(folder / "last.pth")
    return folder


@pytest.fixture(scope="module")
def opened(run):
    return train.open_network(run, "cpu")


# ---------------------------------------------------------------------------- fields and units


def field_by_formula(layers, position, size):
    """[first, last + 1) of the input that output `position` sees, through (kernel, stride, padding)
    of each layer, first layer first."""
    first = last = position
    for kernel, stride, padding in reversed(layers):
        first, last = first * stride - padding, last * stride - padding + kernel - 1
    return max(first, 0), min(last, size - 1) + 1


def test_receptive_fields_of_a_stack_follow_the_formula():
    layers = [(5, 1, 2), (2, 2, 0), (3, 2, 1), (3, 1, 0)]
    stack = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.MaxPool2d(2),
                          nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
                          nn.AvgPool2d(3, 1))
    fields = network.receptive_fields(stack, "5", 33)
    assert fields.shape == (4, 6, 6, 4) and stack.training
    for row in range(6):
        for column in range(6):
            (top, bottom), (left, right) = (field_by_formula(layers, position, 33)
                                            for position in (row, column))
            assert fields[:, row, column].tolist() == [[top, left, bottom, right]] * 4


def test_receptive_field_of_a_residual_block_is_that_of_its_longest_branch():
    # Two blocks of two 3×3 convolutions; the second block's first one has stride 2.
    blocks = nn.Sequential(
        network.BasicBlock(3, 3, 1, "relu", network.projection_shortcut),
        network.BasicBlock(3, 5, 2, "relu", network.PaddedShortcut))
    for layer, last in (("1", [(3, 2, 1), (3, 1, 1)]), ("1.shortcut", [(1, 2, 0)])):
        fields = network.receptive_fields(blocks, layer, 18)
        expected = [field_by_formula([(3, 1, 1)] * 2 + last, position, 18) for position in range(9)]
        assert [tuple(box) for box in fields[0, 4, :, [1, 3]].tolist()] == expected
        assert [tuple(box) for box in fields[0, :, 8, [0, 2]].tolist()] == expected
    assert fields[3:].abs().sum() == 0  # the shortcut's zero channels look at nothing


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        """N×C×H×W to whatever the function makes of it."""
        return self.function(x)


class Largest(torch.autograd.Function):
    """The largest value of each row, with a gradient of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.amax(3, True).expand_as(x).clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Twice(torch.autograd.Function):
    """Twice x, with a gradient of its own."""

    @staticmethod
    def forward(_ctx, x):
        return 2 * x

    @staticmethod
    def backward(_ctx, gradient):
        return 2 * gradient


@torch.jit.script
def scripted(x):
    return x * (x > x.mean())


@torch.jit.script
def twice(x):
    return 2 * x


def test_channels_of_one_layer_may_have_different_fields():
    small, large = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 5, padding=2, bias=False)
    branches = Lambda(lambda x: torch.cat([small(x), large(x).relu(), x], 1))
    fields = network.receptive_fields(nn.Sequential(branches), "0", 12)
    assert fields[:, 5, 1].tolist() == 2 * [[5, 1, 6, 2]] + 2 * [[3, 0, 8, 4]] + 3 * [[5, 1, 6, 2]]


@pytest.mark.parametrize("gate", [
    torch.sigmoid, F.hardsigmoid, nn.Softmax2d(), lambda x: F.softmin(x, 1)])
def test_behind_a_gate_channels_keep_their_own_fields(gate):
    small, large = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 5, padding=2)
    branches = Lambda(lambda x: torch.cat([gate(small(x)), gate(large(x))], 1))
    fields = network.receptive_fields(nn.Sequential(branches, nn.MaxPool2d(2)), "1", 12)
    assert fields[:, 2, 1].tolist() == 2 * [[4, 2, 6, 4]] + 2 * [[2, 0, 8, 6]]


def test_what_a_mask_of_attention_hides_is_not_seen():
    class HalfAttention(nn.Module):
        def forward(self, x):
            x = x.flatten(2).mT  # 16 tokens, those of either half for each other alone
            half = x.new_zeros(16)
            half[8:] = 1
            mask = (half[:, None] - half).masked_fill(half[:, None] - half != 0, -100.0)
            return ((x @ x.mT + mask).softmax(2) @ x).mT.unflatten(2, (4, 4))

    stack = nn.Sequential(nn.Conv2d(3, 4, 2, 2), HalfAttention())
    fields = network.receptive_fields(stack, "1", 8)
    assert fields[0, :, 1].tolist() == [[0, 0, 4, 8]] * 2 + [[4, 0, 8, 8]] * 2


class AddedInPlace(nn.Module):
    """A block of a pre-activation ResNet, and a matrix product by hand behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.matrix = nn.Conv2d(4, 4, 3, padding=1), nn.Parameter(torch.randn(4, 2))

    def forward(self, x):
        out = self.conv(x)
        out += x
        return (out.movedim(1, -1) @ self.matrix).movedim(-1, 1)


def test_receptive_fields_of_sums_in_place_and_of_products_by_hand():
    stack = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), AddedInPlace())
    assert network.receptive_fields(stack, "1", 16)[:, 4, 5].tolist() == 2 * [[2, 3, 7, 8]]
    linear = nn.Linear(4, 2)
    summed = nn.Sequential(nn.Conv2d(3, 4, 2, 2), Lambda(
        lambda x: linear(x.mean((2, 3))).add_(1.0)))
    assert network.receptive_fields(summed, "1", 6)[:, 0, 0].tolist() == 2 * [[0, 0, 6, 6]]


def test_receptive_fields_where_the_border_breaks_the_formula():
    # The strided 1×1 convolution sees columns 0 and 4 of 7 alone; a third one there is not.
    strided = nn.Sequential(nn.Conv2d(3, 2, 1, 4), nn.Conv2d(2, 2, 3, 1, 1))
    assert network.receptive_fields(strided, "1", 7)[0, 1, 1].tolist() == [0, 0, 5, 5]
    pools = nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=2))
    fields = network.receptive_fields(pools, "1", 10)  # windows at 0, 2, 4, 6 and, cut off, 8
    assert fields[0, :, 0].tolist() == [[0, 0, 7, 7], [2, 0, 9, 7], [4, 0, 10, 7]]
    # The corner units look at padding alone, which says nothing of their rows and columns.
    padded = nn.Sequential(nn.Conv2d(3, 2, 1, padding=(0, 1)))
    assert network.receptive_fields(padded, "0", 3)[0].tolist() == [
        [[0] * 4, *[[row, column, row + 1, column + 1] for column in range(3)], [0] * 4]
        for row in range(3)]
    up = nn.Sequential(nn.AvgPool2d(4), nn.Upsample(scale_factor=2))  # two units see the same
    assert network.receptive_fields(up, "1", 32)[0, :, 0, 0].tolist() == [
        4 * (row // 2) for row in range(16)]


def test_receptive_fields_behind_unpooling():
    def unpooled(x):
        return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)

    fields = network.receptive_fields(nn.Sequential(Lambda(unpooled), nn.Conv2d(3, 3, 1)), "1", 8)
    assert fields[0, 5, 2].tolist() == [4, 2, 6, 4]  # it may be any place of its window


@pytest.mark.parametrize("pool", [
    nn.AdaptiveMaxPool2d(8), nn.AdaptiveMaxPool2d(8, return_indices=True)])
def test_receptive_fields_behind_a_pool_that_gives_its_places_too(pool):
    stack = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Lambda(lambda x: pool(x)[0] if (
        pool.return_indices) else pool(x)))
    assert network.receptive_fields(stack, "1", 16)[:, 2, 3].tolist() == [[3, 5, 7, 9]] * 4


@pytest.mark.parametrize("choose", [
    nn.FractionalMaxPool2d(2, 4), lambda x: x.gather(3, x.argsort(3)), lambda x: x.sort(2)[0],
    lambda x: x * (x > x.detach().median()), lambda x: x * x.mean().item(), Largest.apply,
    lambda x: x * ((x - x.mean((2, 3), True)) > 0), lambda x: x.cummax(2)[0],
    lambda x: torch.where(x > 0, x, x.mean((2, 3), True)), scripted, F.dropout,
    lambda x: x * (x.mean((2, 3), True) > 0).float(),
    lambda x: x.flatten(2)[..., x.abs().sum(1).flatten(1).max(1)[1], None],
    lambda x: x * (x > 0).float().mean(), lambda x: x / x.norm(float("inf")),
    lambda x: x + x.data.mean(), lambda x: x[:, x.mean((0, 2, 3)).argsort()]])
def test_where_one_value_is_chosen_no_receptive_field_is_told(choose):
    with pytest.raises(ValueError, match="layer=1: its receptive fields cannot be found: pixels"):
        network.receptive_fields(nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(choose)), "1", 12)


def test_a_layer_that_hides_all_it_looks_at_is_said_to_do_so():
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(lambda x: x * (x < 0)))
    with pytest.raises(ValueError, match="layer=1: what it computes hides which pixels"):
        network.receptive_fields(stack, "1", 12)


@pytest.mark.parametrize("rectify", [
    torch.relu, torch.sign, lambda x: torch.where(x > 0, x, 0), lambda x: x * (x > 0),
    lambda x: -F.relu(-x),
    lambda x: x.clamp(min=torch.tensor(0.0)), torch.sigmoid, lambda x: x.softmax(1), torch.round,
    lambda x: F.log_softmax(x, 1), lambda x: (x - x.mean(1, True)) / x.std(1, keepdim=True),
    lambda x: F.relu(x) + F.relu(-x)])
def test_a_receptive_field_does_not_depend_on_the_activation(rectify):
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(rectify), nn.MaxPool2d(2)).half()
    weights = [weight.clone() for weight in stack.parameters()]
    assert network.receptive_fields(stack, "2", 16)[:, 3, 2].tolist() == [[6, 4, 10, 8]] * 4
    assert all(map(torch.equal, weights, stack.parameters()))


@pytest.mark.parametrize("call, box", [
    (lambda x, w: F.linear(input=x.mT, weight=w, bias=None).mT, [0, 2, 12, 5]),
    (lambda x, w: F.conv2d(input=x, weight=w.view(4, 4, 5, 5), padding=2), [1, 0, 8, 7]),
    (lambda x, w: F.layer_norm(input=x, normalized_shape=x.shape[3:]), [3, 0, 6, 12]),
    (lambda x, w: F.group_norm(x, num_groups=2), [0, 0, 12, 12]),
    (lambda x, w: F.adaptive_max_pool2d(x, output_size=5), [6, 4, 10, 8])])
def test_a_function_may_be_called_by_the_names_of_its_arguments(call, box):
    weight = torch.randn(40, 10)
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(lambda x: call(x, weight.to(x))))
    assert network.receptive_fields(stack, "1", 12)[0, 3, 2].tolist() == box


def test_a_gate_adds_its_receptive_field():
    """Highway networks (Srivastava et al. 2015): T·f(x) + (1 − T)·x."""
    gate = nn.Conv2d(4, 4, 3, padding=1)
    highway = Lambda(lambda x: gate(x).sigmoid() * x.flip(1) + (1 - gate(x).sigmoid()) * x)
    fields = network.receptive_fields(nn.Sequential(nn.Conv2d(3, 4, 3), highway).double(), "1", 16)
    assert fields[:, 3, 5].tolist() == [[2, 4, 7, 9]] * 4


@pytest.mark.parametrize("norm", [
    F.normalize, lambda x: x / x.norm(dim=1)[:, None]])
def test_a_normalisation_over_the_channels_sees_one_place(norm):
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(norm), nn.Conv2d(4, 4, 3)).double()
    assert network.receptive_fields(stack, "2", 14)[:, 5, 5].tolist() == [[5, 5, 10, 10]] * 4


@pytest.mark.parametrize("norm", [
    nn.LayerNorm([4, 14, 14]), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4),
    nn.BatchNorm2d(4, track_running_stats=False)])
def test_a_normalisation_over_the_image_sees_all_of_it(norm):
    fields = network.receptive_fields(nn.Sequential(nn.Conv2d(3, 4, 3), norm), "1", 16)
    assert fields[:, 3, 2].tolist() == [[0, 0, 16, 16]] * 4


class Masked(nn.Module):
    """A convolution of what a buffer shows of the image."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x * self.mask)


def test_what_a_buffer_masks_is_in_no_receptive_field():
    columns = (torch.arange(12) < 6).float()
    assert network.receptive_fields(Masked(columns), "conv", 12)[0, 5, 5].tolist() == [4, 4, 7, 6]


class Attention(nn.Module):
    """Tokens of 4×4 pixels, each of which looks at those that `mask` shows it."""

    def __init__(self, mask, by_hand):
        super().__init__()
        self.conv, self.by_hand = nn.Conv2d(3, 8, 4, 4), by_hand
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("mask", mask)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = self.conv(x).flatten(2).mT  # N×16×8
        if self.by_hand:
            scores = (x @ x.mT).masked_fill(self.mask == 0, -torch.inf)
            return self.fc(scores.softmax(2) @ x)
        hidden = self.mask == 0 if self.mask.min() == 0 else self.mask
        return self.fc(self.attention(x, x, x, attn_mask=hidden, need_weights=False)[0])


@pytest.mark.parametrize("mask, by_hand", [
    (torch.ones(16, 16).tril(), True), (torch.ones(16, 16).tril(), False),
    (torch.full((16, 16), -1e9).triu(1), False)])
def test_a_token_looks_at_those_that_no_mask_hides(mask, by_hand):
    """Causal attention: token i, of row i // 4, sees tokens 0 to i."""
    fields = network.receptive_fields(Attention(mask, by_hand), "fc", 16)[0].flatten(0, 1)
    assert fields.tolist() == [[0, 0, 4 * (token // 4 + 1), 16 if token > 3 else 4 * (token + 1)]
                               for token in range(16)]


def test_a_mask_that_is_filled_in_place_hides():
    def halves(x):
        half = torch.zeros(16)
        half[8:] = 1
        hidden = (half[:, None] - half).masked_fill_(half[:, None] != half, -100.0)
        return (x @ x.mT + hidden.to(x)).softmax(2) @ x

    stack = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Lambda(lambda x: x.flatten(2).mT), Lambda(halves),
                          nn.Linear(8, 8))
    assert network.receptive_fields(stack, "3", 16)[0, 1, 1].tolist() == [0, 0, 8, 16]


def test_receptive_fields_leave_nothing_behind():
    """Not the positions that a network computed for them in another type, nor their places."""
    class Positions(nn.Conv2d):
        def forward(self, x):
            if not hasattr(self, "positions"):
                self.register_buffer("positions", torch.ones_like(x[:1, :1]), persistent=False)
                self.sizes[x.shape] = x.new_ones(1)
            return super().forward(x + self.positions * self.sizes[x.shape])

    stack = nn.Sequential(Positions(3, 4, 3), nn.ReLU())
    stack[0].sizes, seen = {}, []
    hook = stack[0].register_forward_hook(lambda *_: seen.append(1))
    assert network.receptive_fields(stack, "1", 8)[0, 2, 2].tolist() == [2, 2, 5, 5]
    assert not hasattr(stack[0], "positions") and not stack[0].sizes and stack.training
    assert stack(torch.randn(2, 3, 8, 8)).dtype == torch.float32
    hook.remove()
    count = len(seen)
    stack(torch.randn(2, 3, 8, 8))
    assert len(seen) == count


def test_weights_that_a_network_changes_keep_their_type():
    """EEGNet's convolutions (Lawhern et al. 2018), whose filters have a largest norm."""
    class Constrained(nn.Conv2d):
        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1.0)
            return super().forward(x)

    stack = nn.Sequential(nn.Conv2d(3, 4, 3), Constrained(4, 4, 3))
    assert network.receptive_fields(stack, "1", 8)[0, 1, 1].tolist() == [1, 1, 6, 6]
    assert stack(torch.randn(1, 3, 8, 8)).dtype == torch.float32


def test_weights_that_are_merged_for_evaluation_are_taken_apart_again():
    """LoRA (Hu et al. 2021) as loralib has it: `train` takes out what `eval` adds."""
    class Merged(nn.Linear):
        def train(self, mode=True):
            if mode != self.training:
                self.weight.data += -1.0 if mode else 1.0
                self.weight.requires_grad_(mode)
            return super().train(mode)

    stack = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Dropout(), Merged(4, 2))
    stack[4].eval()
    before = stack[5].weight.clone()
    network.grad_cam(stack, torch.randn(1, 3, 8, 8), 1)
    assert torch.allclose(stack[5].weight, before) and stack[5].weight.requires_grad
    assert [module.training for module in stack] == [True] * 4 + [False, True]


def test_what_modules_keep_of_a_look_is_gone_after_it():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.kept = [], {"input": {}}

        def forward(self, x):
            self.kept["input"].setdefault("x", x)
            self.last.append(x)
            return x + 0 * self.last[0].mean() + 0 * self.kept["input"]["x"].mean()

    stack = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)).eval(), Keeping(), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    for look in (lambda: network.receptive_fields(stack, "2", 8),
                 lambda: network.grad_cam(stack, torch.randn(1, 3, 8, 8), 1),
                 lambda: deconv.project(stack, "2", torch.randn(2, 3, 8, 8))):
        look()
        copy.deepcopy(stack)  # impossible of what leads back to an image
        assert not stack[1].last and stack[1].kept == {"input": {}}


def test_a_network_that_is_compiled_is_looked_into():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()),
                           nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    image = torch.randn(1, 3, 8, 8)
    before = [visualize.feature_maps(layers, ["1.0"], image)["1.0"],
              deconv.project(layers, "1", image), network.grad_cam(layers, image, 1)[0]]
    for part in (layers, layers[1]):
        part.compile(backend="eager")
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                layers(image)
    after = [visualize.feature_maps(layers, ["1.0"], image)["1.0"],
             deconv.project(layers, "1", image), network.grad_cam(layers, image, 1)[0]]
    assert all(map(torch.equal, before, after))
    assert network.receptive_fields(layers, "1.0", 8)[0, 1, 1].tolist() == [1, 1, 6, 6]


def test_grad_cam_takes_no_normalised_heads_for_a_map():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.norm = nn.Linear(8, 24), nn.LayerNorm(4)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return ((self.norm(q) @ self.norm(k).mT).softmax(3) @ v).transpose(1, 2).flatten(2)

    stack = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Lambda(lambda x: F.pad(  # a class token first
        x.flatten(2).mT, (0, 0, 1, 0))), Attention(), Lambda(lambda x: x[:, 0]))
    cam, layer = network.grad_cam(stack, torch.randn(1, 3, 16, 16), 1)
    assert cam.shape == (1, 4, 4) and layer == "2.qkv"


def test_queries_look_at_keys_and_values():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            upper, lower = self.conv(x).flatten(2).mT.chunk(2, 1)
            return self.fc(self.attention(upper, lower, upper)[0])

    fields = network.receptive_fields(Cross(), "fc", 16)  # the last 4 of 8 tokens are a square
    assert fields[0].flatten(0, 1).tolist() == [[0, 0, 16, 16]] * 4


@pytest.mark.parametrize("masked", [False, True])
def test_what_the_fused_attention_hides_is_not_seen(masked):
    mask = torch.ones(16, 16).tril() > 0 if masked else None
    attention = Lambda(lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=mask, is_causal=not masked))
    stack = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Lambda(lambda x: x.flatten(2).mT), attention)
    fields = network.receptive_fields(stack, "2", 16)[0].flatten(0, 1)
    assert fields.tolist() == [[0, 0, 4 * (token // 4 + 1), 16 if token > 3 else 4 * (token + 1)]
                               for token in range(16)]


@pytest.mark.parametrize("attend", [
    lambda q, k, v: torch.einsum("nts,nsc->ntc", torch.einsum("ntc,nsc->nts", q, k).softmax(2), v),
    lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v)])
def test_attention_sees_keys_where_the_values_say_nothing(attend):
    stack = nn.Sequential(nn.Conv2d(3, 64, 4, 4), Lambda(lambda x: x.flatten(2).mT), Lambda(
        lambda x: attend(x, x, torch.ones_like(x))), nn.Linear(64, 2))
    assert network.receptive_fields(stack, "3", 16)[0, 1, 1].tolist() == [0, 0, 16, 16]


def interleaved(x):
    out = torch.zeros(1, 4, 8, 4)
    out[:, :, 1::2] = x
    return out


def frozen(x):
    with torch.no_grad():
        return x / x.abs().amax((1, 2, 3), keepdim=True)


class Positions(nn.Module):
    """Tokens that are added to their positions, in place, in half precision."""

    def __init__(self):
        super().__init__()
        self.positions, self.fc = nn.Parameter(torch.randn(1, 17, 4)), nn.Linear(4, 4)

    def forward(self, x):
        tokens = self.positions.repeat(len(x), 1, 1)
        tokens[:, 1:] += x.half().flatten(2).mT
        return self.fc(tokens)


class Filled(nn.Linear):
    """A linear layer by hand whose weights are written into a matrix first."""

    def forward(self, x):
        matrix = torch.zeros(4, 4)
        matrix[:] = self.weight
        return (x.movedim(1, 3) @ matrix).movedim(3, 1)


@pytest.mark.parametrize("layer, box", [
    (nn.Sequential(Filled(4, 4)), [1, 2, 4, 5]), (Lambda(interleaved), [0, 2, 3, 5]),
    (Lambda(frozen), [0, 0, 6, 6]), (nn.LocalResponseNorm(2), [1, 2, 4, 5]),
    (nn.RMSNorm([4]), [1, 0, 4, 6]), (nn.LogSigmoid(), [1, 2, 4, 5]), (Positions(), [1, 2, 4, 5]),
    (Lambda(lambda x: x.median(1, True)[0]), [1, 2, 4, 5]), (Lambda(twice), [1, 2, 4, 5]),
    (Lambda(lambda x: x.topk(2, 1)[0]), [1, 2, 4, 5]), (Lambda(Twice.apply), [1, 2, 4, 5]),
    (Lambda(lambda x: torch.lerp(x, x.roll(1, 2), 0.5)), [0, 2, 4, 5]),
    (Lambda(lambda x: x + torch.vsplit(x[0], 2)[0].mean()), [0, 0, 6, 6]),
    (Lambda(lambda x: torch.add(x, x.roll(1, 1), alpha=-1)), [1, 2, 4, 5]),
    (Lambda(lambda x: x + -1 * x.roll(1, 1)), [1, 2, 4, 5]),
    (Lambda(lambda x: F.conv2d(x * 1, torch.linspace(0, 1, 4, dtype=x.dtype).view(1, 4, 1, 1))),
     [1, 2, 4, 5])])
def test_receptive_fields_behind_what_looks_like_nothing(layer, box):
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), layer)
    assert network.receptive_fields(stack, "1", 6)[0, 1, 2].tolist() == box


def test_receptive_fields_behind_padding_by_minus_infinity():
    """TensorFlow's pooling; the fields of Conv 3×3, pool 3×3 by 2 and Conv 3×3."""
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConstantPad2d((0, 1, 0, 1), -torch.inf),
                          nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.Conv2d(4, 4, 1))
    assert network.receptive_fields(stack, "7", 20)[0, 3, 3].tolist() == [6, 6, 15, 15]


def test_small_gradients_are_not_lost_in_half_precision():
    class Cast(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(next(self.parameters()).dtype))

    stack = Cast(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(15))).half()
    assert network.receptive_fields(stack, "14", 48)[0, 24, 24].tolist() == [9, 9, 40, 40]


@pytest.mark.parametrize("reentrant", [True, False])
def test_through_activation_checkpoints_no_way_leads_back(reentrant):
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    stack = nn.Sequential(nn.Conv2d(3, 3, 1), Lambda(lambda x: checkpoint(
        inner, x, use_reentrant=reentrant)), nn.Flatten(), nn.Linear(400, 4))
    with pytest.raises(ValueError, match=r"no gradient leads|no receptive field|cannot take"):
        network.receptive_fields(stack, "1", 12)
    if reentrant:
        for explain in (network.grad_cam, network.class_gradient):
            with pytest.raises(ValueError, match="no gradient leads back through the network"):
                explain(stack, torch.rand(1, 3, 12, 12), 1)


class Standardised(nn.Linear):
    """A linear layer whose weights have a mean of 0 (Qiao et al. 2019), by hand."""

    def forward(self, x):
        weight = self.weight - self.weight.mean(1, True)
        return (x.movedim(1, -1) @ weight.T).movedim(-1, 1) + self.bias.view(2, 1, 1)


def test_what_is_made_of_weights_alone_is_a_weight():
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Standardised(4, 2)))
    assert network.receptive_fields(stack, "1.0", 8)[:, 2, 3].tolist() == [[2, 3, 5, 6]] * 2


def turned(x):
    grid = F.affine_grid(torch.tensor([[[0.0, -1, 0], [1, 0, 0]]]).to(x), x.shape[:1] + x.shape[1:],
                         align_corners=False)
    return F.grid_sample(x, grid, "nearest", align_corners=False)


@pytest.mark.parametrize("turn, box", [
    (lambda x: x.mT, (5, 3, 8, 6)), (turned, (5, 6, 8, 9)),
    (lambda x: x.rot90(-1, (2, 3)), (4, 3, 7, 6))])
def test_a_turned_map_has_turned_receptive_fields(turn, box):
    """Unit (3, 5) of maps of 10×10 is unit (5, 3), (5, 9 − 3) or (9 − 5, 3) of those before."""
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(turn))
    assert tuple(network.receptive_fields(stack, "1", 12)[0, 3, 5].tolist()) == box


def test_a_grid_in_a_buffer_has_places_and_no_weights():
    class Sampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Identity()
            self.register_buffer("grid", F.affine_grid(
                torch.tensor([[[0.0, -1, 0], [1, 0, 0]]]), (1, 4, 10, 10), align_corners=False))

        def forward(self, x):
            grid = self.grid.expand(len(x), -1, -1, -1)
            return self.last(F.grid_sample(self.conv(x), grid, "nearest", align_corners=False))

    assert network.receptive_fields(Sampled(), "last", 12)[0, 3, 5].tolist() == [5, 6, 8, 9]


def test_where_the_image_decides_what_is_sampled_any_place_may_be():
    """Spatial transformers (Jaderberg et al. 2015)."""
    locate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6),
                           nn.Unflatten(1, (2, 3)))
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(lambda x: F.grid_sample(
        x, F.affine_grid(locate(x), x.shape, align_corners=False), align_corners=False)))
    assert network.receptive_fields(stack.double(), "1", 12)[0, 3, 5].tolist() == [0, 0, 12, 12]


def test_what_hides_nothing_is_no_mask():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.first, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
            self.register_buffer("scale", scale)
            self.mask = nn.Parameter(torch.full((10, 10), -torch.inf).triu(1), requires_grad=False)

        def forward(self, x):
            x = self.first(x)
            return x + self.conv(x) * self.scale

    for scale in (torch.zeros(4, 1, 1), torch.tensor([1.0, 2.0, 0.0, 3.0])[:, None, None]):
        fields = network.receptive_fields(nn.Sequential(Scaled(scale)), "0", 12)
        assert fields[:, 5, 5].tolist() == [[4, 4, 9, 9]] * 4


def test_where_a_mask_is_0_nothing_is_looked_at():
    class Masked(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.conv, self.mask, self.last = nn.Conv2d(3, 4, 3), mask, nn.Identity()

        def forward(self, x):
            return self.last(self.conv(x) * self.mask)

    window = torch.hann_window(10, periodic=False)
    half = torch.ones(10, 10)
    half[:5] = 0
    for mask in (nn.Buffer(window[:, None] * window), nn.Buffer(window[:, None]),
                 nn.Buffer(half / 2 + half.flip(1) / 4), nn.Parameter(half, requires_grad=False)):
        fields = network.receptive_fields(Masked(mask), "last", 12)
        assert fields[:, 0, 5].tolist() == [[0] * 4] * 4
        assert fields[:, 7, 5].tolist() == [[7, 5, 10, 8]] * 4


def test_with_running_statistics_a_norm_of_each_image_looks_at_one_place():
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True))
    assert network.receptive_fields(stack, "1", 12)[0, 4, 4].tolist() == [4, 4, 7, 7]


@pytest.mark.parametrize("shrink", [
    lambda y, t: y - torch.clamp(y, -t, t), lambda y, t: torch.clamp(y, min=t),
    lambda y, t: [y.sub_(t), y][1], lambda y, t: [y.div_(t), y][1], lambda y, t: y.pow(t + 1),
    lambda y, t: F.prelu(y, t.mean((0, 2, 3)))])
def test_what_a_function_is_given_besides_is_looked_at_too(shrink):
    """As the threshold of a deep residual shrinkage network (Zhao et al. 2020)."""
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(
        lambda y: shrink(y * 1, y.abs().mean((2, 3), keepdim=True))))
    assert network.receptive_fields(stack, "1", 16)[0, 7, 7].tolist() == [0, 0, 16, 16]


def test_a_mask_that_is_taken_off_hides():
    """As the first GPT has it."""
    class Masked(Attention):
        def forward(self, x):
            x = self.conv(x).flatten(2).mT
            scores = (x @ x.mT) * self.mask - 1e4 * (1 - self.mask)
            return self.fc(scores.softmax(2) @ x)

    fields = network.receptive_fields(Masked(torch.ones(16, 16).tril(), True), "fc", 16)[0]
    assert fields[0, :2].tolist() == [[0, 0, 4, 4], [0, 0, 4, 8]]


def test_what_compares_parts_of_the_image_hides_what_it_looks_at():
    stack = nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(
        lambda y: y * (y.abs() > y.abs().mean((2, 3), keepdim=True))))
    with pytest.raises(ValueError, match="its receptive fields cannot be found"):
        network.receptive_fields(stack, "1", 16)


def test_layers_that_are_no_square_of_tokens_are_refused():
    """MLP-Mixer (Tolstikhin et al. 2021) mixes tokens as the last dimension."""
    mixer = nn.Sequential(nn.Conv2d(3, 128, 4, 4), nn.Flatten(2), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"layer=2: returns 128×64 .* no square of tokens"):
        visualize.feature_maps(mixer, ["2"], torch.zeros(1, 3, 32, 32))


def test_a_sequence_is_no_map_of_tokens():
    """The columns of a map, or its rows, as a recurrent network reads them."""
    class Last(nn.Module):
        def __init__(self, sequence):
            super().__init__()
            self.maps = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2))
            self.sequence, self.step = sequence, nn.Linear(64, 8)
            self.rnn, self.fc = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.rnn(self.step(self.sequence(self.maps(x))))[0][:, -1])

    image = torch.randn(1, 3, 32, 32)
    for sequence in (lambda x: x.permute(0, 3, 1, 2).flatten(2), lambda x: x.mT.flatten(1).view(
            1, 16, 64)):
        built = Last(sequence)
        assert network.grad_cam(built, image, 1)[1] == "maps"
        for look in (visualize.feature_maps, lambda built, layers, image: deconv.project(
                built, layers[0], image)):
            with pytest.raises(ValueError, match=r"layer=step: returns 16×64 .*|layer=step: "
                                                 r"returns 16×8 .*none of the network's maps"):
                look(built, ["step"], image)
    rows = nn.Sequential(nn.Conv2d(3, 4, 4, 4), Lambda(lambda x: x.mean(3)), nn.Conv1d(4, 2, 1))
    assert visualize.feature_maps(rows, ["2"], torch.zeros(1, 3, 64, 64))["2"].shape == (
        1, 2, 1, 16)


def test_grad_cam_counts_positions_where_channels_come_first():
    """Self-attention as SAGAN has it (Zhang et al. 2019): as many channels as rows."""
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Conv1d(32, out, 1) for out in (8, 8, 32))

        def forward(self, x):
            flat = x.flatten(2)
            weights = (self.query(flat).mT @ self.key(flat)).softmax(1)
            return x + (self.value(flat) @ weights).view_as(x)

    built = nn.Sequential(nn.Conv2d(3, 32, 4, 4), Attention(), nn.Conv2d(32, 32, 3, padding=1),
                          nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    assert network.grad_cam(built, torch.randn(1, 3, 32, 32), 1)[1] == "3"


def test_what_is_checkpointed_runs_again_in_the_mode_it_ran_in():
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
    built = nn.Sequential(Lambda(lambda x: checkpoint(block, x, use_reentrant=False)),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    built.block = block
    built.forward = lambda x: built[3](built[2](built[1](built[0](x))))
    built.train()
    before = copy.deepcopy(block.state_dict())
    image = torch.randn(2, 3, 8, 8)
    for look in (lambda: network.class_gradient(built, image, 1),
                 lambda: network.grad_cam(built, image, 1, "0")):
        look()
        assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())


def test_filters_that_the_image_decides_on_look_at_all_of_it():
    """Conditionally parameterised convolutions (Yang et al. 2019)."""
    gate, experts = nn.Linear(4, 2), torch.randn(2, 4, 4, 3, 3)

    def convolved(x):
        shares = gate(x.mean((2, 3))).sigmoid()  # 1×2
        return F.conv2d(x, (shares.view(2, 1, 1, 1, 1) * experts.to(x)).sum(0))

    stack = nn.Sequential(nn.Conv2d(3, 4, 3), Lambda(convolved)).double()
    assert network.receptive_fields(stack, "1", 12)[0, 3, 5].tolist() == [0, 0, 12, 12]


@pytest.mark.parametrize("quotient", [
    torch.div, torch.divide, torch.true_divide, torch.subtract, lambda a, b: a * b.reciprocal(),
    lambda a, b: a * b ** -1, lambda a, b: a + b.negative()])
def test_no_quotient_and_no_difference_hides_what_it_looks_at(quotient):
    one, other = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    ratio = Lambda(lambda x: quotient(one(x), other(x)))
    fields = network.receptive_fields(nn.Sequential(ratio, nn.Conv2d(4, 4, 3)).double(), "1", 12)
    assert fields[0, 0, :4].tolist() == [[0, column, 5, column + 5] for column in range(4)]


@pytest.mark.parametrize("model, layer", [("vgg11", "conv5"), ("resnet20", "conv4_x")])
def test_receptive_fields_need_no_float64(model, layer, monkeypatch):
    built = network.build(model)
    fields = network.receptive_fields(built, layer, 32)
    monkeypatch.setattr(network, "exact_type", lambda device: torch.float32)  # as on MPS
    assert torch.equal(network.receptive_fields(built, layer, 32), fields)


def test_frozen_weights_are_constants_too():
    frozen = torchvision.ops.FrozenBatchNorm2d(64)
    frozen.weight.normal_()
    calls = []
    stack = nn.Sequential(nn.Conv2d(3, 64, 3), frozen, Lambda(lambda x: calls.append(x) or x))
    fields = network.receptive_fields(stack, "2", 16)
    assert fields[:, 3, 2].tolist() == [[3, 2, 6, 5]] * 64
    assert len(calls[0][0].flatten(1).unique(dim=0)) == 1  # one kind of channel: one probe


def test_receptive_fields_of_large_images_and_without_onednn():
    # 7×7 with stride 2; then, of a map with half the lines, what one, three and five lines see.
    with torch.backends.mkldnn.flags(enabled=False):
        fields = network.receptive_fields(network.build("resnet18"), "conv1.0", 32)
        assert fields[0, 16, 16].tolist() == [15, 15, 18, 18]
        fields = network.receptive_fields(network.build("resnet18_imagenet"), "conv2_x", 224)
    layers = [(7, 2, 3), (3, 2, 1), *[(3, 1, 1)] * 4]
    expected = [field_by_formula(layers, row, 224) for row in range(56)]
    assert [tuple(box) for box in fields[63, :, 9, [0, 2]].tolist()] == expected
    assert [tuple(box) for box in fields[0, 50, :, [1, 3]].tolist()] == expected


def test_feature_maps_of_tokens_and_of_channels_that_come_last():
    x, patches = torch.randn(2, 3, 8, 8), nn.Conv2d(3, 5, 2, 2)
    maps = patches(x)
    last = nn.Sequential(patches, Lambda(lambda x: x.permute(0, 2, 3, 1)))
    assert torch.equal(visualize.feature_maps(last, ["1"], x)["1"], maps)
    tokens = nn.Sequential(patches, nn.Flatten(2), Lambda(lambda x: torch.cat(
        [torch.zeros(2, 1, 5), x.transpose(1, 2)], 1)))  # the first is the class token
    assert torch.equal(visualize.feature_maps(tokens, ["2"], x)["2"], maps)
    assert network.receptive_fields(last, "1", 8)[4, 1, 3].tolist() == [2, 6, 4, 8]
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    found = visualize.top_activations(last, "1", images, data.Preprocessing(8, (0,) * 3, (1,) * 3),
                                      [4], 1)
    assert found[0].item() == pytest.approx(patches(images / 255)[:, 4].max().item())


def test_the_kind_of_a_layer_tells_where_its_channels_are():
    stack = nn.Sequential(nn.Conv2d(3, 6, (1, 3)), Lambda(lambda x: x.permute(0, 2, 3, 1)),
                          nn.Linear(6, 4), nn.LayerNorm(4))
    maps = visualize.feature_maps(stack, ["0", "2", "3"], torch.randn(2, 3, 4, 6))
    assert maps["0"].shape == (2, 6, 4, 4) and torch.equal(
        maps["3"].permute(0, 2, 3, 1), stack[3](maps["2"].permute(0, 2, 3, 1)))
    wide = visualize.feature_maps(nn.Sequential(nn.Conv2d(3, 6, (1, 3))), ["0"],
                                  torch.randn(2, 3, 6, 6))["0"]
    assert wide.shape == (2, 6, 6, 4)


@pytest.mark.parametrize("layer, message", [
    (Lambda(lambda x: (x, x)), "a tuple"), (Lambda(lambda x: x.argmax(1)), "int64"),
    (Lambda(lambda x: x.flatten(0, 1)[:, None]), "6 maps or vectors for 2")])
def test_what_is_no_feature_map_is_refused(layer, message):
    with pytest.raises(ValueError, match=f"layer=0: returns .*{message}"):
        visualize.feature_maps(nn.Sequential(layer), ["0"], torch.randn(2, 3, 4, 4))


def test_patches_that_the_border_cuts_are_filled_with_grey():
    images = torch.arange(16.0).view(1, 1, 4, 4).expand(2, 3, 4, 4) / 16
    boxes = torch.tensor([[0, 0, 2, 3], [1, 1, 4, 4]])  # at the top left corner, and inside
    cut = visualize.cut_patches(images, boxes)
    assert cut.shape == (2, 3, 3, 3)
    grey = visualize.GREY
    assert cut[0, 0].tolist() == [[pytest.approx(grey)] * 3, [0, 1 / 16, 2 / 16],
                                  [4 / 16, 5 / 16, 6 / 16]]
    assert torch.equal(cut[1], images[1, :, 1:, 1:])
    # Of two units, the second has a smaller field: at the top it is whole, and stays where it is.
    boxes = torch.tensor([[0, 0, 3, 3], [1, 1, 4, 4], [0, 1, 2, 3], [1, 1, 3, 3]])
    cut = visualize.cut_patches(images[:1].expand(4, -1, -1, -1), boxes, units=2)
    assert torch.equal(cut[2, :, :2, :2], images[0, :, :2, 1:3])
    assert torch.equal(cut[3, :, :2, :2], images[0, :, 1:3, 1:3]) and (cut[2:, :, 2] == grey).all()


def test_top_activations_are_those_of_brute_force(opened):
    lenet, about = opened
    images = data.draw_shapes(40, seed=3).images
    with network.capture(lenet, ["conv2"]) as outputs, torch.no_grad():
        lenet(about.preprocessing(images))
    maps = outputs["conv2"][:, [3, 0]]
    values, numbers, positions = visualize.top_activations(
        lenet, "conv2", images, about.preprocessing, [3, 0], 5)
    for unit in range(2):
        peaks = maps[:, unit].amax((1, 2))
        assert numbers[unit].tolist() == peaks.argsort(descending=True)[:5].tolist()
        found = maps.flatten(2)[numbers[unit], unit, positions[unit]]
        assert torch.allclose(found, values[unit]) and torch.allclose(found, peaks[numbers[unit]])
    with pytest.raises(ValueError, match=r"16.*0 to 15"):
        visualize.top_activations(lenet, "conv2", images, about.preprocessing, [16], 5)


def test_capture_hands_on_a_copy_and_takes_its_hooks_off_after_an_exception():
    stack = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True))
    with network.capture(stack, ["0"]) as outputs:
        stack(torch.randn(1, 3, 4, 4))
    assert outputs["0"].min() < 0  # as it was before the activation in place
    with pytest.raises(RuntimeError), network.capture(stack, ["0", "1"]):
        stack(torch.randn(1, 5, 4, 4))
    assert not any(module._forward_hooks for module in stack.modules())


def test_a_unit_that_no_image_excites_has_no_patches():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()).eval()
    model[0].weight.data[1], model[0].bias.data[1] = 0, 0
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    prep = data.Preprocessing(8, (0.5,) * 3, (0.25,) * 3)
    values, chosen, _, boxes = visualize.top_fields(model, "1", images, prep, [0, 1], 2)
    patches = visualize.cut_patches(prep.pictures(chosen), boxes).unflatten(0, (2, 2))
    assert (patches[0] != visualize.GREY).any() and patches.shape[-1] == 3
    assert values[1].tolist() == [0, 0] and (patches[1] == visualize.GREY).all()


def test_gradients_reach_what_capture_keeps():
    # d(sum of relu(x)²)/d relu(x) = 2·relu(x), and at x itself it is masked by x > 0: the same.
    stack = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(inplace=True))
    with network.capture(stack, ["0", "1"]) as outputs:
        loss = stack(torch.randn(1, 3, 4, 4)).square().sum()
    before, after = torch.autograd.grad(loss, [outputs["0"], outputs["1"]])
    assert torch.equal(after, 2 * outputs["0"].relu())
    assert torch.equal(before, after)


# ---------------------------------------------------------------------------- names, axes, files

NAMES = ("cash_$1_$5", "_name", "$x^{", r"\frac", "100 % {0}", "a\\$b$c")


def texts_of(figure):
    """All texts in a figure that was drawn, as they are shown; none of them is a formula."""
    from matplotlib.text import Text

    figure.savefig(io.BytesIO(), dpi=20)
    texts = figure.findobj(Text)
    assert not any(text.get_parse_math() for text in texts)
    return [text.get_text() for text in texts]


@pytest.mark.parametrize("draw", [
    lambda: visualize.draw_confusion(torch.eye(6), NAMES, " ".join(NAMES)),
    lambda: visualize.draw_pr_curves([(torch.ones(2), torch.ones(2), 1.0)] * 6, NAMES, NAMES[0]),
    lambda: visualize.draw_predictions(torch.zeros(6, 3, 4, 4), torch.arange(6),
                                       torch.eye(6).roll(1, 1), NAMES, NAMES[0]),
    lambda: visualize.image_grid(torch.zeros(6, 3, 4, 4), NAMES, 1, NAMES[0], row_titles=NAMES),
    lambda: visualize.draw_curves({name: [METRICS] for name in NAMES}),
])
def test_names_from_outside_are_shown_as_they_are(draw):
    shown = texts_of(draw())
    for name in NAMES:
        assert any(name in text for text in shown), name


@pytest.mark.filterwarnings("error::UserWarning")  # that there is no room for all
def test_of_long_names_the_end_is_shown():
    names = [f"Animalia_Chordata_Aves_{'x' * 60}_Corvus_{name}" for name in ("corax", "coron")]
    for draw in (lambda: visualize.draw_confusion(torch.eye(2), names, ""),
                 lambda: visualize.draw_predictions(torch.zeros(6, 3, 4, 4), torch.arange(6) % 2,
                                                    torch.eye(2).repeat(3, 1), names, "")):
        shown = texts_of(draw())
        assert {"Animalia_Cho…orvus_corax", "Animalia_Cho…orvus_coron"} <= {*shown}
    curves = [(torch.ones(2), torch.ones(2), 1.0)] * 2
    assert "Animali…_corax · 1.000" in texts_of(visualize.draw_pr_curves(curves, names, ""))


def test_long_names_that_differ_stay_different():
    signs = [f"{no} passing {by} vehicles over 3.5 metric tons of weight, 7 to 9 a.m. on Sundays"
             for no in ("No", "End of no") for by in ("of", "by")]
    short = visualize.shortened(signs)
    assert len({*short}) == 4 and visualize.shortened(["cat", *signs])[0] == "cat"
    assert max(map(len, short)) <= 40
    assert visualize.shortened(signs[:1]) == [f"{signs[0][:12]}…{signs[0][-11:]}"]


METRICS = {name: [0.5, 0.6] for name in train.COLUMNS}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_share_is_told_that_cannot_be(share):
    texts = texts_of(visualize.draw_curves({"a": [{name: [share] * 2 for name in METRICS}]}))
    told = [float(text[:-1]) for text in texts if text.endswith("%")]
    tick = visualize.new_figure(2, 2, "").add_subplot().xaxis
    visualize.percent(tick)
    assert tick.get_major_formatter()(1.0000000000000002) == "100%"
    assert share * 100 in told and all(0 <= number <= 100 for number in told)


def test_the_true_class_is_shown_with_the_likeliest():
    logits = torch.arange(12.0).flip(0)[None].repeat(2, 1)  # class 0 is the likeliest
    figure = visualize.draw_predictions(torch.zeros(2, 3, 4, 4), torch.tensor([11, 9]), logits,
                                        [*map(str, range(12))], "")
    for axes, last in ((figure.axes[1], "11"), (figure.axes[3], "9")):
        assert [text.get_text() for text in axes.get_yticklabels()] == [*"012345678", last]
        assert axes.patches[-1].get_facecolor() == to_rgba(visualize.COLORS[0])


def test_a_name_of_a_run_with_an_underscore_is_in_the_legend():
    figure = visualize.draw_curves({"_a": [METRICS], "$b$ $": [METRICS]})
    figure.savefig(io.BytesIO(), dpi=20)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "_a, training", "_a, validation", "$b$ $, training", "$b$ $, validation"]
    styles = {(line.get_marker(), line.get_markerfacecolor(), line.get_linestyle())
              for line in figure.axes[0].lines}
    assert len(styles) == 4  # told apart also where each is a single point


@pytest.mark.parametrize("low, high", [
    (2.30, 2.31), (1e-4, 30), (0.9, 1.1), (0.5, 3), (1e-9, 1e9), (2.3, 2.3000001), (7, 4e4)])
def test_no_two_ticks_of_a_logarithmic_axis_read_the_same(low, high):
    ticks = visualize.log_ticks(low, high)
    assert 3 <= len(set(ticks.values())) == len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    assert all(abs(float(text) - tick) < (high - low) / 10 for tick, text in ticks.items())


def test_ticks_of_decades():
    assert [*visualize.log_ticks(1, 2.1).values()] == ["1", "1.25", "1.5", "1.75", "2"]
    assert visualize.distinct([2.301, 2.302, 2.312]) == ["2.301", "2.302", "2.312"]
    assert visualize.log_ticks(0.01, 10) == {0.01: "0.01", 0.1: "0.1", 1: "1", 10: "10"}
    assert visualize.distinct([1.1, 2.0432, 1000]) == ["1.1", "2.04", "1000"]
    assert [*visualize.log_ticks(1, 12).values()] == ["1", "2", "5", "10"]
    axes = visualize.draw_landscape_line([{"x": x, "test/loss": 2.3 + x / 100, "test/accuracy": 0.5}
                                          for x in (0.0, 1.0)], "").axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len({*labels}) == len(labels) >= 3 and "logarithmic" in axes.get_ylabel()


def test_a_title_is_broken_where_it_is_wider_than_its_figure():
    figure = visualize.image_grid(torch.zeros(1, 3, 4, 4), suptitle="word " * 40)
    texts_of(figure)
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height


@pytest.mark.parametrize("out, name", [
    ("f.PNG", "f.PNG"), ("f.jpg", "f.jpg"), ("f.Svg", "f.Svg"), ("f.pdf", "f.pdf"),
    ("new/f.eps", "new/f.eps"), ("some", "some/filters-conv1-rgb.png"),
    ("some.v2/", "some.v2/filters-conv1-rgb.png"), ("4.1-x", "4.1-x/filters-conv1-rgb.png"),
    ("lr0.1", "lr0.1/filters-conv1-rgb.png"), ("there.1", "there.1/filters-conv1-rgb.png"),
    ("~/deep", "home/deep/filters-conv1-rgb.png"), ("~/f.png", "home/f.png")])
def test_out_names_a_file_or_a_folder(out, name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "there.1").mkdir()
    for _ in range(2):  # what was made here may be made anew
        assert (visualize.filters(str(run), out=out).path).resolve() == tmp_path / name
    assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize("out", ["notes.txt", "f.gif", "f.png.bak", "train.py"])
def test_a_file_of_another_kind_is_refused(out, run, tmp_path):
    with pytest.raises(ValueError, match=re.escape(out)):
        visualize.filters(str(run), out=str(tmp_path / out))
    assert not [*tmp_path.iterdir()]


def test_only_figures_made_here_are_replaced(run, tmp_path):
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    own = PngInfo()
    own.add_text("Software", "Matplotlib version3.10.0, https://matplotlib.org/")  # drawn by others
    holiday, pipe = tmp_path / "holiday.png", tmp_path / "pipe.png"
    Image.new("RGB", (4, 4)).save(holiday, pnginfo=own)
    os.mkfifo(pipe)
    before = holiday.read_bytes()
    for command in (visualize.filters, visualize.confusion, visualize.curves):
        for path in (holiday, pipe):
            with pytest.raises(FileExistsError, match=path.name):
                command(str(run), out=str(path))
    assert holiday.read_bytes() == before and pipe.is_fifo()
    old = visualize.figure_path(run, "filters-conv1-rgb")  # as an earlier version left it
    old.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(old, pnginfo=own)
    assert visualize.filters(str(run)).path == old and visualize.SIGN.encode() in old.read_bytes()
    drawn = visualize.filters(str(run), out=str(tmp_path / "drawn.png")).path
    with pytest.raises(ValueError, match=r"out=.*the picture that is looked at"):
        visualize.where(str(run), image=str(drawn), out=str(drawn))
    Image.new("RGB", (4, 4)).save(holiday)
    before = holiday.read_bytes()
    for name in ("filters-conv1-rgb.png", "confusion.png"):  # their names in a folder
        (tmp_path / name).write_bytes(before)
    for command in (visualize.filters, visualize.confusion):
        with pytest.raises(FileExistsError, match="no figure made here"):
            command(str(run), out=str(tmp_path))
    assert {path.read_bytes() for path in tmp_path.glob("[cf]*.png")} == {before}
    thesis = tmp_path / "thesis" / "figures" / "confusion.png"  # drawn by others, as they call it
    thesis.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(thesis, pnginfo=own)
    for out in (thesis, thesis.parent):
        with pytest.raises(FileExistsError, match="no figure made here"):
            visualize.confusion(str(run), out=str(out))
    (tmp_path / "figures").write_text("a file")
    with pytest.raises(OSError, match=r"figures.*cannot be written"):
        visualize.filters(str(run), out=str(tmp_path / "figures"))


# ---------------------------------------------------------------------------- predictions


def test_confusion_matrix_by_hand():
    labels = torch.tensor([199], dtype=torch.uint8)  # whose pairs have no room in a byte
    assert visualize.confusion_matrix(labels, labels, 200)[199, 199] == 1
    matrix = visualize.confusion_matrix(torch.tensor([0, 0, 1, 2, 2, 2]),
                                        torch.tensor([0, 1, 1, 0, 2, 2]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_a_thousand_classes_have_a_figure_too(run, tmp_path, monkeypatch):
    names = [f"class {number}" for number in range(300)]
    figure = visualize.draw_confusion(torch.eye(300), names, "")
    assert 50 < len({text for text in texts_of(figure) if text in names}) <= 100
    labels = torch.arange(290).repeat(2)
    test, logits = data.Split(torch.zeros(580, 3, 1, 1), labels), torch.randn(580, 300)
    logits[range(580), labels] += 3
    logits[7] = logits[297] = 9 * F.one_hot(torch.tensor(299), 300)
    monkeypatch.setattr(visualize, "open_test", lambda *_, **__: (None, network.Description(
        "m", tuple(names), None), test))
    monkeypatch.setattr(visualize, "predicted", lambda *_: (logits, names))
    shown = texts_of(visualize.pr_curves(str(run), out=str(tmp_path)))
    drawn = [text for text in shown if " · " in text]
    assert len(drawn) == 100 and drawn[0].startswith("class 7 · ")
    assert any("the 100 lowest" in text for text in shown)


def test_precision_and_recall_by_hand():
    scores = torch.tensor([0.9, 0.8, 0.8, 0.3, 0.1])
    positive = torch.tensor([True, False, True, False, True])
    precision, recall, average = visualize.precision_recall(scores, positive)
    assert precision.tolist() == pytest.approx([1, 2 / 3, 1 / 2, 3 / 5])
    assert recall.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3, 1])
    assert average == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert math.isnan(visualize.precision_recall(scores, torch.zeros(5, dtype=torch.bool))[2])
    # Where all scores are the same there is one threshold, and its point is seen.
    curve = visualize.precision_recall(scores * 0, positive)
    line = visualize.draw_pr_curves([curve], ["a"], "").axes[0].lines[-1]
    assert line.get_xydata().tolist() == [pytest.approx([1, 3 / 5])] and line.get_marker() == "o"


def test_a_class_without_images_has_no_accuracy_and_no_average_precision(monkeypatch, run,
                                                                         tmp_path):
    figure = visualize.draw_confusion(torch.tensor([[3, 1, 0], [0, 0, 0], [2, 0, 2]]),
                                      ("a", "b", "c"), "")
    shown = texts_of(figure)
    assert "75.0%" in shown and "50.0%" in shown and "–" in shown and "0.0%" not in shown
    split = data.draw_shapes(30, seed=1)
    kept = split.labels != 3
    test = data.Split(split.images[kept], split.labels[kept])
    monkeypatch.setattr(train, "open_test", lambda *_: test)
    shown = texts_of(visualize.pr_curves(str(run), out=str(tmp_path)))
    averages = {text.partition(" · ")[0]: text.partition(" · ")[2] for text in shown
                if " · " in text}
    assert averages.pop(data.SHAPES[3]) == "–"
    mean = sum(map(float, averages.values())) / 9
    [title] = [text for text in shown if "mean" in text]
    assert float(re.search(r"mean (\S+)\)", title)[1]) == pytest.approx(mean, abs=2e-3)


def test_outputs_that_are_not_finite_are_said_to_be_so(run, tmp_path, few_shapes):
    checkpoint = network.read(run / "last.pth")
    for value in (math.nan, 1e30):  # weights that are no numbers, or too large for their outputs
        for weight in checkpoint["weights"].values():
            weight.fill_(value)
        network.save(tmp_path / "last.pth", checkpoint)
        for command, flags in ((visualize.confusion, {}), (visualize.pr_curves, {}),
                               (visualize.where, {}), (deconv.occlusion, {}),
                               (visualize.landscape, {"images": 20, "points": 3})):
            with pytest.raises(ValueError, match="finite"):
                command(str(tmp_path), **flags)


def test_runs_have_the_name_of_their_folder_and_other_losses_are_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"label_smoothing": 0.1}')
    for objective, label in ((math.nan, f"{tmp_path.name} (training loss with label smoothing)"),
                             (2.0, tmp_path.name)):
        monkeypatch.setattr(train, "read_metrics", lambda _, objective=objective: METRICS | {
            "train/objective": [objective] * 2})
        assert [*visualize.group_runs([tmp_path])] == [label]
    (tmp_path / "config.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert [*visualize.group_runs(["."])] == [tmp_path.name]
    (tmp_path / "config.json").write_text('{"augment": ["flip", "cutmix"]}')
    assert [*visualize.group_runs(["."])] == [f"{tmp_path.name} (training on mixed images)"]


def test_a_comma_in_a_runs_path_is_part_of_it(tmp_path):
    folder = tmp_path / "a,b"
    folder.mkdir()
    (folder / "metrics.csv").write_text(
        ",".join(train.COLUMNS) + "\n" + ",".join("1" for _ in train.COLUMNS) + "\n")
    figure = visualize.curves(str(folder), out=str(tmp_path))
    assert "a,b, training" in texts_of(figure)


def test_predictions_in_the_order_of_loss_and_of_confidence(run, tmp_path, monkeypatch):
    test = data.draw_shapes(40, seed=1)
    monkeypatch.setattr(train, "open_test", lambda *_: test)
    logits = torch.randn(40, 10)
    shown = []
    monkeypatch.setattr(train, "predict", lambda _network, images, *_others, **_more: torch.stack([
        logits[[(image == other).all() for other in test.images].index(True)] for image in images]))
    monkeypatch.setattr(visualize, "draw_predictions", lambda images, labels, logits, *_: (
        shown.append((logits, labels)), visualize.new_figure(1, 1, ""))[1])
    for only, order in (("all", "loss"), ("wrong", "confidence")):
        visualize.predictions(str(run), only, 3, order, out=str(tmp_path))
    losses = nn.functional.cross_entropy(logits, test.labels, reduction="none")
    assert torch.equal(shown[0][0], logits[losses.topk(3).indices])
    wrong = logits[logits.argmax(1) != test.labels]
    assert torch.equal(shown[1][0], wrong[wrong.softmax(1).amax(1).topk(3).indices])


def test_a_picture_whose_name_is_no_text(run, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (32, 32)).save(path)
    figure = visualize.features(str(run), image=str(path), out=str(tmp_path / "x.png"))[0]
    assert any("caf?.png" in text for text in texts_of(figure))


def test_a_home_folder_is_known_from_python_too(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").symlink_to(run)
    assert visualize.filters("~/mine").path.parent == tmp_path / "mine" / "figures"
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/mine: no run with a finished epoch"):
        visualize.curves("~/mine")
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    assert data.read_image("~/x.png").shape == (3, 32, 32)


def test_predictions_of_pictures_of_ones_own(run, tmp_path, refused):
    (tmp_path / "own").mkdir()
    for name, image in zip(("one.png", "two.jpg", "three.bmp"), data.draw_shapes(3, seed=3).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "own" / name)
    net, about = train.open_network(run, "cpu")
    picture = data.read_image(tmp_path / "own" / "one.png")[None]
    answer = about.classes[train.predict(net, picture, about.preprocessing).argmax()]
    figure = visualize.predictions(str(run), image=tmp_path / "own", out=str(tmp_path))
    headings = [text for text in texts_of(figure) if "\n" in text]
    assert headings[0] == f"one.png\n{answer}" and len(headings) == 3
    assert len(visualize.predictions(str(run), image=tmp_path / "own" / "two.jpg", count=1,
                                     out=str(tmp_path)).axes) == 2
    (tmp_path / "own" / "zbad.png").write_text("x")
    *made, error = visualize.predictions(str(run), image=tmp_path / "own", out=str(tmp_path))
    assert len(made[0].axes) == 6 and "zbad.png: cannot be read" in str(error)
    with pytest.raises(OSError, match=r"zbad\.png: cannot be read"):
        visualize.predictions(str(run), image=tmp_path / "own" / "zbad.png", out=str(tmp_path))
    assert "are for test images" in refused(visualize.COMMANDS, [
        "predictions", str(run), f"--image={tmp_path / 'own'}", "--only=wrong"])


# ---------------------------------------------------------------------------- a class's reasons


def small_network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                         nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
                         nn.Flatten(), nn.Linear(6 * 5 * 5, 7)).eval()


def test_grad_cam_of_a_linear_head_by_hand():
    # The head takes the mean of map 0, twice that of map 1 away, and nothing of map 2: with four
    # positions the gradients are 1/4, −2/4 and 0, and so are their means.
    network_ = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                             nn.Linear(3, 2, bias=False))
    network_[3].weight.data = torch.tensor([[1.0, -2.0, 0.0], [-1.0, 0.0, 0.0]])
    maps = torch.tensor([[[[4.0, 8.0], [0.0, 1.0]], [[1.0, 0.0], [3.0, 0.5]], [[9.0] * 2] * 2]])
    cam, layer = network.grad_cam(network_, maps, 0)
    assert cam[0].tolist() == [[4 / 4 - 2 / 4, 8 / 4], [0, 0]]  # −6/4 and 1/4 − 1/4 are cut off
    assert layer == "0" and network.grad_cam(network_, maps, 1, "0")[0].abs().sum() == 0
    with pytest.raises(ValueError, match="layer=2: Grad-CAM needs"):
        network.grad_cam(network_, maps, 0, "2")
    with pytest.raises(ValueError, match="Grad-CAM needs"):
        network.grad_cam(network_[2:], maps[:, :, :1, :1], 0)


class ChannelsLast(nn.Module):
    """Patches of 2×2 as tokens N×(1 + S·S)×C behind a class token, or as maps N×S×S×C."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.patches = tokens, nn.Conv2d(3, 8, 2, 2)
        self.layer, self.norm = nn.Identity(), nn.Identity()

    def forward(self, images):
        maps = self.patches(images).permute(0, 2, 3, 1)
        if not self.tokens:
            return self.layer(maps).sum((1, 2))
        tokens = maps.flatten(1, 2)
        tokens = self.layer(torch.cat([tokens[:, :1], tokens], 1))
        return self.norm(tokens + tokens.mean(1, True))[:, 0]  # its other tokens come to nothing


@pytest.mark.parametrize("tokens", [False, True])
def test_grad_cam_of_tokens_and_of_channels_that_come_last(tokens):
    model, images = ChannelsLast(tokens), torch.rand(1, 3, 8, 8)
    maps = model.patches(images).detach()
    cam, _ = network.grad_cam(model, images, 2, "layer")
    # The logit adds up map 2 over all positions: its gradient is 1 there, or 1/17 beside itself.
    assert torch.allclose(cam, maps[:, 2].clamp(min=0) / (17 if tokens else 1), atol=1e-6)
    assert network.grad_cam(model, images, 2)[1] == "layer"


def test_each_image_may_have_a_class_of_its_own_and_gradients_are_switched_on():
    model, images = network.build("lenet"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for explain in (network.class_gradient, network.integrated_gradients,
                        lambda *given: network.grad_cam(*given, "conv2")[0]):
            both = explain(model, images, torch.tensor([3, 5]))
            for number, label in enumerate((3, 5)):
                alone = explain(model, images[number:number + 1], label)[0]
                assert torch.allclose(both[number], alone, atol=1e-6) and not alone.requires_grad
        assert network.receptive_fields(model, "conv1", 32)[0, 0, 0].tolist() == [0, 0, 6, 6]
        assert visualize.hessian_eigenvalues(
            [lambda weights: weights["a"].square().sum()], {"a": torch.ones(1)}, 1) == [2]


def test_looking_inside_changes_nothing_in_a_network_that_trains():
    model = network.build("resnet20").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    maps = visualize.feature_maps(model, ["conv2_x"], torch.randn(4, 3, 32, 32))["conv2_x"]
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert model.training and maps.shape == (4, 16, 32, 32)


def test_the_default_layer_of_grad_cam():
    images = torch.rand(1, 3, 32, 32)
    for name, layer in (("lenet", "conv2"), ("resnet20", "conv4_x"), ("speednet", "conv4_x")):
        assert network.grad_cam(network.build(name).eval(), images, 0)[1] == layer


class ClassToken(nn.Module):
    """A block of a ViT with a class token, which alone is read, and dropout on its attention."""

    def __init__(self):
        super().__init__()
        self.patches, self.norm, self.dropout = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8), nn.Dropout()

    def forward(self, images):
        tokens = self.patches(images).flatten(2).mT
        tokens = torch.cat([tokens.mean(1, True), tokens], 1)  # 1 + 16
        heads = self.norm(tokens).unflatten(2, (2, 4)).transpose(1, 2)  # N×2×17×4
        shares = self.dropout((heads @ heads.mT).softmax(3))  # N×2×17×17
        return (tokens + (shares @ heads).transpose(1, 2).flatten(2))[:, 0]


def test_grad_cam_takes_nothing_of_attention_for_a_map():
    cam, layer = network.grad_cam(ClassToken(), torch.rand(1, 3, 8, 8), 0)
    assert layer == "norm" and cam.shape == (1, 4, 4)


def test_grad_cam_of_a_dead_network_shows_nothing():
    model = nn.Sequential(*small_network()[:7], nn.Linear(150, 5), nn.ReLU(), nn.Linear(5, 7))
    nn.init.constant_(model[7].bias, -1e3)
    cam, layer = network.grad_cam(model, torch.rand(1, 3, 12, 12), 2)
    assert layer == "5" and not cam.any()


def test_integrated_gradients_add_up_to_the_difference_of_the_outputs():
    model, images = small_network(), torch.randn(2, 3, 12, 12)
    parts = network.integrated_gradients(model, images, 3, steps=400).sum((1, 2, 3))
    with torch.no_grad():
        rise = model(images)[:, 3] - model(torch.zeros(1, 3, 12, 12))[0, 3]
    assert parts.tolist() == pytest.approx(rise.tolist(), abs=2e-3)
    # Of a linear network the gradient is its weights, everywhere: one step is exact.
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    images = torch.randn(1, 3, 2, 2)
    weights = linear[1].weight[1].view(1, 3, 2, 2)
    assert torch.allclose(network.integrated_gradients(linear, images, 1, 1), weights * images)
    assert torch.allclose(network.smooth_gradient(linear, images, 1, 4), weights)


def test_smooth_gradient_averages_what_the_noise_does():
    cubes = Lambda(lambda images: images.pow(3).flatten(1).sum(1, keepdim=True))
    images = torch.tensor([0.0, 1.0]).repeat(6).view(1, 3, 2, 2)  # their range is 1
    smooth = network.smooth_gradient(cubes, images, 0, count=4000, noise=0.5)
    # E[3 (x + ε)²] = 3 x² + 3·0.25.
    assert torch.allclose(smooth, 3 * images**2 + 0.75, atol=0.25)
    again = network.smooth_gradient(cubes, images, 0, count=4000, noise=0.5)
    assert torch.equal(smooth, again)


def test_captum_finds_the_same():
    attr = pytest.importorskip("captum.attr")
    model, images = small_network(), torch.randn(2, 3, 12, 12)
    plain = nn.Sequential(*(nn.ReLU() if isinstance(module, nn.ReLU) else module
                            for module in model)).eval()  # Captum's hooks bear nothing in place
    for label in (0, 6):
        pairs = [
            (network.class_gradient(model, images, label),
             attr.Saliency(plain).attribute(images, label, abs=False)),
            (network.integrated_gradients(model, images, label, 30),
             attr.IntegratedGradients(plain).attribute(images, target=label, n_steps=30,
                                                       method="riemann_middle")),
            (network.grad_cam(model, images, label, "3")[0],
             attr.LayerGradCam(plain, plain[3]).attribute(images, label,
                                                          relu_attributions=True)[:, 0])]
        for ours, theirs in pairs:
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_statistics_of_a_layer_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    model[0].weight.data = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])[:, :, None, None]
    model[0].bias.data.zero_()
    prep = data.Preprocessing(2, (0.0,) * 3, (1.0,) * 3)
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    images[1, 0] = 51  # 0.2: unit 0 is 0.2 at four positions of one image, unit 1 is dead
    found = visualize.layer_statistics(model.eval(), ["1"], images, prep, bins=4)["1"]
    assert found["units"] == 2 and found["dead"] == [1]
    assert found["zeros"] == pytest.approx(20 / 24) and found["mean"] == pytest.approx(4 * 0.2 / 24)
    assert found["std"] == pytest.approx((4 * 0.04 / 24 - (0.8 / 24) ** 2) ** 0.5)
    assert found["counts"].tolist() == [0, 0, 0, 4]
    assert visualize.rectifiers_of(model, 2) == ["1", "3"]
    for kind in (nn.Tanh, nn.SELU, nn.PReLU, nn.Mish, type("Mine", (nn.ReLU,), {})):
        model[1] = kind()
        assert visualize.rectifiers_of(model, 2) == ["1", "3"]
    model.append(nn.Softmax(1))  # shares of the classes, no activations
    assert visualize.rectifiers_of(model, 2) == ["1", "3"]
    # Not called, as the auxiliary classifiers of GoogLeNet; called with positions, as in Swin v2.
    model[0].aside, model[0].positions = nn.ReLU(), nn.ReLU()
    model[0].register_forward_pre_hook(lambda conv, given: conv.positions(conv.weight[:1]).size()
                                       and given)
    assert visualize.rectifiers_of(model, 2) == ["1", "3"]


def test_statistics_of_a_layer_far_from_0_or_beyond_all_numbers():
    images, prep = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), data.Preprocessing(
        8, (0.5,) * 3, (0.25,) * 3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    model[0].weight.data *= 1e-3
    model[0].bias.data.fill_(10.0)
    found, values = visualize.layer_statistics(model, ["0"], images, prep)["0"], model(prep(images))
    for name, value in (("std", values.double().std(correction=0)), ("mean", values.mean())):
        assert found[name] == pytest.approx(value.item(), rel=1e-3)
    model[0].bias.data.zero_()
    images[0, :, 0, 0], prep = 255, data.Preprocessing(8, (0.5,) * 3, (1e-4, 1.0, 1.0))  # far out
    values = model(prep(images)).double()
    found = visualize.layer_statistics(model, ["0"], images, prep)["0"]
    assert found["std"] == pytest.approx(values.std(correction=0).item(), rel=1e-4)
    model[0].weight.data = 3e4 * torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match="layer=0: its outputs are not finite"):
        visualize.layer_statistics(model.half(), ["0"], images, prep)


def test_a_landscape_is_of_the_code_that_is_there(tmp_path, monkeypatch, coarse_figures,
                                                  few_shapes):
    tables = []
    for act in (nn.ReLU, nn.ReLU, nn.Tanh):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv2d(3, 4, 3), act(), nn.Flatten(), nn.Linear(4 * 30**2, 10))
        monkeypatch.setattr(sys.modules[__name__], "odd_network", [made].pop, raising=False)
        *_, table = visualize.landscape(network=f"{__name__}:odd_network", image_size=32,
                                        data="shapes", images=10, points=3, out=f"{tmp_path}/")
        tables.append(table)
    assert tables[0] == tables[1] != tables[2]
    monkeypatch.setattr(sys.modules[__name__], "odd_network", lambda: made)
    _, table = visualize.landscape(network=f"{__name__}:odd_network", to=f"{__name__}:odd_network",
                                   image_size=32, data="shapes", images=10, points=3,
                                   out=f"{tmp_path}/")
    assert table.exists()


@pytest.mark.parametrize("content", ['{"seed": [1]}', '[[1, 2], ["a", 3]]'])
def test_curves_of_odd_settings(content, tmp_path):
    (tmp_path / "metrics.csv").write_text(
        ",".join(train.COLUMNS) + "\n1,1,1,0.5,,,0.1,1,1,\n2,2,1,0.5,,,0.1,1,1,\n")
    (tmp_path / "config.json").write_text(content)
    assert [*visualize.group_runs([tmp_path])] == [tmp_path.name]


def test_what_was_saved_within_an_epoch_is_not_called_that_epoch(tmp_path, coarse_figures):
    config = train.Config.create("lenet", data="shapes", limit=64, val=0, epochs=1, batch_size=16,
                                 save_minutes=0.0, keep=0, snapshots=(0,), out=str(tmp_path))
    train.train(config)
    _, history, _ = visualize.activations(str(config.folder), layers="conv1.1", images=5,
                                          out=str(tmp_path))
    assert history.axes[0].lines[0].get_xdata().tolist() == [1, 2, 3, 4]
    assert history.axes[0].get_xlabel() == "step"
    figure = deconv.evolution(str(config.folder), units=(0, 1), out=str(tmp_path))
    titles = [text.get_text().partition(":")[0] for text in figure.axes[0].texts]
    assert titles == ["step 1", "step 2", "step 3", "epoch 1"] * 2
    assert network.load(config.folder / "step-000000003.pth")[1].title == "lenet, step 3"


class StandardisedConv(nn.Conv2d):
    """A convolution whose weights have a mean of 0 and a std of 1 (Qiao et al. 2019)."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


def effective(layer):
    """What a linear layer does to single pixels: C×3×3×3 of a 3×3 convolution without padding."""
    units = torch.eye(27).view(27, 3, 3, 3)
    return (layer(units) - layer(units * 0)).view(27, -1).T.view(-1, 3, 3, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [
    lambda _: StandardisedConv(3, 4, 3), nn.utils.weight_norm,
    nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm,
    lambda layer: nn.utils.prune.random_unstructured(layer, "weight", 0.5)])
def test_filters_are_drawn_as_they_are_computed(change, tmp_path, monkeypatch):
    from torch.nn.utils import prune  # noqa: F401

    def make():
        return nn.Sequential(change(nn.Conv2d(3, 4, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    monkeypatch.setitem(sys.modules, "own_nets", types.SimpleNamespace(make=make))
    trained = make()
    trained(torch.randn(8, 3, 8, 8))
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    trained.eval()(torch.randn(1, 3, 8, 8))
    figure = visualize.filters(network="own_nets:make", weights=str(tmp_path / "w.pth"), layer="0",
                               image_size=8, out=str(tmp_path / "f.png"))
    weight = effective(trained[0]).detach()
    drawn = torch.stack([torch.tensor(image.get_array()) for image in figure.axes[0].images])
    torch.testing.assert_close(drawn.permute(0, 3, 1, 2), check_dtype=False, expected=(
        0.5 + weight / 2 / weight.abs().amax((1, 2, 3), True)))


def test_no_two_lines_look_alike():
    looks = [tuple(visualize.look(index).values()) for index in range(49)]
    assert len({*looks}) == 49 and looks[0] == (visualize.COLORS[0], visualize.MARKERS[0])


def test_the_scale_of_many_classes_is_a_part_of_their_matrix():
    figure = visualize.draw_confusion(torch.eye(30), [*map(str, range(30))], "")
    bar, = figure.axes[0].child_axes
    assert [text.get_text() for text in bar.get_xticklabels()][::len(bar.get_xticks()) - 1] == [
        "0%", "100%"]


def test_odds_by_hand_also_of_what_is_nearly_certain():
    logits = torch.tensor([[0.0, 0.0, 0.0], [3.0, 1.0, 1.0], [90.0, 10.0, 0.0], [95.0, 10.0, 0.0]])
    odds = visualize.log_odds(logits)
    assert odds[0].tolist() == pytest.approx([-math.log(2)] * 3)
    assert odds[1].tolist() == pytest.approx(
        [2 - math.log(2), *[1 - math.log(math.exp(3) + math.e)] * 2])
    assert odds[2:, 0].tolist() == pytest.approx([80.0, 85.0], abs=1e-3)  # both 1.0 as float32
    order = visualize.precision_recall(odds[:, 0], torch.tensor([False, False, False, True]))
    assert order[-1] == 1


def test_histograms_see_whole_kernels():
    stack = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False))  # 36 864 values: more than 10 000
    nn.init.dirac_(stack[0].weight)
    point, = train.histograms(stack)
    assert (point.histo.max, point.histo.num) == (1, 10_000)
    assert 0 < point.histo.sum < 60  # about 10 000 · 64 / 36 864 = 17 ones


@pytest.mark.parametrize("changes", [{"activation": "elu"}, {"image_size": 16}])
def test_a_line_leads_to_networks_of_the_same_kind_alone(changes, tmp_path):
    runs = []
    for name, options in (("a", {}), ("b", changes)):
        config = train.Config.create("resnet20", data="shapes", limit=32, epochs=1, batch_size=16,
                                     width=2, out=str(tmp_path), name=name, **options)
        train.train(config)
        runs.append(str(config.folder))
    with pytest.raises(ValueError, match="is a network of another kind"):
        visualize.landscape(runs[0], to=runs[1], images=8, points=3)
    assert not [*Path(runs[0]).rglob("landscape*")]


def test_figures_of_other_images_say_so(run, tmp_path, coarse_figures, few_shapes):
    pets = tmp_path / "pets"
    for part in ("train", "test"):
        for name in data.SHAPES:
            (pets / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(pets / part / name / "0.png")
    titles = [visualize.confusion(str(run), out=f"{tmp_path}/", **given)._suptitle.get_text()
              for given in ({}, {"data": "shapes"}, {"data": str(pets), "root": str(tmp_path)})]
    assert [", on" in title for title in titles] == [False, False, True]
    assert ", on pets: " in titles[2]


def test_the_history_of_a_layer_by_hand(tmp_path):
    """At epoch 5 a LeNet's first layer, of six units, loses one and grows by half; at epoch 9 it
    loses a second one."""
    lenet = network.build("lenet").eval()
    lenet.conv1[0].weight.data.zero_()
    for epoch, scale, dead in ((1, 1.0, 0), (5, 1.5, 1), (9, 1.5, 2)):
        lenet.conv1[0].bias.data.fill_(scale)
        lenet.conv1[0].bias.data[:dead] = 0.0
        network.save(tmp_path / f"snapshot-{epoch:05}.pth", {
            "model": "lenet", "options": {}, "classes": list(data.SHAPES), "image_size": 32,
            "mean": [0.5] * 3, "std": [0.25] * 3, "weights": lenet.state_dict(),
            "settings": dataclasses.asdict(train.Config(data="shapes", limit=20)),
            "epoch": epoch, "step": epoch})
    (tmp_path / "last.pth").write_bytes((tmp_path / "snapshot-00009.pth").read_bytes())
    _, history, _ = visualize.activations(str(tmp_path), layers="conv1.1", images=5)
    mean, spread, zeros, dead = (axes.lines[0].get_ydata().tolist() for axes in history.axes)
    assert history.axes[0].lines[0].get_xdata().tolist() == [1, 5, 9]
    assert mean == pytest.approx([1, 1.5 * 5 / 6, 1.5 * 4 / 6])
    assert spread == pytest.approx([0, 1.5 * (5 / 36) ** 0.5, 1.5 * (8 / 36) ** 0.5], abs=1e-6)
    assert zeros == dead == pytest.approx([0, 1 / 6, 2 / 6])
    with pytest.raises(ValueError, match="several files"):
        visualize.activations(str(tmp_path), out=str(tmp_path / "one.png"))
    assert len(visualize.activations(str(tmp_path / "last.pth"), out=str(tmp_path), images=5)) == 2
    numbers = {"mean": -1.0, "std": 0.5, "zeros": 1.0, "dead": [0, 1], "units": 2}
    many = {epoch: {f"layer{index}": numbers for index in range(50)} for epoch in (1, 2)}
    colors = {line.get_color().tobytes() for line
              in visualize.draw_activation_history(many, "").axes[0].lines}
    assert len(colors) == 50


def test_old_spellings_are_answered_with_the_new_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["visualize.py", "report", "runs/lenet"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(visualize.__file__, run_name="__main__")
    assert capsys.readouterr().err == "error: report has moved: python -m lab report\n"


def test_errors_of_other_code_are_told_in_one_line_whatever_their_words():
    with pytest.raises(ValueError, match=r"^x: RuntimeError: p{286}$"), network.told("x"):
        raise RuntimeError(400 * "p" + "\n")
    with pytest.raises(ValueError, match="layer=0: returns a tuple"):
        visualize.feature_maps(nn.Sequential(Lambda(lambda x: (x, x))), ["0"],
                               torch.zeros(1, 3, 4, 4))


def test_runs_that_differ_only_in_their_seed_are_one_group(tmp_path):
    for name, lr, seed in (("a", 0.1, 0), ("b", 0.1, 1), ("c", 0.2, 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"lr": {lr}, "seed": {seed}, '
                                                     f'"name": "{name}"}}')
        with open(tmp_path / name / "metrics.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(train.COLUMNS)
            writer.writerows([epoch, epoch, 1, 0.5, "", "", 0.1, 1, 1, ""] for epoch in (1, 2))
    groups = visualize.group_runs([tmp_path / name for name in "abc"])
    assert {label: len(members) for label, members in groups.items()} == {
        "a and 1 more seed": 2, "c": 1}
    (tmp_path / "copies").mkdir()
    shutil.copytree(tmp_path / "a", tmp_path / "copies" / "a")  # no further seed
    copied = visualize.group_runs([tmp_path / "a", tmp_path / "copies" / "a"])
    assert {label: len(members) for label, members in copied.items()} == {"a": 1, "a′": 1}
    for name in groups["c"][0]:  # one that `patience` stopped after its first epoch
        del groups["a and 1 more seed"][0][name][1:]
    groups["a and 1 more seed"][0]["train/loss"][0] = 3.0
    line, *_ = visualize.draw_curves(groups).axes[0].lines
    assert line.get_xdata().tolist() == [1, 2]  # the mean ends where one of them does
    assert line.get_ydata()[0] == 2 and math.isnan(line.get_ydata()[1])
    groups["a and 1 more seed"][0]["seconds"] = [10.0]
    line, *_ = visualize.draw_curves(groups, "seconds").axes[0].lines
    assert line.get_xdata().tolist() == [5.5, 6.5]  # which never runs backwards


@pytest.mark.parametrize("worst, scale", [(9.0, "linear"), (600.0, "log"), (math.inf, "linear")])
def test_a_run_that_diverges_leaves_the_others_room(worst, scale):
    losses = {"calm": [0.5, 0.4, 0.0, math.nan], "wild": [2.0, worst, 1.0, 0.9]}
    empty = dict.fromkeys(METRICS, [math.nan] * 4) | {"epoch": [1.0, 2.0, 3.0, 4.0]}
    axes = visualize.draw_curves({name: [{**empty, "train/loss": values}]
                                  for name, values in losses.items()}).axes[0]
    assert axes.get_yscale() == scale and axes.get_ylabel().endswith("(logarithmic)") == (
        scale == "log")


@pytest.mark.parametrize("command, words", [
    (visualize.where, {"method": "smooth_grad"}), (visualize.landscape, {"directions": "rand"}),
    (visualize.predictions, {"only": "bad"}), (visualize.predictions, {"order": "size"}),
    (visualize.curves, {"x": "epochs"}), (visualize.curves, {"format": "gif"}),
    (deconv.reconstruct, {"rule": "relu"}), (deconv.reconstruct, {"bn": "none"}),
    (deconv.gallery, {"rule": "relu"})])
def test_python_takes_no_other_words_than_the_command_line(command, words):
    (name, word), = words.items()
    with pytest.raises(ValueError, match=f"{name}={word}: must be one of"):
        command("no such run", **words)


# ---------------------------------------------------------------------------- landscapes


def test_a_direction_has_the_norm_of_each_filter_and_leaves_biases_alone():
    lenet = network.build("convnet")
    direction = visualize.filter_normalized_direction(lenet, data.generator(0))
    for name, weight in lenet.named_parameters():
        if weight.ndim == 1:
            assert name not in direction
        else:
            assert torch.allclose(direction[name].flatten(1).norm(dim=1),
                                  weight.flatten(1).norm(dim=1), rtol=1e-4)


def test_nothing_is_right_or_wrong_where_the_loss_is_no_number(opened):
    net, about = opened
    parts = {"test": data.draw_shapes(8, seed=1)}
    with visualize.moved(net, [{"conv1.0.weight": torch.full((6, 3, 5, 5), math.nan)}], [1.0]):
        values = visualize.loss_on(net, parts, about.preprocessing)
    assert [*map(math.isnan, values.values())] == [True, True]


def test_the_landscapes_centre_is_the_networks_loss_and_weights_are_put_back(opened):
    lenet, about = opened
    before = [weight.clone() for weight in lenet.parameters()]
    split = data.draw_shapes(50, seed=4)
    direction = visualize.filter_normalized_direction(lenet, data.generator(1))
    losses = []
    for x in (0.5, 1.5):
        with visualize.moved(lenet, [direction, direction], (x, -0.5)):
            found = visualize.loss_on(lenet, {"test": split}, about.preprocessing)
        losses.append(found["test/loss"])
    logits = lenet(about.preprocessing(split.images))
    assert losses[0] == pytest.approx(nn.functional.cross_entropy(logits, split.labels).item())
    assert losses[1] != pytest.approx(losses[0], abs=1e-3)
    with pytest.raises(KeyError), visualize.moved(lenet, [direction], [1.0]):
        raise KeyError
    assert all(torch.equal(*pair) for pair in zip(before, lenet.parameters()))


def test_the_largest_eigenvalues_of_a_quadratics_hessian():
    basis, _ = torch.linalg.qr(torch.randn(5, 5))
    hessian = basis @ torch.diag(torch.tensor([3.0, -7.0, 0.5, 1.0, 0.0])) @ basis.T

    def half_of_the_loss(weights):
        point = torch.cat([weights["a"], weights["b"].flatten()])
        return point @ hessian @ point / 4

    weights = {"a": torch.randn(2), "b": torch.randn(3, 1)}
    values = visualize.hessian_eigenvalues([half_of_the_loss] * 2, weights, 3)
    assert values == pytest.approx([-7, 3, 1], rel=1e-4)
    # Long before all is found a step may add nothing: the matrix itself tells, of a small network.
    torch.manual_seed(8)
    small = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    inputs, labels = torch.randn(40, 12), torch.randint(0, 3, (40,))
    flat = nn.utils.parameters_to_vector(small.parameters()).detach()
    names, sizes = zip(*((name, value.shape) for name, value in small.named_parameters()))

    def loss_of(weights):
        return F.cross_entropy(torch.func.functional_call(small, weights, inputs), labels)

    def loss_at(vector):
        parts = vector.split([size.numel() for size in sizes])
        return loss_of({name: part.view(size) for name, part, size in zip(names, parts, sizes)})

    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss_at, flat))
    values = visualize.hessian_eigenvalues([loss_of], dict(small.named_parameters()))
    assert values == pytest.approx(sorted(exact.tolist(), key=abs)[:-3:-1], rel=1e-2)
    # Two that differ in their sign alone, in more dimensions than steps are taken.
    sizes = torch.cat([torch.tensor([5.0, -5.0]), torch.linspace(-4, 4, 98)])
    values = visualize.hessian_eigenvalues(
        [lambda weights: (sizes * weights["a"] ** 2).sum() / 2], {"a": torch.randn(100)})
    assert sorted(values) == pytest.approx([-5, 5], rel=1e-2)


def test_the_hessian_of_a_network_is_that_of_all_its_images(opened):
    small = nn.Sequential(nn.Flatten(), nn.Linear(3, 2)).eval()
    prep = data.Preprocessing(1, (0.5,) * 3, (0.5,) * 3)
    split = data.Split(torch.randint(0, 256, (200, 3, 1, 1), dtype=torch.uint8),
                       torch.randint(0, 2, (200,)))  # more than one batch
    [first, _] = visualize.hessian_on(small, dataclasses.replace(opened[1], preprocessing=prep),
                                      {"train": split})

    def loss(weight, bias):
        logits = prep(split.images).flatten(1) @ weight.T + bias
        return nn.functional.cross_entropy(logits, split.labels)

    parts = torch.autograd.functional.hessian(loss, (small[1].weight, small[1].bias))
    whole = torch.cat([torch.cat([parts[0][0].reshape(6, 6), parts[0][1].reshape(6, 2)], 1),
                       torch.cat([parts[1][0].reshape(2, 6), parts[1][1].reshape(2, 2)], 1)])
    assert first == pytest.approx(torch.linalg.eigvalsh(whole).max().item(), rel=1e-2)


def attention(x):
    """As torchvision's transformers have it: its quick ways have no second derivative."""
    x = x.flatten(2).mT[:, None]
    return F.scaled_dot_product_attention(x, x, x).mean((1, 2))


def test_the_hessian_of_networks_from_elsewhere(opened):
    torch.manual_seed(0)
    split = data.Split(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), torch.arange(8) % 2)
    about = dataclasses.replace(opened[1], preprocessing=data.Preprocessing(
        8, (0.5,) * 3, (0.25,) * 3))
    grey = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2))
    for built in (grey, nn.Sequential(nn.Conv2d(3, 4, 4, 4), Lambda(attention), nn.Linear(4, 2))):
        built[2].unused = nn.Linear(2, 2)
        assert abs(visualize.hessian_on(built, about, {"train": split})[0]) > 0
    quick = Lambda(lambda x: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0])
    with pytest.raises(ValueError, match=r"hessian: .*not implemented"):
        visualize.hessian_on(nn.Sequential(nn.Conv2d(3, 3, 3), quick, nn.Flatten()), about,
                             {"train": split})


def test_the_line_between_two_networks_begins_and_ends_at_them():
    torch.manual_seed(1)
    nets = [network.build("resnet20").eval() for _ in range(2)]
    preps = [data.Preprocessing(32, (mean,) * 3, (0.25,) * 3) for mean in (0.4, 0.5)]
    for net, prep in zip(nets, preps):
        visualize.measure_batch_norm(net, data.draw_shapes(40, seed=1).images, prep)
    ends = [(net.state_dict(), prep) for net, prep in zip(nets, preps)]
    parts = {part: data.draw_shapes(40, seed=seed) for part, seed in (("train", 1), ("test", 2))}
    between = network.build("resnet20").eval()
    for share, net, prep in zip((0.0, 1.0), nets, preps):
        found = visualize.loss_between(between, ends, share, parts)
        expected = visualize.loss_on(net, parts, prep)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        # These networks' statistics are those of the training images already.
        assert found["train, batch norm measured anew/loss"] == pytest.approx(
            expected["train/loss"], rel=1e-3)
    halfway = visualize.loss_between(between, ends, 0.5, parts)
    weights = between.state_dict()["conv1.0.weight"]
    assert torch.allclose(weights, (nets[0].conv1[0].weight + nets[1].conv1[0].weight) / 2)
    assert halfway["train, batch norm measured anew/loss"] != halfway["train/loss"]


def test_batch_norms_statistics_measured_anew_are_those_of_the_images():
    norm = nn.BatchNorm2d(3, momentum=0.3).eval()
    prep = data.Preprocessing(4, (0.0,) * 3, (1.0,) * 3)
    images = torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8)
    network_ = nn.Sequential(norm, nn.Dropout(0.5)).eval()
    assert visualize.measure_batch_norm(network_, images, prep) == 1
    assert torch.allclose(norm.running_mean, (images / 255).mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, (images / 255).var((0, 2, 3)), atol=1e-5)
    assert norm.momentum == 0.3 and not norm.training
    images = torch.full((257, 3, 4, 4), 51, dtype=torch.uint8)  # 0.2 of white
    images[-1] = 255
    visualize.measure_batch_norm(network_, images, prep)
    assert norm.running_mean.tolist() == pytest.approx([0.2 + 0.8 / 257] * 3, rel=0.01)
    assert visualize.measure_batch_norm(nn.Linear(1, 1), images, prep) == 0
    network_.train()
    visualize.measure_batch_norm(network_, images, prep)
    assert norm.training and network_[1].training
    norm.eval()
    network_.append(Lambda(lambda _: 1 / 0))
    with pytest.raises(ValueError, match="division by zero"):
        visualize.measure_batch_norm(network_, images, prep)
    assert norm.momentum == 0.3 and not norm.training and network_[1].training


def test_principal_directions_of_a_path_in_a_plane():
    layer = nn.Linear(3, 1)
    nn.init.zeros_(layer.weight)
    # Centred: x −3 −1 1 3 (variance 20), y 1 −1 −1 1 (variance 4), uncorrelated.
    points = ((0, 2), (2, 0), (4, 0), (6, 2))
    path = [{"weight": torch.tensor([[x, y, 0.0]])} for x, y in points]
    directions, shares, trail = visualize.principal_directions(layer, path)
    assert shares == pytest.approx([20 / 24, 4 / 24])
    assert [abs(value) for value in directions[0]["weight"][0].tolist()] == pytest.approx([1, 0, 0])
    assert trail.abs().tolist() == [pytest.approx(point) for point in points]
    with pytest.raises(ValueError, match="at least 3"):
        visualize.principal_directions(layer, path[:2])


def test_the_path_of_training_goes_through_snapshots(run, opened, tmp_path):
    for number, file in enumerate(sorted(run.glob("step-*.pth"))):
        checkpoint = network.read(file)
        checkpoint["weights"] = {name: weight.half() for name, weight
                                 in checkpoint["weights"].items()}
        network.save(tmp_path / f"snapshot-{number + 1:05}.pth", checkpoint)
    network.save(tmp_path / "last.pth", network.read(run / "last.pth"))
    *_, trail = visualize.plane_of(opened[0], tmp_path, "pca", 0, 1.0, 3)
    *_, whole = visualize.plane_of(opened[0], run, "pca", 0, 1.0, 3)
    assert len(trail) == 4
    assert torch.allclose(torch.tensor(trail).abs(), torch.tensor(whole).abs(), atol=1e-2)


def test_an_interrupted_grid_goes_on_and_computes_nothing_twice(tmp_path):
    seen = []

    def evaluate(point):
        seen.append(point)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"loss": sum(point)}

    points = [(0.0, 1.0), (0.1, 1.0), (0.2, 1.0), (0.3, 1.0)]
    with pytest.raises(KeyboardInterrupt):
        visualize.evaluate_points(tmp_path / "grid.csv", points, evaluate, "", ["loss"])
    rows = visualize.evaluate_points(tmp_path / "grid.csv", points, evaluate, "", ["loss"])
    assert seen == [*points[:3], *points[2:]]
    assert rows[0.3, 1.0]["loss"] == pytest.approx(1.3)
    visualize.evaluate_points(tmp_path / "grid.csv", points, None, "", ["loss"])
    written = (tmp_path / "grid.csv").read_text()
    lines = written.splitlines()
    for changed in (written.replace("loss", "lost"), written.replace("x", "u"), "",
                    "\n".join(["z," + lines[0], *(f"1,{line}" for line in lines[1:])])):
        (tmp_path / "grid.csv").write_text(changed)
        for more in (points, [*points, (0.4, 1.0)]):
            with pytest.raises(ValueError, match=r"grid\.csv: damaged \(its columns are not x,y,"):
                visualize.evaluate_points(tmp_path / "grid.csv", more, evaluate, "", ["loss"])
        assert (tmp_path / "grid.csv").read_text() == changed


def test_a_class_may_be_called_none(run, tmp_path):
    checkpoint = network.read(run / "last.pth")
    classes = [*checkpoint["classes"][:-1], "none"]
    network.save(tmp_path / "a.pth", {**checkpoint, "classes": classes})
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for path, asked in ((tmp_path / "a.pth", "class none"), (run, "class ")):
        draw = data.parse(visualize.COMMANDS, ["where", str(path), "--class=none", "--image",
                                               str(tmp_path / "a.png")])
        assert f"what speaks for {asked}" in draw()._suptitle.get_text()
    draw = data.parse(visualize.COMMANDS, ["where", str(run), "--method=integrated", "--image",
                                           str(tmp_path / "a.png")])
    assert "what bears on class " in draw()._suptitle.get_text()  # of either sign


def test_networks_whose_weights_are_parametrized():
    layers = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Softplus(),
                           nn.Flatten(), nn.utils.parametrizations.weight_norm(
                               nn.Linear(4 * 6 * 6, 2)))
    assert visualize.rectifiers_of(layers, 8) == ["1", "3"]
    moved = visualize.filters_of(layers)  # the directions of the filters, not their lengths
    assert [name.rpartition(".")[2] for name in moved] == ["original1"] * 2


def test_only_the_first_convolution_sees_colours_and_a_group_its_own_channels(tmp_path,
                                                                              monkeypatch):
    layers = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 6, 3),
                           nn.Conv2d(6, 6, 3, groups=2))
    monkeypatch.setattr(network, "load", lambda *_, **__: (layers, network.Description(
        "four", (), data.Preprocessing(32, (0.5,) * 3, (0.25,) * 3))))
    names = [visualize.filters("four", layer=layer, out=str(tmp_path)).path.name
             for layer in ("0", "2")]
    assert names == ["filters-0-rgb.png", "filters-2-0.png"]
    title = visualize.filters("four", "3", channel="1", out=str(tmp_path)).get_suptitle()
    assert "input channel 1 (from 0 to 2, of its group)" in title


def test_where_the_loss_overflows_there_is_a_hole():
    rows = {(x, y): {"test/loss": math.inf if x == y == 2 else 1 + x + y}
            for x in range(3) for y in range(3)}
    values = visualize.grid_values(rows, range(3), range(3), "test/loss")
    assert values.isnan().tolist() == [[False] * 3, [False] * 3, [False, False, True]]
    for draw in (visualize.draw_landscape_contours, visualize.draw_landscape_surface):
        texts_of(draw([*range(3)], [*range(3)], {"test": values}, "", ("x", "y")))
    with pytest.raises(ValueError, match="not one value is finite"):
        visualize.draw_landscape_contours([0, 1], [0, 1], {"test": values[1:, 1:] * math.nan}, "",
                                          ("x", "y"))


def test_a_loss_of_0_is_at_the_bottom_of_the_line():
    rows = [{"x": x, "test/loss": abs(x), "test/accuracy": 1.0} for x in (-1.0, 0.0, 1.0)]
    axes = visualize.draw_landscape_line(rows, "").axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([1, 1e-4, 1]) and axes.get_ylim()[0] < 1e-4


@pytest.mark.parametrize("spread", [0, 1e-6, 1e-3])
def test_a_landscape_that_is_nearly_flat(spread):
    values = 6.9077554 + spread * torch.rand(3, 3)
    for draw in (visualize.draw_landscape_contours, visualize.draw_landscape_surface):
        texts = texts_of(draw([*range(3)], [*range(3)], {"test": values}, "", ("x", "y")))
        assert len({text for text in texts if text.startswith("6.90")}) > 2 or not spread


def test_a_saved_landscape_is_not_that_of_other_images(run, tmp_path, monkeypatch):
    draw, tables = data.draw_shapes, []
    for seed in (5, 6, 5):
        monkeypatch.setattr(data, "draw_shapes", lambda _count, part, seed=seed: draw(
            60, 10 * seed + part))
        *_, table = visualize.landscape(str(run), points=3, images=9, out=str(tmp_path))
        tables.append(table)
    assert tables[0] == tables[2] != tables[1]
    losses = [visualize.read_table(table)[0]["test/loss"] for table in tables[:2]]
    assert losses[0] != losses[1]
    monkeypatch.setattr(train, "open_network", lambda *_, opened=train.open_network: (
        (found := opened(*_))[0], dataclasses.replace(found[1], preprocessing=dataclasses.replace(
            found[1].preprocessing, mean=(0.1,) * 3))))  # nor that of images normalised otherwise
    *_, other = visualize.landscape(str(run), points=3, images=9, out=str(tmp_path))
    assert other not in tables
    monkeypatch.undo()
    monkeypatch.setattr(data, "draw_shapes", lambda _count, part: draw(60, 50 + part))
    renamed = tables[0].read_text().replace("test/loss", "lost")
    for changed in ("x,y\n1,two\n", renamed):
        tables[0].write_text(changed)
        with pytest.raises(ValueError, match="damaged"):
            visualize.landscape(str(run), points=3, images=9, out=str(tmp_path))


def test_a_fingerprint_tells_tensors_and_settings_apart():
    one, two = nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2).bfloat16()
    prints = {visualize.fingerprint(*parts) for parts in (
        (one,), (two,), (one, 1), (one, 11), (one, 1, 1), (one, torch.ones(2)),
        (one, torch.zeros(2)), (one, torch.ones(()), "a"))}
    assert len(prints) == 8 and visualize.fingerprint(one) in prints


# ---------------------------------------------------------------------------- commands


@pytest.mark.parametrize("words, names", [
    (["samples", "--data=shapes"], ["samples-shapes"]),
    (["predictions", "RUN", "--count=2"], ["predictions-all"]),
    (["confusion", "RUN"], ["confusion"]),
    (["pr_curves", "RUN"], ["pr_curves"]),
    (["filters", "RUN"], ["filters-conv1-rgb"]),
    (["filters", "RUN", "--layer=conv2"], ["filters-conv2-0"]),
    (["features", "RUN", "--layers=conv1,fc"], ["features-conv1", "features-fc"]),
    (["patches", "RUN", "--layer=conv2", "--units=2", "--top=3"], ["patches-conv2"]),
    (["landscape", "RUN", "--points=3", "--images=8"],
     ["landscape-line", "landscape-contours-random", "landscape-surface-random"]),
    (["landscape", "RUN", "--points=3", "--images=8", "--directions=pca"],
     ["landscape-contours-pca", "landscape-surface-pca"]),
    (["landscape", "RUN", "--points=3", "--images=8", "--to=RUN"], ["landscape-to"]),
    (["landscape", "RUN", "--points=3", "--images=8", "--hessian"], ["landscape-line"]),
    (["reliability", "RUN"], ["reliability"]),
    (["where", "RUN", "--class=disc"], ["where-gradcam"]),
    (["where", "RUN", "--method=all", "--layer=conv1"], ["where-all"]),
    (["activations", "RUN", "--images=20"], ["activations"]),
    (["predictions", "RUN", "--count=2", "--order=loss"], ["predictions-all-loss"]),
])
def test_a_command_writes_its_figures_and_prints_their_paths(words, names, run, tmp_path, capsys,
                                                             few_shapes):
    words = [word.replace("RUN", str(run)) for word in words]
    data.command_line(visualize.COMMANDS, argv=[*words, f"--out={tmp_path}"])
    printed = capsys.readouterr().out.split()
    for name in names:
        assert str(tmp_path / f"{name}.png") in printed
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_command_returns_its_figures_and_prints_nothing(run, tmp_path, capsys, few_shapes):
    figure = visualize.filters(str(run), out=str(tmp_path))
    assert figure.path == tmp_path / "filters-conv1-rgb.png" and figure.axes
    flags = {"points": 3, "images": 8, "out": str(tmp_path)}
    *figures, table = visualize.landscape(str(run), **flags)
    assert len(figures) == 3 and all(figure.path.exists() for figure in figures)
    assert table.suffix == ".csv" and len(visualize.read_table(table)) == 5 + 9 - 3
    assert figure._repr_png_().startswith(b"\x89PNG") and isinstance(figures[0].path, Path)
    assert capsys.readouterr().out == ""
    with pytest.raises(TypeError, match="nonsense"):
        visualize.filters(str(run), nonsense=1)


def test_a_text_or_a_number_is_a_list_of_one(run, tmp_path, few_shapes):
    [figure] = visualize.features(str(run), layers="conv1", out=str(tmp_path))
    assert figure.path.name == "features-conv1.png"
    for units in (4, (4,)):
        figure = visualize.patches(str(run), "conv2", units=units, top=2, out=str(tmp_path))
        labels = [label.get_text().split("\n")[0] for label in figure.axes[0].get_yticklabels()]
        assert labels == ["unit 0", "unit 4", "unit 8", "unit 12"]  # four of sixteen
    figure = deconv.gallery(str(run), layer="conv2", units=2, top=2, out=str(tmp_path))
    assert [text.get_text()[:6] for text in figure.axes[0].texts] == ["unit 0", "unit 8"]


def test_samples_are_a_row_a_class_and_filters_have_numbers(run, tmp_path, few_shapes):
    axes = visualize.samples("shapes", count=3, out=str(tmp_path)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*data.SHAPES]
    assert len(axes.images) == 30
    figure = visualize.filters(str(run), "conv2", out=str(tmp_path))
    assert [text.get_text() for text in figure.axes[0].texts] == [*map(str, range(16))]
    assert "input channel 0 (from 0 to 5)" in figure.get_suptitle()


def test_samples_of_images_of_several_sizes(tmp_path):
    for index, size in enumerate([(8, 8), (12, 8)] * 2):
        path = tmp_path / "pets" / ("train", "test")[index // 2] / "cat" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    (path.parent / "bad.png").write_text("no picture")
    flags = {"count": 2, "root": str(tmp_path), "out": str(tmp_path / "a.png")}
    with pytest.raises(ValueError, match="`image_size=N` makes them equal"):
        visualize.samples(str(tmp_path / "pets"), skip_bad=True, **flags)
    figure = visualize.samples(str(tmp_path / "pets"), image_size=8, skip_bad=True, **flags)
    assert [image.get_array().shape for image in figure.axes[0].images] == [(8, 8, 3)] * 2


def test_names_in_letters_that_matplotlibs_own_font_lacks(capsys, recwarn, monkeypatch):
    from matplotlib.font_manager import fontManager

    monkeypatch.setattr(fontManager, "ttflist", [  # as if no others were installed
        font for font in fontManager.ttflist if font.name in ("STIXGeneral", "DejaVu Sans")])
    visualize.fonts_for.cache_clear()
    visualize.new_figure(3, 1, "a \u2312 猫")._repr_png_()  # ⌒ is in STIX
    assert not any("Glyph" in str(warning.message) for warning in recwarn)
    assert capsys.readouterr().err == "no font here draws 猫: figures have boxes instead\n"
    own = ("sans-serif",)  # as matplotlib's is, or a user's settings
    assert visualize.fonts_for(frozenset("aé"), own) == [*own]
    assert visualize.fonts_for(frozenset("a\u2312"), ("STIXGeneral",)) == ["STIXGeneral"]
    assert visualize.fonts_for(frozenset("a\u2312猫"), own) == [*own, "STIXGeneral"]
    visualize.fonts_for.cache_clear()


def test_without_a_run_a_figure_goes_to_runs(tmp_path, monkeypatch, few_shapes):
    monkeypatch.chdir(tmp_path)
    assert visualize.samples("shapes", count=2).path == Path("runs/figures/samples-shapes.png")


def test_a_network_from_elsewhere(tmp_path, monkeypatch, few_shapes, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "some_nets.py").write_text(
        "from torch import nn\n"
        "def tiny():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(4 * 14 * 14, 10))\n"
        "def half():\n"
        "    return tiny().half()\n")
    figure, *_ = visualize.landscape("some_nets:half", images=8, points=3, hessian=True,
                                     data="shapes", image_size=16)
    assert re.search(r"Hessian: \d", figure.get_suptitle())
    for words in (["features", "--network=some_nets:tiny", "--layers=0,3", "--data=shapes"],
                  ["filters", "--network=some_nets:tiny", "--layer=0"],
                  ["confusion", "some_nets:tiny", "--data=shapes"],
                  ["predictions", "--network=some_nets:tiny", "--data=shapes", "--count=2"]):
        data.command_line(visualize.COMMANDS, argv=[*words, "--image_size=16", "--device=cpu"])
    assert capsys.readouterr().out.split() == [f"runs/figures/{name}.png" for name in (
        "features-0", "features-3", "filters-0-rgb", "confusion", "predictions-all")]
    weights = network.load("some_nets:tiny", image_size=16)[0].state_dict()
    torch.save(weights, "tiny.pth")
    table, line = train.evaluate("some_nets:tiny", "shapes", device="cpu", weights="tiny.pth",
                                 image_size=16)
    data.command_line(train.COMMANDS, argv=[
        "evaluate", "some_nets:tiny", "--data=shapes", "--weights=tiny.pth", "--image_size=16",
        "--mean=.485,.456,.406", "--std=.229,.224,.225", "--device=cpu"])
    assert line in capsys.readouterr().out  # these are ImageNet's
    changed = train.evaluate("some_nets:tiny", "shapes", device="cpu", weights="tiny.pth",
                             image_size=16, mean=(0.0, 0.0, 0.0), std=(0.1, 0.1, 0.1))
    assert changed[1] != line
    assert [row[0] for row in table.rows] == [*"0123456789"] and line.startswith("test accuracy ")
    picture = Path("runs/figures/confusion.png")
    table, = train.predict_command("some_nets:tiny", str(picture), device="cpu",
                                   weights="tiny.pth", image_size=16)
    assert table.rows[0][0] == str(picture) and table.rows[0][1].split()[0] in [*"0123456789"]
    with pytest.raises(ValueError, match="without images"):
        visualize.confusion("some_nets:tiny")
    with pytest.raises(ValueError, match="either"):
        visualize.confusion("some_nets:tiny", network="some_nets:tiny")


class Ones(nn.Module):
    """An output that depends on nothing."""

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.ones(len(x), 10)


def odd_network_of(channels=3, outputs=10):
    return nn.Sequential(OrderedDict(
        c=nn.Conv2d(channels, 4, 3), r=nn.ReLU(), p=nn.AdaptiveAvgPool2d(1), f=nn.Flatten(),
        fc=nn.Linear(4, outputs)))


def quantized():
    return torch.ao.quantization.quantize_dynamic(odd_network_of(), {nn.Linear}, torch.qint8)


def quantized_with_its_outputs():
    from torch.ao import quantization

    layers = quantization.QuantWrapper(odd_network_of()).eval()
    layers.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(layers)
    prepared(torch.randn(4, 3, 32, 32))
    return quantization.convert(prepared)


def test_quantized_networks_stay_on_the_cpu(monkeypatch):
    scripted = torch.jit.script(quantized_with_its_outputs())
    for make in (quantized, quantized_with_its_outputs, lambda: scripted):
        monkeypatch.setattr(sys.modules[__name__], "odd_network", make, raising=False)
        opened, _ = network.load(f"{__name__}:odd_network", device=torch.device("meta"))
        assert network.device_of(opened).type == "cpu"
        assert opened(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("make", [quantized, quantized_with_its_outputs, nn.Identity])
def test_no_landscape_is_drawn_around_weights_that_do_not_move(make):
    with pytest.raises(ValueError, match="no weights that could move"):
        visualize.filters_of(make())


def test_weights_of_8_bits_are_finite_numbers_too():
    weights = torch.ones(3).to(torch.float8_e4m3fn)
    assert network.finite({"scale": weights, "large": torch.tensor(1e300, dtype=torch.float64)})
    assert not network.finite({"scale": torch.tensor(torch.nan).to(torch.float8_e5m2)})


def volumes():
    """Its filters have three dimensions, and so five."""
    return nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 4, (1, 3, 3)), nn.ReLU(),
                         nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 10))


class Graph(nn.Module):
    """Its classes are summed with their neighbours, by a sparse matrix."""

    def __init__(self):
        super().__init__()
        self.network = odd_network_of()
        self.register_buffer("neighbours", torch.eye(10).roll(1).add(torch.eye(10)).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.neighbours, self.network(x).T).T


odd_networks = {
    "sparse": Graph, "means": lambda: Lambda(lambda x: torch.relu(x.mean((2, 3)))), "ones": Ones,
    "scripted": lambda: torch.jit.script(odd_network_of()), "quantized": quantized,
    "static": quantized_with_its_outputs, "volumes": volumes,
    "half": lambda: odd_network_of(1).half(), "nothing": nn.Sequential,
    "one_output": lambda: odd_network_of(outputs=1),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(4, 3))}
# What draws all the same.
DRAWN = {"scripted": {"predictions", "landscape"}, "quantized": {"predictions", "features"},
         "sparse": {"predictions", "landscape"},
         "static": {"predictions", "confusion"}, "volumes": {"predictions", "landscape"},
         "half": {"predictions", "patches", "projector", "where", "gallery", "invariance"}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", odd_networks)
def test_no_network_from_elsewhere_ends_in_a_traceback(name, tmp_path, monkeypatch, capsys,
                                                       few_shapes):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "odd_network", odd_networks[name], raising=False)
    monkeypatch.setattr(visualize, "save_figure", lambda figure, *_others, **_flags: figure)
    monkeypatch.setattr(train, "say_once", lambda _line: None)  # which classes are meant
    given, drawn = {"data": "shapes", "image_size": 32, "layer": "c", "layers": "c", "images": 8,
                    "points": 3, "units": 2}, set()
    commands = visualize.COMMANDS | deconv.COMMANDS
    for command in sorted({*commands} - {"samples", "curves", "evolution"}):  # which are of runs
        known = data.flags_of(commands[command])
        words = [f"--{flag}={value}" for flag, value in given.items() if flag in known
                 and (flag, command) not in (("layer", "where"), ("layer", "projector"))]
        try:
            data.command_line(commands, argv=[command, f"{__name__}:odd_network", *words])
            drawn.add(command)
        except SystemExit as leave:
            assert leave.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert drawn >= DRAWN.get(name, set())


def test_every_flag_has_a_meaning():
    for module in (visualize, deconv):
        for name, command in module.COMMANDS.items():
            for flag in data.flags_of(command):
                assert module.MEANINGS.get(flag), f"{name} --{flag}"


def test_the_projector_leaves_a_runs_board_alone(run):
    data.write_atomically(run / train.MARKER, train.MARK)
    for folder in (run, run / "test"):
        with pytest.raises(ValueError, match=r"out=.*files of a run"):
            visualize.projector(str(run), count=20, out=str(folder))
    assert not (run / "test").exists() and not [*run.glob("events*")]
    (run / train.MARKER).unlink()


def test_the_projector_does_not_write_through_links_in_the_folder_of_a_run(run, tmp_path):
    for name in ("projector/features", "projector/features/00000"):
        (link := run / name).parent.mkdir(exist_ok=True, parents=True)
        link.symlink_to(tmp_path)
        with pytest.raises(FileExistsError, match=f"{link}: is a link"):
            visualize.projector(str(run), count=20)
        link.unlink()
    assert not [*tmp_path.iterdir()]
    shutil.rmtree(run / "projector")


def test_the_projector_needs_a_folder_of_its_own(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("my own")
    with pytest.raises(FileExistsError, match=r"out=.*notes\.txt"):
        visualize.projector(str(run), count=20, out=str(tmp_path))
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]
    for _ in range(2):  # one that it filled may be filled anew
        visualize.projector(str(run), count=20, out=str(tmp_path / "new"))


def test_the_projectors_features_are_what_the_last_linear_layer_sees():
    class Functional(nn.Module):
        """As DenseNet: the last linear layer sees what no module has made."""

        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.conv(x).clamp(min=0).mean((2, 3)))

    found, built = {}, Functional().eval()
    board = type("Board", (), {"add_embedding": lambda _, vectors, *others, tag, **named:
                               found.update({tag: vectors})})()
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    preprocessing = data.Preprocessing(8, (0.5,) * 3, (0.2,) * 3)
    train.add_projector(board, built, preprocessing, images, [""] * 6)
    seen = built.conv(preprocessing(images, torch.device("cpu"))).clamp(min=0).mean((2, 3))
    torch.testing.assert_close(found["features"], seen)
    built.gate = nn.Linear(4, 4)  # made last, as of a block's own, and run first
    built.conv.register_forward_hook(lambda _module, _given, maps: (
        maps + 0 * built.gate(maps.mean((2, 3)))[:, :, None, None]))
    train.add_projector(board, built, preprocessing, images, [""] * 6)
    torch.testing.assert_close(found["features"], seen)
    # Very long vectors: the distances and angles alone, in as many numbers as there are images.
    wide = nn.Sequential(nn.Conv2d(3, 70, 1), nn.Flatten(), nn.Linear(70 * 64, 5)).eval()
    train.add_projector(board, wide, preprocessing, images, [""] * 6)
    seen = wide[:2](preprocessing(images, torch.device("cpu"))).detach()
    assert found["features"].shape == (6, 6)
    torch.testing.assert_close(found["features"] @ found["features"].T, seen @ seen.T,
                               rtol=1e-3, atol=1e-2)


def test_the_projector_gets_vectors_classes_and_sprites(run, tmp_path):
    folder, how = visualize.projector(str(run), count=20, out=str(tmp_path))
    assert folder == tmp_path and str(tmp_path) in how
    config = (tmp_path / "projector_config.pbtxt").read_text()
    [features] = tmp_path.glob("*/features/tensors.tsv")
    assert str(features.relative_to(tmp_path)) in config and "single_image_dim: 32" in config
    assert len(features.read_text().splitlines()) == 20
    # What LeNet's last layer sees.
    assert len(features.read_text().splitlines()[0].split("\t")) == 84
    labels = (features.parent / "metadata.tsv").read_text().splitlines()
    assert labels[0] == "class\tpredicted\tverdict" and labels[1].split("\t")[0] in data.SHAPES
    assert (features.parent / "sprite.png").exists()


@pytest.mark.parametrize("words, message", [
    (["features", "RUN", "--layers=conv9"], "conv9.*conv1, conv2"),
    (["features", "RUN", "--layers", "conv1", "conv2"], "conv2: a word too many.*commas"),
    (["filters", "RUN", "--channel=3"], "channel=3.*0 to 2"),
    (["features", "RUN", "--layers=conv1,"], "--layers=conv1,: nothing stands"),
    (["where", "RUN", "--class=whale"], "class=whale.*disc, ring"),
    (["where", "RUN", "--class=dics"], "did you mean disc"),
    (["filters", "torchvision:resnet-18"], "no such network; did you mean resnet18"),
    (["filters", "torchvision:resnet18", "--weights=RUN/last.pth"], "a checkpoint of this package"),
    (["where", "RUN", "--layer=fc"], "layer=fc.*Grad-CAM"),
    (["where", "RUN", "--method=magic"], "magic.*gradcam, gradient"),
    (["activations", "RUN", "--layers=conv7"], "conv7"),
    (["landscape", "RUN", "--to=torchvision:resnet18"], "resnet18"),
    (["landscape", "RUN", "--to=RUN/none"], "none"),
    (["landscape", "RUN", "--to=RUN", "--span=0.5"], "--span: is of random directions"),
    (["landscape", "RUN", "--directions=pca", "--span=0.5"], "--span: is of random directions"),
    (["predictions", "RUN", "--order=size"], "size.*random, loss"),
    (["filters", "RUN", "--layer=conv2", "--channel=rgb"], "channel=rgb.*0 to 5"),
    (["features", "RUN", "--index=99999"], "index=99999.*0 to"),
    (["features", "RUN", "--image=RUN/last.pth"], "cannot be read as an image"),
    (["features", "RUN", "--image=x.png", "--index=3"], "--index=3: has no effect beside --image"),
    (["where", "RUN", "--image=x.png", "--data=pets"], "--data=pets: has no effect beside"),
    (["predictions", "RUN", "--image=x.png", "--seed=3"], "--seed=3: has no effect beside"),
    (["filters", "RUN", "--data=pets"], "--data=pets: has no effect on filters"),
    (["confusion", "RUN", "--format=gif"], "gif.*png, svg, pdf"),
    (["confusion", "RUN/config.json"], "config.json"),
    (["patches", "RUN", "--layer=conv2", "--units=3,16"], "units=3,16.*0 to 15"),
    (["patches", "RUN", "--layer=conv2", "--units=17"], "units=17: must be how many of the 16"),
    (["patches", "RUN", "--layer=conv2", "units=4"], "units=4: did you mean --units=4"),
    (["filters", "torchvision:resnet18", "--image_size=0"], "image_size=0: must be at least 1"),
    (["filters", "RUN", "--device=GPU"], "device=GPU: must be of auto, .*did you mean cuda"),
    (["landscape", "RUN", "--out=one.png"], "several files"),
    (["projector", "RUN", "--out=one.png"], "several files"),
    (["patches", "RUN", "--layer=conv2", "--top=0"], "top=0"),
    (["predictions", "RUN", "--only=most"], "most.*all, wrong, right"),
    (["curves", "RUN"], "no run with a finished epoch"),
    (["confusion"], "checkpoint.*--network"),
    (["filters", "RUN", "--nonsense=1"], "nonsense"),
])
def test_bad_input_is_one_line_and_exit_2(words, message, run, refused):
    words = [word.replace("RUN", str(run)) for word in words]
    assert re.search(message, refused(visualize.COMMANDS, words))


def test_two_landscapes_at_once_lose_none_of_their_points(tmp_path):
    table = tmp_path / "points.csv"
    with open(table, "wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(OSError, match=r"points\.csv: 107,374,182,400 bytes are too many"):
        visualize.read_table(table)
    table.unlink()

    def mine(point):
        if point == (1.0, 0.0):  # meanwhile somebody else computes others
            visualize.evaluate_points(table, [(5.0, 0.0), (6.0, 0.0)], lambda _: {"loss": 5.0}, "",
                                      ["loss"])
        return {"loss": 1.0}

    found = visualize.evaluate_points(table, [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)], mine, "",
                                      ["loss"])
    assert [*found] == [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)]
    assert {row["x"]: row["loss"] for row in visualize.read_table(table)} == {
        0.0: 1.0, 1.0: 1.0, 2.0: 1.0, 5.0: 5.0, 6.0: 5.0}
