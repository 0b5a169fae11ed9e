"""Looking at data, at training, and inside networks: one figure a command.

    python visualize.py samples --data=cifar10
    python visualize.py curves runs/lenet runs/vgg16_1x1
    python visualize.py predictions runs/lenet --only=wrong
    python visualize.py patches runs/convnet --layer=conv2 --units=16 --top=9
    python visualize.py landscape runs/resnet18 --images=500
    python visualize.py report runs/convnet

CKPT is a checkpoint or a run's folder. A figure goes to `figures/` beside the checkpoint unless
`--out` names another file or folder. Computing and drawing are separate: what computes takes a
network and tensors and returns tensors, what draws returns a matplotlib figure, and only the
commands at the end of this file write.
"""

import base64
import contextlib
import csv
import dataclasses
import hashlib
import html
import io
import itertools
import json
import math
import re
import shlex
import textwrap
import typing
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data as datasets
import network as networks
import train

Format = typing.Literal["png", "svg", "pdf"]
FORMATS = typing.get_args(Format)
DPI = 150  # of figures as PNG
# Okabe & Ito's colours, told apart by colour-blind readers; in grey print the markers do it.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
UNITS = {"loss": "cross-entropy", "accuracy": "share of images"}
PART_NAMES = {"train": "training", "val": "validation", "test": "test"}
GREY = 0.85  # what lies outside the image


# ---------------------------------------------------------------------------- images and figures


def load_image(checkpoint, image=None, index=0, data=None, root=None):
    """One picture for the network of `checkpoint`, 1×3×S×S uint8, and what to call it.

    It is the picture file `image`, or test image `index` of the data the network was trained on
    (`data` and `root` name others).
    """
    if image is not None:
        return datasets.read_image(image, checkpoint["image_size"])[None], Path(image).name
    test = train.open_dataset(checkpoint, data, root).test
    if not 0 <= index < len(test.labels):
        raise ValueError(f"index={index}: must be from 0 to {len(test.labels) - 1}")
    name = checkpoint["classes"][test.labels[index]]
    return test.images[index:index + 1], f"test image {index}, class {name}"


def pictures(images, checkpoint):
    """uint8 images as the network saw them: floats 0…1, N×3×S×S with the network's side S."""
    return datasets.resize(images.float() / 255, checkpoint["image_size"]).clamp(0, 1)


def inputs(images, checkpoint, device):
    """uint8 images as the network takes them, normalised and in its size, on `device`."""
    return datasets.normalize(images, tuple(checkpoint["mean"]), tuple(checkpoint["std"]),
                              checkpoint["image_size"], device)


def image_grid(images, titles=None, columns=None, suptitle="", scale="each", row_titles=None,
               cell=None):
    """A figure with a grid of `images`: 3×H×W floats 0…1, or H×W maps drawn in colours.

    Pixels are enlarged as squares. Every map has the whole range of colours to itself (`scale`
    "each"), or all maps share one, shown by a colour bar ("shared"). `titles` has a text for
    each image, `row_titles` for each row; `cell` is a picture's side in inches.
    """
    images = [image.detach().float().cpu() for image in images]
    maps = torch.cat([torch.zeros(0), *(image.flatten() for image in images if image.ndim == 2)])
    shared = len(maps) > 0 and scale == "shared"
    limits = {"vmin": maps.min(), "vmax": maps.max()} if shared else {}
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cell = cell or min(1.4, max(0.6, 7 / columns))
    # All lengths on the axes are in cells; a cell is 1 wide and as tall as the tallest picture.
    tall = max(image.shape[-2] / image.shape[-1] for image in images)
    pitch = tall + 0.06 + (0.19 / cell if titles else 0)

    lines = suptitle.split("\n")
    width = columns * 1.06 * cell + (0.9 if row_titles else 0) + (0.7 if shared else 0)
    figure = new_figure(max(width, 0.087 * max(map(len, lines))) + 0.2,
                        rows * pitch * cell + 0.2 * len(lines) + 0.2, suptitle)
    axes = figure.add_subplot()
    for number, image in enumerate(images):
        x, y = number % columns * 1.06, (number // columns + 1) * pitch - tall
        edge = (tall - image.shape[-2] / image.shape[-1]) / 2
        drawn = axes.imshow(image if image.ndim == 2 else image.permute(1, 2, 0).clamp(0, 1),
                            "viridis", extent=(x, x + 1, y + tall - edge, y + edge),
                            interpolation="nearest", **limits)
        if titles:
            axes.text(x + 0.5, y - 0.03, titles[number], ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(0, columns * 1.06), ylim=(rows * pitch, 0), xticks=(), frame_on=False)
    axes.set_yticks([(row + 1) * pitch - tall / 2 for row in range(rows if row_titles else 0)],
                    row_titles or (), fontsize=8)
    axes.tick_params(length=0)
    if shared:
        figure.colorbar(drawn, ax=axes, aspect=30, pad=0.02).ax.tick_params(labelsize=7)
    return figure


def _span(values):
    """Smallest and largest of `values`, never the same."""
    low, high = values.min().item(), values.max().item()
    return (low, high) if high > low else (low, low + 1)


def figure_path(ckpt, name, out=None, format="png"):
    """Where figure `name` of `ckpt` goes: its folder's `figures/`, or file or folder `out`."""
    if out is not None and Path(out).suffix[1:] in FORMATS:
        return Path(out)
    return Path(out or folder_of(ckpt or ".") / "figures", f"{name}.{format}")


def folder_of(ckpt):
    """The folder of a checkpoint, which may be that folder itself."""
    return Path(ckpt) if Path(ckpt).is_dir() else Path(ckpt).parent


def save_figure(figure, ckpt, name, out=None, format="png"):
    """Write `figure` to its `figure_path`, print that path and return it."""
    path = figure_path(ckpt, name, out, format)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=DPI, facecolor="white")
    networks.write_atomically(path, content.getvalue())
    print(path)
    return path


# ---------------------------------------------------------------------------- inside a network


class _Reached(Exception):
    """All layers asked for have been computed."""


@contextlib.contextmanager
def capture(network, layers, stop=False):
    """While open, each forward pass leaves the outputs of `layers` in the dictionary it yields.

    They are copies, so that an activation in place behind a layer does not change them. A layer
    that is called several times leaves its last output. `stop` ends the block, quietly, as soon
    as all the layers have been reached. The hooks come off whatever happens.
    """
    outputs = {}

    def keep(layer, output):
        outputs[layer] = output.clone() if isinstance(output, torch.Tensor) else output
        if stop and len(outputs) == len(layers):
            raise _Reached

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(networks.find_layer(network, layer).register_forward_hook(
                lambda _module, _inputs, output, layer=layer: keep(layer, output)))
        with contextlib.suppress(_Reached):
            yield outputs


def captured_maps(outputs, layer):
    """The output of `layer` that `capture` caught; ValueError if it is not N×C×H×W or N×C."""
    if layer not in outputs:
        raise ValueError(f"layer={layer}: is not used when the network runs")
    maps = outputs[layer]
    if not isinstance(maps, torch.Tensor) or maps.ndim not in (2, 4):
        kind = "×".join(map(str, getattr(maps, "shape", ()))) or f"a {type(maps).__name__}"
        raise ValueError(f"layer={layer}: returns {kind}, neither feature maps N×C×H×W nor "
                         f"vectors N×C")
    return maps


@torch.no_grad()
def feature_maps(network, layer, images):
    """What `layer` makes of normalised images: N×C×H×W, where a vector's H and W are 1.

    Nothing behind the layer is computed.
    """
    with capture(network, [layer], stop=True) as outputs:
        network(images)
    maps = captured_maps(outputs, layer)
    return maps if maps.ndim == 4 else maps[:, :, None, None]


