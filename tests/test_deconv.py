"""The deconvnet against answers worked out by hand or by other means."""

import dataclasses
import sys
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_visualize import Lambda
from torch import nn
from torch.utils.checkpoint import checkpoint

import deconv
import network
import train
import visualize
from data import SHAPES, Preprocessing


def images(count=2, size=8):
    """Random normalised images."""
    return torch.randn(count, 3, size, size)


def stack(*layers):
    """A network of `layers` called 0, 1, …, with statistics that batch norms can show."""
    built = nn.Sequential(*layers).eval()
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(-1, 2)
            module.bias.data.normal_()
    return built


def unit_signal(activations, unit):
    """All of `activations` set to zero but the largest of feature map `unit` of each image."""
    start = torch.zeros_like(activations)
    for number, maps in enumerate(activations[:, unit].detach()):
        position = (number, unit, *divmod(maps.argmax().item(), maps.shape[1]))
        start[position] = maps.max()
    return start


def test_a_unit_may_be_a_tensor_and_positions_are_one_for_each_image():
    lenet, x = network.build("lenet"), torch.randn(2, 3, 32, 32)
    assert torch.equal(deconv.project(lenet, "conv2", x, torch.tensor(3)),
                       deconv.project(lenet, "conv2", x, 3))
    with pytest.raises(ValueError, match=r"unit=\[3\]: must be one number, or as many"):
        deconv.project(lenet, "conv2", x, torch.tensor([3]))


def test_one_convolution_by_hand():
    layer = nn.Conv2d(1, 1, 2, bias=True)
    layer.weight.data = torch.tensor([[[[1.0, 2.0], [-3.0, 4.0]]]])
    layer.bias.data = torch.tensor([5.0])
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 2, 1] = 1  # seen with weight 4 at (1, 0), the largest: 4 + 5 = 9
    expected = torch.zeros(4, 4)
    expected[1:3, 0:2] = 9 * layer.weight.data[0, 0]
    signal = deconv.project(stack(layer, nn.ReLU()), "1", image)
    assert torch.equal(signal[0, 0], expected)


def test_plain_stack_is_the_chain_of_unpooling_rectifying_and_transposed_convolution():
    first, second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3, stride=1)
    built, x = stack(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU()), images(2, 12)
    a = F.relu(first(x))
    pooled, switches = F.max_pool2d(a, 2, return_indices=True)
    signal = unit_signal(F.relu(second(pooled)), 4)
    signal = F.conv_transpose2d(F.relu(signal), second.weight)
    signal = F.relu(F.max_unpool2d(signal, switches, 2, output_size=a.shape[2:]))
    signal = F.conv_transpose2d(signal, first.weight, padding=1)
    torch.testing.assert_close(deconv.project(built, "4", x, unit=4), signal)
    assert not torch.allclose(deconv.project(built, "4", x, unit=4, rule="gradient"), signal)
    assert not torch.allclose(deconv.project(built, "4", x, unit=4, rule="guided"), signal)


def test_guided_is_deconvnet_masked_by_what_was_positive():
    first, second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3)
    x = images()
    before = first(x)
    signal = unit_signal(second(F.relu(before)), 2)
    signal = F.relu(F.conv_transpose2d(signal, second.weight)) * (before > 0)
    signal = F.conv_transpose2d(signal, first.weight)
    built = stack(first, nn.ReLU(inplace=True), second)
    torch.testing.assert_close(deconv.project(built, "2", x, 2, "guided"), signal)


def test_gradient_is_the_activation_times_its_gradient():
    built, x = network.build("resnet20").eval(), images(2, 32).requires_grad_()
    logits = built(x)
    expected, = torch.autograd.grad(logits[:, 3].square().sum() / 2, x)
    torch.testing.assert_close(deconv.project(built, "fc", x, 3, "gradient"), expected)


def test_strongest_unit_and_all_units():
    built, x = stack(nn.Conv2d(3, 5, 3)), images()
    maps = built(x)
    unit = maps[1].flatten(1).amax(1).argmax().item()
    alone = F.conv_transpose2d(unit_signal(maps[1:], unit), built[0].weight)
    torch.testing.assert_close(deconv.project(built, "0", x)[1:], alone)
    torch.testing.assert_close(deconv.project(built, "0", x, "all"),
                               F.conv_transpose2d(maps, built[0].weight))


