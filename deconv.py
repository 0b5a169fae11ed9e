"""Running a network backwards to see what a unit answers to in an image.

    python deconv.py reconstruct runs/resnet18 --layers=conv1,conv5_x --bn=both
    python deconv.py gallery runs/convnet --layer=conv2 --units=16 --top=9
    python deconv.py reconstruct --network=torchvision:resnet18 --layers=layer4 --image=cat.jpg

CKPT, `--out` and where figures go are those of visualize.py.

The deconvnet of Zeiler & Fergus (2014, section 2.1) keeps one activation of a layer and sends it
down to the pixels. A convolution applies its transposed filters without bias, a max-pool returns
each value to where its maximum was (the "switches"), branches add up: a backward pass does just
that. Only rectifiers do something else there, and they alone are replaced:

rule         a rectifier passes on                   source
deconvnet    the positive signal                     Zeiler & Fergus 2014
guided       the same, where its input was positive  Springenberg et al. 2015
gradient     the signal times its derivative         Simonyan et al. 2014

Where max-pool windows overlap, the maximum of several gets the sum of their signals; unpooling
that writes instead of adding keeps one of them and loses the others.
"""

import math
import typing

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import network as networks
import visualize
from data import command_line, progress

RULES = {"deconvnet": lambda signal, positive: signal.clamp(min=0),
         "guided": lambda signal, positive: signal.clamp(min=0) * positive,
         "gradient": None}
BATCH_NORMS = {"through": None, "skip": lambda signal, positive: signal}


# ---------------------------------------------------------------------------- the rule


class _Replaced(torch.autograd.Function):
    """A function with its own value going forward and another rule going back."""

    @staticmethod
    def forward(ctx, x, function, rule):
        ctx.rule = rule
        ctx.save_for_backward(x > 0)  # now, because `function` may work in place
        value = function(x)
        if value is x:
            ctx.mark_dirty(x)
        return value

    @staticmethod
    def backward(ctx, signal):
        return ctx.rule(signal, *ctx.saved_tensors), None, None


class BackwardRule(TorchFunctionMode):
    """While open, rectifiers and batch norms that are called get another backward pass.

    Leaky and smooth rectifiers and clamping at 0 follow `rule` too, whatever their slope, and so
    does any function that sets to 0 just what is negative. Batch norms scale the signal by γ/σ
    (`bn` "through"; one without running statistics has its whole derivative, as its σ depends
    on the images) or pass it on ("skip"). Modules, functions, methods and in-place calls are all
    seen, values and network stay as they are. What escapes, such as an `autograd.Function`, a
    scripted function, one in `torch.vmap` or `x[x < 0] = 0`, a `_Watch` finds out.
    """

    def __init__(self, rule="deconvnet", bn="through"):
        super().__init__()
        for name, value, allowed in (("rule", rule, RULES), ("bn", bn, BATCH_NORMS)):
            if value not in allowed:
                raise ValueError(f"{name}={value}: must be one of {', '.join(allowed)}")
        self.rectify, self.normalize = RULES[rule], BATCH_NORMS[bn]
        self.inside = ""  # a function that is "called", or "replaced"
        self.hidden = []  # operators that rectified unseen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, before = dict(kwargs or {}), self.inside
        if not torch.is_grad_enabled() or any(map(is_batchedtensor, filter(torch.is_tensor, args))):
            return function(*args, **kwargs)  # in an autograd.Function's forward, or in vmap
        rule = self._rule_for(function, args, kwargs)
        self.inside = "replaced" if rule else "called"
        try:
            if rule:
                x, *others = args or (kwargs.pop("input"),)
                return _Replaced.apply(x, lambda x: function(x, *others, **kwargs), rule)
            value = function(*args, **kwargs)  # no rectifier, or its own derivative is wanted
            x = next((x for x in args if self.rectify and rectifies(x, value)), None)
            self.inside = "replaced"
            return value if x is None else _Replaced.apply(x, lambda _: value.detach(),
                                                           self.rectify)
        finally:
            self.inside = before

    def _rule_for(self, function, args, kwargs):
        name = getattr(function, "__name__", "").split(".")[0].strip("_")  # relu_, relu.default
        if name == "batch_norm":
            return self.normalize
        if name in networks.BOUNDED:
            # clamp(min=0) is a rectifier, clamp(-1, 1) is not: the lower bound tells them apart.
            named = [kwargs[key] for key in ("min", "min_val", "threshold") if key in kwargs]
            low = [*args[1:2], *named, None][0]
            return self.rectify if isinstance(low, (int, float)) and low == 0 else None
        return self.rectify if name in networks.RECTIFIERS else None