def layer_batches(network, layer, images, checkpoint):
    """Yield (number of the first image, N×C×H×W output of `layer`), through all uint8 `images`."""
    device = next(network.parameters()).device
    count = max(1, (2**19 if device.type == "cpu" else 2**22) // checkpoint["image_size"]**2)
    starts = range(0, len(images), count)
    for start in datasets.progress(starts, f"{layer} of {len(images)} images"):
        batch = inputs(images[start:start + count], checkpoint, device)
        yield start, feature_maps(network, layer, batch)


def top_activations(network, layer, images, checkpoint, units, top):
    """The `top` uint8 images that excite each of the `units` (channel numbers) of `layer` most.

    An image counts by its strongest position. One pass over the images keeps only the best.
    Returns values units×top, falling, image numbers units×top, and (rows, columns), each
    units×top, in the feature map.
    """
    units, top = torch.as_tensor(units), min(top, len(images))
    best = torch.full((len(units), top), -torch.inf)
    found = torch.zeros(2, len(units), top, dtype=torch.long)  # image and place
    for start, maps in layer_batches(network, layer, images, checkpoint):
        if max(units) >= maps.shape[1]:
            raise ValueError(f"unit {max(units)}: {layer} has units 0 to {maps.shape[1] - 1}")
        peak, place = maps[:, units.to(maps.device)].flatten(2).max(2)
        number = torch.arange(start, start + len(maps)).expand(len(units), -1)
        best, order = torch.cat([best, peak.T.float().cpu()], 1).topk(top, 1)
        found = torch.cat([found, torch.stack([number, place.T.cpu()])], 2)
        found = found.gather(2, order.expand(2, -1, -1))
        width = maps.shape[3]
    return best, found[0], (found[1] // width, found[1] % width)


def receptive_fields(network, layer, image_size):
    """The exact receptive field of every unit of `layer`, C×H×W×4: top, left, bottom, right.

    A box is half open, in pixels of the network's image_size×image_size input, and ends where
    the image does. It is found, not derived: an input line of NaN turns exactly those units into
    NaN that look at it, through any strides, padding, pooling and branches. The box of a unit
    that looks at nothing is 0, 0, 0, 0.
    """
    device, training = next(network.parameters()).device, network.training
    chunks = torch.arange(image_size).split(max(1, 2**18 // image_size**2))
    low, high = {2: image_size, 3: image_size}, {2: 0, 3: 0}  # along the images' axes 2 and 3
    network.eval()
    try:
        # Without cuDNN, whose fast algorithms work tile by tile and spread a NaN over the tile.
        with torch.backends.cudnn.flags(enabled=False):
            for lines, axis in datasets.progress([*itertools.product(chunks, low)],
                                                 "receptive fields"):
                images = torch.zeros(len(lines), 3, image_size, image_size, device=device)
                images.transpose(1, axis)[torch.arange(len(lines)), lines] = torch.nan
                seen = feature_maps(network, layer, images).isnan().cpu()
                number = lines.short().view(-1, 1, 1, 1)
                low[axis] = number.where(seen, image_size).amin(0).clamp(max=low[axis])
                high[axis] = (number + 1).where(seen, 0).amax(0).clamp(min=high[axis])
    finally:
        network.train(training)
    boxes = torch.stack([low[2], low[3], high[2], high[3]], -1).long()
    return boxes * (boxes[..., 2:3] > 0)


def cut_patches(images, boxes):
    """Cut box i out of image i of N×3×S×S floats: N×3×h×w for the largest box, h×w.

    A box that the image's border cut off is filled up there with grey, so that all patches have
    the same scale and a unit sits at the same place in each.
    """
    height, width = (boxes[:, 2:] - boxes[:, :2]).amax(0).clamp(min=1).tolist()
    patches = torch.full((len(images), images.shape[1], height, width), GREY)
    for patch, image, (top, left, bottom, right) in zip(patches, images, boxes.tolist()):
        y = height - (bottom - top) if top == 0 else 0
        x = width - (right - left) if left == 0 else 0
        patch[:, y:y + bottom - top, x:x + right - left] = image[:, top:bottom, left:right]
    return patches


def top_fields(network, layer, images, checkpoint, units, top):
    """What the `units` of `layer` looked at where they were strongest, unit by unit.

    Returns the activations, units×top, and for each of these units·top the uint8 image, the place
    in C·H·W of the feature maps, and the receptive field (see `receptive_fields`).
    """
    values, numbers, (rows, columns) = top_activations(network, layer, images, checkpoint, units,
                                                       top)
    fields = receptive_fields(network, layer, checkpoint["image_size"])
    height, width = fields.shape[1:3]
    places = ((torch.tensor(units)[:, None] * height + rows) * width + columns).flatten()
    return values, images[numbers.flatten()], places, fields.flatten(0, 2)[places]


def choose_units(network, layer, checkpoint, units):
    """Channel numbers of `layer` from the flag `units`: one number is how many, evenly spread over
    all channels; several are the units themselves."""
    device = next(network.parameters()).device
    blank = torch.zeros(1, 3, *[checkpoint["image_size"]] * 2, device=device)
    channels = feature_maps(network, layer, blank).shape[1]
    if len(units) == 1 and units[0] > 0:
        count = min(units[0], channels)
        return [number * channels // count for number in range(count)]
    if len(units) < 2 or min(units) < 0 or max(units) >= channels:
        raise ValueError(f"units={','.join(map(str, units))}: must be how many, or several from "
                         f"0 to {channels - 1}")
    return list(units)


# ---------------------------------------------------------------------------- what was predicted


def predict(network, images, checkpoint):
    """Logits N×classes of uint8 images, with a progress bar."""
    chunks = datasets.progress(images.split(1024), f"predicting {len(images)} images")
    return torch.cat([train.predict(network, chunk, checkpoint) for chunk in chunks])


def confusion_matrix(labels, predictions, classes):
    """How many images of class i were taken for class j, at row i and column j."""
    return torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, -1)


def precision_recall(scores, positive):
    """(precision, recall, average precision) for every threshold, from the highest score down.

    `scores` N, `positive` N bool. Average precision is the sum of precision × rise in recall.
    """
    scores, order = scores.sort(descending=True)
    hits = positive[order].double().cumsum(0)
    # Images with the same score are accepted together: only the last of them is a threshold.
    last = torch.cat([scores[1:] != scores[:-1], torch.tensor([True])])
    precision = (hits / torch.arange(1, len(order) + 1))[last]
    recall = (hits / hits[-1].clamp(min=1))[last]
    return precision, recall, (precision * recall.diff(prepend=torch.zeros(1))).sum().item()


def plot(figure, place, title, xlabel, ylabel):
    """New axes in `figure` at the subplot `place`, without needless lines."""
    axes = figure.add_subplot(*place)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return axes


def log_scale(axes):
    """Make the vertical axis logarithmic, labelled with plain numbers."""
    from matplotlib.ticker import LogFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter())
    axes.tick_params(axis="y", which="both", labelsize=8)


def new_figure(width, height, title):
    """An empty figure, in inches, that lays itself out."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure((width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.07)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_predictions(images, labels, logits, classes, title, columns=2, bars=10):
    """Each picture beside the probabilities of its `bars` likeliest classes, with the logits."""
    rows = math.ceil(len(images) / columns)
    bars = min(bars, len(classes))
    figure = new_figure(4.2 * columns, rows * (0.6 + 0.17 * bars) + 0.5, title)
    grid = figure.add_gridspec(rows, 2 * columns, width_ratios=[1, 1.1] * columns)
    for number, (image, label, scores) in enumerate(zip(images, labels.tolist(), logits)):
        row, column = divmod(number, columns)
        predicted = scores.argmax().item()
        right = predicted == label
        picture = figure.add_subplot(grid[row, 2 * column])
        picture.imshow(image.permute(1, 2, 0), interpolation="nearest")
        picture.axis("off")
        verdict = "right" if right else f"taken for {classes[predicted]}"
        picture.set_title(f"{classes[label]}\n{verdict}", fontsize=9, loc="left",
                          color="black" if right else COLORS[1])
        axes = figure.add_subplot(grid[row, 2 * column + 1])
        shown = scores.topk(bars).indices.sort().values.tolist()
        shares = scores.softmax(0)[shown].tolist()
        colors = {predicted: COLORS[1], label: COLORS[0]}
        drawn = axes.barh([classes[index] for index in shown], shares, height=0.75,
                          color=[colors.get(index, "#BBBBBB") for index in shown])
        texts = axes.bar_label(drawn, [f"{share:.0%}  {scores[index]:+.1f}" for share, index
                                       in zip(shares, shown)], padding=2, fontsize=6.5)
        for text, share in zip(texts, shares):
            text.set_color("black" if share >= 0.005 else "#777777")
        axes.tick_params(axis="y", labelsize=7.5)
        axes.set(xlim=(0, 1.45), xticks=(), ylim=(bars - 0.4, -0.6))
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def draw_confusion(matrix, classes, title):
    """The confusion matrix, as shares of each true class, beside every class's accuracy."""
    count, few = len(classes), len(classes) <= 25
    shares, size = matrix / matrix.sum(1, keepdim=True).clamp(min=1), 8 if few else 4
    side = max(5.0, 0.52 * min(count, 25))
    figure = new_figure(side + 3.4, side + 0.5, title)
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=(side, 2))
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=1)
    axes.set_xticks(range(count), classes, fontsize=size, rotation=45 if few else 90,
                    ha="right" if few else "center")
    axes.set_yticks(range(count), classes, fontsize=size)
    axes.set_xlabel("predicted class", fontsize=9)
    axes.set_ylabel("true class (its images are 100 %)", fontsize=9)
    for row, column in itertools.product(range(count), repeat=2) if few else ():
        share = shares[row, column].item()
        axes.text(column, row, f"{share * 100:.0f}" if share >= 0.005 else "·", ha="center",
                  va="center", fontsize=8, color="black" if share > 0.5 else "white")
    drawn = bars.barh(range(count), shares.diagonal(), color=COLORS[0])
    bars.bar_label(drawn, fmt="{:.1%}", padding=2, fontsize=size)
    bars.set(xlim=(0, 1.3), xticks=(0, 1), xticklabels=("0", "100 %"))
    bars.set_title("accuracy of a class", fontsize=9)
    bars.tick_params(labelleft=False, left=False, labelsize=8)
    bars.spines[["top", "right", "left"]].set_visible(False)
    return figure


def draw_pr_curves(curves, classes, title):
    """One plot a class: its (precision, recall, average precision) before those of all others."""
    columns = min(5, len(classes)) if len(classes) <= 25 else 10
    rows = math.ceil(len(classes) / columns)
    figure = new_figure(1.9 * columns + 0.4, 1.9 * rows + 0.5, title)
    for number, name in enumerate(classes):
        axes = plot(figure, (rows, columns, number + 1),
                    f"{name} · {curves[number][2]:.3f}", "", "")
        for precision, recall, _ in curves if len(classes) <= 25 else ():
            axes.plot(recall, precision, color="#CCCCCC", linewidth=0.6)
        precision, recall, _ = curves[number]
        axes.plot(recall, precision, color=COLORS[0], linewidth=1.8)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.04), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    return figure


