"""Training: from a line of settings to a run folder that can be stopped, killed and resumed.

    python train.py --data=shapes
    python train.py --model=resnet18 --resume
    python train.py evaluate runs/lenet
    python train.py predict runs/lenet cat.png

A run lives in `runs/<name>/`: config.json, metrics.csv (a row an epoch), TensorBoard events,
last.pth, best.pth and result.json. Settings come from the recipe of the network in `RECIPES`,
then from the command line. All that is random depends on (seed, epoch, step) alone, so a resumed
run repeats the very steps that an undisturbed one would have taken.
"""

import collections
import contextlib
import copy
import csv
import dataclasses
import datetime
import errno
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import typing
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn

import data
import network as networks
from data import AUGMENTATIONS, Made, Table, closest, load_split, say_once, text_of

# The columns of metrics.csv as TensorBoard groups them: what is compared stands side by side.
TAGS = {"train/loss": "loss/train", "train/accuracy": "accuracy/train", "val/loss": "loss/val",
        "val/accuracy": "accuracy/val", "lr": "schedule/lr", "seconds": "speed/seconds",
        "images_per_second": "speed/images_per_second", "train/objective": "loss/objective"}
COLUMNS = ("epoch", "step", *TAGS)
# A run's folder: what says that it is one, and the paths of all files that runs write there.
MARKER, MARK = ".run", "A run of train.py made this folder.\n"
STEPS = f"step-{'[0-9]' * 9}.pth"  # checkpoints before the last
EMPTYING = "emptying"  # in config.json while the files of a run before are being removed
BESIDE = (EMPTYING, "fingerprint", "processes", "history")  # what else stands there, no settings
BOARD_SUFFIX = "-lab"  # of TensorBoard's files that are not written step by step
WRITTEN = re.compile(
    r"(\.run|\.lock|config\.json|metrics\.csv|result\.json"
    r"|(last|best|step-\d{9}|snapshot-\d{5})\.pth"
    rf"|events\.out\.tfevents\.\d+\.\d{{9}}|test/events\.out\.tfevents\.\S+{BOARD_SUFFIX}"
    r"|test/projector_config\.pbtxt"
    r"|test/\d{5}/(features|pixels)/(metadata\.tsv|sprite\.png|tensors\.tsv))(\.\d+\.tmp)?")
BEGUN = re.compile(r"\.lock|\.run\.\d+\.tmp")  # what one has that was killed before its marker
# What the screen shows of a row, in 80 columns: heading, width and format.
SHOWN = {"epoch": ("epoch", 5, "d"), "step": ("step", 8, "d"), "train/loss": ("loss", 9, ".4f"),
         "train/accuracy": ("acc", 9, ".2%"), "val/loss": ("val_loss", 10, ".4f"),
         "val/accuracy": ("val_acc", 9, ".2%"), "lr": ("lr", 10, ".2g"),
         "seconds": ("time", 9, ".1f")}
# TensorBoard's custom scalars: of its other charts each shows one tag alone.
CHARTS = {"training": {kind: ["Multiline", [f"{kind}/{part}" for part in ("train", "val", "test")]]
                       for kind in ("loss", "accuracy")}}
MOST_LETTERS = 4096  # of a setting; of a path no system takes more, and a title would never end
POINT_STEPS = 50  # between two points of TensorBoard's loss/steps curve
READ_STEPS = {"cpu": 1}  # between two readings of what a device has summed; others: POINT_STEPS
OPTIMIZERS = ("sgd", "muon", "adam", "adamw", "adagrad", "rmsprop")
TTA = ("none", "flip", "full")
SCHEDULES = ("constant", "step", "cosine", "linear", "onecycle")


# ---------------------------------------------------------------------------- settings


def setting(default, text, allowed=None):
    """A field of `Config`: its default, a line of help, and what is allowed: a pair of numbers,
    lowest and highest, or a collection of words."""
    return field(default=default, metadata={"help": text, "allowed": allowed})


def check_setting(name, value, kind, allowed):
    """ValueError unless `value` is of the annotated type `kind` and `allowed` (see `setting`)."""
    several = typing.get_origin(kind) is tuple
    # `int | None` has two kinds, `tuple[str, ...]` that of its parts, `str` itself.
    kinds = typing.get_args(kind)[:1] if several else typing.get_args(kind) or (kind,)
    if float in kinds:
        kinds += (int,)  # a whole number is a number too
    parts = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) != several or not all(
            isinstance(part, kinds) and (bool in kinds or not isinstance(part, bool))
            for part in parts):  # for Python, True is an int
        raise ValueError(f"{name}={value!r:.80}: must be {kind}")
    if any(isinstance(part, str) and len(part) > MOST_LETTERS for part in parts):
        raise ValueError(f"{name}: a text of more than {MOST_LETTERS} letters")
    if any(isinstance(part, str) and re.search("[\ud800-\udfff]", part) for part in parts):
        raise ValueError(f"{name}={value!r}: has bytes that are no text in UTF-8; rename it")
    for part in parts if allowed else ():
        if isinstance(part, str) and part not in allowed:
            raise ValueError(f"{name}={text_of(value)}: must be of {', '.join(allowed)}"
                             f"{closest(part, allowed)}")
        if isinstance(part, (int, float)) and not allowed[0] <= part <= allowed[1]:
            raise ValueError(f"{name}={text_of(value):.80}: must be from {allowed[0]:g} to "
                             f"{allowed[1]:g}")


def as_setting(value):
    """A value that Python code gives for a setting, as settings have it: lists are tuples, paths
    texts, and NumPy's numbers Python's."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):  # of a network's options
        return {name: as_setting(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, range)):
        return tuple(map(as_setting, value))
    return data.path_text(value) if isinstance(value, (str, os.PathLike)) else value


@dataclass(frozen=True)
class Config:
    """All settings of a run, checked. `Config.create` fills in the recipe of the network."""

    # What is trained, and on what.
    model: str = setting("lenet", "network; python network.py list shows all", networks.NETWORKS)
    options: dict = field(default_factory=dict, metadata={"allowed": None})
    data: str = setting("cifar10", "cifar10, cifar100, shapes, or a folder of images")
    root: str = setting("data", "where data sets are downloaded to and cached")
    image_size: int | None = setting(None, "side of the network's images; none: its own", (1, 1024))
    # Small images are cheap, and enough for early epochs; late ones see what test images are like.
    early_size: int | None = setting(None, "side in the early epochs; none: the same", (1, 1024))
    early_share: float = setting(0.5, "share of the epochs that see images of early_size", (0, 1))
    uncropped_epochs: int = setting(0, "last epochs whose images are not cropped", (0, 1e6))
    val: int | None = setting(None, "training images held out; none: a tenth", (0, 1e9))
    limit: int | None = setting(None, "use so many images of each part", (1, 1e9))
    skip_bad: bool = setting(False, "leave out image files that cannot be read")
    # How it is trained.
    epochs: int = setting(30, "passes over the training images", (1, 1e6))
    batch_size: int = setting(128, "images a step, over all processes", (1, 1e6))
    optimizer: str = setting("sgd", "what takes the steps:", OPTIMIZERS)
    lr: float = setting(0.05, "highest learning rate", (0, 1e4))
    momentum: float = setting(0.9, "of sgd, muon and rmsprop", (0, 1))
    nesterov: bool = setting(False, "Nesterov momentum, for sgd")
    weight_decay: float = setting(5e-4, "L2 penalty; decoupled for adamw, none on muon's "
                                  "filters", (0, 1e3))
    schedule: str = setting("cosine", "of the learning rate:", SCHEDULES)
    warmup_epochs: float = setting(1.0, "epochs of linear warm-up", (0, 1e6))
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", (0, 1))
    augment: tuple[str, ...] = setting(
        ("flip", "crop"), "mixup (Zhang et al. 2018, section 2) and cutmix (Yun et al. 2019, "
        "section 3.1) mix two images; none, or of", AUGMENTATIONS)
    ema: float = setting(0.0, "share of itself that a running mean of the weights keeps at a step; "
                         "the mean is evaluated; 0: none", (0, 0.999999))
    clip: float | None = setting(None, "longest gradient, all weights together (Pascanu et al. "
                                 "2013, section 3.2); none: any", (1e-6, 1e9))
    patience: int = setting(0, "epochs without a higher validation accuracy that end the run; 0: "
                            "any", (0, 1e6))
    snapshots: tuple[int, ...] = setting((), "epochs whose weights are kept; 0: none; none: a "
                                         "few, of a small network", (0, 99_999))
    tta: str = setting("none", "views of a test image whose logits are averaged:", TTA)
    # With what, and what the machine may do about it.
    seed: int = setting(0, "of weights, split, order and augmentation", (0, 2**62))
    device: str = setting("auto", "auto: a GPU if there is one;", ("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "auto: bf16 on a GPU made for it;", ("auto", "fp32", "bf16"))
    compile: bool = setting(False, "compile the network with torch.compile")
    deterministic: bool = setting(False, "the same result again on a GPU too, more slowly")
    on_nan: str = setting("stop", "at a loss or gradient that is not finite:", ("stop", "skip"))
    # What is told and kept of it, and where.
    log_steps: int = setting(0, "print the mean loss every so many steps; 0: never", (0, 1e9))
    save_minutes: float = setting(10.0, "minutes between checkpoints within an epoch", (0, 1e6))
    keep: int = setting(2, "checkpoints that remain, last.pth among them; 0: all", (0, 1e6))
    name: str | None = setting(None, "name of the run; none: the network's")
    out: str = setting("runs", "folder of all runs")

    def __post_init__(self):
        kinds = typing.get_type_hints(Config)
        for entry in dataclasses.fields(Config):
            object.__setattr__(self, entry.name, as_setting(getattr(self, entry.name)))
            check_setting(entry.name, getattr(self, entry.name), kinds[entry.name],
                          entry.metadata["allowed"])
        if self.name is not None and (Path(self.name).is_absolute() or ".." in Path(
                self.name).parts or not Path(self.name).parts):
            raise ValueError(f"name={self.name}: must be the name of a folder inside {self.out}; "
                             f"see `out`")
        if self.tta == "full" and self.size < 2:
            raise ValueError("tta=full: moves images, which must be at least 2×2")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")
        object.__setattr__(self, "options", networks.check_options(self.model, self.options))

    @classmethod
    def create(cls, model="lenet", **values):
        """Settings from the recipe of `model`, changed by `values`, fields or network options."""
        fields = {entry.name for entry in dataclasses.fields(cls)}
        known, settings, options = networks.options_of(model), {}, {}
        for name, value in values.items():
            if name in RENAMED:
                raise ValueError(f"{name}: is now called {RENAMED[name]}")
            if name not in fields and name not in known:
                raise ValueError(f"{name}={text_of(value)}: neither a setting of a run nor an "
                                 f"option of {model}{closest(name, [*fields, *known])}; its "
                                 f"options are {', '.join(known)}")
            (settings if name in fields else options)[name] = value
        options = {**settings.pop("options", {}), **options}
        return cls(**{"model": model, **RECIPES.get(model, {}), "options": options, **settings})

    @classmethod
    def from_json(cls, values):
        """Settings from what `dataclasses.asdict` made of them, or ValueError."""
        try:
            return cls(**{RENAMED.get(name, name): value for name, value in values.items()
                          if name not in BESIDE})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not the settings of a run: {error}") from error

    def all_settings(self):
        """Every setting and network option, by name."""
        return {**{name: default for name, (_, default)
                   in networks.options_of(self.model).items()},
                **dataclasses.asdict(self), **self.options, "options": None}

    def changed(self):
        """{name: value} of the settings and network options that the recipe has otherwise."""
        usual = Config.create(self.model).all_settings()
        return {name: value for name, value in self.all_settings().items()
                if value != usual[name]}

    @property
    def size(self):
        """The side of the network's images, in pixels."""
        return self.image_size or networks.image_size_of(self.model)

    @property
    def folder(self):
        """The run's folder."""
        return Path(self.out) / (self.name or self.model)


# What trains each network well on CIFAR-10 on its own; anything not said here is in `Config`.
# README.md and lab/BENCHMARKS.md say what was measured of them, and how they were found.
_CLASSIC = {"epochs": 30, "lr": 0.02, "augment": ("flip", "crop")}
_VGG = {"epochs": 60, "lr": 0.02, "warmup_epochs": 2.0}
_VGG_BN = {"epochs": 100, "lr": 0.1, "warmup_epochs": 2.0}
# Nothing is held out where a recipe is for the highest accuracy in the shortest time.
_FAST = {"batch_size": 512, "optimizer": "muon", "momentum": 0.6, "weight_decay": 0.0,
         "schedule": "linear", "warmup_epochs": 0.0, "early_size": 24, "val": 0, "tta": "full"}
_RESNET = {**_FAST, "epochs": 20, "lr": 0.1, "label_smoothing": 0.1,
           "augment": ("alternating_flip", "crop", "cutout")}
# He et al. 2016, section 4.2, take 64 000 steps of 128 images.
_THIN_RESNET = {"epochs": 160, "lr": 0.1, "warmup_epochs": 2.0, "nesterov": True,
                "weight_decay": 2e-4}