class _Watch(TorchDispatchMode):
    """While open, operators that rectify without `rule` having seen it are noted there."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # The result of a function that was called is looked at there; what it changes is not.
        changes = function._schema.is_mutable
        if not self.rule.rectify or self.rule.inside in ("replaced", "called")[:2 - changes]:
            return function(*args, **(kwargs or {}))
        before = [x.clone() if changes else x for x in args if isinstance(x, Tensor)]
        value = function(*args, **(kwargs or {}))
        if any(rectifies(x, value) for x in before):
            self.rule.hidden.append(str(function))
        return value


def rectifies(x, value):
    """Whether `value` is `x` with what is negative set to 0, and something is."""
    return (isinstance(x, Tensor) and isinstance(value, Tensor) and x is not value
            and x.shape == value.shape and x.is_floating_point() and x.dtype == value.dtype
            and x.numel() > 1 and torch.equal(value, x.clamp(min=0)) and bool((x < 0).any()))


# ---------------------------------------------------------------------------- down to the pixels


class Descent(typing.NamedTuple):
    """A signal's way down from a layer to N images.

    `signal` N×3×H×W is what arrives, `activations` are the layer's, `positions` N is where in
    C·H·W the one activation kept is (None: all were), `norms` {module: N} are the signals' L2
    norms at the outputs of the modules below, last of all at the "image".
    """

    signal: Tensor
    activations: Tensor
    positions: Tensor | None
    norms: dict[str, Tensor]


def project(network, layer, images, unit="strongest", rule="deconvnet", bn="through"):
    """Send one activation of `layer` back to the pixels of normalised `images`: N×3×H×W.

    Of each image the strongest activation of all is kept, or that of feature map or neuron number
    `unit`, with its value, and all others are zero; "all" keeps all; a tensor of N has the
    positions in C·H·W. `rule` and `bn`: see `BackwardRule`. ValueError for a layer or unit there
    is not.
    """
    return descend(network, layer, images, unit, rule, bn, watched=()).signal


def descend(network, layer, images, unit="strongest", rule="deconvnet", bn="through",
            watched=None):
    """What `project` does, as a `Descent`, with the norms at the `watched` modules (None: all).

    A layer that is called several times counts with its first call. The network runs in
    evaluation mode and is afterwards as it was, also after an exception.
    """
    networks.refuse_opaque(network)
    if watched is None:
        watched = [name for name, _ in network.named_modules() if name]
    images = images.detach().to(torch.promote_types(images.dtype, torch.float32), copy=True)
    images.requires_grad_()
    with networks.evaluation(network), torch.enable_grad(), BackwardRule(rule, bn) as mode:
        # `kept` has the modules up to the layer, where the innermost context stops the network.
        with (_Watch(mode), networks.capture(network, watched) as kept,
              networks.capture(network, [layer], stop=True) as outputs):
            try:
                networks.forward(network, images.clone())  # a clone: it may work in place at once
            except ValueError:
                if not mode.hidden:
                    raise
        if mode.hidden:
            raise ValueError(f"{mode.hidden[0]} rectifies where rule={rule} cannot replace it (in "
                             f"an autograd.Function, a scripted function, vmap, checkpointing or "
                             f"without gradients, or in place): call torch.relu there, or take "
                             f"rule=gradient")
        found = networks.captured_maps(outputs, layer)
        start = found.detach().flatten(1)
        positions = unit if isinstance(unit, Tensor) else strongest(found.detach(), unit)
        if positions is not None:
            start = start * torch.nn.functional.one_hot(positions, start.shape[1])
        # One backward pass gives the signal everywhere: what is kept is in the graph, so the
        # "gradient" of the start with respect to it is the signal there.
        below = {name: output for name, output in reversed(kept.items())
                 if isinstance(output, Tensor) and output.requires_grad}
        try:
            *signals, signal = torch.autograd.grad(found, [*below.values(), images],
                                                   start.view(found.shape), allow_unused=True)
        except RuntimeError as error:  # of checkpoints, and of a network without gradients
            raise ValueError(f"layer={layer}: there is no way back from it to the images "
                             f"({' '.join(str(error).split()):.200})") from error
    if signal is None:
        raise ValueError(f"layer={layer}: no gradient reaches the images from it (it does not "
                         f"depend on them, or something on the way computes none)")
    if not signal.isfinite().all():
        raise ValueError(f"layer={layer}: the signal overflows {str(found.dtype)[6:]} on its way")
    # A module that is called several times, as a shared rectifier, counts with its last call below
    # the layer, at the position of its first. What the layer does not look at has no signal.
    norms = {name: part.flatten(1).float().norm(dim=1) for name, part in zip(below, signals)
             if part is not None}
    norms["image"] = signal.flatten(1).norm(dim=1)
    return Descent(signal, found.detach(), positions, norms)


def strongest(activations, unit="strongest"):
    """N indices into C·H·W: where in N×C×H×W or N×C the largest is (of `unit`); "all": None."""
    maps = activations.flatten(2) if activations.ndim == 4 else activations[:, :, None]
    if unit in ("strongest", "all"):
        return maps.flatten(1).argmax(1) if unit == "strongest" else None
    if isinstance(unit, str) or not 0 <= unit < maps.shape[1]:
        raise ValueError(f"unit={unit}: must be strongest, all, or from 0 to {maps.shape[1] - 1}")
    return unit * maps.shape[2] + maps[:, unit].argmax(1)


def top_reconstructions(network, layer, images, preprocessing, units, top, rule="deconvnet",
                        bn="through"):
    """The patches of uint8 `images` that excite `units` of `layer` most, and what comes back.

    One pass over the images finds them; each signal starts at that activation alone. Returns
    patches and reconstructions, both units×top×3×h×w, 0…1, cut at the receptive fields (grey
    where the activation is 0), and the activations, units×top.
    """
    values, images, positions, boxes = visualize.top_fields(network, layer, images, preprocessing,
                                                            units, top)
    device, signals = networks.device_of(network), []
    # Fewer at a time than in `visualize.layer_batches`: the way back needs all that lies between.
    count = max(1, 2**18 // preprocessing.image_size**2)
    for chunk in progress(torch.arange(len(positions)).split(count), f"back from {layer}"):
        batch = preprocessing(images[chunk], device)
        signals.append(project(network, layer, batch, positions[chunk].to(device), rule, bn).cpu())
    pictures = preprocessing.pictures(images)
    pictures[values.flatten() == 0] = 0.5
    return (*(visualize.cut_patches(whole, boxes).unflatten(0, values.shape)
              for whole in (pictures, as_pictures(torch.cat(signals)))), values)


# ---------------------------------------------------------------------------- drawing


def as_pictures(signals):
    """Signals N×3×H×W as floats 0…1: grey is 0, and 99 % of a signal's other values fit in."""
    scales = [signal[signal != 0].abs().quantile(0.99) if signal.any() else 1
              for signal in signals]
    panels = [0.5 + 0.5 * signal / scale for signal, scale in zip(signals, scales)]
    return torch.stack(panels).clamp(0, 1)


