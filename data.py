"""Pixels and labels: where images come from, and how they become training batches.

    python data.py stats --data=shapes
    python data.py download --data=cifar10
    python train.py --data=FOLDER            # FOLDER/train/<class>/*, FOLDER/test/<class>/*

A data set is one uint8 tensor; a folder's is a file of decoded images that is mapped into memory.
A training batch is gathered, cropped, flipped and normalised by a handful of whole-batch
operations on the device that trains, and which images it holds, and how they are changed, depends
on (seed, epoch, step) alone.
"""

import collections
import contextlib
import csv
import difflib
import errno
import functools
import hashlib
import html
import importlib.util
import inspect
import io
import itertools
import json
import math
import mmap
import os
import re
import shlex
import shutil
import stat
import sys
import textwrap
import time
import types
import typing
import unicodedata
import warnings
import zlib
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
MIXTURES = ("mixup", "cutmix")
AUGMENTATIONS = ("flip", "alternating_flip", "crop", "cutout", *MIXTURES)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Devices that read views whose rows overlap without copying them, see `crops_of`.
OVERLAPPING = ("cpu", "cuda")
# Others are refused whatever a file is called: PostScript, for one, is handed to a program.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
BUILT_IN = ("cifar10", "cifar100", "shapes")  # data sets; all else is a folder
SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "bar", "flower", "crescent",
          "half")
# In CIFAR-10-C beside the 15 that are counted (Hendrycks & Dietterich 2019, section 4).
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
           "truck")
# The numbers of errors that lie in a file; others are of its file system or of this process, such
# as too many open files. What decoders raise has none.
ERRORS_OF_FILES = (None, errno.EACCES, errno.EPERM, errno.ELOOP)
# A small file can claim an image of many gigabytes; 8192×8192 is more than any camera's.
MAX_PIXELS = 1 << 26


# ---------------------------------------------------------------------------- the data set


class Rows:
    """Some images of a tensor, by their `numbers`: indexed like a tensor, and nothing is copied
    before it is asked for; `rows[:]` is the tensor. So the training images of a large folder stay a
    part of a mapped file."""

    def __init__(self, images, numbers):
        if isinstance(images, Rows):
            images, numbers = images.images, images.numbers[numbers]
        self.images, self.numbers = images, numbers
        self.shape, self.device = (len(numbers), *images.shape[1:]), images.device

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        """The image, or a tensor of the images, that a number, slice, mask or list means."""
        numbers = self.numbers[index]
        return (_channels_last(gather(self.images, numbers)) if numbers.ndim
                else self.images[numbers])

    def split(self, size):
        """Parts of `size` images, each `Rows` again."""
        return [Rows(self.images, part) for part in self.numbers.split(size)]

    def to(self, device):
        """All of them as a tensor on `device`."""
        return self[:].to(device)


def rows_of(images, numbers):
    """The images of these sorted numbers: `images` itself where they are all, else `Rows`."""
    return images if len(numbers) == len(images) else Rows(images, numbers)


def gather(images, numbers, out=None):
    """The images of these numbers, from a tensor or `Rows`: B×H×W×3, a copy (into `out`)."""
    if isinstance(images, Rows):
        images, numbers = images.images, images.numbers[numbers]
    return torch.index_select(images.permute(0, 2, 3, 1), 0, numbers, out=out)