@pytest.mark.parametrize("between, linear", [(nn.Identity(), True), (nn.ReLU(), False)])
def test_linear_in_the_start_where_no_rectifier_stands_between(between, linear):
    built = stack(nn.Conv2d(3, 4, 3), between, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    x = images()
    parts = sum(deconv.project(built, "4", x, unit) for unit in range(3))
    assert torch.allclose(deconv.project(built, "4", x, "all"), parts, atol=1e-6) == linear


class Residual(nn.Module):
    """relu(conv(x) + x), with the rectifier called as asked for."""

    def __init__(self, call):
        super().__init__()
        self.conv, self.call = nn.Conv2d(3, 3, 3, padding=1), call

    def forward(self, x):
        """N×3×H×W to the same."""
        return self.call(self.conv(x) + x)


def test_residual_branches_add_up():
    built, x = Residual(F.relu), images()
    start = built(x)
    expected = start + F.conv_transpose2d(start, built.conv.weight, padding=1)
    torch.testing.assert_close(deconv.project(nn.Sequential(built), "0", x, "all"), expected)


def test_batch_norm_through_and_skip():
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    built, x = stack(conv, norm, nn.ReLU()), images()
    start = built(x)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None, None]
    for bn, signal in (("through", start * scale), ("skip", start)):
        torch.testing.assert_close(deconv.project(built, "2", x, "all", bn=bn),
                                   F.conv_transpose2d(signal, conv.weight))


def relu_of_a_view(x):
    """The rectifier in place on both halves of the channels, which are views."""
    x[:, :2].relu_()
    x[:, 2:].clamp_(min=0)
    return x


SAME = {
    "module": nn.ReLU(), "in place": nn.ReLU(inplace=True), "function": F.relu,
    "torch.relu": torch.relu, "method": lambda x: x.relu(), "torch.relu_": torch.relu_,
    "method in place": lambda x: x.relu_(), "F.relu in place": lambda x: F.relu(x, True),
    "keyword": lambda x: torch.relu(input=x), "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0), "threshold": lambda x: F.threshold(x, 0, 0),
    "view": relu_of_a_view, "operator": torch.ops.aten.relu.default,
    "leaky": lambda x: F.leaky_relu(x, 0.0, True), "where": lambda x: torch.where(x > 0, x, 0),
    "maximum": lambda x: torch.maximum(x, torch.zeros(())), "product": lambda x: x * (x > 0),
    "clamp by a tensor": lambda x: x.clamp(min=torch.tensor(0.0)),
    "by a float": lambda x: (x > 0).float() * x, "sign": lambda x: x * x.sign().clamp(min=0),
    "sum by a mask": lambda x: torch.einsum("nchw,nchw->nchw", x, (x > 0).float()),
    "filled": lambda x: x.masked_fill(x < 0, 0), "compiled": torch.compile(F.relu, backend="eager"),
}


class Called(nn.Module):
    """Three convolutions, each followed by the same rectifier object."""

    def __init__(self, call):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 5, 3)
        self.call = call

    def forward(self, x):
        """N×3×H×W to N×5×H-6×W-6."""
        return self.c(self.call(self.b(self.call(self.a(x)))))


@pytest.mark.parametrize("rule", ["deconvnet", "guided"])
def test_rectifiers_however_they_are_called(rule):
    reference, x = Called(nn.ReLU()), images()
    expected = deconv.project(reference, "c", x, rule=rule)
    values = reference(x)
    for name, call in SAME.items():
        built = Called(call)
        built.load_state_dict(reference.state_dict())
        descent = deconv.descend(built, "c", x, rule=rule)
        assert torch.equal(descent.activations, values), name
        assert torch.equal(descent.signal, expected), name


class OwnReLU(torch.autograd.Function):
    """A rectifier whose backward pass is its own."""

    @staticmethod
    def forward(ctx, x):
        """x where that is positive."""
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, signal):
        """The plain gradient."""
        return signal * (ctx.saved_tensors[0] > 0)


@torch.jit.script
def scripted_relu(x):
    """A scripted function."""
    return torch.relu(x)


def relu_by_index(x):
    """The rectifier, in place."""
    x = x.clone()
    x[x < 0] = 0
    return x


