"""Pixels and labels: where images come from, and how they become training batches.

    python data.py stats --data=shapes
    python data.py download --data=cifar10
    python train.py --data=FOLDER            # FOLDER/train/<class>/*, FOLDER/test/<class>/*

A data set is held in memory as one uint8 tensor. A training batch is gathered, cropped, flipped
and normalised by a handful of whole-batch operations on the device that trains, and which images
it holds, and how they are changed, depends on (seed, epoch, step) alone.
"""

import contextlib
import functools
import hashlib
import inspect
import io
import itertools
import math
import os
import re
import sys
import types
import typing
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Random crops move an image by up to 4 pixels of 32 (He et al. 2016, section 4.2); other image
# sizes move by the same eighth. Cutout blanks a quarter of the side (DeVries & Taylor 2017 use
# 16 of 32 for long runs; 8 costs short runs less).
CROP = 1 / 8
CUTOUT = 1 / 4
AUGMENTATIONS = ("flip", "alternating_flip", "crop", "cutout")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "bar", "flower", "crescent",
          "half")
MAX_PIXELS = 1 << 26


# ---------------------------------------------------------------------------- the data set


class Split(typing.NamedTuple):
    """One part of a data set: `images` N×3×H×W uint8 (channels last in memory), `labels` N."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test images with the class names and the training pixels' statistics.

    `mean` and `std` have one value per channel, in units of a pixel value scaled to 0…1. `val` is
    None when nothing is held out.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(data="cifar10", root="data", image_size=None, val=None, seed=0, limit=None,
         skip_bad=False):
    """Load a data set into memory and return it as a `Dataset`.

    `data` is `cifar10`, `cifar100`, `shapes` or a folder `train/<class>/*`, `test/<class>/*`.
    `val` training images, as many of each class, chosen by `seed`, are held out (None: a tenth).
    `limit` keeps so many training, validation and test images. Raises ValueError for a setting
    that makes no sense and OSError for files that are missing or cannot be read.
    """
    if data in ("cifar10", "cifar100"):
        classes, train, test = _cifar(data, root)
    elif data == "shapes":
        classes, train, test = SHAPES, draw_shapes(10_000, seed=1), draw_shapes(2_000, seed=2)
    else:
        classes, train, test = _folder(Path(data), Path(root), image_size, skip_bad)
    train, held_out = split_off(train, len(train.labels) // 10 if val is None else val, seed)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit={limit}: at least one image is needed")
        train, test = (subset(part, limit, seed) for part in (train, test))
        held_out = held_out and subset(held_out, limit, seed)
    mean, std = pixel_statistics(train.images)
    return Dataset(data, tuple(classes), train, held_out, test, mean, std)


def split_off(split, count, seed):
    """Hold `count` images out of `split`, as many of each class as possible, chosen by `seed`.

    Returns (rest, held out); the second is None for `count` 0.
    """
    if not 0 <= count < len(split.labels):
        raise ValueError(f"val={count}: must be from 0 to {len(split.labels) - 1}, "
                         f"less than the {len(split.labels)} training images")
    if count == 0:
        return split, None
    order = torch.randperm(len(split.labels), generator=generator(seed, "val"))
    # Rank every image within its class in the shuffled order; the lowest ranks are held out.
    shuffled = split.labels[order]
    by_class = torch.argsort(shuffled, stable=True)
    sizes = torch.bincount(shuffled)
    rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[shuffled[by_class]]
    held = order[by_class[torch.argsort(rank, stable=True)[:count]]].sort().values
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[held] = False
    return (Split(split.images[keep], split.labels[keep]),
            Split(split.images[held], split.labels[held]))


def subset(split, count, seed):
    """`count` images of `split` (all if it has no more), balanced by class, chosen by `seed`."""
    if count >= len(split.labels):
        return split
    return split_off(split, count, seed)[1]


def pixel_statistics(images):
    """Per-channel mean and standard deviation over all pixels, exactly, from 256-bin histograms.

    For CIFAR-10's 50 000 training images: mean .4914 .4822 .4465, std .2470 .2435 .2616.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        share = counts / counts.sum()
        mean.append((share * levels).sum().item())
        variance = (share * (levels - mean[-1]) ** 2).sum().item()
        std.append(max(variance**0.5, 1e-3))
    return tuple(mean), tuple(std)