# ---------------------------------------------------------------------------- how it was trained


def group_runs(runs):
    """{label: [metrics of each run]}: runs whose settings differ only in seed and name are one."""
    groups, labelled = {}, {}
    for run in map(Path, runs):
        settings = {"run": str(run)}
        with contextlib.suppress(OSError, ValueError):
            settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
        same = {name: value for name, value in settings.items()
                if name not in ("seed", "name", "out", "device", "root")}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    for members in groups.values():
        more = len(members) - 1
        label = members[0].name + (f" and {more} more seed{'s' * (more > 1)}" if more else "")
        while label in labelled:  # runs of the same name in different folders
            label += "′"
        labelled[label] = [train.read_metrics(run) for run in members]
    return labelled


def draw_curves(groups, x="epoch"):
    """Loss and accuracy of groups of runs (see `group_runs`) against column `x` of their metrics.

    Training is dashed, validation solid; several seeds are their mean in a band from the lowest
    to the highest.
    """
    figure = new_figure(10, 4.2, "training (dashed) and validation (solid)")
    for place, (kind, unit) in enumerate(UNITS.items(), 1):
        axes = plot(figure, (1, 2, place), kind, "time / s" if x == "seconds" else x, unit)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        for number, (label, members) in enumerate(groups.items()):
            length = min(len(metrics[x]) for metrics in members)
            columns = {name: torch.tensor([metrics[name][:length] for metrics in members])
                       for name in (x, f"val/{kind}", f"train/{kind}")}
            at = (columns[x].cumsum(1) if x == "seconds" else columns[x]).mean(0)
            color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
            for part, style in (("val", "-"), ("train", "--")):
                values = columns[f"{part}/{kind}"]
                if values.isnan().all():
                    continue
                axes.plot(at, values.mean(0), style, color=color, linewidth=1.5, marker=marker,
                          markevery=max(1, length // 8), markersize=4, label=label)
                label = None  # one entry in the legend
                if len(members) > 1:
                    axes.fill_between(at, values.amin(0), values.amax(0), color=color, alpha=0.2,
                                      linewidth=0)
    axes.legend(fontsize=8, frameon=False)
    return figure


# ---------------------------------------------------------------------------- loss landscape


def filter_normalized_direction(network, random):
    """A random direction in weight space, {parameter name: tensor}, each filter of which has the
    norm of the network's own filter (Li et al. 2018, section 4).

    A linear layer's filters are its rows. Biases and batch norm's parameters do not move.
    """
    direction = {}
    for name, weight in network.named_parameters():
        direction[name] = torch.zeros_like(weight)
        if weight.ndim > 1:
            noise = F.normalize(torch.randn(weight.shape, generator=random).flatten(1))
            norms = weight.detach().flatten(1).norm(dim=1, keepdim=True)
            direction[name] = (noise.to(weight.device) * norms).view_as(weight)
    return direction


def principal_directions(network, path):
    """The two directions along which the weights of `path`, state dictionaries, vary most.

    Returns (two orthonormal directions, the share of the variance along each, the path's
    coordinates relative to the network, n×2), after Li et al. (2018), section 7.2. Biases and
    batch norm stay as they are, as in `filter_normalized_direction`.
    """
    if len(path) < 3:
        raise ValueError(f"directions=pca: needs at least 3 checkpoints, there are {len(path)} "
                         f"(train with --keep=0 keeps all)")
    own = dict(network.named_parameters())
    moving = [name for name, weight in own.items() if weight.ndim > 1]
    steps = torch.stack([torch.cat([(weights[name] - own[name].detach().cpu()).flatten().float()
                                    for name in moving]) for weights in path])
    centred = steps - steps.mean(0)
    variance, vectors = torch.linalg.eigh((centred @ centred.T).double())
    if variance[-2] <= 1e-9 * variance[-1]:
        raise ValueError("directions=pca: the weights of the checkpoints lie in one line")
    axes = F.normalize(vectors[:, [-1, -2]].T.float() @ centred)
    directions = []
    for axis in axes:
        parts = dict(zip(moving, axis.split([own[name].numel() for name in moving])))
        directions.append({name: parts[name].view_as(weight).to(weight.device) if name in parts
                           else torch.zeros_like(weight) for name, weight in own.items()})
    return directions, (variance[[-1, -2]] / variance.sum()).tolist(), steps @ axes.T


@contextlib.contextmanager
def moved(network, directions, amounts):
    """While open, the network's weights are moved along `directions` by `amounts`."""
    before = [weight.detach().clone() for weight in network.parameters()]
    try:
        with torch.no_grad():
            for direction, amount in zip(directions, amounts):
                for name, weight in network.named_parameters():
                    weight.add_(direction[name], alpha=amount)
        yield network
    finally:
        with torch.no_grad():
            for weight, old in zip(network.parameters(), before):
                weight.copy_(old)


def loss_at(network, directions, amounts, parts, checkpoint):
    """{"train/loss": …, "train/accuracy": …, "test/loss": …} of `parts` ({"train": split, …})
    where the weights are moved along `directions` by `amounts`, in full precision."""
    checkpoint, values = {**checkpoint, "settings": {"precision": "fp32"}}, {}
    with moved(network, directions, amounts):
        for name, split in parts.items():
            logits = train.predict(network, split.images, checkpoint)
            result = train.score(logits, split.labels, logits.shape[1])
            values |= {f"{name}/{kind}": result[kind] for kind in ("loss", "accuracy")}
    return values


def read_table(path):
    """The rows of the CSV file `path`, dictionaries of texts and floats; [] when there is none."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, quoting=csv.QUOTE_NONNUMERIC))


def write_table(path, rows):
    """Write `rows`, dictionaries with the same names, to the CSV file `path`, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(rows)
    networks.write_atomically(path, text.getvalue())


def evaluate_points(path, points, evaluate, description):
    """`evaluate(point)`, a dictionary, at each (x, y) of `points`; {(x, y) as text: row}.

    Rows are kept in the CSV file `path` as they come, and not computed when they are there.
    """
    keys = {tuple(f"{value:.6g}" for value in point): point for point in points}
    rows = {tuple(f"{row[axis]:.6g}" for axis in "xy"): row for row in read_table(path)}
    missing = [key for key in keys if key not in rows]
    for key in datasets.progress(missing, description):
        rows[key] = {**dict(zip("xy", keys[key])), **evaluate(keys[key])}
        write_table(path, [*rows.values()])
    return {key: rows[key] for key in keys}


def fingerprint(network, *settings):
    """Eight letters and digits that stand for the network's weights and `settings`."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=4)
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def grid_values(rows, xs, ys, column):
    """`column` of `evaluate_points`' rows on the grid, len(ys)×len(xs)."""
    values = torch.tensor([[rows[f"{x:.6g}", f"{y:.6g}"][column] for x in xs] for y in ys])
    finite = values[values.isfinite()]
    return values.nan_to_num(finite.max().item(), posinf=finite.max().item())


def draw_landscape_line(rows, title):
    """Loss and accuracy along one direction, from `evaluate_points`' rows."""
    figure = new_figure(9, 3.8, title)
    rows = sorted(rows, key=lambda row: row["x"])
    for place, (kind, unit) in enumerate(UNITS.items(), 1):
        axes = plot(figure, (1, 2, place), kind, "distance along the direction, in filter norms",
                    unit)
        for part, style, color in (("train", "--", COLORS[0]), ("test", "-", COLORS[1])):
            axes.plot([row["x"] for row in rows], [row[f"{part}/{kind}"] for row in rows], style,
                      color=color, linewidth=1.8, label=PART_NAMES[part])
    log_scale(figure.axes[0])
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def draw_landscape_contours(xs, ys, parts, title, labels, path=None):
    """Loss over two directions, one plot for each of `parts` ({"train": len(ys)×len(xs), …}).

    Both share one logarithmic scale. `path` is a list of points (x, y), drawn as a line.
    """
    figure = new_figure(5.2 * len(parts) + 0.8, 5.1, title)
    low, high = _span(torch.stack([*parts.values()]).clamp(min=1e-4))
    levels = torch.logspace(math.log10(low), math.log10(high), 17).tolist()
    levels[0], levels[-1] = low * 0.999, high * 1.001
    for place, (name, values) in enumerate(parts.items(), 1):
        axes = plot(figure, (1, len(parts), place), f"{PART_NAMES[name]} loss", *labels)
        shown = values.clamp(low, high)
        filled = axes.contourf(xs, ys, shown, levels, cmap="viridis", norm="log",
                               vmin=low, vmax=high)
        lines = axes.contour(xs, ys, shown, levels[1:-1], colors="white", linewidths=0.5)
        axes.clabel(lines, lines.levels[::2], fmt="%.2g", fontsize=7)
        if path is None:
            axes.plot(0, 0, "+", color="white", markersize=11, markeredgewidth=2)
            axes.set_aspect("equal")
            continue
        axes.plot(*zip(*path), "-o", color=COLORS[1], markersize=4, markeredgecolor="white",
                  markeredgewidth=0.6)
        for text, point in (("start", path[0]), ("end", path[-1])):
            axes.annotate(text, point, (6, 6), textcoords="offset points", fontsize=9,
                          color="white", fontweight="bold")
    bar = figure.colorbar(filled, ax=figure.axes, shrink=0.8, format="%.3g", ticks=levels[::4])
    bar.set_label("cross-entropy (logarithmic)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.ax.minorticks_off()
    return figure


def draw_landscape_surface(xs, ys, parts, title, labels):
    """The same loss as a surface over two directions; height is the loss's logarithm."""
    figure = new_figure(5.4 * len(parts), 5.0, title)
    logs = {name: values.clamp(min=1e-4).log10() for name, values in parts.items()}
    low, high = _span(torch.stack([*logs.values()]))
    x, y = torch.meshgrid(torch.tensor(xs), torch.tensor(ys), indexing="xy")
    for place, (name, values) in enumerate(logs.items(), 1):
        axes = figure.add_subplot(1, len(parts), place, projection="3d")
        axes.plot_surface(x.numpy(), y.numpy(), values.numpy(), cmap="viridis", vmin=low, vmax=high,
                          rcount=len(ys), ccount=len(xs), edgecolor="black", linewidth=0.15)
        axes.set(zlim=(low, high))
        axes.set_title(f"{PART_NAMES[name]} loss (logarithmic height)", fontsize=10)
        axes.set_xlabel(labels[0], fontsize=8)
        axes.set_ylabel(labels[1], fontsize=8)
        axes.zaxis.set_major_formatter(lambda value, _: f"{10**value:.2g}")
        axes.tick_params(labelsize=7)
        axes.view_init(35, -60)
        axes.set_box_aspect(None, zoom=0.8)  # leaves room for the labels
    return figure


# ---------------------------------------------------------------------------- smoothness

MEASURES = ("loss_low", "loss_high", "change_low", "change_high", "beta")


def along_gradient(loss_of, weights, sizes):
    """How smooth the loss is ahead, along its gradient (Santurkar et al. 2018, figure 4).

    `loss_of` maps a dictionary of tensors such as `weights` to a scalar. For every step size η
    of `sizes` the weights are moved by −η·gradient; returns the lowest and highest loss there,
    the lowest and highest l2 change of the gradient (its predictiveness), and "beta", the
    effective β-smoothness: the largest change of the gradient per distance moved.
    """
    def loss_and_gradient(point):
        point = {name: weight.detach().requires_grad_() for name, weight in point.items()}
        loss = loss_of(point)
        return loss.item(), torch.autograd.grad(loss, [*point.values()])

    def norm(tensors):
        return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))

    _, gradient = loss_and_gradient(weights)
    losses, changes, betas = [], [], []
    for size in sizes:
        loss, ahead = loss_and_gradient({name: weight - size * slope for (name, weight), slope
                                         in zip(weights.items(), gradient)})
        losses.append(loss)
        changes.append(norm(after - before for after, before in zip(ahead, gradient)))
        betas.append(changes[-1] / max(size * norm(gradient), 1e-30))
    return dict(zip(MEASURES, (min(losses), max(losses), min(changes), max(changes), max(betas))))


def batch_loss(network, images, labels):
    """The loss on one mini-batch as a function of the weights, in the network's present mode.

    Batch norm's running statistics are copied for each call, so that they stay as they are.
    """
    def loss_of(weights):
        copies = {name: buffer.clone() for name, buffer in network.named_buffers()}
        logits = torch.func.functional_call(network, {**weights, **copies}, (images,))
        return F.cross_entropy(logits, labels)
    return loss_of


def smoothness_run(model, lr, dataset, device, steps, batch_size, seed, every=0):
    """Train `model` for `steps` with SGD (momentum 0.9, constant `lr`): a row for each step.

    With `every`, each so many steps the row has `along_gradient`'s measures too, for eight step
    sizes from half to four times `lr`, on the very mini-batch of the step; NaN in other rows.
    """
    torch.manual_seed(seed)
    size = networks.image_size_of(model)
    network = networks.build(model, len(dataset.classes), size).to(device).train()
    batches = datasets.Batches(dataset.train, dataset.mean, dataset.std, batch_size,
                               ("flip", "crop"), seed, size, device)
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9)
    sizes = [lr / 2 * 8 ** (number / 7) for number in range(8)]
    stream = itertools.chain.from_iterable(map(batches.epoch, itertools.count()))
    rows = []
    for step in datasets.progress(range(steps), f"{model}, learning rate {lr:g}"):
        images, labels = next(stream)
        measures = dict.fromkeys(MEASURES, math.nan)
        if every and step % every == 0:
            measures = along_gradient(batch_loss(network, images, labels),
                                      dict(network.named_parameters()), sizes)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append({"model": model, "lr": lr, "step": step, "loss": loss.item(), **measures})
    return rows