RECIPES = {
    "lenet": {"epochs": 20, "lr": 0.05, "augment": ("flip",)},
    **dict.fromkeys(("lenet5_color", "simple_cnn", "trial_3conv", "trial_4conv",
                     "trial_4conv_late_pool", "convnet_large"), _CLASSIC),
    "convnet": {"epochs": 12, "optimizer": "muon", "lr": 0.1, "momentum": 0.6, "weight_decay": 0.0,
                "schedule": "linear", "warmup_epochs": 0.0, "augment": ("flip",)},
    **dict.fromkeys(("vgg16_1x1", "vgg_a", "vgg11", "vgg13", "vgg16", "vgg19"), _VGG),
    **dict.fromkeys(("vgg_a_bn", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"), _VGG_BN),
    **dict.fromkeys(("resnet18", "resnet34", "resnet50"), _RESNET),
    **dict.fromkeys(("resnet20", "resnet56"), _THIN_RESNET),
    "speednet": {**_FAST, "epochs": 30, "lr": 0.12, "label_smoothing": 0.2, "early_share": 0.55,
                 "uncropped_epochs": 2, "augment": ("alternating_flip", "crop")},
    "resnet18_imagenet": {"epochs": 30, "lr": 0.1, "warmup_epochs": 2.0, "nesterov": True,
                          "label_smoothing": 0.1, "augment": ("flip", "crop")},
}
# What a resumed run may be told anew; all else would make it another run.
MAY_CHANGE = ("epochs", "patience", "snapshots", "device", "compile", "log_steps", "save_minutes",
              "keep", "name", "out", "root", "on_nan", "tta")
# What a checkpoint says of where its last step was taken, besides the commit, and what it is like.
TRAINED_BY = {"versions": {"python": "", "torch": ""}, "device": "", "precision": "",
              "processes": 1}
# Settings of earlier checkpoints and run folders that have another name now.
RENAMED = {"early": "early_share", "uncropped": "uncropped_epochs", "warmup": "warmup_epochs",
           "log_every": "log_steps", "save_every": "save_minutes"}


def parse_flags(flags):
    """`typed` flags, and those in the environment variable TRAIN_FLAGS, which win: with
    TRAIN_FLAGS="--limit=512 --epochs=2" any training command is a quick trial."""
    text = os.environ.get("TRAIN_FLAGS", "")
    try:  # which network they are for is not known yet
        _, more = data.canonical(shlex.split(text), settings_flags(["--resume"]), None, None)
        more = typed(more)
    except ValueError as error:
        raise ValueError(f"TRAIN_FLAGS={text}: {error}") from error
    return {**typed(flags), **more}


def typed(flags):
    """Settings as values of their declared types, from flags as text."""
    known = settings_flags(["--resume"])  # in all networks an option is of the same kind
    return {name: data.parse_value(name, text, known[name].kind)
            if name in known and isinstance(text, str) else text for name, text in flags.items()}


def command_of(config, processes=1):
    """The command line that makes this run again, in so many processes."""
    flags = {"model": config.model, **config.changed()}
    start = ["python"] if (processes or 1) == 1 else [
        "torchrun", "--standalone", f"--nproc_per_node={processes}"]
    return shlex.join([*start, "train.py", *(
        f"--{name}={text_of(value)}" for name, value in flags.items())])


# ---------------------------------------------------------------------------- schedule, optimizer


def learning_rate(step, total_steps, warmup_steps, peak, schedule):
    """The learning rate of `step`, counted from 0: a pure function.

    `warmup_steps` of linear rise, then, over the steps that are left: `constant`; `step`, a tenth
    after a half and again after three quarters of them (He et al. 2016, section 4.2, without
    warm-up); `cosine` (Loshchilov & Hutter 2017) or `linear` to 0; `onecycle`, up for the first
    quarter of all steps or the warm-up and linearly down to 0 (Smith & Topin 2018).
    """
    if schedule == "onecycle":
        warmup_steps = int(max(warmup_steps, total_steps / 4))
        schedule = "linear"
    warmup_steps = min(round(warmup_steps), total_steps - 1)  # so that one step takes the peak
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)  # + 1: a step at rate 0 would be wasted
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * {"constant": 1.0, "step": 0.1 ** ((done >= 0.5) + (done >= 0.75)),
                   "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[schedule]


def make_optimizer(config, network):
    """The optimizer that `config` asks for, in its quickest implementation on this device: the
    fused ones update all parameters in one call instead of one call each."""
    parameters = [value for value in network.parameters() if value.requires_grad]
    device, momentum = parameters[0].device.type, {"momentum": config.momentum}
    fused = {"fused": device in ("cpu", "cuda")}
    kind, options = {
        "sgd": (torch.optim.SGD, {**momentum, "nesterov": config.nesterov, **fused}),
        "muon": (Muon, momentum),
        "adam": (torch.optim.Adam, fused),
        "adamw": (torch.optim.AdamW, fused),
        "adagrad": (torch.optim.Adagrad, {"fused": device == "cpu"}),
        "rmsprop": (torch.optim.RMSprop, momentum),
    }[config.optimizer]
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay, **options)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the filters of convolutions, Nesterov SGD for all else.

    The momentum of a layer's filters, a matrix of one row a filter, is replaced by the nearest
    orthogonal matrix. A step moves the filters by `lr` times their norm, which stays as it was, so
    `weight_decay` is for all else only. torch.optim.Muon does not take filters, and leaves all
    else to a second optimizer.
    """

    def __init__(self, parameters, lr, momentum, weight_decay):
        super().__init__(parameters, {"lr": lr, "momentum": momentum,
                                      "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """Take one step."""
        for group in self.param_groups:
            # Filters of one shape step together: a GPU has half as many kernels to start.
            alike = collections.defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:  # it takes no part
                    continue
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                alike[parameter.shape if parameter.ndim == 4 else None].append(parameter)
            for shape, parameters in alike.items():
                gradients = [parameter.grad for parameter in parameters]
                momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                if not shape:  # of loss + weight_decay/2·‖w‖²
                    gradients = torch._foreach_add(gradients, parameters,
                                                   alpha=group["weight_decay"])
                torch._foreach_mul_(momenta, group["momentum"])
                torch._foreach_add_(momenta, gradients)
                # Nesterov: as if momentum had moved us on.
                steps = torch._foreach_add(gradients, momenta, alpha=group["momentum"])
                if shape:
                    turn(parameters, steps, group["lr"])
                else:
                    torch._foreach_sub_(parameters, steps, alpha=group["lr"])


def turn(filters, steps, lr):
    """Move `filters`, a list of N tensors O×I×K×K, by orthogonal matrices in place of `steps`."""
    rows = [step.permute(0, 2, 3, 1) for step in steps]  # O×K×K×I, as they lie in memory
    turned = orthogonalize(torch.stack([step.flatten(1) for step in rows]))  # N×O×K·K·I
    # Behind batch norm the length of the filters says nothing but how large a step is beside them:
    # so a step is told in shares of it, and it is kept.
    norms = torch.stack(torch._foreach_norm(filters))
    turned *= (lr * norms).view(-1, 1, 1) / norms_of(turned)
    torch._foreach_sub_(filters, [step.view_as(like).permute(0, 3, 1, 2)
                                  for step, like in zip(turned, rows)])
    shares = norms / torch.stack(torch._foreach_norm(filters)).clamp(min=1e-12)
    torch._foreach_mul_(filters, list(shares))


def norms_of(matrices):
    """The Frobenius norms of N matrices, N×1×1, none of them 0; nothing waits for their values."""
    return matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def orthogonalize(matrices, steps=5):
    """The orthogonal matrices nearest to N `matrices`, roughly: singular values become about 1.

    Newton-Schulz iteration with the quintic polynomial of Jordan et al. 2024. It runs on the
    Gram matrices, which are much smaller than the filters of most layers.
    """
    wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    wide = wide / norms_of(wide)
    gram = wide @ wide.mT
    product = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    # A step takes each singular value s of X to 3.4445 s − 4.7750 s³ + 2.0315 s⁵, which from
    # anywhere in 0…1 soon lies around 1: X ← (aI + bG + cG²) X with G = XXᵀ. That factor and G
    # commute, so it can be gathered in `product`, and X itself be multiplied once, at the end.
    for _ in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # bG + cG²
        factor.diagonal(dim1=1, dim2=2).add_(3.4445)
        product = factor @ product
        gram = factor @ gram @ factor
    wide = product @ wide
    return wide.mT if matrices.shape[1] > matrices.shape[2] else wide


# ---------------------------------------------------------------------------- the story


def train(config="lenet", resume=False, overwrite=False, changed_data=False, **settings):
    """Train as `config` says and return the result, which is also in result.json.

    `config` is a `Config`, or the name of a network whose recipe `settings` change, or, of a run
    that goes on, its own settings: train("convnet", data="shapes", epochs=3, dropout=0.2).

    `resume` goes on with the run in `config.folder` if there is one; `overwrite` starts it anew;
    `changed_data` goes on though files of its data set are others now, normalised as they were.
    Raises FileExistsError for a run that exists when neither is asked for. Ctrl-C saves the run
    and then raises SystemExit, in a notebook too.
    """
    for name, value in (("resume", resume), ("overwrite", overwrite),
                        ("changed_data", changed_data)):
        if not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: must be True or False; `out` and `name` say which "
                             f"run is meant")
    if changed_data and not resume:
        raise ValueError("`changed_data`: is of a run that goes on (`resume`)")
    if isinstance(config, str):
        config = config_of(parse_flags({"model": config, **settings}), resume)
    elif settings:
        config = Config.create(**{**dataclasses.asdict(config), **settings})
    device = choose_device(config.device)
    check_folder(config, resume, overwrite)  # here before anything is written, below for good
    with (repeatable(config, device), enough_memory(config), join_workers(device) as workers,
          contextlib.nullcontext() if workers.rank else data.lock(config.folder)):
        check_folder(config, resume, overwrite)
        dataset = load_images(config)
        if config.patience and not dataset.val:  # a tenth of a few images is none
            raise ValueError("patience: needs images that are held out for validation (`val`)")
        # What changes from here on is all in `state`; what is written goes through `folder`.
        state, batches, folder = prepare(config, dataset, device, workers, resume, changed_data)
        try:
            with catch_signals() as stop, live_progress(config, batches) as bar:
                # Processes that disagree on whether to go on would wait for each other for ever:
                # they vote.
                while not workers.any(is_over(config, state.epoch, state.best_epoch), state.sums):
                    train_epoch(state, batches, config, workers, folder, bar, stop)
                    bar(state, None)
                    end_epoch(state, dataset, batches, folder)
                    if workers.any(stop, state.sums):
                        leave(state, folder, stop)
            folder.wait()
            result = finish(state, dataset, folder, workers)
            workers.any(False, state.sums)  # one that leaves early takes its connections along
            return result
        finally:
            folder.close()


def config_of(given, resume=False):
    """The `Config` that settings `given` mean; with `resume`, of a run that is there: its own, and
    those given."""
    folder = Config.create(**{name: given[name] for name in ("model", "out", "name")
                              if name in given}).folder
    if not (resume and (folder / "config.json").exists()):
        return Config.create(**given)
    saved = read_config(folder / "config.json")
    # Checked as a new run's would be, before the settings of the old one come in.
    config = Config.create(**{"model": saved.model, **given})
    saved = saved if "root" in given else dataclasses.replace(saved, root=root_of(saved))
    return dataclasses.replace(saved, **{
        **{name: getattr(config, name) for name in given if name not in config.options},
        "out": config.out, "name": config.name, "options": {**saved.options, **config.options}})


def root_of(saved):
    """The folder of data sets of a run that goes on: what a config.json says is no place to write
    to, so its root only where images or caches of this package are already, else the default."""
    root = Path(os.path.expanduser(saved.root))
    there = itertools.chain(root.glob("folder-*.cache"), root.glob("cifar-*"))
    if saved.root == Config.root or saved.data == "shapes" or any(there):
        return saved.root
    data.note(f"root={saved.root}: holds no data set or cache of ours; {Config.root} is taken "
              f"(--root)")
    return Config.root


def is_over(config, epochs, best):
    """Whether a run of `config` ends after so many `epochs`, of which number `best` was best."""
    return epochs >= config.epochs or 0 < config.patience <= epochs - best


def train_epoch(state, batches, config, workers, folder, bar, stop):
    """The rest of epoch `state.epoch`, from where `state.step` stands in it."""
    state.network.train()
    steps, saved_at = len(batches), time.monotonic()
    # As if the part of the epoch before a stop had ended just now.
    started = time.perf_counter() - state.epoch_seconds
    point_steps = config.log_steps or POINT_STEPS
    # A GPU works off what has been asked of it while Python goes on to the next step. Whoever reads
    # a number from it waits until all that is done, so numbers are read at these steps alone; a CPU
    # has nothing to gain from waiting less.
    read_steps = READ_STEPS.get(state.sums.device.type, POINT_STEPS)
    # Steps of this epoch that were taken before a stop.
    first = state.step - state.uncounted - state.epoch * steps
    # Convolutions and the pooling at the end take any size: fewer pixels, less time.
    early_epochs = round(config.early_share * config.epochs, 6)  # .55·100 is a little more than 55
    size = config.early_size if state.epoch < early_epochs else None
    crop = state.epoch < config.epochs - config.uncropped_epochs
    for step, (images, labels) in enumerate(batches.epoch(state.epoch, first, size, crop),
                                            first + 1):
        lr = learning_rate(state.epoch * steps + step - 1, config.epochs * steps,
                           config.warmup_epochs * steps, config.lr, config.schedule)
        train_step(state, images, labels, config, workers, lr, batches.batch_size)
        state.step += 1
        last, at_point, reads = step == steps, step % point_steps == 0, step % read_steps == 0
        if reads or at_point or last:
            state.read_sums()
            state.epoch_seconds = time.perf_counter() - started
            check_finite(state, lr, folder)
            bar(state, step)
        if at_point:
            log_point(state, step, config, folder)
        # Several processes ask each other through the device, so only where it was waited for.
        halt = (workers.world == 1 or reads) and not last and workers.any(stop, state.sums)
        if halt or (not last and time.monotonic() - saved_at > 60 * config.save_minutes):
            folder.save(state)
            saved_at = time.monotonic()
        if halt:
            leave(state, folder, stop)


def train_step(state, images, labels, config, workers, lr, batch_size):
    """One step of the optimizer; adds to `state.sums`. `images` are this process's share."""
    seed_step(config.seed, state.step, workers.rank, images.device)
    skips = config.on_nan == "skip"
    before = {tensor: tensor.detach().clone() for tensor in changing(state)} if skips else None
    # Mixed images have two labels each, with their shares; see `data.mix`.
    targets = [(labels, 1.0)]
    if set(config.augment) & set(data.MIXTURES):
        images, targets = data.mix(images, labels, config.augment, config.seed, state.step)
    with autocast(images.device, config.precision):
        logits = state.network(images)
    loss, sums = measure(logits.float(), targets, config.label_smoothing)
    state.optimizer.zero_grad(set_to_none=True)
    with workers.sharing(state.network, [*state.parameters()], sums):
        (loss / batch_size).backward()  # by that of all processes, whose gradients are summed
    # In any case, not for `clip` alone: one number tells whether any gradient is not finite.
    norm = nn.utils.get_total_norm([parameter.grad for parameter in state.parameters()])
    if config.clip is not None:
        nn.utils.clip_grads_with_norm_([*state.parameters()], config.clip, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.follow(config.ema)
    # A tensor on the device, not yet known here: the step is taken, and undone where it was wrong.
    finite = sums[3].isfinite() & norm.isfinite()
    state.sums += torch.where(finite, sums, 0.0 if skips else math.nan)
    if skips:
        put_back(state, before, ~finite)


def measure(logits, targets, smoothing):
    """(what a step lowers, summed over the images; sums over the images, as `State.totals`).

    `targets` are [(labels, their share)], more than one for mixed images. What is logged as the
    loss is the plain cross-entropy, which compares with that of validation images; with
    `smoothing` a step lowers another.
    """
    def weighted(value_of):
        values = [value_of(labels) if share == 1 else share * value_of(labels)
                  for labels, share in targets]
        return sum(values[1:], values[0])

    objective = weighted(lambda labels: F.cross_entropy(logits, labels, reduction="sum",
                                                        label_smoothing=smoothing))
    loss, answers = objective.detach(), logits.argmax(1)  # logits are B×classes
    if smoothing:
        with torch.no_grad():
            loss = weighted(lambda labels: F.cross_entropy(logits, labels, reduction="sum"))
    # The number of images is written by the device itself: a Python number that is put into a
    # tensor of the device is copied there, and the CPU waits until it has arrived.
    return objective, torch.stack([loss, weighted(lambda labels: (answers == labels).sum()),
                                   torch.full_like(loss, len(logits)), objective.detach()])


def seed_step(seed, step, rank, device):
    """Make what is random inside a network (dropout) a function of (seed, step, rank)."""
    number = ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63  # primes, so that they do not meet
    if device.type in ("cuda", "mps"):  # torch.manual_seed would seed the other GPUs as well
        torch.get_device_module(device).manual_seed(number)
    torch.default_generator.manual_seed(number)


def changing(state):
    """All tensors that a step changes: parameters, buffers, their means over the steps, and what
    the optimizer keeps."""
    for network in {state.network, state.evaluated}:  # the same one, but for `ema`
        yield from itertools.chain(network.parameters(), network.buffers())
    for kept in state.optimizer.state.values():
        yield from filter(torch.is_tensor, kept.values())


@torch.no_grad()
def put_back(state, before, undo):
    """Undo a step where the tensor `undo` is true, without waiting to know whether it is; what the
    optimizer has only just begun to keep is zero again."""
    for tensor in changing(state):
        if tensor.device == undo.device:  # counters of steps may be elsewhere, and may go on
            tensor.copy_(torch.where(undo, before.get(tensor, torch.zeros_like(tensor)), tensor))


def leave(state, folder, stop):
    """Exit once all is saved, with the status of a process that the first signal in `stop` ended;
    where none came, another process of this run was told to stop."""
    folder.wait()
    folder.say(f"stopped at step {state.step}; saved. The same command with --resume goes on")
    sys.exit(128 + (*stop, signal.SIGTERM)[0])


def check_finite(state, lr, folder):
    """Raise ValueError when a loss or gradient of this epoch was not finite."""
    # One step that was not finite has made the sum NaN, whenever it is read.
    if not math.isfinite(state.totals[3]):
        raise ValueError(
            f"the loss or a gradient is not finite at step {state.step} (learning rate {lr:g}); "
            f"{folder.last_good()}; lower `lr`, or go past such steps with `on_nan=skip`")


def log_point(state, step, config, folder):
    """Log the mean loss and accuracy over the steps since the last such point."""
    loss, correct, count, _ = (now - then for now, then in zip(state.totals, state.logged))
    state.logged = state.totals
    if count == 0:
        return
    folder.scalars({"loss/steps": loss / count}, state.step)
    if config.log_steps:
        folder.say(f"[epoch {state.epoch + 1}, step {step:6d}] loss {loss / count:.3f} "
                   f"accuracy {correct / count:.2%}")


def end_epoch(state, dataset, batches, folder):
    """Validate, write the epoch's row, and save."""
    config, (loss, correct, count, objective) = folder.config, state.totals
    if not count:
        raise ValueError(f"every step of epoch {state.epoch + 1} was skipped, for its loss or "
                         f"gradient was not finite; {folder.last_good()}; lower `lr`")
    skipped = len(batches) - round(count / batches.batch_size)
    if config.on_nan == "skip" and skipped:
        folder.say(f"{skipped} of the epoch's {len(batches)} steps were skipped: their loss or "
                   f"gradient was not finite")
    validation = {"loss": None, "accuracy": None}
    if dataset.val:
        logits = predict(state.evaluated, dataset.val.images, folder.preprocessing)
        validation = score(logits, dataset.val.labels, len(dataset.classes))
        if not logits.isfinite().all():  # answers that say nothing, not wrong ones
            validation["accuracy"] = None
    state.epoch += 1
    row = {"epoch": state.epoch, "step": state.step, "train/loss": loss / count,
           "train/accuracy": correct / count, "val/loss": validation["loss"],
           "val/accuracy": validation["accuracy"],
           "lr": state.optimizer.param_groups[0]["lr"], "seconds": state.epoch_seconds,
           "images_per_second": len(batches) * batches.batch_size / state.epoch_seconds,
           "train/objective": objective / count if config.label_smoothing else None}
    line = ",".join(format_cell(row[name]) for name in COLUMNS) + "\n"
    state.metrics += line
    folder.row(row, line, histograms(state.network))
    # Of epochs that do equally well the first stays, the one with less training.
    accuracy = validation["accuracy"]
    best = accuracy is not None and accuracy > state.best_accuracy
    if best:
        state.best_accuracy, state.best_epoch = accuracy, state.epoch
    elif state.best_accuracy < 0 < state.best_epoch and folder.writes:  # on images as they were
        (folder.path / "best.pth").unlink(missing_ok=True)
    state.seconds += state.epoch_seconds
    state.epoch_seconds, state.totals, state.logged = 0.0, (0.0,) * 4, (0.0,) * 4
    folder.save(state, best, state.epoch in snapshot_epochs(config, state.network))


def snapshot_epochs(config, network, count=8, largest=2**20):
    """The epochs whose weights are kept: those that `config` names, or else about `count` over the
    run of a network of at most `largest` parameters, 2 MB each."""
    if config.snapshots or networks.count_parameters(network) > largest:
        return config.snapshots
    return {round(config.epochs * number / count) for number in range(1, count + 1)}


# ---------------------------------------------------------------------------- how a run begins


@dataclass
class State:
    """What changes during a run, all of which a checkpoint keeps.

    `totals` are the sums of the cross-entropy, of correct answers, of images and of what the steps
    lowered (see `measure`) over the epoch so far, without skipped steps; `logged` is
    what they were when the mean loss was last logged. `sums` are the same of the latest steps, on
    the device, until they are read.
    """

    network: nn.Module
    evaluated: nn.Module  # and saved: has the running mean of the weights, if `ema` asks for one
    optimizer: torch.optim.Optimizer
    sums: torch.Tensor
    totals: tuple[float, ...] = (0.0,) * 4
    logged: tuple[float, ...] = (0.0,) * 4
    epoch: int = 0  # epochs that are done
    step: int = 0  # steps that are done, over all epochs
    uncounted: int = 0  # of those, what `epoch` epochs of the images as they are now do not have
    epoch_seconds: float = 0.0  # of the epoch so far
    seconds: float = 0.0  # of the epochs that are done, their steps alone
    best_accuracy: float = -1.0  # on validation images: below any, so that the first epoch is best
    best_epoch: int = 0
    history: str = ""  # what was otherwise in earlier steps, see `otherwise`
    metrics: str = ",".join(COLUMNS) + "\n"  # metrics.csv, written from here when the run goes on

    @torch.no_grad()
    def follow(self, ema):
        """Let the running mean follow the weights: it keeps the share `ema` of itself, but less in
        the first steps, (1 + step) / (10 + step), so that it soon forgets the first ones."""
        if self.evaluated is self.network:
            return
        kept = min(ema, (1 + self.step) / (10 + self.step))
        # State dictionaries are views of the weights and buffers, of both in the same order.
        for mean, tensor in zip(self.evaluated.state_dict().values(),
                                self.network.state_dict().values()):
            if tensor.is_floating_point():
                mean.lerp_(tensor, 1 - kept)
            else:
                mean.copy_(tensor)

    def parameters(self):
        """The parameters that are trained."""
        return (parameter for group in self.optimizer.param_groups
                for parameter in group["params"])

    def read_sums(self):
        """Add `sums` to `totals`, which waits for the device."""
        self.totals = tuple(map(sum, zip(self.totals, self.sums.tolist())))  # the GPU waits here
        self.sums.zero_()


def load_images(config, writes=True, known=None):
    """The data set that `config` names; `writes` and `known` see `data.load`."""
    return data.load(config.data, config.root, config.size, config.val, config.seed, config.limit,
                     config.skip_bad, writes, known)


def prepare(config, dataset, device, workers, resume, changed_data):
    """(`State`, `Batches`, `RunFolder`) of a run that begins or, with `resume`, goes on; with
    `changed_data` even if its images are no longer those it began with."""
    description = {**describe(config, dataset), **environment(device),
                   "precision": "bf16" if in_bf16(device, config.precision) else "fp32",
                   "processes": workers.world}
    folder = RunFolder(config.folder, config, description, writes=workers.rank == 0)
    # Read before the network is built: it may be damaged, or of another run.
    checkpoint = newest_checkpoint(config.folder, folder.say) if resume else None
    state, others = new_state(config, description, device), False
    if checkpoint:
        others = check_checkpoint(config, checkpoint, description, changed_data, folder.say)
        # How it wants its images is a part of the network, also where these are others now.
        for name in ("mean", "std"):
            description[name] = checkpoint[name]
            dataset = dataclasses.replace(dataset, **{name: tuple(checkpoint[name])})
    batches = batches_of(config, dataset, device, workers)
    if checkpoint:
        restore(state, as_today(checkpoint, config.folder), len(batches), epoch_anew=others)
        state.history = "; ".join(filter(None, [state.history, *otherwise(
            config, checkpoint, description, state.step, len(batches), others)]))
        if is_over(config, state.epoch, state.best_epoch):
            # The last step was taken there, maybe elsewhere; earlier checkpoints do not tell where.
            description |= {name: checkpoint[name] for name in ("commit", *TRAINED_BY)
                            if name in checkpoint}
    else:
        folder.say(f"{config.folder}: {'nothing to resume; ' if resume else ''}starting")
        fit_first_layer(state.network, dataset, config.size)
        state.evaluated.load_state_dict(state.network.state_dict())
    folder.say(batches.describe_way())
    announce(state, config, dataset, device, workers, folder.say)
    workers.any(False, state.sums)  # none writes before all have read
    folder.open(state, anew=checkpoint is None)
    if others:  # they are known from now on, also where no epoch follows
        folder.save(state)
    return state, batches, folder


def otherwise(config, checkpoint, description, step, steps, others):
    """Texts: what was otherwise up to `checkpoint`, at `step`, where a run of `config` goes on. An
    epoch has so many `steps`."""
    before = Config.from_json(checkpoint["settings"])

    def rates(epochs):
        done = range(min(step, steps * min(before.epochs, config.epochs)))
        return [learning_rate(number, epochs * steps, config.warmup_epochs * steps, config.lr,
                              config.schedule) for number in done]

    if before.epochs != config.epochs and (
            config.early_size or config.uncropped_epochs
            or rates(before.epochs) != rates(config.epochs)):
        yield f"planned for {before.epochs} epoch{'s' * (before.epochs > 1)} up to step {step}"
    if before.patience != config.patience:
        yield f"with a patience of {before.patience} up to step {step}"
    processes = checkpoint.get("processes", 1)
    if processes != description["processes"] and checkpoint["epoch"] < config.epochs:
        yield f"in {processes} process{'es' * (processes > 1)} up to step {step}"
    if others:
        yield f"on other images up to step {step}"


@contextlib.contextmanager
def repeatable(config, device):
    """A context that seeds the weights and chooses between speed and repeatability on a GPU."""
    enabled, tuned = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what a process seeds, and where it meets the others
        torch.backends.cudnn.benchmark = not config.deterministic  # the quickest may vary
        if config.deterministic:  # cuBLAS reads it once, before the process's first product
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    changes = config.deterministic != enabled  # a change imports for a second
    if changes:
        torch.use_deterministic_algorithms(config.deterministic)
    try:
        with torch.random.fork_rng(devices=[]):  # the random numbers of who calls are not touched
            torch.manual_seed(config.seed)
            yield
    finally:
        torch.backends.cudnn.benchmark = tuned
        if changes:  # figures use what a GPU cannot repeat
            torch.use_deterministic_algorithms(enabled, warn_only=warns)


def describe(config, dataset):
    """What a checkpoint says of its network, besides weights and progress."""
    return {"model": config.model, "options": dict(config.options),
            "classes": list(dataset.classes), "image_size": config.size,
            "mean": list(dataset.mean), "std": list(dataset.std),
            "data_mean": list(dataset.mean), "data_std": list(dataset.std),  # of the images as now
            "settings": dataclasses.asdict(config), "fingerprint": dataset.fingerprint,
            "held_out": [] if dataset.val is None else torch.bincount(dataset.val.labels).tolist()}


def batches_of(config, dataset, device, workers):
    """This process's training batches of a run."""
    return data.Batches(dataset.train, dataset.mean, dataset.std, config.batch_size, config.augment,
                        config.seed, config.size, device, workers.rank, workers.world)


def new_state(config, description, device):
    """A network with fresh weights and its optimizer, at step 0."""
    network = networks.build(config.model, len(description["classes"]), description["image_size"],
                             **config.options)
    network = network.to(device, memory_format=torch.channels_last)  # as the batches come
    if config.early_size:
        networks.check_size(network, config.early_size)
    if config.compile:
        torch.compiler.reset()  # it compiles but a few networks, those of earlier runs among them
        network.compile()
    return State(network, copy.deepcopy(network) if config.ema else network,
                 make_optimizer(config, network), torch.zeros(4, device=device))


def fit_first_layer(network, dataset, size=None):
    """Set the filters that a network takes from its training images before it is trained, from
    images of side `size`, as it will see them."""
    size = size or dataset.train.images.shape[3]
    count = max(1, 5_000 * 32**2 // max(32, size)**2)  # as many pixels of larger ones
    images = dataset.train.images[::max(1, len(dataset.train.images) // count)]
    for module in network.modules():
        if isinstance(module, networks.WhiteningConv):
            device = module.weight.device
            module.fit(data.Preprocessing(size, dataset.mean, dataset.std)(images, device))


def training_state(state):
    """What a checkpoint keeps for going on, besides weights, epoch and step."""
    kept = {entry.name: getattr(state, entry.name) for entry in dataclasses.fields(state)
            if entry.name not in ("network", "evaluated", "optimizer", "epoch", "step")}
    if state.evaluated is not state.network:
        kept["weights"] = state.network.state_dict()  # not those that are evaluated
    return {**kept, "optimizer": {"state": state.optimizer.state_dict()["state"]}}


def as_today(checkpoint, folder):
    """A run's checkpoint by an earlier version as this one writes it: its metrics.csv was in the
    run's `folder` alone, its sums were tensors, of one loss, and its optimizer had settings; sums
    of steps that were not read yet were not kept."""
    training = {"sums": torch.zeros(4), "uncounted": 0, "history": "", **checkpoint["training"]}
    if "metrics" not in training:
        rows = [row for row in read_rows(folder) if row["epoch"] <= checkpoint["epoch"]]
        training["metrics"] = Table(COLUMNS, [
            ["" if math.isnan(value) else f"{value:.15g}" for value in row.values()]
            for row in rows]).csv()
        for name in ("totals", "logged"):
            if isinstance(training.get(name), torch.Tensor):
                training[name] = tuple(training[name].flatten().tolist())
            if isinstance(training.get(name), tuple) and len(training[name]) == 3:
                training[name] += training[name][:1]
        if isinstance(training.get("optimizer"), dict):
            training["optimizer"].pop("param_groups", None)
    return {**checkpoint, "training": training}


def restore(state, checkpoint, steps, epoch_anew=False):
    """Put `state` where `checkpoint` was saved; ValueError when it is not one of this run.

    `steps` is the number of steps of an epoch. With `epoch_anew` back to the start of the epoch: of
    other images than before, no steps of it count, and no accuracy on them. The steps are numbered
    on, whatever an epoch had of them: checkpoints and TensorBoard's points go by their numbers.
    """
    optimizer, training = state.optimizer, dict(checkpoint["training"])
    if epoch_anew:
        training |= {"uncounted": checkpoint["step"] - checkpoint["epoch"] * steps,
                     "totals": (0.0,) * 4, "logged": (0.0,) * 4, "sums": torch.zeros(4),
                     "epoch_seconds": 0.0, "best_accuracy": -1.0, "best_epoch": checkpoint["epoch"]}
    # An optimizer makes its momenta in its first step, and nothing else tells which it will have:
    # so it takes one, of length 0, and what the checkpoint holds must be made like that.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in state.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not (networks.made_like(training, training_state(state))
            and networks.made_like(checkpoint["weights"], state.network.state_dict())
            and min(checkpoint["epoch"], checkpoint["step"]) >= 0
            and (checkpoint["step"] - training["uncounted"]) // steps == checkpoint["epoch"]):
        raise ValueError("the checkpoint does not fit this run: its weights, its optimizer or its "
                         "step among those of an epoch are those of another")
    state.evaluated.load_state_dict(checkpoint["weights"])
    state.network.load_state_dict(training.pop("weights", checkpoint["weights"]))
    # Its own groups stay: they hold settings, not what was learned.
    optimizer.load_state_dict({**optimizer.state_dict(), **training.pop("optimizer")})
    state.sums.copy_(training.pop("sums"))
    for name, value in training.items():
        setattr(state, name, value)
    state.epoch, state.step = checkpoint["epoch"], checkpoint["step"]


def announce(state, config, dataset, device, workers, say):
    """Say what is about to be trained, on what, and from where."""
    say(f"{config.model} ({networks.count_parameters(state.network):,} parameters) on "
        f"{dataset.name}: {len(dataset.train.labels)} training, "
        f"{len(dataset.val.labels) if dataset.val else 0} validation images; {device}"
        + (f", {workers.world} processes" if workers.world > 1 else "") + f"; {config.folder}")
    if state.epoch >= config.epochs:
        say(f"all {config.epochs} epochs are done, at step {state.step}; measuring")
        return
    if state.step:
        say(f"resuming at step {state.step} (epoch {state.epoch + 1} of {config.epochs})")
    say("".join(f"{name:>{width}}" for name, width, _ in SHOWN.values()))


@contextlib.contextmanager
def enough_memory(config):
    """A context in which memory, or a compiler, that is not there is an OSError that says what
    helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if re.match(r"torch\._(dynamo|inductor)\b", type(error).__module__):
            raise OSError(f"torch.compile does not work here ({str(error).splitlines()[0]}); leave "
                          f"out `compile`") from error
        if not data.out_of_memory(error):
            raise
        raise OSError(f"out of memory: a smaller `batch_size` than {config.batch_size} or "
                      f"`image_size` than {config.size} needs less") from error


@contextlib.contextmanager
def catch_signals():
    """A list that receives the first SIGINT or SIGTERM; a second one acts at once. One that the
    program ignored from the start stays ignored."""
    received = []

    def note(number, _frame):
        if received and "RANK" not in os.environ:  # torchrun passes on what a terminal sends to all
            raise KeyboardInterrupt
        received.append(number)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: signals are not ours
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)
                  if signal.getsignal(number) != signal.SIG_IGN}  # as `nohup` and `&` ask for
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def live_progress(config, batches):
    """A function of (state, step of the epoch) that keeps a bar up to date on a terminal or in a
    notebook; without a step, the network is being validated."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console, shown = data.console(), [0.0]
    hidden = os.environ.get("RANK", "0") != "0" or not data.shows_bars(console)
    with Progress(TextColumn("epoch {task.fields[epoch]}"), BarColumn(20), TextColumn(
            "{task.fields[doing]}"), TimeRemainingColumn(), transient=True, console=console,
            disable=hidden) as bar:
        task = bar.add_task("", total=config.epochs * len(batches), epoch=1, doing="")

        def update(state, step):
            if step is None:
                bar.update(task, completed=(state.epoch + 1) * len(batches), doing="validating")
            elif time.monotonic() - shown[0] > 0.5:  # a small network takes thousands of steps
                loss, correct, count, _ = state.totals
                count = count or math.nan  # all may have been skipped
                bar.update(task, completed=state.epoch * len(batches) + step,
                           epoch=f"{state.epoch + 1}/{config.epochs}",
                           doing=f"loss {loss / count:.3f}  acc {correct / count:.1%}  "
                                 f"{step * batches.batch_size / state.epoch_seconds:.0f} images/s")
                shown[0] = time.monotonic()

        yield update


# ---------------------------------------------------------------------------- device, processes


def choose_device(name="auto"):
    """The device called `name`; `auto` prefers CUDA, then MPS, then the CPU."""
    name = str(name)  # a torch.device too
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(name for name in available if available[name])
    if name not in available:
        raise ValueError(f"device={name}: must be of auto, {', '.join(available)}"
                         f"{closest(name, available)}")
    if not available[name]:
        raise ValueError(f"device={name}: not available here; there is "
                         f"{', '.join(name for name in available if available[name])}")
    if name != "cuda":
        return torch.device(name)
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise ValueError(f"device=cuda: process {local} of this machine has none to itself; there "
                         f"are {torch.cuda.device_count()} GPUs")
    # Convolutions would compute in TF32, with 10 bits after the point, where fp32 is asked for.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name, local)


def in_bf16(device, precision):
    """Whether the network computes in bf16 on `device`; "auto": where the device really does."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda"
                                   and torch.cuda.is_bf16_supported(including_emulation=False))


def autocast(device, precision):
    """A context in which the network computes in `precision`. Weights stay float32, and the loss
    needs no scaling: bf16 reaches as far as float32 does, with fewer digits."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(device, precision))


@dataclass(frozen=True)
class Workers:
    """The processes that share this run (torchrun): their number and the number of this one."""

    rank: int = 0
    world: int = 1

    def add_up(self, tensors):
        """Begin to sum float32 `tensors` over all processes, in one exchange; the function that
        is returned waits for the sums and puts them in place."""
        flat = torch.cat([tensor.flatten() for tensor in tensors])  # small messages cost as much
        with together():
            exchange = distributed.all_reduce(flat, async_op=True)

        def finish():
            with together():
                exchange.wait()
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part.view_as(tensor))
        return finish

    @contextlib.contextmanager
    def sharing(self, network, parameters, sums):
        """While open, a backward pass leaves gradients that are summed over all processes, as
        are `sums` then; batch norm's statistics become the means.

        The gradients travel while those of the layers below are still being computed. Unlike
        those of DistributedDataParallel, the buckets never change, so a resumed run adds up in
        the same order.
        """
        if self.world == 1:
            yield
            return
        statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        means = [buffer / self.world for buffer in statistics]  # which autograd does not let change
        waiting, ready, begun = buckets_of(parameters), set(), [self.add_up([*means, sums])]

        def note(parameter):
            ready.add(parameter)
            while waiting and ready.issuperset(waiting[0]):  # in the same order everywhere
                begun.append(self.add_up([parameter.grad for parameter in waiting.pop(0)]))

        hooks = [parameter.register_post_accumulate_grad_hook(note) for parameter in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        for finish in begun:
            finish()
        for buffer, mean in zip(statistics, means):
            buffer.copy_(mean)

    def any(self, flag, like):
        """Whether `flag` is true in any process, told by tensors on the device of `like`: all
        processes wait here for each other."""
        if self.world == 1:
            return bool(flag)
        votes = like.new_full((1,), bool(flag))
        self.add_up([votes])()
        return votes.item() > 0


def buckets_of(parameters, most=2**20):
    """`parameters`, last ones first, as a backward pass comes to them, in lists of about `most`
    values, which travel together."""
    buckets, values = [], most
    for parameter in reversed(parameters):
        if values >= most:
            buckets.append([])
            values = 0
        buckets[-1].append(parameter)
        values += parameter.numel()
    return buckets


@contextlib.contextmanager
def together():
    """A context in which the loss of another process is a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError("another process of this run is gone; the same command with "
                              "`resume` goes on from the last checkpoint") from error


@contextlib.contextmanager
def join_workers(device):
    """The `Workers` that torchrun started, connected for as long as the context lasts."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Workers()
        return
    if device.type == "mps":
        raise ValueError(f"device=mps: {world} processes cannot share it; take `device=cpu`")
    try:
        store, rank, _ = next(distributed.rendezvous("env://"))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"the {world} processes cannot meet at {os.environ.get('MASTER_ADDR')}:"
                      f"{os.environ.get('MASTER_PORT')} ({reason})") from error
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # A restarted torchrun keeps its store, with the addresses of the processes before.
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    # Functions of this module keep the group that exists when PyTorch first imports them, on the
    # way; Gloo's threads would then outlive the group, and may abort a process that ends.
    importlib.import_module("torch.distributed.nn")
    on_gpu = device.type == "cuda"
    # The others wait while one reads images or evaluates, however long that takes; of a process
    # that has died, torchrun tells.
    distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank,
                                   world_size=world, device_id=device if on_gpu else None,
                                   timeout=datetime.timedelta(days=1))
    try:
        yield Workers(rank, world)
    finally:
        distributed.destroy_process_group()


# ---------------------------------------------------------------------------- evaluation


def predict(network, images, preprocessing, tta="none", bar=None):
    """Logits N×classes, float32 on the CPU, of uint8 `images`, in large batches.

    `preprocessing` is how the network wants its images, which are moved to its device batch by
    batch; `tta` see `tta_views`; `bar` is the text of a progress bar.
    """
    device = networks.device_of(network)
    # No image is left out, and none counts twice: the last chunk is smaller.
    chunks, logits = images.split(images_at_once(network, preprocessing.image_size)), []
    with torch.no_grad(), networks.looked_at(network), autocast(device, preprocessing.precision):
        for chunk in data.progress(chunks, bar) if bar else chunks:
            pixels = preprocessing(chunk, device)
            logits.append(sum(share * networks.logits_of(network, view)
                              for share, view in tta_views(pixels, tta)))
    return torch.cat(logits).cpu()


def images_at_once(network, image_size):
    """How many images of a data set go through `network` at once, without gradients.

    As many pixels whatever the size of an image, 512 images of 32×32 on a CPU and 4 096 on a GPU,
    but no more than 2²⁶ values, a quarter of a GB, in a layer's output.
    """
    pixels = 2**19 if networks.device_of(network).type == "cpu" else 2**22
    return max(1, min(pixels // image_size**2,
                      2**26 // networks.largest_output(network, image_size)))


def finite_logits(*arguments):
    """What `predict` returns; ValueError where that is no number and says nothing."""
    logits = predict(*arguments)
    if not logits.isfinite().all():
        raise ValueError("the network's outputs are not finite numbers: it has diverged, or the "
                         "file with its weights is damaged")
    return logits


def tta_views(images, tta):
    """[(share, view)] of the views of `images` whose logits are averaged: themselves; `flip`:
    mirrored as well; `full`: both, half of the whole, and both moved by a pixel up-left and
    down-right, an eighth each (Jordan 2024, section 3.5)."""
    if tta not in TTA:
        raise ValueError(f"tta={tta}: must be one of {', '.join(TTA)}")
    if tta == "none":
        return [(1.0, images)]
    # The shares add up to 1: logits keep their scale, and the loss its meaning.
    views = [(1 / 4 if tta == "full" else 1 / 2, images)]
    if tta == "full":
        if images.shape[3] < 2:
            raise ValueError("tta=full: moves images, which must be at least 2×2")
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")  # N×3×(S + 2)×(S + 2)
        views += [(1 / 8, padded[:, :, :-2, :-2]), (1 / 8, padded[:, :, 2:, 2:])]
    return views + [(share, view.flip(3)) for share, view in views]


def check_labels(labels, logits):
    """ValueError when there are no logits for one of the `labels`."""
    if labels.max() >= logits.shape[1]:
        raise ValueError(f"there are images of class number {labels.max()}, counted from 0, and "
                         f"the network has {logits.shape[1]} classes")


def score(logits, labels, classes):
    """Loss, accuracy and accuracy per class of N×classes `logits`: sums divided by counts. A class
    without an image has no accuracy: None."""
    check_labels(labels, logits)
    # Of logits that are all NaN the first is "the largest": no answer, and none that is right.
    correct = (logits.argmax(1) == labels) & logits.isfinite().all(1)
    totals = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[correct], minlength=classes)
    per_class = [hit / total if total else None
                 for hit, total in zip(hits.tolist(), totals.tolist())]
    # In float64, for a sum of ten thousand float32 losses has lost digits.
    return {"loss": F.cross_entropy(logits.double(), labels, reduction="sum").item() / len(labels),
            "accuracy": correct.sum().item() / len(labels), "per_class": per_class}


def calibration(logits, labels, bins=15):
    """(images, mean confidence, accuracy) of each of `bins` of the confidence, and the expected
    calibration error (Guo et al. 2017, equations 2 and 3). NaN where a bin has no images."""
    confidence, guess = logits.double().softmax(1).max(1)  # N each
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1  # ((m − 1)/bins, m/bins]
    # A bin's share of the images times |accuracy − confidence| is |hits − sums| / N: so bins
    # without images count for nothing in the error.
    images, sums, hits = (torch.bincount(number, weights, bins) for weights in (
        None, confidence, (guess == labels).double()))
    return images, sums / images, hits / images, ((hits - sums).abs().sum() / len(labels)).item()


def figures(logits, labels, classes):
    """What is said of a test set of the `classes`, names: loss, accuracies, also of the five
    likeliest where there are more than ten, and calibration error."""
    result = score(logits, labels, len(classes))
    top5 = None
    if len(classes) > 10:  # of ten, five would be half of all
        top5 = (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    return {"test/accuracy": result["accuracy"], "test/top5_accuracy": top5,
            "test/loss": result["loss"],
            "test/calibration_error": calibration(logits, labels)[-1],
            "per_class": dict(zip(classes, result["per_class"]))}


def shown_result(result):
    """[the accuracy of each class as a `Table`, a dash for one without test images; test accuracy,
    loss and calibration error in one line]."""
    line = f"test accuracy {result['test/accuracy']:.2%}"
    if result["test/top5_accuracy"] is not None:
        line += f", of the five likeliest {result['test/top5_accuracy']:.2%}"
    line += (f", loss {result['test/loss']:.4f}, calibration error "
             f"{result['test/calibration_error']:.2%}")
    if result.get("test/accuracy_tta") is not None:
        line += f"; {result['test/accuracy_tta']:.2%} with --tta={result['settings']['tta']}"
    return [Table(("class", "test accuracy"), [
        (name, "–" if accuracy is None else f"{accuracy:.1%}")
        for name, accuracy in result["per_class"].items()]), line]


# ---------------------------------------------------------------------------- the run folder


class RunFolder:
    """All that a run writes. Only process 0 writes; for the others every method does nothing."""

    def __init__(self, path, config, description, writes=True):
        self.path, self.config, self.description = Path(path), config, description
        self.writes, self.saved_step, self.pending = writes, None, None
        self.saver, self.kept = ThreadPoolExecutor(1), []

    @property
    def preprocessing(self):
        """How the network wants its images."""
        return networks.describe(self.description).preprocessing

    def open(self, state, anew):
        """Make the files on disk agree with `state` (or empty the folder) and begin to write."""
        self.saved_step = None if anew else state.step
        if not self.writes:
            return
        data.write_atomically(self.path / MARKER, MARK)
        if anew:
            # Killed here, it leaves the old run, or else the new one and some files that go when
            # that is resumed: the old one ends when config.json is replaced, its result before, as
            # it would count as that of the new one.
            (self.path / "result.json").unlink(missing_ok=True)
            self.write_config({EMPTYING: True})
        remove_written(self.path, lambda name: name.endswith(".tmp") or (
            anew and name not in ("config.json", ".lock", MARKER)))
        with contextlib.suppress(FileNotFoundError):  # else `state` is from last.pth
            os.replace(self.older(), self.path / "last.pth")
        with contextlib.suppress(OSError):  # it is not there, or no file
            text = data.read_text(self.path / "metrics.csv", errors="replace")
            for name in "".join(text.splitlines()[:1]).strip("\0").split(","):
                if name and name.strip('"') not in COLUMNS:
                    raise ValueError(f"{self.path / 'metrics.csv'}: has a column {name:.80} of "
                                     f"somebody else's and would be written anew; move it away")
        # What is of steps behind the checkpoint goes: they will be taken again, in a run of more
        # epochs with other results.
        remove_written(self.path, lambda name: name.startswith("snapshot") and int(
            name[9:14]) > state.epoch)  # snapshot-00012.pth
        with contextlib.suppress(OSError, ValueError):  # not there, or nobody knows of when
            if networks.read(self.path / "best.pth")["epoch"] > state.epoch:
                (self.path / "best.pth").unlink()
        # What a larger `keep` kept, as of a sweep that was told so once, stays.
        keep, before = self.config.keep, 1
        with contextlib.suppress(OSError, ValueError):
            before = read_config(self.path / "config.json").keep
        less = keep and not 0 < before <= keep
        self.kept = checkpoints_before(self.path)[0 if less else max(0, keep - 1):]
        data.write_atomically(self.path / "metrics.csv", state.metrics)
        self.write_config({"fingerprint": self.description["fingerprint"], "history": state.history,
                           "processes": self.description.get("processes", 1)})
        logged = [path for path in written_by_a_run(self.path)  # not what others log there
                  if path.parent == self.path and path.name.startswith("events")]
        data.trim_events(logged, state.step)
        # In the order of their steps also where the clock was set back.
        now = max([time.time(), *(int(path.name.split(".")[3]) for path in logged)])
        self.events = self.path / f"events.out.tfevents.{now:.0f}.{state.step:09d}"
        data.append(self.events, data.event_bytes(file_version="brain.Event:2"))
        if not state.step:
            from torch.utils.tensorboard.summary import custom_scalars

            data.append(self.events, data.event_bytes(summary=custom_scalars(CHARTS)))

    def write_config(self, more=()):
        """Write the settings, and what else is true of the run, to config.json."""
        data.write_atomically(self.path / "config.json", json.dumps(
            {**dataclasses.asdict(self.config), **dict(more)}, indent=1) + "\n")

    def close(self):
        """Wait for what is still being written."""
        self.saver.shutdown()

    def older(self):
        """Where the checkpoint of the step saved last goes when another takes its place."""
        return self.path / f"step-{self.saved_step or 0:09d}.pth"

    def last_good(self):
        """A few words on the last good checkpoint."""
        self.wait()
        return ("there is no checkpoint yet" if self.saved_step is None else
                f"the last good checkpoint is {self.path / 'last.pth'} (step {self.saved_step})")

    def say(self, line):
        """Print a line."""
        if self.writes:
            print(data.wrapped(line, sys.stdout), flush=True)

    def scalars(self, values, step, more=()):
        """Add a point to each TensorBoard curve in `values` (tag → value), and points `more`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self.writes:
            points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            data.append(self.events, data.event_bytes(
                step=step, summary=Summary(value=[*points, *more])))

    def row(self, row, line, more):
        """Add an epoch's row to metrics.csv, where it is the `line`, to TensorBoard, with points
        `more`, and to the screen."""
        if self.writes:
            data.append(self.path / "metrics.csv", line.encode())
        self.scalars({tag: row[name] for name, tag in TAGS.items() if row[name] is not None},
                     row["step"], more)
        self.say("".join(f"{'' if row[name] is None else format(row[name], shown):>{width}}"
                         for name, (_, width, shown) in SHOWN.items()))

    def save(self, state, best=False, snapshot=False):
        """Write `state` as last.pth in the background, as best.pth too if it is the best, and with
        `snapshot` its weights in half precision."""
        weights, training = copied(  # the GPU waits here
            (state.evaluated.state_dict(), training_state(state)))
        # Never saved: the checkpoint before it is the one to go back to.
        if not networks.finite({**weights, "sums": training["sums"]}):
            raise ValueError(f"the loss, a gradient or the weights are not finite at step "
                             f"{state.step}; {self.last_good()}")
        self.wait()
        if not self.writes:
            self.saved_step = state.step
            return
        checkpoint = {**self.description, "epoch": state.epoch, "step": state.step,
                      "weights": weights}
        # One at a time, in a thread: the next steps go on while the file is written and synced.
        self.pending = self.saver.submit(self._write, checkpoint, training, best, snapshot)

    def wait(self):
        """Wait for the checkpoint that is being written; raises what went wrong with it."""
        if self.pending:
            pending, self.pending = self.pending, None
            self.saved_step = pending.result()

    def _write(self, checkpoint, training, best, snapshot):
        # On the disk before the checkpoint: points too many are cut when the run goes on, while
        # none that is missing could be made again.
        with data.writing(self.events), open(self.events, "ab") as file:
            os.fsync(file.fileno())
        if best:
            networks.save(self.path / "best.pth", checkpoint)
        if snapshot:
            networks.save(self.path / f"snapshot-{checkpoint['epoch']:05d}.pth", {
                **checkpoint, "weights": networks.in_half(checkpoint["weights"])})
        # Of the same step again, as at the end of an epoch, it takes the place of the one before.
        keep, again = self.config.keep, self.saved_step == checkpoint["step"]
        networks.save(self.path / "last.pth", {**checkpoint, "training": training},
                      None if keep == 1 or again else self.older())
        if keep:
            ours = [path for path in checkpoints_before(self.path) if path not in self.kept]
            for path in ours[keep - 1:]:
                path.unlink()
        return checkpoint["step"]


def histograms(network, most=10_000):
    """TensorBoard's points of the distributions of `network`'s filters and matrices, and of their
    gradients in the step before: of `most` values of each, so that it takes no time."""
    from torch.utils.tensorboard.summary import histogram

    points = []
    for name, weight in network.named_parameters():
        for what, tensor in (("weights", weight), ("gradients", weight.grad)):
            if weight.ndim > 1 and tensor is not None:
                values = tensor.detach().flatten()
                if len(values) > most:  # at random: every n-th might be the same place of kernels
                    chosen = torch.randint(len(values), (most,), generator=data.generator(name))
                    values = values[chosen.to(values.device)]
                values = values.cpu()
                if values.isfinite().all():
                    points += histogram(f"{what}/{name}", values.numpy(), 30).value
    return points


def copied(values):
    """A copy on the CPU of nested dictionaries, tuples and lists of tensors and plain values."""
    if isinstance(values, dict):
        return {name: copied(value) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(copied(value) for value in values)
    return values.to("cpu", copy=True) if isinstance(values, torch.Tensor) else values


def format_cell(value):
    """A number as metrics.csv shows it; nothing for None."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def read_rows(run):
    """The rows of a run's metrics.csv, {column: number}, NaN where nothing was measured; [] without
    one. Those that are not whole are left out; ValueError for a damaged file."""
    path = Path(run) / "metrics.csv"
    try:
        header, *lines = [*csv.reader(io.StringIO(data.read_text(path, errors="replace")))] or [[]]
        # Earlier versions had not the last column.
        if lines and tuple(header) not in (COLUMNS, COLUMNS[:-1]):
            raise ValueError(f"its first line is not {','.join(COLUMNS)}")
        return [dict(zip(COLUMNS, [*map(float, (cell or "nan" for cell in line)), math.nan]))
                for line in lines if len(line) == len(header)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def read_metrics(run):
    """metrics.csv as {column: [numbers]} (see `read_rows`); FileNotFoundError without a row."""
    rows = read_rows(run)
    if not rows:
        raise FileNotFoundError(f"{run}: no run with a finished epoch (no rows in metrics.csv)")
    return {name: [row[name] for row in rows] for name in COLUMNS}


def check_folder(config, resume, overwrite):
    """Raise what speaks against a run in `config.folder`, before any work is done."""
    folder = config.folder
    check_apart(config, resume)
    if folder.name == "test" and is_run(folder.parent):
        raise FileExistsError(f"{folder}: is where the run {folder.parent} keeps TensorBoard's "
                              f"files of its test images; take another name (`name=NAME`)")
    if folder.exists() and not is_run(folder) and not (
            folder.is_dir() and all(BEGUN.fullmatch(path.name) for path in folder.iterdir())):
        raise FileExistsError(f"{folder}: is there and is not the folder of a run; a run needs a "
                              f"folder of its own (`name=NAME`, `out=FOLDER`)")
    check_no_links([folder / ".lock", folder / "test", *folder.glob("test/**/*"),
                    *folder.glob("events*"), *folder.glob("*.tmp")])
    if resume:
        check_same_run(config, moved=True)
    elif not overwrite and {path.name for path in written_by_a_run(folder)} - {".lock", MARKER}:
        raise FileExistsError(f"{folder}: a run is there already; go on with it (`resume`), take "
                              f"another name (`name=NAME`) or start it anew (`overwrite`)")


def check_no_links(paths):
    """FileExistsError for one of `paths` in a run's folder that is a link, or no file: the folder
    may be from elsewhere, and what is written there would go to where its author says."""
    for path in paths:
        if path.is_symlink():
            raise FileExistsError(f"{path}: is a link, and a run writes into its own folder alone; "
                                  f"put there what it leads to")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise FileExistsError(f"{path}: is neither a file nor a folder; move it away")


def check_apart(config, resume):
    """ValueError when images lie in the run's folder, or it lies among them."""
    # Not Path.resolve, which raises an error of its own where a link leads to itself.
    folder, images = Path(os.path.realpath(config.folder)), data.folder_of(config.data)
    places = {} if resume else {"root": Path(os.path.realpath(config.root))}  # for `resume=.`
    places |= {"data": images} if images and images.is_dir() else {}
    for name, path in places.items():
        if folder in (path, *path.parents) or (name == "data" and path in folder.parents):
            raise ValueError(f"{name}={getattr(config, name)}: images and the run's folder, "
                             f"{config.folder}, must lie apart (`{name}`, `out`, `name`)")


def differing(now, before):
    """The names of settings that have another value in `now` than in `before`, both of all of them
    by name, and make another run."""
    now, before = ({**values, "data": data.place_of(values["data"])} for values in (now, before))
    return [name for name in sorted({*now, *before})
            if now.get(name) != before.get(name) and name not in MAY_CHANGE]


def check_same_run(config, before=None, moved=False):
    """ValueError when the run in `config.folder` began with settings of another meaning, unless it
    is not there: with those `before`, or else those in its config.json. With `moved` its images may
    be in another folder now: whoever reads them compares them, see `check_checkpoint`."""
    path = config.folder / "config.json"
    if before is None and not path.exists():
        return
    now, before = config.all_settings(), (before or read_config(path)).all_settings()
    if moved and (folder := data.folder_of(now["data"])) and folder.is_dir():
        before["data"] = now["data"]
    for name in differing(now, before):
        raise ValueError(f"{name}={now.get(name)}: the run in {config.folder} has "
                         f"{before.get(name)}; a run goes on with the settings it began with "
                         f"(`name=NAME` starts another)")


def check_epochs(config, before):
    """ValueError when a checkpoint, or a result, of the run is of more epochs than `config` wants.
    """
    if config.epochs < before.epochs:
        raise ValueError(f"epochs={config.epochs}: the run in {config.folder} is one of "
                         f"{before.epochs} epochs, which may grow but not shrink")


def check_checkpoint(config, checkpoint, description, changed_data, say):
    """Whether `checkpoint` is of other images, which `changed_data` must allow. ValueError when it
    is of another run than the one that `config` and the new `description` speak of, whatever the
    other files of the run say."""
    known = "fingerprint" in checkpoint  # earlier ones have none
    before = Config.from_json(checkpoint["settings"])
    check_same_run(config, before, moved=known)
    check_epochs(config, before)
    if checkpoint["classes"] != description["classes"]:
        raise ValueError(f"data={config.data}: its classes are "
                         f"{difference(description['classes'], checkpoint['classes'])}")
    # Earlier versions held out as many images of each class: of classes of one size the same ones.
    counts = description["held_out"]
    if "held_out" not in checkpoint and counts and max(counts) - min(counts) > 1:
        raise ValueError(f"data={config.data}: an earlier version began this run and held out "
                         f"others of its images, whose classes are not of one size; start it anew "
                         f"(`overwrite`)")
    # Other images may have the same names and sizes, but not the same mean colour; as for another
    # decoder of the same files, it rounds otherwise.
    colors = [part.mean + part.std for part in (networks.describe({
        **each, "mean": each.get("data_mean", each["mean"]),
        "std": each.get("data_std", each["std"])}).preprocessing
        for each in (checkpoint, description))]
    same = known and data.same_files(checkpoint["fingerprint"], description["fingerprint"])
    others = not same or math.dist(*colors) > 1e-4
    if others and not changed_data and known:
        raise ValueError(f"data={config.data}: files were added, removed or changed since the run "
                         f"began; go on with them as they are now (`changed_data`)")
    commit = checkpoint.get("commit")
    if commit and commit != description["commit"]:
        # From elsewhere it may be any text, also one that a terminal obeys.
        shown = commit if commit.isprintable() and len(commit) <= 80 else "that cannot be shown"
        say(f"note: saved by the code of commit {shown}; this is "
            f"{description['commit'] or 'another'}, whose steps may differ")
    return others and changed_data


def read_config(path):
    """The settings in a config.json; ValueError or OSError name what is wrong with it."""
    return data.read_json(path, Config.from_json)


def is_run(folder):
    """Whether a run of this package made `folder`; runs of earlier versions left no marker."""
    with contextlib.suppress(OSError):
        if (folder / MARKER).is_file() and (folder / MARKER).stat().st_size == len(MARK):
            return True
    with contextlib.suppress(OSError, ValueError):
        # All versions wrote all settings; a few may be in anybody's config.json.
        named = data.read_json(folder / "config.json",
                               lambda values: Config.from_json(values) and {*values})
        return {"model", "data", "batch_size", "seed"} <= named and any(
            (folder / name).exists() for name in ("last.pth", "metrics.csv"))
    return False


def written_by_a_run(folder):
    """The files in `folder` that runs of this package write: all that is ever removed."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()
            and WRITTEN.fullmatch(path.relative_to(folder).as_posix())]


def check_output(path, suffix, flag="out"):
    """ValueError unless a command may write a file of the kind `suffix` to `path`, which `flag`
    names: a picture, say, is not replaced, and no file of a run, which would take it for its own.
    """
    if path.suffix.lower() != suffix:
        raise ValueError(f"{flag}={path}: must be a file whose name ends in {suffix}")
    if WRITTEN.fullmatch(path.name) and is_run(path.parent):  # also one that is not there yet
        raise ValueError(f"{flag}={path}: is for a file that the run writes; choose another place")


def remove_written(folder, chosen):
    """Remove those files of runs in `folder` whose names there are `chosen`, a function of the
    name, and the folders of TensorBoard's board that are empty by that."""
    for path in written_by_a_run(folder):
        if chosen(path.relative_to(folder).as_posix()):
            path.unlink()
            for parent in path.relative_to(folder).parents[:-1]:  # inner ones first
                with contextlib.suppress(OSError):  # not empty
                    (folder / parent).rmdir()


def checkpoints_before(folder):
    """A run's checkpoints before last.pth, the newest first."""
    # Numbers with leading zeros: sorted by name is sorted by step.
    return sorted(folder.glob(STEPS), reverse=True)


def newest_checkpoint(folder, say):
    """The newest checkpoint in `folder` to go on from, None if there is none: a damaged one is
    named and the one before it taken. OSError when none is left, or one cannot be read now."""
    with contextlib.suppress(FileNotFoundError):
        if data.read_json(folder / "config.json", lambda values: EMPTYING in values):
            return None  # what is left is of the run before
    paths = [*folder.glob("last.pth"), *checkpoints_before(folder)]
    for path in paths:
        try:
            checkpoint = networks.read(path)
            if not isinstance(checkpoint.get("training"), dict):
                raise ValueError(f"{path}: holds no training state to go on from")
            if not isinstance(checkpoint.get("commit"), str | None):
                raise ValueError(f"{path}: its commit is no text")
            told = {name: like for name, like in TRAINED_BY.items() if name in checkpoint}
            if not networks.made_like({name: checkpoint[name] for name in told}, told):
                raise ValueError(f"{path}: says in another way where it was trained")
            try:
                networks.describe(checkpoint)
            except ValueError as error:
                raise ValueError(f"{path}: does not describe its network ({error})") from error
            return checkpoint
        except (OSError, ValueError) as error:
            # An error of the disk, of rights or of open files may pass: it says nothing of the
            # file, which the checkpoint before it would replace.
            if getattr(error, "errno", None) not in (None, errno.ENOENT):
                raise
            say(f"{error}; trying the checkpoint before it")
    # Without one the run starts anew, and all that is there goes. Killed before the first was
    # written, while the second epoch went on, a run has nothing to go on from anyway; one that came
    # further has weights, if not its last checkpoint.
    if paths or (folder / "result.json").exists() or len(read_rows(folder)) > 2 or any(
            networks.read(path)["epoch"] > 1 for path in written_by_a_run(folder)
            if path.suffix == ".pth"):
        raise OSError(f"{folder}: no checkpoint to go on from can be read; `overwrite` starts anew")
    return None


# ---------------------------------------------------------------------------- opening a network


class Elsewhere(typing.TypedDict, total=False):
    """The flags of commands that take a network from elsewhere; `MEANINGS` says what they mean."""

    weights: str | None
    image_size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def open_network(source, device="auto", weights=None, moved=None, **wishes):
    """The network that `source` means, in evaluation mode on the chosen device, and its
    `Description`. See `network.load`; `wishes` are how it wants its images. `moved` is where the
    data set that it was trained on is now."""
    network, description = networks.load(source, weights, choose_device(device), **wishes)
    if not networks.finite(network.state_dict()):
        raise ValueError(f"{source}: holds weights that are not finite numbers")
    if description.settings:
        try:
            Config.from_json(description.settings)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        network.to(memory_format=torch.channels_last)
        # Its images may have been moved since; a run that went on knows where to.
        place = {}
        with contextlib.suppress(OSError, ValueError):
            path = networks.find_checkpoint(source)
            if WRITTEN.fullmatch(path.name):
                now = read_config(path.parent / "config.json")
                place = {"data": now.data, "root": now.root}
        if moved is not None:
            place["data"] = as_setting(moved)
        description = dataclasses.replace(description, settings={**description.settings, **place})
    return network, description


def open_dataset(description, data=None, root=None):
    """The data set that a network was trained on, split as it was then, or all of another, `data`.

    `root` takes the place of the data set's folder; without it nothing is written or downloaded,
    for where the checkpoint says is for its author to say. Classes are told by their names:
    labels number the network's classes, of which the data set may have some. ValueError for any
    other, and without `data` for files that have changed since.
    """
    config, known = run_settings(description, data, root)
    dataset = load_images(config, writes=root is not None, known=known)
    parts = {part: as_named(getattr(dataset, part), dataset.classes, description, config.data)
             for part in ("train", "val", "test")}
    return dataclasses.replace(dataset, classes=description.classes or dataset.classes, **parts)


def open_test(description, data=None, root=None):
    """The test images of `open_dataset`, without its training images."""
    config, known = run_settings(description, data, root)
    classes, test = load_split("test", config.data, config.root, config.size, config.seed,
                               config.limit, config.skip_bad, writes=root is not None, known=known)
    return as_named(test, classes, description, config.data)


def run_settings(description, data=None, root=None):
    """The `Config` of the run that a network comes from, with `data` and `root` in place of its
    own, and the fingerprint that its own data must have still, None for other data.

    Of `data` that is named all is taken, whatever its path, also where it is the run's own: nothing
    is held out and no limit kept.
    """
    if not description.settings and data is None:
        raise ValueError("a network from elsewhere comes without images; give `data=NAME`; or give "
                         "`image=FILE`")
    config = Config.from_json(description.settings) if description.settings else Config()
    if data is not None:
        config = dataclasses.replace(config, data=as_setting(data), val=0, limit=None)
    config = dataclasses.replace(config, root=as_setting(root or config.root),
                                 image_size=description.preprocessing.image_size)
    return config, description.fingerprint if data is None else None


def as_named(split, classes, description, data):
    """`split`, whose labels number `classes`, with labels that number the network's classes;
    ValueError when it does not know one of them."""
    known = {name: number for number, name in enumerate(description.classes or classes)}
    if not description.classes and all(re.fullmatch("[0-9]{1,9}", name) for name in classes):
        known = {name: int(name) for name in classes}  # the classes of such a network are numbers
        counts = collections.Counter(known.values())
        if twice := [name for name in classes if counts[known[name]] > 1]:
            raise ValueError(f"data={data}: its classes {', '.join(twice)[:200]} must be of "
                             f"different numbers")
    elif not description.classes:
        say_once(f"{data}: the classes {', '.join(classes)[:200]} are taken for those that the "
                 f"network has at numbers 0 to {len(classes) - 1}")
    if not known.keys() >= {*classes}:
        raise ValueError(f"data={data}: its classes are {difference(classes, known)}")
    numbers = torch.tensor([known[name] for name in classes])  # their label i is our numbers[i]
    return split and split._replace(labels=numbers[split.labels])


def difference(classes, known):
    """How `classes` differ from those that a network knows, for a message."""
    every = [*dict.fromkeys([*classes, *known])]
    shown = dict(zip(every, data.told_apart(every)))
    unknown, missing = ([shown[name] for name in one if name not in other]
                        for one, other in ((classes, known), (known, classes)))
    words = [f"{what} {', '.join(names)}" for what, names in (
        ("unknown to the network:", unknown), ("known to it and missing here:", missing)) if names]
    return "; ".join(words)[:500] or (f"in another order than the network's, "
                                      f"{', '.join(known)}")[:500]


# ---------------------------------------------------------------------------- the result


def finish(state, dataset, folder, workers):
    """Look at the test set, once; write result.json and TensorBoard's last pages."""
    if workers.rank:
        return None
    config, prep, labels = folder.config, folder.preprocessing, dataset.test.labels
    if state.epoch < config.epochs:
        folder.say(f"validation accuracy has not risen for {config.patience} epochs: that is all")
    # Which epoch that is was chosen by validation images; the test set has no say in anything.
    chosen = dataset.val or state.best_epoch  # by validation images, maybe as they were
    kept = networks.find_checkpoint(folder.path) if chosen else folder.path / "last.pth"
    if dataset.val and kept.name != "best.pth":
        why = "best.pth is gone" if state.best_accuracy >= 0 else "no epoch is known to be the best"
        folder.say(f"{folder.path}: {why}; the last epoch is measured")
    network, about = open_network(kept, config.device)
    logits = finite_logits(network, dataset.test.images, prep)
    last = dict(zip(COLUMNS, state.metrics.rstrip().rpartition("\n")[2].split(",")))
    # Of a run that an earlier version began, the row may be lost.
    accuracy = last.get("train/accuracy") if last.get("epoch") == str(state.epoch) else ""
    with_tta = None
    if config.tta != "none":
        views = finite_logits(network, dataset.test.images, prep, config.tta)
        with_tta = score(views, labels, len(dataset.classes))["accuracy"]
    result = {
        **figures(logits, labels, dataset.classes), "test/accuracy_tta": with_tta,
        "val/accuracy": state.best_accuracy if (  # below 0 where images have changed since
            kept.name == "best.pth" and state.best_accuracy >= 0) else None,
        "train/accuracy": float(accuracy) if accuracy else None,
        "epoch": about.epoch, "epochs": state.epoch,
        "checkpoint": kept.name, "parameters": networks.count_parameters(network),
        "seconds": round(state.seconds, 3), "settings": dataclasses.asdict(config),
        "command": command_of(config, folder.description["processes"]),
        "fingerprint": dataset.fingerprint,
        "history": state.history or None,
        **{name: folder.description[name] for name in ("commit", *TRAINED_BY)},
    }
    with data.writing(folder.path / "test"):
        # Without it, a run that is killed meanwhile is measured again, board and all.
        (folder.path / "result.json").unlink(missing_ok=True)
        write_board(folder, network, dataset, logits, result, about.step)
    # Last, since a run with a result counts as finished and is not gone on with.
    data.write_atomically(folder.path / "result.json", json.dumps(result, indent=1) + "\n")
    made = (folder.path / name for name in ("result.json", "metrics.csv", "best.pth", "last.pth"))
    data.show([*shown_result(result), *filter(Path.exists, made),
               f"tensorboard --logdir {shlex.quote(str(folder.path))}"])
    return result


# What is read of a result.json, which may be from elsewhere: kinds, and what is allowed.
MEASURED = {"epoch": (int, (0, 1e6)), "epochs": (int, (0, 1e6)), "parameters": (int, (0, 1e15)),
            "seconds": (float, (0, 1e12)), "test/accuracy": (float, (0, 1)),
            **dict.fromkeys(("train/accuracy", "val/accuracy", "test/accuracy_tta"),
                            (float | None, (0, 1))),
            "device": (str, None), "versions": (dict, None), "per_class": (dict, None),
            "processes": (int | None, (1, 1e6)),
            **dict.fromkeys(("commit", "precision", "history"), (str | None, None))}


def checked(result):
    """What a result.json holds, its texts in one line each: none can end the block of code that it
    is shown in, and None for what may lack. ValueError or TypeError for what is not as in
    `MEASURED`."""
    result = {**dict.fromkeys(MEASURED), **dict(result)}
    for name, (kind, allowed) in MEASURED.items():
        check_setting(name, result[name], kind, allowed)
    for text in result["versions"].values():
        check_setting("versions", text, str, None)
    for accuracy in result["per_class"].values():
        check_setting("per_class", accuracy, float | None, (0, 1))
    for texts in (result, result["versions"]):
        texts |= {name: " ".join(text.split()) for name, text in texts.items()
                  if isinstance(text, str)}
    result["settings"] = dataclasses.asdict(Config.from_json(result["settings"]))
    return result


def finished(run, config=None):
    """The result of the run in the folder `run`, None if that is not there or not complete.
    ValueError when it is one of other settings than `config`, where that is given."""
    if not all((run / name).exists() for name in ("config.json", "result.json")):
        return None
    saved = read_config(run / "config.json")
    config = config or saved
    check_same_run(config, saved, moved=True)
    result = data.read_json(run / "result.json", checked)
    measured = Config.from_json(result["settings"])
    others = [name for name in differing(saved.all_settings(), measured.all_settings())
              if name != "data"]  # which may have been moved
    if others:
        raise ValueError(f"{run / 'result.json'}: is of another {others[0]} than config.json")
    check_epochs(config, measured)
    over = is_over(config, result["epochs"], result["epoch"])
    # With other views of the test images it is measured again, and so it is with those of another
    # folder, which are compared then.
    same = data.folder_of(config.data) == data.folder_of(saved.data) and measured.tta == config.tta
    return result if over and same else None


def write_board(folder, network, dataset, logits, result, step):
    """TensorBoard's graph, PR curve per class, hyper-parameters, 25 wrong predictions and
    Projector, in `test/`."""
    from torch.utils.tensorboard.summary import hparams

    remove_written(folder.path, lambda name: name.startswith("test/"))
    for path in (folder.path / "test").glob("events.out.tfevents.*"):  # as earlier versions called
        with contextlib.suppress(OSError):  # theirs, with the very points that are written here
            data.check_regular(path)
            if all(tag in path.read_bytes() for tag in (
                    b"accuracy/test", b"loss/test", b"_hparams_")):
                path.unlink()
    with summary_writer(folder.path / "test") as board:
        shown = data.subset(dataset.test, 100, seed=0)
        pixels = folder.preprocessing(shown.images, networks.device_of(network))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracing says that it will be replaced one day
            board.add_graph(network, pixels[:1])
        shares, labels = logits.softmax(1), dataset.test.labels
        # A class without test images has no curve, rather than one of zeros.
        for number, name in enumerate(dataset.classes):
            if (labels == number).any():
                board.add_pr_curve(f"pr_curve/{name}", labels == number, shares[:, number], step)
        for event in hparams(shown_settings(folder.config),
                             {"accuracy/test": result["test/accuracy"]}):
            board.file_writer.add_summary(event)
        for kind in ("accuracy", "loss"):
            board.add_scalar(f"{kind}/test", result[f"test/{kind}"], step)
        answers = shares.argmax(1)
        for number, index in enumerate((answers != labels).nonzero()[:25, 0].tolist(), 1):
            board.add_image(f"wrong/{number:02}: {dataset.classes[labels[index]]}, taken for "
                            f"{dataset.classes[answers[index]]}", dataset.test.images[index])
        names = [dataset.classes[label] for label in shown.labels.tolist()]
        add_projector(board, network, folder.preprocessing, shown.images, names)


def shown_settings(config):
    """The settings of a run for TensorBoard, which sorts them by name, digits before letters, and
    shows the first few: what matters most, then what is not as by default."""
    first = ("model", "optimizer", "lr", "batch_size", "epochs")
    values = {f"{number} {name}": getattr(config, name) for number, name in enumerate(first, 1)}
    values |= {name: value for name, value in config.changed().items()
               if name not in (*first, "name", "out", "root")}
    return {name: value if isinstance(value, (int, float, str)) else text_of(value)
            for name, value in values.items()}


@contextlib.contextmanager
def summary_writer(folder):
    """TensorBoard's writer of files in `folder`; an error of its thread is raised here alone."""
    from torch.utils.tensorboard import SummaryWriter

    # Of its thread's error, such as a full disk, Python would print a traceback besides.
    before, threading.excepthook = threading.excepthook, lambda _what: None
    board = SummaryWriter(str(folder), filename_suffix=BOARD_SUFFIX)
    try:
        yield board
        board.close()
    finally:
        threading.excepthook = before


def add_projector(board, network, preprocessing, images, labels, layer=None, header=None):
    """Points for TensorBoard's Projector, with sprites: what `layer` makes of uint8 `images`, maps
    by their means, very long vectors by where they lie among each other, and their pixels.

    Without `layer`, what the last linear layer sees. `labels` has a text for each image, or a row
    of texts under the `header`.
    """
    before = layer is None
    if before:
        layer = networks.last_linear(network, preprocessing.image_size)
    device, points = networks.device_of(network), []
    with torch.no_grad(), networks.looked_at(network):
        for chunk in images.split(256):
            with networks.capture(network, [layer], stop=True, inputs=before) as outputs:
                networks.forward(network, preprocessing(chunk, device))
            maps = networks.captured_maps(network, outputs, layer, len(chunk)).float()
            points.append((maps.mean((2, 3)) if maps.ndim == 4 else maps).cpu())  # B×C
    features = torch.cat(points)
    if features.shape[1] > max(2**12, len(features)):  # as text, these would fill the disk
        # Of Vᵀ = Q·R, where Q only turns, R's columns lie among each other as V's rows do, and have
        # but as many coordinates as there are points.
        features = torch.linalg.qr(features.T, mode="r").R.T
    sprites = data.resize(images.float() / 255, min(images.shape[3], 32)).clamp(0, 1)
    pixels = (255 * sprites.flatten(1)).round().byte()  # as text a fifth as long as shares of 1
    for tag, vectors in (("features", features), ("pixels", pixels)):
        board.add_embedding(vectors, labels, sprites, tag=tag, metadata_header=header)


def environment(device):
    """Versions, commit and hardware, as checkpoints and result.json keep them."""
    threads = torch.get_num_threads()
    return {"versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
            "commit": commit_of_code(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{device.type}, {threads} thread{'s' * (threads != 1)}, {processor_name()}"}


def commit_of_code():
    """The commit that these files are of; None where git does not tell."""
    with contextlib.suppress(OSError):  # git may not be there
        return subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"],
                              cwd=Path(__file__).parent, capture_output=True, text=True,
                              check=False).stdout.strip() or None
    return None


def processor_name():
    """The processor's name, where the system tells."""
    with contextlib.suppress(OSError):
        if found := re.search("model name\\s*: (.+)", Path("/proc/cpuinfo").read_text()):
            return found[1].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------- commands


def train_command(*, resume: bool | str = False, overwrite: bool = False,
                  changed_data: bool = False, **flags):
    """Train a network, or go on with a run (--resume)."""
    if resume and overwrite:
        raise ValueError("`resume` and `overwrite`: take one of the two")
    given = parse_flags(flags)
    if isinstance(resume, (str, os.PathLike)):
        path = Path(resume)
        path = path.parent if path.name == "last.pth" else path  # from no other does it go on
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"resume={resume}: no such run (its folder, or the "
                                    f"last.pth in it)")
        if twice := {"out", "name"} & {*given}:
            raise ValueError(f"resume={resume}: says which run it is; leave out "
                             + ", ".join(f"`{name}`" for name in sorted(twice)))
        # Folder and name of one and the same path: of a link, and of ".", where it really is.
        real = Path(os.path.realpath(path))
        path = path if path.name == real.name else real
        given |= {"out": str(path.parent), "name": path.name}
    train(config_of(given, resume), bool(resume), overwrite, changed_data)


def evaluate(ckpt: str, data: str | None = None, root: str | None = None,
             tta: typing.Literal["none", "flip", "full"] = "none", device: str = "auto",
             **elsewhere: typing.Unpack[Elsewhere]):
    """Measure the network in CKPT (a file or a run folder) on the test images of its data set.

    Accuracy, also of the five likeliest of more than ten classes, loss, and expected calibration
    error (Guo et al. 2017, section 2). `--data` takes another data set of the same classes, all of
    it, whatever the run's --limit; the images of CIFAR-10.1 (the file cifar10.1_v6_data.npy, its
    labels beside it; Recht et al. 2018); or the folder of CIFAR-10-C (Hendrycks & Dietterich 2019,
    section 4), for a table of corruptions and severities, and the mean of the 15 that count.
    `--tta=flip` and `--tta=full` average the logits of several views.
    A network from elsewhere is torchvision:NAME or module:function; its classes are numbers.
    """
    network, description = open_network(ckpt, device, **elsewhere)
    data = as_setting(data)
    if data and (Path(data) / "labels.npy").exists():
        return corruption_table(network, description, data, tta)
    test = open_test(description, data, root)
    logits = finite_logits(network, test.images, description.preprocessing, tta)
    names = description.class_names(logits.shape[1])
    result = figures(logits, test.labels, names)
    if not description.classes:  # which of its thousand are in other data only the labels say
        result["per_class"] = {name: accuracy for name, accuracy in result["per_class"].items()
                               if accuracy is not None}
    table, line = shown_result(result)
    return Made([table, f"{line}; {len(test.labels)} images"])


def corruption_table(network, description, folder, tta):
    """The accuracy on every corruption and severity in CIFAR-10-C's `folder`, and their means."""
    rows = {name: [score(finite_logits(network, split.images, description.preprocessing, tta),
                         as_named(split, data.CIFAR10, description, folder).labels,
                         len(description.classes))["accuracy"] for split in severities]
            for name, severities in data.corruptions(folder)}
    if not rows:
        raise FileNotFoundError(f"{folder}: labels.npy and no <corruption>.npy beside it")
    counted = [row for name, row in rows.items() if name not in data.EXTRA_CORRUPTIONS] or [
        *rows.values()]
    rows[f"mean of {len(counted)}"] = [sum(column) / len(column) for column in zip(*counted)]
    return Table(("corruption", *(f"severity {number}" for number in range(1, 6)), "mean"), [
        (name, *(f"{value:.1%}" for value in [*values, sum(values) / len(values)]))
        for name, values in rows.items()])


def predict_command(*paths: str, top: int = 3, out: str | None = None, device: str = "auto",
                    **elsewhere: typing.Unpack[Elsewhere]):
    """The likeliest classes of pictures: CKPT PICTURE …, files or folders of them.

    `--top` classes of each with their probabilities; `--out` is a CSV file of them. Pictures that
    cannot be read are named at the end.
    """
    if len(paths) < 2:
        raise ValueError("give a checkpoint or the folder of a run, then pictures or folders")
    if out:
        out = Path(os.path.expanduser(out))
        check_output(out, ".csv")
        data.check_columns(out, PREDICTED)
    network, description = open_network(paths[0], device, **elsewhere)
    pictures, errors = read_pictures(paths[1:], description.preprocessing.image_size)
    if not pictures:
        raise OSError("; ".join(errors))
    logits = finite_logits(network, torch.stack([*pictures.values()]), description.preprocessing)
    names = description.class_names(logits.shape[1])
    if top < 1:
        raise ValueError(f"top={top}: must be at least 1")
    top = min(top, len(names))  # two classes have no third
    shares, indices = logits.softmax(1).topk(top)
    found = {file: [(names[index], share) for share, index in zip(*row)]
             for file, *row in zip(pictures, shares.tolist(), indices.tolist())}
    made = [Table(("image", *map(str, range(1, top + 1))), [
        (file, *(f"{name} {share:.1%}" for name, share in row)) for file, row in found.items()])]
    if out:
        data.write_atomically(out, Table(PREDICTED, [
            (file, str(rank), name, f"{share:.6f}") for file, row in found.items()
            for rank, (name, share) in enumerate(row, 1)]).csv())
        made.append(out)
    return Made([*made, OSError("; ".join(errors))] if errors else made)


PREDICTED = ("image", "rank", "class", "probability")  # columns of the file that `predict` writes


def read_pictures(paths, size, most=None):
    """({name: 3×S×S uint8} of the pictures `paths` and in the folders among them, what is wrong
    with those that cannot be read); of the first so many, `most`, if that is given."""
    files = []
    for path in (Path(os.path.expanduser(path)) for path in paths):
        if not path.is_dir():
            files.append(path)
            continue
        left_out = collections.Counter()
        for file in sorted(path.rglob("*")):
            if file.is_dir():
                left_out["links to folders"] += file.is_symlink()
            elif file.with_name("tensors.tsv").exists():
                left_out["files of TensorBoard's Projector"] += 1
            elif "/." in f"/{file.relative_to(path).as_posix()}":
                left_out["hidden files"] += 1
            elif file.suffix.lower() in data.IMAGE_SUFFIXES:
                files.append(file)
            else:
                left_out[f"files of type {file.suffix.lower() or 'unknown'}"] += 1
        data.tell_left_out(path, left_out)
    if not files:
        raise ValueError(f"{' '.join(map(str, paths))}: no picture there "
                         f"({', '.join(data.IMAGE_SUFFIXES)})")
    pictures, errors = {}, []
    for file in files[:most]:
        try:
            pictures[str(file)] = data.read_image(file, size)
        except OSError as error:
            errors.append(str(error))
    return pictures, errors


def export(run: str, out: str):
    """Write the network of the finished run in the folder RUN to the file OUT, to be given away.

    Its filters are in half precision, and what only going on needs is left out. How it was made
    goes along: the command, accuracy, seconds, hardware and versions.
    """
    run, out = Path(os.path.expanduser(run)), Path(os.path.expanduser(out))
    check_output(out, ".pth")
    before, epochs_before = None, math.inf
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):  # none of ours
        before = networks.read(out)
        epochs = before["made"].get("epochs", before["epoch"])
        epochs_before = epochs if isinstance(epochs, int) else math.inf
    result = finished(run)  # of these very weights
    if not result:
        raise ValueError(f"{run}: holds no finished run (python train.py --resume={run} goes on "
                         f"with one that was stopped)")
    config, made = read_config(run / "config.json"), {name: result[name] for name in (
        "test/accuracy", "seconds", "device", "versions", "commit", "epoch", "epochs", "history")}
    checkpoint = networks.read(networks.find_checkpoint(run))
    checkpoint = {name: value for name, value in checkpoint.items() if name != "training"}
    checkpoint["weights"] = networks.in_half(checkpoint["weights"])
    if not networks.finite(checkpoint["weights"]):
        raise ValueError(f"{run}: holds weights that are not finite numbers, or too large for half "
                         f"precision")
    config = dataclasses.replace(config, name=None, out=Config.out, root=Config.root)
    checkpoint["settings"] = dataclasses.asdict(config)
    made["command"] = command_of(config, result["processes"])
    # Images whose fingerprint is known may have been moved.
    moved = {"data": config.data} if before and before.get("fingerprint") else {}
    if out.exists() and (epochs_before > made["epochs"] or differing(
            config.all_settings(), Config.from_json(before["settings"]).all_settings() | moved)
            or [*before["classes"]] != [*checkpoint["classes"]]
            or not data.same_files(before.get("fingerprint"), str(checkpoint.get("fingerprint")))):
        raise FileExistsError(f"out={out}: is there already, and was not exported from this run, "
                              f"or after more epochs; move it away or choose another place")
    networks.save(out, {**checkpoint, "made": made})
    return out


def settings_flags(words, model=None):
    """{name: `Flag`} of a run's settings and options: those of the network `model`, or else of the
    one that is named in `words`, or of any where these go on with a run."""
    model = model or data.value_in(words, "model")
    defaults, kinds = Config.create(model or Config.model), typing.get_type_hints(Config)
    flags = {}
    for entry in dataclasses.fields(Config):
        words_of = [word for word in entry.metadata["allowed"] or () if isinstance(word, str)]
        flags[entry.name] = data.Flag(
            kinds[entry.name], text_of(getattr(defaults, entry.name)),
            entry.metadata.get("help", ""), words_of)
    del flags["options"]  # which have flags of their own
    if model or data.value_in(words, "resume") is None:
        return flags | networks.option_flags(model or Config.model, words)
    for model in networks.NETWORKS:
        flags |= networks.option_flags(model)
    return flags


train_command.flags = settings_flags
COMMANDS = {"train": train_command, "evaluate": evaluate, "predict": predict_command,
            "export": export}
MOVED = {name: f"python -m lab {now}" for name, now in (
    ("sweep", "sweep"), ("reproduce", "reproduce"), ("benchmark", "benchmark"),
    ("results_table", "results"))}
MOVED |= {f"--{before}": f"--{now}" for before, now in RENAMED.items()}
MEANINGS = {"resume": "go on with the run, or start it if there is none; a RUN's folder: with that "
                      "one",
            "overwrite": "start anew where a run is already",
            "changed_data": "go on though image files have changed since the run began",
            "ckpt": "a checkpoint, the folder of a run, torchvision:NAME or module:function",
            "weights": "file with a state dict for a network from elsewhere",
            "image_size": "side of a network from elsewhere's images; none: 224, or as "
                          "torchvision's weights want",
            "mean": "of the colours as a network from elsewhere wants them, such as .49,.48,.45; "
                    "none: ImageNet's",
            "std": "of the colours, the same",
            "paths": "a network, then pictures or folders of them",
            "top": "how many classes of each",
            "out": "the file to write",
            "run": "the folder of a run",
            "data": "other images of the same classes, all of them; none: the run's own, with its "
                    "limit",
            "root": "where data sets are downloaded to and cached",
            "tta": "views of a test image whose logits are averaged:",
            "device": "auto | cpu | cuda | mps"}

if __name__ == "__main__":
    data.command_line(COMMANDS, default="train", meanings=MEANINGS, moved=MOVED)