HIDDEN = {
    "own": OwnReLU.apply, "scripted": scripted_relu, "index": relu_by_index,
    "sum": lambda x: (x + x.abs()) / 2, "product in place": lambda x: x.clone().mul_(x > 0),
    "vmap": torch.vmap(F.relu), "minimum": lambda x: -torch.minimum(-x, torch.zeros(())),
    "vmap of where": torch.vmap(lambda x: torch.where(x > 0, x, 0)),
    "stack": lambda x: torch.stack([x, torch.zeros_like(x)]).max(0)[0],
    "stack by amax": lambda x: torch.stack([x, torch.zeros_like(x)]).amax(0),
    "threshold above 0": nn.Threshold(0.1, 0.0), "product above 0": lambda x: x * (x > 0.1),
    "where above 0": lambda x: torch.where(x > 0.1, x, 0.0),
    "foreach": lambda x: torch._foreach_clamp_min([x], 0)[0],
    "leaky": lambda x: torch.max(x, 0.1 * x), "leaky by where": lambda x: x.where(x > 0, 0.1 * x),
    "leaky by minimum": lambda x: F.relu(x) + 0.1 * torch.minimum(x, torch.zeros(())),
    "swish": lambda x: x * x.sigmoid(), "swish in place": lambda x: x.clone().mul_(x.sigmoid()),
    "hard swish": lambda x: x * F.relu6(x + 3) / 6, "mish": lambda x: x * F.softplus(x).tanh(),
    "leaky by two": lambda x: F.relu(x) - 0.1 * F.relu(-x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "checkpoint": lambda x: checkpoint(F.relu, x, use_reentrant=True),
    "inference mode": torch.inference_mode()(F.relu), "no gradients": torch.no_grad()(F.relu),
}


@pytest.mark.parametrize("call", HIDDEN.values(), ids=HIDDEN)
def test_a_rectifier_that_cannot_be_replaced_is_said(call):
    built, x = Called(call), images()
    for rule in ("deconvnet", "guided"):
        with pytest.raises(ValueError, match=r" rectifies where rule"):
            deconv.project(built, "c", x, rule=rule)
    if call in (OwnReLU.apply, scripted_relu, relu_by_index):
        reference = Called(F.relu)
        reference.load_state_dict(built.state_dict())
        torch.testing.assert_close(deconv.project(built, "c", x, rule="gradient"),
                                   deconv.project(reference, "c", x, rule="gradient"))


@pytest.mark.parametrize("width", [6, 10, 15])
def test_a_hidden_rectifier_of_a_few_neurons_is_said(width):
    built = stack(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(400, width),
                  Residual(lambda x: (x.abs() - x) / 2), nn.Linear(width, 5))
    built[3].forward = lambda x: (x + x.abs()) / 2
    with pytest.raises(ValueError, match=r" rectifies where rule"):
        deconv.project(built, "4", images(1, 12))


def test_a_hand_made_rectifier_with_a_slope_a_channel_is_said():
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None, None]
    with pytest.raises(ValueError, match=r"where rectifies where rule=deconvnet"):
        deconv.project(Called(lambda x: x.where(x > 0, x * slopes)), "c", images(4, 16))


@pytest.mark.parametrize("call, bends", [
    (F.silu, True), (F.elu, True), (lambda x: x.where(x > 0, 0.8 * x), True),
    (lambda x: F.layer_norm(x, x.shape), False), (lambda x: x + 0.05 * torch.randn(64), False),
    (lambda x: (x.view(2, -1) * torch.tensor([[0.95], [1.05]])).flatten(), False),
    (lambda x: x * 1.1 + 0.02, False)])
def test_a_rectifier_of_64_values_is_told_from_what_moves_them_a_little(call, bends):
    torch.manual_seed(0)
    draws = [torch.randn(64) * scale for scale in (0.3, 1, 3) for _ in range(100)]
    assert {deconv.keeps_less(x, call(x)) for x in draws} == {bends}


@pytest.mark.parametrize("call, bends", [
    (F.gelu, True), (lambda x: F.leaky_relu(x, 0.8), True), (torch.tanh, False),
    (lambda x: x * torch.tensor([0.5, 0.7, 0.9, 1.1])[:, None, None], False)])
def test_a_rectifier_of_maps_is_told_from_gates_of_their_channels(call, bends):
    torch.manual_seed(0)
    middles = torch.tensor([-0.5, -0.1, 0.1, 0.5])[:, None, None]  # of its channels
    draws = [torch.randn(2, 4, 8, 8) * spread + middles for spread in (0.1, 0.3, 1)
             for _ in range(20)]
    assert {deconv.keeps_less(x, call(x)) for x in draws} == {bends}


def assigned(x):
    """Two of its channels rectified in their places."""
    x = x.clone()
    x[:, :2] = F.relu(x[:, :2])
    return x


NO_RECTIFIERS = {
    "tanh": torch.tanh, "negative": lambda x: -x, "scale": lambda x: x * torch.rand(1, 4, 1, 1),
    "in place": lambda x: x.clone().add_(F.relu(x)), "norm": lambda x: F.normalize(x),
    "scale of a place": lambda x: x * torch.linspace(0.7, 1.3, x[0, 0].numel()).view(x.shape[2:]),
    "gate": lambda x: x * x.mean((2, 3), True).tanh(), "softmax": lambda x: x.softmax(1),
    "last and back": lambda x: F.relu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous(),
    "window": lambda x: x * F.pad(torch.ones(1, 1, 2, 2), (3, x.shape[3] - 5, 4, x.shape[2] - 6)),
    "local maxima": lambda x: x * (x == F.max_pool2d(x, 3, 1, 1)),
    "slice": lambda x: x.clone().index_copy_(1, torch.arange(2), F.relu(x[:, :2])),
    "assigned": assigned, "squared": lambda x: F.relu(x) * x,
    "parts": lambda x: torch.cat([F.relu(part) for part in x.chunk(2, 1)], 1),
    "hard gate": lambda x: x * F.hardsigmoid(x.flip(2) * 4), "rest": lambda x: x - F.relu(x) * 0.5,
    "halves": lambda x: torch.cat([part * 2 for part in F.relu(torch.cat(x.chunk(2))).chunk(2)]),
}


