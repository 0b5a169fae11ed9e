"""Every architecture, and the checkpoints that hold them.

    python network.py list
    python network.py summary resnet18_imagenet
    python network.py summary convnet --dropout=0.2 --image_size=64

A network is an `nn.Sequential` of stages that carry the names of its paper: `conv1`, `conv2_x` …
`conv5_x`, `fc`. Most are one line of text or data in `NETWORKS`.

stage of resnet18_imagenet    output at 224      parameters
conv1                         64×112×112              9 536
conv2_x                       64×56×56              147 968
conv3_x                       128×28×28             525 568
conv4_x                       256×14×14           2 099 712
conv5_x                       512×7×7             8 393 728
fc                            10                      5 130    (in all 11 181 642)
"""

import contextlib
import hashlib
import importlib
import inspect
import io
import itertools
import math
import os
import pickle
import re
import sys
import typing
import zipfile
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from data import (
    Flag,
    Made,
    Preprocessing,
    Table,
    check_regular,
    closest,
    command_line,
    generator,
    nested,
    out_of_memory,
    parse_value,
    progress,
    text_of,
    value_in,
    write_atomically,
)

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "gelu": nn.GELU,
               "silu": nn.SiLU}
Activation = typing.Literal[tuple(ACTIVATIONS)]
# Functions as they are called, by their names.
RECTIFIERS = {"relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "gelu",
              "silu", "hardswish", "mish", "softplus"}
BOUNDED = {"clamp", "clip", "clamp_min", "hardtanh", "threshold"}  # rectifiers from 0 on
OPTION_MEANINGS = {
    "dropout": "share of the values that are dropped behind each pooling, in training",
    "activation": "what follows each convolution and each linear layer but the last:",
    "batch_norm": "batch norm between each convolution and its activation",
    "channels": "feature maps of each convolution, or of each stage, separated by commas",
    "hidden": "widths of the linear layers before the last, separated by commas",
    "width": "feature maps of the first stage, doubled from stage to stage; none: the paper's",
}
OPTION_LIMITS = {"dropout": (0, 0.9999), "width": (1, 256), "channels": (1, 2048),
                 "hidden": (1, 2048)}


# ---------------------------------------------------------------------------- building blocks


def activation_layer(name):
    """The activation called `name` as a new module; in place where that is safe."""
    return ACTIVATIONS[name](inplace=True) if name != "gelu" else nn.GELU()


class Network(nn.Sequential):
    """Named layers, one after another.

    PyTorch 2.11's torch.compile goes past an nn.Sequential, to each of the layers that it calls: so
    this is one of our own, which is compiled as a whole.
    """

    def forward(self, x: Tensor) -> Tensor:
        """N×3×H×W images to N×classes logits."""
        for layer in self:
            x = layer(x)
        return x


def conv_bn(inputs, outputs, kernel, stride=1, activation=None):
    """A convolution without bias, padded to keep the size, batch norm, and maybe an activation."""
    # Batch norm subtracts the mean, and with it any constant that a bias had added.
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
              nn.BatchNorm2d(outputs)]
    return layers + ([activation_layer(activation)] if activation else [])


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, figure 5, left)."""

    expansion = 1

    def __init__(self, inputs, width, stride, activation, shortcut):
        super().__init__()
        self.residual = nn.Sequential(*self.branch(inputs, width, stride, activation))
        self.shortcut = shortcut(inputs, width * self.expansion, stride)
        self.activation = activation_layer(activation)

    def branch(self, inputs, width, stride, activation):
        """The layers beside the shortcut."""
        return [*conv_bn(inputs, width, 3, stride, activation), *conv_bn(width, width, 3)]

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W to N×expansion·width×H/stride×W/stride."""
        # Through the sum the gradient reaches x as it is, past all layers of the residual branch.
        return self.activation(self.residual(x) + self.shortcut(x))


class Bottleneck(BasicBlock):
    """1×1, 3×3 and 1×1 convolutions and a shortcut (He et al. 2016, figure 5, right)."""

    expansion = 4

    def branch(self, inputs, width, stride, activation):
        """The layers beside the shortcut; the stride is at the 3×3, as in torchvision."""
        # The 3×3 convolution has a quarter of the channels on either side: it costs 1/16.
        return [*conv_bn(inputs, width, 1, 1, activation),
                *conv_bn(width, width, 3, stride, activation),
                *conv_bn(width, width * self.expansion, 1)]


