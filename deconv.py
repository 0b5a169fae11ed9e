"""Running a network backwards to see what a unit answers to in an image.

    python deconv.py reconstruct runs/resnet18 --layers=conv1,conv5_x --bn=both
    python deconv.py gallery runs/convnet --layer=conv2 --units=16 --top=9
    python deconv.py reconstruct --network=torchvision:resnet18 --layers=layer4 --image=cat.jpg
    python deconv.py occlusion runs/convnet --index=3 --stride=1
    python deconv.py evolution runs/convnet --layer=conv2 --units=6
    python deconv.py invariance runs/convnet --layers=conv1,fc

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

The paper's other three experiments follow from it: `occlusion` (section 4.2), `evolution` and
`invariance` (section 4). Sections are those of the preprint, arXiv:1311.2901.
"""

import itertools
import math
import typing
from collections import namedtuple
from dataclasses import replace

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import network as networks
import train
import visualize
from data import check_words, command_line, progress, subset

# What goes on down, given the signal and where the rectifier's input was positive; None: the
# derivative that the function has.
RULES = {"deconvnet": lambda signal, positive: signal.clamp(min=0),
         "guided": lambda signal, positive: signal.clamp(min=0) * positive,
         "gradient": None}
Rule = typing.Literal[*RULES]
BATCH_NORMS = {"through": None, "skip": lambda signal, positive: signal}
BatchNorm = typing.Literal[*BATCH_NORMS]


# ---------------------------------------------------------------------------- the rule


class _Replaced(torch.autograd.Function):
    """A function with its own value going forward and another rule going back."""

    @staticmethod
    def forward(ctx, x, function, rule):
        ctx.rule = rule
        ctx.save_for_backward(x > 0)  # now, because `function` may work in place
        # In-place rectifiers return what they were given; autograd has to be told.
        value = function(x)
        if value is x:
            ctx.mark_dirty(x)
        return value

    @staticmethod
    def backward(ctx, signal):
        # `function` and `rule` are no tensors, and have no gradient.
        return ctx.rule(signal, *ctx.saved_tensors), None, None