@pytest.mark.parametrize("call", NO_RECTIFIERS.values(), ids=NO_RECTIFIERS)
def test_what_is_no_rectifier_is_not_taken_for_one(call):
    assert deconv.project(Called(call), "c", images(4, 12)).any()


def test_a_network_without_a_way_back_is_said():
    x = images(1, 32)
    lenet = network.build("lenet")
    again = stack(nn.Conv2d(3, 4, 3), Residual(nn.ReLU()))
    again[1].forward = lambda x: checkpoint(F.relu, x, use_reentrant=False)
    quantised = network.build("lenet")
    quantised.fc[0] = torch.ao.nn.quantized.dynamic.Linear(400, 120)
    for built, layer, message in (
            (torch.jit.script(lenet.eval()), "conv1", "scripted"),
            (torch.export.export(lenet, (x,)).module(), "conv1", "torch.export"),
            (quantised, "fc", "quantised"), (again, "1", "layer=1: there is no way back"),
            (stack(Residual(lambda x: torch.zeros(1, 2, requires_grad=True))), "0", "layer=0"),
            (lenet.half(), "conv2", None)):
        if message:
            with pytest.raises(ValueError, match=message):
                deconv.project(built, layer, x)
        else:
            built.conv2[0].weight.data.fill_(60_000)
            with pytest.raises(ValueError, match="conv2: the signal overflows float16"):
                deconv.project(built, layer, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_types_and_one_channel(dtype):
    built, x = stack(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)), images()
    grey = x.mean(1, keepdim=True)
    expected = deconv.project(built, "2", grey, 3) / 3  # a third of it for each channel
    descent = deconv.descend(built.to(dtype), "2", x, 3)
    torch.testing.assert_close(descent.signal, expected.expand(-1, 3, -1, -1), atol=3e-2, rtol=0.1)
    assert descent.signal.dtype == torch.float32 and descent.activations.dtype == dtype
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    found = deconv.top_reconstructions(built, "2", pixels, Preprocessing(8, (0,) * 3, (1,) * 3),
                                       [0], 2)
    assert all(part.isfinite().all() for part in found)


def test_a_network_without_parameters():
    built, x = stack(nn.AvgPool2d(2), nn.ReLU()), images()
    start = F.relu(F.avg_pool2d(x, 2))
    torch.testing.assert_close(deconv.project(built, "1", x, "all"),
                               F.interpolate(start, scale_factor=2) / 4)


def test_tokens_and_channels_that_come_last_are_maps():
    conv, x = nn.Conv2d(3, 5, 2, 2), images()
    expected = deconv.project(stack(conv), "0", x, 3)
    last = Residual(lambda x: x.permute(0, 2, 3, 1))
    last.conv, last.forward = conv, lambda x: conv(x).permute(0, 2, 3, 1)
    tokens = Residual(F.relu)
    tokens.forward = lambda x: torch.cat([x.new_ones(2, 1, 5), conv(x).flatten(2).mT], 1)
    for built in (last, tokens):
        torch.testing.assert_close(deconv.project(nn.Sequential(built), "0", x, 3), expected)


def test_a_network_that_begins_in_place_leaves_the_images_alone():
    built, x = stack(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)), images()
    before = x.clone()
    signal = deconv.project(built, "1", x, "all")
    start = F.conv2d(F.relu(before), built[1].weight, built[1].bias)
    torch.testing.assert_close(signal, F.relu(F.conv_transpose2d(start, built[1].weight)))
    assert torch.equal(x, before)


def test_a_clamp_that_rectifies_nothing_keeps_its_derivative():
    built, x = stack(nn.Conv2d(3, 4, 3), nn.Hardtanh(), nn.Conv2d(4, 4, 1)), images()
    torch.testing.assert_close(deconv.project(built, "2", x),
                               deconv.project(built, "2", x, rule="gradient"))


def test_values_and_modes_are_untouched_and_a_layer_before_one_in_place_is_seen():
    built = network.build("resnet20").train()
    built.conv1.eval()
    modes = [module.training for module in built.modules()]
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    x = images(2, 32)
    descent = deconv.descend(built, "conv2_x.0.residual.1", x)
    assert modes == [module.training for module in built.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in built.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None
               for parameter in built.parameters())
    with torch.no_grad():
        inner = built.eval().conv2_x[0].residual
        assert torch.equal(descent.activations, inner[1](inner[0](built.conv1(x))))
    assert descent.activations.min() < 0  # as it was before the activation behind it


def test_nothing_remains_after_an_exception():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    built = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Broken()).train()
    with pytest.raises(ValueError, match="broken"):
        deconv.project(built, "2", images())
    for module in built.modules():
        assert module.training
        assert not module._forward_hooks
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    gradient, = torch.autograd.grad(torch.relu(x), x, torch.tensor([-2.0, -2.0]))
    assert gradient.tolist() == [0, -2]  # the rule is gone: -2 would not pass it