def projection_shortcut(inputs, outputs, stride):
    """Identity, or a strided 1×1 convolution where the shape changes (He et al., option B)."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(*conv_bn(inputs, outputs, 1, stride))


class PaddedShortcut(nn.Module):
    """Identity by strided slicing and zero channels, free of parameters (He et al., option A)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W to N×(C + extra)×H/stride×W/stride."""
        # F.pad counts from the last dimension: of W and H nothing, of C none before, some behind.
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, 0, self.extra))


# ---------------------------------------------------------------------------- architectures


def plain(layers, hidden=(), he=False, *, classes=10, image_size=32, dropout: float = 0.0,
          activation: Activation = "relu", batch_norm: bool = False):
    """A network without branches, from a line of text: convolutions, then linear layers.

    In `layers`, with S×S the size so far,

        64      a convolution to 64 channels with a 3×3 kernel and padding 1: 64×S×S
        32k3    one to 32 channels with a 3×3 kernel: 32×(S−2)×(S−2)
        18k5p1  one to 18 channels with a 5×5 kernel and padding 1: 18×(S−2)×(S−2)
        M, A    2×2 max- or average-pooling, which ends a stage: C×S/2×S/2

    An activation follows each convolution (after batch norm, if that is asked for) and `dropout`
    each pooling. Stages are `conv1`, `conv2` …; `hidden` are the widths of the linear layers
    before the last, so `plain("6k5 M 16k5 M", (120, 84))` is LeNet. `he` is for deep networks, see
    `he_initialization`.
    """
    stages, channels, side, largest = [[]], 3, image_size, 0
    for word in layers.split():
        if word in "MA":
            side //= 2
            stages[-1].append(nn.MaxPool2d(2) if word == "M" else nn.AvgPool2d(2))
            stages[-1] += [nn.Dropout(dropout)] if dropout else []
            stages.append([])
            continue
        word = word if "k" in word else f"{word}k3p1"
        outputs, kernel, padding = map(int, re.fullmatch(r"(\d+)k(\d+)(?:p(\d+))?", word)
                                         .groups("0"))
        stages[-1].append(nn.Conv2d(channels, outputs, kernel, padding=padding))
        # So many places there are for a kernel×kernel window in a row of S + 2·padding pixels.
        channels, side = outputs, side + 2 * padding - kernel + 1
        largest = max(largest, channels * side**2)
        stages[-1] += [nn.BatchNorm2d(channels)] if batch_norm else []
        stages[-1].append(activation_layer(activation))
    # A text that ends in M leaves an empty stage behind, which is none.
    network = Network(OrderedDict(
        (f"conv{number}", nn.Sequential(*stage)) for number, stage in enumerate(stages, 1) if stage
    ))
    widths = [channels * side**2, *hidden]  # C·S·S values are left for the first linear layer
    if side < 1:
        raise ValueError("nothing is left of them")
    if max(largest, math.prod(widths[:2])) > 2**28:
        raise ValueError("more memory than is reasonable")
    linear = []
    for inputs, outputs in itertools.pairwise(widths):
        linear += [nn.Linear(inputs, outputs), activation_layer(activation)]
    network.add_module("flatten", nn.Flatten())
    # The last linear layer gives logits, and has no activation behind it.
    network.add_module("fc", nn.Sequential(*linear, nn.Linear(widths[-1], classes)))
    return he_initialization(network) if he else network


def simple_cnn(*, classes=10, image_size=32, channels: tuple[int, ...] = (18,),
               hidden: tuple[int, ...] = (64,), dropout: float = 0.0,
               activation: Activation = "relu"):
    """The small CNN of the trials: 3×3 and then 4×4 convolutions, each before a max-pool."""
    # Sizes at 32 pixels: 32, pooled 16, then 15 by the first 4×4 kernel, pooled 7.
    layers = " ".join(f"{width}{'k4p1' if index else 'k3p1'} M"
                      for index, width in enumerate(channels))
    return plain(layers, hidden, classes=classes, image_size=image_size, dropout=dropout,
                 activation=activation)


def resnet(block, depths, first_width, stem, shortcut=projection_shortcut, *, classes=10,
           image_size=32, activation: Activation = "relu", width: int | None = None):
    """A residual network (He et al. 2016): `conv1`, stages `conv2_x` …, average pool, `fc`.

    `stem` is `cifar` (3×3) or `imagenet` (7×7 with stride 2, then a 3×3 max-pool with stride 2).
    The stages are `width`, 2·width, 4·width … wide and each but the first halves the size.
    """
    width = first_width if width is None else width
    kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
    network = Network()
    network.conv1 = nn.Sequential(*conv_bn(3, width, kernel, stride, activation))
    inputs = width
    for stage, depth in enumerate(depths):
        blocks = [nn.MaxPool2d(3, 2, 1)] if stem == "imagenet" and stage == 0 else []
        for number in range(depth):
            # Maps of half the side are twice as many: every stage's blocks cost the same.
            first_of_later_stage = stage > 0 and number == 0
            blocks.append(block(inputs, width * 2**stage, 2 if first_of_later_stage else 1,
                                activation, shortcut))
            # A bottleneck gives out four times as many maps as its 3×3 convolution has.
            inputs = width * 2**stage * block.expansion
        network.add_module(f"conv{stage + 2}_x", nn.Sequential(*blocks))
    network.pool = nn.AdaptiveAvgPool2d(1)
    network.flatten = nn.Flatten()
    network.fc = nn.Linear(inputs, classes)
    return he_initialization(network)


class WhiteningConv(nn.Conv2d):
    """A 2×2 convolution whose filters decorrelate the patches of the training images.

    Its filters are the eigenvectors of the patches' covariance, each divided by the root of its
    eigenvalue, and their negatives. They are set once by `fit` and not trained (Page 2019;
    Jordan 2024, section 3.1). N×3×H×W to N×24×(H−1)×(W−1).
    """

    def __init__(self):
        # A patch of 2×2 pixels in 3 colours has 12 directions, and each has two signs.
        super().__init__(3, 24, 2, bias=False)
        self.weight.requires_grad_(False)

    def fit(self, images):
        """Set the filters by normalised `images`, N×3×H×W.

        What is added to the eigenvalues keeps directions that hold next to nothing small, such
        as the fine colour that JPEG leaves out.
        """
        # With the covariance C = V·Λ·Vᵀ of the patches p, the outputs Λ^(−½)·Vᵀ·p have the
        # covariance Λ^(−½)·Vᵀ·C·V·Λ^(−½) = 1. In float64, on the CPU: MPS has no float64.
        patches = F.unfold(images.cpu(), 2).permute(0, 2, 1).flatten(0, 1).double()
        values, vectors = torch.linalg.eigh(patches.T.cov())
        filters = (vectors / (values + 5e-2).sqrt()).T.reshape(-1, *self.weight.shape[1:])
        with torch.no_grad():  # the negatives keep what the activation cuts off of the others
            self.weight.copy_(torch.cat([filters, -filters]))


class MixedPool(nn.Module):
    """Mean of a window's maximum and average (Lee et al. 2016, section 3.1, with a share of 1/2).

    Windows of `size`×`size`, or one that is the whole feature map.
    """

    def __init__(self, size=None):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """N×C×H×W to N×C×H/size×W/size, or N×C×1×1."""
        if self.size:
            return (F.max_pool2d(x, self.size) + F.avg_pool2d(x, self.size)) / 2
        # Not F.adaptive_max_pool2d, which CUDA cannot send back the same way each time, and not
        # amax, which shares the gradient out where several are largest.
        return (F.max_pool2d(x, x.shape[2:]) + x.mean((2, 3), keepdim=True)) / 2


def speednet(*, classes=10, image_size=32, channels: tuple[int, ...] = (48, 128, 256),
             activation: Activation = "gelu"):
    """A network for time to accuracy, after airbench (Jordan 2024, section 3), less wide.

    A whitening convolution, then stages of a 3×3 convolution, which is pooled, and a residual
    block. What is left of each feature map is pooled whole for `fc`, whatever the images' size.
    """
    if image_size <= 2 ** len(channels):
        raise ValueError("nothing is left of them")
    if len(channels) * max(channels, default=0) ** 2 > 2**24:
        raise ValueError("more memory than is reasonable")
    network = Network()
    network.conv1 = nn.Sequential(WhiteningConv(), activation_layer(activation))
    inputs = network.conv1[0].out_channels
    for number, width in enumerate(channels, 2):
        # Pooled first, norm and activation have a quarter of the values to go through.
        convolution, norm = conv_bn(inputs, width, 3)
        network.add_module(f"conv{number}_x", nn.Sequential(
            convolution, MixedPool(2), norm, activation_layer(activation),
            BasicBlock(width, width, 1, activation, projection_shortcut)))
        inputs = width
    network.pool = MixedPool()
    network.flatten = nn.Flatten()
    network.fc = nn.Linear(inputs, classes, bias=False)
    # The first filters pass their channel on as it is, so that the gradient finds its way from the
    # first step on (Jordan 2024).
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            nn.init.dirac_(module.weight[:module.in_channels])
    return network


def he_initialization(network):
    """Normal weights, std √(2 / fan in), before every activation (He et al. 2015, section 2.2)."""
    # A sum of n terms w·x has the variance n·Var(w)·E(x²). Where x comes from a rectifier, E(x²) is
    # half the variance of what went into it; so with Var(w) = 2/n the variance stays the same from
    # layer to layer. For the first, which sees images, a factor matters little; the last keeps
    # PyTorch's smaller weights, so that training begins with all classes about as likely.
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module is not last:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


VGG_LAYERS = {
    11: "64 M 128 M 256 256 M 512 512 M 512 512 M",
    13: "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}
vgg = partial(plain, he=True)  # so deep that it does not learn without
TRIAL_HIDDEN = (360, 252, 99, 30)

NETWORKS = {
    # LeCun et al. 1998, for colour images and with today's activations; its colour variant of a
    # lab report has three times the channels and the paper's average pooling.
    "lenet": partial(plain, "6k5 M 16k5 M", (120, 84)),
    "lenet5_color": partial(plain, "18k5p1 A 48k5p1 A", (360, 252, 30)),
    # The small networks of the lab reports (lab/experiments.toml, 2.x and 4.x).
    "convnet": partial(plain, "32k3 32k3 M 64k3 64k3 M", (512,)),
    "convnet_large": partial(plain, "32k3 64k3 M 128k3 256k3 M", (1024, 512)),
    "simple_cnn": simple_cnn,
    "trial_3conv": partial(plain, "18 M 54 M 108 M", TRIAL_HIDDEN),
    "trial_4conv": partial(plain, "18 M 54 M 108 M 216 M", TRIAL_HIDDEN),
    "trial_4conv_late_pool": partial(plain, "18 54 M 108 M 216 M", TRIAL_HIDDEN),
    # Simonyan & Zisserman 2015, table 1: vgg16_1x1 is configuration C, others are A, B, D and E,
    # vgg_a is A with hidden linear layers, and those in _bn have batch norm.
    "vgg16_1x1": partial(vgg, "64 64 M 128 128 M 256 256 256k1 M 512 512 512k1 M 512 512 512k1 M",
                         (256, 256)),
    "vgg_a": partial(vgg, VGG_LAYERS[11], (512, 512)),
    "vgg_a_bn": partial(vgg, VGG_LAYERS[11], (512, 512), batch_norm=True),
    **{f"vgg{depth}": partial(vgg, layers) for depth, layers in VGG_LAYERS.items()},
    **{f"vgg{depth}_bn": partial(vgg, layers, batch_norm=True)
       for depth, layers in VGG_LAYERS.items()},
    "speednet": speednet,
    # He et al. 2016, table 1, for images of 32×32: without the first stride and pooling.
    "resnet18": partial(resnet, BasicBlock, (2, 2, 2, 2), 64, "cifar"),
    "resnet34": partial(resnet, BasicBlock, (3, 4, 6, 3), 64, "cifar"),
    "resnet50": partial(resnet, Bottleneck, (3, 4, 6, 3), 64, "cifar"),
    # Section 4.2, the paper's own networks for CIFAR-10: 6·n + 2 layers, for n = 3 and n = 9.
    "resnet20": partial(resnet, BasicBlock, (3, 3, 3), 16, "cifar", PaddedShortcut),
    "resnet56": partial(resnet, BasicBlock, (9, 9, 9), 16, "cifar", PaddedShortcut),
    # Table 1 as it stands, for 224×224.
    "resnet18_imagenet": partial(resnet, BasicBlock, (2, 2, 2, 2), 64, "imagenet"),
}


def image_size_of(name):
    """The side of the images that network `name` is meant for, in pixels."""
    return 224 if name.endswith("_imagenet") else 32


def options_of(name):
    """The options of network `name`: {option: (type, default)}."""
    if not isinstance(name, str) or name not in NETWORKS:
        name = str(name)[:80]
        raise ValueError(f"model={name}: no such network"
                         f"{closest(name, NETWORKS) or '; known: ' + ', '.join(NETWORKS)}")
    # A row of NETWORKS is a function, or a partial one whose `func` has the annotations.
    constructor = NETWORKS[name]
    function = getattr(constructor, "func", constructor)
    # What is annotated is an option, but for what this row of NETWORKS has settled already.
    hints = typing.get_type_hints(function)
    return {option: (hints[option], parameter.default)
            for option, parameter in inspect.signature(constructor).parameters.items()
            if option in hints and option not in getattr(constructor, "keywords", {})}


def check_options(name, options):
    """`options` of network `name` as values of their types, which may be given as text; ValueError
    when it has no such option, or not with such a value."""
    known, values = options_of(name), {}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}{closest(option, known)}; its "
                             f"options: {', '.join(known)}")
        values[option] = value = parse_value(option, text_of(value), known[option][0])
        if option in OPTION_LIMITS and value is not None:
            low, high = OPTION_LIMITS[option]
            parts = value if isinstance(value, tuple) else (value,)
            if len(parts) > 19 or not all(low <= part <= high for part in parts):
                raise ValueError(f"{option}={text_of(value)}: must be from {low} to {high}"
                                 f"{', at most 19 of them' * isinstance(value, tuple)}")
    return values


def build(name, classes=10, image_size=None, **options):
    """Network `name` with fresh weights. Every network maps N×3×S×S images to N×classes logits.

    Raises ValueError for an unknown network, an option it does not have, a value out of range,
    or images too small for it.
    """
    options = check_options(name, options)
    image_size = image_size_of(name) if image_size is None else image_size
    for what, value, most in (("image_size", image_size, 1024), ("classes", classes, 100_000)):
        if not (hasattr(value, "__index__") and 1 <= value <= most):  # NumPy's count too
            raise ValueError(f"{what}={value}: must be a whole number from 1 to {most}")
    try:
        # Images that are too small show as a layer without outputs: PyTorch's error is passed on.
        return NETWORKS[name](classes=int(classes), image_size=int(image_size), **options)
    except (RuntimeError, ValueError) as error:
        given = ", ".join(f"{option}={value}" for option, value in options.items())
        raise ValueError(f"{name} cannot take {image_size}×{image_size} images"
                         f"{' with ' * bool(given)}{given}: "
                         f"{str(error).splitlines()[0]}") from error


def check_size(network, size):
    """ValueError unless `network` takes images of size×size as well as those it was built for."""
    with told(f"the network was built for images of another size and cannot take {size}×{size} "
              f"ones"):
        outputs_of(network, [], size)


def find_layer(network, layer):
    """The module with the dotted path `layer`; ValueError lists the paths there are."""
    modules = dict(network.named_modules(remove_duplicate=False))  # one may have two names
    if not layer or layer not in modules:
        top = [name for name, _ in network.named_children()]
        raise ValueError(f"layer={layer}: the network has no such layer; it has " + (
            f"{', '.join(top)} and, inside them, paths such as {[*modules][-1]}" if top
            else "none at all"))
    return modules[layer]


def last_linear(network, image_size):
    """The name of the linear layer that comes last for an image of that side: what goes into it are
    the penultimate features."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    done = [*outputs_of(network, names, image_size)]  # not as they were made: as they end
    if not done:
        raise ValueError("the network has no linear layer; `layer` names another")
    return done[-1]