def draw_smoothness(rows, models, title):
    """Four plots over the steps, all `models` in each: the band of losses over separate runs,
    and the three measures along the gradient. `rows` are `smoothness_run`'s."""
    figure = new_figure(11, 7.5, title)
    panels = [plot(figure, (2, 2, place), name, "step", unit) for place, (name, unit) in enumerate((
        ("loss over separate runs, one for each learning rate", "training loss"),
        ("variation of the loss along the gradient", "loss ahead"),
        ("gradient predictiveness: change of the gradient", "l2 distance"),
        ("effective β-smoothness along the gradient", "largest change / distance moved")), 1)]
    for number, model in enumerate(models):
        losses, ahead = {}, []
        for row in (row for row in rows if row["model"] == model):
            losses.setdefault(row["step"], []).append(math.inf if math.isnan(row["loss"])
                                                      else row["loss"])
            ahead += [row] if not math.isnan(row["beta"]) else []
        bands = [(list(losses), [*map(min, losses.values())], [*map(max, losses.values())])]
        at, *measures = zip(*([row["step"], *(row[name] for name in MEASURES)] for row in ahead))
        bands += [(at, *measures[:2]), (at, *measures[2:4])]
        style = {"color": COLORS[number % len(COLORS)], "label": model}
        for axes, band in zip(panels, bands):
            axes.fill_between(*band, alpha=0.45, linewidth=0.8,
                              hatch=("", "////", "....")[number % 3], **style)
        panels[3].plot(at, measures[4], ("-", "--", ":")[number % 3], **style)
    for axes in panels:
        log_scale(axes)
        axes.legend(fontsize=8, frameon=False)
    return figure


# ---------------------------------------------------------------------------- lab reports

STYLE = """
body { margin: 0; padding: 3rem 1.25rem; color: #1a1a1a; font: 1.0625rem/1.55 Georgia, serif; }
main > * { max-width: 40rem; margin: 0 auto 1rem; }
main > div, p:has(img) { max-width: 62rem; overflow-x: auto; }
main > div, p:has(img) + p { margin-bottom: 2rem; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: normal; }
h1 + p { margin-bottom: 2rem; padding: .9rem 0; border: solid #999; border-width: 1px 0; }
h2 { font-size: 1.25rem; line-height: 1.3; margin-top: 2.75rem; }
pre { padding-left: 1rem; border-left: 2px solid #bbb; font-size: .8rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
table { border-collapse: collapse; border-block: 2px solid; margin: auto; font-size: .875rem;
  min-width: min(40rem, 100%); line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .45rem; border-bottom: 1px solid #e2e2e2; text-align: left;
  vertical-align: baseline; white-space: nowrap; }
td:last-child { min-width: 7rem; white-space: normal; }
img { display: block; max-width: 100%; height: auto; margin: auto; }
p:has(+ div), p:has(img) + p { font-size: .875rem; line-height: 1.4; color: #444; }
p:has(+ div), p:has(img) { margin-bottom: .5rem; }
@page { size: A4; margin: 20mm 22mm; }
@media print {
  body { padding: 0; font-size: 10.5pt; }
  main > *, main > div, p:has(img) { max-width: none; overflow: visible; }
  table { width: 100%; font-size: 8.5pt; }
  tr, pre, h1 + p, div:not(:has(tr:nth-child(16))) { break-inside: avoid; }
  h1, h2, p:has(+ div), p:has(img) { break-after: avoid; }
  img { max-height: 105mm; width: auto; }
}
"""