def test_norms_on_the_way_down():
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
    built, x = stack(first, nn.ReLU(inplace=True), second), images()
    norms = deconv.descend(built, "2", x, "all").norms
    at_relu = F.conv_transpose2d(second(F.relu(first(x))), second.weight)
    assert list(norms) == ["2", "1", "0", "image"]
    torch.testing.assert_close(norms["1"], at_relu.flatten(1).norm(dim=1))
    torch.testing.assert_close(norms["0"], F.relu(at_relu).flatten(1).norm(dim=1))


def test_norms_leave_out_what_has_no_signal_and_take_a_modules_first_call():
    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.aside, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
            self.act = nn.ReLU()

        def forward(self, x):
            """N×3×H×W to N×4×H-2×W-2; the branch aside goes nowhere."""
            self.aside(x)
            return self.b(self.act(self.act(self.a(x))))

    built, x = Branched(), images()
    norms = deconv.descend(built, "b", x, "all").norms
    at_act = F.conv_transpose2d(built(x), built.b.weight)
    assert set(norms) == {"b", "act", "a", "image"}
    torch.testing.assert_close(norms["act"], F.relu(at_act).flatten(1).norm(dim=1))


def test_norms_are_those_of_each_images_maps_and_vectors():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 2, 3))
            self.mean, self.all = Lambda(lambda x: x.mean((1, 2, 3))), Lambda(torch.mean)
            self.b = nn.Conv2d(2, 4, 1)

        def forward(self, x):
            x = self.a(x)
            return self.b(x * self.mean(x)[:, None, None, None] * self.all(x))

    descent = deconv.descend(Scaled(), "b", images())
    assert list(descent.norms) == ["b", "a", "image"]
    torch.testing.assert_close(descent.norms["image"], descent.signal.flatten(1).norm(dim=1))


@pytest.mark.parametrize("changes, word", [
    ({"layer": "conv9"}, "conv1"), ({"unit": 64}, "63"), ({"unit": "best"}, "strongest"),
    ({"unit": torch.tensor([10**6])}, "from 0 to"), ({"unit": 1.5}, "strongest"),
    ({"unit": torch.tensor([-1])}, "from 0 to"), ({"unit": None}, "strongest"),
    ({"rule": "guess"}, "guided"), ({"bn": "both"}, "skip")])
def test_a_wrong_setting_is_named_with_what_is_allowed(changes, word):
    settings = {"network": network.build("convnet"), "layer": "conv2", "images": images(1, 32)}
    with pytest.raises(ValueError, match=word):
        deconv.project(**{**settings, **changes})


def test_gallery_starts_where_the_unit_was_strongest():
    built = stack(nn.Conv2d(3, 4, 3), nn.ReLU())
    pixels = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8)
    preprocessing = Preprocessing(8, (0.5,) * 3, (0.25,) * 3)
    patches, back, values = deconv.top_reconstructions(built, "1", pixels, preprocessing, [2, 3], 4)
    assert patches.shape == back.shape == (2, 4, 3, 3, 3)
    filters = deconv.as_pictures(built[0].weight.detach()[[2, 3]])  # what one activation sends
    torch.testing.assert_close(back, filters[:, None].expand_as(back))
    x = patches.flatten(0, 1) / 0.25 - 2
    torch.testing.assert_close(built(x).view(2, 4, 4)[[0, 1], :, [2, 3]], values)