@torch.no_grad()
def weights_used(network, convolution, image_size):
    """The weights with which a convolution of `network` computes: they may be made when it runs, as
    of weight norm, pruned, standardised or masked."""
    if type(convolution).forward is nn.Conv2d.forward and isinstance(
            convolution.weight, nn.Parameter):
        return convolution.weight.detach()
    name = next(name for name, module in network.named_modules() if module is convolution)
    used, image = [], torch.zeros(1, 3, image_size, image_size, device=device_of(network))

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if naming(function)[0] == "conv2d":
                used.append(args[1] if len(args) > 1 else kwargs["weight"])
            return function(*args, **(kwargs or {}))

    with looked_at(network):
        with capture(network, [name], stop=True, inputs=True) as inputs:
            forward(network, image)
        with Watch():
            if name in inputs:
                convolution(inputs[name])
    return used[0].detach() if used else convolution.weight.detach()


def device_of(network):
    """The device of the network's weights or buffers; the CPU for one that has none."""
    held = next(itertools.chain(network.parameters(), network.buffers()), None)
    return held.device if held is not None else torch.device("cpu")


@contextlib.contextmanager
def told(what, kinds=Exception):
    """A context whose errors of these `kinds` are a ValueError in one line: `what`, and then what
    they say. By default all, as of somebody else's code, but for a lack of memory."""
    try:
        yield
    except kinds as error:
        if out_of_memory(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what}: {said:.300}") from error


def takes_grey(network, image):
    """Whether a network wants images of one channel: as far as its layers tell, unless it takes an
    `image` of three, 1×3×H×W."""
    convolution, linear = (next((module for module in network.modules() if isinstance(
        module, kind)), None) for kind in (nn.Conv2d, nn.Linear))
    if convolution is not None and convolution.in_channels in (1, 3):
        grey = convolution.in_channels == 1
    else:
        # Where no convolution begins, also none that somebody wrote, a linear layer may, as in many
        # a first network for MNIST: all that stands before it are vectors and matrices.
        grey = linear is not None and linear.in_features == image[0, 0].numel() and all(
            value.ndim < 3 for value in itertools.takewhile(
                lambda value: value is not linear.weight, network.parameters()))
    if not grey:
        return False
    # It may make grey itself, or look at each colour alone. Asked unseen by hooks and modes.
    with (torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad(),
          looked_at(network), contextlib.suppress(Exception)):
        for module in network.modules():
            module._forward_hooks.clear()
        # Three outputs are of three images, as `x.view(-1, 1, 28, 28)` makes of one.
        return all(len(x) != 1 for x in tree_leaves(network(image))
                   if isinstance(x, Tensor) and x.ndim)
    return True


def forward(network, images, dtype=None, weights=None):
    """What the network makes of normalised `images`, N×3×H×W, brought to its own type or `dtype`.

    Where its first layer takes one channel, it gets the mean of the three. `weights` take the place
    of its own, and gradients lead to them. ValueError, in one line, when it cannot take the images.
    """
    values = [*network.parameters(), *network.buffers()]
    own = next((value.dtype for value in values if value.is_floating_point()), images.dtype)
    dtype = dtype or own
    # In the order in memory that its filters have: other code may rely on the usual one, as
    # `x.view(len(x), -1)` does.
    last = any(value.ndim == 4 and value.layout == torch.strided and not value.is_contiguous()
               and value.is_contiguous(memory_format=torch.channels_last) for value in values)
    layout = torch.channels_last if last else torch.contiguous_format
    if images.shape[1] == 3 and takes_grey(network, images[:1].to(own).clone(memory_format=layout)):
        images = images.mean(1, keepdim=True)
    given = images.to(dtype).contiguous(memory_format=layout)
    if given is images and not isinstance(network, Network):  # which may work in place at once
        given = images.clone()
    shape = "×".join(map(str, images.shape))
    with told(f"the network cannot take one batch of images, {shape} of {str(dtype)[6:]}"):
        if weights is not None:
            return torch.func.functional_call(network, weights, (given,))
        return network(given)


def logits_of(network, images, weights=None):
    """What `forward` gives as float32 logits N×classes; ValueError for an output that is none.

    Probabilities, which come out of a network that ends with a softmax, become logarithms.
    """
    logits = forward(network, images, weights=weights)
    if not isinstance(logits, Tensor) or logits.shape[:1] != images.shape[:1] or (
            logits.ndim != 2 or not logits.is_floating_point()):
        kind = "×".join(map(str, getattr(logits, "shape", ()))) or f"a {type(logits).__name__}"
        raise ValueError(f"the network returns {kind}, not N×classes logits, for N images")
    logits = logits.float()
    if torch.is_autocast_enabled(images.device.type):  # networks of this package alone, in bf16
        return logits
    # By chance, two logits may add up to nearly 1, many that are all positive hardly: as much as
    # rounding takes, and what keeps a logarithm finite, of few classes in the type that holds them.
    error = least = min(4e-3, 1e-6 * 4.0 ** min(logits.shape[1], 9))
    for kind in (torch.float16, torch.bfloat16):
        held = (logits.to(kind).float() == logits).all()
        error = torch.where(held, max(torch.finfo(kind).eps / 2, least), error)
    shares = (logits.min() >= 0) & ((logits.sum(1) - 1).abs().max() <= error)
    # The softmax of log p is p again: so these are logits.
    return torch.where(shares, logits.clamp(min=1e-18).log(), logits)  # chosen on the device


class _Reached(BaseException):
    """All layers asked for have been computed."""


class Captured(dict):
    """{layer: output}, and the `sides` of the square maps, and of the tokens that are such, that
    the network computed on its way; 0 stands for maps of another shape."""

    def __init__(self, outputs=(), sides=()):
        super().__init__(outputs)
        self.sides = {*sides}

    def are_map(self, tokens):
        """Whether so many tokens, but for five at most, are one of the maps, or one of half as many
        rows; where there are no maps, any are."""
        side = math.isqrt(tokens)
        return tokens - side**2 <= 5 and not (
            self.sides and self.sides.isdisjoint({side, 2 * side, 2 * side - 1}))

    def note(self, module, _given, output):
        """Note the side of a `module`'s `output`, as a forward hook."""
        first = channels_come_first(module)
        if isinstance(output, Tensor) and output.ndim == 4:
            rows, columns = output.shape[2:] if first else output.shape[1:3]
            self.sides.add(rows if rows == columns else 0)
        elif isinstance(output, Tensor) and output.ndim == 3 and self.sides:
            tokens = output.shape[2 if first else 1]
            self.sides |= {math.isqrt(tokens)} if self.are_map(tokens) else set()


@contextlib.contextmanager
def capture(network, layers, stop=False, inputs=False):
    """While open, a forward pass leaves the outputs of `layers` in the dictionary it yields.

    What is kept is the layer's own output, which gradients reach; a clone of it is handed on, so
    that an activation in place behind the layer does not change it. A layer that is called
    several times leaves its first output; the layer "" is the network itself. `stop` ends the
    block, quietly, as soon as all the layers have been reached; then it may be their `inputs`
    that are kept. Of what is compiled the Python code runs. The hooks come off whatever happens.
    """
    outputs, shared = Captured(), []

    def keep(layer, given, output):
        handed = output.clone() if isinstance(output, Tensor) else output
        if given and hands_on(given[0], output):
            # Others hold it too, and what an activation in place makes of it is meant for all of
            # them. Where there is one, the copy is what the layer gave, and `edge` its place in the
            # graph, see `gradient_places`.
            copy, handed = handed, output.view_as(output)
            copy.edge = get_gradient_edge(output) if output.requires_grad else None
            shared.append((layer, handed, handed.is_inference() or handed._version, copy))
            output = handed
        outputs.setdefault(layer, given[0] if inputs else output)
        # An exception is the only way out of a forward pass that was written by somebody else.
        if stop and len(outputs) == len(layers):
            raise _Reached
        return handed

    with contextlib.ExitStack() as hooks:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and to import it takes long
            hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for module in network.modules():
            if channels_come_first(module) is not None:
                hooks.enter_context(module.register_forward_hook(outputs.note))
        for layer in layers:
            module = find_layer(network, layer) if layer else network
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(f"layer={layer}: is scripted, and cannot be looked into: give the "
                                 f"network it was made of")
            hooks.enter_context(module.register_forward_hook(
                lambda _, given, output, layer=layer: keep(layer, given, output)))
        with contextlib.suppress(_Reached):
            yield outputs
        for layer, output, version, copy in shared:
            if outputs[layer] is output and (
                    output.is_inference() or output._version != version):
                outputs[layer] = copy


def gradient_places(outputs):
    """Where `torch.autograd.grad` finds what arrives at `outputs` that `capture` kept: they
    themselves, or, of one that was worked on in place after that, where it was in the graph."""
    return [getattr(output, "edge", None) or output for output in outputs]


def slopes_of(value, places, **options):
    """`torch.autograd.grad`; ValueError where there is none, as of activation checkpoints."""
    with told("no gradient leads back through the network"):
        return torch.autograd.grad(value, places, **options)


def hands_on(given, output):
    """Whether a module gave its input back or a view of it, as an identity does, dropout that is
    off, and what has worked on it in place."""
    if not (isinstance(given, Tensor) and isinstance(output, Tensor)):
        return False
    whole = [x if x._base is None else x._base for x in (given, output)]  # of a view
    return whole[0] is whole[1]


def channels_come_first(module):
    """Whether a module gives N×C×… out, True, or N×…×C, False, as far as its kind tells, or None.
    """
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    # ConvNeXt has a class made of LayerNorm that turns its images first.
    if type(module) is nn.Linear or (
            type(module) is nn.LayerNorm and len(module.normalized_shape) == 1):
        return False
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm,
             nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
             nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
    first = isinstance(module, (*kinds, nn.Unfold)) or (
        isinstance(module, nn.Flatten) and module.start_dim == 2)
    return first or None