def mean_of_image_stds(images):
    """Per-channel mean of every single image's own std: .2023 .1994 .2010 for CIFAR-10.

    Often quoted as "the std of CIFAR-10", which it is not: it leaves out how images differ.
    """
    stds = [chunk.double().div(255).std(dim=(2, 3), correction=0) for chunk in images.split(5_000)]
    return tuple(torch.cat(stds).mean(0).tolist())


def generator(*keys):
    """A CPU random generator whose stream is a pure function of `keys`."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# ---------------------------------------------------------------------------- sources


def _channels_last(images):
    """N×H×W×3 pixels as an N×3×H×W tensor that keeps its channels last in memory."""
    return images.permute(0, 3, 1, 2)


def _cifar(name, root):
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                parts = [source(root, train=train) for train in (True, False)]
            except RuntimeError:  # not there yet, or damaged
                parts = [source(root, train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision reports a failed download in many ways
        raise FileNotFoundError(
            f"{name} is not in {root!r} and cannot be downloaded ({str(error).splitlines()[0]}). "
            f"Put {source.filename} (MD5 {source.tgz_md5}) from {source.url} into {root!r}, or go "
            f"on without it: --data=shapes (built in) or --data=FOLDER (train/<class>/*, "
            f"test/<class>/*)") from error
    splits = [Split(_channels_last(torch.from_numpy(part.data)), torch.tensor(part.targets))
              for part in parts]
    return parts[0].classes, *splits


def read_image(path, size=None):
    """Read any picture file as a 3×H×W uint8 RGB tensor; `size` resizes it to size×size.

    EXIF rotation is applied, transparency is laid on white, of an animation the first frame is
    taken, 16-bit grey is scaled to 8 bits. Raises OSError naming a file that cannot be decoded.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels are too many")
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):
                    image = image.convert("I").point(lambda value: value / 257).convert("L")
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image)
                image = image.convert("RGB")
                if size and image.size != (size, size):
                    image = image.resize((size, size), Image.Resampling.LANCZOS)
                width, height = image.size
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image file") from None
    except Exception as error:  # decoders raise whatever they like on a damaged file
        raise OSError(f"{path}: cannot be read as an image ({error})") from error
    return pixels.view(height, width, 3).permute(2, 0, 1)


def _folder(folder, root, image_size, skip_bad):
    """Images of `folder`, from a cache file in `root` when nothing has changed since it was made.

    Images larger than `image_size`, or not square, are resized to it; smaller square ones are
    kept as they are when all have one size, and enlarged batch by batch on the device.
    """
    files, classes = _list_folder(folder)
    key = repr((str(folder.resolve()), image_size, skip_bad, files))
    cache = root / f"folder-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.pt"
    if cache.exists():
        with contextlib.suppress(Exception):  # a damaged cache is made again
            parts = torch.load(cache, weights_only=True, mmap=True)
            return classes, *(Split(_channels_last(parts[f"{name}_images"].clone()),
                                    parts[f"{name}_labels"].clone()) for name in files)
    splits = _decode(files, image_size, skip_bad)
    saved = {f"{name}_images": part.images.permute(0, 2, 3, 1) for name, part in splits.items()}
    saved |= {f"{name}_labels": part.labels for name, part in splits.items()}
    partial = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        root.mkdir(parents=True, exist_ok=True)
        torch.save(saved, partial)
        os.replace(partial, cache)
    except (OSError, RuntimeError) as error:  # RuntimeError is torch's word for a full disk
        print(f"{cache}: cannot be written ({getattr(error, 'strerror', None) or 'disk full?'}); "
              f"the images will be read again the next time", file=sys.stderr)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return classes, *splits.values()