def window(signal):
    """The square (top, left, side) around what is not 0 in a 3×S×S signal; if large, all of it."""
    size, pixels = signal.shape[-1], signal.abs().amax(0).nonzero()
    # One pixel of margin on each side; of a deep layer's signal, as large as the image, all.
    side = (pixels.amax(0) - pixels.amin(0)).max().item() + 3 if len(pixels) else size
    if side > size / 2:
        return 0, 0, size
    return *(pixels.amin(0) - 1).clamp(0, size - side).tolist(), side


def draw_reconstructions(picture, descents, title, classes=()):
    """A figure with a row a layer: the image, what the unit saw of it, what comes back.

    After figure 2 of Zeiler & Fergus (2014). `picture` is 3×S×S, 0…1, `descents` {layer:
    {"through" or "skip": Descent}}; with both of them the norms on the way down are plotted
    beside. `classes` name the logits.
    """
    from matplotlib.patches import Rectangle

    both = len(next(iter(descents.values()))) > 1
    ratios = [1, 1, 1, 1, 2.2] if both else [1, 1, 1]
    title += "\ngrey is 0; each panel has its own scale, into which 99 % of the values fit"
    figure = visualize.new_figure(2.5 * sum(ratios), 2.75 * len(descents) + 0.6, title)
    grid = figure.add_gridspec(len(descents), len(ratios), width_ratios=ratios)
    for row, (layer, ways) in enumerate(descents.items()):
        first = next(iter(ways.values()))
        top, left, side = window(first.signal[0])
        panels = {f"{layer}, {unit_text(first, classes)}": picture,
                  f"its {side}×{side} pixels": picture}
        panels |= {f"back, batch norm {bn}" if both else "what comes back":
                   as_pictures(way.signal)[0].cpu() for bn, way in ways.items()}
        for column, (text, panel) in enumerate(panels.items()):
            axes = figure.add_subplot(grid[row, column])
            cut = panel[:, top:top + side, left:left + side] if column else panel
            axes.imshow(cut.permute(1, 2, 0), interpolation="nearest")
            axes.set_title(text, fontsize=9)
            axes.set_axis_off()
        figure.axes[-len(panels)].add_patch(Rectangle(
            (left - 0.5, top - 0.5), side, side, fill=False, color=visualize.COLORS[1],
            linewidth=1.5))
        if both:
            draw_norms(figure, grid[row, -1], {bn: way.norms for bn, way in ways.items()})
    return figure


def unit_text(descent, classes):
    """Which unit of the first image a signal came from, and its activation."""
    if descent.positions is None:
        return "all units"
    position, activations = descent.positions[0].item(), descent.activations[0]
    unit = position // activations[0].numel()  # a map has H·W positions
    named = f" ({classes[unit]})" if activations.shape == (len(classes),) else ""
    return f"unit {unit}{named}: {activations.flatten()[position]:.3g}"