def captured_maps(network, outputs, layer, count):
    """The output of the network's `layer` that `capture` kept for `count` images, as N×C×H×W or
    N×C; ValueError for any other.

    Where the layer's kind does not tell (see `channels_come_first`), channels that come last are
    told by square maps, N×S×S×C, and in N×S×S×S by the kinds of what is inside the layer; three
    dimensions are tokens N×T×C. Tokens become N×C×S×S with the largest square S·S there is in T;
    those before it, at most five, such as the class token, are left out. Of N×C×L, L is as many
    rows as columns, or one row. Where the network computes maps, a square is one of theirs, or of
    half as many rows: else they are a sequence, as of columns.
    """
    if isinstance(maps := outputs.get(layer), Tensor) and is_functorch_wrapped_tensor(maps):
        raise ValueError(f"layer={layer}: runs in torch.vmap or the like, where nobody looks in")
    if layer not in outputs:
        raise ValueError(f"layer={layer}: is not called when the network runs (in a network that "
                         f"torch.export or a compiler made, no layer is)")
    if not isinstance(maps, Tensor) or maps.ndim not in (2, 3, 4) or not (
            maps.is_floating_point() and maps.numel()):
        kind = "×".join(map(str, getattr(maps, "shape", ()))) or f"a {type(maps).__name__}"
        kind += f" of {str(maps.dtype)[6:]}" if isinstance(maps, Tensor) else ""
        raise ValueError(f"layer={layer}: returns {kind}, neither feature maps N×C×H×W or N×H×W×C, "
                         f"tokens N×T×C nor vectors N×C of real numbers")
    if len(maps) != count:
        raise ValueError(f"layer={layer}: returns {len(maps)} maps or vectors for {count} images, "
                         f"which must come first (in a transformer, batch_first=True)")
    module = find_layer(network, layer) if layer else network
    first = channels_come_first(module)
    if first is None and maps.ndim == 4:
        rows, columns, last = maps.shape[1:]
        first = rows != columns
        if rows == columns == last:
            first = {channels_come_first(part) for part in module.modules()} - {None} != {False}
    if maps.ndim == 3:
        tokens = maps.shape[2 if first else 1]
        side, square = math.isqrt(tokens), outputs.are_map(tokens)
    if maps.ndim == 3 and first:
        return maps.unflatten(2, (side, -1) if square and side**2 == tokens else (1, -1))
    if maps.ndim == 3:  # side is 14 for ViT-B/16 at 224: a class token and 14·14 others
        if not square:
            why = (f"{tokens} are no square of tokens" if tokens - side**2 > 5 else
                   "none of the network's maps is of so many tokens")
            raise ValueError(f"layer={layer}: returns {tokens}×{maps.shape[2]} for an image, and "
                             f"{why}")
        maps = maps[:, -side * side:].unflatten(1, (side, side))
    elif maps.ndim == 2 or first:
        return maps  # N×C, or N×C×H×W
    return maps.permute(0, 3, 1, 2)  # its channels came last


def logits_and_maps(network, layers, images):
    """(`logits_of` normalised images, {layer: its `captured_maps` as float32})."""
    with capture(network, layers) as outputs:
        logits = logits_of(network, images)
    return logits, {
        layer: captured_maps(network, outputs, layer, len(images)).float() for layer in layers}


def refuse_opaque(network):
    """ValueError for a network in which functions cannot be replaced, or have no gradient."""
    scripted = any(isinstance(module, torch.jit.ScriptModule) for module in network.modules())
    if scripted or is_quantized(network):
        raise ValueError(f"a {'scripted' if scripted else 'quantised'} network has no way back "
                         f"through its layers: give the one it was made of")


@contextlib.contextmanager
def evaluation(network):
    """While open, the network is in evaluation mode; then every module is in the mode it had."""
    before = {module: module.training for module in network.modules()}
    try:
        network.eval()
    except NotImplementedError as error:
        raise ValueError("a network that torch.export made cannot be used layer by layer: give "
                         "the one it was made of") from error
    try:
        yield network
    finally:
        network.train(before[network])  # some put their weights back here, as LoRA does
        for module, training in before.items():
            module.training = training


@contextlib.contextmanager
def unchanged(network):
    """After it modules have the attributes they had, and do not know what they kept meanwhile, and
    buffers hold what they held. ValueError for a network that becomes another one when it runs."""
    if any(isinstance(module, LazyModuleMixin) for module in network.modules()):
        raise ValueError("the network has lazy layers that have not seen an image: call it on one, "
                         "then they have their shapes")
    before = {}

    def keep(value):
        kind = next((kind for kind in (dict, set, list) if isinstance(value, kind)), None)
        if kind and id(value) not in before:
            before[id(value)] = value, kind(value)
            for part in value.values() if kind is dict else value:
                keep(part)

    for module in network.modules():
        keep(vars(module))
    weights = [(value, value.data) for value in [*network.parameters(), *network.buffers()]]
    buffers = [(value, value.detach().clone()) for value in network.buffers()]
    try:
        yield
    finally:
        for value, data in weights:  # `weight.data = …` may have given it another type
            value.data = data
        for value, content in buffers:  # such as what observers of a quantisation have seen
            with contextlib.suppress(RuntimeError):  # an expanded one, which nobody can write to
                value.data.copy_(content)
        for value, content in before.values():  # in place, for those who have it, too, as hooks do
            if contents(value) != contents(content):  # what cannot change may refuse to be filled
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(content)


def contents(value):
    """The identities of what a dictionary, set or list holds."""
    parts = [*value, *(value.values() if isinstance(value, dict) else ())]
    return {*map(id, parts)} if isinstance(value, set) else [*map(id, parts)]


@contextlib.contextmanager
def looked_at(network):
    """While open, the network is in evaluation mode; then it is as it was (see `unchanged`)."""
    with unchanged(network), evaluation(network):
        yield


# ---------------------------------------------------------------------------- receptive fields


def _computed(value):
    """Whether an argument is a tensor that is computed from the images."""
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


def _scaled(_function, x, *others, **named):
    """`x` itself, brought back to a size of about 1, and what else depends on the images."""
    for other in (*others, *named.values()):
        if _computed(other):
            x = x + (other if other.ndim == x.ndim else other.mean())
    return x / x.detach().abs().mean().clamp(min=1e-30)


def _with_weights(x, weight):
    """`x`, which looks at what `weight` does, where that is computed from the images."""
    return x + _scaled(None, weight.mean()) if _computed(weight) else x


def _linear(_function, x, weight, bias=None):
    """A linear layer, all of whose outputs look at all inputs."""
    return _with_weights(x, weight).mean(-1, True).repeat_interleave(weight.shape[0], -1)


def _looked_at(query, key, value, shown):
    """What each of …×L×E queries looks at of …×S×E keys and values, …×L×1: itself and those that
    `shown` says, L×S or with more dimensions before, of which the last two count."""
    seen = key.mean(-1, True) + value.mean(-1, True)
    shown = shown.flatten(0, -3).any(0) if shown.ndim > 2 else shown
    return query.mean(-1, True) + shown.to(seen) @ seen / seen.shape[-2]


def _attended(_function, query, key, value, *_others, attn_mask=None, **_named):
    """Multi-head attention of T×N×C queries and S×N×C keys and values; its mask is True, or far
    below 0, where it hides."""
    weights = query.new_zeros(*query.shape[1:-1], len(query), len(key))  # which say nothing here
    hidden = weights[0] > 0 if attn_mask is None else attn_mask
    shown = ~hidden if hidden.dtype == torch.bool else hidden > -50
    query, key, value = (x.movedim(0, -2) for x in (query, key, value))
    return query.add(_looked_at(query, key, value, shown)).movedim(-2, 0), weights


def _dot_products(_function, query, key, value, attn_mask=None, _dropout=0, is_causal=False,
                  **_named):
    """Attention of …×L×E queries; its mask is False, or far below 0, where it hides."""
    shown = query.new_ones(query.shape[-2], key.shape[-2]) > 0
    shown = shown.tril() if is_causal else shown
    if attn_mask is not None:
        shown = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -50
    return _looked_at(query, key, value, shown).repeat_interleave(value.shape[-1], -1)