class Report:
    """A lab report in the making: Markdown in `folder`, beside its `figures`, and as one page."""

    def __init__(self, folder, title, lead):
        self.folder, self.title = Path(folder), title
        self.parts, self.tables, self.figures = [f"# {plain(title)}", plain(lead)], 0, []

    def section(self, title):
        """Begin a section."""
        self.parts.append(f"## {plain(title)}")

    def text(self, text):
        """Add a paragraph."""
        self.parts.append(plain(text))

    def command(self, *lines):
        """Add command lines; long ones go on in a next line, as a shell takes them."""
        lines = [line if "'" in line else " \\\n    ".join(textwrap.wrap(
            line, 70, break_long_words=False, break_on_hyphens=False)) for line in lines]
        self.parts.append("\n".join(["```sh", *lines, "```"]))

    def table(self, rows, caption):
        """Add a table of texts, its head first; columns of numbers are set to the right."""
        self.tables += 1
        rule = ["---:" if number else "---" for number in numeric_columns(rows)]
        head, *rows = ([plain(cell) for cell in row] for row in rows)
        self.parts += [plain(f"Table {self.tables}. {caption}"), "\n".join(
            f"| {' | '.join(row)} |" for row in (head, rule, *rows))]

    def figure(self, name, drawn, caption):
        """Add a matplotlib figure, or the PNG file it is `drawn` in, as `name` in `figures`."""
        path = self.folder / "figures" / f"{name}.png"
        if not isinstance(drawn, Path):
            save_figure(drawn, None, name, path)
        elif drawn != path:
            path.parent.mkdir(parents=True, exist_ok=True)
            networks.write_atomically(path, drawn.read_bytes())
        self.figures.append(path)
        caption = plain(f"Figure {len(self.figures)}. {caption}")
        self.parts += [f"![{caption}](<figures/{path.name}>)", caption]

    def write(self):
        """Write report.html and report.md and print their paths."""
        text = "\n\n".join(self.parts) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in (("report.html", page(self.title, text, self.figures)),
                              ("report.md", text)):
            networks.write_atomically(self.folder / name, content)
            print(self.folder / name)


def plain(text):
    """Text as Markdown that means nothing but itself."""
    return re.sub(r"[\\`*|\[\]]|\b_|_\b", r"\\\g<0>", html.escape(text, quote=False))