class OnePixel(nn.Module):
    """Looks at the red of row 5, column 2 alone: a map that holds it, and logits (its value, 0)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.conv.weight.data = torch.tensor([[0.0, 0, 0], [1, 0, 0]])[:, :, None, None]

    def forward(self, x):
        """N×3×H×W to N×2."""
        value = self.conv(x)[:, 1, 5, 2]
        return torch.stack([value, torch.zeros_like(value)], 1)


def test_occlusion_of_a_network_that_looks_at_one_pixel():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[0, 0, 5, 2] = 255
    # As normalised, white is 2, black −2 and 128 of 255 is 4·128/255 − 2.
    preprocessing, grey = Preprocessing(8, (0.5,) * 3, (0.25,) * 3), 4 * 128 / 255 - 2
    found = deconv.occlude(OnePixel(), "conv", image, preprocessing, 1, 0, size=3, stride=1)
    covers = torch.zeros(8, 8, dtype=torch.bool)
    covers[4:7, 1:4] = True  # centres of 3×3 squares with the pixel in them
    expected = torch.where(covers, torch.tensor(grey), torch.tensor(2.0)).sigmoid()
    torch.testing.assert_close(found.probabilities, expected)
    assert found.predictions.tolist() == torch.zeros(8, 8).long().tolist()  # grey is above 0
    for (row, column), covered in {(0, 0): 4, (3, 5): 9, (5, 2): 9, (7, 3): 6}.items():
        hit = covers[row, column].item()
        total = 2 - 2 * 63 + covered * (grey + 2) + hit * (-2 - 2)
        assert found.activations[row, column].item() == pytest.approx(total, abs=1e-4)
    # Even squares and wider steps: the centres 1, 3, 5, 7 of squares [−1, 3), [1, 5), [3, 7), …
    found = deconv.occlude(OnePixel(), "conv", image, preprocessing, 1, 0, size=4, stride=2)
    assert (found.probabilities < 0.6).nonzero().tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]


def test_of_a_layer_that_is_called_twice_the_first_call_counts_everywhere():
    image, pool = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8), nn.AvgPool2d(2)
    built = nn.Sequential(OrderedDict(  # as many a first network has it
        pool=pool, again=pool, flatten=nn.Flatten(), fc=nn.Linear(12, 2)))
    preprocessing = Preprocessing(8, (0.5,) * 3, (0.25,) * 3)
    x = preprocessing(image)
    expected = F.avg_pool2d(x, 2)
    for layers in (["pool"], ["pool", "fc"]):
        assert torch.equal(visualize.feature_maps(built, layers, x)["pool"], expected)
    assert torch.equal(deconv.descend(built, "pool", x).activations, expected)
    # A square at the corner leaves the sum of map 1 as it is but for what it covers.
    found = deconv.occlude(built, "pool", image, preprocessing, 1, 0, size=2, stride=2)
    x[:, :, :2, :2] = 4 * 128 / 255 - 2
    assert found.activations[0, 0].item() == pytest.approx(F.avg_pool2d(x, 2)[0, 1].sum().item(),
                                                           abs=1e-4)
    assert network.grad_cam(built, x, 0, "pool")[0].shape == (1, 4, 4)


def test_tokens_whose_batch_is_no_first_dimension_are_refused():
    patches = Residual(None)  # T×N×C, as a transformer of torch has them by default
    patches.forward = lambda x: patches.conv(x).flatten(2).permute(2, 0, 1)
    built = nn.Sequential(patches, nn.Identity(), Residual(None))
    built[2].forward = lambda x: x.mean(0)
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for look in (lambda x: deconv.project(built, "0", x),
                 lambda x: deconv.move_apart(built, ["0"], x, torch.tensor([0]),
                                             deconv.moves(8)["scale"]),
                 lambda x: deconv.occlude(built, "0", image, Preprocessing(8, (0,) * 3, (1,) * 3),
                                          0, 0, 8, 8)):
        with pytest.raises(ValueError, match="layer=0: returns 64 maps or vectors for 1 images"):
            look(images(1))


@pytest.mark.parametrize("stride, centres", [(20, [10, 30]), (5, [2, 7, 12, 17, 22, 27]),
                                             (100, [16])])
def test_the_square_is_drawn_where_it_was(stride, centres):
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    preprocessing = Preprocessing(32, (0.5,) * 3, (0.25,) * 3)
    found = deconv.occlude(OnePixel(), "conv", image, preprocessing, 1, 0, 8, stride)
    assert found.probabilities.shape == (len(centres), len(centres))
    found.probabilities[:] = 0.2
    found.probabilities[-1, -1] = 0.9  # it may rise, too
    figure = deconv.draw_occlusion(torch.zeros(3, 32, 32), found, torch.zeros(3, 32, 32), 8, stride,
                                   "", "", 0.3, ["a", "b"], "")
    shown = torch.tensor(figure.axes[0].images[0].get_array())[:, :, 0]
    top, bottom = centres[-1] - 4, min(centres[-1] + 4, 32)
    assert (shown == 0.5).nonzero().amin(0).tolist() == [top, top]
    assert (shown == 0.5).nonzero().amax(0).tolist() == [bottom - 1, bottom - 1]
    for axes in figure.axes[:5]:  # each cell lies around its square's centre
        assert axes.get_xlim() == (0, 32) and axes.get_ylim() == (32, 0)
    left, right, *_ = figure.axes[1].images[0].get_extent()
    assert (right - left) / len(centres) == min(stride, 32)


def test_a_square_that_changes_nothing_is_not_shown():
    nothing = deconv.Occlusion(torch.ones(4, 4), torch.full((4, 4), 0.3), torch.zeros(4, 4).long())
    black = torch.zeros(3, 32, 32)
    figure = deconv.draw_occlusion(black, nothing, black, 8, 8, "", "", 0.3 + 1e-8, ["a", "b"], "")
    assert not figure.axes[0].images[0].get_array().any()
    assert "leaves the probability as it is" in figure.axes[0].get_title()


def test_of_a_unit_that_is_dead_no_pixels_are_framed():
    built = network.build("convnet").eval()
    descents = {"conv1": {"through": deconv.descend(built, "conv1", images(1, 32))}}
    with torch.no_grad():
        built.conv2[0].weight.fill_(0)
        built.conv2[0].bias.fill_(-1)
    descents["conv2"] = {"through": deconv.descend(built, "conv2", images(1, 32))}
    figure = deconv.draw_reconstructions(torch.zeros(3, 32, 32), descents, "", {})
    assert [len(figure.axes[first].patches) for first in (0, 3)] == [1, 0]
    assert figure.axes[4].get_title() == "nothing comes back"


class Parts(nn.Module):
    """A list of modules first, which is none itself, and a linear layer before the convolution."""

    def __init__(self):
        super().__init__()
        self.fc, self.blocks = nn.Linear(4 * 16 * 16, 2), nn.ModuleList([nn.Conv2d(3, 4, 2, 2)])

    def forward(self, x):
        """N×3×32×32 to N×2; 4·16·16 is 32·32, as many values as a grey image has."""
        return self.fc(self.blocks[0](x).flatten(1))


def test_parts_that_are_not_called_are_no_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "load", lambda *_, **__: (Parts().eval(), network.Description(
        "parts", (), Preprocessing(32, (0.5,) * 3, (0.25,) * 3))))
    figure = deconv.invariance("parts", 2, data="shapes", out=str(tmp_path))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[1:3] == ["fc: Euclidean distance", "probability of the class"]


def test_norms_are_named_without_what_all_paths_begin_with():
    figure = visualize.new_figure(3, 3, "")
    norms = {name: torch.ones(1) for name in (
        "body.two.b", "body.two.a", "body.two", "body.one.a", "body.one", "image")}
    deconv.draw_norms(figure, figure.add_gridspec(1, 1)[0, 0], {"through": norms})
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["two", "one", "image"]


def test_features_of_moved_images_by_hand():
    x = torch.zeros(1, 3, 8, 8)
    x[0, 0, 5, 2] = 2
    moves = deconv.moves(8)["vertical translation / pixels"]
    assert [amount for amount, _ in moves] == [-2, -1, 0, 1, 2]
    distances, shares = deconv.move_apart(OnePixel(), ["conv"], x, torch.tensor([1]), moves)
    # The pixel's value is at another place of the map: two differences of 2.
    expected = torch.tensor([8.0, 8, 0, 8, 8]).sqrt()[:, None]
    torch.testing.assert_close(distances["conv"], expected)
    torch.testing.assert_close(shares[:, 0], torch.tensor([0.0, 0, -2, 0, 0]).sigmoid())
    turned = deconv.moved(x, deconv.moves(8)["rotation / degrees"][18][1])  # 180°
    torch.testing.assert_close(turned, x.flip(2, 3), atol=1e-4, rtol=0)
    large = deconv.moved(torch.ones(1, 3, 8, 8), deconv.moves(8)["scale"][-1][1])
    torch.testing.assert_close(large, torch.ones(1, 3, 8, 8))


@pytest.fixture
def run(tmp_path):
    """A run's folder with snapshots of an untrained LeNet, in which one filter comes to be."""
    folder, lenet = tmp_path / "runs" / "lenet", network.build("lenet")
    folder.mkdir(parents=True)
    config = train.Config.create(model="lenet", data="shapes", limit=40, name="lenet")
    lenet.conv1[0].weight.data[0] = 0
    lenet.conv1[0].bias.data[0] = 0
    for epoch in (1, 2, 10):
        network.save(folder / f"snapshot-{epoch:04}.pth", {
            "model": "lenet", "options": {}, "classes": list(SHAPES), "image_size": 32,
            "mean": [0.5] * 3, "std": [0.25] * 3, "weights": lenet.state_dict(),
            "settings": dataclasses.asdict(config), "epoch": epoch, "step": epoch})
        lenet.conv1[0].weight.data[0, 0] += 1
    (folder / "last.pth").write_bytes((folder / "snapshot-0010.pth").read_bytes())
    return folder