def _averaged(function, x, weight, bias=None, *options, **named):
    """A convolution whose weights are all one positive constant: one kernel does for all."""
    options, groups = [*options], named.pop("groups", 1)
    if len(options) > 3:  # of conv2d and of conv_transpose2d the fourth is `groups`
        groups, options[3] = options[3], 1
    outputs = weight.shape[1] * groups if "transpose" in function.__name__ else weight.shape[0]
    # With equal weights a sum over channels may come first, and all outputs of a group are one.
    means = _with_weights(x, weight).unflatten(1, (groups, -1)).mean(2)
    means = means.flatten(0, 1)[:, None]  # N·groups×1×H×W
    kernel = x.new_full((1, 1, *weight.shape[2:]), 1 / weight[0, 0].numel())
    maps = function(means, kernel, None, *options, **named).unflatten(0, (-1, groups))
    # Copies: what follows may add to them in place.
    return maps.repeat_interleave(outputs // groups, 2).flatten(1, 2)


def _pooled(function, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, *_others,
            **_named):
    """A max-pool over N×C×H×W that gives the mean of each window instead of its maximum."""
    kernel, stride, padding, dilation = (
        (value, value) if isinstance(value, int) else (*value, *value)[:2]
        for value in (kernel_size, stride or kernel_size, padding, dilation))
    found = function(x, kernel, stride, padding, dilation, ceil_mode)
    x = x.where(x.detach() > -50, 0)  # whose padding may be −∞ and looks at nothing
    size = found[0].shape if isinstance(found, tuple) else found.shape
    # With `ceil_mode` a last window may reach over the edge by less than a stride; where there is
    # none, the place that this makes for it is cut off again.
    pads = [padding[1], padding[1] + stride[1], padding[0], padding[0] + stride[0]]
    mean = x.new_full((1, 1, *kernel), 1 / math.prod(kernel))
    maps = F.conv2d(F.pad(x, pads).flatten(0, -3)[:, None], mean, None, stride, 0, dilation)
    maps = maps[:, 0, :size[-2], :size[-1]].reshape(size).contiguous()
    return (maps, found[1]) if isinstance(found, tuple) else maps


def _sampled(function, x, grid, *others, **named):
    """`grid_sample`: where the image itself decides on the grid, any place may be sampled."""
    if _computed(grid):
        x = (_scaled(None, x) + _scaled(None, grid.mean())).mean((2, 3), True)
        return x.repeat(1, 1, *grid.shape[1:3])
    return function(x, grid.to(x), *others, **named)


def _largest(_function, x, other=None, keepdim=False, dim=None):
    """torch.max, maximum and the like, of which the mean or sum is taken."""
    if isinstance(other, Tensor):
        return x + other
    dim = dim if other is None else other
    return x.mean() if dim is None else torch.return_types.max(
        (x.mean(dim, keepdim), x.argmax(dim, keepdim)))


def _added(function, x, other, *others, **named):
    """A difference, a quotient or a power, which may cancel where all weights are equal: the sum.
    Not so what is taken off and depends on nothing, such as a mask."""
    if function.__name__.strip("_") in ("sub", "subtract") and isinstance(other, Tensor) and (
            not other.requires_grad):
        return function(x, other, *others, **named)
    return _scaled(None, x + other if isinstance(other, Tensor) else x)


def _grouped(_function, x, num_groups, *_others, **_named):
    """Group normalisation: each value looks at all of its group."""
    means = x.unflatten(1, (num_groups, -1)).flatten(2).mean(2)
    means = means.repeat_interleave(x.shape[1] // num_groups, 1)
    return _scaled(None, x + means.view(*means.shape, *[1] * (x.ndim - 2)))


def _local(_function, x, size, *_others, **_named):
    """Local response normalisation: each value looks at `size` channels of its place."""
    ends = F.pad(x[:, None], (0, 0, 0, 0, size // 2, (size - 1) // 2))
    return _scaled(None, x + F.avg_pool3d(ends, (size, 1, 1), 1)[:, 0])


def _layer_norm(_function, x, normalized_shape, *_others, **_named):
    """Each value looks at all of the last dimensions."""
    return _scaled(None, x + x.mean([*range(-len(normalized_shape), 0)], True))


def _gate(_function, x, *_others, **_named):
    """What multiplies, such as a sigmoid: near ½ for all values, and not alike for others."""
    return 0.5 + 1e-3 * _scaled(None, x)


def _shared(_function, x, dim=1, *_others, **_named):
    """Softmax: each value looks at all along `dim`, and all are near ½. Of equal ones, as here,
    the derivatives would cancel. What a mask has made far smaller is 0, and nobody looks at it."""
    dim = 1 if dim is None else dim
    seen = x.detach() > x.detach().amax(dim, keepdim=True) - 50  # Swin's masks are −100
    x = x.where(seen, 0)
    return _gate(None, x + x.mean(dim, keepdim=True)).where(seen, 0)


def _batch_norm(_function, x, *others, **named):
    """With running statistics a scale, without them each value looks at all of the batch."""
    own = named.get("training", others[4] if len(others) > 4 else False)
    return _scaled(None, x + x.mean([0, *range(2, x.ndim)], True) if own else x)


def _instance_norm(_function, x, *others, **named):
    """Each value looks at all of its map, but with running statistics."""
    own = named.get("use_input_stats", others[4] if len(others) > 4 else True)
    return _grouped(None, x, x.shape[1]) if own else _scaled(None, x)


# What takes the place of a function, given it and its arguments, in `Connections`.
CONNECTIONS = {
    **dict.fromkeys([*RECTIFIERS, *BOUNDED, "tanh", "tanhshrink", "hardshrink", "softshrink",
                     "softsign", "log_sigmoid", "rpow", "sign", "round", "floor", "ceil", "trunc",
                     "neg", "negative", "reciprocal", "exp", "expm1", "log", "log1p", "log2",
                     "log10", "sqrt", "rsqrt", "abs", "absolute", "square", "sin", "cos", "erf",
                     "atan"], _scaled),
    **dict.fromkeys(["sub", "rsub", "subtract", "div", "rdiv", "divide", "true_divide", "pow"],
                    _added),
    **dict.fromkeys(["sigmoid", "hardsigmoid"], _gate),
    **dict.fromkeys(["softmax", "log_softmax", "softmin"], _shared),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "conv_transpose2d"], _averaged),
    "linear": _linear, "multi_head_attention_forward": _attended,
    "scaled_dot_product_attention": _dot_products, "grid_sample": _sampled,
    **dict.fromkeys(["max_pool2d", "max_pool2d_with_indices"], _pooled),
    "max_unpool2d": lambda function, x, *others, **named: F.interpolate(  # any place of a window
        x, function(x.detach(), *others, **named).shape[2:]),
    "adaptive_max_pool2d": lambda _, x, output_size, *others, **named: F.adaptive_avg_pool2d(
        x, output_size),
    "adaptive_max_pool2d_with_indices": lambda function, x, output_size, *others, **named: (
        F.adaptive_avg_pool2d(x, output_size), function(x.detach(), output_size)[1]),
    **dict.fromkeys(["amax", "amin"], lambda _, x, *others, **named: x.mean(*others, **named)),
    **dict.fromkeys(["max", "maximum", "fmax", "min", "minimum", "fmin"], _largest),
    "batch_norm": _batch_norm, "group_norm": _grouped,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm, "rms_norm": _layer_norm, "local_response_norm": _local,
    "glu": lambda _, x, dim=-1: _scaled(None, sum(x.chunk(2, dim))),
    "normalize": lambda _, x, p=2, dim=1, **named: _scaled(None, x + x.mean(dim, True)),
}
PRODUCTS = {"matmul", "bmm", "mm", "einsum", "tensordot"}
CASTS = {"to", "type", "type_as", "float", "half", "bfloat16"}


class Connections(TorchFunctionMode):
    """While open, a gradient is above 0 where there is any connection, and elsewhere exactly 0.

    All weights are one positive constant, maxima are means, activations the identity, and a
    normalisation adds the mean of what it looks at (see `CONNECTIONS`). What is not there runs as
    it is. Where it chooses, or hides its gradient, that is found out (see `check_fields`).
    """

    def __init__(self, network):
        super().__init__()
        self.weights = {}
        self.note_weights([*network.parameters(), *network.buffers()])

    def note_weights(self, values):
        """Remember weights, or what is made of them alone, by their ids, while they are held."""
        self.weights.update({id(value): value for value in tree_leaves(values)
                             if isinstance(value, Tensor) and value.is_floating_point()
                             and value.numel()})

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, leaves = dict(kwargs or {}), tree_leaves((args, kwargs))
        if any(map(_computed, leaves)):
            with torch.enable_grad():  # frozen layers look at something, too
                return self.connected(function, args, kwargs)
        # What is made of weights alone is one, and what is made of nothing may be a mask.
        if not any(id(value) in self.weights for value in leaves):
            return function(*args, **kwargs)
        with torch.no_grad():
            value = called(function, exactly, args, kwargs)
        # Copies, because something of the images may be written into them.
        value = tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, value)
        self.note_weights(value)
        return value

    def connected(self, function, args, kwargs):
        """What stands in for what `function` computes from the images."""
        name, in_place = naming(function)
        named = {key: value for key, value in kwargs.items() if key not in ("input", "query")}
        given = args or [kwargs.get("input", kwargs.get("query"))]
        if name in CONNECTIONS and isinstance(given[0], Tensor):
            value = CONNECTIONS[name](function, *given, **named)
            return given[0].copy_(value) if in_place else value
        if in_place:  # it may write into a copy of weights
            self.weights.pop(id(given[0]), None)
        if name in ("add", "mul", "multiply", "addcmul"):  # as of a + −1·b
            args, kwargs = tree_map(unsigned, (args, kwargs))
        value = called(function, self.stand_in, args, kwargs)
        if name in CASTS and _computed(given[0]) and value.is_floating_point():
            return given[0].to(value.device)  # in half precision small gradients would be 0
        # The scores of attention grow with the number of channels.
        return _scaled(None, value) if name in PRODUCTS else value

    def stand_in(self, value):
        """`constant` for a weight, and anything else `exactly` as it is."""
        return constant(value) if id(value) in self.weights else exactly(value)


def unsigned(value):
    """A number without its sign, and anything else as it is."""
    return abs(value) if isinstance(value, (int, float)) else value


def constant(weight):
    """What stands in for a weight that is no layer's, such as an embedding, or for a buffer: ones,
    but for masks, which hide what they multiply by 0, or, added to it, from softmax."""
    # A mask is not trained, and has one value, or rows, unlike a scale of channels, C×1×1.
    kind, fixed = exact_type(weight.device), not weight.requires_grad
    if not weight.isfinite().all() or (fixed and weight.min() < -50):
        return weight.to(kind)
    shown = weight[weight != 0]
    if fixed and len(shown) and (
            (shown == shown[0]).all() or (weight.ndim > 1 and weight.shape[-2] > 1)):
        return (weight != 0).to(kind)
    return torch.ones_like(weight, dtype=kind)


class InDouble(TorchFunctionMode):
    """While open, whatever is computed is computed in `exact_type`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return called(function, exactly, args, kwargs or {})


def called(function, stand_in, args, kwargs):
    """What `function` makes of `stand_in` of each of its arguments. What it works on in place is
    given as it is, since it would be lost in a copy."""
    first = args[:1] if naming(function)[1] else ()
    rest, kwargs = tree_map(stand_in, (args[len(first):], kwargs))
    return function(*first, *rest, **kwargs)


def naming(function):
    """(The name of a function without underscores, whether it works on its first argument in place)
    """
    name = getattr(function, "__name__", "")
    if name == "__get__":  # of an attribute, such as x.mT
        name = function.__self__.__name__
    name = name.split(".")[0]  # of relu.default, as operators are called
    return name.strip("_"), bool(re.search("^__set|[^_]_$", name))


def exactly(value):
    """Real numbers in `exact_type`, and anything else as it is."""
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(exact_type(value.device)) if is_real else value


def exact_type(device):
    """float64, or the best there is: MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.enable_grad()
def receptive_fields(network, layer, image_size):
    """The exact receptive field of every unit of `layer`, C×H×W×4: top, left, bottom, right.

    A box is half open, in pixels of the network's image_size×image_size input, and ends where
    the image does. It is found, not derived: by the gradient of single units while all that the
    network computes are averages (see `Connections`), through any strides, padding, pooling and
    branches. Values of weights do not count: of a kernel that is partly 0 it is all. The box of a
    unit that looks at nothing is 0, 0, 0, 0. ValueError for a layer there is not, and where an
    experiment contradicts what the gradient tells (see `check_fields`), as where the network
    chooses by its input, or hides what it computes.
    """
    refuse_opaque(network)
    # Grey noise: channels with other fields get other values, and those with the same the same.
    # All three colour channels are one leaf, so that a field has no channels.
    noise = 1 + torch.rand(1, 1, image_size, image_size, generator=generator("fields"))
    noise = exactly(noise.to(device_of(network))).requires_grad_()
    with looked_at(network), Connections(network):
        maps = units_of(network, layer, noise.expand(-1, 3, -1, -1).contiguous())
    if not maps.requires_grad:
        raise ValueError(f"layer={layer}: no gradient leads from it to the images")
    if not maps.isfinite().all():
        raise ValueError(f"layer={layer}: what it computes is not finite, which hides which pixels "
                         f"it looks at")
    # Channels with the same values look at the same pixels: one of each kind is asked.
    kinds, kind = maps.detach().flatten(1).unique(dim=0, return_inverse=True)

    def box_of(units):
        """Top, left, bottom and right of the pixels that any of `units` looks at, or zeros."""
        gradient, = slopes_of(units.sum(), [noise], retain_graph=True)
        seen = gradient[0, 0].nonzero().cpu()  # pixels×2; the GPU waits here
        return torch.cat([seen.amin(0), seen.amax(0) + 1]) if len(seen) else torch.zeros(4).long()

    fields = torch.stack([
        boxes_of(maps[(kind == number).nonzero()[0, 0]], box_of) for number in range(len(kinds))])
    if not fields.any():
        raise ValueError(f"layer={layer}: what it computes hides which pixels it looks at")
    fields = fields[kind.cpu()]
    check_fields(network, layer, image_size, fields)
    return fields


def units_of(network, layer, image):
    """What `layer` makes of one image, 1×3×H×W, in its type: C×H×W, of a linear layer C×1×1."""
    with capture(network, [layer], stop=True) as outputs:
        forward(network, image, image.dtype)
    maps = captured_maps(network, outputs, layer, 1)[0]
    return maps if maps.ndim == 3 else maps[:, None, None]


@torch.no_grad()
def check_fields(network, layer, image_size, fields, sample=8):
    """ValueError where pixels outside of its receptive field, of `fields`, C×H×W×4, change a unit
    of `layer` after all: for a `sample` of the rows of an image of noise, and of its columns, the
    network as it is sees others in their place."""
    random, device = generator("check"), device_of(network)
    image = torch.randn(1, 3, image_size, image_size, generator=random)
    lines = torch.randperm(image_size, generator=random)[:sample].tolist()
    # What a module keeps of this, such as positions, would be in another type than its own.
    with looked_at(network), InDouble():
        before = units_of(network, layer, exactly(image.to(device)))
        rounding = 1e3 * torch.finfo(before.dtype).eps * before.abs().max()
        for dim, line in itertools.product((0, 1), lines):
            other = image.clone()
            other.select(2 + dim, line).normal_(0, 3, generator=random)
            after = units_of(network, layer, exactly(other.to(device)))
            changed = ((after - before).abs() > rounding).cpu()
            outside = (line < fields[..., dim]) | (line >= fields[..., 2 + dim])
            if (changed & outside).any():
                raise ValueError(f"layer={layer}: its receptive fields cannot be found: pixels "
                                 f"outside of what its gradients tell, or chance, change it")


def boxes_of(units, box_of, sample=8):
    """The boxes, H×W×4, of H×W `units`, of which `box_of` tells what any of several looks at."""
    # In most layers a box's top and bottom depend on the unit's row alone, left and right on its
    # column: so rows and columns are asked, and a few units, whether that holds.
    (height, width), boxes = units.shape, torch.zeros(*units.shape, 4, dtype=torch.long)
    rows, columns = (torch.stack([*map(box_of, lines)]) for lines in (units, units.T))
    boxes[..., 0::2], boxes[..., 1::2] = rows[:, None, 0::2], columns[:, 1::2]
    boxes *= (boxes[..., :2] < boxes[..., 2:]).all(-1, keepdim=True)  # all zeros if it sees nothing
    asked = torch.randint(height * width, (sample,), generator=generator("units")).tolist()
    for unit in {0, width - 1, (height - 1) * width, height * width - 1, *asked}:
        if (box_of(units.flatten()[unit]) != boxes.flatten(0, 1)[unit]).any():
            # As of masked attention, or of a map that is turned.
            if units.numel() > 4096:
                raise ValueError("rows and columns of the layer do not tell of its receptive "
                                 "fields, and it has too many units to ask each of them")
            every = progress(units.flatten(), "receptive fields", height * width)
            return torch.stack([*map(box_of, every)]).view(boxes.shape)
    return boxes


# ---------------------------------------------------------------------------- a class's reasons


@contextlib.contextmanager
def class_scores(network, images, label, layers=()):
    """(The logit of class number `label`, one for all or one each, of normalised N×3×S×S images,
    these as what they are leaves of, the outputs of `layers`), from which gradients lead back while
    it is open: what was checkpointed runs again on the way."""
    refuse_opaque(network)
    images = images.detach().clone().requires_grad_()
    with looked_at(network):
        with capture(network, layers) as outputs:
            logits = logits_of(network, images)
        if not logits.requires_grad:
            raise ValueError("no gradient leads from the network's outputs to what they depend on")
        labels = torch.as_tensor(label, device=logits.device).expand(len(images))
        yield logits.gather(1, labels[:, None])[:, 0], images, outputs


@torch.enable_grad()
def class_gradient(network, images, label):
    """The gradient of class number `label`'s logit (see `class_scores`) at normalised images
    N×3×S×S: N×3×S×S."""
    with class_scores(network, images, label) as (scores, images, _):
        slope, = slopes_of(scores.sum(), [images], allow_unused=True)
    if slope is None:
        raise ValueError("no gradient reaches the images (something on the way computes none)")
    return slope


def smooth_gradient(network, images, label, count=50, noise=0.15, seed=0):
    """The mean `class_gradient` of `count` noisy copies: N×3×S×S. The noise's std is `noise` times
    an image's range of values (Smilkov et al. 2017, section 2)."""
    random = generator(seed, "smoothgrad")
    spread = noise * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
    return sum(class_gradient(
        network, images + spread * torch.randn(images.shape, generator=random).to(images), label)
        for _ in range(count)) / count


def integrated_gradients(network, images, label, steps=100):
    """How much each value adds to the class's logit, on the way from 0, the mean colour, to the
    images: N×3×S×S, whose sum is the difference of the logits (Sundararajan et al. 2017, section
    3). The midpoint rule with `steps` points stands for the integral."""
    images = images.detach()
    return images * sum(class_gradient(network, images * ((step + 0.5) / steps), label)
                        for step in range(steps)) / steps


@torch.enable_grad()
def grad_cam(network, images, label, layer=None):
    """Grad-CAM (Selvaraju et al. 2017, section 3): (N×H×W, the layer).

    The sum of the layer's maps, each weighted by the mean gradient of the class's logit over it,
    where that is positive. Without `layer` the last in the order of computing that has maps of
    more than one position and any gradient; of a network that is dead everywhere, the last that has
    maps, and nothing bears on the class.
    """
    names = [layer] if layer else [name for name, _ in network.named_modules() if name]
    # One forward and one backward pass for all layers: which is the last shows only afterwards.
    with class_scores(network, images, label, names) as (scores, _, outputs):
        kept = {name: output for name, output in outputs.items()
                if isinstance(output, Tensor) and output.requires_grad}
        # Images do not mix, so the gradient of the sum is that of each image's own score.
        slopes = slopes_of(scores.sum(), gradient_places(kept.values()),
                           allow_unused=True) if kept else ()

    def maps_of(name, part):
        return captured_maps(network, Captured({name: part}, outputs.sides), name, len(images))

    dead, tokens = None, set()
    for name, output in kept.items():
        with contextlib.suppress(ValueError):  # a sequence that is no map
            if output.ndim == 3 and maps_of(name, output).shape[2] > 1:
                tokens.add(output.shape[2 if channels_come_first(find_layer(network, name)) else 1])
    for name, output, slope in [*zip(kept, kept.values(), slopes)][::-1]:
        # What attention computes for its heads, N×heads×T×T or N×heads×T×C, is no image.
        if output.ndim == 4 and tokens & {*output.shape[2:]}:
            continue
        with contextlib.suppress(ValueError):  # no output of its kind
            # Its rows and columns may be others than the output's; the same is done to the slopes.
            maps, slopes = (maps_of(name, part) for part in (output, slope))
            if maps.ndim == 4 and maps[0, 0].numel() > 1:
                # α = the mean of ∂score/∂A over the positions (equation 1), then (Σ α·A)⁺ (2).
                weights = slopes.mean((2, 3), keepdim=True)
                found = (weights * maps).sum(1).clamp(min=0).detach(), name
                if slopes.any():
                    return found
                dead = dead or found
    if dead:
        return dead
    raise ValueError(f"layer={layer or 'any'}: Grad-CAM needs one whose output has rows and "
                     f"columns, and bears on class {label}")


# ---------------------------------------------------------------------------- summary


def outputs_of(network, names, image_size, count=1):
    """{name: output} of the modules called `names`, in the order in which they end, for `count`
    black images; on the meta device only shapes are computed."""
    images = torch.zeros(count, 3, image_size, image_size, device=device_of(network))
    with torch.no_grad(), looked_at(network), capture(network, names) as outputs:
        forward(network, images)
    return outputs


def shapes_and_counts(network, names, image_size):
    """({name: shape of the output for one image, without the batch}, {name: multiply-adds, those of
    the modules inside included}) of modules; what was not called, or computes nothing, is absent.

    Of several outputs the first tensor counts. A network on the meta device is enough.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        outputs = outputs_of(network, names, image_size)
    shapes = {}
    for name, output in outputs.items():
        parts = output if isinstance(output, (tuple, list)) else (output,)
        shapes[name] = next((tuple(part.shape[1:]) for part in parts if torch.is_tensor(part)), ())
    # The counter says Sequential.conv1.0 for our conv1.0, and Sequential for the network, our "";
    # it counts a multiply-add as two.
    return shapes, {name.partition(".")[2]: sum(kinds.values()) // 2
                    for name, kinds in counter.get_flop_counts().items()}


def stages(network, image_size):
    """One row a stage: (name, output shape C×H×W, parameters, multiply-adds an image)."""
    children = dict(network.named_children())
    shapes, counts = shapes_and_counts(network, children, image_size)
    return [(name, shapes.get(name, ()), count_parameters(stage), counts.get(name, 0))
            for name, stage in children.items()]


# What a module computes itself for one image; `output` is its shape, None if it was not called.
Layer = namedtuple("Layer", "name kind kernel stride padding output parameters multiply_adds")


def layers(network, image_size):
    """A `Layer` for each module of any network that holds no others, or has parameters or
    operations of its own beside them, in the order in which they are done."""
    modules = dict(network.named_modules())
    shapes, counts = shapes_and_counts(network, modules, image_size)
    # The counter gives a module what happens inside those within it too: they have their own rows.
    # A list of modules is never called, and has no count.
    own, rows = dict(counts), []
    for name in filter(None, counts):
        path = name.split(".")
        above = (".".join(path[:end]) for end in reversed(range(len(path))))
        own[next(module for module in above if module in counts)] -= counts[name]
    for name in [*shapes, *(name for name in modules if name not in shapes)]:
        module = modules[name]
        parameters = sum(value.numel() for value in module.parameters(recurse=False)
                         if value.requires_grad)
        inside = any(True for _ in module.children())
        if own.get(name) or parameters or (name in shapes and not inside):
            kernel, stride, padding = (_sides(getattr(module, field, ""))
                                       for field in ("kernel_size", "stride", "padding"))
            kind = type(module).__name__
            kernel = f"{kernel}×{kernel}" if kernel.isdecimal() and kind.endswith("2d") else kernel
            rows.append(Layer(name, kind, kernel, stride, padding, shapes.get(name), parameters,
                              own.get(name, 0)))
    return rows


def _sides(value):
    """A stride or a padding as text: 3 for (3, 3), 3×1 for (3, 1)."""
    value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return "×".join(map(str, value[:1] if len({*value}) == 1 else value))


def largest_output(network, image_size):
    """The number of values in the largest output of a layer, for one image of that side."""
    names = [name for name, module in network.named_modules()
             if name and not isinstance(module, torch.jit.ScriptModule)]  # which takes no hooks
    outputs = outputs_of(network, names, image_size).values()
    return max([3 * image_size**2, *(output.numel() for output in outputs
                                     if isinstance(output, Tensor))])


def count_parameters(network):
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def batch_norms(network):
    """The batch norms inside `network`, of images or of vectors."""
    return [module for module in network.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def multiply_adds(network, image_size):
    """Multiply-adds of one image's forward pass."""
    return shapes_and_counts(network, [], image_size)[1].get("", 0)


# ---------------------------------------------------------------------------- checkpoints


# A checkpoint is what torch.save writes, a zip archive, with the SHA-256 of all bytes before it
# as the archive's comment; the last 32 bytes of the file. It describes itself: see REQUIRED.
REQUIRED = {"model": str, "options": dict, "classes": list, "image_size": int, "mean": list,
            "std": list, "weights": dict, "settings": dict, "epoch": int, "step": int}
NO_CHECKPOINT = "not a checkpoint of this package, or damaged (its checksum does not match)"
MOST_BYTES = 1 << 33  # of a checkpoint: the largest network with Adam's moments needs half


def check_archive(path):
    """OSError unless the file `path` begins and ends as checkpoints do; it is not read whole."""
    try:
        check_regular(path, MOST_BYTES)
        with open(path, "rb") as file:
            head, size = file.read(2), file.seek(0, os.SEEK_END)
            file.seek(-min(size, 54), os.SEEK_END)
            tail = file.read()
    except OSError as error:
        again = type(error)(f"{path}: {error.strerror}" if error.strerror else str(error))
        again.errno = error.errno  # tells what will pass from a damaged file
        raise again from error
    # A zip archive ends with 22 bytes, the last two of which are its comment's length: 32 here.
    if head == b"PK" and tail[:4] == b"PK\5\6" and tail[20:22] == b"\x20\0":
        return
    # What torch.save alone writes has no comment; before zip archives it wrote pickles.
    if head == b"\x80\2" or (head == b"PK" and tail[-22:-18] == b"PK\5\6"):
        raise OSError(f"{path}: weights that another program saved, no checkpoint of this package; "
                      f"name their network: `network=torchvision:NAME` with `weights={path}`")
    raise OSError(f"{path}: {NO_CHECKPOINT}")


def save(path, checkpoint, older=None):
    """Write `checkpoint` (see `REQUIRED`) to `path`, all or nothing (see `write_atomically`)."""
    buffer = io.BytesIO()  # not the file: the checksum is of all of it
    torch.save(checkpoint, buffer)
    content = bytearray(buffer.getbuffer())
    # A zip archive ends with the length of a comment and the comment: any zip reader accepts it.
    content[-2:] = (32).to_bytes(2, "little")
    write_atomically(path, content + hashlib.sha256(content).digest(), older)


def read(path):
    """The checkpoint at `path` as a dictionary, verified, on the CPU; runs no code from the file.

    Raises OSError for a missing, damaged or truncated file and ValueError for one that does not
    describe a network of this package.
    """
    check_archive(path)
    # Read once: what is checked is what is loaded, even if the file is replaced meanwhile.
    content = Path(path).read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise OSError(f"{path}: {NO_CHECKPOINT}")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # torch.save compresses nothing; a compressed record could be a thousand times its size.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise whatever they like
        if out_of_memory(error):
            raise
        raise ValueError(f"{path}: not a checkpoint of this package (it holds what is neither a "
                         f"tensor nor plain data, or is put together wrongly)") from error
    wrong = [name for name, kind in REQUIRED.items()
             if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(name), kind)]
    if wrong:
        raise ValueError(f"{path}: not a checkpoint of this package (no valid {wrong[0]!r})")
    if nested(checkpoint):
        raise ValueError(f"{path}: not a checkpoint of this package (nested too deeply)")
    if not all(map(fills_memory, tree_leaves(checkpoint))):
        raise ValueError(f"{path}: not a checkpoint of this package (it holds tensors that claim "
                         f"more memory than they fill)")
    return checkpoint