def page(title, markdown, figures):
    """Markdown as one HTML page that holds its PNG files `figures` and needs no other file."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table")
    body = reader.render(markdown)
    body = body.replace("<table>", "<div><table>").replace("</table>", "</table></div>")
    for png in (path.read_bytes() for path in figures):
        width = int.from_bytes(png[16:20], "big") * 96 // DPI  # as large as it was drawn
        body = re.sub('<img src="figures[^"]*"', f'<img width="{width}" src="data:image/png;base64,'
                      f'{base64.b64encode(png).decode()}"', body, count=1)
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n<meta name="viewport" '
            f'content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
            f"<style>{STYLE}</style></head>\n<body><main>\n{body}</main></body></html>\n")


def numeric_columns(rows):
    """Whether what each column of a table holds, except the first, is mostly numbers."""
    number = re.compile(r"[+−]?[\d.,×%\s]+(± [\d.]+)?")
    columns = [[bool(number.fullmatch(cell)) for cell in column if cell not in ("", "–")]
               for column in zip(*rows[1:])]
    return [place > 0 and 2 * sum(found) > len(found) for place, found in enumerate(columns)]


def portable(words):
    """The command line of `words`, in which absolute paths are their last names."""
    words = [re.fullmatch("(--[^=]+=)?(.*)", word, re.DOTALL).groups("") for word in words]
    return shlex.join(flag + (Path(value).name if Path(value).is_absolute() else value)
                      for flag, value in words)


def thousands(number):
    """A whole number, its thousands apart."""
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def duration(seconds):
    """Seconds in the unit that suits them."""
    return (f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds / 60:.0f} min"
            if seconds >= 120 else f"{seconds:.1f} s")


def finished(run):
    """The result of the run in the folder `run`; None if it is not there or not complete."""
    if not (run / "config.json").exists():
        return None
    config, place = train.read_config(run / "config.json"), run.resolve()
    return train.finished_result(dataclasses.replace(config, out=str(place.parent),
                                                     name=place.name))


def report_of_run(run, folder, **given):
    """The `Report` of a run. `given` are the flags data, root and device."""
    result = finished(run)
    if not result:
        raise ValueError(f"{run}: holds no finished run (python train.py --resume={run} goes on "
                         f"with one that was stopped)")
    network, checkpoint = train.open_checkpoint(run, given["device"])
    checkpoint["settings"] |= {name: given[name] for name in ("data", "root") if given[name]}
    dataset = train.open_dataset(checkpoint)
    logits = predict(network, dataset.test.images, checkpoint)
    right, count = (logits.argmax(1) == dataset.test.labels).sum().item(), len(logits)
    config, name = train.Config.from_json(result["settings"]), Path(dataset.name).name
    options = "".join(f"{option} {value}, " for option, value in config.options.items())
    best = "" if result["val/accuracy"] is None else (
        f", the best of them on the validation images ({result['val/accuracy']:.2%})")
    hardware = {"device": result["device"], "time": duration(result["seconds"]),
                **result["versions"], "commit": result["commit"] or "unknown"}
    report = Report(
        folder, f"{config.model} on {name}",
        f"{config.model} ({options}{thousands(result['parameters'])} parameters) was trained on "
        f"{thousands(len(dataset.train.labels))} images of {name}: {result['epochs']} "
        f"epoch{'s' * (result['epochs'] > 1)}, {hardware['time']} on {result['device']}. It "
        f"classifies {thousands(right)} of {thousands(count)} test images correctly, "
        f"{right / count:.2%}. Its weights are those of epoch {checkpoint['epoch']}{best}.")
    add_setup(report, config, name, dataset, network, checkpoint)
    report.section("Training")
    report.figure("report-curves", draw_curves(group_runs([run])),
                  "Loss and accuracy after each epoch. Training images are counted as the network "
                  "learns from them: augmented, and with dropout where there is any.")
    add_predictions(report, dataset.test, checkpoint, logits)
    add_inside(report, run, network, dataset.test, checkpoint, logits, given)
    report.section("Hardware, versions, and how to make it again")
    report.table([("what", "value"), *hardware.items()], "Where the network was trained.")
    report.text("The first command trains the network, the second makes this report. Folders from "
                "elsewhere have only their last names here.")
    report.command(portable(shlex.split(result["command"])),
                   portable(["python", "visualize.py", "report", str(config.folder)]))
    return report


def add_setup(report, config, name, dataset, network, checkpoint):
    """Images, settings and structure of a run."""
    sizes = ", ".join(f"{thousands(len(split.labels))} {PART_NAMES[part]}" for part in PART_NAMES
                      if (split := getattr(dataset, part)))
    mean, std = (" ".join(f"{value:.4f}" for value in checkpoint[kind]) for kind in ("mean", "std"))
    side = checkpoint["image_size"]
    report.section("Images and settings")
    report.text(f"{name}: {sizes} images of {len(dataset.classes)} classes. The network takes them "
                f"at {side}×{side} pixels, less the mean {mean} and divided by the standard "
                f"deviation {std} of the training images' pixels.")
    meanings = {entry.name: entry.metadata["help"] for entry in dataclasses.fields(config)}
    values = {key: ",".join(map(str, value)) or "none" if isinstance(value, (list, tuple))
              else str(value).lower()
              for key, value in {**dataclasses.asdict(config), **config.all_settings()}.items()
              if key == "epochs" or key not in (*train.MAY_CHANGE, "options")}
    values |= {"data": name, "image_size": str(side)}
    report.table([("setting", "value", "meaning"), *(
        (key, value, meanings.get(key, f"option of {config.model}"))
        for key, value in values.items())], "The settings that bear on the outcome.")
    rows = networks.stages(network, side)
    rows.append(("total", (), *(sum(row[place] for row in rows) for place in (2, 3))))
    report.section("Structure")
    report.table([("stage", "output", "parameters", "multiply-adds"), *(
        (stage, "×".join(map(str, shape)), *map(thousands, counts))
        for stage, shape, *counts in rows)],
        "The stages of the network; multiply-adds are those of one image.")


def add_predictions(report, test, checkpoint, logits):
    """Accuracy of each class, confusion matrix, and predictions that are right and wrong."""
    classes, right = checkpoint["classes"], logits.argmax(1) == test.labels
    matrix = confusion_matrix(test.labels, logits.argmax(1), len(classes))
    rows = [("class", "test images", "right", "accuracy", "most often taken for")]
    for name, line, hits, wrong in zip(classes, matrix, matrix.diagonal(),
                                       matrix - matrix.diagonal().diag()):
        rows.append((name, f"{line.sum()}", f"{hits}", f"{hits / line.sum().clamp(min=1):.1%}",
                     f"{classes[wrong.argmax()]} ({wrong.max()})" if wrong.any() else "–"))
    report.section("Predictions")
    report.table(rows, "Accuracy of each class on the test images.")
    report.figure("report-confusion", draw_confusion(matrix, classes, ""),
                  "Which classes, in rows, are taken for which, in columns.")
    order = torch.randperm(len(right), generator=datasets.generator(0, "predictions"))
    for name, kept in (("right", right), ("wrong", ~right)):
        some = order[kept[order]][:4]
        if len(some):
            drawn = draw_predictions(pictures(test.images[some], checkpoint), test.labels[some],
                                     logits[some], classes, "")
            report.figure(f"report-{name}", drawn, f"Predictions that are {name}, drawn at random: "
                          f"probability and logit of each class. Blue is the true class, orange "
                          f"what it was taken for.")


def add_inside(report, run, network, test, checkpoint, logits, given):
    """Filters, feature maps and deconvnet reconstructions, each drawn by its command."""
    index = (logits.argmax(1) == test.labels).int().argmax().item()  # the first that is right
    image = f"test image {index} ({checkpoint['classes'][test.labels[index]]})"
    sides = {name: shape[-1] for name, shape, *_ in networks.stages(
        network, checkpoint["image_size"]) if len(shape) == 3 and any(
            isinstance(module, nn.Conv2d) for module in network.get_submodule(name).modules())}
    layers = [name for name, side in sides.items() if side > 1] or [*sides]
    first, middle, last = layers[0], layers[len(layers) // 2], layers[-1]
    layers = [*dict.fromkeys([first, middle, last])]
    place = report.folder / "figures"

    def draw(name, caption, command, **flags):
        path = place / f"report-{name}.png"
        if command in COMMANDS:
            COMMANDS[command](str(run), out=str(path), **flags)
        else:
            train.run_script("deconv.py", command, str(run), f"--out={path}", *(
                f"--{key}={value}" for key, value in flags.items() if value is not None))
        report.figure(f"report-{name}", path, caption)

    report.section("Inside the network")
    draw("filters", f"The filters of {first}, in the colours to which they answer.", "filters",
         layer=first)
    for layer in dict.fromkeys([first, last]):
        draw(f"features-{layer}", f"What {layer} makes of {image}.", "features", layers=(layer,),
             index=index, maps=35, **given)
    draw("reconstruct", f"What in {image} excites the strongest unit of {', '.join(layers)}, found "
         f"by a deconvnet (Zeiler & Fergus 2014).", "reconstruct", index=index,
         layers=",".join(layers), **given)
    draw("gallery", f"Units of {last}: the test images' patches that excite them most, and what a "
         f"deconvnet brings back of each.", "gallery", layer=last, units=3, **given)


def report_of_lab(what, runs, folder):
    """The `Report` of the experiments `what`, whose runs are in the folder `runs`."""
    try:
        entries = train.read_experiments(what)
    except ValueError as error:
        raise ValueError(f"no folder {what}; {error}") from error
    book = train.experiments_book()
    flags = {}
    rows = [row for entry in entries for row in lab_rows(entry, runs, flags)]
    claims = [row for row in rows if row["reported"] is not None]
    known = [row for row in claims if row["measured"] is not None]
    met = sum(row["measured"] >= row["reported"] for row in known)
    images = " and ".join(sorted({row["images"] for row in rows if "seconds" in row}))
    places = "; ".join(sorted({f"{row['device']}, commit {row['commit'] or 'unknown'}"
                               for row in rows if "seconds" in row}))
    report = Report(
        folder, book["reports"].get(what, f"Experiments: {what}"),
        f"Of {len(claims)} reported accuracies, {len(known)} were measured again; {met} of these "
        f"were met or beaten. The reported ones are on the original CIFAR-10, the measured ones on "
        f"{images or 'nothing yet'}.")
    report.section("Reported and measured")
    report.table([("id", "run", "accuracy", "reported", "measured", "difference", "epochs", "time",
                   "images", "note"), *map(lab_cells, rows)],
                 "Accuracies in per cent; of several seeds the mean ± standard deviation. Time is "
                 "that of one run.")
    for name, reason in book["images"].items():
        if any(row["images"].startswith(name) for row in rows):
            report.text(f"Where figures on {name} lie below the report's: {reason}.")
    for entry in entries:
        add_entry(report, entry, runs)
    report.section("Hardware, and how to make it again")
    report.text(f"Measured on: {places or 'nothing yet'}.")
    report.command(portable(["python", "train.py", "reproduce", what, *(
        f"--{name}={value}" for name, value in flags.items())]),
        f"python visualize.py report {what}")
    return report


def with_seeds(folder):
    """The folder of a run and those of its repetitions with other seeds."""
    return [folder, *sorted(folder.parent.glob(f"{folder.name}-seed*"))]


def lab_rows(entry, runs, flags):
    """The rows of `train.compare` for an entry, with `images` or a `state`, and a `note`.

    Settings that are not the entry's own are added to `flags`.
    """
    rows = []
    for name, line in entry.get("runs", {}).items():
        folder = train.run_folder_of(entry["id"], name, runs)
        done = [result for result in map(finished, with_seeds(folder)) if result]
        if not done:
            state = "not finished" if folder.exists() else "not measured"
            claims = entry.get("reported", {}).get(name, {"test": None})
            rows += [{"run": name, "accuracy": part, "reported": claim, "measured": None,
                      "state": state} for part, claim in claims.items()]
            continue
        planned = train.config_of(line)
        config = train.Config.from_json(done[0]["settings"])
        flags |= {key: getattr(config, key) for key in ("data", "limit", "epochs")
                  if getattr(config, key) != getattr(planned, key)}
        flags |= {"seeds": len(done)} if len(done) > 1 else {}
        images = Path(config.data).name + (f", limit {config.limit}" if config.limit else "")
        of = f" of {planned.epochs}" if config.epochs != planned.epochs else ""
        rows += [{**row, "images": images, "epochs": f"{row['epochs']}{of}"}
                 for row in train.compare(entry, name, done)]
    rows = rows or [{"accuracy": "figures", "reported": None, "measured": None}]
    rows[0]["note"] = entry.get("note", "")
    return [{"run": "–", "note": "", "epochs": "–", "images": "–", "state": "–", **row,
             "id": entry["id"]} for row in rows]


def lab_cells(row):
    """A row of `lab_rows` as text."""
    claim, value = row["reported"], row["measured"]
    std = f" ± {row['std']:.2f}" if row.get("std") is not None else ""
    return (row["id"], row["run"], row["accuracy"], "–" if claim is None else f"{claim:.2f}",
            row["state"] if value is None else f"{value:.2f}{std}",
            "–" if None in (claim, value) else f"{value - claim:+.2f}".replace("-", "−"),
            row["epochs"], duration(row["seconds"]) if "seconds" in row else "–", row["images"],
            row["note"])


def add_entry(report, entry, runs):
    """An experiment of a lab report: note, command lines, curves in one plot, other figures."""
    def fill(text, show=str):
        return re.sub(r"\{(?:([^{}/]+)/)?([^{}]+)\}", lambda match: show(str(train.run_folder_of(
            match[1] or entry["id"], match[2], runs))), text)

    lines, drawn = [*entry.get("runs", {}).values()], entry.get("figures", ())
    report.section(f"{entry['id']}  {entry['shows']}")
    if "note" in entry:
        report.text(f"Note: {entry['note']}.")
    report.command(*(portable(shlex.split(fill(line, shlex.quote))) for line in (*lines, *drawn)))
    names = [f"{{{name}}}" for name in entry.get("runs", {})]
    names += re.findall(r"\{.+?\}", " ".join(line for line in drawn if " curves " in line))
    folders = [folder for first in dict.fromkeys(map(fill, names))
               for folder in with_seeds(Path(first)) if train.read_rows(folder)]
    if folders:
        report.figure(f"{entry['id']}-curves", draw_curves(group_runs(folders)),
                      f"{entry['id']}: loss and accuracy after each epoch.")
    found = {}  # several lines may have drawn one figure
    for line in drawn:
        command, run = line.split()[2], re.search(r"\{.+?\}", line)
        place = Path(fill(run[0]), "figures") if run else Path(runs, f"{entry['id']}-{command}")
        if command != "curves":
            found |= dict.fromkeys(sorted(place.glob(f"{command}*.png")), place.parent.name)
    for path, name in found.items():
        report.figure(f"{entry['id']}-{path.stem}", path, f"{entry['id']}: {path.stem}, {name}.")


# ---------------------------------------------------------------------------- commands


def title_of(checkpoint):
    """The network and how long it was trained, as figures name it."""
    name = checkpoint["settings"].get("name") or checkpoint["model"]
    return f"{name}, epoch {checkpoint['epoch']}"


def open_test(ckpt, device, data, root):
    """Network, checkpoint, and the test split of its data set (or of another)."""
    network, checkpoint = train.open_checkpoint(ckpt, device)
    return network, checkpoint, train.open_dataset(checkpoint, data, root).test


def need(out=None, **least):
    """ValueError naming the first of the flags `least` that is not above 0; or `out`, if given, as
    a file: a command that draws several figures needs a folder."""
    for name, value in least.items():
        if value <= 0:
            raise ValueError(f"{name}={value}: must be above 0")
    if out is not None and Path(out).suffix[1:] in FORMATS:
        raise ValueError(f"out={out}: this command draws several figures; name a folder")


def samples(data: str = "cifar10", root: str = "data", count: int = 10, seed: int = 0,
            out: str | None = None, format: Format = "png"):
    """Draw COUNT random training images with their classes, and the data set's figures."""
    need(count=count)
    dataset = datasets.load(data, root, val=0)
    images, labels = dataset.train
    chosen = torch.randperm(len(labels), generator=datasets.generator(seed, "samples"))[:count]
    statistics = {"pixel mean": dataset.mean, "pixel std": dataset.std,
                  "mean of the per-image stds": datasets.mean_of_image_stds(images)}
    name, title = Path(data).name, " · ".join(
        f"{what} {' '.join(f'{value:.4f}' for value in values)}"
        for what, values in statistics.items())
    figure = image_grid(images[chosen] / 255, [dataset.classes[label] for label in labels[chosen]],
                        min(count, 5), f"{name}: {len(labels)} training and "
                        f"{len(dataset.test.labels)} test images of {len(dataset.classes)} "
                        f"classes\n{title}")
    save_figure(figure, None, f"samples-{name}", out, format)