def test_the_papers_figures_of_a_run(run, capsys, coarse_figures):
    figure = deconv.evolution(str(run), "conv1", units=(0, 3), device="cpu")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[0] == "epoch 1: 0" and texts[1].startswith("epoch 2: ")
    assert texts[2].startswith("epoch 10: ") and len(texts) == 6
    assert float(texts[2].split()[-1]) == pytest.approx(2 * float(texts[1].split()[-1]), rel=0.1)
    figure = deconv.occlusion(str(run), index=1, device="cpu")
    assert "true class" in figure.axes[3].get_title() and "conv2" in figure.axes[1].get_title()
    figure = deconv.occlusion(str(run), layer="fc", stride=8, device="cpu")  # has no maps
    assert "feature map" in figure.axes[1].get_title()
    figure = deconv.invariance(str(run), 2, device="cpu")
    assert [axes.get_title() for axes in figure.axes[1:4]] == [
        "conv1: Euclidean distance", "fc: Euclidean distance", "probability of the class"]
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="two snapshots or more"):
        deconv.evolution(str(run / "last.pth.none"), "conv1")


def test_a_hidden_layer_of_ten_units_has_no_classes(run, tmp_path, coarse_figures):
    built = network.build("simple_cnn", hidden=(10,))
    checkpoint = network.read(run / "last.pth") | {"model": "simple_cnn", "weights": None,
                                                   "options": {"hidden": (10,)}}
    network.save(tmp_path / "a.pth", checkpoint | {"weights": built.state_dict()})
    figure = deconv.reconstruct(str(tmp_path / "a.pth"), ("fc.0", "fc"), device="cpu")
    hidden, logits = (axes.get_title() for axes in (figure.axes[0], figure.axes[3]))
    assert "(" not in hidden and any(f"({name})" in logits for name in SHAPES)


