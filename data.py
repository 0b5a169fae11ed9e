"""Pixels and labels: where images come from, and how they become training batches.

    python data.py stats --data=shapes
    python data.py download --data=cifar10
    python train.py --data=FOLDER            # FOLDER/train/<class>/*, FOLDER/test/<class>/*

A data set is held in memory as one uint8 tensor. A training batch is gathered, cropped, flipped
and normalised by a handful of whole-batch operations on the device that trains, and which images
it holds, and how they are changed, depends on (seed, epoch, step) alone.
"""

import contextlib
import csv
import functools
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import time
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
    None when nothing is held out. `fingerprint` changes with the files behind a folder (their
    names and sizes, wherever the folder lies); built-in sets have one that never does.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split | None
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str = ""


def load(data="cifar10", root="data", image_size=None, val=None, seed=0, limit=None,
         skip_bad=False, writes=True):
    """Load a data set into memory and return it as a `Dataset`.

    `data` is `cifar10`, `cifar100`, `shapes` or a folder `train/<class>/*`, `test/<class>/*`.
    `val` training images, as many of each class, chosen by `seed`, are held out (None: a tenth).
    `limit` keeps so many training, validation and test images. Without `writes` nothing is
    downloaded and no cache is made in `root`: for settings that somebody else's file brought.
    Raises ValueError for a setting that makes no sense and OSError for files that are missing or
    cannot be read.
    """
    classes, (train, test), fingerprint = _read_parts(("train", "test"), data, root, image_size,
                                                      skip_bad, writes)
    train, held_out = split_off(train, len(train.labels) // 10 if val is None else val, seed)
    train, test = (subset(split, limit, seed) for split in (train, test))
    held_out = held_out and subset(held_out, limit, seed)
    mean, std = pixel_statistics(train.images)
    return Dataset(data, classes, train, held_out, test, mean, std, fingerprint)


def load_split(part, data="cifar10", root="data", image_size=None, seed=0, limit=None,
               skip_bad=False, writes=True):
    """Load one part, "train" or "test", of a data set: (class names, `Split`). See `load`."""
    classes, (split,), _ = _read_parts((part,), data, root, image_size, skip_bad, writes)
    return classes, subset(split, limit, seed)


def _read_parts(parts, data, root, image_size, skip_bad, writes):
    """The class names, a `Split` for each of `parts`, and the fingerprint of what `data` names."""
    fingerprint = data
    if data in ("cifar10", "cifar100"):
        classes, splits = _cifar(data, root, parts, writes)
    elif data == "shapes":
        sizes = {"train": (10_000, 1), "test": (2_000, 2)}  # number of images, seed
        classes, splits = SHAPES, [draw_shapes(*sizes[part]) for part in parts]
    else:
        classes, splits, fingerprint = _folder(Path(data), Path(root), image_size, skip_bad, parts,
                                               writes)
    return tuple(classes), splits, fingerprint


def split_off(split, count, seed):
    """Hold `count` images out of `split`, as many of each class as possible, chosen by `seed`.

    Returns (rest, held out); the second is None for `count` 0.
    """
    if not 0 <= count < len(split.labels):
        raise ValueError(f"val={count}: must be from 0 to {len(split.labels) - 1}, "
                         f"less than the {len(split.labels)} training images")
    if count == 0:
        return split, None
    # Each class is shuffled; then images are dealt in turn, one of every class a round.
    order = torch.randperm(len(split.labels), generator=generator(seed, "val"))
    turn, classes = torch.empty_like(order), split.labels.unique()
    for number, label in enumerate(classes):
        members = order[split.labels[order] == label]
        turn[members] = torch.arange(len(members)) * len(classes) + number
    held = turn.argsort()[:count].sort().values
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[held] = False
    return (Split(split.images[keep], split.labels[keep]),
            Split(split.images[held], split.labels[held]))


def subset(split, count, seed):
    """`count` images of `split`, balanced by class, chosen by `seed`; all of them for None, or
    if it has no more. ValueError for none at all."""
    if count is not None and count < 1:
        raise ValueError(f"limit={count}: at least one image is needed")
    if count is None or count >= len(split.labels):
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


def _cifar(name, root, parts, writes):
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                found = [source(root, train=part == "train") for part in parts]
            except RuntimeError:  # not there yet, or damaged
                if not writes:
                    raise
                found = [source(root, train=part == "train", download=True) for part in parts]
    except Exception as error:  # torchvision reports a failed download in many ways
        reason = f"cannot be downloaded ({str(error).splitlines()[0]})" if writes else (
            "is not downloaded to where a checkpoint says: give --root=FOLDER")
        raise FileNotFoundError(
            f"{name} is not in {root!r} and {reason}. "
            f"Put {source.filename} (MD5 {source.tgz_md5}) from {source.url} into {root!r}, or go "
            f"on without it: --data=shapes (built in) or --data=FOLDER (train/<class>/*, "
            f"test/<class>/*)") from error
    return found[0].classes, [Split(_channels_last(torch.from_numpy(part.data)),
                                    torch.tensor(part.targets)) for part in found]


def read_image(path, size=None, only_larger=False):
    """Read any picture file as a 3×H×W uint8 RGB tensor; `size` resizes it to size×size.

    With `only_larger` a square picture that is smaller stays as it is. EXIF rotation is applied,
    transparency is laid on white, of an animation the first frame is taken, 16-bit grey is scaled
    to 8 bits. Raises OSError naming a file that cannot be decoded.
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
                fits = image.width == image.height and (
                    image.width == size or (only_larger and image.width < (size or math.inf)))
                if size and not fits:
                    image = image.resize((size, size), Image.Resampling.LANCZOS)
                width, height = image.size
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image file") from None
    except Exception as error:  # decoders raise whatever they like on a damaged file
        raise OSError(f"{path}: cannot be read as an image ({error})") from error
    return pixels.view(height, width, 3).permute(2, 0, 1)


def _folder(folder, root, image_size, skip_bad, parts, writes):
    """Class names, the `parts` and the fingerprint of `folder`, from a cache file in `root` when
    nothing has changed since it was made.

    Images larger than `image_size`, or not square, are resized to it; smaller square ones are
    kept as they are when all have one size, and enlarged batch by batch on the device.
    """
    files, classes = _list_folder(folder)
    names = [(part, Path(path).parent.name, Path(path).name, size)
             for part in files for path, _, size, _ in files[part]]
    fingerprint = hashlib.blake2b(repr(names).encode(), digest_size=16).hexdigest()
    key = repr((str(folder.resolve()), image_size, skip_bad, files))
    cache = root / f"folder-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.pt"
    if cache.exists():
        with contextlib.suppress(Exception):  # a damaged cache is made again
            saved = torch.load(cache, weights_only=True, mmap=True)
            return classes, [Split(_channels_last(saved[f"{part}_images"].clone()),
                                   saved[f"{part}_labels"].clone())
                             for part in parts], fingerprint
    splits = _decode(files, image_size, skip_bad)
    if not writes:
        return classes, [splits[part] for part in parts], fingerprint
    saved = {f"{name}_images": split.images.permute(0, 2, 3, 1) for name, split in splits.items()}
    saved |= {f"{name}_labels": split.labels for name, split in splits.items()}
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
    return classes, [splits[part] for part in parts], fingerprint


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
        class_folder = folder / part / classes["train"][label]
        with os.scandir(class_folder) as entries:
            found = sorted((entry.path, label, entry.stat().st_size, entry.stat().st_mtime_ns)
                           for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES))
        if not found:
            raise ValueError(f"{class_folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it")
        files[part] += found
    return files, classes["train"]


def _decode(files, image_size, skip_bad):
    def decode(item):
        try:
            return read_image(item[0], image_size, only_larger=True)
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


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images: side in pixels, mean and std per channel (in units of a
    pixel value scaled to 0…1), and the `precision` in which it computes, "fp32" or "bf16"."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str = "fp32"

    def __call__(self, images, device=None):
        """uint8 N×3×H×W images as the network takes them: normalised, N×3×S×S, on `device`."""
        return normalize(images, self.mean, self.std, self.image_size, device)

    def pictures(self, images):
        """uint8 images as the network sees them, for people: floats 0…1, N×3×S×S."""
        return resize(images.float() / 255, self.image_size).clamp(0, 1)


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


def windows_of(pixels, size):
    """One row for every pixel of N×H×W×3 `pixels`, a view: the `size` pixels from it rightwards.

    The rows overlap in memory, so that a crop is a gather of contiguous bytes and nothing is
    copied twice. Pixels of a 4×4 image, numbered, and the windows of `size` 2:

         0  1  2  3      windows: 0 = (0, 1), 1 = (1, 2), … 5 = (5, 6), … 9 = (9, 10), …
         4  5  6  7      The 2×2 crop whose first pixel is 5 is windows 5 and 5 + 4 = 9:
         8  9 10 11          5  6
        12 13 14 15          9 10

    A window may run over the end of a line; the crops that are drawn never begin there.
    """
    return pixels.as_strided((pixels.numel() // 3 - size + 1, size * 3), (3, 1))


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
        self.windows = windows_of(self._store(split.images.to(self.device)), self.size)
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
        line = torch.arange(self.size, device=self.device)
        half = self.size * CUTOUT / 2
        near = (line - corner[..., None] + 0.5).abs() <= half
        return ~(near[0][:, :, None] & near[1][:, None, :])[..., None]


# ---------------------------------------------------------------------------- files and tables


def write_atomically(path, content, older=None):
    """Replace the file `path` by bytes or text `content`, all or nothing.

    A reader of `path` sees the old file or the new one, also after a crash or on a full disk. The
    old file becomes the file `older`, if that is given. OSError names the file and the cause.
    """
    path = Path(path)
    partial_file = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial_file, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if older and path.exists():
            os.replace(path, older)
        os.replace(partial_file, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial_file.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written ({error.strerror}); "
                      f"the file before it, if any, is unchanged") from error


@contextlib.contextmanager
def writing(path):
    """A context whose OSErrors say that `path` cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error})") from error