def draw_norms(figure, position, norms):
    """Plot {label: {module: N norms}} of the first image, from a layer down to the image."""
    axes = visualize.plot(figure, (position,), "the signal's L2 norm on its way down")
    for (label, values), color, marker in zip(norms.items(), visualize.COLORS, visualize.MARKERS):
        # Two levels deep; deeper, in residual branches, there is only a part of the signal.
        names = [name for name in values if name.count(".") < 2 and not any(
                 other.startswith(f"{name}.") for other in values if other.count(".") == 1)]
        axes.plot([values[name][0].item() or math.nan for name in names], color=color,
                  marker=marker, markersize=4, label=f"batch norm {label}")
    visualize.log_scale(axes)
    stages = [name.split(".")[0] for name in names]
    ticks = {stage: stages.index(stage) for stage in stages}
    axes.set_xticks([*ticks.values()], [*ticks], rotation=30, ha="right")
    axes.legend(fontsize=8)


def draw_gallery(patches, back, values, units, title):
    """A figure: for each unit its patches as a block, and beside it their reconstructions.

    `patches` and `back` are units×top×3×h×w, 0…1, `values` units×top.
    """
    from torchvision.utils import make_grid

    blocks = []
    for tiles in zip(patches, back):
        left, right = (make_grid(part, math.ceil(len(part) ** 0.5), padding=1, pad_value=1)
                       for part in tiles)
        gap = torch.ones(3, left.shape[1], left.shape[2] // 24)
        blocks.append(torch.cat([left, gap, right], 2))
    title += "\nactivations, strongest patches, what comes back of each (0 is grey, own scale)"
    titles = [f"unit {unit}: {high:.2g} … {low:.2g}"
              for unit, (high, low) in zip(units, values[:, [0, -1]])]
    return visualize.image_grid(blocks, titles, min(4, len(units)), title, cell=3.2)


# ---------------------------------------------------------------------------- commands


def reconstruct(ckpt: str | None = None, layers: tuple[str, ...] = ("conv1",),
                image: str | None = None, index: int = 0, unit: int | str = "strongest",
                rule: str = "deconvnet", bn: str = "through",
                **flags: typing.Unpack[visualize.Flags]):
    """Draw what comes back from a unit of each of LAYERS: the strongest, one by number, or all.

    Of a picture file or test image. Rules: deconvnet, guided, gradient. Batch norms scale the
    signal (through), are left out (skip), or both, with the signal's norms on its way down.
    """
    layers = visualize.listed(layers)
    visualize.need(layers=len(layers))
    network, about = visualize.open_network(ckpt, **flags)
    picture, name = visualize.load_image(about, image, index, **flags)
    images = about.preprocessing(picture, networks.device_of(network))
    ways = ("through", "skip") if bn == "both" else (bn,)
    descents = {layer: {way: descend(network, layer, images, unit, rule, way) for way in ways}
                for layer in progress(layers, "going back")}
    title = f"{about.title}: {name}, {rule}, bn {bn}"
    figure = draw_reconstructions(about.preprocessing.pictures(picture)[0], descents, title,
                                  about.classes)
    name = "-".join(["reconstruct", *layers, *(["bn", bn] if bn != "through" else [])])
    return visualize.save_figure(figure, ckpt, name, **flags)


def gallery(ckpt: str | None = None, layer: str = "conv1", units: tuple[int, ...] = (16,),
            top: int = 9, rule: str = "deconvnet", bn: str = "through",
            **flags: typing.Unpack[visualize.Flags]):
    """Draw, for each of LAYER's units, its TOP strongest test-image patches and what comes back.

    `--units=16` are 16 units spread evenly over all of them; `--units=3,17` are those two.
    """
    visualize.need(top=top)
    network, about, test = visualize.open_test(ckpt, **flags)
    units = visualize.choose_units(network, layer, about.preprocessing.image_size, units)
    found = top_reconstructions(network, layer, test.images, about.preprocessing, units, top, rule,
                                bn)
    figure = draw_gallery(*found, units, f"{about.title}: {layer}, {rule}, bn {bn}")
    return visualize.save_figure(figure, ckpt, f"gallery-{layer}", **flags)


COMMANDS = {"reconstruct": reconstruct, "gallery": gallery}
MEANINGS = visualize.MEANINGS | {
    "unit": "strongest, all, or the number of a feature map or neuron",
    "rule": f"what a rectifier passes on: {' | '.join(RULES)}",
    "bn": "batch norms: through | skip, or both (reconstruct)",
}

if __name__ == "__main__":
    command_line(COMMANDS, meanings=MEANINGS)