def _list_folder(folder):
    """{"train": [(path, label, bytes, time changed), …], "test": […]} and the class names."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data={str(folder)!r}: no such data set or folder (cifar10, cifar100, shapes, or a "
            f"folder with train/<class>/* and test/<class>/*)")
    classes = {}
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder}: has no folder {part!r} (needed: train/<class>/*, "
                                    f"test/<class>/*)")
        classes[part] = sorted(entry.name for entry in (folder / part).iterdir() if entry.is_dir())
    odd = sorted(set(classes["train"]) ^ set(classes["test"]))
    if odd or not classes["train"]:
        raise ValueError(f"{folder}: train and test must have the same classes, and at least one; "
                         f"in one of them only: {', '.join(odd) or 'none at all'}")
    files = {"train": [], "test": []}
    for part, label in itertools.product(files, range(len(classes["train"]))):
        place = folder / part / classes["train"][label]
        with os.scandir(place) as entries:
            found = sorted((entry.path, label, entry.stat().st_size, entry.stat().st_mtime_ns)
                           for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES))
        if not found:
            raise ValueError(f"{place}: no images ({', '.join(IMAGE_SUFFIXES)}) in this class")
        files[part] += found
    return files, classes["train"]


def _decode(files, image_size, skip_bad):
    def decode(item):
        try:
            image = read_image(item[0])
            if image_size and (max(image.shape[1:]) > image_size
                               or image.shape[1] != image.shape[2]):
                image = read_image(item[0], image_size)
            return image
        except OSError as error:
            if skip_bad:
                return error
            raise OSError(f"{error}; --skip_bad leaves such files out") from error

    decoded = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part, items in files.items():
            try:
                images = list(progress(pool.map(decode, items), f"reading {part}", len(items)))
            except OSError:
                pool.shutdown(cancel_futures=True)
                raise
            for bad in (image for image in images if isinstance(image, OSError)):
                print(f"left out: {bad}", file=sys.stderr)
            decoded[part] = [(image, item[1]) for image, item in zip(images, items)
                             if not isinstance(image, OSError)]
    sizes = {tuple(image.shape) for items in decoded.values() for image, _ in items}
    if len(sizes) > 1 and not image_size:
        raise ValueError(f"the images have {len(sizes)} different sizes: give --image_size")
    splits = {}
    for part, items in decoded.items():
        if not items:
            raise ValueError(f"{part}: not one image could be read")
        images = [image if len(sizes) == 1 else _resize(image, image_size) for image, _ in items]
        pixels = torch.stack([image.permute(1, 2, 0) for image in images])
        splits[part] = Split(_channels_last(pixels), torch.tensor([label for _, label in items]))
    return splits


def _resize(image, size):
    if image.shape[1:] == (size, size):
        return image
    resized = F.interpolate(image[None].float(), (size, size), mode="bicubic", antialias=True)
    return resized[0].round().clamp(0, 255).byte()


@functools.lru_cache(maxsize=4)
def draw_shapes(count, seed):
    """Draw `count` 32×32 RGB images of ten shapes: a task that needs shape, not colour or place.

    Position, size, rotation, both colours, background clutter and noise vary at random; labels
    index `SHAPES`. The same `count` and `seed` give the same images everywhere.
    """
    parts = [_draw_chunk(torch.arange(start, min(start + 2_000, count)) % 10,
                         generator("shapes", seed, start)) for start in range(0, count, 2_000)]
    return Split(_channels_last(torch.cat([images for images, _ in parts])),
                 torch.cat([labels for _, labels in parts]))


def _draw_chunk(labels, random):
    n = len(labels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=random)

    grid = torch.arange(32) + 0.5
    y, x = (grid[:, None] - uniform(11, 21, 1, 1)), (grid[None, :] - uniform(11, 21, 1, 1))
    angle, radius = uniform(0, 2 * math.pi, 1, 1), uniform(7, 12, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / radius
    v = (y * angle.cos() - x * angle.sin()) / radius
    inside = _shape_fields(u, v)[labels, torch.arange(n)]
    mask = torch.sigmoid(inside * radius * 3)[..., None]

    # The background: a colour, a gradient, and three discs of clutter smaller than any shape.
    back, fore = uniform(0, 1, 1, 1, 3), uniform(0, 1, 1, 1, 3)
    fore = torch.where((fore - back).abs().amax(-1, keepdim=True) < 0.4, 1 - back.round(), fore)
    image = back + uniform(-0.3, 0.3, 1, 1, 3) * (x / 16)[..., None]
    for _ in range(3):
        spot = ((grid[:, None] - uniform(0, 32, 1, 1)) ** 2
                + (grid[None, :] - uniform(0, 32, 1, 1)) ** 2).sqrt() - uniform(1, 3, 1, 1)
        image = image.lerp(uniform(0, 1, 1, 1, 3), torch.sigmoid(-3 * spot)[..., None])
    image = image.lerp(fore, mask) + 0.06 * torch.randn(n, 32, 32, 3, generator=random)
    return image.mul(255).round().clamp(0, 255).byte(), labels


def _shape_fields(u, v):
    """Ten fields over the unit disc, positive inside the shape, in the order of `SHAPES`."""
    r = (u**2 + v**2).sqrt()
    box = torch.maximum(u.abs(), v.abs())
    sides = [u * math.cos(a) + v * math.sin(a) for a in (0.5236, 2.618, 4.7124)]
    arms = torch.maximum(torch.minimum(0.28 - u.abs(), 1 - v.abs()),
                         torch.minimum(0.28 - v.abs(), 1 - u.abs()))
    return torch.stack([
        0.85 - r,
        0.22 - (r - 0.75).abs(),
        0.75 - box,
        0.18 - (box - 0.7).abs(),
        0.5 - torch.stack(sides).amax(0),
        arms,
        torch.minimum(0.25 - v.abs(), 1 - u.abs()),
        0.6 + 0.35 * torch.cos(5 * torch.atan2(v, u)) - r,
        torch.minimum(0.95 - r, ((u - 0.5) ** 2 + v**2).sqrt() - 0.65),
        torch.minimum(0.95 - r, u),
    ])


# ---------------------------------------------------------------------------- batches


def normalize(images, mean, std, image_size=None, device=None):
    """uint8 N×3×H×W pixels as normalised float32 on `device`, resized to `image_size`.

    (pixel / 255 − mean) / std per channel; the result is channels-last in memory.
    """
    images = images.to(device or images.device)
    pixels = images.permute(0, 2, 3, 1).flatten(2).float()  # rows of W·3 values
    scale, shift = _row_constants(mean, std, images.shape[3], images.device)
    pixels = pixels.mul_(scale).add_(shift).unflatten(2, (-1, 3))
    return resize(_channels_last(pixels), image_size)


@functools.lru_cache(maxsize=8)
def _row_constants(mean, std, width, device):
    """x ↦ x·scale + shift for a row of `width` RGB pixels, as two vectors of width·3 values."""
    scale = torch.tensor([1 / (255 * s) for s in std]).repeat(width)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)]).repeat(width)
    return scale.to(device), shift.to(device)


def resize(images, size):
    """Float N×3×H×W images resized to N×3×size×size (bilinear); None or the same size: as is."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=size < images.shape[3])