class BackwardRule(TorchFunctionMode):
    """While open, rectifiers and batch norms that are called get another backward pass.

    Leaky and smooth rectifiers and clamping at 0 follow `rule` too, whatever their slope, and so
    does any function that sets to 0 just what is negative. Batch norms scale the signal by γ/σ
    (`bn` "through"; one without running statistics has its whole derivative, as its σ depends
    on the images) or pass it on ("skip"). Modules, functions, methods and in-place calls are all
    seen, values and network stay as they are. What escapes, such as an `autograd.Function`, a
    scripted function, one in `torch.vmap`, `x + x.abs()`, `x[x < 0] = 0` or `x * x.sigmoid()`,
    is noted in `hidden`; but for what is above 0 everywhere, such as `x.exp().log1p()`, which has
    its own derivative.
    """

    def __init__(self, rule: Rule = "deconvnet", bn: BatchNorm = "through"):
        super().__init__()
        check_words(self.__init__, rule=rule, bn=bn)
        self.rectify, self.normalize = RULES[rule], BATCH_NORMS[bn]
        self.replaced = False  # whether what is called follows `rule`
        self.hidden = []  # operators that rectified unseen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, known = dict(kwargs or {}), len(self.hidden)
        if not torch.is_grad_enabled() or any(map(is_batchedtensor, filter(torch.is_tensor, args))):
            return function(*args, **kwargs)  # in an autograd.Function's forward, or in vmap
        rule = self._rule_for(function, args, kwargs)
        if rule:
            x, *others = args or (kwargs.pop("input"),)
            self.replaced = rule is self.rectify
            try:
                return _Replaced.apply(x, lambda x: function(x, *others, **kwargs), rule)
            finally:
                self.replaced = False
        value = function(*args, **kwargs)  # no rectifier, or its own derivative is wanted
        for x in tensors_in([args, kwargs]) if len(self.hidden) > known else ():
            if x is not value and torch.is_tensor(value) and torch.equal(x.clamp(min=0), value):
                del self.hidden[known:]
                return _Replaced.apply(x, lambda _: value.detach(), self.rectify)
        return value

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
    """While open, operators that rectify without `rule` having seen it are noted there.

    Signs tell: what has one sign alone is 0 just where something before it, with both, had not
    that one, or where an input lies below a threshold; what has both has them where an input has,
    and keeps less of what is negative.
    """

    def __init__(self, rule):
        super().__init__()
        # By hashes of where values had a sign: what had it, and which are accounted for.
        self.rule, self.seen, self.known = rule, {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        rule = self.rule
        if not rule.rectify:  # their own derivative is wanted
            return function(*args, **(kwargs or {}))
        # What works in place leaves nothing to compare with, so that is copied first.
        changes = function._schema.is_mutable and not rule.replaced
        inputs = [x.clone() if changes else x for x in tensors_in(args)]
        if function is torch.ops.aten.copy_.default:  # what is written over tells nothing
            inputs = inputs[-1:]
        value = function(*args, **(kwargs or {}))
        memory = {x.untyped_storage().data_ptr() for x in inputs}
        for part in tensors_in(args if value is None else value):
            sides = [side for side in (part > 0, part < 0) if side.any()]  # the GPU waits here
            signs = [*map(signature, sides)]
            rectifies = bool(sides) and (
                self._is_leaky(part, signs[0], inputs) if len(sides) == 2
                else self._is_cut_off(part, sides[0], signs[0], inputs))
            if len(sides) == 2:  # as of a convolution, whose next reader is looked for
                self.seen |= {sign: part for sign in signs if sign not in self.seen}
            if rectifies and (rule.replaced or part.untyped_storage().data_ptr() in memory or (
                    len(sides) == 1 and all(signature(x > 0) in self.known and not (x < 0).any()
                                            for x in inputs))):
                self.known.update(signs)  # a view, or put together of what was rectified
            elif rectifies:
                rule.hidden.append(str(function).split(".")[1])  # the name in aten.relu.default
        return value

    def _is_leaky(self, part, sign, inputs):
        """Whether what has both signs keeps less of what is negative in an input, or in what was
        taken apart before, as into relu(x) and relu(-x)."""
        mixed = [x for x in inputs if (x > 0).any() and (x < 0).any()]
        if self.rule.replaced or sign not in self.seen or (mixed and sign in self.known):
            return False
        return any(keeps_less(x, part) for x in mixed or [self.seen[sign]])

    def _is_cut_off(self, part, side, sign, inputs):
        """Whether what has one sign alone is 0 just where something before it had not that one, as
        relu(x) is, and no mask."""
        if sign in self.known or not (
                sign in self.seen or any(cuts_off(x, side) for x in inputs)):
            return False
        sizes = part.abs()
        return not torch.equal(sizes, sizes.max() * side)


def signature(mask):
    """A number that stands for where `mask` is true, whatever its shape."""
    return hash(mask.cpu().numpy().tobytes())  # the GPU waits here


def tensors_in(values):
    """The tensors of real numbers in nested lists of `values`."""
    return [x for x in tree_leaves(values) if torch.is_tensor(x) and x.is_floating_point()]


def cuts_off(x, side):
    """Whether what has one sign alone, in the mask `side`, has it just where `x`, of both signs,
    lies beyond a threshold of one: as of a rectifier from .1 on."""
    if x.shape != side.shape or side.all():
        return False
    kept, others = x[side], x[~side]
    return bool((x > 0).any() and (x < 0).any()) and bool(
        kept.min() >= others.max().clamp(min=0) or kept.max() <= others.min().clamp(max=0))


def keeps_less(x, value):
    """Whether `value` is a function of `x` alone, place by place, nearer to 0 at −a than at a: one
    in each channel of each image, in maps N×C×H×W of 16 values or more, or else one for all. Of few
    values, or of channels with one sign each, nobody can tell."""
    if x.shape != value.shape or x.numel() < 64:
        return False
    maps = x.ndim == 4 and x[0, 0].numel() >= 16
    x, value = (part.flatten(0, 1).flatten(1) if maps else part.flatten()[None]
                for part in (x, value))  # one function a row
    x, value = (part[::1 + len(part) // 64, ::1 + part.shape[1] // 4096].float()
                for part in (x, value))
    x, order = x.sort(1)
    value = value.gather(1, order)
    # Of one function each value is about what its neighbours along `x` suggest; of several, as of
    # channels or places, or of `x` and something more, it is not.
    (x0, x1, x2), (y0, y1, y2) = (
        [part[:, i:part.shape[1] - 2 + i] for i in range(3)] for part in (
            part[:, ::max(1, part.shape[1] // 128)] for part in (x, value)))
    apart = (y1 - line(x1, x0, x2, y0, y2)).abs()
    if apart.mean() > 0.1 * (y2 - y0).abs().mean():
        return False
    # Slopes of the lines that fit best below 0, and above it at the same distances: of a norm or a
    # gate they are the same in each row, and of what rectifies a part, in some.
    low = (x < 0) & (x >= -x[:, -1:])
    after = torch.searchsorted(x.contiguous(), -x.contiguous()).clamp(1, x.shape[1] - 1)
    above = line(-x, *(part.gather(1, index) for part in (x, value)
                       for index in (after - 1, after)))
    away = (x - (x * low).sum(1, True) / low.sum(1, True).clamp(min=1)) * low
    tells = (low.sum(1) >= 4) & (away.square().sum(1) > 1e-6 * (x * low).square().sum(1))
    below, above = ((away * part).sum(1)[tells].abs() for part in (value, above))
    return bool(below.sum() < 0.9 * above.sum() and (below < 0.999 * above).all())


def line(x, x0, x1, y0, y1):
    """The value at `x` of the lines from (`x0`, `y0`) to (`x1`, `y1`)."""
    return y0.lerp(y1, (x - x0) / (x1 - x0).clamp(min=1e-30))


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
    return descend(network, layer, images, unit, rule, bn, watch=False).signal


def descend(network, layer, images, unit="strongest", rule="deconvnet", bn="through", watch=True):
    """What `project` does, as a `Descent`, with the norms at all modules where it shall `watch`.

    A layer that is called several times counts with its first call. The network runs in
    evaluation mode and is afterwards as it was, also after an exception.
    """
    networks.refuse_opaque(network)
    images = images.detach().to(torch.promote_types(images.dtype, torch.float32), copy=True)
    images.requires_grad_()
    with networks.looked_at(network), torch.enable_grad(), BackwardRule(rule, bn) as mode:
        outputs, found = forward_to(network, layer, images, mode, rule, watch)
        start = found.detach().flatten(1)
        positions = strongest(found.detach(), unit)
        if positions is not None:
            # All of the layer becomes 0 but for one value of each image: N×C·H·W.
            start = start * torch.nn.functional.one_hot(positions, start.shape[1])
        # One backward pass gives the signal everywhere: what is kept is in the graph, so the
        # "gradient" of the start with respect to it is the signal there.
        below = {name: output for name, output in reversed(outputs.items())
                 if isinstance(output, Tensor) and output.requires_grad}
        # Of checkpoints, and of a network without gradients, there is none.
        with networks.told(f"layer={layer}: there is no way back from it to the images"):
            *signals, signal = torch.autograd.grad(
                found, [*networks.gradient_places(below.values()), images],
                start.view(found.shape), allow_unused=True)
    # `allow_unused` makes what is not on the way None, not an error.
    if signal is None:
        raise ValueError(f"layer={layer}: no gradient reaches the images from it (it does not "
                         f"depend on them, or something on the way computes none)")
    if not signal.isfinite().all():
        raise ValueError(f"layer={layer}: the signal overflows {str(found.dtype)[6:]} on its way")
    # What the layer does not look at has no signal; and what has no maps or vectors for each image
    # has none of theirs.
    norms = {name: part.flatten(1).float().norm(dim=1)
             for name, part in zip([*below, "image"], [*signals, signal])
             if part is not None and part.ndim > 1 and len(part) == len(images)
             and "parametrizations." not in name}
    return Descent(signal, found.detach(), positions, norms)


def forward_to(network, layer, images, mode, rule, watch):
    """({module: output} of all modules up to `layer` where it shall `watch`, the layer's maps), in
    a graph whose rectifiers follow the open `mode`; ValueError where one of them does not.

    A module that is called several times, as a shared rectifier, counts with its first call.
    """
    names = [name for name, _ in network.named_modules() if name and watch]
    # The innermost context stops the network at the layer.
    with (_Watch(mode), networks.capture(network, names) as outputs,
          networks.capture(network, [layer], stop=True) as reached):
        try:
            networks.forward(network, images)
        except ValueError:
            if not mode.hidden:
                raise
    if mode.hidden:
        raise ValueError(f"{mode.hidden[0]} rectifies where rule={rule} cannot replace it (made by "
                         f"hand, in place, in an autograd.Function, a scripted function, vmap, "
                         f"checkpointing or without gradients): call a function of torch for it, "
                         f"such as torch.relu; `rule=gradient` needs none")
    return outputs, networks.captured_maps(network, reached, layer, len(images))


def strongest(activations, unit="strongest"):
    """N indices into C·H·W: where in N×C×H×W or N×C the largest is (of `unit`); "all": None. A
    tensor of N has them already."""
    maps = activations.flatten(2) if activations.ndim == 4 else activations[:, :, None]
    if isinstance(unit, Tensor) and unit.ndim:
        most = maps[0].numel() - 1
        if unit.shape != (len(maps),) or not ((unit >= 0) & (unit <= most)).all():
            raise ValueError(f"unit={unit.tolist()}: must be one number, or as many positions as "
                             f"images, {len(maps)}, from 0 to {most}")
        return unit
    if unit in ("strongest", "all"):
        return maps.flatten(1).argmax(1) if unit == "strongest" else None
    if not hasattr(unit, "__index__") or not 0 <= unit < maps.shape[1]:
        raise ValueError(f"unit={unit}: must be strongest, all, or from 0 to {maps.shape[1] - 1}")
    return unit * maps.shape[2] + maps[:, unit].argmax(1)  # map `unit` begins at unit·H·W


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
    # Fewer at a time than in `visualize.map_batches`: the way back needs all that lies between.
    count = max(1, 2**18 // preprocessing.image_size**2)
    for chunk in progress(torch.arange(len(positions)).split(count), f"back from {layer}"):
        batch = preprocessing(images[chunk], device)
        signals.append(project(network, layer, batch, positions[chunk].to(device), rule, bn).cpu())
    wholes = preprocessing.pictures(images), as_pictures(torch.cat(signals))
    return (*(visualize.cut_patches(whole, boxes, len(units)).unflatten(0, values.shape)
              for whole in wholes), values)


# ---------------------------------------------------------------------------- further experiments


# What R×C positions of a grey square do: the sum of one feature map of a layer, the probability of
# one class, and the number of the most likely class, each R×C.
Occlusion = namedtuple("Occlusion", "activations probabilities predictions")


@torch.no_grad()
def occlude(network, layer, image, preprocessing, unit, label, size, stride):
    """Slide a grey square over one uint8 image, 1×3×H×W, and see what it does: an `Occlusion` of
    feature map `unit` of `layer` and class `label`.

    The square of `size`×`size` pixels of the network's image is centred on every `stride`-th
    pixel and ends at the border. Zeiler & Fergus (2014), section 4.2.
    """
    device, side = networks.device_of(network), preprocessing.image_size
    pixels, grey = (preprocessing(part, device) for part in (image, torch.full_like(image, 128)))
    centres, line = torch.tensor(range(min(stride, side) // 2, side, stride)), torch.arange(side)
    start = centres[:, None] - size // 2
    # A square covers the pixels whose row and whose column it covers: positions×side for both.
    covered = (line >= start) & (line < start + size)
    steps, parts, count = len(centres), [], train.images_at_once(network, side)
    with networks.looked_at(network):
        for chunk in progress(torch.arange(steps**2).split(count), "sliding the square"):
            rows, columns = (covered[at].to(device) for at in (chunk // steps, chunk % steps))
            square = rows[:, None, :, None] & columns[:, None, None]  # n×1×side×side
            # One pass gives both: what the layer says and what the network decides.
            logits, maps = networks.logits_and_maps(network, [layer],
                                                    torch.where(square, grey, pixels))
            shares, sums = logits.softmax(1), maps[layer][:, unit].reshape(len(chunk), -1).sum(1)
            parts.append([sums, shares[:, label], shares.argmax(1)])
    return Occlusion(*(torch.cat(column).view(steps, steps).cpu() for column in zip(*parts)))


def moves(side):
    """{name: [(amount as it is told, its affine transformation), …]} for images of side×side.

    Amounts are those of Zeiler & Fergus (2014), figure 5: about a quarter of the side up and down,
    1 to 1.8 times as large, all around.
    """
    still = {"angle": 0, "translate": [0, 0], "scale": 1, "shear": [0, 0]}
    down = sorted({round(amount) for amount in visualize.spaced(-side / 4, side / 4, 21)})
    return {"vertical translation / pixels": [(y, still | {"translate": [0, y]}) for y in down],
            "scale": [(x, still | {"scale": x}) for x in visualize.spaced(1, 1.8, 17)],
            "rotation / degrees": [(x, still | {"angle": x}) for x in range(0, 360, 10)]}


def moved(images, affine):
    """Normalised `images` transformed by `affine`; what comes in from outside is 0, the mean."""
    from torchvision.transforms import v2

    return v2.functional.affine(images, **affine, fill=0,
                                interpolation=v2.InterpolationMode.BILINEAR)


@torch.no_grad()
def move_apart(network, layers, images, labels, amounts):
    """How far `amounts` (see `moves`) take N normalised images from themselves.

    Returns {layer: amounts×N Euclidean distances of its outputs to those for the image as it is}
    and the probabilities of `labels`, amounts×N. Zeiler & Fergus (2014), section 4 and figure 5.
    """
    distances, shares = {layer: [] for layer in layers}, []
    with networks.looked_at(network):
        _, start = networks.logits_and_maps(network, layers, images)
        for _, affine in progress(amounts, "moving images"):
            logits, maps = networks.logits_and_maps(network, layers, moved(images, affine))
            shares.append(logits.softmax(1).gather(1, labels[:, None])[:, 0])
            for layer in layers:
                distances[layer].append((maps[layer] - start[layer]).flatten(1).norm(dim=1))
    return {layer: torch.stack(rows).cpu() for layer, rows in distances.items()}, (
        torch.stack(shares).cpu())


# ---------------------------------------------------------------------------- drawing


def as_pictures(signals):
    """Signals N×3×H×W as floats 0…1: grey is 0, and 99 % of a signal's other values fit in."""
    # By their 99th percentile, because a few large values would leave all others grey.
    scales = [signal[signal != 0].abs().quantile(0.99) if signal.any() else 1
              for signal in signals]
    # One scale for all three colours of a signal, or its hues would change.
    panels = [0.5 + 0.5 * signal / scale for signal, scale in zip(signals, scales)]
    return torch.stack(panels).clamp(0, 1)


def window(signal):
    """The square (top, left, side) around what can be seen of a 3×S×S signal; if large, all."""
    size, strengths = signal.shape[-1], signal.abs().amax(0)
    pixels = (strengths > 1e-4 * strengths.max()).nonzero()
    # One pixel of margin on each side; of a deep layer's signal, as large as the image, all.
    side = (pixels.amax(0) - pixels.amin(0)).max().item() + 3 if len(pixels) else size
    if side > size / 2:
        return 0, 0, size
    return *(pixels.amin(0) - 1).clamp(0, size - side).tolist(), side


def way_text(network, rule, bn):
    """How a title names the way back to the pixels."""
    name = {"guided": "guided backpropagation"}.get(rule, rule)
    left_out = bn == "skip" and networks.batch_norms(network)
    return f"{name}, batch norms left out" if left_out else name


def draw_reconstructions(picture, descents, title, classes):
    """A figure with a row a layer: the image, what the unit saw of it, what comes back.

    After figure 2 of Zeiler & Fergus (2014). `picture` is 3×S×S, 0…1, `descents` {layer:
    {"through" or "skip": Descent}}; with both of them the norms on the way down are plotted
    beside. `classes` {layer: names} are those of units that are logits.
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
        seen = first.signal[0].any()
        panels = {f"{layer}, {unit_text(first, classes.get(layer))}": picture,
                  f"its {side}×{side} pixels" if seen else "nothing comes back": picture}
        panels |= {f"back, batch norm {bn}" if both else "what comes back":
                   as_pictures(way.signal)[0].cpu() for bn, way in ways.items()}
        for column, (text, panel) in enumerate(panels.items()):
            cut = panel[:, top:top + side, left:left + side] if column else panel
            visualize.show(figure.add_subplot(grid[row, column]), cut, text)
        if seen:
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
    named = f" ({visualize.shortened(classes, 14)[unit]})" if classes else ""
    return f"unit {unit}{named}: {activations.flatten()[position]:.3g}"


def draw_norms(figure, position, norms):
    """Plot {label: {module: N norms}} of the first image, from a layer down to the image."""
    axes = visualize.plot(figure, (position,), "the signal's L2 norm on its way down")
    for (label, values), color, marker in zip(norms.items(), visualize.COLORS, visualize.MARKERS):
        # Two levels deep; deeper, in residual branches, there is only a part of the signal.
        paths = [name.split(".") for name in values if name != "image"]
        while paths and len(paths[0]) > 1 and len({path[0] for path in paths}) == 1:
            paths = [path[1:] for path in paths]  # what all paths begin with says nothing
        full = dict(zip([*map(".".join, paths), "image"], values))
        names = [name for name in full if name.count(".") < 2 and not any(
                 other.startswith(f"{name}.") for other in full if other.count(".") == 1)]
        axes.plot([values[full[name]][0].item() or math.nan for name in names], color=color,
                  marker=marker, markersize=4, label=f"batch norm {label}")
    visualize.log_scale(axes)
    stages = [name.split(".")[0] for name in names]
    ticks = {stage: stages.index(stage) for stage in stages}
    axes.set_xticks([*ticks.values()], [*ticks], rotation=30, ha="right")
    axes.legend(fontsize=8)


def beside(left, right):
    """Images …×H×W and …×H×V beside each other, with white between them."""
    gap = torch.ones(*left.shape[:-1], max(1, left.shape[-1] // 16))
    return torch.cat([left, gap, right], -1)


def draw_gallery(patches, back, values, units, title):
    """A figure: for each unit its patches as a block, and beside it their reconstructions.

    `patches` and `back` are units×top×3×h×w, 0…1, `values` units×top.
    """
    from torchvision.utils import make_grid

    def block(tiles):
        return make_grid(tiles, math.ceil(len(tiles) ** 0.5), padding=1, pad_value=1)

    blocks = [beside(block(own), block(signals)) for own, signals in zip(patches, back)]
    titles = [f"unit {unit}, activation {high:.2g} to {low:.2g}"
              for unit, (high, low) in zip(units, values[:, [0, -1]])]
    return visualize.image_grid(blocks, titles, min(4, len(units)), title, cell=3.2)


def draw_occlusion(picture, found, signal, size, stride, unit, label, share, classes, title):
    """A figure after figure 6 of Zeiler & Fergus (2014; 7 of the preprint), for one image.

    `picture` 3×S×S, 0…1; `found` an `Occlusion` with squares of `size` and `stride`; `signal` what
    comes back of the feature map, 3×S×S; `unit` and `label` say which map and class, `share` is the
    class's probability without the square; `classes` name all.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    side, steps, colors = picture.shape[-1], len(found.activations), visualize.COLORS
    # Cell i of a map stands for the square centred at i·stride + stride/2; the border may cut the
    # last one, as it cuts the image.
    stride = min(stride, side)
    changes = (found.probabilities - share).abs()
    row, column = (step * stride + stride // 2 - size // 2
                   for step in divmod(changes.argmax().item(), steps))
    shown, where = picture.clone(), "which leaves the probability as it is"
    if changes.max() > 1e-6:  # else rounding
        shown[:, max(row, 0):row + size, max(column, 0):column + size] = 0.5
        where = "where it does most"
    ranks, names = ranked(found.predictions, classes, len(colors))
    figure = visualize.new_figure(17, 4.5, title)
    panels = [
        (shown.permute(1, 2, 0), f"the grey square, {size}×{size},\n{where}", {}),
        (found.activations, f"{unit},\nsummed, by the square's position", {}),
        (as_pictures(signal[None])[0].permute(1, 2, 0), f"{unit},\nback in the pixels", {}),
        (found.probabilities, f"probability of the {label}\n({share:.1%} without the square)",
         {"vmin": 0}),
        (ranks, "most likely class,\nby the square's position",
         {"cmap": ListedColormap(colors), "vmin": 0, "vmax": len(colors) - 1})]
    for axes, (values, text, options) in zip(figure.subplots(1, 5), panels):
        edge = steps * stride if values.ndim == 2 else side
        drawn = axes.imshow(values, extent=(0, edge, edge, 0), interpolation="nearest", **options)
        axes.set_title(text, fontsize=9)
        axes.set(xlim=(0, side), ylim=(side, 0), xticks=(), yticks=(), anchor="N")
        if values.ndim == 2 and values is not ranks:
            bar = axes.inset_axes((0.1, -0.1, 0.8, 0.04))
            figure.colorbar(drawn, cax=bar, orientation="horizontal", ticks=MaxNLocator(3),
                            format=lambda value, _: f"{float(f'{value:.4g}'):.10g}")
            bar.tick_params(labelsize=8)
    legend = axes.legend([Patch(color=color) for color in colors[:len(names)]],
                         ["name"] * len(names), fontsize=8, frameon=False, ncols=2,
                         loc="upper center", bbox_to_anchor=(0.5, -0.02))
    visualize.name_legend(legend, names)
    return figure


def ranked(predictions, classes, most):
    """Class numbers as ranks by their frequency, and the names of the ranks; all classes from the
    last of `most` ranks on are "others"."""
    numbers, which, counts = predictions.unique(return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True)
    names = [classes[number] for number in numbers[order].tolist()]
    names = names if len(names) <= most else [*names[:most - 1], "others"]
    return order.argsort()[which].clamp(max=most - 1), names


def draw_invariance(rows, classes, title):
    """A figure after figure 5 of Zeiler & Fergus (2014): a row for each of {name: (amounts,
    pictures amounts×N×3×S×S, distances, probabilities)} (see `move_apart`); `classes` N names."""
    layers = next(iter(rows.values()))[2]
    figure = visualize.new_figure(5 + 3.4 * (len(layers) + 1), 3.1 * len(rows) + 0.5, title)
    grid = figure.add_gridspec(len(rows), len(layers) + 2, width_ratios=[1.4, *[1] * (
        len(layers) + 1)])
    for row, (name, (amounts, pictures, distances, shares)) in enumerate(rows.items()):
        draw_moved(figure.add_subplot(grid[row, 0]), name, amounts, pictures, classes)
        plots = {f"{layer}: Euclidean distance": values
                 for layer, values in distances.items()} | {"probability of the class": shares}
        for column, (text, values) in enumerate(plots.items(), 1):
            axes = visualize.plot(figure, (grid[row, column],), text, name)
            for number, line in enumerate(values.T):
                axes.plot(amounts, line, linewidth=1.4, markevery=4, markersize=4,
                          **visualize.look(number))
            axes.set_ylim(0, 1.02 if values is shares else None)
    return figure


def draw_moved(axes, name, amounts, pictures, classes, count=7):
    """A row for each of `classes`: its image moved by `count` of the `amounts`, evenly chosen."""
    from torchvision.utils import make_grid

    chosen = [index * (len(amounts) - 1) // (count - 1) for index in range(count)]
    strip = make_grid(pictures[chosen].transpose(0, 1).flatten(0, 1), count, padding=1, pad_value=1)
    axes.imshow(strip.permute(1, 2, 0), interpolation="nearest", extent=(0, count, len(classes), 0))
    axes.set_title(name, fontsize=10)
    axes.set_xticks([index + 0.5 for index in range(count)],
                    [f"{amounts[index]:.3g}" for index in chosen], fontsize=8)
    axes.set_yticks([row + 0.5 for row in range(len(classes))],
                    visualize.shortened(classes), fontsize=8)
    for text, color in zip(axes.get_yticklabels(), itertools.cycle(visualize.COLORS)):
        text.set_color(color)
    axes.set_frame_on(False)
    axes.tick_params(length=0)


# ---------------------------------------------------------------------------- commands


def reconstruct(ckpt: str | None = None, layers: tuple[str, ...] = ("conv1",),
                image: str | None = None, index: int = 0, unit: int | str = "strongest",
                rule: Rule = "deconvnet", bn: typing.Literal[*BATCH_NORMS, "both"] = "through",
                **flags: typing.Unpack[visualize.Flags]):
    """Draw what comes back from a unit of each of LAYERS: the strongest, one by number, or all.

    Of a picture file or test image (Zeiler & Fergus 2014, section 2.1, figure 2). Batch norms scale
    the signal (through), are left out (skip), or both, with the signal's norms on its way down.
    """
    layers = visualize.listed(layers)
    visualize.need(layers=len(layers))
    check_words(reconstruct, rule=rule, bn=bn)
    network, about, picture, _, name = visualize.open_picture(ckpt, image, index, **flags)
    images = about.preprocessing(picture, networks.device_of(network))
    ways = ("through", "skip") if bn == "both" else (bn,)
    descents = {layer: {way: descend(network, layer, images, unit, rule, way) for way in ways}
                for layer in progress(layers, "going back")}
    title = f"{about.title}: {name}, {way_text(network, rule, bn)}"
    last = about.classes and networks.last_linear(network, about.preprocessing.image_size)
    classes = {layer: about.classes for layer in layers  # of the logits alone
               if last and f"{last}.".startswith(f"{layer}.")}
    figure = draw_reconstructions(about.preprocessing.pictures(picture)[0], descents, title,
                                  classes)
    name = "-".join(["reconstruct", *layers, *(["bn", bn] if bn != "through" else [])])
    return visualize.save_figure(figure, ckpt, name, **flags)


def gallery(ckpt: str | None = None, layer: str = "conv1", units: tuple[int, ...] = (),
            top: int = 9, rule: Rule = "deconvnet", bn: BatchNorm = "through",
            **flags: typing.Unpack[visualize.Flags]):
    """Draw, for each of LAYER's units, its TOP strongest test-image patches and what comes back.

    Zeiler & Fergus (2014), section 4, figure 2. `--units=16` are 16 units spread evenly over all of
    them; `--units=3,17` are those two.
    """
    visualize.need(top=top)
    check_words(gallery, rule=rule, bn=bn)
    network, about, test = visualize.open_test(ckpt, **flags)
    units = visualize.choose_units(network, layer, about.preprocessing.image_size, units)
    found = top_reconstructions(network, layer, test.images, about.preprocessing, units, top, rule,
                                bn)
    title = (f"{about.title}: {layer}, the strongest patches of {len(test.labels)} test images and "
             f"what comes back\n({way_text(network, rule, bn)}; grey is 0, each on its own scale)")
    figure = draw_gallery(*found, units, title)
    return visualize.save_figure(figure, ckpt, f"gallery-{layer}", **flags)


def occlusion(ckpt: str | None = None, image: str | None = None, index: int = 0,
              layer: str | None = None, size: int | None = None, stride: int | None = None,
              **flags: typing.Unpack[visualize.Flags]):
    """Draw what a grey square that slides over a picture does to LAYER and to the prediction.

    Zeiler & Fergus (2014), section 4.2, figure 7. Without `--layer` the last that makes maps, of
    which the one with the strongest response is taken.
    """
    network, about, picture, label, source = visualize.open_picture(ckpt, image, index, **flags)
    side = about.preprocessing.image_size
    size = max(1, side // 4) if size is None else size
    stride = max(1, side // 16) if stride is None else stride
    visualize.need(size=size, stride=stride)
    images = about.preprocessing(picture, networks.device_of(network))
    # In the precision in which `occlude` computes, with whose probabilities it is compared.
    logits = train.finite_logits(network, picture, replace(about.preprocessing,
                                                           precision="fp32"))[0]
    classes = visualize.shortened(about.class_names(len(logits)))
    kind = "true class"
    if label is None:
        label, kind = logits.argmax().item(), "class predicted at first"
    layer = layer or networks.grad_cam(network, images, label)[1]  # the last with maps
    descent = descend(network, layer, images, watch=False)
    unit = descent.positions[0].item() // descent.activations[0, 0].numel()
    found = occlude(network, layer, picture, about.preprocessing, unit, label, size, stride)
    figure = draw_occlusion(
        about.preprocessing.pictures(picture)[0], found, descent.signal[0].cpu(), size, stride,
        f"feature map {unit} of {layer}", f"{kind},\n{classes[label]}",
        logits.softmax(0)[label].item(), classes, f"{about.title}: {source}, behind a grey square")
    return visualize.save_figure(figure, ckpt, "occlusion", **flags)


def evolution(ckpt: str, layer: str = "conv1", units: tuple[int, ...] = (),
              rule: Rule = "deconvnet", bn: BatchNorm = "through",
              **flags: typing.Unpack[visualize.Flags]):
    """Draw how LAYER's units came to be: of each the strongest activation over the test images,
    back in the pixels, at each snapshot of the run CKPT (`train.py --snapshots=1,2,5,10`) and at
    its end.

    Zeiler & Fergus (2014), section 4, figure 4; beside it, the patch. `--units` as in `gallery`.
    """
    check_words(evolution, rule=rule, bn=bn)
    files, cells, titles = visualize.snapshots(ckpt), [], []
    if not files:
        raise ValueError(f"{ckpt}: not the folder of a run with two snapshots or more (train with "
                         f"--snapshots=1,2,5,10)")
    _, last, test = visualize.open_test(files[-1], **flags)
    for file in files:
        network, about = visualize.open_network(file, **flags)
        chosen = visualize.choose_units(network, layer, about.preprocessing.image_size, units, 6)
        patches, back, values = top_reconstructions(
            network, layer, test.images, about.preprocessing, chosen, 1, rule, bn)
        cells.append(beside(back[:, 0], patches[:, 0]))
        titles.append([f"{about.when}: {value:.2g}" for value in values[:, 0]])
    title = (f"{about.model}{last.on}: {layer}, {way_text(network, rule, bn)}\nthe strongest "
             f"activation of {len(test.labels)} test images, what comes back, and its patch")
    cells, titles = ([*itertools.chain(*zip(*columns))] for columns in (cells, titles))  # by units
    figure = visualize.image_grid(cells, titles, len(files), title, cell=1.5,
                                  row_titles=[f"unit {unit}" for unit in chosen])
    return visualize.save_figure(figure, ckpt, f"evolution-{layer}", **flags)


def invariance(ckpt: str | None = None, count: int = 5, layers: tuple[str, ...] = (),
               **flags: typing.Unpack[visualize.Flags]):
    """Draw how COUNT test images move away from themselves in LAYERS, and what becomes of their
    class, as they are moved, scaled and turned. Zeiler & Fergus (2014), section 4, figure 5.

    Without `--layers`, the first and the last of the network.
    """
    visualize.need(count=count)
    network, about, test = visualize.open_test(ckpt, **flags)
    children = networks.outputs_of(network, [name for name, _ in network.named_children()],
                                   about.preprocessing.image_size)
    called = [name for name, output in children.items() if torch.is_tensor(output)]
    layers = visualize.listed(layers) or tuple(dict.fromkeys([*called[:1], *called[-1:]]))
    if not layers:
        raise ValueError("no part of the network alone gives a tensor; name `layers`")
    test = subset(test, count, seed=0)
    images = about.preprocessing(test.images, networks.device_of(network))
    logits = train.finite_logits(network, test.images, about.preprocessing)
    labels = (test.labels if about.classes else logits.argmax(1)).to(images.device)
    # The moved pictures are shown as the network saw them: normalised, then brought back.
    mean, std = (torch.tensor(values)[:, None, None] for values in (
        about.preprocessing.mean, about.preprocessing.std))
    rows = {}
    for name, amounts in moves(about.preprocessing.image_size).items():
        pictures = torch.stack([moved(images, affine).cpu() * std + mean for _, affine in amounts])
        rows[name] = ([amount for amount, _ in amounts], pictures.clamp(0, 1),
                      *move_apart(network, layers, images, labels, amounts))
    names = [about.class_names(len(logits[0]))[label] for label in labels]
    kind = "" if about.classes else ", which was predicted at first"
    title = (f"{about.title}: distance of features to those of the image as it is, and probability "
             f"of the class{kind}")
    return visualize.save_figure(draw_invariance(rows, names, title), ckpt, "invariance", **flags)


COMMANDS = {command.__name__: command for command in (
    reconstruct, gallery, occlusion, evolution, invariance)}
MEANINGS = visualize.MEANINGS | {
    "image_size": train.MEANINGS["image_size"],
    "units": f"{visualize.MEANINGS['units']} (evolution: 6), or all there are",
    "unit": "strongest, all, or the number of a feature map or neuron",
    "rule": "what a rectifier passes on:",
    "bn": "batch norms:",
    "size": "side of the grey square in pixels; none: a quarter of the image's",
    "stride": "pixels from one square to the next; none: a sixteenth of the image's side",
}

if __name__ == "__main__":
    command_line(COMMANDS, meanings=MEANINGS)