def test_snapshots_are_chosen_evenly_in_the_order_of_training(tmp_path):
    checkpoint = {name: kind() for name, kind in network.REQUIRED.items()}
    for number in (1, 2, 5, 10, 20, 100, 1000):
        network.save(tmp_path / f"snapshot-{number}.pth", checkpoint | {"epoch": number})
    for epoch, names in ((1000, ["1", "5", "20", "1000"]), (1001, ["1", "5", "20", ""])):
        # What the run ended with is the end, unless a snapshot has it.
        network.save(tmp_path / "last.pth", checkpoint | {"epoch": epoch})
        assert [path.name[9:-4] for path in visualize.snapshots(tmp_path, most=4)] == names
    for path in tmp_path.glob("snapshot-*"):
        path.rename(tmp_path / f"step-{int(path.name[9:-4]):09}.pth")
    names = [path.name for path in visualize.snapshots(tmp_path, most=2)]
    assert names == ["step-000000001.pth", "last.pth"]


def test_occlusion_compares_probabilities_of_one_precision(run, tmp_path, monkeypatch):
    Image.new("RGB", (32, 32), (128, 128, 128)).save(tmp_path / "grey.png")  # as the square is
    opened, drawn = visualize.open_picture, []

    def in_bf16(*args, **flags):
        net, about, *others = opened(*args, **flags)
        fast = dataclasses.replace(about.preprocessing, precision="bf16")
        return net, dataclasses.replace(about, preprocessing=fast), *others

    draw = deconv.draw_occlusion
    monkeypatch.setattr(visualize, "open_picture", in_bf16)
    monkeypatch.setattr(deconv, "draw_occlusion", lambda *args: drawn.append(args) or draw(*args))
    deconv.occlusion(str(run), image=str(tmp_path / "grey.png"), stride=16, device="cpu")
    (_, found, _, _, _, _, _, share, *_), = drawn
    assert found.probabilities.unique().tolist() == pytest.approx([share], rel=1e-6)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with a module of networks, a picture, a data set, and no cached weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def tiny():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
        "def grey():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten(),\n"
        "                         nn.Linear(196, 5)).half()\n")
    for name in ("train/a/1.png", "test/a/1.png", "test/a/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
    return tmp_path


def test_commands_write_their_figures(elsewhere, capsys):
    common = {"network": "nets:tiny", "image_size": 16, "device": "cpu"}
    figures = [
        deconv.reconstruct(layers=("0", "2"), image="test/a/1.png", bn="both", **common),
        deconv.reconstruct("nets:tiny", "2", "test/a/1.png", image_size=16),  # as a checkpoint is
        deconv.gallery(layer="2", units=2, top=2, data=".", root="cache", out="g.svg", **common),
        deconv.occlusion(image="test/a/1.png", network="nets:grey", image_size=16, device="cpu"),
        deconv.invariance(count=2, network="nets:grey", image_size=16, device="cpu", data=".")]
    assert capsys.readouterr().out == ""
    paths = [str(figure.path) for figure in figures]
    assert paths == ["runs/figures/reconstruct-0-2-bn-both.png", "runs/figures/reconstruct-2.png",
                     "g.svg", "runs/figures/occlusion.png", "runs/figures/invariance.png"]
    assert all((elsewhere / path).stat().st_size > 10_000 for path in paths)


@pytest.mark.parametrize("flags, word", [
    ("--network=torchvision:resnet18", "resnet18-"), ("--network=torchvision:nope", "nope"),
    ("--network=nets:none", "none"), ("--network=nowhere:f", "nowhere"), ("", "checkpoint"),
    ("--network=nets:tiny", "--image"), ("nets.py", "nets.py"),
    ("--network=nets:tiny --weights=nets.py", "weights=nets.py"),
    ("--network=nets:tiny --image=nets.py", "nets.py"),
    ("--network=nets:tiny --image=test/a/1.png --layers=9", "layer=9"),
    ("--network=nets:tiny --image=test/a/1.png --format=gif", "svg")])
def test_mistakes_are_one_line_and_exit_2(elsewhere, refused, flags, word):
    assert word in refused(deconv.COMMANDS, ["reconstruct", "--device=cpu", *flags.split()])