def curves(*runs: str, x: typing.Literal["epoch", "step", "seconds"] = "epoch",
           out: str | None = None, format: Format = "png"):
    """Draw the loss and accuracy of RUN [RUN…], training beside validation, in one figure.

    Runs that differ only in their seed become one line, the mean, in a band from lowest to
    highest. `--x=seconds` compares by time instead of epochs.
    """
    runs = [run for word in runs for run in word.split(",")]
    if not runs:
        raise ValueError("curves: name one run folder or more")
    save_figure(draw_curves(group_runs(runs), x), runs[0], "curves", out, format)


def predictions(ckpt: str, only: typing.Literal["all", "wrong", "right"] = "all", count: int = 8,
                seed: int = 0, out: str | None = None, format: Format = "png",
                data: str | None = None, root: str | None = None, device: str = "auto"):
    """Draw COUNT random test images with true and predicted class, probabilities and logits."""
    need(count=count)
    network, checkpoint, test = open_test(ckpt, device, data, root)
    order = torch.randperm(len(test.labels), generator=datasets.generator(seed, "predictions"))
    order = order[:count] if only == "all" else order
    images, labels = test.images[order], test.labels[order]
    logits = predict(network, images, checkpoint)
    right = logits.argmax(1) == labels
    kept = {"all": right | ~right, "wrong": ~right, "right": right}[only].nonzero()[:count, 0]
    if not len(kept):
        raise ValueError(f"only={only}: there is no such test image")
    figure = draw_predictions(
        pictures(images[kept], checkpoint), labels[kept], logits[kept], checkpoint["classes"],
        f"{title_of(checkpoint)}: probabilities and logits\n"
        f"blue: the true class, orange: what it was taken for")
    save_figure(figure, ckpt, f"predictions-{only}", out, format)


def confusion(ckpt: str, out: str | None = None, format: Format = "png", data: str | None = None,
              root: str | None = None, device: str = "auto"):
    """Draw the confusion matrix over the test images, and the accuracy of each class."""
    network, checkpoint, test = open_test(ckpt, device, data, root)
    predicted = predict(network, test.images, checkpoint).argmax(1)
    matrix = confusion_matrix(test.labels, predicted, len(checkpoint["classes"]))
    figure = draw_confusion(matrix, checkpoint["classes"],
                            f"{title_of(checkpoint)}: {matrix.trace() / matrix.sum():.2%} of "
                            f"{len(predicted)} test images right; per cent of each true class")
    save_figure(figure, ckpt, "confusion", out, format)


def pr_curves(ckpt: str, out: str | None = None, format: Format = "png", data: str | None = None,
              root: str | None = None, device: str = "auto"):
    """Draw every class's precision against recall over the test images."""
    network, checkpoint, test = open_test(ckpt, device, data, root)
    shares = predict(network, test.images, checkpoint).softmax(1)
    lines = [precision_recall(scores, test.labels == label)
             for label, scores in enumerate(shares.T)]
    mean = sum(line[2] for line in lines) / len(lines)
    figure = draw_pr_curves(lines, checkpoint["classes"],
                            f"{title_of(checkpoint)}: average precision of each class (mean "
                            f"{mean:.3f}), other classes in grey")
    save_figure(figure, ckpt, "pr_curves", out, format)


def filters(ckpt: str, layer: str = "conv1", channel: str = "rgb", out: str | None = None,
            format: Format = "png"):
    """Draw the filters of LAYER's first convolution: `--channel=rgb`, or the number of an input
    channel."""
    network, checkpoint = train.open_checkpoint(ckpt, "cpu")
    weights = next((module.weight.detach() for module in networks.find_layer(
        network, layer).modules() if isinstance(module, nn.Conv2d)), None)
    if weights is None:
        raise ValueError(f"layer={layer}: has no convolution")
    channels = weights.shape[1]
    title = f"{title_of(checkpoint)}: {layer}, {len(weights)} filters"
    if channel == "rgb" and channels == 3:
        images = 0.5 + weights / (2 * weights.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12))
        title += "\nin RGB, each on its own scale, grey is 0"
    elif channel in map(str, range(channels)):
        images = weights[:, int(channel)]
        title += f"\ninput channel {channel}, all on one scale"
    else:
        raise ValueError(f"channel={channel}: must be from 0 to {channels - 1}, or rgb for a layer "
                         f"that sees the image's three channels")
    save_figure(image_grid(images, suptitle=title, scale="shared"), ckpt,
                f"filters-{layer}-{channel}", out, format)


def features(ckpt: str, layers: tuple[str, ...] = ("conv1",), image: str | None = None,
             index: int = 0, maps: int = 64, out: str | None = None, format: Format = "png",
             data: str | None = None, root: str | None = None, device: str = "auto"):
    """Draw the first MAPS feature maps of each of LAYERS for one picture, one figure a layer."""
    need(out if len(layers) > 1 else None, maps=maps, layers=len(layers))
    network, checkpoint = train.open_checkpoint(ckpt, device)
    for layer in layers:
        networks.find_layer(network, layer)
    picture, name = load_image(checkpoint, image, index, data, root)
    pixels = inputs(picture, checkpoint, next(network.parameters()).device)
    for layer in layers:
        shown = feature_maps(network, layer, pixels)[0].cpu()
        count, vector = min(maps, len(shown)), shown[0].numel() == 1
        figure = image_grid(
            [*pictures(picture, checkpoint), *shown[:count]], ["image", *map(str, range(count))],
            scale="shared" if vector else "each",
            suptitle=f"{title_of(checkpoint)}: {layer} of {name}\n{count} of {len(shown)} maps, "
                     f"{'×'.join(map(str, shown.shape[1:]))}, "
                     f"{'all on one scale' if vector else 'each on its own scale'}")
        save_figure(figure, ckpt, f"features-{layer}", out, format)


def patches(ckpt: str, layer: str, units: tuple[int, ...] = (16,), top: int = 9,
            out: str | None = None, format: Format = "png", data: str | None = None,
            root: str | None = None, device: str = "auto"):
    """Draw the TOP test-image patches that excite each of LAYER's units most, cut exactly at
    their receptive fields. `--units=16` are 16 units of all; `--units=3,17` are those two."""
    need(top=top)
    network, checkpoint, test = open_test(ckpt, device, data, root)
    units = choose_units(network, layer, checkpoint, units)
    values, images, _, boxes = top_fields(network, layer, test.images, checkpoint, units, top)
    columns = values.shape[1]
    figure = image_grid(
        cut_patches(pictures(images, checkpoint), boxes), None, columns, cell=0.62, row_titles=[
            f"unit {unit}\n{peaks[0]:.2f} … {peaks[-1]:.2f}" for unit, peaks in zip(units, values)],
        suptitle=f"{title_of(checkpoint)}: {layer}, the {columns} patches of {len(test.labels)} "
                 f"test images\nthat excite a unit most")
    save_figure(figure, ckpt, f"patches-{layer}", out, format)