class Batches:
    """Endless, reproducible training batches of one split, augmented as whole batches.

    `batches.epoch(epoch, start)` yields (images B×3×S×S float32, labels B) from step `start` on.
    All random choices of an epoch are drawn before it begins from (seed, epoch), so that any
    step can be made without the ones before it. An incomplete last batch is left out; every
    epoch shuffles anew, so no image is left out for good. With `world` processes, number `rank`
    gets every world-th image of the same global batch.
    """

    def __init__(self, split, mean, std, batch_size, augment=(), seed=0, image_size=None,
                 device="cpu", rank=0, world=1):
        unknown = [name for name in augment if name not in AUGMENTATIONS]
        if unknown:
            raise ValueError(f"augment={','.join(augment)}: no augmentation {unknown[0]!r}; "
                             f"known: {', '.join(AUGMENTATIONS)}, none")
        self.batch_size = min(batch_size, len(split.labels))
        if self.batch_size < world:
            raise ValueError(f"batch_size={self.batch_size}: fewer images than the {world} "
                             f"processes that share a batch")
        self.augment, self.seed, self.image_size = augment, seed, image_size
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.labels = split.labels.to(self.device)
        self.mean, self.std = tuple(mean), tuple(std)
        self.size = split.images.shape[3]
        self.margin = round(self.size * CROP) if "crop" in augment else 0
        self.side = self.size + 2 * self.margin
        # One row of `windows` for every pixel: the `size` pixels from there to the right. They
        # overlap in memory, so a crop is a gather of contiguous bytes and nothing is copied twice.
        pixels = self._store(split.images.to(self.device))
        self.windows = pixels.as_strided((pixels.numel() // 3 - self.size + 1, self.size * 3),
                                         (3, 1))
        self.rows = torch.arange(self.size, device=self.device) * self.side

    def _store(self, images):
        """The images with reflected margins, followed by their mirror images if any flip is on."""
        pixels, margin = images.permute(0, 2, 3, 1), self.margin
        for dim in (1, 2):
            before = pixels.narrow(dim, 1, margin).flip(dim)
            after = pixels.narrow(dim, self.size - 1 - margin, margin).flip(dim)
            pixels = torch.cat([before, pixels, after], dim)
        if "flip" in self.augment or "alternating_flip" in self.augment:
            pixels = torch.cat([pixels, pixels.flip(2)])
        return pixels.contiguous()

    def __len__(self):
        """Steps an epoch."""
        return len(self.labels) // self.batch_size

    def plan(self, epoch, crop=True):
        """The whole epoch's choices, in order: first pixel of each crop, label, cutout corner."""
        random, count = generator(self.seed, epoch), len(self.labels)
        order = torch.randperm(count, generator=random)
        mirrored = torch.rand(count, generator=random) < 0.5
        shift = torch.randint(0, 2 * self.margin + 1, (2, count), generator=random)
        corner = torch.randint(0, self.size, (2, count), generator=random)
        if not crop:
            shift.fill_(self.margin)
        if "alternating_flip" in self.augment:  # every image is seen both ways in two epochs
            first = torch.rand(count, generator=generator(self.seed, "flip")) < 0.5
            mirrored = first[order] ^ bool(epoch % 2)
        elif "flip" not in self.augment:
            mirrored = torch.zeros(count, dtype=torch.bool)
        image = order + count * mirrored
        first_pixel = (image * self.side + shift[0]) * self.side + shift[1]
        order = order.to(self.device)
        return first_pixel.to(self.device), self.labels[order], corner.to(self.device)

    def epoch(self, epoch, start=0, size=None, crop=True):
        """Yield the batches of `epoch` from step `start` on, of side `size` if that is given.

        Without `crop` no image is moved, whatever the augmentation.
        """
        first_pixel, labels, corner = self.plan(epoch, crop)
        scale, shift = _row_constants(self.mean, self.std, self.size, self.device)
        for step in range(start, len(self)):
            mine = slice(step * self.batch_size + self.rank, (step + 1) * self.batch_size,
                         self.world)
            rows = (first_pixel[mine, None] + self.rows).flatten()
            pixels = self.windows.index_select(0, rows).float().mul_(scale).add_(shift)
            pixels = pixels.view(-1, self.size, self.size, 3)
            if "cutout" in self.augment:
                pixels.mul_(self._cutout_mask(corner[:, mine]))
            yield resize(_channels_last(pixels), size or self.image_size), labels[mine]

    def _cutout_mask(self, corner):
        """B×S×S×1: 0 in a square around each of the 2×B `corner` points, 1 elsewhere."""
        place = torch.arange(self.size, device=self.device)
        half = self.size * CUTOUT / 2
        near = (place - corner[..., None] + 0.5).abs() <= half
        return ~(near[0][:, :, None] & near[1][:, None, :])[..., None]


# ---------------------------------------------------------------------------- command line


def progress(items, description, total=None):
    """Iterate over `items` with a bar on standard error, shown on terminals only."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description, total=total, console=console, transient=True,
                 disable=not console.is_terminal)


def print_table(header, rows, title=None):
    """Print rows of text below their header."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)


def parse_value(name, text, kind):
    """The value that `text` stands for as type `kind`; ValueError names flag, value and kind.

    Lists are separated by `,` or `+`; `none` is None, or an empty list.
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if type(None) in typing.get_args(kind) and text.lower() == "none":
            return None
        kinds = [option for option in typing.get_args(kind) if option is not type(None)]
        for option in kinds[:-1]:
            with contextlib.suppress(ValueError):
                return parse_value(name, text, option)
        return parse_value(name, text, kinds[-1])
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise ValueError(f"--{name}={text}: must be one of {', '.join(typing.get_args(kind))}")
        return text
    if typing.get_origin(kind) is tuple:
        parts = [] if text.lower() in ("", "none") else re.split("[,+]", text)
        return tuple(parse_value(name, part, typing.get_args(kind)[0]) for part in parts)
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"--{name}={text}: takes no value, or true or false")
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"--{name}={text}: must be {_kind_name(kind)}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{name}={text}: must be a finite number")
    return value


def _kind_name(kind):
    return {int: "a whole number", float: "a number", str: "text"}.get(kind, str(kind))


def command_line(commands, default=None, argv=None):
    """Run one of `commands` (name → function) with the flags of the command line; then exit.

    Fire matches words to a function's parameters; the function runs only after Fire has consumed
    every word and each value has been converted to its parameter's annotated type. A function
    with `**flags` receives the other flags as text. `default` is the command meant by a line
    that begins with a flag. Help exits with 0; ValueError and OSError become one line and 2.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if default and (not words or words[0].startswith("-")):
        words = [default, *words]
    wants_help = {"--help", "-h", "help"} & set(words) or not words
    try:
        if wants_help:
            print(_help(commands, words))
            sys.exit(0)
        if words[0] not in commands:
            raise ValueError(f"no command {words[0]!r}; commands: {', '.join(commands)}")
        _parse(commands, words)()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _parse(commands, words):
    """Let Fire match `words` to a command and return the call, ready to be made."""
    import fire

    pending = []

    def deferred(function):
        @fire.decorators.SetParseFn(str)
        @functools.wraps(function)
        def collect(*positional, **flags):
            # Words for a `*name` parameter are handed over as one list, as positional arguments.
            parameters = inspect.signature(function).parameters.values()
            listed = any(p.kind is p.VAR_POSITIONAL for p in parameters)
            if not listed:
                flags |= dict(zip([p.name for p in parameters], positional))
            hints = typing.get_type_hints(function)
            values = {name: parse_value(name, value, hints[name])
                      if name in hints and isinstance(value, str) else value
                      for name, value in flags.items()}
            pending.append(functools.partial(function, *(positional if listed else ()), **values))
        return collect

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            fire.Fire({words[0]: deferred(commands[words[0]])}, command=words)
    except SystemExit as leave:
        trace = getattr(leave, "trace", None)
        reason = trace.elements[-1].ErrorAsStr() if trace and trace.HasError() else "bad usage"
        raise ValueError(f"{words[0]}: {reason} (see: {words[0]} --help)") from None
    if not pending:
        raise ValueError(f"{words[0]}: cannot make sense of {' '.join(words[1:])!r}")
    return pending[-1]


def _help(commands, words):
    """Help text for one command, or for all; a command's `help` attribute adds to its docstring."""
    chosen = [word for word in words if word in commands] or list(commands)
    lines = [f"usage: python {Path(sys.argv[0]).name} COMMAND [--flag=value …]",
             f"commands: {', '.join(commands)}"]
    for name in chosen[:1] if words and words[0] in commands else chosen:
        function = commands[name]
        lines += ["", name, inspect.getdoc(function) or ""]
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            required = parameter.default is parameter.empty
            lines.append(f"  {parameter.name.upper()}" if required
                         else f"  --{parameter.name}={parameter.default}")
        if hasattr(function, "help"):
            lines.append(function.help(words))
    return "\n".join(lines)


def stats(data: str = "cifar10", root: str = "data", image_size: int | None = None,
          skip_bad: bool = False):
    """Print a data set's sizes, classes and pixel statistics, each named for what it is."""
    dataset = load(data, root, image_size=image_size, val=0, skip_bad=skip_bad)
    images, sizes = dataset.train.images, torch.bincount(dataset.train.labels).tolist()
    channels = {"pixel mean": dataset.mean, "pixel std": dataset.std,
                "mean of the per-image stds (not the pixel std)": mean_of_image_stds(images)}
    print_table(("what", "value"), [
        ("training images", f"{len(images)}"),
        ("test images", f"{len(dataset.test.images)}"),
        ("size", "×".join(map(str, images.shape[1:]))),
        (f"{len(dataset.classes)} classes", ", ".join(dataset.classes)),
        ("training images of a class", f"{min(sizes)} to {max(sizes)}"),
        *((what, " ".join(f"{value:.4f}" for value in values))
          for what, values in channels.items())], title=f"data={data}")


def download(data: str = "cifar10", root: str = "data"):
    """Download `cifar10` or `cifar100` (with torchvision, which checks it) into ROOT."""
    if data not in ("cifar10", "cifar100"):
        raise ValueError(f"data={data}: only cifar10 and cifar100 can be downloaded")
    load(data, root)
    print(f"{data} is in {root}")


if __name__ == "__main__":
    command_line({"stats": stats, "download": download})