def fills_memory(value):
    """Whether a tensor fills the memory it claims, not so if it is sparse or one number a million
    times; True for anything else."""
    return not isinstance(value, Tensor) or (
        value.layout == torch.strided and not value.is_meta
        and value.untyped_storage().nbytes() >= value.nbytes)


@dataclass(frozen=True)
class Description:
    """What is known of a network besides its weights: enough to use it.

    `settings` are those of the run that trained it; a network from elsewhere has none, and its
    `model` is the source it was taken from.
    """

    model: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    options: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)
    epoch: int = 0
    step: int = 0
    fingerprint: str | None = None  # of the data set's files, see `data.Dataset`
    within_epoch: bool = False  # whether it was saved before its epoch number `epoch` + 1 was done
    images: str = ""  # the data set that it is looked at with, where that is not its own

    def class_names(self, count):
        """The names of its `count` classes; numbers for a network from elsewhere."""
        if count == 1 and not self.classes:
            raise ValueError(f"{self.model}: returns one number an image, as before a sigmoid; "
                             f"give a network that returns a logit for each of two classes")
        return self.classes or tuple(map(str, range(count)))

    @property
    def when(self):
        """How long it was trained, as figures tell it."""
        return f"step {self.step}" if self.within_epoch else f"epoch {self.epoch}"

    @property
    def on(self):
        """The images that it is looked at with, where these are not its own, as figures say."""
        return f", on {self.images}" if self.images else ""

    @property
    def title(self):
        """The network, how long it was trained, and on which other images, as figures name it."""
        if not self.settings:
            return self.model + self.on
        return f"{self.settings.get('name') or self.model}, {self.when}{self.on}"