def append(path, content):
    """Add bytes `content` to the file `path`; OSError names the file and the cause."""
    with writing(path), open(path, "ab") as file:
        file.write(content)


def read_json(path, meaning):
    """`meaning` of what a JSON file holds; ValueError or OSError name what is wrong with it."""
    try:
        if os.path.getsize(path) > 1 << 24:
            raise ValueError("too large")
        return meaning(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


@contextlib.contextmanager
def lock(folder):
    """Hold a run's folder; `Busy` when another process does. A dead process holds nothing.

    A folder in which nothing was done does not remain.
    """
    from filelock import FileLock, Timeout

    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise Busy(f"{folder}: another process is training this run") from None
    try:
        yield
    finally:
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
            with contextlib.suppress(OSError):  # not empty: of use to somebody else
                for path in new:
                    path.rmdir()
        held.release()


class Busy(ValueError):
    """The run folder is held by another process."""


def event_bytes(**event):
    """A TensorBoard event as its file holds it.

    Written by hand: SummaryWriter's thread prints a traceback when the disk is full, and with its
    `purge_step` points of steps that are taken again stay in the files twice, for TensorBoard
    alone to leave out.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    RecordWriter(content).write(Event(**{"wall_time": time.time(), **event}).SerializeToString())
    return content.getvalue()


def trim_events(folder, step):
    """Drop from `folder`'s TensorBoard files what was logged after `step`.

    Those steps will be taken again: each shall be there once. A torn last record is dropped too.
    """
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for path in sorted(folder.glob("events.out.tfevents.*")):
        kept = []
        with contextlib.suppress(Exception):  # the loader raises at a torn record
            for event in LegacyEventFileLoader(str(path)).Load():
                if event.HasField("summary") and event.step <= step:
                    kept.append(event_bytes(wall_time=event.wall_time, step=event.step,
                                            summary=event.summary))
        if kept:
            kept.insert(0, event_bytes(file_version="brain.Event:2"))
            write_atomically(path, b"".join(kept))
        else:
            path.unlink()


@dataclass(frozen=True)
class Table:
    """Rows of text below a header: for the screen, a notebook, Markdown and CSV."""

    header: typing.Sequence[str]
    rows: typing.Sequence[typing.Sequence[str]]
    title: str | None = None

    def print(self):
        """Show it on the screen."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table as Screen

        table = Screen(*map(escape, self.header), title=self.title and escape(self.title))
        for row in self.rows:
            table.add_row(*map(escape, row))
        Console().print(table)

    def markdown(self):
        """It in Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n"
                       for line in lines)

    def csv(self):
        """It as comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()

    def _repr_html_(self):
        def line(cells, tag):
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return (f"<table><caption>{html.escape(self.title or '')}</caption>"
                + line(self.header, "th") + "".join(line(row, "td") for row in self.rows)
                + "</table>")


def progress(items, description, total=None):
    """Iterate over `items` with a bar on standard error, shown on terminals only."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, description, total=total, console=console, transient=True,
                 disable=not console.is_terminal)


# ---------------------------------------------------------------------------- command line


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
        kinds = {int: "a whole number", float: "a number"}
        raise ValueError(f"--{name}={text}: must be {kinds.get(kind, kind)}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"--{name}={text}: must be a finite number")
    return value


def flags_of(function):
    """{flag: (type, default)} of a command's parameters, in their order; a parameter that must be
    given has the default `inspect.Parameter.empty`.

    The keys of `**flags: Unpack[SomeTypedDict]` are flags too, which default to None.
    """
    hints, flags = typing.get_type_hints(function), {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints.get(name, str)
        if typing.get_origin(kind) is typing.Unpack:
            more = typing.get_type_hints(typing.get_args(kind)[0])
            flags |= {flag: (kind, None) for flag, kind in more.items()}
        elif parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            flags[name] = (kind, parameter.default)
    return flags


def parse(commands, words, default=None):
    """The call that the command line `words` asks for, ready to be made: parse, then run.

    Fire matches words to the parameters of a function of `commands` (name → function) and runs
    it at once, to complain about what is left over afterwards; so it is given a function that
    only remembers. Each value is converted to its parameter's annotated type; a function with an
    attribute `flags` (see `help_text`) takes any others, as text. `default` is the command meant
    by a line that begins with a flag. Raises ValueError for a line that makes no sense.
    """
    import fire

    words = [*words]
    if default and (not words or words[0].startswith("-")):
        words = [default, *words]
    if not words or words[0] not in commands:
        raise ValueError(f"no command {''.join(words[:1])!r}; commands: {', '.join(commands)}")
    function, pending = commands[words[0]], []
    parameters = inspect.signature(function).parameters.values()
    listed = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    known = flags_of(function)

    @fire.decorators.SetParseFn(str)
    @functools.wraps(function)
    def remember(*positional, **flags):
        if not listed:
            flags |= dict(zip(known, positional))
        unknown = [flag for flag in flags if flag not in known]
        if unknown and not hasattr(function, "flags"):
            raise ValueError(f"{words[0]}: no flag --{unknown[0]} (see: {words[0]} --help)")
        values = {flag: parse_value(flag, value, known[flag][0])
                  if flag in known and isinstance(value, str) else value
                  for flag, value in flags.items()}
        pending.append(functools.partial(function, *(positional if listed else ()), **values))

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            fire.Fire({words[0]: remember}, command=words)
    except SystemExit as leave:
        trace = getattr(leave, "trace", None)
        reason = trace.elements[-1].ErrorAsStr() if trace and trace.HasError() else "bad usage"
        reason = re.sub("Could not consume arg: (.*)", r"cannot make sense of \1; several values "
                        "of a flag are separated by commas", reason)
        raise ValueError(f"{words[0]}: {reason} (see: {words[0]} --help)") from None
    if not pending:
        raise ValueError(f"{words[0]}: cannot make sense of {' '.join(words[1:])!r}")
    return pending[-1]


def command_line(commands, default=None, argv=None, meanings=None, moved=None):
    """Run one of `commands` with the flags of the command line and show what it returns; exit.

    See `parse` for `commands` and `default`. `meanings` says in a line what each flag means,
    `moved` what took the place of commands that are gone. Help exits with 0; ValueError and
    OSError become one line and 2.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    wants_help = {"--help", "-h", "help"} & set(words) or not (words or default)
    try:
        if wants_help:
            print(help_text(commands, words, default, meanings or {}))
            sys.exit(0)
        if words and words[0] in (moved or {}):
            raise ValueError(f"{words[0]} has moved: {moved[words[0]]}")
        show(parse(commands, words, default)())
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def show(result):
    """Print what a command has made: tables, the paths of files; of a list each."""
    if isinstance(result, Table):
        result.print()
    elif isinstance(result, (list, tuple)):
        for part in result:
            show(part)
    elif path := getattr(result, "path", result if isinstance(result, (str, Path)) else None):
        print(path)


def help_text(commands, words, default, meanings):
    """Help for the command that `words` name, or for all.

    A command's flags are those of its signature; where it takes any, its attribute `flags`, a
    function of `words`, tells them: [(flag, default as text, meaning)].
    """
    chosen = [word for word in words[:1] if word in commands] or (
        [default] if default and words and words[0] not in ("--help", "-h", "help") else commands)
    lines = [f"usage: python {Path(sys.argv[0]).name} COMMAND [--flag=value …]",
             f"commands: {', '.join(commands)}"]
    for name in chosen:
        lines += ["", name, inspect.getdoc(commands[name]) or ""]
        flags = [(flag, None if value is inspect.Parameter.empty else text_of(value),
                  " ".join([meanings.get(flag, ""), *choices(kind)]))
                 for flag, (kind, value) in flags_of(commands[name]).items()]
        flags += getattr(commands[name], "flags", lambda _words: [])(words)
        for flag, value, meaning in flags:
            shown = flag.upper() if value is None else f"--{flag}={value}"
            lines.append(f"  {shown:<30} {meaning}".rstrip())
    return "\n".join(lines)


def choices(kind):
    """[the words that the type `kind` allows, in one text], or [] where it allows any."""
    literals = [part for part in (kind, *typing.get_args(kind))
                if typing.get_origin(part) is typing.Literal]
    return [" | ".join(typing.get_args(literal)) for literal in literals]


def text_of(value):
    """A flag's value as one would type it."""
    return ",".join(map(str, value)) or "none" if isinstance(value, (tuple, list)) else (
        str(value).lower() if value is None or isinstance(value, bool) else str(value))


def stats(data: str = "cifar10", root: str = "data", image_size: int | None = None,
          skip_bad: bool = False):
    """A data set's sizes, classes and pixel statistics, each named for what it is."""
    dataset = load(data, root, image_size=image_size, val=0, skip_bad=skip_bad)
    images, sizes = dataset.train.images, torch.bincount(dataset.train.labels).tolist()
    channels = {"pixel mean": dataset.mean, "pixel std": dataset.std,
                "mean of the per-image stds (not the pixel std)": mean_of_image_stds(images)}
    return Table(("what", "value"), [
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
    load_split("train", data, root)
    return f"{data} is in {root}"


COMMANDS = {"stats": stats, "download": download}
MEANINGS = {"data": "cifar10, cifar100, shapes, or a folder of images",
            "root": "where data sets are downloaded to and cached",
            "image_size": "side to which larger images are resized; none: as they are",
            "skip_bad": "leave out image files that cannot be read"}

if __name__ == "__main__":
    command_line(COMMANDS, meanings=MEANINGS)
