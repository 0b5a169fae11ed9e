"""Looking at data, at training, and inside networks: one figure a command.

    python visualize.py samples --data=cifar10
    python visualize.py curves runs/lenet runs/vgg16_1x1
    python visualize.py predictions runs/lenet --only=wrong
    python visualize.py patches runs/convnet --layer=conv2 --units=16 --top=9
    python visualize.py landscape runs/resnet18 --images=500
    python visualize.py features torchvision:resnet18 --layers=layer1 --image=cat.jpg

CKPT is a checkpoint, a run's folder, `torchvision:NAME` or `package.module:function`. A figure
goes to `figures/` beside the checkpoint, or to `runs/figures` where there is none, unless `--out`
names another file or folder. Computing and drawing are separate: what computes takes a network
and tensors and returns tensors, what draws returns a matplotlib figure, and only the commands at
the end of this file write; they return their figures, each with the `path` it was written to.
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import math
import os
import re
import shlex
import textwrap
import typing
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

import network as networks
import train
from data import (
    BUILT_IN,
    MIXTURES,
    Made,
    Table,
    check_ours,
    check_words,
    closest,
    command_line,
    generator,
    load,
    mean_of_image_stds,
    name_of,
    pixel_statistics,
    place_of,
    progress,
    read_image,
    read_json,
    read_text,
    resize,
    say_once,
    subset,
    write_atomically,
    writing,
)

Format = typing.Literal["png", "svg", "pdf"]
SUFFIXES = (*typing.get_args(Format), "jpg", "jpeg", "eps")  # of files that --out may name
DPI = 150  # of figures as PNG
SIGN = "CIFAR-10 lab, drawn with Matplotlib"  # in every figure's file
# Okabe & Ito's colours, told apart by colour-blind readers; in grey print the markers do it.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
UNITS = {"loss": "cross-entropy", "accuracy": "of the images"}
PART_NAMES = {"train": "training", "val": "validation", "test": "test"}
GREY = 0.85  # what lies outside the image
ANEW = ", batch norm measured anew"
NOTHING = "–"  # instead of a number where nothing was there to be measured


# ---------------------------------------------------------------------------- grids and axes


def new_figure(width, height, title):
    """An empty figure that lays itself out: height×width inches below its title, whose lines are
    broken where they are wider."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # slow to import, and not pyplot, which keeps figures
    from matplotlib.text import Text

    class LiteralFigure(Figure):
        """A figure in which a $ begins no formula, as names of classes and runs may hold it."""

        def draw(self, renderer):
            with warnings.catch_warnings(), rc_context(
                    {"text.parse_math": False}):  # for the ticks, which are made now
                warnings.filterwarnings("ignore", "Glyph .* missing")  # `fonts_for` says so
                for text in self.findobj(Text):
                    text.set_parse_math(False)
                    if not text.get_text().isascii():
                        # A file's name may have bytes that are no text.
                        text.set_text(text.get_text().encode(errors="replace").decode())
                        text.set_fontfamily(fonts_for(frozenset(text.get_text()),
                                                      tuple(text.get_fontfamily())))
                super().draw(renderer)

        def _repr_png_(self):
            """What a notebook shows, also one without %matplotlib inline."""
            content = io.BytesIO()
            self.savefig(content, format="png", facecolor="white")
            return content.getvalue()

    lines = [part for line in title.split("\n")  # a letter of this size is 0.087 inches wide
             for part in textwrap.wrap(line, int(width / 0.087)) or [""]]
    figure = LiteralFigure((width, height + 0.1 + 0.2 * len(lines)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.07)
    figure.suptitle("\n".join(lines), fontsize=11)
    return figure


@functools.cache
def fonts_for(letters, families):
    """The names of fonts that draw a set of letters: `families`, and those installed that have what
    these lack, as matplotlib's own has but the letters of Europe. Matplotlib asks each in turn."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager
    from matplotlib.ft2font import FT2Font

    left, names = {ord(letter) for letter in letters if letter.isprintable()}, [*families]
    own = [(family, findfont(FontProperties(family=[family]))) for family in families]
    for name, path in [*own, *((font.name, font.fname) for font in fontManager.ttflist)]:
        with contextlib.suppress(OSError, RuntimeError):  # its file is damaged, or gone
            drawn = left and left & FT2Font(path).get_charmap().keys()
            if drawn and "Last Resort" not in name:  # which has boxes alone
                names, left = [*names, name], left - drawn
    if left:
        say_once(f"no font here draws {''.join(map(chr, sorted(left)))}: figures have boxes "
                       f"instead")
    return [*dict.fromkeys(names)]


def shortened(names, most=24):
    """Long `names` by their beginnings and ends, as there is no room for more than `most` letters,
    or as many more as it takes for two that differ to stay so."""
    half = most // 2
    short = [name if len(name) <= most else f"{name[:half]}…{name[half + 1 - most:]}"
             for name in names]
    return short if len({*short}) == len({*names}) else shortened(names, most + 8)


def plot(figure, position, title, xlabel="", ylabel=""):
    """New axes in `figure` at the subplot `position`, without needless lines."""
    axes = figure.add_subplot(*position)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return axes


def show(axes, image, title="", **options):
    """Draw an image 3×H×W, or a map H×W in colours, with its pixels as squares and no axes."""
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    image = image if image.ndim == 2 else image.permute(1, 2, 0)
    return axes.imshow(image, interpolation="nearest", **options)


def log_ticks(low, high, most=8):
    """{number: text} for a logarithmic axis from `low` to `high`: no two texts are the same."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    # Over many decades only their powers of ten; within less than one, evenly spaced numbers.
    for locator in (LogLocator(subs=(1, 2, 5), numticks=most), LogLocator(numticks=most),
                    MaxNLocator(5)):
        ticks = [tick for tick in locator.tick_values(low, high) if low <= tick <= high]
        if 3 <= len(ticks) <= most:
            break
    return dict(zip(ticks, distinct(ticks, 1e-3)))


def distinct(numbers, error=0.2):
    """`numbers` as short texts, each off by less than `error` of the step to the next of them."""
    steps = [abs(after - before) for before, after in itertools.pairwise(numbers)]
    steps = [math.inf, *steps, math.inf]
    for digits in range(3, 17):
        texts = [f"{number:.{digits}g}" for number in numbers]
        texts = [text if abs(float(text)) >= 1e7 else f"{float(text):.15g}"  # 1000, not 1e+03
                 for text in texts]
        if all(abs(float(text) - number) <= error * min(both)
               for text, number, *both in zip(texts, numbers, steps, steps[1:])):
            break
    return texts


def log_scale(axes):
    """Make the vertical axis logarithmic and say so, labelled with plain numbers; not one without
    anything that is finite and above 0."""
    if not 0 < axes.dataLim.ymax < math.inf:
        return
    axes.set_yscale("log")
    ticks = log_ticks(*axes.get_ylim())
    axes.set_yticks([*ticks], [*ticks.values()])
    axes.minorticks_off()
    axes.set_ylabel(f"{axes.get_ylabel()} (logarithmic)".strip())


def percent(axis):
    """Label an axis of shares in per cent; where none can be, below 0 and above 1, not at all."""
    axis.set_major_formatter(lambda share, _: f"{share * 100:.4g}%" if (
        0 <= round(share, 9) <= 1) else "")  # a tick may be a little more than 1


def add_legend(figure, entries):
    """A legend below all axes from {name: what is drawn}."""
    if not entries:
        return
    widest = 0.7 + 0.065 * max(map(len, entries))  # inches
    columns = max(1, int(figure.get_figwidth() / widest))
    if columns < len(entries) or len(entries) > 4:
        columns = min(columns, math.ceil(len(entries) / 2))
    legend = figure.legend([*entries.values()], ["name"] * len(entries), fontsize=8,
                           loc="outside lower center", ncols=columns, frameon=False)
    name_legend(legend, entries)


def name_legend(legend, names):
    """Put `names` into a legend as they are: matplotlib would leave out a _name."""
    for text, name in zip(legend.get_texts(), names):
        text.set_text(name)


def image_grid(images, titles=None, columns=None, suptitle="", scale="each", row_titles=None,
               cell=None):
    """A figure with a grid of `images`: 3×H×W floats 0…1, or H×W maps drawn in colours.

    Pixels are enlarged as squares. Every map has the whole range of colours to itself (`scale`
    "each"), or all maps share one, shown by a colour bar ("shared"). `titles` has a text for
    each image, `row_titles` for each row; `cell` is a picture's side in inches.
    """
    images = [image.detach().float().cpu() for image in images]
    maps = [image.flatten() for image in images if image.ndim == 2]
    shared = bool(maps) and scale == "shared"
    limits = dict(zip(("vmin", "vmax"), span_of(torch.cat(maps)))) if shared else {}
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cell = cell or min(1.4, max(0.6, 7 / columns))
    # One pair of axes holds all pictures: hundreds of axes would take a minute to lay out. All
    # lengths on it are in cells; a cell is 1 wide and as tall as the tallest picture.
    tall = max(image.shape[-2] / image.shape[-1] for image in images)
    pitch = tall + 0.06 + (0.19 / cell if titles else 0)

    beside = max((len(line) for text in row_titles or () for line in text.split("\n")), default=0)
    width = columns * 1.06 * cell + 0.085 * beside + (0.7 if shared else 0)
    figure = new_figure(max(width, 4) + 0.3, rows * pitch * cell + 0.1, suptitle)
    axes = figure.add_subplot()
    for index, image in enumerate(images):
        x, y = index % columns * 1.06, (index // columns + 1) * pitch - tall
        edge = (tall - image.shape[-2] / image.shape[-1]) / 2  # above and below a flat picture
        drawn = axes.imshow(image if image.ndim == 2 else image.permute(1, 2, 0).clamp(0, 1),
                            "viridis", extent=(x, x + 1, y + tall - edge, y + edge),
                            interpolation="nearest", **limits)
        if titles:
            axes.text(x + 0.5, y - 0.03, titles[index], ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(0, columns * 1.06), ylim=(rows * pitch, 0), xticks=(), frame_on=False)
    axes.set_yticks([(row + 1) * pitch - tall / 2 for row in range(rows if row_titles else 0)],
                    row_titles or (), fontsize=8)
    axes.tick_params(length=0)
    if shared:
        figure.colorbar(drawn, ax=axes, aspect=30, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def spaced(low, high, count):
    """`count` numbers from `low` to `high`; if they are symmetric and odd, 0 is exactly there."""
    # Not low + index·step, whose rounding would miss the 0 in the middle, the network itself.
    return [(low * (count - 1 - index) + high * index) / (count - 1) for index in range(count)]


def span_of(values):
    """Smallest and largest of the finite `values`, never the same; ValueError if none is."""
    values = values[values.isfinite()]
    if not len(values):
        raise ValueError("there is nothing to draw: not one value is finite")
    low, high = values.min().item(), values.max().item()
    return (low, high) if high > low else (low, low + 1)


def folder_of(ckpt):
    """The folder of a checkpoint, which may be that folder itself; `runs` for all else."""
    path = Path(os.path.expanduser(ckpt or "runs"))
    return path if path.is_dir() else path.parent if path.exists() else Path("runs")


def file_of(out):
    """The file that the flag `out` names; None for a folder, which has no suffix (a letter and up
    to four more letters or digits behind a point), or is there, or ends in a slash.

    ValueError for a suffix that no figure has, FileExistsError for a file that is none of ours.
    """
    path = Path(os.path.expanduser(out or ""))
    if str(out).endswith("/") or path.is_dir() or not re.fullmatch(
            r"\.[A-Za-z]\w{1,4}", path.suffix):
        return None
    if path.suffix[1:].lower() not in SUFFIXES:
        raise ValueError(f"out={out}: a figure's file ends in .{', .'.join(SUFFIXES)}; a folder "
                         f"with a suffix needs a / at its end")
    check_figure(path, "out=")
    return path


def check_figure(path, flag=""):
    """FileExistsError if `path`, which may be what `flag` says, is there and holds no figure of
    this package."""
    # Figures of earlier versions have Matplotlib's name alone, as all that are drawn with it: that
    # will do where this package chose the place, and in the folder of a run.
    path = Path(path)
    ours = not flag or any(map(train.is_run, path.absolute().parents))
    check_ours(path, "Matplotlib" if ours else SIGN, "is no figure made here", flag)


def snapshots(run, most=8):
    """The files with the weights of the run in a folder as they were at up to `most` times, evenly
    chosen, in order: its snapshots, or else the checkpoints that it kept, and the last of all. One
    alone is none."""
    folder = folder_of(run)
    # By length first: epochs of more than five digits come after those of five.
    files = sorted((path for path in folder.glob("snapshot-*.pth")
                    if re.fullmatch(r"snapshot-\d+", path.stem)),  # no copy that somebody made
                   key=lambda path: (len(path.name), path.name))
    last = [*folder.glob("last.pth")]
    if not files:
        files = [*sorted(folder.glob("step-*.pth")), *last]
    elif last and networks.read(last[0])["epoch"] > int(files[-1].stem.partition("-")[2]):
        files += last  # no snapshot was taken at the end
    # Evenly, with the first and the last among them.
    count = min(most, len(files)) if len(files) > 1 else 0
    return [files[index * (len(files) - 1) // (count - 1)] for index in range(count)]


def figure_path(ckpt, name, out=None, format="png"):
    """Where figure `name` of `ckpt` goes: its folder's `figures/`, or file or folder `out`."""
    folder = os.path.expanduser(out or folder_of(ckpt) / "figures")
    return file_of(out) or Path(folder, f"{name}.{format}")


def save_figure(figure, ckpt, name, out=None, format="png", **_others):
    """Write `figure` to its `figure_path`, which becomes `figure.path`, and return it."""
    path = figure_path(ckpt, name, out, format or "png")
    check_figure(path, "out=" if out else "")
    kind = path.suffix[1:].lower()
    # By a name in the file `check_figure` knows what was made here.
    signed = ({"pil_kwargs": {"comment": SIGN}} if kind in ("jpg", "jpeg") else
              {"metadata": {"Software" if kind == "png" else "Creator": SIGN}})
    write_atomically(path, lambda file: figure.savefig(
        file, format=kind, dpi=DPI, facecolor="white", **signed))
    figure.path = path
    return figure


# ---------------------------------------------------------------------------- computing: units


@torch.no_grad()
def feature_maps(network, layers, images):
    """{layer: what it makes of normalised images, N×C×H×W, where a vector's H and W are 1}.

    Nothing behind the layers is computed. See `network.captured_maps` for what else there is.
    """
    with networks.looked_at(network), networks.capture(network, layers, stop=True) as outputs:
        networks.forward(network, images)
    found = {layer: networks.captured_maps(network, outputs, layer, len(images))
             for layer in layers}
    return {layer: maps if maps.ndim == 4 else maps[:, :, None, None]
            for layer, maps in found.items()}


def map_batches(network, layers, images, preprocessing):
    """Yield (number of the first image, its `feature_maps`), through all uint8 `images`."""
    # As many images at once as fit where one layer's output is kept; here are several.
    count = max(1, train.images_at_once(network, preprocessing.image_size) // len(layers))
    for start in progress(range(0, len(images), count), f"layers of {len(images)} images"):
        batch = preprocessing(images[start:start + count], networks.device_of(network))
        yield start, feature_maps(network, layers, batch)


def top_activations(network, layer, images, preprocessing, units, top):
    """The `top` uint8 images that excite each of the `units` (channel numbers) of `layer` most.

    An image counts by its strongest position. One pass over the images keeps only the best.
    Returns values units×top, falling, the images' numbers and the positions in the H·W of the
    feature map, each units×top.
    """
    units, top = torch.as_tensor(units), min(top, len(images))
    best = torch.full((len(units), top), -torch.inf)
    found = torch.zeros(2, len(units), top, dtype=torch.long)  # images, and positions
    for start, outputs in map_batches(network, [layer], images, preprocessing):
        maps = outputs[layer]
        if max(units) >= maps.shape[1]:
            raise ValueError(f"unit {max(units)}: {layer} has units 0 to {maps.shape[1] - 1}")
        peak, position = maps[:, units.to(maps.device)].flatten(2).max(2)  # N×units
        index = torch.arange(start, start + len(maps)).expand(len(units), -1)
        # The best so far and this batch's compete, units×(top + N); the GPU waits at `cpu()`.
        best, order = torch.cat([best, peak.T.float().cpu()], 1).topk(top, 1)
        found = torch.cat([found, torch.stack([index, position.T.cpu()])], 2)
        found = found.gather(2, order.expand(2, -1, -1))
    return best, *found


def cut_patches(images, boxes, units=1):
    """Cut box i out of image i of N×3×S×S floats: N×3×h×w for the largest box, h×w.

    They are of so many `units`, one after another. A box that the image's border cut off, smaller
    than its unit's largest, is filled up there with grey, so that all patches have the same scale
    and a unit sits at the same place in each.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).unflatten(0, (units, -1))
    sides = sides.amax(1, keepdim=True).expand_as(sides).flatten(0, 1)  # of each box's unit
    height, width = sides.amax(0).clamp(min=1).tolist()
    patches = torch.full((len(images), images.shape[1], height, width), GREY)
    for patch, image, (top, left, bottom, right), (tall, wide) in zip(
            patches, images, boxes.tolist(), sides.tolist()):
        # What a box at the top lacks is missing above it, so the patch begins lower.
        y = tall - (bottom - top) if top == 0 else 0
        x = wide - (right - left) if left == 0 else 0
        patch[:, y:y + bottom - top, x:x + right - left] = image[:, top:bottom, left:right]
    return patches


def top_fields(network, layer, images, preprocessing, units, top):
    """What the `units` of `layer` looked at where they were strongest, unit by unit.

    Returns the activations, units×top, and for each of these units·top the uint8 image, the
    position in C·H·W of the feature maps, and the receptive field (see `network.receptive_fields`).
    A unit that no image excites looked at nothing, not at the first images of the data set.
    """
    values, chosen, inside = top_activations(network, layer, images, preprocessing, units, top)
    fields = networks.receptive_fields(network, layer, preprocessing.image_size)  # C×H×W×4
    # `inside` are numbers in the H·W of one map; fields are found by those in C·H·W.
    positions = (torch.tensor(units)[:, None] * fields[0, :, :, 0].numel() + inside).flatten()
    boxes = fields.flatten(0, 2)[positions] * (values.flatten() != 0)[:, None]
    return values, images[chosen.flatten()], positions, boxes


def choose_units(network, layer, image_size, units, most=16):
    """Channel numbers of `layer` from the flag `units`: one number is how many, evenly spread over
    all channels; several are the units themselves; none: `most`, or all that there are."""
    device, units = networks.device_of(network), listed(units)
    blank = torch.zeros(1, 3, image_size, image_size, device=device)
    channels = feature_maps(network, [layer], blank)[layer].shape[1]
    if not units or (len(units) == 1 and 1 <= units[0] <= channels):
        count, = units or (min(most, channels),)
        return [index * channels // count for index in range(count)]
    if len(units) < 2 or min(units) < 0 or max(units) >= channels:
        raise ValueError(f"units={','.join(map(str, units))}: must be how many of the {channels}, "
                         f"or several from 0 to {channels - 1}")
    return list(units)


def layer_statistics(network, layers, images, preprocessing, bins=40):
    """{layer: numbers} over all outputs for uint8 `images`: "units", "mean", "std", "zeros" (their
    share), "dead" (units that are 0 for every image), and the histogram of what is not 0: "edges"
    (lowest, highest) and "counts"."""
    spans, found = {}, {}
    # A first pass for the lowest and highest values.
    for _, outputs in map_batches(network, layers, images, preprocessing):
        for layer, values in outputs.items():
            if not values.isfinite().all():
                raise ValueError(f"layer={layer}: its outputs are not finite numbers")
            spans[layer] = span_of(torch.tensor([*values.aminmax(), *spans.get(layer, ())]))
    # A second pass, because the bins have to be known before anything is counted.
    for _, outputs in map_batches(network, layers, images, preprocessing):
        for layer, values in outputs.items():
            # In float64: a large mean would leave the spread no digits.
            values = values.to(networks.exact_type(values.device))
            sums = [values.numel(), values.sum().item(), values.square().sum().item(),
                    (values == 0).sum().item(),
                    torch.histc(values[values != 0], bins, *spans[layer]),
                    values.abs().amax((2, 3)).sum(0)]
            found[layer] = [old + new for old, new in zip(found.get(layer, [0] * 6), sums)]
    statistics = {}
    for layer, (count, total, squares, zeros, counts, peaks) in found.items():
        mean = total / count  # the variance is the mean of the squares less the mean's square
        statistics[layer] = {
            "units": len(peaks), "mean": mean, "zeros": zeros / count,
            "std": max(0, squares / count - mean**2) ** 0.5,
            "dead": (peaks == 0).nonzero()[:, 0].tolist(),
            "edges": spans[layer], "counts": counts.cpu()}
    return statistics


def rectifiers_of(network, image_size):
    """The dotted paths of all activations that images go through, or of all layers with weights
    where there are none, and of the last layer."""
    modules = {name: module for name, module in network.named_modules()  # which hold no others
               if {child for child, _ in module.named_children()} <= {"parametrizations"}}
    outputs = networks.outputs_of(network, modules, image_size, count=2)
    leaves = {name: modules[name] for name, output in outputs.items()
              if "parametrizations" not in name.split(".")  # the weights themselves
              and torch.is_tensor(output) and len(output) == 2}  # images, not positions as in Swin
    kinds = (*networks.ACTIVATIONS.values(), nn.ReLU6, nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.PReLU,
             nn.RReLU, nn.SELU, nn.CELU, nn.Mish, nn.Softplus)
    found = [name for name, module in leaves.items() if isinstance(module, kinds)]
    weighted = [name for name, module in leaves.items() if [*module.parameters()]]
    if not weighted:
        raise ValueError("the network has no layer with weights; name `layers`")
    return [*dict.fromkeys([*(found or weighted), weighted[-1]])]


GRADIENTS = {"gradient": ("gradient", networks.class_gradient),
             "smoothgrad": ("SmoothGrad", networks.smooth_gradient),
             "integrated": ("integrated gradients", networks.integrated_gradients)}


def relevance(network, images, label, method, layer=None):
    """(N×S×S values from 0 on: what of normalised images bears on a class, by `method`; what to
    call it). Of gradients the absolute values count, added over the colours: for it or against it.
    """
    if method in GRADIENTS:
        name, explain = GRADIENTS[method]
        return explain(network, images, label).abs().sum(1), name
    maps, layer = networks.grad_cam(network, images, label, layer)
    # A deep layer's map has few rows and columns: they are spread over the image's pixels.
    return (F.interpolate(maps[:, None].float(), images.shape[2:], mode="bilinear")[:, 0],
            f"Grad-CAM at {layer} ({'×'.join(map(str, maps.shape[1:]))})")


# ---------------------------------------------------------------------------- computing: results


def confusion_matrix(labels, predictions, classes):
    """How many images of class i were taken for class j, at row i and column j."""
    # Each pair (i, j) is one number, i·classes + j, and the matrix a histogram of these.
    pairs = labels.long() * classes + predictions
    return torch.bincount(pairs, minlength=classes**2).view(classes, -1)


def log_odds(logits):
    """log(p / (1 − p)) of the probabilities p that N×classes `logits` stand for: in the same order,
    but of p that are so near to 1 that they would be the same number, too."""
    logs = logits.double().log_softmax(1)
    # 1 − p of the likeliest class is what all others add up to, which does not cancel.
    likeliest = logs.argmax(1, keepdim=True)
    others = logs.scatter(1, likeliest, -torch.inf).logsumexp(1, keepdim=True)
    return logs - torch.log1p(-logs.exp()).scatter(1, likeliest, others)


def precision_recall(scores, positive):
    """(precision, recall, average precision) for every threshold, from the highest score down.

    `scores` N, `positive` N bool. Average precision is the sum of precision × rise in recall;
    where none is positive, there is no recall, and both are NaN.
    """
    scores, order = scores.sort(descending=True)
    hits = positive[order].double().cumsum(0)
    # Images with the same score are accepted together: only the last of them is a threshold.
    last = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])
    # Of the k images with the highest scores, hits[k − 1] are positive: precision hits / k.
    precision = (hits / torch.arange(1, len(order) + 1))[last]
    recall = (hits / hits[-1])[last]
    # Σ P·ΔR, the area below steps; that of trapezoids is too high (Davis & Goadrich 2006).
    return precision, recall, (precision * recall.diff(prepend=torch.zeros(1))).sum().item()


def group_runs(runs):
    """{label: [metrics of each run]}: runs whose settings differ only in seed and name are one."""
    groups, known, labelled = {}, {}, {}
    # The full path, because "." has no name of its own.
    for run in map(Path, map(os.path.abspath, map(os.path.expanduser, runs))):
        settings = {"run": str(run)}
        with contextlib.suppress(OSError, ValueError):
            settings = read_json(run / "config.json", dict)
        same = {name: value for name, value in settings.items()
                if name not in ("seed", "name", "out", "device", "root")}
        # Images are told by their files, as far as it is known, and not by where they are.
        told = {"fingerprint": same.get("data") if same.get("data") in BUILT_IN else None}
        with contextlib.suppress(OSError, ValueError):  # earlier versions say it there alone
            told |= read_json(run / "result.json", dict)
        for name in ("fingerprint", "processes", "history"):
            same.setdefault(name, told.get(name))
        same |= {"processes": same["processes"] or 1, "history": same["history"] or ""}
        if isinstance(same.get("data"), str):
            same["data"] = None if same["fingerprint"] else place_of(same["data"])
        # One seed twice, as of another's run or of a copy, is no further seed.
        key = repr(sorted(same.items(), key=repr))
        seeds = (key, repr(settings.get("seed")))
        known[seeds] = known.get(seeds, 0) + 1
        members, _ = groups.setdefault((key, known[seeds]), ([], same))
        members.append(run)
    for members, settings in groups.values():
        more = len(members) - 1
        label = members[0].name + (f" and {more} more seed{'s' * (more > 1)}" if more else "")
        metrics = [train.read_metrics(run) for run in members]
        # Earlier versions logged what a step lowers as the loss, and no objective.
        if settings.get("label_smoothing") and any(
                math.isnan(value) for each in metrics for value in each["train/objective"]):
            label += " (training loss with label smoothing)"
        if settings.get("ema"):
            label += " (validation of the mean weights)"
        if any(name in str(settings.get("augment")) for name in MIXTURES):
            label += " (training on mixed images)"
        while label in labelled:  # runs of the same name in different folders
            label += "′"
        labelled[label] = metrics
    return labelled


# ---------------------------------------------------------------------------- computing: the loss


def filter_normalized_direction(network, random):
    """A random direction in weight space, {parameter name: tensor}, each filter of which has the
    norm of the network's own filter (Li et al. 2018, section 4)."""
    direction = {}
    for name, weight in filters_of(network).items():
        # One row a filter. Without this, a network whose weights are merely larger, which batch
        # norm makes possible without any other effect, would look flatter.
        # d ← d / ‖d‖ · ‖θ‖ for each filter, section 4 of the paper.
        noise = F.normalize(torch.randn(weight.shape, generator=random).flatten(1))
        norms = weight.flatten(1).norm(dim=1, keepdim=True)
        direction[name] = (noise.to(weight.device) * norms).view_as(weight)
    return direction


def filters_of(network):
    """The weights that move over a loss landscape: those of convolutions and, row by row, of linear
    layers, but no biases, nothing of batch norm and no lengths, as weight norm has them: one number
    a filter has no direction. ValueError where there are none, or some that cannot move."""
    found = {name: weight.detach() for name, weight in network.named_parameters()
             if weight.ndim > 1 and weight[0].numel() > 1}
    if networks.is_quantized(network) or not found:
        raise ValueError("the network has no weights that could move over a landscape: it is "
                         "quantised, or has no filters")
    return found


def principal_directions(network, path):
    """The two directions along which the weights of `path`, state dictionaries, vary most.

    Returns (two orthonormal directions, the share of the variance along each, the path's
    coordinates relative to the network, n×2), after Li et al. (2018), section 7.2.
    """
    if len(path) < 3:
        raise ValueError(f"directions=pca: needs at least 3 checkpoints, there are {len(path)} "
                         f"(train.py --snapshots=1,2,5,10 keeps those of its epochs)")
    own = filters_of(network)
    steps = torch.stack([torch.cat([(weights[name] - weight.cpu()).flatten().float()
                                    for name, weight in own.items()]) for weights in path])
    # The principal axes are combinations of the n centred steps, n×weights; their factors are
    # eigenvectors of the small n×n matrix of scalar products, so nothing of weights×weights is
    # ever made.
    centred = steps - steps.mean(0)
    variance, vectors = torch.linalg.eigh((centred @ centred.T).double())  # rising
    if variance[-2] <= 1e-9 * variance[-1]:
        raise ValueError("directions=pca: the weights of the checkpoints lie in one line")
    axes = F.normalize(vectors[:, [-1, -2]].T.float() @ centred)
    sizes = [weight.numel() for weight in own.values()]
    directions = [{name: part.view_as(weight).to(weight.device) for (name, weight), part
                   in zip(own.items(), axis.split(sizes))} for axis in axes]
    return directions, (variance[[-1, -2]] / variance.sum()).tolist(), steps @ axes.T


@contextlib.contextmanager
def moved(network, directions, amounts):
    """While open, the network's weights are moved along `directions` by `amounts`."""
    weights = filters_of(network)
    # Copies are put back, because subtracting what was added would leave rounding errors.
    before = {name: weight.clone() for name, weight in weights.items()}
    try:
        for direction, amount in zip(directions, amounts):
            for name, step in direction.items():
                weights[name].add_(step, alpha=amount)
        yield network
    finally:
        for name, weight in weights.items():
            weight.copy_(before[name])


def loss_on(network, parts, preprocessing, what=""):
    """{"train/loss": …, "train/accuracy": …, "test/loss": …} of `parts` ({"train": split, …}), in
    full precision; `what` is added to the names of the parts."""
    # With 8 bits, bf16 would draw steps into a surface that is smooth.
    preprocessing, values = dataclasses.replace(preprocessing, precision="fp32"), {}
    for name, split in parts.items():
        logits = train.predict(network, split.images, preprocessing)
        result = train.score(logits, split.labels, logits.shape[1])
        measured = math.isfinite(result["loss"])  # of what is no number none is right or wrong
        values |= {column: result[kind] if measured else math.nan
                   for column, kind in zip(names_on([name], what), UNITS)}
    return values


def names_on(parts, what=""):
    """The names of what `loss_on` measures."""
    return [f"{name}{what}/{kind}" for name in parts for kind in UNITS]


def loss_between(network, ends, share, parts):
    """`loss_on` all `parts` at `share` of the straight line between two networks (Goodfellow et al.
    2015). `ends` are their state dicts and preprocessings; `network` gets the weights.

    What batch norm knows of the layers before it is wrong on the way; so the loss is there also
    with its statistics measured anew on the training images.
    """
    (first, second), (here, there) = zip(*ends)
    # Counters of batches are whole numbers, and stay those of the first network.
    network.load_state_dict({
        name: value.lerp(second[name], share) if value.is_floating_point() else value
        for name, value in first.items()})
    preprocessing = dataclasses.replace(here, **{name: tuple(
        a + share * (b - a) for a, b in zip(getattr(here, name), getattr(there, name)))
        for name in ("mean", "std")})
    values = loss_on(network, parts, preprocessing)
    if measure_batch_norm(network, parts["train"].images, preprocessing):
        values |= loss_on(network, parts, preprocessing, ANEW)
    return values


@torch.no_grad()
def measure_batch_norm(network, images, preprocessing):
    """Make batch norm's statistics the means over batches of uint8 `images`; how many norms."""
    norms = networks.batch_norms(network)
    momenta = [norm.momentum for norm in norms]
    # Halfway between two networks, outputs have another mean and spread than either knows of. The
    # rest of the network is in evaluation mode: dropout would shift them as well.
    with networks.evaluation(network):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # the mean of all batches
            # Of equal size, as each counts as much: of 257 the last would weigh as much as 256.
            for chunk in images.tensor_split(-(-len(images) // 256)) if norms else ():
                networks.forward(network, preprocessing(chunk, networks.device_of(network)))
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
    return len(norms)


@torch.enable_grad()
def hessian_eigenvalues(losses, weights, count=2, steps=30):
    """The `count` eigenvalues of largest size of the Hessian, at the dictionary of tensors
    `weights`, of the sum of `losses`, functions of such a dictionary.

    By Lanczos iteration with Hessian-vector products (Pearlmutter 1994; Yao et al. 2020, section
    3): the gradient's product with a vector, differentiated again. Power iteration would find
    neither of two eigenvalues that differ in their sign alone; of equal ones this finds but one. It
    keeps up to `steps` vectors, each as large as all the weights; where no eigenvalue stands out,
    these may leave the second some per cent off. All steps are taken: an eigenvalue that has long
    seemed to be the second may still turn out to be the third.
    """
    point = {name: weight.detach().requires_grad_() for name, weight in weights.items()}

    def flat(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors])

    def product(vector):
        slopes = (flat(torch.autograd.grad(loss_of(point), [*point.values()], create_graph=True,
                                           materialize_grads=True)) for loss_of in losses)
        return sum(flat(torch.autograd.grad(slope @ vector, [*point.values()],
                                            materialize_grads=True)) for slope in slopes)

    start, basis = flat(point.values()).detach(), []
    ahead, matrix = torch.randn(start.shape, generator=generator("hessian")).to(start), torch.zeros(
        steps, steps, dtype=torch.float64)
    for step in progress(range(min(steps, len(start))), "eigenvalues of the Hessian"):
        basis.append(F.normalize(ahead, dim=0))
        ahead = product(basis[-1])
        # The Hessian as far as these vectors reach; only what is below its diagonal is read.
        matrix[step, :step + 1] = torch.stack([ahead @ other for other in basis]).cpu()
        for other in basis * 2:  # at right angles to all; once would leave rounding errors
            ahead = ahead - (ahead @ other) * other
        if ahead.norm() <= 1e-6 * matrix.abs().max():  # they reach everything
            break
    values = torch.linalg.eigvalsh(matrix[:len(basis), :len(basis)]).tolist()
    return sorted(values, key=abs)[:-count - 1:-1]


def plane_of(network, ckpt, directions, seed, span, points):
    """(two directions, the points along each, two names, the path of training or None).

    "random": filter-normalised, from −span to span. "pca": where the checkpoints of the run of
    `ckpt` lie best; it reaches a quarter beyond their path.
    """
    if directions == "random":
        axes = [filter_normalized_direction(network, generator(seed, "landscape", index))
                for index in (0, 1)]
        along = [spaced(-span, span, points)] * 2
        return axes, *along, ("first random direction", "second random direction"), None
    # Snapshots are in half precision: where a checkpoint has the same step, it comes after them
    # and takes their place.
    files = [file for pattern in ("snapshot-*.pth", "step-*.pth", "last.pth")
             for file in folder_of(ckpt).glob(pattern)]
    found = [networks.read(file) for file in progress(files, "reading checkpoints")]
    weights = {checkpoint["step"]: checkpoint["weights"] for checkpoint in found}
    axes, shares, trail = principal_directions(network, [weights[step] for step in sorted(weights)])
    along = [spaced(low - (high - low) / 4, high + (high - low) / 4, points)
             for low, high in map(span_of, trail.T)]
    labels = [f"principal direction {number} ({share:.1%} of the variance)"
              for number, share in enumerate(shares, 1)]
    return axes, *along, labels, trail.tolist()


def read_table(path, columns=None):
    """The rows of the CSV file `path`, dictionaries of floats (and the text "model"), or [].
    ValueError for one that is damaged, or has not these `columns`."""
    if not path.is_file():
        return []
    try:
        lines = csv.DictReader(io.StringIO(read_text(path, 1 << 28)))
        if columns and sorted(lines.fieldnames or ()) != sorted(columns):
            raise ValueError(f"its columns are not {','.join(columns)}")
        return [{name: value if name == "model" else float(value) for name, value in row.items()}
                for row in lines]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: damaged ({error}); without it all is computed anew") from error


def write_table(path, rows):
    """Write `rows`, dictionaries with the same names, to the CSV file `path`, all or nothing."""
    columns = [*rows[0]]
    write_atomically(path, Table(columns, [[row[name] for name in columns] for row in rows]).csv())


def evaluate_points(path, points, evaluate, description, names):
    """`evaluate(point)`, a dictionary of these `names`, at each (x, y) of `points`; {(x, y): row}.

    Rows are kept in the CSV file `path` as they come, and not computed when they are there.
    """
    def kept():  # found by their numbers: a file has all digits of a float
        return {(row["x"], row["y"]): row for row in read_table(path, ["x", "y", *names])}

    rows = kept()
    for point in progress([point for point in points if point not in rows], description):
        rows[point] = {**dict(zip("xy", point)), **evaluate(point)}
        rows = kept() | rows  # another process may have added some meanwhile
        write_table(path, [*rows.values()])
    return {point: rows[point] for point in points}


def grid_values(rows, xs, ys, column):
    """`column` of `evaluate_points`' rows on the grid, len(ys)×len(xs), NaN where it overflowed."""
    values = torch.tensor([[rows[x, y][column] for x in xs] for y in ys])
    return values.where(values.isfinite(), math.nan)


def fingerprint(*settings):
    """Eight letters and digits that stand for `settings`: tensors, the weights of networks, and
    what else there is by its text."""
    digest = hashlib.blake2b(digest_size=4)
    for part in settings:
        for value in part.state_dict().values() if isinstance(part, nn.Module) else (part,):
            if isinstance(value, torch.Tensor):
                # As bytes, because not every type of number has one in numpy.
                value = value.detach().cpu().to_dense().contiguous().flatten()
                value = value.view(torch.uint8).numpy()
            else:
                value = f"{value!r};".encode()
            digest.update(value)
    return digest.hexdigest()


def behaviour(network, about, parts):
    """What tells one network from elsewhere from another with the same weights: a few of its
    outputs, as text of so few digits that another number of threads makes no other."""
    if about.settings:  # one of this package, which its weights tell
        return []
    logits = train.predict(network, parts["test"].images[:8], about.preprocessing)
    return [f"{value:.2e}" for value in logits[:, 0].tolist()]


def batch_loss(network, images, labels):
    """The loss on one mini-batch as a function of the weights, in the network's present mode.

    Batch norm's running statistics are copied for each call, so that they stay as they are.
    """
    def loss_of(weights):
        copies = {name: buffer.clone() for name, buffer in network.named_buffers()}
        return F.cross_entropy(networks.logits_of(network, images, {**weights, **copies}), labels)
    return loss_of


# ---------------------------------------------------------------------------- drawing: predictions


def draw_predictions(images, labels, logits, classes, title, columns=2, bars=10):
    """Each picture beside the probabilities of its `bars` likeliest classes, with the logits.

    `labels` are the true classes' numbers or, where these are not known, the pictures' names.
    """
    labels = labels.tolist() if isinstance(labels, torch.Tensor) else shortened(labels)
    columns, classes = min(columns, len(images)), shortened(classes)
    rows, bars = math.ceil(len(images) / columns), min(bars, len(classes))
    figure = new_figure(4.2 * columns, rows * (0.6 + 0.17 * bars) + 0.1, title)
    grid = figure.add_gridspec(rows, 2 * columns, width_ratios=[1, 1.1] * columns)
    for index, (image, label, scores) in enumerate(zip(images, labels, logits)):
        row, column = divmod(index, columns)
        predicted = scores.argmax().item()
        picture = figure.add_subplot(grid[row, 2 * column])
        show(picture, image)
        if isinstance(label, str):
            text, label = f"{label}\n{classes[predicted]}", predicted
        else:
            verdict = "right" if predicted == label else f"taken for {classes[predicted]}"
            text = f"{classes[label]}\n{verdict}"
        picture.set_title(text, fontsize=9, loc="left",
                          color="black" if predicted == label else COLORS[1])
        draw_probabilities(figure.add_subplot(grid[row, 2 * column + 1]), scores, label, classes,
                           bars)
    return figure


def draw_probabilities(axes, scores, label, classes, bars):
    """A bar for each of the `bars` likeliest classes, in the classes' own order; the true one, if
    it is not among them, instead of the last."""
    likeliest = scores.topk(bars).indices.tolist()
    shown = sorted(likeliest if label in likeliest else [*likeliest[:-1], label])
    shares = scores.softmax(0)[shown].tolist()
    colors = {scores.argmax().item(): COLORS[1], label: COLORS[0]}  # blue where both are one
    drawn = axes.barh(range(bars), shares, height=0.75, color=[
        colors.get(index, "#BBBBBB") for index in shown])
    texts = axes.bar_label(drawn, [f"{share:.0%}  {scores[index]:+.1f}" for share, index
                                   in zip(shares, shown)], padding=2, fontsize=6.5)
    for text, share in zip(texts, shares):
        text.set_color("black" if share >= 0.005 else "#777777")  # grey where it says 0%
    axes.set_yticks(range(bars), [classes[index] for index in shown], fontsize=7.5)
    axes.set(xlim=(0, 1.45), xticks=(), ylim=(bars - 0.4, -0.6))
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def draw_confusion(matrix, classes, title):
    """The confusion matrix, as shares of each true class, beside every class's accuracy.

    A class without images is an empty row.
    """
    count, few = len(classes), len(classes) <= 25  # more than that leave no room for numbers
    size, totals = 8 if few else 4, matrix.sum(1, keepdim=True)
    classes = shortened(classes)
    # Shares, not counts: classes may differ in size.
    shares = torch.where(totals > 0, matrix / totals, math.nan)
    side = max(5.0, 0.52 * min(count, 25))
    step = math.ceil(count / 100)  # there is no room for more names
    figure = new_figure(side + 3.4, side + 0.2, title)
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=(side, 2))
    drawn = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    if not few:
        # A part of the matrix's own axes, which may be drawn alone.
        bar = figure.colorbar(drawn, cax=axes.inset_axes((0.25, 1.02, 0.5, 0.015)),
                              orientation="horizontal", ticklocation="top")
        percent(bar.ax.xaxis)
        bar.ax.tick_params(labelsize=8)
    axes.set_xticks(range(0, count, step), classes[::step], fontsize=size,
                    rotation=45 if few else 90, ha="right" if few else "center")
    axes.set_yticks(range(0, count, step), classes[::step], fontsize=size)
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_ylabel("true class (its images are 100 %)", fontsize=9)
    for row, column in itertools.product(range(count), repeat=2) if few else ():
        share = shares[row, column].item()
        if not math.isnan(share):
            axes.text(column, row, f"{share * 100:.0f}" if share >= 0.005 else "·", ha="center",
                      va="center", fontsize=8, color="black" if share > 0.5 else "white")
    own = shares.diagonal()  # of the images of a class, those that were taken for it: its accuracy
    drawn = bars.barh(range(count), own.nan_to_num(), color=COLORS[0])
    if step == 1:
        bars.bar_label(drawn, [NOTHING if math.isnan(share) else f"{share:.1%}"
                               for share in own.tolist()], padding=2, fontsize=size)
    bars.set(xlim=(0, 1.3), xticks=(0, 1), xticklabels=("0", "100 %"))
    bars.set_title("accuracy of a class", fontsize=9)
    bars.tick_params(labelleft=False, left=False, labelsize=8)
    bars.spines[["top", "right", "left"]].set_visible(False)
    return figure


def draw_pr_curves(curves, classes, title):
    """One plot a class: its (precision, recall, average precision) before those of all others."""
    columns = min(5, len(classes)) if len(classes) <= 25 else 10
    rows = math.ceil(len(classes) / columns)
    figure = new_figure(1.9 * columns + 0.4, 1.9 * rows + 0.2, title)
    names = shortened(classes, 14)
    for index, (name, (precision, recall, average)) in enumerate(zip(names, curves)):
        measured = NOTHING if math.isnan(average) else f"{average:.3f}"
        axes = plot(figure, (rows, columns, index + 1), f"{name} · {measured}")
        for others in curves if len(classes) <= 25 else ():
            axes.plot(others[1], others[0], color="#CCCCCC", linewidth=0.6)
        axes.plot(recall, precision, "o" if len(recall) == 1 else "-", color=COLORS[0],
                  linewidth=1.8, markersize=4, clip_on=False)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.04), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return figure


def draw_reliability(images, confidence, accuracy, title):
    """Accuracy against confidence, and how many images have it; arguments as
    `train.calibration` returns them (Guo et al. 2017, figure 1, upside down)."""
    figure, bins = new_figure(5.2, 5.6, title), len(images)
    edges, width = [number / bins for number in range(bins)], 1 / bins
    upper = plot(figure, (4, 1, (1, 3)), "", ylabel="accuracy")
    lower = plot(figure, (4, 1, 4), "", "confidence: probability of the predicted class",
                 "of the images")
    add_legend(figure, {
        "accuracy": upper.bar(edges, accuracy.nan_to_num(), width, align="edge", color=COLORS[0],
                              edgecolor="white"),
        "gap to the mean confidence": upper.bar(
            edges, (confidence - accuracy).nan_to_num(), width, accuracy.nan_to_num(),
            align="edge", color="none", edgecolor=COLORS[1], hatch="////", linewidth=0.8),
        "perfect calibration": upper.plot((0, 1), (0, 1), "--", color="black", linewidth=1)[0]})
    lower.bar(edges, images / images.sum(), width, align="edge", color="#999999", edgecolor="white")
    upper.set(xlim=(0, 1), ylim=(0, 1), xticklabels=())
    lower.set(xlim=(0, 1))
    for axis in (upper.yaxis, lower.yaxis, lower.xaxis):
        percent(axis)
    return figure


def draw_relevance(picture, panels, title):
    """A picture 3×S×S beside {name: S×S relevance}, each laid over it in grey, on its own scale."""
    figure = new_figure(2.6 * (len(panels) + 1) + 0.5, 2.75, title)
    axes = figure.subplots(1, len(panels) + 1)
    show(axes[0], picture, "image")
    for axis, (name, values) in zip(axes[1:], panels.items()):
        show(axis, picture.mean(0), cmap="gray", vmin=0, vmax=1)
        # One pixel in a hundred may be beyond the scale, so that few do not hide all others.
        values = values / values.flatten().quantile(0.99).clamp(min=1e-30)
        drawn = show(axis, values, name, cmap="inferno", vmin=0, vmax=1, alpha=0.7)
    bar = figure.colorbar(drawn, ax=axes, aspect=25, pad=0.02)
    bar.set_ticks([0, 1], labels=["nothing", "most"], fontsize=8)
    return figure


def draw_activations(statistics, title):
    """Small multiples of `layer_statistics`: a layer's histogram, without what is 0."""
    columns = min(4, len(statistics))
    rows = math.ceil(len(statistics) / columns)
    figure = new_figure(max(2.8 * columns, 5), 2.2 * rows, title)
    names = shortened([*statistics], 36)
    for index, (name, numbers) in enumerate(zip(names, statistics.values()), 1):
        axes = plot(figure, (rows, columns, index), f"{name}\n"
                    f"mean {numbers['mean']:.2g}, std {numbers['std']:.2g}\n"
                    f"{numbers['zeros']:.0%} zeros, {len(numbers['dead'])} of {numbers['units']} "
                    f"units dead")
        axes.title.set_fontsize(8)
        counts = numbers["counts"]
        axes.stairs(counts / counts.sum().clamp(min=1), spaced(*numbers["edges"], len(counts) + 1),
                    fill=True, color=COLORS[0])
        axes.set_ylim(bottom=0)
        percent(axes.yaxis)
    figure.supxlabel("output", fontsize=9)
    figure.supylabel("share, without 0", fontsize=9)
    return figure


def draw_activation_history(history, title, unit="epoch"):
    """What became of layers: a plot each of mean, spread, share of zeros and of dead units, a line
    a layer, the first ones dark. `history` is {epoch or other `unit`: `layer_statistics`}."""
    from matplotlib import colormaps

    layers = [*next(iter(history.values()))]
    colors = colormaps["viridis"](torch.linspace(0, 0.9, len(layers)).numpy())  # no pale yellow
    figure, entries = new_figure(9, 5.6 + 0.05 * len(layers), title), {}
    for position, (kind, name) in enumerate((
            ("mean", "mean"), ("std", "standard deviation"), ("zeros", "share of zeros"),
            ("dead", "share of dead units, 0 for every image")), 1):
        axes = plot(figure, (2, 2, position), name, unit)
        lines = {layer: [len(numbers[layer]["dead"]) / numbers[layer]["units"] if kind == "dead"
                         else numbers[layer][kind] for numbers in history.values()]
                 for layer in layers}
        for index, (layer, values) in enumerate(lines.items()):
            [entries[layer]] = axes.plot([*history], values, color=colors[index], markersize=4,
                                         marker=MARKERS[index % len(MARKERS)], linewidth=1.4)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        if kind == "std":
            log_scale(axes)
        elif kind != "mean":
            high = max(0.05, *map(max, lines.values()))
            axes.set_ylim(-0.03 * high, 1.05 * high)
            percent(axes.yaxis)
    add_legend(figure, entries)
    return figure


# ---------------------------------------------------------------------------- drawing: training


def draw_curves(groups, x="epoch"):
    """Loss and accuracy of groups of runs (see `group_runs`) against column `x` of their metrics.

    Training is dashed, validation solid; several seeds are their mean in a band from the lowest
    to the highest, as far as all of them go.
    """
    lines = []
    for index, (label, members) in enumerate(groups.items()):
        # A seed may still be running, or have been stopped earlier (`patience`): NaN from there on.
        columns = {name: pad_sequence([torch.tensor(metrics[name]) for metrics in members],
                                      batch_first=True, padding_value=math.nan)
                   for name in members[0]}
        at = columns[x].nanmean(0)
        if x == "seconds":  # of one epoch: their sum is the time since the run began
            at = at.cumsum(0)
        for part, style, inside in (("train", "--", "white"), ("val", "-", None)):
            lines.append(({kind: columns[f"{part}/{kind}"] for kind in UNITS}, at,
                          f"{label}, {PART_NAMES[part]}", {
                "linestyle": style, **look(index), "markersize": 4.5, "markerfacecolor": inside,
                "markevery": max(1, len(at) // 8)}))
    xlabel = "time / s" if x == "seconds" else x
    figure = draw_measures(lines, "loss and accuracy on training and validation images", xlabel)
    losses = torch.cat([values["loss"].flatten() for values, *_ in lines])
    losses = losses[(losses > 0) & losses.isfinite()]  # 0 has no logarithm
    if len(losses) and losses.max() > 30 * losses.median():
        log_scale(figure.axes[0])  # a run that diverges would press all others flat
    for axes in figure.axes if x != "seconds" else ():
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return figure


def look(index):
    """Colour and marker of line number `index`: no two of the first 49 have the same."""
    again = index // len(COLORS)
    return {"color": COLORS[index % len(COLORS)],
            "marker": MARKERS[(index + again) % len(MARKERS)]}


def draw_measures(lines, title, xlabel):
    """Loss beside accuracy, with one legend for both.

    `lines` are ({"loss": M×n, "accuracy": M×n}, n positions, label, style): the mean of M rows, in
    a band from the lowest to the highest. What was never measured is left out.
    """
    figure, entries = new_figure(10, 3.9, title), {}
    for position, (kind, unit) in enumerate(UNITS.items(), 1):
        axes = plot(figure, (1, 2, position), kind, xlabel, unit)
        for values, at, label, style in lines:
            values = values[kind]
            if not values.isfinite().any():
                continue
            # NaN, a gap, where one of them has no value: a mean of others would jump there.
            [entries[label]] = axes.plot(at, values.mean(0), linewidth=1.6, **style)
            if len(values) > 1:
                axes.fill_between(at, values.amin(0), values.amax(0), color=style["color"],
                                  alpha=0.2, linewidth=0)
    percent(axes.yaxis)
    add_legend(figure, entries)
    return figure


def draw_landscape_line(rows, title, xlabel="distance along the direction, in filter norms"):
    """Loss and accuracy along one direction, from `evaluate_points`' rows.

    Columns "train/…" and "test/…" are drawn, and "train, WORDS/…" with these words in the legend.
    """
    rows = sorted(rows, key=lambda row: row["x"])
    parts = [column.rpartition("/")[0] for column in rows[0] if column.endswith("/loss")]
    lines = []
    for index, part in enumerate(parts):
        values = {kind: torch.tensor([[row[f"{part}/{kind}"] for row in rows]]) for kind in UNITS}
        values["loss"].clamp_(min=1e-4)  # 0 has no logarithm; as in the contours
        name, comma, words = part.partition(", ")
        lines.append((values, [row["x"] for row in rows], PART_NAMES[name] + comma + words, {
            "linestyle": "--" if name == "train" else "-", "color": COLORS[index % len(COLORS)]}))
    figure = draw_measures(lines, title, xlabel)
    log_scale(figure.axes[0])
    return figure


def draw_landscape_contours(xs, ys, parts, title, labels, path=None):
    """Loss over two directions, one plot for each of `parts` ({"train": len(ys)×len(xs), …}).

    Both share one logarithmic scale. `path` is a list of points (x, y), drawn as a line.
    """
    from matplotlib.patheffects import withStroke

    figure = new_figure(5.2 * len(parts) + 0.8, 4.8, title)
    # A loss of 0, as of a network that knows its images by heart, has no logarithm.
    low, high = span_of(torch.stack([*parts.values()]).clamp(min=1e-4))
    levels = torch.logspace(math.log10(low), math.log10(high), 17, dtype=torch.float64).tolist()
    levels[0], levels[-1] = low * (1 - 1e-9), high * (1 + 1e-9)  # rounding leaves no hole
    for position, (name, values) in enumerate(parts.items(), 1):
        axes = plot(figure, (1, len(parts), position), f"{PART_NAMES[name]} loss", *labels)
        shown = values.clamp(low, high)
        filled = axes.contourf(xs, ys, shown, levels, cmap="viridis", norm="log",
                               vmin=low, vmax=high)
        lines = axes.contour(xs, ys, shown, levels[1:-1], colors="white", linewidths=0.5)
        texts = dict(zip(levels, distinct(levels)))
        for text in axes.clabel(lines, lines.levels[::2], fmt=texts, fontsize=7):
            across, up = axes.transAxes.inverted().transform(
                axes.transData.transform(text.get_position()))
            if not (0.07 < across < 0.93 and 0.04 < up < 0.96):  # the border would cut it
                text.remove()
        if path is None:
            axes.plot(0, 0, "+", color="white", markersize=11, markeredgewidth=2)
            axes.set_aspect("equal")
            continue
        axes.plot(*zip(*path), "-o", color=COLORS[1], markersize=4, markeredgecolor="white",
                  markeredgewidth=0.6)
        for text, point in (("start", path[0]), ("end", path[-1])):
            axes.annotate(text, point, (6, 6), textcoords="offset points", fontsize=9,
                          color="white", fontweight="bold",
                          path_effects=[withStroke(linewidth=2, foreground="black")])
    bar, ticks = figure.colorbar(filled, ax=figure.axes, shrink=0.8), log_ticks(low, high)
    bar.set_ticks([*ticks], labels=[*ticks.values()], fontsize=8)
    bar.set_label("cross-entropy (logarithmic)", fontsize=9)
    bar.ax.minorticks_off()
    return figure


def draw_landscape_surface(xs, ys, parts, title, labels):
    """The same loss as a surface over two directions; height is the loss's logarithm."""
    figure = new_figure(5.4 * len(parts), 4.7, title)
    # matplotlib's 3d axes have no logarithmic scale: heights are logarithms, ticks their powers.
    logs = {name: values.clamp(min=1e-4).log10() for name, values in parts.items()}
    low, high = span_of(torch.stack([*logs.values()]))
    ticks = log_ticks(10**low, 10**high, most=6)
    x, y = torch.meshgrid(torch.tensor(xs), torch.tensor(ys), indexing="xy")
    for position, (name, values) in enumerate(logs.items(), 1):
        axes = figure.add_subplot(1, len(parts), position, projection="3d")
        axes.plot_surface(x.numpy(), y.numpy(), values.numpy(), cmap="viridis", vmin=low, vmax=high,
                          rcount=len(ys), ccount=len(xs), edgecolor="black", linewidth=0.15)
        axes.set(zlim=(low, high))
        axes.set_title(f"{PART_NAMES[name]} loss (logarithmic height)", fontsize=10)
        axes.set_xlabel(labels[0], fontsize=8, labelpad=7)
        axes.set_ylabel(labels[1], fontsize=8, labelpad=7)
        axes.set_zticks([*map(math.log10, ticks)], [*ticks.values()])
        axes.tick_params(labelsize=7)
        for axis in ("x", "y"):
            axes.locator_params(axis, nbins=5)
        axes.view_init(35, -60)
        axes.set_box_aspect(None, zoom=0.8)  # leaves room for the labels
    return figure


# ---------------------------------------------------------------------------- commands


class Flags(train.Elsewhere, total=False):
    """The flags of every command that opens a network; `MEANINGS` says what they mean."""

    data: str | None
    root: str | None
    device: typing.Annotated[str, "auto"]
    network: str | None
    out: str | None
    format: Format | None


# "class" is no name that a parameter could have.
WhereFlags = typing.TypedDict("WhereFlags", {**Flags.__annotations__, "class": str},
                              total=False)


def open_network(ckpt=None, network=None, device="auto", data=None, root=None, out=None,
                 format=None, **elsewhere):
    """The network that `ckpt` or `network` names, in evaluation mode, and its `Description`.
    It takes all `Flags`, and so refuses any other; what is not used here is for those below."""
    file_of(out)  # may refuse, which is better said now than when all is computed
    if (ckpt is None) == (network is None):
        raise ValueError("give either a checkpoint (a file, or a run's folder) or a network from "
                         "elsewhere (`network=torchvision:NAME` or package.module:function)")
    return train.open_network(ckpt or network, device, **elsewhere)


def open_test(ckpt, **flags):
    """The network that a command's flags name, its `Description`, and test images."""
    network, about = open_network(ckpt, **flags)
    data = flags.get("data")
    return network, naming(about, data), train.open_test(about, data, flags.get("root"))


def naming(about, data):
    """The `Description` of a network that is looked at with other images, those of `data`."""
    own = about.settings.get("data")
    others = data and (own is None or place_of(data) != place_of(own))
    return dataclasses.replace(about, images=name_of(data)) if others else about


def open_picture(ckpt, image=None, index=0, **flags):
    """The network that a command's flags name, its `Description`, a picture 1×3×S×S uint8, its
    class's number (None where that is not known) and what to call it: the file `image`, or number
    `index` of the test images."""
    if image is not None:
        refuse("has no effect beside `image`", index=index, data=flags.get("data"))
        network, about = open_network(ckpt, **flags)
        picture = read_image(image, about.preprocessing.image_size)[None]
        if flags.get("out") and os.path.realpath(image) == os.path.realpath(flags["out"]):
            raise ValueError(f"out={flags['out']}: is the picture that is looked at")
        return network, about, picture, None, Path(image).name
    network, about, test = open_test(ckpt, **flags)
    if not 0 <= index < len(test.labels):
        raise ValueError(f"index={index}: must be from 0 to {len(test.labels) - 1}")
    label = test.labels[index].item()
    name = f"test image {index}, class {about.classes[label] if about.classes else label}"
    return network, about, test.images[index:index + 1], label if about.classes else None, name


def predicted(network, about, test):
    """Logits N×classes of the `test` images, with a progress bar, and the classes' names."""
    logits = train.finite_logits(network, test.images, about.preprocessing, "none",
                                 f"predicting {len(test.images)} images")
    train.check_labels(test.labels, logits)
    return logits, about.class_names(logits.shape[1])


def listed(value):
    """A flag with several values as a tuple; from Python, a text or a number is a list of one."""
    single = isinstance(value, str) or not hasattr(value, "__iter__")
    return (value,) if single else tuple(value)


def need(out=None, **least):
    """ValueError naming the first of the flags `least` that is not above 0; or `out`, if given, as
    a file: a command that writes several files needs a folder."""
    for name, value in least.items():
        if value <= 0:
            raise ValueError(f"{name}={value}: must be above 0")
    if file_of(out):
        raise ValueError(f"out={out}: this command writes several files; name a folder")


def refuse(why, **flags):
    """ValueError naming those of `flags` that are not None, 0 or False: they would have no effect,
    and `why` says what they are for."""
    if given := [f"{name}={value}" for name, value in flags.items() if value]:
        raise ValueError(f"{', '.join(given)}: {why}")


def samples(data: str = "cifar10", root: str = "data", count: int = 10, seed: int = 0,
            image_size: int | None = None, skip_bad: bool = False, out: str | None = None,
            format: Format = "png"):
    """Draw COUNT random training images of each class, a row a class, and the data set's figures.
    """
    need(count=count)
    file_of(out)
    dataset = load(data, root, image_size, val=0, skip_bad=skip_bad)
    images, labels = dataset.train
    # One shuffle of all; each class takes its first COUNT in that order.
    order = torch.randperm(len(labels), generator=generator(seed, "samples"))
    rows = [order[labels[order] == label][:count] for label in range(len(dataset.classes))]
    blank = images.new_full(images.shape[1:], 255)  # where a class has fewer
    shown = [resize(picture[None] / 255, image_size)[0] for row in rows
             for picture in [*images[row], *[blank] * count][:count]]
    statistics = {**dict(zip(("pixel mean", "pixel std"), pixel_statistics(images))),
                  "mean of the per-image stds": mean_of_image_stds(images)}
    name = name_of(data)
    title = "\n".join([
        f"{name}: {len(labels)} training and {len(dataset.test.labels)} test images of "
        f"{len(dataset.classes)} classes", *(
            f"{what} {' '.join(f'{value:.4f}' for value in values)}"
            for what, values in statistics.items())])
    figure = image_grid(shown, columns=count, suptitle=title, row_titles=shortened(dataset.classes),
                        cell=0.62 if len(rows) <= 25 else 0.32)
    return save_figure(figure, None, f"samples-{name}", out, format)


def curves(*runs: str, x: typing.Literal["epoch", "step", "seconds"] = "epoch",
           out: str | None = None, format: Format = "png"):
    """Draw the loss and accuracy of RUN [RUN…], training beside validation, in one figure.

    Runs that differ only in their seed become one line, the mean, in a band from lowest to
    highest. `--x=seconds` compares by time instead of epochs.
    """
    if not runs:
        raise ValueError("curves: name one run folder or more")
    check_words(curves, x=x, format=format)
    file_of(out)
    return save_figure(draw_curves(group_runs(runs), x), runs[0], "curves", out, format)


def predictions(ckpt: str | None = None, only: typing.Literal["all", "wrong", "right"] = "all",
                count: int = 8, order: typing.Literal["random", "loss", "confidence"] = "random",
                seed: int = 0, *, image: str | None = None, **flags: typing.Unpack[Flags]):
    """Draw COUNT test images with true and predicted class, probabilities and logits; or the
    pictures in `--image`, a file or a folder, whose classes are not known.

    The hardest come first with `--order=loss`, the surest with `confidence`: with `--only=wrong`
    some of these are labelled wrongly (in CIFAR-10 about 0.5 %, Northcutt et al. 2021,
    table 1).
    """
    need(count=count)
    check_words(predictions, only=only, order=order)
    if image is not None:
        if (only, order) != ("all", "random"):
            raise ValueError(f"only={only}, order={order}: are for test images, whose classes are "
                             f"known; leave them out beside `image`")
        refuse("has no effect beside `image`", seed=seed, data=flags.get("data"))
        return predictions_of(image, count, ckpt, **flags)
    network, about, test = open_test(ckpt, **flags)
    chosen = torch.randperm(len(test.labels), generator=generator(seed, "predictions"))
    if only == "all" and order == "random":  # else all have to be looked at
        chosen = chosen[:count]
    test = test._replace(images=test.images[chosen], labels=test.labels[chosen])
    logits, classes = predicted(network, about, test)
    losses = F.cross_entropy(logits, test.labels, reduction="none")
    # By falling numbers; where all are 0 the random order stays, because the sort is stable.
    first = {"random": torch.zeros_like(losses), "loss": losses,
             "confidence": log_odds(logits).amax(1)}[order].argsort(descending=True, stable=True)
    right = (logits.argmax(1) == test.labels)[first]
    kept = first[{"all": right | ~right, "wrong": ~right, "right": right}[only]][:count]
    if not len(kept):
        raise ValueError(f"only={only}: there is no such test image")
    figure = draw_predictions(
        about.preprocessing.pictures(test.images[kept]), test.labels[kept], logits[kept], classes,
        f"{about.title}: probabilities and logits"
        f"{'' if order == 'random' else f', by falling {order}'}\n"
        f"blue: the true class, orange: what it was taken for")
    name = f"predictions-{only}" + ("" if order == "random" else f"-{order}")
    return save_figure(figure, ckpt, name, **flags)


def predictions_of(path, count, ckpt, **flags):
    """`predictions` of the first `count` pictures that `path` means."""
    network, about = open_network(ckpt, **flags)
    pictures, errors = train.read_pictures([path], about.preprocessing.image_size, count)
    if not pictures:
        raise OSError("; ".join(errors))
    images = torch.stack([*pictures.values()])
    logits = train.finite_logits(network, images, about.preprocessing)
    figure = draw_predictions(
        about.preprocessing.pictures(images), [Path(name).name for name in pictures], logits,
        about.class_names(logits.shape[1]), f"{about.title}: probabilities and logits")
    made = save_figure(figure, ckpt, "predictions-image", **flags)
    return Made([made, OSError("; ".join(errors))]) if errors else made


def reliability(ckpt: str | None = None, **flags: typing.Unpack[Flags]):
    """Draw how often the network is right when it is so sure, over the test images, and the
    expected calibration error (Guo et al. 2017, section 2, 15 bins)."""
    network, about, test = open_test(ckpt, **flags)
    logits, _ = predicted(network, about, test)
    *bins, error = train.calibration(logits, test.labels)
    title = (f"{about.title}, {len(logits)} test images\n"
             f"expected calibration error {error:.2%}")
    return save_figure(draw_reliability(*bins, title), ckpt, "reliability", **flags)


def where(ckpt: str | None = None,
          method: typing.Literal["gradcam", *GRADIENTS, "all"] = "gradcam",
          layer: str | None = None, *, image: str | None = None, index: int = 0,
          **flags: typing.Unpack[WhereFlags]):
    """Draw what in a picture bears on the predicted class, or on `--class=cat`.

    Grad-CAM at LAYER (Selvaraju et al. 2017, section 3) shows what speaks for it; the logit's
    gradient (Simonyan et al. 2014, section 3), SmoothGrad (Smilkov et al. 2017, section 2) and
    integrated gradients (Sundararajan et al. 2017, section 3) what speaks for or against it.
    """
    check_words(where, method=method)
    if layer and method in GRADIENTS:
        raise ValueError(f"layer={layer}: is for Grad-CAM, not for method={method}")
    name = flags.pop("class", None)
    name = name if name is None else str(name)  # 3 from Python is class "3"
    network, about, picture, _, source = open_picture(ckpt, image, index, **flags)
    shares = train.finite_logits(network, picture, about.preprocessing)[0].softmax(0)
    classes = about.class_names(len(shares))
    if name not in (None, "none", *classes):
        raise ValueError(f"class={name}: must be of {', '.join(classes[:100])}"
                         f"{closest(name, classes)}")
    label = classes.index(name) if name in classes else shares.argmax().item()
    pixels = about.preprocessing(picture, networks.device_of(network))
    panels = {}
    for each in ("gradcam", *GRADIENTS) if method == "all" else (method,):
        values, text = relevance(network, pixels, label, each, layer)
        panels[text] = values[0].cpu()
    says = "speaks for" if method == "gradcam" else "bears on"  # with either sign
    title = (f"{about.title}: {source}\nwhat {says} class {classes[label]}, "
             f"whose probability is {shares[label]:.1%}")
    figure = draw_relevance(about.preprocessing.pictures(picture)[0], panels, title)
    return save_figure(figure, ckpt, f"where-{method}", **flags)


def activations(ckpt: str | None = None, layers: tuple[str, ...] = (), images: int = 500,
                **flags: typing.Unpack[Flags]):
    """Draw and tell each layer's mean, spread, share of zeros and dead units over IMAGES test
    images; of a run's folder also how they changed, at its snapshots (`train.py --snapshots=1,2,5`)
    or the checkpoints it kept, and at its end. Without `--layers`: all activations, and the last
    layer."""
    network, about, test = open_test(ckpt, **flags)
    files = snapshots(ckpt) if ckpt and Path(os.path.expanduser(ckpt)).is_dir() else []
    need(flags.get("out") if files else None, images=images)
    test = subset(test, images, seed=0)
    layers = listed(layers) or rectifiers_of(network, about.preprocessing.image_size)
    title = f"{about.title}: outputs of its layers for {len(test.labels)} test images"
    statistics = layer_statistics(network, layers, test.images, about.preprocessing)
    figures = [save_figure(draw_activations(statistics, title), ckpt, "activations", **flags)]
    history = []
    for file in files:
        network, before = open_network(str(file), **flags)
        history.append((before, layer_statistics(network, layers, test.images,
                                                 before.preprocessing)))
    unit = "step" if any(before.within_epoch for before, _ in history) else "epoch"
    history = {getattr(before, unit): found for before, found in history}
    if len(history) > 1:
        title_by = (f"{about.model}{about.on}: outputs of its layers for {len(test.labels)} test "
                    f"images, by {unit}")
        figures.append(save_figure(draw_activation_history(history, title_by, unit), ckpt,
                                   "activations-history", **flags))
    return Made([*figures, Table(("layer", "units", "mean", "std", "zeros", "dead units"), [
        (layer, str(numbers["units"]), f"{numbers['mean']:.3g}", f"{numbers['std']:.3g}",
         f"{numbers['zeros']:.1%}", ", ".join(map(str, numbers["dead"][:20])) + (
             f" and {len(numbers['dead']) - 20} more" if len(numbers["dead"]) > 20 else "")
         or "none")
        for layer, numbers in statistics.items()], title)])


def confusion(ckpt: str | None = None, **flags: typing.Unpack[Flags]):
    """Draw the confusion matrix over the test images, and the accuracy of each class."""
    network, about, test = open_test(ckpt, **flags)
    logits, classes = predicted(network, about, test)
    matrix = confusion_matrix(test.labels, logits.argmax(1), len(classes))
    title = (f"{about.title}: {matrix.trace() / matrix.sum():.2%} of {len(logits)} test images "
             f"right; per cent of each true class")
    return save_figure(draw_confusion(matrix, classes, title), ckpt, "confusion", **flags)


def pr_curves(ckpt: str | None = None, **flags: typing.Unpack[Flags]):
    """Draw every class's precision against recall over the test images; of more than a hundred
    those of lowest average precision."""
    network, about, test = open_test(ckpt, **flags)
    logits, classes = predicted(network, about, test)
    lines = [precision_recall(scores, test.labels == label)
             for label, scores in enumerate(log_odds(logits).T)]
    mean = torch.tensor([average for _, _, average in lines]).nanmean()  # of classes with images
    title = f"{about.title}: average precision of each class (mean {mean:.3f})"
    title += ", other classes in grey" * (len(classes) <= 25)
    shown = range(len(classes))
    if len(classes) > 100:  # for more there is no room
        shown = sorted((label for label in shown if (test.labels == label).any()),
                       key=lambda label: lines[label][2])[:100]
        title += f"; the {len(shown)} lowest"
    figure = draw_pr_curves([lines[label] for label in shown],
                            [classes[label] for label in shown], title)
    return save_figure(figure, ckpt, "pr_curves", **flags)


def filters(ckpt: str | None = None, layer: str = "conv1", channel: str | None = None,
            **flags: typing.Unpack[Flags]):
    """Draw the filters of LAYER's first convolution, in colour (`--channel=rgb`) where it sees the
    image's three channels, else what they do to one of its input channels, the first."""
    refuse("has no effect on filters", data=flags.get("data"))
    network, about = open_network(ckpt, **flags)
    convolution, first = (next((module for module in part.modules()
                                if isinstance(module, nn.Conv2d)), None)
                          for part in (networks.find_layer(network, layer), network))
    if convolution is None:
        raise ValueError(f"layer={layer}: has no convolution")
    weights = networks.weights_used(network, convolution, about.preprocessing.image_size).cpu()
    channels, groups = weights.shape[1], convolution.groups
    in_colour = channels == 3 and convolution is first  # others see three maps at most
    channel = str(("rgb" if in_colour else 0) if channel is None else channel)
    title = f"{about.title}: {layer}, {len(weights)} filters"
    if channel == "rgb" and channels == 3:
        # Weights have signs and colours have none: 0 is grey, ± the largest are black and white.
        images = 0.5 + weights / (2 * weights.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12))
        title += "\nin RGB, each on its own scale, grey is 0"
    elif channel in map(str, range(channels)):
        images = weights[:, int(channel)]
        title += (f"\nof input channel {channel} (from 0 to {channels - 1}"
                  f"{', of its group' * (groups > 1)}), all on one scale")
    else:
        raise ValueError(f"channel={channel}: must be from 0 to {channels - 1}, or rgb for a layer "
                         f"that sees the image's three channels")
    figure = image_grid(images, [*map(str, range(len(images)))], suptitle=title, scale="shared")
    return save_figure(figure, ckpt, f"filters-{layer}-{channel}", **flags)


def features(ckpt: str | None = None, layers: tuple[str, ...] = ("conv1",),
             *, image: str | None = None, index: int = 0, maps: int = 64,
             **flags: typing.Unpack[Flags]):
    """Draw the first MAPS feature maps of each of LAYERS for one picture, one figure a layer."""
    layers = listed(layers)
    need(flags.get("out") if len(layers) > 1 else None, maps=maps, layers=len(layers))
    network, about, picture, _, name = open_picture(ckpt, image, index, **flags)
    pixels, figures = about.preprocessing(picture, networks.device_of(network)), []
    for layer, found in feature_maps(network, layers, pixels).items():
        shown = found[0].cpu()  # C×H×W
        count, vector = min(maps, len(shown)), shown[0].numel() == 1
        figure = image_grid(
            [*about.preprocessing.pictures(picture), *shown[:count]],
            ["image", *map(str, range(count))], scale="shared" if vector else "each",
            suptitle=f"{about.title}: {layer} of {name}\n{count} of {len(shown)} maps, "
                     f"{'×'.join(map(str, shown.shape[1:]))}, "
                     f"{'all on one scale' if vector else 'each on its own scale'}")
        figures.append(save_figure(figure, ckpt, f"features-{layer}", **flags))
    return Made(figures)


def patches(ckpt: str | None = None, layer: str = "conv1", units: tuple[int, ...] = (),
            top: int = 9, **flags: typing.Unpack[Flags]):
    """Draw the TOP test-image patches that excite each of LAYER's units most, cut exactly at
    their receptive fields. `--units=16` are 16 units of all; `--units=3,17` are those two."""
    need(top=top)
    network, about, test = open_test(ckpt, **flags)
    units = choose_units(network, layer, about.preprocessing.image_size, units)
    values, images, _, boxes = top_fields(network, layer, test.images, about.preprocessing, units,
                                          top)
    columns = values.shape[1]
    figure = image_grid(
        cut_patches(about.preprocessing.pictures(images), boxes, len(units)), columns=columns,
        cell=0.62,
        row_titles=[f"unit {unit}\nactivation {peaks[0]:.3g} to {peaks[-1]:.3g}"
                    for unit, peaks in zip(units, values)],
        suptitle=f"{about.title}: {layer}, the {columns} patches of {len(test.labels)} "
                 f"test images\nthat excite each unit most, the strongest first")
    return save_figure(figure, ckpt, f"patches-{layer}", **flags)


def landscape(ckpt: str | None = None, directions: typing.Literal["random", "pca"] = "random",
              images: int = 1000, points: int = 21, span: float = 1.0, seed: int = 0,
              to: str | None = None, hessian: bool = False, **flags: typing.Unpack[Flags]):
    """Draw the loss around the weights, on IMAGES training and test images each (Li et al. 2018).

    `random`: along two filter-normalised directions (section 4), from −SPAN to SPAN: a line,
    contours and a surface. `pca`: over the plane of the run's own checkpoints, with the path of
    training (section 7.2). With `--to=RUN`: along the straight line to that run's network
    (Goodfellow et al. 2015, section 2). `--hessian` adds the Hessian's two largest eigenvalues (Yao
    et al. 2020, section 3). Values are kept in a CSV file as they come: the same command goes on
    where it was stopped, and draws at once when all are there.
    """
    need(flags.get("out"), images=images, span=span)
    check_words(landscape, directions=directions)
    if to is not None and (hessian or directions != "random"):
        raise ValueError("`to`: draws a line between two networks; leave out `hessian` and "
                         "`directions`")
    if span != 1 and (to is not None or directions != "random"):
        raise ValueError("`span`: is of random directions, and has no effect here")
    if points < 3:
        raise ValueError(f"points={points}: must be at least 3")
    network, about = open_network(ckpt, **flags)
    network.float()  # in half precision, short steps are none
    dataset = train.open_dataset(about, flags.get("data"), flags.get("root"))
    parts = {part: subset(getattr(dataset, part), images, seed) for part in ("train", "test")}
    about = naming(about, flags.get("data"))
    title = (f"{about.title}: loss on {len(parts['train'].labels)} training and "
             f"{len(parts['test'].labels)} test images")
    if to is not None:
        return line_to(to, ckpt, network, about, parts, points, title, **flags)
    plane = plane_of(network, ckpt, directions, seed, span, points)
    return around(ckpt, network, about, parts, plane, directions, seed, hessian, title, **flags)


def around(ckpt, opened, about, parts, plane, directions, seed, hessian, title, **flags):
    """[figures, table] of the loss over the `plane` (see `plane_of`) of two directions."""
    axes, xs, ys, labels, trail = plane
    key = fingerprint(opened, *behaviour(opened, about, parts), about.preprocessing, seed, trail,
                      *parts["train"], *parts["test"])
    table = figure_path(ckpt, f"landscape-{directions}-{key}", flags.get("out"), "csv")

    def loss_of(point):
        with moved(opened, axes, point):
            return loss_on(opened, parts, about.preprocessing)

    def values_at(points):
        return evaluate_points(table, points, loss_of, f"loss at {len(points)} points",
                               names_on(parts))

    # The network itself first: a diverged one ends here, before hours of other points.
    [centre] = values_at([(0.0, 0.0)]).values()
    if not all(map(math.isfinite, centre.values())):
        raise ValueError(f"{about.title}: its loss is not finite; there is no landscape around it")
    if hessian:
        title += (f"\nlargest eigenvalues of the training loss's Hessian: "
                  f"{', '.join(f'{value:.2g}' for value in hessian_on(opened, about, parts))}")
    figures = {}
    if directions == "random":
        # Twice as dense as the grid, with whose middle row it shares every second point.
        line = values_at([(x, 0.0) for x in spaced(xs[0], xs[-1], 2 * len(xs) - 1)])
        figures["landscape-line"] = draw_landscape_line(line.values(), title)
    rows = values_at([*itertools.product(xs, ys)])
    grids = {name: grid_values(rows, xs, ys, f"{name}/loss") for name in parts}
    figures[f"landscape-contours-{directions}"] = draw_landscape_contours(
        xs, ys, grids, title, labels, trail)
    figures[f"landscape-surface-{directions}"] = draw_landscape_surface(
        xs, ys, grids, title, labels)
    return Made([*(save_figure(figure, ckpt, name, **flags) for name, figure in figures.items()),
                 table])


def hessian_on(network, about, parts):
    """`hessian_eigenvalues` of a network's loss on its training images, in batches of 128."""
    images, labels = parts["train"]
    device, weights = networks.device_of(network), dict(network.named_parameters())
    weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
    if not weights:
        raise ValueError("hessian: the network has no weights that are trained")

    def loss_of(chunk, answers):
        loss = batch_loss(network, about.preprocessing(chunk, device), answers.to(device))
        return lambda weights: loss(weights) * (len(answers) / len(labels))

    with (networks.told("hessian: cannot be computed", RuntimeError),
          sdpa_kernel(SDPBackend.MATH)):  # the other ways have no second derivative
        return hessian_eigenvalues([*map(loss_of, images.split(128), labels.split(128))], weights)


def line_to(to, ckpt, opened, about, parts, points, title, **flags):
    """[figure, table] of the loss from a network to that of `to`, and a quarter beyond both."""
    other, its = open_network(to, device=flags.get("device") or "auto")
    if not (about.settings or its.settings):  # from elsewhere: both want what was asked for
        its = dataclasses.replace(its, preprocessing=about.preprocessing)
    first, second = opened.state_dict(), other.float().state_dict()
    between, ends = copy.deepcopy(opened), (
        (first, about.preprocessing), (second, its.preprocessing))
    alike = networks.made_like(first, second) and about.classes == its.classes
    if alike:  # with its weights the one must do what the other does: activations are no weights
        between.load_state_dict(second)
        seen = dataclasses.replace(its.preprocessing, precision="fp32")
        ours, theirs = (train.predict(each, parts["test"].images[:8], dataclasses.replace(
            seen, image_size=side)).nan_to_num() for each, side in (
                (between, about.preprocessing.image_size), (other, seen.image_size)))
        alike = torch.allclose(ours, theirs, rtol=0, atol=1e-3 * theirs.abs().max().item())
    if not alike:
        raise ValueError(f"to={to}: is a network of another kind, or of other classes, than {ckpt}")
    key = fingerprint(opened, *behaviour(opened, about, parts), other,
                      *behaviour(other, about, parts), about.preprocessing, its.preprocessing,
                      *parts["train"], *parts["test"])
    table = figure_path(ckpt, f"landscape-to-{key}", flags.get("out"), "csv")
    # Steps of 1.5 / (6·thirds), so that the quarters beyond, 0 and 1 are all among them.
    thirds = max(1, round(points / 6))  # 0 and 1 are points
    rows = evaluate_points(
        table, [(x, 0.0) for x in spaced(-0.25, 1.25, 6 * thirds + 1)],
        lambda point: loss_between(between, ends, point[0], parts), f"loss on the way to {to}",
        [*names_on(parts), *(names_on(parts, ANEW) if networks.batch_norms(opened) else ())])
    title = f"{title.removeprefix(f'{about.title}: ')}, on the straight line between two networks"
    figure = draw_landscape_line(rows.values(), title, f"from {about.title} (0) to {its.title} (1)")
    return Made([save_figure(figure, ckpt, "landscape-to", **flags), table])


def projector(ckpt: str | None = None, layer: str | None = None, count: int = 1000,
              **flags: typing.Unpack[Flags]):
    """Write LAYER's view of COUNT test images for TensorBoard's Projector, with sprites, true and
    predicted classes, and their pixels. Without `--layer`, what the last linear layer sees; feature
    maps count by their means. It goes to `projector/LAYER` in the run's folder, or to OUT."""
    need(flags.get("out"), count=count)
    network, about, test = open_test(ckpt, **flags)
    test = subset(test, count, seed=0)
    logits, classes = predicted(network, about, test)
    labels = [[classes[label], classes[guess], "right" if label == guess else "wrong"]
              for label, guess in zip(test.labels, logits.argmax(1))]
    if layer:
        networks.find_layer(network, layer)  # complains before anything is written
    folder = Path(os.path.expanduser(
        flags.get("out") or folder_of(ckpt) / "projector" / (layer or "features")))
    if train.is_run(folder) or (folder.name == "test" and train.is_run(folder.parent)):
        raise ValueError(f"out={folder}: TensorBoard's files of a run are there; they stay as they "
                         f"are")
    if not flags.get("out"):  # one that is asked for may be where its user likes
        train.check_no_links([folder, *folder.rglob("*")])
    others = [path for path in folder.rglob("*") if not path.is_dir() and not (
        path.is_file() and (path.name.startswith("events.out.tfevents") or train.WRITTEN.fullmatch(
            f"test/{path.relative_to(folder).as_posix()}")))]
    if others:  # TensorBoard would write over some files
        raise FileExistsError(f"out={folder}: holds {others[0].name}, which is none of the "
                              f"Projector's files; name a folder for these alone")
    with (writing(folder), contextlib.redirect_stdout(io.StringIO()),
          train.summary_writer(folder) as board):
        # It announces what it writes anew, which only the command line may.
        train.add_projector(board, network, about.preprocessing, test.images, labels, layer,
                            ["class", "predicted", "verdict"])
    return folder, f"tensorboard --logdir {shlex.quote(str(folder))}   (then: Projector)"


COMMANDS = {command.__name__: command for command in (
    samples, curves, predictions, confusion, pr_curves, reliability, where, activations, filters,
    features, patches, landscape, projector)}
MEANINGS = {
    "ckpt": "checkpoint, run's folder, torchvision:NAME or module:function",
    "runs": "folders of runs",
    "network": "instead of CKPT: torchvision:NAME or module:function",
    **{name: train.MEANINGS[name] for name in ("weights", "mean", "std", "root", "device")},
    "image_size": f"{train.MEANINGS['image_size']} (samples: of all pictures; none: as they are)",
    "skip_bad": "leave out image files that cannot be read",
    "data": "cifar10, cifar100, shapes, or a folder, all of it; none: the run's own, with its "
            "limit",
    "out": "file or folder; none: figures/ beside the checkpoint",
    "format": "of the figures, where --out is no file (none: png):",
    "seed": "of what is drawn at random",
    "count": "how many images (samples: of each class)",
    "image": "picture file (predictions: or a folder of them); none: a test image",
    "index": "number of the test image",
    "only": "which predictions:",
    "order": "of the predictions, the highest first:",
    "method": "how relevance is found:",
    "class": "the class asked about; none: the predicted one",
    "to": "another run, to whose network the line leads",
    "hessian": "the largest eigenvalues, in the titles",
    "x": "what the curves are drawn against:",
    "layer": "dotted path of a layer, such as conv2 or conv3_x.0; where: the last with maps",
    "layers": "dotted paths of layers, separated by commas; the first call of each counts",
    "channel": "rgb, or the number of an input channel; none: rgb, or 0",
    "maps": "at most so many feature maps of a layer",
    "units": "how many channels, or the numbers of several, separated by commas; none: 16",
    "top": "patches of a unit",
    "directions": "at random, or where the run's checkpoints lie:",
    "images": "how many training and how many test images; of activations: test images",
    "points": "points along each direction",
    "span": "how far the random directions reach, in filter norms",
}

if __name__ == "__main__":
    command_line(COMMANDS, meanings=MEANINGS, moved={
        "report": "python -m lab report", "smoothness": "python -m lab smoothness"})