def colours(name, values):
    """The three numbers, one a colour, that `values` gives for `name`, "mean" or "std", as a tuple;
    ValueError for anything else."""
    found, least = (), 0 if name == "std" else -math.inf
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # no list, or not of numbers
        found = tuple(map(float, values))
    if len(found) != 3 or not all(least < value < math.inf for value in found):
        raise ValueError(f"{name}={text_of(values):.80}: must be three numbers, one a colour"
                         f"{', above 0' if name == 'std' else ''}")
    return found


def describe(checkpoint):
    """The `Description` in a checkpoint; ValueError when it cannot be that of a data set."""
    if not all(isinstance(name, str) and len(name) < 256 and name.isprintable()
               for name in checkpoint["classes"]):  # as long as a folder's name may be
        raise ValueError("the names of the classes are not printable text of at most 255 "
                         "characters")
    if len({*checkpoint["classes"]}) < len(checkpoint["classes"]):
        raise ValueError("two classes have the same name")
    preprocessing = Preprocessing(
        checkpoint["image_size"], *(colours(name, checkpoint[name]) for name in ("mean", "std")),
        checkpoint["settings"].get("precision", "fp32"))
    training = checkpoint.get("training")
    seconds = training.get("epoch_seconds") if isinstance(training, dict) else None
    return Description(checkpoint["model"], tuple(checkpoint["classes"]), preprocessing,
                       checkpoint["options"], checkpoint["settings"], checkpoint.get("epoch", 0),
                       checkpoint.get("step", 0), checkpoint.get("fingerprint"),
                       isinstance(seconds, float) and seconds > 0)


def find_checkpoint(path):
    """The checkpoint that `path` means: a file, or best.pth or else last.pth of a run folder."""
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        return path
    for name in ("best.pth", "last.pth"):
        if (path / name).exists():
            return path / name
    raise FileNotFoundError(f"{path}: a folder without best.pth or last.pth")