def landscape(ckpt: str, directions: typing.Literal["random", "pca"] = "random",
              images: int = 1000, points: int = 21, span: float = 1.0, seed: int = 0,
              out: str | None = None, format: Format = "png", data: str | None = None,
              root: str | None = None, device: str = "auto"):
    """Draw the loss around the weights (Li et al. 2018), on IMAGES training and test images each.

    `random`: along two filter-normalised directions, from −SPAN to SPAN: a line, contours and a
    surface. `pca`: over the plane of the run's own checkpoints, with the path of training.
    Values are kept in a CSV file as they come: the same command goes on where it was stopped,
    and draws at once when all are there.
    """
    need(out, images=images, span=span)
    if points < 3:
        raise ValueError(f"points={points}: must be at least 3")
    network, checkpoint = train.open_checkpoint(ckpt, device)
    axes, xs, ys, labels, trail = plane_of(network, ckpt, directions, seed, span, points)
    dataset = train.open_dataset(checkpoint, data, root)
    parts = {"train": datasets.subset(dataset.train, images, seed),
             "test": datasets.subset(dataset.test, images, seed)}
    key = fingerprint(network, dataset.name, images, seed, trail)
    table = figure_path(ckpt, "", out).with_name(f"landscape-{directions}-{key}.csv")
    title = (f"{title_of(checkpoint)}: loss on {len(parts['train'].labels)} training and "
             f"{len(parts['test'].labels)} test images")

    def values_at(places):
        return evaluate_points(table, places, lambda point: loss_at(
            network, axes, point, parts, checkpoint), f"loss at {len(places)} points")

    if directions == "random":
        line = values_at([(x, 0.0) for x in spaced(-span, span, 2 * points - 1)])
        save_figure(draw_landscape_line(line.values(), title), ckpt, "landscape-line", out, format)
    rows = values_at([*itertools.product(xs, ys)])
    grids = {name: grid_values(rows, xs, ys, f"{name}/loss") for name in parts}
    save_figure(draw_landscape_contours(xs, ys, grids, title, labels, trail), ckpt,
                f"landscape-contours-{directions}", out, format)
    save_figure(draw_landscape_surface(xs, ys, grids, title, labels), ckpt,
                f"landscape-surface-{directions}", out, format)
    print(table)


def plane_of(network, ckpt, directions, seed, span, points):
    """(two directions, the points along each, two names, the path of training or None).

    "random": filter-normalised, from −span to span. "pca": where the checkpoints of the run of
    `ckpt` lie best; it reaches a quarter beyond their path.
    """
    if directions == "random":
        axes = [filter_normalized_direction(network, datasets.generator(seed, "landscape", number))
                for number in (0, 1)]
        along = [spaced(-span, span, points)] * 2
        return axes, *along, ("first random direction", "second random direction"), None
    files = [*folder_of(ckpt).glob("step-*.pth"), *folder_of(ckpt).glob("last.pth")]
    found = [networks.read(file) for file in datasets.progress(files, "reading checkpoints")]
    weights = {checkpoint["step"]: checkpoint["weights"] for checkpoint in found}
    axes, shares, trail = principal_directions(network, [weights[step] for step in sorted(weights)])
    along = [spaced(low - (high - low) / 4, high + (high - low) / 4, points)
             for low, high in map(_span, trail.T)]
    labels = [f"principal direction {number} ({share:.1%} of the variance)"
              for number, share in enumerate(shares, 1)]
    return axes, *along, labels, trail.tolist()


def spaced(low, high, count):
    """`count` numbers from `low` to `high`; if they are symmetric and odd, 0 is exactly there."""
    return [(low * (count - 1 - place) + high * place) / (count - 1) for place in range(count)]


def smoothness(models: tuple[str, ...] = ("vgg_a", "vgg_a_bn"), data: str = "cifar10",
               root: str = "data", steps: int = 500, every: int = 10, batch_size: int = 128,
               lrs: tuple[float, ...] = (1e-3, 2e-3, 1e-4, 5e-4), seed: int = 0,
               out: str | None = None, format: Format = "png", device: str = "auto"):
    """Compare how smooth MODELS' losses are while they train: two measures, not one.

    The band between the highest and lowest training loss of separate runs at LRS, step by step;
    and Santurkar et al.'s (2018) three measures along the gradient of a step, taken each EVERY
    steps of the run at the first of LRS. Finished runs are kept in a CSV file beside the figure.
    """
    need(steps=steps, every=every, batch_size=batch_size, models=len(models), lrs=len(lrs),
         lr=min(lrs, default=0))
    for model in models:
        networks.options_of(model)
    key = fingerprint(nn.Module(), data, seed, steps, every, batch_size, lrs[0])
    table = figure_path(None, "", out).with_name(f"smoothness-{key}.csv")
    rows = read_table(table)
    done = {(row["model"], row["lr"]) for row in rows}
    missing = [run for run in itertools.product(models, lrs) if run not in done]
    dataset, place = missing and datasets.load(data, root, val=0), train.choose_device(device)
    for model, lr in missing:
        rows += smoothness_run(model, lr, dataset, place, steps, batch_size, seed,
                               every if lr == lrs[0] else 0)
        write_table(table, rows)
    title = (f"{Path(data).name}, batches of {batch_size}; bands: learning rates "
             f"{', '.join(f'{lr:g}' for lr in sorted(lrs))}; along the gradient: at {lrs[0]:g}, "
             f"steps of {lrs[0] / 2:g} to {4 * lrs[0]:g}")
    figure = draw_smoothness([row for row in rows if row["lr"] in lrs], models, title)
    save_figure(figure, None, "smoothness", out, format)
    print(table)


def projector(ckpt: str, layer: str | None = None, count: int = 1000, out: str | None = None,
              data: str | None = None, root: str | None = None, device: str = "auto"):
    """Write LAYER's view of COUNT test images for TensorBoard's Projector, with sprites, true and
    predicted classes. Without `--layer`, what the last linear layer sees; feature maps count by
    their means. It goes to `projector/LAYER` in the run's folder, or to OUT."""
    from torch.utils.tensorboard import SummaryWriter

    need(count=count)
    network, checkpoint = train.open_checkpoint(ckpt, device)
    leaves = [name for name, module in network.named_modules() if not [*module.children()]]
    last = [network.get_submodule(name) for name in leaves].index(networks.last_linear(network))
    layer = layer or leaves[last - 1]
    networks.find_layer(network, layer)
    test = datasets.subset(train.open_dataset(checkpoint, data, root).test, count, seed=0)
    vectors = torch.cat([maps.mean((2, 3)).float().cpu() for _, maps
                         in layer_batches(network, layer, test.images, checkpoint)])
    predicted, classes = predict(network, test.images, checkpoint).argmax(1), checkpoint["classes"]
    labels = [[classes[label], classes[guess], "right" if label == guess else "wrong"]
              for label, guess in zip(test.labels, predicted)]
    sprites = datasets.resize(test.images / 255, min(test.images.shape[3], 64)).clamp(0, 1)
    place = Path(out) if out else folder_of(ckpt) / "projector" / layer
    quiet = contextlib.redirect_stdout(io.StringIO())  # it announces what it writes anew
    with quiet, SummaryWriter(str(place)) as board:
        board.add_embedding(vectors, labels, sprites, tag=layer,
                            metadata_header=["class", "predicted", "verdict"])
    print(place)
    print(f"tensorboard --logdir {place}   (then: Projector)")


def report(what: str, runs: str = "runs/reproduce", out: str | None = None,
           data: str | None = None, root: str | None = None, device: str = "auto"):
    """Write a lab report: report.html, one page that holds its figures, and report.md.

    WHAT is the folder of a finished run; or a report or an id of experiments.toml, for a table of
    what was reported beside what the runs in the folder RUNS measured, and their figures. It goes
    to the run's folder, to RUNS/WHAT, or to OUT. `--data` and `--root` say where a run's images
    are if they have moved.
    """
    if Path(what).is_dir():
        made = report_of_run(Path(what), out or what, data=data, root=root, device=device)
    else:
        made = report_of_lab(what, runs, out or Path(runs, what))
    made.write()


COMMANDS = {command.__name__: command for command in (
    samples, curves, predictions, confusion, pr_curves, filters, features, patches, landscape,
    smoothness, projector, report)}

if __name__ == "__main__":
    datasets.command_line(COMMANDS)