def in_chunks(images, size=1 << 26):
    """Yield the numbers of `images` in parts of about `size` bytes, to go through a mapped file."""
    return torch.arange(len(images)).split(max(1, size // math.prod(images.shape[1:])))


class Split(typing.NamedTuple):
    """One part of a data set: `images` N×3×H×W uint8 (channels last in memory), `labels` N."""

    images: Tensor | Rows
    labels: Tensor


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test images with the class names and the training pixels' statistics.

    `mean` and `std` have one value per channel, in units of a pixel value scaled to 0…1. `val` is
    None when nothing is held out. `fingerprint` changes with the files behind a folder (their
    names and sizes, wherever the folder lies, and where most have one size what they hold);
    built-in sets have one that never does.
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
         skip_bad=False, writes=True, known=None):
    """Load a data set and return it as a `Dataset`.

    `data` is `cifar10`, `cifar100`, `shapes` or a folder `train/<class>/*`, `test/<class>/*`.
    `val` training images, as large a share of each class, chosen by `seed`, are held out (None: a
    tenth).
    `limit` keeps so many training, validation and test images, and no others are read. Without
    `writes` nothing is downloaded and no cache is made in `root`: for settings that somebody
    else's file brought. Raises ValueError for a setting that makes no sense, and for files whose
    fingerprint is not that `known` from a network's training; OSError for files that are missing or
    cannot be read.
    """
    classes, all_labels, read, fingerprint = _source(("train", "test"), data, root, image_size,
                                                     skip_bad, writes, known)
    labels = all_labels["train"]
    # The labels alone tell which images are held out and which a limit keeps.
    rest, held = held_out(labels, len(labels) // 10 if val is None else val, seed)
    parts = [rows[balanced(labels[rows], limit, seed)] for rows in (rest, held)]
    wanted = torch.cat(parts).sort().values
    # Training and validation images are read at once, so that a folder has one cache for both.
    images = read("train", wanted)
    train, val = (Split(rows_of(images, torch.searchsorted(wanted, rows)), labels[rows])
                  for rows in parts)
    test = _limited(all_labels, read, "test", limit, seed)
    if train.images.shape[1:] != test.images.shape[1:] and not image_size:
        raise ValueError(f"{data}: training and test images differ in size; give `image_size=N`")
    # Without the held-out images: what a network is measured on may tell it nothing.
    mean, std = pixel_statistics(train.images)
    std = tuple(max(value, 1e-3) for value in std)  # 0 where all is one colour: it is divided by
    return Dataset(data, classes, train, val if len(held) else None, test, mean, std, fingerprint)


def load_split(part, data="cifar10", root="data", image_size=None, seed=0, limit=None,
               skip_bad=False, writes=True, known=None):
    """Load one part, "train" or "test", of a data set: (class names, `Split`). See `load`.

    A file of arrays, `….npy`, is a test set of CIFAR-10's classes; see `read_arrays`.
    """
    if part not in ("train", "test"):
        raise ValueError(f"part={part}: must be train or test; what is held out for validation is "
                         f"in `load`")
    if str(data).endswith(".npy"):
        return CIFAR10, read_arrays(data)
    classes, labels, read, _ = _source((part,), data, root, image_size, skip_bad, writes, known)
    return classes, _limited(labels, read, part, limit, seed)


def _limited(labels, read, part, limit, seed):
    rows = balanced(labels[part], limit, seed)
    return Split(read(part, rows)[:], labels[part][rows])


def held_out(labels, count, seed):
    """The numbers of the images that stay, and of `count` that are held out: as large a share of
    each class."""
    if not (hasattr(count, "__index__") and 0 <= count < len(labels)):
        raise ValueError(f"val={count}: must be a whole number from 0 to {len(labels) - 1}")
    held = balanced(labels, count, seed, shares=True) if count else torch.arange(0)
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[held] = False
    return keep.nonzero()[:, 0], held


def balanced(labels, count, seed, shares=False):
    """The sorted numbers of `count` images, as many of each class as possible, or with `shares` as
    large a share of each, chosen by `seed`: of all for None, or where there are no more. ValueError
    for none at all."""
    if count is not None and count < 1:
        raise ValueError(f"limit={count}: at least one image is needed")
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    # Each class is shuffled; then images are dealt in turn, one of every class a round: of classes
    # aaab the turns are 0, 1, 2 and ½, so the first two dealt are one a and the b. For shares each
    # class is dealt evenly over the whole: the turns are 1/6, 3/6, 5/6 and, a little later than
    # that of the class before it, 1/2.
    order = torch.randperm(len(labels), generator=generator(seed, "val"))
    turn, classes = torch.empty(len(order), dtype=torch.float64), labels.unique()
    for number, label in enumerate(classes):
        members, later = order[labels[order] == label], number / len(classes)
        rounds = torch.arange(len(members), dtype=torch.float64)
        turn[members] = (rounds + 0.5 + later / 1000) / len(members) if shares else rounds + later
    return turn.argsort(stable=True)[:count].sort().values


def subset(split, count, seed):
    """`count` images of `split`, see `balanced`: a copy."""
    rows = balanced(split.labels, count, seed)
    return Split(split.images[rows], split.labels[rows])


def pixel_statistics(images):
    """Per-channel mean and standard deviation over all pixels, exactly, from 256-bin histograms.

    For CIFAR-10's 50 000 training images: mean .4914 .4822 .4465, std .2470 .2435 .2616.
    """
    # Whole numbers, whose sums do not depend on their order, as those of 150 million floats would.
    levels, counts = torch.arange(256, dtype=torch.float64) / 255, torch.zeros(3, 256).long()
    for numbers in in_chunks(images):
        for channel, pixels in enumerate(gather(images, numbers).flatten(0, 2).T):
            counts[channel] += torch.bincount(pixels, minlength=256)
    mean, std = [], []
    for share in counts.double() / counts.sum(1, keepdim=True):
        mean.append((share * levels).sum().item())
        variance = (share * (levels - mean[-1]) ** 2).sum().item()
        std.append(variance**0.5)
    return tuple(mean), tuple(std)


def mean_of_image_stds(images):
    """Per-channel mean of every single image's own std: .2023 .1994 .2010 for CIFAR-10.

    Often quoted as "the std of CIFAR-10", which it is not: it leaves out how images differ.
    """
    stds = [images[numbers].double().div(255).std(dim=(2, 3), correction=0)
            for numbers in in_chunks(images, 1 << 24)]
    return tuple(torch.cat(stds).mean(0).tolist())


def generator(*keys):
    """A CPU random generator whose stream is a pure function of `keys`."""
    keys = tuple(key.item() if hasattr(key, "item") else key for key in keys)  # NumPy's 3 is 3
    # Not `hash`, which differs from process to process for text.
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# ---------------------------------------------------------------------------- sources


def _channels_last(images):
    """N×H×W×3 pixels as an N×3×H×W tensor that keeps its channels last in memory."""
    return images.permute(0, 3, 1, 2)


def folder_of(data):
    """The folder that `data` means, however it is written; None for a built-in set."""
    return None if data in BUILT_IN else Path(os.path.realpath(data))


def place_of(data):
    """A text for where the images of the data set `data` are: one for all ways to write it."""
    return str(folder_of(data) or data)


def path_text(path):
    """A path as text, which names no built-in set: Path("./cifar10") is a folder."""
    text = os.path.expanduser(path)
    return os.path.join(".", text) if text in BUILT_IN and not isinstance(path, str) else text


def name_of(data):
    """The name of the data set `data`, as pages and figures tell it: of a folder its own, which may
    be called as a built-in set is."""
    name = os.path.basename(os.path.abspath(data))
    return name if data == name or name not in BUILT_IN else f"folder {name}"


def fingerprint_of(data):
    """What changes with the files behind `data`: see `Dataset`."""
    folder = Path(os.path.expanduser(data))
    return data if data in BUILT_IN else _fingerprint(_list_folder(folder)[0])


def _source(parts, data, root, image_size, skip_bad, writes, known):
    """Where images come from: (class names, {part: labels}, `read`, fingerprint). read(part, rows)
    gives the images of some rows of a part, sorted numbers. Labels cost nothing; so the rows to
    hold out or to keep are chosen by them, and no other image is read."""
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size={image_size}: must be at least 1")
    data, root = path_text(data), os.path.expanduser(root)
    if data not in BUILT_IN:
        return _folder(data, Path(root), image_size, skip_bad, parts, writes, known)
    if Path(data, "train").is_dir():
        say_once(f"{data}: the built-in data set is taken; --data=./{data} is the folder here")
    check_known(known, data, data)
    if data == "shapes":
        sizes = {"train": (10_000, 1), "test": (2_000, 2)}  # number of images, seed
        classes, splits = SHAPES, {part: draw_shapes(*sizes[part]) for part in parts}
    else:
        classes, splits = _cifar(data, root, parts, writes)
    return (tuple(classes), {part: split.labels for part, split in splits.items()},
            lambda part, rows: rows_of(splits[part].images, rows)[:], data)


def _cifar(name, root, parts, writes):
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    new = not Path(root).exists()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            # torchvision compares the MD5 of every file each time.
            try:
                found = [source(root, train=part == "train") for part in parts]
            except RuntimeError:  # not there yet, or damaged
                if not writes:
                    raise
                there = {Path(root, source.base_folder, file): md5 for file, md5 in (
                    *source.train_list, *source.test_list)}
                if all(map(Path.exists, there)):  # which would be replaced, out of the archive
                    raise OSError(f"{next(iter(there)).parent} was changed or is damaged and stays "
                                  f"as it is; move it away") from None
                there[Path(root, source.filename)] = source.tgz_md5
                for file, md5 in there.items():  # the others are not there yet
                    if file.exists() and not check_integrity(file, md5):
                        aside = unused(file.with_name(f"{file.name}.damaged"))
                        note(f"{file}: damaged or changed, and now {aside}")
                        os.replace(file, aside)
                found = [source(root, train=part == "train", download=True) for part in parts]
    except Exception as error:  # torchvision reports a failed download in many ways
        if new:
            with contextlib.suppress(OSError):  # not empty, or not made
                Path(root).rmdir()
        reason = f"cannot be downloaded ({str(error).splitlines()[0]})" if writes else (
            "is not downloaded to where a checkpoint says: give `root=FOLDER`")
        raise FileNotFoundError(
            f"{name} is not in {root!r} and {reason}. "
            f"Put {source.filename} (MD5 {source.tgz_md5}) from {source.url} into {root!r}, or go "
            f"on without it: `data=shapes` (built in) or `data=FOLDER` (train/<class>/*, "
            f"test/<class>/*)") from error
    return found[0].classes, {part: Split(_channels_last(torch.from_numpy(data.data)),
                                          torch.tensor(data.targets))
                              for part, data in zip(parts, found)}


def read_arrays(path, labels=None):
    """The `Split` in NumPy's file `path`, N×32×32×3 bytes, as CIFAR-10.1 and CIFAR-10-C come.

    `labels` is the file of its labels: by default the one whose name has _labels for _data.
    """
    import numpy as np

    path = Path(path)
    labels = labels or path.with_name(path.name.replace("_data.npy", "_labels.npy"))
    if labels == path:
        raise ValueError(f"{path}: its name must end in _data.npy, and its labels' in _labels.npy")
    found = []
    for file, kinds, shape in ((path, "uint8", (32, 32, 3)), (labels, "whole numbers", ())):
        check_regular(file, 1 << 30)
        try:  # mapped: what claims to be huge takes no memory before its shape was looked at
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy's readers raise whatever they like on a damaged file
            if out_of_memory(error) or getattr(error, "errno", None):
                raise
            raise ValueError(f"{file}: not an array of NumPy ({error})") from error
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{file}: is an archive of arrays, not a single one")
        # Larger pixels would be cut to their last eight bits.
        wrong = array.dtype.kind not in "ui" if file == labels else array.dtype != "uint8"
        if wrong or array.shape[1:] != shape or not array.ndim:
            raise ValueError(f"{file}: must be N{''.join(f'×{side}' for side in shape)} {kinds}, "
                             f"is {array.dtype} {array.shape}")
        found.append(torch.from_numpy(array.astype("int64" if file == labels else "uint8")))
    images, numbers = found
    if len(images) != len(numbers) or not len(images) or (
            numbers.min() < 0 or numbers.max() >= len(CIFAR10)):
        raise ValueError(f"{path}: {len(images)} images and {len(numbers)} labels, which must be "
                         f"as many, and from 0 to {len(CIFAR10) - 1}")
    return Split(_channels_last(images), numbers)


def corruptions(folder):
    """Yield (name, [`Split` of each of five severities]) of CIFAR-10-C's `folder`: files
    <corruption>.npy, whose fifths are of rising severity, and labels.npy."""
    for path in sorted(Path(folder).glob("*.npy")):
        if path.name != "labels.npy":
            whole = read_arrays(path, path.with_name("labels.npy"))
            if len(whole.labels) % 5:
                raise ValueError(f"{path}: {len(whole.labels)} images are not five severities")
            yield path.stem, [Split(*parts) for parts in zip(*(
                tensor.chunk(5) for tensor in whole))]


def check_regular(path, most=1 << 28):
    """OSError unless `path` is a regular file of at most `most` bytes: a pipe or a device can keep
    its reader waiting, or busy, for ever."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path}: not a regular file")
    if found.st_size > most:
        raise OSError(f"{path}: {found.st_size:,} bytes are too many (at most {most:,})")


def read_image(path, size=None, only_larger=False):
    """Read a picture file (`IMAGE_FORMATS`) as 3×H×W uint8 RGB; `size` resizes it to size×size.

    With `only_larger` a square picture that is smaller stays as it is. EXIF rotation is applied,
    transparency is laid on white, of several frames the first is taken, 16-bit grey is scaled
    to 8 bits. Raises OSError naming a file that cannot be decoded.
    """
    from PIL import Image, ImageOps

    path = os.path.expanduser(path)
    try:
        check_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels are too many")
                if image.mode == "F":
                    raise ValueError("pixels that are floating-point numbers")
                with contextlib.suppress(Exception):  # what says how to turn it may be damaged
                    image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 0…65535 = 257·255
                    image = image.convert("I")
                    low, high = image.getextrema()
                    if not 0 <= low <= high <= 65535:
                        raise ValueError(f"grey values from {low} to {high}, more than 16 bits")
                    image = image.point(lambda value: value / 257 + 0.5).convert("L")  # rounds
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    white = Image.new("RGBA", image.size, "white")
                    image = Image.alpha_composite(white, image)
                image = image.convert("RGB")
                fits = image.width == image.height and (
                    image.width == size or (only_larger and image.width < (size or math.inf)))
                if size and not fits:  # enlarged as `resize` does, which does it to most
                    smaller = max(image.size) < size
                    image = image.resize((size, size), Image.Resampling.BILINEAR if smaller
                                         else Image.Resampling.LANCZOS)
                width, height = image.size
                pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image file") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like on a damaged file
        raise OSError(f"{path}: cannot be read as an image ({error})") from error
    return pixels.view(height, width, 3).permute(2, 0, 1)


def _folder(data, root, image_size, skip_bad, parts, writes, known):
    """`_source` of the folder `data`, by way of a cache file for each part in `root`.

    Only the rows that are asked for are read, but with `skip_bad`, where only reading tells which
    rows there are.
    """
    folder = Path(data)
    files, classes, left_out = _list_folder(folder)
    tell_left_out(folder, left_out)
    fingerprint = _fingerprint(files)
    check_known(known, fingerprint, data)
    labels = {part: torch.tensor([label for _, label, _, _ in files[part]]) for part in parts}

    # A cache is named for what was asked for, so that another question has another file, and holds
    # a key of the files' times and sizes, so that changed images take the place of the old ones.
    def decoded(part, rows):
        items = [files[part][row] for row in rows]
        which = "" if len(items) == len(files[part]) else [path for path, *_ in items]
        name = _digest(os.path.realpath(folder), part, image_size, skip_bad, which)[:16]
        return _images_of(items, image_size, skip_bad, part,
                          root / f"folder-{name}.cache", writes)

    def read(part, rows):
        return rows_of(whole[part], rows) if part in whole else decoded(part, rows.tolist())[0]

    # With `skip_bad`, the labels are those of the images that could be read: all are, at once.
    whole = {}
    for part in parts if skip_bad else ():
        whole[part], readable = decoded(part, range(len(files[part])))
        if missing := len(labels[part]) - len(readable):
            note(f"{folder}: left out files of {part} that cannot be read ({missing})")
        labels[part] = labels[part][readable]
    return tuple(classes), labels, read, fingerprint


def check_known(known, fingerprint, data):
    """ValueError if images `data`, of this `fingerprint`, are not those `known` from training."""
    if not same_files(known, fingerprint):
        raise ValueError(f"data={data}: files were added, removed or changed since the network was "
                         f"trained on them; python train.py evaluate RUN "
                         f"--data={shlex.quote(data)} measures it on them as they are now")


def tell_left_out(folder, left_out):
    """Say what of a folder is not taken: {kind: number}."""
    if told := [f"{what} ({count})" for what, count in sorted(left_out.items()) if count]:
        say_once(f"{folder}: left out {', '.join(told)}")


def _fingerprint(files):
    """Of what `_list_folder` found: names and sizes, wherever the folder lies; and where most files
    are of one size, as those that are not compressed, behind a dash something of what they hold.
    """
    rows = [(part, Path(path), size) for part in files for path, _, size, _ in files[part]]
    named = _digest([(part, path.parent.name, path.name, size) for part, path, size in rows])
    sizes = collections.Counter(size for _, _, size in rows)
    if max(sizes.values()) <= len(rows) / 2:
        return named
    return f"{named}-{_digest([_sample(path, size) for _, path, size in rows])}"


def same_files(known, now):
    """Whether the fingerprint `known` of a data set is what it has `now`, as far as can be told:
    earlier versions had none, or one without what stands behind the dash."""
    return known in (None, now, now.partition("-")[0])


def _sample(path, size):
    """A checksum of a file of so many bytes: of all, or of 16 parts of it where there are more than
    a million."""
    checksum = 0
    with contextlib.suppress(OSError):  # reading it will say so
        check_regular(path, math.inf)
        with open(path, "rb") as file:
            for start in range(0, size, max(1 << 16, size // 16)):
                file.seek(start)
                checksum = zlib.crc32(file.read(1 << 16), checksum)
    return checksum


def _digest(*content):
    return hashlib.blake2b(repr(content).encode("utf-8", "surrogateescape"),
                           digest_size=16).hexdigest()


def _list_folder(folder):
    """({"train": [(path, label, bytes, times), …], "test": […]}, class names, {kind: number} of
    what else there is)."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data={str(folder)!r}: no such data set or folder (cifar10, cifar100, shapes, or a "
            f"folder with train/<class>/* and test/<class>/*)")
    classes, left_out = {}, collections.Counter()
    left_out["folders and images beside train and test"] = sum(
        (entry.is_dir() or entry.suffix.lower() in IMAGE_SUFFIXES)
        and entry.name not in ("train", "test") and not entry.name.startswith(".")
        for entry in folder.iterdir())
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder}: has no folder {part!r} (needed: train/<class>/*, "
                                    f"test/<class>/*)")
        entries = [*(folder / part).iterdir()]
        found = {entry.name for entry in entries if entry.is_dir()}
        classes[part] = {name for name in found if not name.startswith(".")}
        left_out["hidden folders beside the classes"] += len(found - classes[part])
        left_out["files beside the classes"] += sum(  # a link that leads nowhere, too
            entry.name not in found and not entry.name.startswith(".") for entry in entries)
    names, odd = sorted(classes["train"]), sorted(classes["train"] ^ classes["test"])
    if odd or not names:
        raise ValueError(f"{folder}: train and test must have the same classes, and at least one; "
                         f"in one of them only: {', '.join(told_apart(odd)) or 'none at all'}")
    for name in names:
        if not name.isprintable():
            raise ValueError(f"{folder}: the class {name!r} has characters that cannot be shown")
    files = {part: [file for label, name in enumerate(names)
                    for file in _list_class(folder / part / name, label, left_out)]
             for part in classes}
    return files, names, left_out


def told_apart(names):
    """`names` as they are shown: in ASCII where two of them would look the same, as é may be one
    character or two, and a space may stand behind a name."""
    looks = {unicodedata.normalize("NFC", name).strip() for name in names}
    return names if len(looks) == len({*names}) else [*map(ascii, names)]


def _list_class(folder, label, left_out):
    """The rows of `_list_folder` of one class, by path; counts in `left_out` what is no image."""
    found = []
    with os.scandir(folder) as entries:  # which knows sizes and times without opening a file
        for entry in entries:
            suffix = Path(entry.name).suffix.lower()
            if entry.is_symlink() and os.path.isdir(entry.path):  # it may lead to all of the disk
                left_out["links to folders within a class"] += 1
            elif os.path.isdir(entry.path):
                left_out["files in folders within a class"] += sum(
                    len(files) for _, _, files in os.walk(entry.path))
            elif entry.name.startswith("."):  # a Mac leaves ._cat.png beside cat.png
                left_out["hidden files"] += suffix in IMAGE_SUFFIXES
            elif suffix in IMAGE_SUFFIXES:
                try:
                    known = entry.stat()
                    found.append((entry.path, label, known.st_size,  # archives set the first time
                                  (known.st_mtime_ns, known.st_ctime_ns)))
                except OSError:  # a link that leads nowhere; reading it will say so
                    found.append((entry.path, label, 0, (0, 0)))
            else:
                left_out[f"files of type {suffix or 'unknown'}"] += 1
    if not found:
        raise ValueError(f"{folder}: no images ({', '.join(IMAGE_SUFFIXES)}) in it")
    return sorted(found)


def _images_of(items, image_size, skip_bad, title, cache, writes):
    """(N×3×H×W images, numbers of the `items` that they are), by way of the file `cache`.

    The first process makes it, image by image, while others wait. All map it into memory: they
    share its pages, which the system drops and reads again as it needs room, so that a data set may
    be larger than the memory. Where the file cannot be written the images are held in memory.
    """
    key = _digest(items)

    def write(file, free, medium):
        for only_larger in (True, False):  # if their sizes differ, once more from the start
            file.seek(0)
            file.truncate()
            with contextlib.suppress(_Mixed):
                images = _decode(items, image_size, skip_bad, title, only_larger)
                return _write_images(file, key, len(items), images, free, medium)

    # Without the lock at first: where nothing can be written, there may be something to read.
    found = _map_images(cache, key, len(items), complains=not writes)
    if found is None and writes:
        try:
            with lock(cache.parent, f"{cache.stem}.lock", waits="reading the images"):
                found = _map_images(cache, key, len(items))
                if found is None:
                    for partial in cache.parent.glob(f"{cache.name}.*.tmp"):
                        partial.unlink(missing_ok=True)  # a killed process left it
                    free = shutil.disk_usage(cache.parent).free
                    write_atomically(cache, lambda file: write(file, free, "disk"))
                    found = _map_images(cache, key, len(items))
        except BadImage:
            raise
        except OSError as error:
            reason = (f"{cache}: cannot be written ({error.strerror})" if error.strerror else
                      str(error).partition("; ")[0])  # without advice for flags, not taken here
            note(f"{reason}; the images are held in memory and will be read again the next time")
    if found is None:
        file = io.BytesIO()
        write(file, free_memory(), "memory")
        found = _read_images(file.getbuffer(), key, len(items))
    return found


class BadImage(OSError):
    """An image file that cannot be read."""


class _Mixed(Exception):
    """Images that are not all of one size."""


def _decode(items, image_size, skip_bad, title, only_larger):
    """Yield (number of the item, H×W×3 pixels) of `items` in order, decoded in threads.

    All have one size, else `_Mixed`. With `only_larger` small square images stay as they are: they
    take less memory, and are enlarged batch by batch on the device.
    """
    def read(item):
        try:
            return read_image(item[0], image_size, only_larger)
        except OSError as error:
            if skip_bad and getattr(error.__cause__, "errno", None) in ERRORS_OF_FILES:
                return error
            advice = "" if skip_bad else "; `skip_bad` leaves such files out"
            raise BadImage(f"{error}{advice}") from error

    # Threads, because Pillow lets go of Python's lock while it decodes. Four images a thread are
    # under way: enough that none waits for the file that is being written, and little memory.
    threads, first, bad = os.cpu_count() or 1, None, []
    images = ahead(read, items, threads, 4 * threads)
    for number, image in enumerate(progress(images, f"reading {title}", len(items))):
        if isinstance(image, OSError):
            bad.append(image)
            continue
        first = first or (items[number][0], image.shape)
        if image.shape != first[1]:
            if image_size:
                raise _Mixed
            sizes = [f"{name} has {shape[2]}×{shape[1]} pixels"
                     for name, shape in (first, (items[number][0], image.shape))]
            raise ValueError(f"{', '.join(sizes)}, which differs; `image_size=N` makes them "
                             f"equal")
        yield number, image.permute(1, 2, 0)
    for error in bad:
        note(f"left out: {error}")
    if first is None:
        raise ValueError(f"{title}: not one image could be read")


def _write_images(file, key, count, images, free, medium):
    """Write at most `count` `images`, (number, pixels), one by one to the binary `file`, where
    `free` bytes of `medium` are free.

    It holds their pixels; a JSON text with `key`, shape and numbers; its length in 16 decimal
    digits; and the CRC-32 of all that in 8 hexadecimal ones.
    """
    rows, checksum = [], 0
    for number, pixels in images:
        need = count * pixels.numel()  # before the first is written, not when the disk is full
        if not rows and need > free:
            raise OSError(f"the images need {need / 1e9:.2f} GB of {medium}, {free / 1e9:.2f} GB "
                          f"are free; `limit=N` takes fewer; `image_size=N` makes them smaller; "
                          f"`root=FOLDER` puts their cache elsewhere")
        content = pixels.contiguous().numpy()
        file.write(content)
        checksum = zlib.crc32(content, checksum)
        rows.append(number)
    about = json.dumps({"key": key, "shape": [len(rows), *content.shape], "rows": rows}).encode()
    about += b"%016d" % len(about)
    file.write(about + b"%08x" % zlib.crc32(about, checksum))


def _read_images(content, key, count):
    """(N×3×H×W images, their numbers among `count`) of what `_write_images` wrote, in the buffer
    `content`, without a copy; None for another `key`, ValueError for what is damaged."""
    # From its end: 8 digits of checksum, 16 of length, the description, and the pixels before it.
    length, checksum = bytes(content[-24:-8]), bytes(content[-8:])
    if zlib.crc32(memoryview(content)[:-8]) != int(checksum, 16):
        raise ValueError("its checksum is wrong")
    end = len(content) - 24 - int(length)
    about = json.loads(bytes(content[end:-24]))
    if about["key"] != key:
        return None
    shape, rows = about["shape"], torch.tensor(about["rows"])
    if not (math.prod(shape) == end and len(shape) == 4 and shape[3] == 3
            and shape[0] == len(rows) and rows.min() >= 0 and rows.max() < count):
        raise ValueError("its description does not fit it")
    pixels = torch.frombuffer(content, dtype=torch.uint8, count=end)
    return _channels_last(pixels.view(shape)), rows


def _map_images(path, key, count, complains=True):
    """`_read_images` of the file `path`, mapped into memory: None too without such a file, or for
    one that is damaged."""
    try:
        check_regular(path, most=math.inf)
        with open(path, "rb") as file:
            # A private copy of each page that is written to: the file itself never changes.
            return _read_images(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), key, count)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if complains:
            note(f"{path}: damaged ({error}); the images are read again")
        return None


def ahead(function, items, threads, depth):
    """Yield function(item) of `items` in order, up to `depth` of them computed ahead in threads."""
    waiting = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # Whoever iterates may stop early: what has not begun is not begun any more.
            pool.shutdown(cancel_futures=True)


def free_memory(device="cpu"):
    """The bytes that may still be taken on `device`; infinite where nobody tells."""
    device = torch.device(device)
    if device.type == "cuda":
        # What PyTorch keeps of the GPU's memory without using it may be taken too.
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return _free_of_process() if device.type == "cpu" else math.inf


def _free_of_process():
    """The least that is told of this process's memory: by the machine, by its container, which is
    a control group of version 2 or 1, and by `ulimit -v`."""
    known = [math.inf]
    untold = contextlib.suppress(OSError, ValueError, TypeError, AttributeError, ImportError)
    with untold:
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with untold:  # what Linux could free for us
        found = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
        known.append(int(found[1]) << 10)
    for folder, *names in (("/sys/fs/cgroup", "memory.max", "memory.current"),
                           ("/sys/fs/cgroup/memory", "memory.limit_in_bytes",
                            "memory.usage_in_bytes")):
        with untold:
            limit, used = (int(Path(folder, name).read_text()) for name in names)
            known.append(limit - used)
            about = Path(folder, "memory.stat").read_text()
            # Files in memory are let go of when it is needed.
            known[-1] += int(re.search(r"^inactive_file (\d+)", about, re.MULTILINE)[1])
    with untold:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0])
            known.append(limit - used * resource.getpagesize())
    return max(0, min(known))


def draw_shapes(count, seed):
    """Draw `count` 32×32 RGB images of ten shapes: a task that needs shape, not colour or place.

    Position, size, rotation, both colours, background clutter and noise vary at random; labels
    index `SHAPES`. The same `count` and `seed` give the same images everywhere.
    """
    # They are drawn once; whoever changes them has a copy.
    return Split(*map(torch.clone, _drawn(count, seed)))


@functools.lru_cache(maxsize=4)
def _drawn(count, seed):
    parts = [_draw_chunk(torch.arange(start, min(start + 2_000, count)) % 10,
                         generator("shapes", seed, start)) for start in range(0, count, 2_000)]
    return Split(_channels_last(torch.cat([images for images, _ in parts])),
                 torch.cat([labels for _, labels in parts]))


def _draw_chunk(labels, random):
    n = len(labels)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=random)

    # Each pixel's centre in the shape's own coordinates: moved, turned, and in units of its radius.
    # All below are n×32×32, with one number an image where it says (1, 1), a colour where 1, 1, 3.
    grid = torch.arange(32) + 0.5
    y, x = (grid[:, None] - uniform(11, 21, 1, 1)), (grid[None, :] - uniform(11, 21, 1, 1))
    angle, radius = uniform(0, 2 * math.pi, 1, 1), uniform(7, 12, 1, 1)
    u = (x * angle.cos() + y * angle.sin()) / radius
    v = (y * angle.cos() - x * angle.sin()) / radius
    inside = _shape_fields(u, v)[labels, torch.arange(n)]
    # `inside · radius` is about the distance to the edge in pixels: an edge is two pixels soft.
    mask = torch.sigmoid(inside * radius * 3)[..., None]

    # The background: a colour, a gradient, and three discs of clutter smaller than any shape.
    back, fore = uniform(0, 1, 1, 1, 3), uniform(0, 1, 1, 1, 3)
    # Where two colours could be taken for one, each channel is 0 or 1, whichever is further off.
    fore = torch.where((fore - back).abs().amax(-1, keepdim=True) < 0.4, 1 - back.round(), fore)
    image = back + uniform(-0.3, 0.3, 1, 1, 3) * (x / 16)[..., None]
    for _ in range(3):
        spot = ((grid[:, None] - uniform(0, 32, 1, 1)) ** 2
                + (grid[None, :] - uniform(0, 32, 1, 1)) ** 2).sqrt() - uniform(1, 3, 1, 1)
        image = image.lerp(uniform(0, 1, 1, 1, 3), torch.sigmoid(-3 * spot)[..., None])
    image = image.lerp(fore, mask) + 0.06 * torch.randn(n, 32, 32, 3, generator=random)
    return image.mul(255).round().clamp(0, 255).byte(), labels


def _shape_fields(u, v):
    """Ten fields over the unit disc, positive inside the shape, in the order of `SHAPES`.

    Each is about the distance to the nearest edge. Of two shapes `minimum` is what both cover,
    `maximum` what either does.
    """
    r = (u**2 + v**2).sqrt()
    box = torch.maximum(u.abs(), v.abs())
    # How far a point lies in the directions of a triangle's three sides, 30°, 150° and 270°.
    sides = [u * math.cos(a) + v * math.sin(a) for a in (0.5236, 2.618, 4.7124)]
    arms = torch.maximum(torch.minimum(0.28 - u.abs(), 1 - v.abs()),
                         torch.minimum(0.28 - v.abs(), 1 - u.abs()))
    return torch.stack([
        0.85 - r,  # disc
        0.22 - (r - 0.75).abs(),  # ring
        0.75 - box,  # square
        0.18 - (box - 0.7).abs(),  # frame
        0.5 - torch.stack(sides).amax(0),  # triangle
        arms,  # cross
        torch.minimum(0.25 - v.abs(), 1 - u.abs()),  # bar
        0.6 + 0.35 * torch.cos(5 * torch.atan2(v, u)) - r,  # flower of five petals
        torch.minimum(0.95 - r, ((u - 0.5) ** 2 + v**2).sqrt() - 0.65),  # crescent
        torch.minimum(0.95 - r, u),  # half a disc
    ])


# ---------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Preprocessing:
    """How a network wants its images: side in pixels, mean and std per channel (in units of a
    pixel value scaled to 0…1), and the `precision` in which it computes, "fp32" or "bf16"."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str = "fp32"

    def __call__(self, images, device=None):
        """uint8 N×3×H×W images as the network takes them: normalised, (pixel / 255 − mean) / std,
        float32 N×3×S×S, channels-last in memory, on `device`."""
        images = images.to(device or images.device)
        check_bytes(images)
        # float32 before the scale, not bf16: a pixel has 8 bits, and bf16 7 behind the first.
        pixels = images.permute(0, 2, 3, 1).flatten(2).float()  # rows of W·3 values
        scale, shift = _row_constants(tuple(self.mean), tuple(self.std), images.shape[3],
                                      images.device)
        pixels = pixels.mul_(scale).add_(shift).unflatten(2, (-1, 3))
        return resize(_channels_last(pixels), self.image_size)

    def pictures(self, images):
        """uint8 images as the network sees them, for people: floats 0…1, N×3×S×S."""
        return resize(images.float() / 255, self.image_size).clamp(0, 1)


def check_bytes(images):
    """ValueError unless `images` are bytes, N×3×H×W, at least one: the white of floating-point
    numbers, for example, may be 1 or 255."""
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or shape[1:2] != (3,) or len(shape) != 4 or 0 in shape:
        raise ValueError(f"images of {images.dtype}, {'×'.join(map(str, shape))}: must be bytes "
                         f"(torch.uint8), N×3×H×W, N at least 1")


@functools.lru_cache(maxsize=8)
def _row_constants(mean, std, width, device):
    """x ↦ x·scale + shift for a row of `width` RGB pixels, as two vectors of width·3 values.

    Three values would do, but a loop over the last three values of a tensor is short and slow. A
    vector is made once: to copy it to the device in each step would make the GPU wait.
    """
    scale = torch.tensor([1 / (255 * s) for s in std]).repeat(width)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)]).repeat(width)
    return scale.to(device), shift.to(device)


def resize(images, size):
    """Float N×3×H×W images resized to N×3×size×size (bilinear); None or the same size: as is."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    # Made smaller without antialiasing, a picture would lose the pixels between those it reads.
    return F.interpolate(images, (size, size), mode="bilinear",
                         antialias=size < max(images.shape[2:]))


def crops_of(pixels, first, size):
    """The size×size crops of N×H×W×3 `pixels` whose first pixels have the numbers `first`: a row
    for each line of each crop, B·size × size·3.

    A line is one row of a view whose rows overlap in memory, so a crop is a gather of contiguous
    bytes. Pixels of a 4×4 image, numbered, and the rows of that view for `size` 2:

         0  1  2  3      row 0 = (0, 1), row 1 = (1, 2), … row 5 = (5, 6), … row 9 = (9, 10), …
         4  5  6  7      The 2×2 crop whose first pixel is 5 is the rows 5 and 5 + 4 = 9:
         8  9 10 11          5  6
        12 13 14 15          9 10

    A row may run over the end of a line; the crops that are drawn never begin there. Devices that
    would copy such a view, which is `size` times as large as the images, gather pixel by pixel.
    """
    line = torch.arange(size, device=pixels.device)
    rows = (first[:, None] + line * pixels.shape[2]).flatten()
    if pixels.device.type in OVERLAPPING:
        windows = pixels.as_strided((pixels.numel() // 3 - size + 1, size * 3), (3, 1))
        return windows.index_select(0, rows)
    every = (rows[:, None] + line).flatten()
    return pixels.view(-1, 3).index_select(0, every).view(-1, size * 3)


def with_margins(pixels, margin):
    """N×H×W×3 `pixels` with `margin` reflected ones on each side."""
    # A margin of two before 0 1 2 3 … is 2 1 | 0 1 2 3 …: the border itself is not repeated.
    for dim in (1, 2) if margin else ():
        size = pixels.shape[dim]
        before = pixels.narrow(dim, 1, margin).flip(dim)
        after = pixels.narrow(dim, size - 1 - margin, margin).flip(dim)
        pixels = torch.cat([before, pixels, after], dim)
    return pixels


class Batches:
    """Endless, reproducible training batches of one split, augmented as whole batches.

    `batches.epoch(epoch, start)` yields (images B×3×S×S float32, labels B) from step `start` on.
    All random choices of an epoch are drawn before it begins from (seed, epoch), so that any
    step can be made without the ones before it. An incomplete last batch is left out; every
    epoch shuffles anew, so no image is left out for good. With `world` processes, number `rank`
    gets every world-th image of the same global batch. Mixup and cutmix are left to `mix`, which
    pairs images within each process's share: with these, two processes train otherwise than one.

    The batches are the same on every `way`, of which the first is taken that leaves half of the
    free memory free: "store", all images with their margins and their mirror images on the device;
    "device", the images alone there, and the rest is done to each batch; "host", each batch is
    gathered on the CPU, ahead of its use where that is not the device.
    """

    def __init__(self, split, mean, std, batch_size, augment=(), seed=0, image_size=None,
                 device="cpu", rank=0, world=1, way=None):
        for name in augment:
            if name not in AUGMENTATIONS:
                raise ValueError(f"augment={name}: must be of {', '.join(AUGMENTATIONS)}")
        # A data set of less than a batch is one batch, or there would be no step at all.
        self.batch_size = min(batch_size, len(split.labels))
        if self.batch_size < world:
            raise ValueError(f"batch_size={self.batch_size}: fewer images than the {world} "
                             f"processes that share a batch")
        self.augment, self.seed, self.image_size = augment, seed, image_size
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.labels = split.labels.to(self.device)
        self.mean, self.std = tuple(mean), tuple(std)
        check_bytes(split.images[:1])
        height, self.size = split.images.shape[2:]
        if height != self.size:
            raise ValueError(f"images of {self.size}×{height} pixels: must be square; "
                             f"`image_size=N` makes them so")
        self.margin = round(self.size * CROP) if "crop" in augment else 0
        # A crop is as large as the image was: it has 2·margin + 1 places in each direction.
        self.side = self.size + 2 * self.margin
        self.flips = "flip" in augment or "alternating_flip" in augment
        self.way = way or self._choose_way()
        self.images = split.images if self.way == "host" else self._store(split.images)

    def _needs(self):
        """{way: the bytes that it takes on the device}, the fastest way first."""
        count = 3 * len(self.labels)
        return {"store": count * self.side**2 * (1 + self.flips), "device": count * self.size**2,
                "host": 0}

    def _choose_way(self):
        needs, sharing = self._needs(), 1
        if self.device.type == "cpu":  # the processes of a machine share its memory, and images
            sharing = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
            if needs["store"] == needs["device"]:  # as they are would only be copied
                del needs["store"]
            del needs["device"]
        # Half, since the network, its activations and the optimizer need room as well.
        room = free_memory(self.device) / sharing / 2
        return next(way for way, need in needs.items() if need <= room)

    def describe_way(self):
        """A few words on where the images are."""
        size = f"{self._needs()[self.way] / 1e6:,.0f} MB on the {self.device.type}"
        return {"store": f"images and their mirror images: {size}" if self.flips
                else f"images with margins: {size}",
                "device": f"images: {size}; cropped and flipped batch by batch",
                "host": "images: as they were read; gathered, cropped and flipped batch by batch",
                }[self.way]

    def _dressed(self, pixels):
        """N×H×W×3 `pixels` with reflected margins, each image followed by its mirror image if any
        flip is on: a flip is then a choice of a number."""
        pixels = with_margins(pixels, self.margin)
        if self.flips:
            pixels = torch.stack([pixels, pixels.flip(2)], 1).flatten(0, 1)
        return pixels

    def _store(self, images):
        """All images on the device, dressed for the store: built in parts, with no second copy."""
        stored = self.way == "store"
        copies, side = (1 + self.flips, self.side) if stored else (1, self.size)
        store = torch.empty(len(images) * copies, side, side, 3, dtype=torch.uint8,
                            device=self.device)
        done = 0
        for numbers in in_chunks(images):
            pixels = gather(images, numbers).to(self.device)
            pixels = self._dressed(pixels) if stored else pixels
            store[done:done + len(pixels)] = pixels
            done += len(pixels)
        return store

    def __len__(self):
        """Steps an epoch."""
        return len(self.labels) // self.batch_size

    def plan(self, epoch, crop=True):
        """The epoch's choices for each image in the order of their use: its number, its label, the
        first pixel of its crop (see `crops_of`) and the corner of its cutout (2×N: y, x); on the
        device, but the numbers on the CPU for "host"."""
        # Everything is drawn, whether this augmentation uses it or not, and on the CPU: so the same
        # seed means the same order with every augmentation and on every device.
        random, count = generator(self.seed, epoch), len(self.labels)
        # The order in which these are drawn is part of every run that has begun: it never changes.
        order = torch.randperm(count, generator=random)
        mirrored = torch.rand(count, generator=random) < 0.5
        shift = torch.randint(0, 2 * self.margin + 1, (2, count), generator=random)
        corner = torch.randint(0, self.size, (2, count), generator=random)
        if not crop:
            shift.fill_(self.margin)
        if "alternating_flip" in self.augment:  # both ways, if shown in two epochs running
            first = torch.rand(count, generator=generator(self.seed, "flip")) < 0.5
            mirrored = first[order] ^ bool(epoch % 2)
        elif "flip" not in self.augment:
            mirrored = torch.zeros(count, dtype=torch.bool)
        # Crops are cut from the store, where an image has its number in the data set, or from the
        # dressed images of its step, where it has its place among them.
        places = order if self.way == "store" else (
            torch.arange(count) % self.batch_size // self.world)
        numbers = places * (1 + self.flips) + mirrored
        # The number of pixel (y, x) of an image among all the pixels of all of them.
        first = (numbers * self.side + shift[0]) * self.side + shift[1]
        there = order.to(self.device)
        return (order if self.way == "host" else there, self.labels[there],
                first.to(self.device), corner.to(self.device))

    def epoch(self, epoch, start=0, size=None, crop=True):
        """Yield the batches of `epoch` from step `start` on, of side `size` if that is given;
        without `crop` no image is moved, whatever the augmentation."""
        order, labels, first, corner = self.plan(epoch, crop)
        scale, shift = _row_constants(self.mean, self.std, self.size, self.device)
        # Of the images of a step, this process has those of numbers rank, rank + world, …
        steps = [slice(step * self.batch_size + self.rank, (step + 1) * self.batch_size,
                       self.world) for step in range(start, len(self))]
        sources = itertools.repeat(self.images) if self.way == "store" else (
            map(self._dressed, self._fetch(order, steps)))
        for mine, source in zip(steps, sources):
            lines = crops_of(source, first[mine], self.size)
            pixels = lines.float().mul_(scale).add_(shift).view(-1, self.size, self.size, 3)
            if "cutout" in self.augment:
                pixels.mul_(self._cutout_mask(corner[:, mine]))
            yield resize(_channels_last(pixels), size or self.image_size), labels[mine]

    def _fetch(self, order, steps):
        """Yield each step's images, B×S×S×3, on the device."""
        def gathered(mine):
            numbers = order[mine]
            if self.way == "device":
                return self.images.index_select(0, numbers)
            # The GPU copies from pinned memory while it computes; from other memory it waits.
            out = torch.empty(len(numbers), self.size, self.size, 3, dtype=torch.uint8,
                              pin_memory=self.device.type == "cuda")
            return gather(self.images, numbers, out)

        if self.way == "device" or self.device.type == "cpu":
            yield from map(gathered, steps)
            return
        # On MPS, memory may be given back and written anew before it has been copied.
        copies = (pixels.to(self.device, non_blocking=self.device.type == "cuda")
                  for pixels in ahead(gathered, steps, threads=1, depth=2))
        # In pairs, as the copy of the next batch shall be under way while one is computed with.
        for pixels, _following in itertools.pairwise(itertools.chain(copies, [None])):
            yield pixels

    def _cutout_mask(self, corner):
        """B×S×S×1: 0 in a square around each of the 2×B `corner` points, 1 elsewhere."""
        line = torch.arange(self.size, device=self.device)
        half = self.size * CUTOUT / 2
        # 2×B×S: the lines, of rows and of columns, that are near enough to the corner of a pixel;
        # a little off it, as for an odd number of lines two would be just as far.
        near = (line - corner[..., None] + 0.499).abs() <= half
        return ~(near[0][:, :, None] & near[1][:, None, :])[..., None]


def mix(images, labels, augment, seed, step):
    """Every image of a batch mixed with another: (images, [(labels, share), (theirs, 1 − share)]).

    By mixup (Zhang et al. 2018, section 2) as a weighted mean, by cutmix (Yun et al. 2019, section
    3.1) a rectangle is that of the other; one of the two at random if `augment` names both. The
    share is uniform between 0 and 1 (Beta(1, 1) in both papers), and one for the batch. Images are
    paired within `images`: of several processes each mixes its own share of a batch.
    """
    random = generator(seed, "mix", step)
    kinds = [name for name in MIXTURES if name in augment]
    kind = kinds[torch.randint(len(kinds), (), generator=random)]
    share, y, x = torch.rand(3, generator=random).tolist()
    # Paired with the batch backwards: the batch is shuffled, so any pairing is a random one.
    others = images.flip(0)
    if kind == "mixup":  # share·x + (1 − share)·x′
        images = images.lerp(others, 1 - share)
    else:
        # A rectangle of the images' form that covers a share 1 − share of them; at the border it is
        # cut off, and the share is what is left.
        height, width = images.shape[2:]
        half = (1 - share) ** 0.5 / 2  # of either side
        top, bottom, left, right = (
            round(min(max(size * middle + size * end, 0), size))
            for size, middle in ((height, y), (width, x)) for end in (-half, half))
        images = images.clone()
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    return images, [(labels, share), (labels.flip(0), 1 - share)]


# ---------------------------------------------------------------------------- files and tables


def write_atomically(path, content, older=None):
    """Replace the file `path` by bytes or text `content`, or what the function `content` writes to
    the open file it is given: all or nothing. Its folder is made if it is not there.

    A reader of `path` sees the old file or the new one, also after a crash or on a full disk. The
    old file becomes the file `older`, if that is given. OSError names the file and the cause.
    """
    path = Path(path)
    partial_file = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path, "; the file before it, if any, is unchanged"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial_file, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode("utf-8", "surrogateescape")  # a file's name, as it is
                               if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            # Between these two renames there is no `path`; whoever opens the folder next puts
            # `older` back.
            if older and path.exists():
                os.replace(path, older)
            os.replace(partial_file, path)
    finally:
        with contextlib.suppress(OSError):
            partial_file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # only now the new name is on the disk; not all systems can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_ours(path, sign, said="is not from here", flag=""):
    """FileExistsError unless `path` is free, or a file with the text `sign` in it: what was not
    made here is never replaced. What is `said` of it stands behind `flag` and the path."""
    path = Path(path)
    if path.exists() and not (path.is_file() and sign.encode() in path.read_bytes()):
        raise FileExistsError(f"{flag}{path}: {said} (no {sign!r} in it) and stays as it is; move "
                              f"it away or choose another place")


def unused(path):
    """`path`, or the first of it with .1, .2 … behind it that is not there."""
    others = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(file for file in itertools.chain([path], others) if not file.exists())


def check_columns(path, columns, some=False):
    """FileExistsError if there is a file `path` that is no CSV table of these `columns`, or of
    `some` of them: somebody else's, or one that somebody has added to. It is never replaced."""
    path = Path(path)
    if not path.exists():
        return
    with contextlib.suppress(OSError, ValueError, csv.Error):
        text = read_text(path, errors="surrogateescape")  # as a file's name was written
        header, *rows = csv.reader(io.StringIO(text), strict=True)
        ours = {*header} <= {*columns} if some else header == [*columns]
        if ours and all(len(row) == len(header) for row in rows):
            return
    raise FileExistsError(f"{path}: is no table of {', '.join(columns)} alone and stays as it is; "
                          f"move it away or choose another place")


@contextlib.contextmanager
def writing(path, also=""):
    """A context whose OSErrors say that `path` cannot be written, why, and `also`."""
    try:
        yield
    except BadImage:  # read on the way to the file; it has a name of its own
        raise
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror or error}){also}") from error


def append(path, content):
    """Add bytes `content` to the file `path`; OSError names the file and the cause."""
    with writing(path), open(path, "ab") as file:
        file.write(content)


def read_text(path, most=1 << 24, errors="strict"):
    """The text of a regular file of at most `most` bytes, else OSError or ValueError; `errors` says
    what becomes of bytes that are no text."""
    check_regular(path, most)  # Windows' and Excel's files begin with a mark of their encoding
    return Path(path).read_text(encoding="utf-8-sig", errors=errors)


def read_json(path, meaning):
    """`meaning` of what a JSON file holds; ValueError or OSError name what is wrong with it."""
    try:
        content = json.loads(read_text(path))
        if nested(content):
            raise ValueError("nested too deeply")
        return meaning(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def nested(value, depth=20, most=100_000):
    """Whether lists and dictionaries stand in each other deeper than `depth`, or hold more than
    `most` things at one depth: what walks through them would not come back."""
    level = [value]  # all that stands at one depth: a loop, as a recursion would not come back
    for _ in range(depth):
        parts = (part.values() if isinstance(part, dict) else part for part in level
                 if isinstance(part, (dict, list, tuple, set)))
        # A list may stand in another many times over: it counts, as it is printed, each time.
        level = [*itertools.islice(itertools.chain.from_iterable(parts), most + 1)]
        if not level or len(level) > most:
            return bool(level)
    return True


@contextlib.contextmanager
def lock(folder, name=".lock", waits=""):
    """Hold the file `name` of a run's folder; `Busy` when another process does. A dead process
    holds nothing, and a folder in which nothing was done does not remain.

    With `waits`, words for what the other process may be doing, wait until it has done that; such
    a lock is removed in any case.
    """
    path = folder / name
    for attempt in itertools.count():
        new = [part for part in (folder, *folder.parents) if not part.exists()]
        # The system's lock is on the open file: it goes with its process, also with a killed one.
        with _opened(path) as file:
            for tries in itertools.count():
                if lock_file(file):
                    break
                if not waits:
                    raise Busy(f"{folder}: another process is training this run")
                if tries == 1:
                    note(f"waiting for another process that is {waits}")
                time.sleep(0.1)
            # Who had it may have removed it: the next one makes another. (Not all disks can tell.)
            if not _is_there(file, path) and attempt < 100:
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # not empty: of use to somebody else
                    if _is_there(file, path) and (waits or [*folder.iterdir()] == [path]):
                        path.unlink()
                        for part in new:
                            part.rmdir()
            return


def _opened(path):
    """The file `path`, made with its folder, to be locked."""
    for tries in itertools.count(1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                check_regular(path)  # to open a pipe could take for ever
            return open(path, "ab")
        except (FileNotFoundError, FileExistsError):  # another process removes folders meanwhile
            if tries == 100:
                raise


def _is_there(file, path):
    """Whether an open file is still the one at `path`."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def lock_file(file):
    """Lock an open file until it is closed; False while another process has it. Where there are no
    locks this says so, and is True."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        note(f"{file.name}: keeps no other process away, since its file system has no locks "
              f"({error.strerror})")
    return True


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


def trim_events(paths, step):
    """Drop from TensorBoard's files `paths` what was logged after `step`, as those steps will be
    taken again, and a torn last record, which a kill leaves. Of a file with any other damage what
    can be read goes on; the file as it was stays beside it, under a name that TensorBoard does not
    read."""
    for path in paths:
        kept, damaged = [], False
        check_regular(path, 1 << 32)
        for record, event in _event_records(path.read_bytes()):
            damaged |= event is None
            if event and event.HasField("summary") and event.step <= step:
                kept.append(record)
        aside = unused(path.with_name(path.name.replace("events.out.tfevents", "damaged-events")))
        if damaged:
            note(f"{path}: damaged; its points that can be read stay, and the file as it was is "
                  f"now {aside}")
        if kept:
            kept.insert(0, event_bytes(file_version="brain.Event:2"))
            write_atomically(path, b"".join(kept), aside if damaged else None)
        elif damaged:
            os.replace(path, aside)
        else:
            path.unlink()


def _event_records(content):
    """Yield (bytes, event) of the records in TensorBoard's file, None for a damaged event: with the
    length of a record damaged, that of all the rest. A torn last record is left out."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    def whole(part, checksum):
        return masked_crc32c(bytes(part)).to_bytes(4, "little") == checksum

    content = memoryview(content)  # whose rest is no copy
    while len(content) >= 12:  # length, its checksum, the event, its checksum: 8 + 4 + n + 4 bytes
        end = 12 + int.from_bytes(content[:8], "little")
        if not whole(content[:8], content[8:12]):
            if any(content):  # zeros are a torn end, too
                yield content, None
            return
        if len(content) < end + 4:
            return
        event = None
        if whole(content[12:end], content[end:end + 4]):
            with contextlib.suppress(DecodeError):
                event = Event.FromString(bytes(content[12:end]))
        yield content[:end + 4], event
        content = content[end + 4:]


@dataclass(frozen=True)
class Table:
    """Rows of text below a header: for the screen, a notebook, Markdown and CSV."""

    header: typing.Sequence[str]
    rows: typing.Sequence[typing.Sequence[str]]
    title: str | None = None
    keys: int = 1  # the first columns, which say what a row is about

    def print(self):
        """Show it on the screen: columns of text wrap at words, and where even the longest words do
        not fit side by side, the columns come in blocks, each with the `keys`."""
        from rich.table import Table as Screen

        header, *rows = [[*map(visible, row)] for row in (self.header, *self.rows)]
        screen, shown = console(), Table(header, rows, keys=self.keys)
        for number, (block, widths) in enumerate(shown._blocks(screen.width)):
            table = Screen(title=visible(self.title) if self.title and not number else None)
            for column, width in zip(block, widths):
                table.add_column(shown.header[column], width=width, overflow="fold")
            for row in shown.rows:
                table.add_row(*(row[column] for column in block))
            screen.print(table)

    def _blocks(self, width):
        """[(columns, their widths)] of tables that fit into `width` characters."""
        from rich.cells import cell_len

        columns = [*zip(self.header, *self.rows)]
        full = [max(map(cell_len, column)) for column in columns]
        least = [max((cell_len(word) for cell in column for word in cell.split()), default=0)
                 for column in columns]
        # A word that is no word, such as a path, may be broken: so that two columns fit, with the 7
        # characters of their lines and spaces.
        least = [min(most, (width - 7) // 2) for most in least]

        def room(block):  # a column has three characters of lines and space, the table one
            return width - 1 - sum(least[column] + 3 for column in block)

        # As many columns side by side as have room for their longest words.
        keys = [*range(self.keys)]
        if room([*keys, max(range(len(columns)), key=least.__getitem__)]) < 0:
            keys = [0]
        blocks = [keys]
        for column in range(len(keys), len(columns)):
            if room([*blocks[-1], column]) < 0 and len(blocks[-1]) > len(keys):
                blocks.append(keys)
            blocks[-1] = [*blocks[-1], column]
        return [(block, _grow([least[column] for column in block],
                              [full[column] for column in block], room(block)))
                for block in blocks]

    def markdown(self, right=()):
        """It in Markdown; numbers of columns that are set to the `right`."""
        rule = ["---:" if column in right else "---" for column in range(len(self.header))]
        lines = [[*map(plain, self.header)], rule, *([*map(plain, row)] for row in self.rows)]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def csv(self):
        """It as comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()

    def _repr_markdown_(self):  # for a notebook
        return f"{plain(self.title or '')}\n\n{self.markdown()}"


def plain(text):
    """Text as one line of Markdown that means nothing but itself, no link either."""
    # Names come from outside: what Markdown or a browser would act on gets a backslash.
    text = html.escape(" ".join(text.splitlines()), quote=False)
    return re.sub(r"[\\`*|~$@#\[\]]|\b_|_\b|:(?=//)|(?<=www)\.", r"\\\g<0>", text, flags=re.I)


class Made(list):
    """The several things that a command made; a notebook shows each of them."""

    def _ipython_display_(self):
        from IPython.display import display

        display(*self)


def _grow(widths, full, room):
    """`widths` of columns made up to `full`, evenly, where `room` characters are left."""
    widths = [*widths]
    for _ in range(max(room, 0)):  # a character goes to the narrowest column that lacks one
        short = [column for column in range(len(widths)) if widths[column] < full[column]]
        if short:
            widths[min(short, key=widths.__getitem__)] += 1
    return widths


def console(stderr=False):
    """rich's console, on which names from outside stand as they are: `[x]` is no markup, `:cat:` no
    picture."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def shows_bars(screen):
    """Whether a bar can move on rich's console `screen`: a terminal, a notebook with ipywidgets."""
    return screen.is_terminal or (screen.is_jupyter
                                  and importlib.util.find_spec("ipywidgets") is not None)


def progress(items, description, total=None):
    """Iterate over `items` with a bar on standard error, where one can move (see `shows_bars`)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    screen = console(stderr=True)
    # Not rich's own `track`, for which `:cat:` in a name is a picture.
    with Progress(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(),
                  Remaining(), console=screen, transient=True,
                  disable=not shows_bars(screen)) as bar:
        yield from bar.track(items, total, description=description)


# ---------------------------------------------------------------------------- command line


class Flag(typing.NamedTuple):
    """A flag of a command: its type, its default as one would type it (None: it must be given),
    what it means, and the words it takes where these are few."""

    kind: typing.Any
    default: str | None = None
    meaning: str = ""
    choices: typing.Sequence[str] = ()


def parse_value(name, text, kind):
    """The value that `text` stands for as type `kind`; ValueError names flag, value and kind.

    Lists are separated by `,` or `+`; `none` is None, or an empty list. Of `A | B` the first is
    taken that `text` can be.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in parts and text.lower() == "none":
            return None
        *others, last = (part for part in parts if part is not type(None))  # the last may complain
        for other in others:
            with contextlib.suppress(ValueError):
                return parse_value(name, text, other)
        return parse_value(name, text, last)
    if origin is tuple:
        items = [] if text.lower() in ("", "none") else re.split("[,+]", text)
        if "" in items:
            raise ValueError(f"{name}={text}: nothing stands before or behind one of its commas")
        return tuple(parse_value(name, item, parts[0]) for item in items)
    if origin is typing.Literal:
        if text in parts:
            return text
        raise ValueError(f"{name}={text}: must be one of {', '.join(parts)}{closest(text, parts)}")
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{name}={text}: takes no value, or true or false")
    if kind is str:
        return os.path.expanduser(text)  # which a shell does at the start of a word alone
    try:
        value = kind(text)
    except ValueError:
        kinds = {int: "a whole number", float: "a number"}
        raise ValueError(f"{name}={text}: must be {kinds.get(kind, kind)}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={text}: must be a finite number")
    return value


def text_of(value):
    """A flag's value as one would type it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "none"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def did_you_mean(meant):
    """A question after `meant`, or "" if that is nothing."""
    return f"; did you mean {meant}?" if meant else ""


def closest(word, known):
    """A question after the `nearest` of `known`, or "" if none is like `word`."""
    return did_you_mean(nearest(word, known))


def nearest(word, known):
    """The one of `known` that `word` may stand for, or None: case and punctuation do not count
    (ResNet-18), and initials may be meant (learning_rate: lr)."""
    def bare(text):
        return re.sub(r"[\W_]", "", text.lower())

    def initials(text):
        return "".join(part[0] for part in re.split("[-_ ]+", text.lower()) if part)

    names = {bare(name): name for name in known}  # as they are compared, and as they are written
    if word.lower() == "gpu" and "cuda" in names:
        return "cuda"
    short = {initials(name): name for name in known if "_" in name}
    # A slip of the fingers first; then initials, either way: learning_rate: lr, bs: batch_size.
    for name in difflib.get_close_matches(bare(word), names, 1):
        return names[name]
    return names.get(initials(word)) or short.get(bare(word))


def flags_of(function, meanings=None):
    """{name: `Flag`} of a command's parameters, in their order.

    The keys of `**flags: Unpack[SomeTypedDict]` are flags too, whose type may be `Annotated` with
    their default, else None. `meanings` says in a line what each flag means.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    found, listed = {}, inspect.Parameter.VAR_POSITIONAL
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints.get(name, str)
        if typing.get_origin(kind) is typing.Unpack:
            more = typing.get_type_hints(typing.get_args(kind)[0], include_extras=True)
            found |= {flag: (kind, *getattr(kind, "__metadata__", (None,)))
                      for flag, kind in more.items()}
        elif parameter.kind not in (listed, parameter.VAR_KEYWORD):
            found[name] = kind, parameter.default
    flags = {}
    for name, (kind, default) in found.items():
        kind = kind.__origin__ if hasattr(kind, "__metadata__") else kind  # of Annotated
        words_of = [part for part in (kind, *typing.get_args(kind))
                    if typing.get_origin(part) is typing.Literal]
        flags[name] = Flag(kind, None if default is inspect.Parameter.empty else text_of(default),
                           (meanings or {}).get(name, ""),
                           typing.get_args(words_of[0]) if words_of else ())
    return flags


def check_words(function, **values):
    """ValueError for one of `values` that is none of the words that `function` takes for it: on the
    command line `parse` refuses them, but from Python anything may come."""
    for name, value in values.items():
        parse_value(name, text_of(value), flags_of(function)[name].kind)


def all_flags(function, words, meanings=None):
    """`flags_of` a command, and what it takes beyond its signature: its attribute `flags`, a
    function of the line's `words`, tells these."""
    return flags_of(function, meanings) | getattr(function, "flags", lambda _words: {})(words)


def value_in(words, flag):
    """The text that `words` give `flag`, or None."""
    # Asked before the line is parsed: which flags there are may depend on it.
    for word, after in zip(words, [*words[1:], ""]):
        name, equals, text = word.partition("=")
        if is_flag(name) and name.strip("-").replace("-", "_") == flag:
            return text if equals else after
    return None


SAME = {"layer": "layers", "layers": "layer"}  # whichever of the two a command calls it


def is_flag(word):
    """Whether a word of the command line names a flag: not so a dash alone, or a number."""
    return bool(re.match("--?[^\\W\\d]|--", word))


def canonical(words, known, listed, first):
    """(`words` without flags, {name: text} of the flags): nothing is lost, nothing guessed.

    `known` has the command's flags. A word without a flag is the value of the flag `first` (None:
    of none), or all are kept, if the command has a list of them (`listed`). `--` says nothing.
    """
    # `--flag=text`, `--flag text` and `--flag` alone all become {flag: text}, or are an error.
    words, plain, values = [word for word in words if word != "--"], [], {}
    while words:
        word = words.pop(0)
        if not is_flag(word):
            if not word:
                raise ValueError("a word is empty, as of a shell's variable that is not set")
            if "=" in word and not Path(word).exists() and (meant := dashed(word, known)):
                raise ValueError(f"{word}: did you mean {meant}?")
            plain.append(word)
            continue
        name, equals, text = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        name = name if name in known else SAME.get(name, name)
        if name not in known or word.startswith("---"):
            raise ValueError(f"{word.partition('=')[0]}: no such flag"
                             f"{did_you_mean(dashed(name, known))} (--help lists all)")
        kind = known[name].kind
        if not equals:
            text = _value_after(words, kind)
        if not text and not (equals and typing.get_origin(kind) is tuple):  # a list may be empty
            raise ValueError(f"--{name}: needs a value")
        if name in values:
            raise ValueError(f"--{name}: is given twice")
        values[name] = text
    if plain and not listed:
        if len(plain) > 1 or first is None or first in values:
            raise ValueError(f"{plain[-1]}: a word too many; values follow their flag, several of "
                             f"them with commas between")
        values[first] = plain.pop()
    return plain, values


def dashed(word, known):
    """The flag that `word`, with its `=value` if it has one, may stand for, or ""."""
    name, equals, text = word.partition("=")
    meant = nearest(name, known) if re.fullmatch(r"[\w-]+", name) else None
    return f"--{meant}{equals}{text}" if meant else ""


def _value_after(words, kind):
    """The value of a flag without `=`: the next of `words`, taken from there, unless it is a flag.

    `--skip_bad` alone means true: so a bool takes the next word only if that is true or false, and
    `--skip_bad FOLDER` leaves the folder alone; `bool | str` (`--resume RUN`) takes any.
    """
    follows = bool(words) and not is_flag(words[0])
    if kind is bool and follows:
        follows = words[0].lower() in ("true", "false")
    if follows:
        return words.pop(0)
    return "true" if bool in (kind, *typing.get_args(kind)) else ""


def parse(commands, words, default=None, moved=None):
    """The call that the command line `words` asks for, ready to be made: parse, then run.

    `commands` are functions by name, `default` is the command meant by a line that begins with a
    flag, `moved` see `command_line`. Each value is converted to its parameter's annotated type;
    what a function takes beyond its signature stays text. Raises ValueError for a line that makes
    no sense.

    Fire would run the function at once, and complain about what is left over afterwards; and it
    takes a flag without a value to be True, and words behind ` -- ` to be for itself. So it is
    given a line in which nothing can be mistaken, and a function that only remembers.
    """
    import fire

    words, moved, remembered = [*words], moved or {}, {}

    @fire.decorators.SetParseFn(str)
    def remember(**flags):
        remembered.update(flags)

    if default and (not words or is_flag(words[0])):
        words = [default, *words]
    if not words or words[0] not in commands:
        raise ValueError(_no_command(words[:1], commands, default, moved))
    function = commands[words[0]]
    for word in words[1:]:
        if (flag := word.partition("=")[0]) in moved:
            raise ValueError(f"{flag}: is now called {moved[flag]}")
    own, known = flags_of(function), all_flags(function, words)
    spec = inspect.getfullargspec(function)  # a parameter that is named always takes no such word
    plain, texts = canonical(words[1:], known, spec.varargs, next(iter(spec.args), None))
    fire.Fire(remember, command=[f"--{name}={text}" for name, text in texts.items()])
    # What a network's own options mean only the function itself knows.
    values = {name: parse_value(name, text, own[name].kind) if name in own else text
              for name, text in remembered.items()}
    missing = [name.upper() if name == next(iter(own)) else f"--{name}={name.upper()}"
               for name in own if own[name].default is None and name not in values]
    if missing:
        raise ValueError(f"{words[0]}: needs {missing[0]} ({words[0]} --help)")
    return functools.partial(function, *plain, **values)


def _no_command(words, commands, default, moved):
    """What to say of a line that begins with no command."""
    word = "".join(words)
    if word in moved:
        return f"{word} has moved: {moved[word]}"
    hint = closest(word, commands)
    if default and not hint:  # a value of one of the default's flags: lenet for --model=lenet
        flags = all_flags(commands[default], ())
        if "=" in word:
            hint = did_you_mean(dashed(word, flags))
        else:
            choices = {choice: f"--{name}={choice}" for name, flag in [*flags.items()][::-1]
                       for choice in flag.choices}
            hint = did_you_mean(choices.get(nearest(word, choices)))
    return f"no command {word!r}{hint or f'; commands: {chr(44).join(commands)}'}"


def command_line(commands, default=None, argv=None, meanings=None, moved=None):
    """Run one of `commands` with the flags of the command line and show what it returns; exit.

    See `parse` for `commands` and `default`. `meanings` says in a line what each flag means,
    `moved` what took the place of commands and flags that are gone. Help exits with 0; ValueError
    and OSError become one line and 2.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    make_output_last()
    try:
        asks = words[:1] == ["help"] or (words[1:] == ["help"] and not Path("help").exists())
        if asks or {"--help", "-h"} & {*words} or not (words or default):
            print(help_text(commands, words, default, meanings or {}))
            sys.exit(0)
        show(parse(commands, words, default, moved)())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if out_of_memory(error):
            error = OSError("out of memory: smaller or fewer images need less")
        if not isinstance(error, (ValueError, OSError)):
            raise
        print(wrapped(f"error: {as_typed(error, commands, words, default)}", sys.stderr),
              file=sys.stderr)
        sys.exit(2)


def out_of_memory(error):
    """Whether an exception says that there was no memory left, on a GPU or elsewhere."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or bool(
        isinstance(error, RuntimeError)
        and re.search("allocate memory|out of memory|ALLOC_FAILED", str(error)))


class _LastingFile(io.FileIO):
    """Standard output that outlives its reader (`| head -1`), a full disk and a closed terminal:
    what cannot be written is dropped, and the run goes on."""

    def write(self, content):
        try:
            return super().write(content)
        except OSError:
            return len(content)  # as if all had been written


def make_output_last():
    """Let nothing about standard output and standard error end a run: neither that they are closed
    nor that their encoding lacks a character, which is replaced."""
    for name in ("stdin", "stdout", "stderr"):  # by their numbers: what is closed is opened so
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, errors="replace"))  # noqa: SIM115
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):  # no notebook's, no test's
            stream.flush()
            setattr(sys, name, io.TextIOWrapper(
                io.BufferedWriter(_LastingFile(stream.fileno(), "w", closefd=False)),
                stream.encoding, "replace", line_buffering=stream.line_buffering,
                write_through=stream.write_through))


def as_typed(error, commands, words, default):
    """What an error says, in the words of the command line.

    The functions of this package speak of arguments: `epochs=0: must be …`, and, in back quotes,
    of those that would help. Here they get their dashes; and what advises one that the command of
    this line does not take is left out: a part of the text between semicolons.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    named = [word for word in (*words[:1], default) if word in commands]
    known = all_flags(commands[named[0]], ()) if named else {}
    with contextlib.suppress(ValueError):  # they may be of a network that is not there
        known |= all_flags(commands[named[0]], words) if named else {}
    # "…; `limit=N` takes fewer; …": advice goes if a flag in it is none of this command's.
    kept = [part for part in text.split("; ")
            if all(name in known for name in re.findall(r"`(\w+)(?:=[^`]*)?`", part))]
    text = re.sub(r"`(\w+(?:=[^`]*)?)`", r"--\1", "; ".join(kept) or text)
    head, colon, rest = text.partition(": ")  # "epochs=0: must be …" begins with the flag
    head = re.sub(r"(^|, )(\w+)(?==)", lambda match: match[1] + "--" * (match[2] in known)
                  + match[2], head)
    return head + colon + rest


def visible(text, stream=None):
    """`text` as `stream`, by default standard output, can show it: without characters that a
    terminal would obey, as a file's name may hold them, or that its encoding lacks."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", text)
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def note(line):
    """Tell something on standard error."""
    print(wrapped(line, sys.stderr), file=sys.stderr)


@functools.cache
def say_once(line):
    """`note` a line, the first time only."""
    note(line)


def wrapped(text, stream, indent=""):
    """`text` broken at words, as wide as the terminal is; as it is where `stream` is none."""
    text = visible(text, stream)
    stream = getattr(stream, "rich_proxied_file", stream)  # while a bar stands below
    isatty = getattr(stream, "isatty", None)  # what stands in for one may only write
    if not (isatty and isatty()):
        return text
    return textwrap.fill(text, shutil.get_terminal_size().columns, subsequent_indent=indent,
                         break_long_words=False, break_on_hyphens=False)


def show(result):
    """Print what a command has made: tables, the paths of files; of a list each. An error that is
    among them, of what could not be made, is raised."""
    if isinstance(result, OSError):
        raise result
    if isinstance(result, Table):
        result.print()
    elif isinstance(result, (list, tuple)):
        for part in result:
            show(part)
    elif path := getattr(result, "path", result if isinstance(result, (str, Path)) else None):
        print(visible(str(path)), flush=True)


def help_text(commands, words, default, meanings):
    """Help for the command that `words` name, or for all."""
    # Of the command that is named, or meant by a line that begins with a flag, or of all.
    chosen = [word for word in words[:1] if word in commands] or (
        [default] if default and words and words[0] not in ("--help", "-h", "help") else commands)
    lines = [f"usage: python {Path(sys.argv[0]).name} COMMAND [--flag=value …]",
             f"commands: {', '.join(commands)}"]
    for name in chosen:
        lines += ["", name, inspect.getdoc(commands[name]) or ""]
        if listed := inspect.getfullargspec(commands[name]).varargs:
            lines.append(f"  {listed.upper() + ' …':<30} {meanings.get(listed, '')}".rstrip())
        for number, (flag, (_, value, meaning, words_of)) in enumerate(
                all_flags(commands[name], words, meanings).items()):
            shown = (f"--{flag}={value}" if value is not None  # the first alone goes without a flag
                     else f"--{flag}={flag.upper()}" if number else flag.upper())
            few = " | ".join(words_of) if len(words_of) < 12 else ""  # not all networks
            text = f"  {shown:<30} {' '.join(filter(None, (meaning, few)))}"
            lines.append(wrapped(text, sys.stdout, " " * 33))
    return "\n".join(lines)


def stats(data: str = "cifar10", root: str = "data", image_size: int | None = None,
          skip_bad: bool = False):
    """A data set's sizes, classes and pixel statistics, each named for what it is."""
    dataset = load(data, root, image_size=image_size, val=0, skip_bad=skip_bad)
    images, sizes = dataset.train.images, torch.bincount(
        dataset.train.labels, minlength=len(dataset.classes)).tolist()
    mean, std = pixel_statistics(images)
    channels = {"pixel mean": mean, "pixel std": std,
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