@torch.random.fork_rng(devices=[])  # what is drawn for weights to be replaced is nobody's
def load(source, weights=None, device="cpu", image_size=None, mean=None, std=None):
    """The network that `source` means, in evaluation mode, and its `Description`.

    `source` is a checkpoint's file, a run's folder, or a network from elsewhere:
    `torchvision:NAME`, with weights from torch's local cache, or `package.module:function`, a
    function without arguments. `weights` is a file with a state dict for these (see
    `state_dict_in`); `image_size`, `mean` and `std` say how they want their images (see
    `Preprocessing`): by default as torchvision's weights do, or 224 pixels and ImageNet's colours.
    Nothing is downloaded. Raises ValueError or OSError.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size}: must be at least 1")
    wishes = {} if image_size is None else {"image_size": image_size}
    wishes |= {name: colours(name, value) for name, value in (("mean", mean), ("std", std))
               if value is not None}
    if re.fullmatch(r"[\w.]+:[\w-]+", str(source)) and not Path(source).exists():
        weights = weights and os.path.expanduser(weights)
        return _load_elsewhere(str(source), weights, wishes, device)
    if weights or wishes:
        raise ValueError("`weights`, `image_size`, `mean` and `std` are for networks from "
                         "elsewhere, such as torchvision:resnet18")
    path = find_checkpoint(source)
    checkpoint = read(path)
    try:
        description = describe(checkpoint)
        make = partial(build, description.model, len(description.classes),
                       checkpoint["image_size"], **description.options)
        with torch.device("meta"):  # the options may ask for more memory than there is
            weights = fitting_weights(checkpoint, make())
        network = make()
        network.load_state_dict(weights)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: does not fit its own description ({error})") from error
    return network.eval().to(device), description


def _load_elsewhere(source, weights, wishes, device):
    module, _, name = source.partition(":")
    wanted = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's
    if module == "torchvision":
        weights, wanted = _torchvision_weights(name, weights)
        module = "torchvision.models"
    given = f", weights={weights}" if weights else ""
    with told(f"network={source}{given}", (Exception, SystemExit)):
        if "" not in sys.path:  # the current folder, which `python -c` and notebooks have there
            sys.path.append("")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            # A transformer is built for the size of its images.
            size = {"image_size": wanted.image_size} if module == "torchvision.models" and (
                name.startswith("vit_")) else {}
            network = getattr(importlib.import_module(module), name)(**size)
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name}() returns a {type(network).__name__}, which is no nn.Module")
        network = getattr(network, "_orig_mod", network)  # compiled, it cannot be looked into
        if module == "torchvision.models":  # as it does for the weights of GoogLeNet and Inception
            network.transform_input = True
        if weights:
            check_regular(weights, MOST_BYTES)
            try:
                state = torch.load(weights, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                raise ValueError("damaged, or holds Python objects beside its tensors (save the "
                                 "network's state_dict() alone)") from error
            if isinstance(state, dict) and REQUIRED.keys() <= state.keys():
                raise ValueError("is a checkpoint of this package; name it alone")
            network.load_state_dict(state_dict_in(state, network))
        network.eval().to("cpu" if is_quantized(network) else device)
        run_lazy(network, wishes.get("image_size", wanted.image_size))
    if module == "torchvision.models":
        network.to(memory_format=torch.channels_last)  # as the images come, and quicker on a CPU
    return network, Description(source, (), replace(wanted, **wishes))


@torch.no_grad()
def run_lazy(network, side):
    """Let lazy layers take their kinds and shapes from an image, of three colours or else grey."""
    for channels in (3, 1):
        if any(isinstance(module, LazyModuleMixin) for module in network.modules()):
            try:
                network(torch.zeros(1, channels, side, side, device=device_of(network)))
            except Exception:
                if channels == 1:
                    raise
    for module in network.modules():  # which lazy ones forget whose weights are loaded
        if isinstance(module, nn.Conv2d) and not module.in_channels:
            module.in_channels = module.weight.shape[1] * module.groups


def is_quantized(network):
    """Whether a network has quantised layers, which compute on a CPU alone."""
    if isinstance(network, torch.jit.ScriptModule):  # whose layers have lost their kinds
        return "quantized::" in str(network.inlined_graph)
    return any(re.match(r"torch\..*quantized", type(layer).__module__)
               for layer in network.modules())


def _torchvision_weights(name, weights):
    """(The file `weights`, or else the newest of torchvision's network `name` in torch's local
    cache, how they want their images: as torchvision's of that file's name)."""
    from torchvision import models

    cache = Path(torch.hub.get_dir(), "checkpoints")
    if name not in models.list_models(models):
        raise ValueError(f"network=torchvision:{name}: torchvision has no such network"
                         f"{closest(name, models.list_models(models))}")
    versions = models.get_model_weights(name)
    # The last are the newest, and mostly the best; those without categories are no whole networks.
    files = {version: cache / Path(version.url).name for version in reversed(versions)}
    known = next((version for version, file in files.items() if (
        file.name == Path(weights).name if weights else
        file.exists() and version.meta.get("categories"))), None)
    if not (known or weights):
        raise FileNotFoundError(f"network=torchvision:{name}: its weights are not here; put "
                                f"{versions.DEFAULT.url} into {cache}; or give `weights=FILE`")
    # Weights of another name are of the network as it is built, for the smallest images.
    preset = (known or min(versions, key=lambda version: version.transforms().crop_size[0])
              ).transforms()
    return weights or files[known], Preprocessing(
        preset.crop_size[0], tuple(preset.mean), tuple(preset.std))


def state_dict_in(content, network):
    """The state dict of `network` in what a file of weights holds: all of it, or a part, as in
    {"net": …, "acc": …}, without what others put before all names: DataParallel module., Lightning
    model. What holds none is returned as it is; ValueError where there are several."""
    own, found = network.state_dict().keys(), {}
    for key, part in {"": content, **content}.items() if isinstance(content, dict) else ():
        if isinstance(part, dict) and len(part) == len(own) > 0:
            prefix = min(map(str, part)).removesuffix(min(own))  # of the first name of each
            if {str(name).removeprefix(prefix) for name in part} == own:
                # In place: a new dictionary would lack the versions of modules that it has.
                nn.modules.utils.consume_prefix_in_state_dict_if_present(part, prefix)
                found[key] = part
    if len(found) > 1:
        raise ValueError(f"holds several state dicts, {', '.join(map(str, found))}: save the one "
                         f"that is meant alone")
    return next(iter(found.values()), content)


def fitting_weights(checkpoint, network):
    """The weights of `checkpoint`, those in half precision too, as `network` has them, of which
    only shapes and types count; ValueError when they do not fit."""
    own = network.state_dict()
    weights = {name: value.to(own[name].dtype) if name in own and made_like(value, own[name].half())
               else value for name, value in checkpoint["weights"].items()}
    for name in {**own, **weights}:
        if name not in own or not made_like(weights.get(name), own[name]):
            raise ValueError(f"weights of {name} are missing, too many, or of another kind")
    return weights


def finite(weights):
    """Whether all `weights`, a state dict, are finite numbers, as integers and quantised ones are.
    """
    values = (value.to_dense() for value in weights.values()
              if torch.is_tensor(value) and value.is_floating_point())
    # PyTorch does not ask numbers of 8 bits.
    return all((value.float() if value.element_size() == 1 else value).isfinite().all()
               for value in values)


def in_half(weights):
    """`weights` with filters and matrices in half precision, to be kept or given away.

    Vectors, such as batch norm's variances, may be out of its range, and are small.
    """
    return {name: value.half() if value.is_floating_point() and value.ndim > 1 else value
            for name, value in weights.items()}


def made_like(value, pattern):
    """Whether `value` is made as `pattern` is: dictionaries with the same keys, tuples of the same
    length, tensors of the same shape and type, all else of the same type."""
    if isinstance(pattern, dict):
        return (isinstance(value, dict) and value.keys() == pattern.keys()
                and all(made_like(value[key], pattern[key]) for key in pattern))
    if isinstance(pattern, Tensor):
        return (isinstance(value, Tensor) and value.shape == pattern.shape
                and value.dtype == pattern.dtype)
    if isinstance(pattern, tuple):
        return (type(value) is type(pattern) and len(value) == len(pattern)
                and all(map(made_like, value, pattern)))
    return type(value) is type(pattern)


# ---------------------------------------------------------------------------- commands


def option_flags(model, words=()):
    """{option: `Flag`} of network `model`, for its command line; ValueError when the line's `words`
    give an option that only other networks have."""
    known = options_of(model)
    for word in words:
        name = word.lstrip("-").partition("=")[0]
        if word.startswith("--") and name in OPTION_MEANINGS and name not in known:
            raise ValueError(f"--{name}: {model} has no such option; its options are "
                             f"{', '.join(known)}")
    return {name: Flag(kind, text_of(value), OPTION_MEANINGS[name],
                       [*ACTIVATIONS] if name == "activation" else ())
            for name, (kind, value) in known.items()}


def list_networks():
    """Every network with its parameters, multiply-adds and options."""
    rows = []
    for name in NETWORKS:
        size = image_size_of(name)
        with torch.device("meta"):
            network = build(name)
        rows.append((name, f"{size}×{size}", f"{count_parameters(network):,}",
                     f"{multiply_adds(network, size):,}", ", ".join(options_of(name))))
    return Table(("network", "images", "parameters", "multiply-adds", "options"), rows)


def summary(model: str, classes: int = 10, image_size: int | None = None, stages: bool = False,
            **options):
    """The structure of MODEL, stage by stage and layer by layer; with `--stages` the former alone.

    Multiply-adds are those of one image.
    """
    image_size = image_size_of(model) if image_size is None else image_size
    with torch.device("meta"):
        network = build(model, classes, image_size, **options)
    title = f"{model}, input 3×{image_size}×{image_size}"
    short = stages_table(network, image_size, title)
    return short if stages else Made([short, layers_table(network, image_size,
                                                         f"layers of {title}")])


def stages_table(network, image_size, title=None):
    """`stages` as a `Table`, and their sums."""
    rows = stages(network, image_size)
    return Table(("stage", "output", "parameters", "multiply-adds"), [
        *((name, "×".join(map(str, shape)), f"{parameters:,}", f"{operations:,}")
          for name, shape, parameters, operations in rows),
        ("total", "", *(f"{sum(row[column] for row in rows):,}" for column in (2, 3)))], title)


def layers_table(network, image_size, title=None):
    """`layers` as a `Table`."""
    return Table(("name", "layer", "kernel", "stride", "padding", "output", "parameters",
                  "multiply-adds"), [
        (*row[:5], "–" if row.output is None else "×".join(map(str, row.output)),
         f"{row.parameters:,}", f"{row.multiply_adds:,}") for row in layers(network, image_size)],
                 title)


def _summary_flags(words):
    model = value_in(words, "model") or next((word for word in words[1:] if word in NETWORKS), None)
    return option_flags(model, words) if model else {}


summary.flags = _summary_flags
COMMANDS = {"list": list_networks, "summary": summary}
MEANINGS = {"model": "a network; python network.py list shows all", "classes": "how many classes",
            "image_size": "side of the images in pixels; none: the network's own",
            "stages": "the stages alone, without their layers"}

if __name__ == "__main__":
    command_line(COMMANDS, meanings=MEANINGS)
