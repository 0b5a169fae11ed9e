"""Training: from a line of settings to a run folder that can be stopped, killed and resumed.

    python train.py --data=shapes
    python train.py --model=resnet18 --resume
    python train.py sweep --model=resnet18 --activation=relu,leaky_relu,elu

A run lives in `runs/<name>/`: config.json, metrics.csv (a row an epoch), TensorBoard events,
last.pth, best.pth and result.json. Settings come from the recipe of the network in `RECIPES`,
then from the command line. All that is random depends on (seed, epoch, step) alone, so a resumed
run repeats the very steps that an undisturbed one would have taken.
"""

import contextlib
import copy
import csv
import dataclasses
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import typing
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn

import data as datasets
import network as networks

COLUMNS = ("epoch", "step", "train/loss", "train/accuracy", "val/loss", "val/accuracy", "lr",
           "seconds", "images_per_second")
SWEEP_COLUMNS = ("test/accuracy", "val/accuracy", "seconds")
POINT_EVERY = 50  # steps between two points of TensorBoard's train/batch_loss curve
OPTIMIZERS = ("sgd", "muon", "adam", "adamw", "adagrad", "rmsprop")
TTA = ("none", "flip", "full")
SCHEDULES = ("constant", "step", "cosine", "linear", "onecycle")


# ---------------------------------------------------------------------------- settings


def setting(default, text, allowed=None):
    """A field of `Config`: its default, a line of help, and the values that are allowed.

    `allowed` is a pair of numbers, lowest and highest, or a collection of words.
    """
    if isinstance(allowed, tuple) and isinstance(allowed[0], str):
        text = f"{text} {' | '.join(allowed)}".strip()
    return field(default=default, metadata={"help": text, "allowed": allowed})


def has_type(value, kind):
    """Whether `value` is of the annotated type `kind`; a whole number is a number too."""
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    kinds = typing.get_args(kind) or (kind,)
    return (isinstance(value, kinds) or (float in kinds and isinstance(value, int))) and (
        bool in kinds or not isinstance(value, bool))


def is_allowed(value, allowed):
    """Whether `value`, or each of its parts, is of `allowed`; see `setting`."""
    if isinstance(value, (int, float)):
        return allowed[0] <= value <= allowed[1]
    return all(part in allowed for part in (value if isinstance(value, tuple) else [value]))


def allowed_text(allowed):
    """`allowed` in words; see `setting`."""
    if all(isinstance(value, str) for value in allowed):
        return f"of {', '.join(allowed)}"
    return f"from {allowed[0]:g} to {allowed[1]:g}"


@dataclass(frozen=True)
class Config:
    """All settings of a run, checked. `Config.create` fills in the recipe of the network."""

    model: str = setting("lenet", "network; python network.py list shows all", networks.NETWORKS)
    options: dict = field(default_factory=dict, metadata={"help": "", "allowed": None})
    data: str = setting("cifar10", "cifar10, cifar100, shapes, or a folder of images")
    root: str = setting("data", "where data sets are downloaded to and cached")
    image_size: int | None = setting(None, "side of the network's images; none: its own", (1, 1024))
    early_size: int | None = setting(None, "side in the early epochs; none: the same", (1, 1024))
    early: float = setting(0.5, "share of the epochs that see images of early_size", (0, 1))
    uncropped: int = setting(0, "last epochs whose images are not cropped", (0, 1e6))
    val: int | None = setting(None, "training images held out; none: a tenth", (0, 1e9))
    limit: int | None = setting(None, "use so many training and so many test images", (1, 1e9))
    skip_bad: bool = setting(False, "leave out image files that cannot be read")
    epochs: int = setting(30, "passes over the training images", (1, 1e6))
    batch_size: int = setting(128, "images a step, over all processes", (1, 1e6))
    optimizer: str = setting("sgd", "", OPTIMIZERS)
    lr: float = setting(0.05, "highest learning rate", (0, 1e4))
    momentum: float = setting(0.9, "of sgd, muon and rmsprop", (0, 1))
    nesterov: bool = setting(False, "Nesterov momentum, for sgd")
    weight_decay: float = setting(5e-4, "L2 penalty; decoupled for adamw, none on muon's "
                                  "filters", (0, 1e3))
    schedule: str = setting("cosine", "", SCHEDULES)
    warmup: float = setting(1.0, "epochs of linear warm-up", (0, 1e6))
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", (0, 1))
    augment: tuple[str, ...] = setting(("flip", "crop"), "none, or of", datasets.AUGMENTATIONS)
    tta: str = setting("none", "views of a test image whose logits add up:", TTA)
    seed: int = setting(0, "of weights, split, order and augmentation", (0, 2**62))
    device: str = setting("auto", "", ("auto", "cpu", "cuda", "mps"))
    precision: str = setting("auto", "auto: bf16 on CUDA;", ("auto", "fp32", "bf16"))
    compile: bool = setting(False, "compile the network with torch.compile")
    deterministic: bool = setting(False, "the same result again on a GPU too, more slowly")
    on_nan: str = setting("stop", "at a loss or gradient that is not finite:", ("stop", "skip"))
    log_every: int = setting(0, "print the mean loss every so many steps; 0: never", (0, 1e9))
    save_every: float = setting(10.0, "minutes between checkpoints within an epoch", (0, 1e6))
    keep: int = setting(2, "checkpoints that remain, last.pth among them; 0: all", (0, 1e6))
    name: str | None = setting(None, "name of the run; none: the network's")
    out: str = setting("runs", "folder of all runs")

    def __post_init__(self):
        kinds = typing.get_type_hints(Config)
        for entry in dataclasses.fields(Config):
            value, allowed = getattr(self, entry.name), entry.metadata["allowed"]
            if not has_type(value, kinds[entry.name]):
                raise ValueError(f"{entry.name}={value!r}: must be {kinds[entry.name]}")
            if allowed and value is not None and not is_allowed(value, allowed):
                raise ValueError(f"{entry.name}={value}: must be {allowed_text(allowed)}")
        if self.name is not None and Path(self.name).is_absolute():
            raise ValueError(f"name={self.name}: must be a name inside {self.out}; see --out")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")
        networks.check_options(self.model, self.options)

    @classmethod
    def create(cls, model="lenet", **values):
        """Settings from the recipe of `model`, changed by `values`, fields or network options."""
        fields = {entry.name for entry in dataclasses.fields(cls)}
        options = {name: value for name, value in values.items() if name not in fields}
        known = networks.options_of(model)
        for name in options:
            if name not in known:
                raise ValueError(f"--{name}: neither a setting of a run nor an option of {model}, "
                                 f"whose options are {', '.join(known)} (see: --help)")
        values = {name: value for name, value in values.items() if name in fields}
        options = {**values.pop("options", {}), **options}
        return cls(**{"model": model, **RECIPES.get(model, {}), "options": options, **values})

    @classmethod
    def from_json(cls, values):
        """Settings from what `dataclasses.asdict` made of them, or ValueError."""
        def listed(value):
            return tuple(value) if isinstance(value, list) else value

        try:
            options = {name: listed(value) for name, value in values["options"].items()}
            return cls(**{**{name: listed(value) for name, value in values.items()},
                          "options": options})
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not the settings of a run: {error}") from error

    def all_settings(self):
        """Every setting and network option, by name."""
        return {**{name: default for name, (_, default)
                   in networks.options_of(self.model).items()},
                **dataclasses.asdict(self), **self.options, "options": None}

    @property
    def folder(self):
        """The run's folder."""
        return Path(self.out) / (self.name or self.model)


# What trains each network well on CIFAR-10 on its own; anything not said here is in `Config`.
_CLASSIC = {"epochs": 30, "lr": 0.02, "augment": ("flip", "crop")}
_VGG = {"epochs": 60, "lr": 0.02, "warmup": 2.0}
_VGG_BN = {"epochs": 100, "lr": 0.1, "warmup": 2.0}
_RESNET = {"epochs": 100, "lr": 0.1, "warmup": 2.0, "nesterov": True, "label_smoothing": 0.1,
           "augment": ("flip", "crop", "cutout")}
_THIN_RESNET = {"epochs": 160, "lr": 0.1, "warmup": 2.0, "nesterov": True, "weight_decay": 2e-4}
RECIPES = {
    "lenet": {"epochs": 20, "lr": 0.05, "augment": ("flip",)},
    **dict.fromkeys(("lenet5_color", "simple_cnn", "trial_3conv", "trial_4conv",
                     "trial_4conv_late_pool", "convnet", "convnet_large"), _CLASSIC),
    **dict.fromkeys(("vgg16_1x1", "vgg_a", "vgg11", "vgg13", "vgg16", "vgg19"), _VGG),
    **dict.fromkeys(("vgg_a_bn", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"), _VGG_BN),
    **dict.fromkeys(("resnet18", "resnet34", "resnet50"), _RESNET),
    **dict.fromkeys(("resnet20", "resnet56"), _THIN_RESNET),
    "speednet": {"epochs": 18, "batch_size": 512, "optimizer": "muon", "lr": 0.12,
                 "momentum": 0.6, "weight_decay": 0.0, "schedule": "linear", "warmup": 0.0,
                 "label_smoothing": 0.2, "augment": ("alternating_flip", "crop"),
                 "early_size": 24, "early": 0.55, "uncropped": 2, "val": 0, "tta": "full"},
    "resnet18_imagenet": {**_RESNET, "epochs": 30, "augment": ("flip", "crop")},
}
# What a resumed run may be told anew; all else would make it another run.
MAY_CHANGE = ("epochs", "device", "compile", "log_every", "save_every", "keep", "name", "out",
              "root", "on_nan", "tta")


def parse_flags(flags):
    """Settings as values of their declared types, from flags as text."""
    kinds = typing.get_type_hints(Config)
    model = flags.get("model", Config.model)
    kinds |= {name: kind for name, (kind, _) in networks.options_of(model).items()}
    if "options" in flags:
        raise ValueError("--options: give the network's options by their names, as --dropout=0.2")
    return {name: datasets.parse_value(name, text, kinds[name])
            if name in kinds and isinstance(text, str) else text for name, text in flags.items()}


def learning_rate(step, total_steps, warmup_steps, peak, schedule):
    """The learning rate of `step`, counted from 0: a pure function.

    `warmup_steps` of linear rise, then: `constant`; `step`, a tenth after a half and after three
    quarters (He et al. 2016, section 4.2); `cosine` (Loshchilov & Hutter 2017) or `linear` to 0;
    `onecycle`, up for the first quarter and linearly down to 0 (Smith & Topin 2018).
    """
    if schedule == "onecycle":
        warmup_steps, schedule = max(warmup_steps, total_steps / 4), "linear"
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * {"constant": 1.0, "step": 0.1 ** ((done >= 0.5) + (done >= 0.75)),
                   "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[schedule]


def make_optimizer(config, network):
    """The optimizer that `config` asks for, in its quickest implementation on this device."""
    parameters = [value for value in network.parameters() if value.requires_grad]
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "rmsprop":  # the one without a fused implementation
        return torch.optim.RMSprop(parameters, momentum=config.momentum, **common)
    if config.optimizer == "muon":
        return Muon(parameters, momentum=config.momentum, **common)
    common["fused"] = parameters[0].device.type in ("cpu", "cuda")
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, nesterov=config.nesterov,
                               **common)
    if config.optimizer == "adagrad":
        common["fused"] = parameters[0].device.type == "cpu"
        return torch.optim.Adagrad(parameters, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer](
        parameters, **common)


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
            for parameter in group["params"]:
                self._update(parameter, **group)

    def _update(self, parameter, lr, momentum, weight_decay, **_):
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient = parameter.grad.add(parameter, alpha=0 if parameter.ndim == 4 else weight_decay)
        buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
        step = gradient.add_(buffer, alpha=momentum)
        if parameter.ndim != 4:
            parameter.sub_(step, alpha=lr)
            return
        rows = step.permute(0, 2, 3, 1)  # a view of channels-last filters, so nothing is copied
        step = orthogonalize(rows.flatten(1)).view_as(rows).permute(0, 3, 1, 2)
        norm = parameter.norm()
        parameter.sub_(step * (lr * norm / step.norm().clamp(min=1e-12)))
        parameter.mul_(norm / parameter.norm().clamp(min=1e-12))


def orthogonalize(matrix, steps=5):
    """The orthogonal matrix nearest to `matrix`, roughly: its singular values become about 1.

    Newton-Schulz iteration with the quintic polynomial of Jordan et al. 2024. It runs on the
    matrix's Gram matrix, which is much smaller than the filters of most layers.
    """
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-12)
    gram = wide @ wide.T
    identity = product = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(steps):
        factor = 3.4445 * identity - 4.7750 * gram + 2.0315 * gram @ gram
        product, gram = factor @ product, factor @ gram @ factor
    wide = product @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


# ---------------------------------------------------------------------------- device, processes


def choose_device(name="auto"):
    """The device called `name`; `auto` prefers CUDA, then MPS, then the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(name for name in available if available[name])
    if not available.get(name):
        raise ValueError(f"device={name}: not available here; there is "
                         f"{', '.join(name for name in available if available[name])}")
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device(name, local) if name == "cuda" else torch.device(name)


def autocast(device, precision):
    """A context in which the network computes in `precision`."""
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


@dataclass(frozen=True)
class Workers:
    """The processes that share this run (torchrun): their number and the number of this one."""

    rank: int = 0
    world: int = 1

    def sum_(self, tensors):
        """Sum each tensor over all processes, in place, in one exchange."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten().double() for tensor in tensors])
        with together():
            distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag, like):
        """Whether `flag` is true in any process, told by tensors on the device of `like`."""
        if self.world == 1:
            return bool(flag)
        votes = like.new_full((1,), bool(flag))
        self.sum_([votes])
        return votes.item() > 0

    def meet(self):
        """Wait until all processes have come here.

        A process that exits right after an exchange may abort, while Gloo's threads let go of its
        tensors; this exchanges none.
        """
        if self.world > 1:
            with together():
                distributed.barrier()


@contextlib.contextmanager
def together():
    """A context in which the loss of another process is a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError("another process of this run is gone; the same command with "
                              "--resume goes on from the last checkpoint") from error


@contextlib.contextmanager
def join_workers(device):
    """The `Workers` that torchrun started, connected for as long as the context lasts."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Workers()
        return
    store, rank, _ = next(distributed.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # A restarted torchrun keeps its store, with the addresses of the processes before.
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store,
                                   rank=rank, world_size=world)
    try:
        yield Workers(rank, world)
    finally:
        distributed.destroy_process_group()


# ---------------------------------------------------------------------------- one epoch


@dataclass
class State:
    """What changes during a run, all of which a checkpoint keeps.

    `totals` sums loss, correct answers and images over the epoch so far; `logged` is what it was
    when the mean loss was last logged.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    totals: torch.Tensor
    logged: torch.Tensor
    epoch: int = 0
    step: int = 0
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    best_accuracy: float = -1.0
    best_epoch: int = 0


def seed_step(seed, step, rank, device):
    """Make what is random inside a network (dropout) a function of (seed, step, rank)."""
    number = (seed * 1_000_003 + step) * 1_009 + rank
    if device.type == "cuda":
        torch.cuda.manual_seed(number % 2**63)
    elif device.type == "mps":
        torch.mps.manual_seed(number % 2**63)
    torch.default_generator.manual_seed(number % 2**63)


def train_step(state, images, labels, config, workers, lr, batch_size):
    """One step of the optimizer; adds to `state.totals`. `images` are this process's share."""
    seed_step(config.seed, state.step, workers.rank, images.device)
    if config.on_nan == "skip":
        buffers = [(buffer, buffer.clone()) for buffer in state.network.buffers()]
    with autocast(images.device, config.precision):
        logits = state.network(images)
    loss = F.cross_entropy(logits.float(), labels, reduction="sum",
                           label_smoothing=config.label_smoothing)
    state.optimizer.zero_grad(set_to_none=True)
    (loss / batch_size).backward()
    gradients = [parameter.grad for group in state.optimizer.param_groups
                 for parameter in group["params"]]
    sums = state.totals.new_zeros(3)
    sums[0], sums[1], sums[2] = loss.detach(), (logits.argmax(1) == labels).sum(), len(labels)
    if workers.world > 1:
        statistics = [buffer for buffer in state.network.buffers() if buffer.is_floating_point()]
        for buffer in statistics:
            buffer.div_(workers.world)
        workers.sum_([*gradients, *statistics, sums])
    # Zero times a gradient that is not finite is NaN, which makes the sum NaN and stays in it.
    sums[0] += 0 * nn.utils.get_total_norm(gradients)
    if config.on_nan == "skip" and not sums[0].isfinite():
        for buffer, before in buffers:
            buffer.copy_(before)
        return
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.totals += sums


def train_epoch(state, batches, config, workers, folder, progress, stop):
    """The rest of epoch `state.epoch`, from where `state.step` stands in it."""
    state.network.train()
    started = time.perf_counter() - state.epoch_seconds
    point_every = config.log_every or POINT_EVERY
    check_every = 1 if state.totals.device.type == "cpu" else POINT_EVERY
    saved_at = time.monotonic()
    done = state.step - state.epoch * len(batches)
    size = config.early_size if state.epoch < config.early * config.epochs else None
    crop = state.epoch < config.epochs - config.uncropped
    epoch = batches.epoch(state.epoch, done, size, crop)
    for place, (images, labels) in enumerate(epoch, done + 1):
        lr = learning_rate(state.step, config.epochs * len(batches), config.warmup * len(batches),
                           config.lr, config.schedule)
        train_step(state, images, labels, config, workers, lr, batches.batch_size)
        state.step += 1
        state.epoch_seconds = time.perf_counter() - started
        if place % check_every == 0 or place == len(batches):
            check_finite(state, lr, folder)
        if place % point_every == 0:
            log_point(state, place, config, folder)
        progress(state, place)
        if place == len(batches):
            break
        halt = (workers.world == 1 or place % check_every == 0) and workers.any(stop, state.totals)
        if halt or time.monotonic() - saved_at > 60 * config.save_every:
            folder.save(state)
            saved_at = time.monotonic()
        if halt:
            raise Stopped(*stop[:1])


def check_finite(state, lr, folder):
    """Raise ValueError when a loss or gradient of this epoch was not finite."""
    if not math.isfinite(state.totals[0].item()):
        raise ValueError(
            f"the loss or a gradient is not finite at step {state.step} (learning rate {lr:g}); "
            f"{folder.last_good()}. Lower --lr, or go past such steps with --on_nan=skip")


def log_point(state, place, config, folder):
    """Log the mean loss and accuracy over the steps since the last such point."""
    loss, correct, count = (state.totals - state.logged).tolist()
    state.logged.copy_(state.totals)
    if count == 0:
        return
    folder.scalars({"train/batch_loss": loss / count}, state.step)
    if config.log_every:
        folder.say(f"[epoch {state.epoch + 1}, step {place:6d}] loss {loss / count:.3f} "
                   f"accuracy {correct / count:.2%}")


class Stopped(Exception):
    """A signal asked the run to stop; it has been saved."""


@contextlib.contextmanager
def catch_signals():
    """A list that receives the first SIGINT or SIGTERM; a second one acts at once."""
    received = []

    def note(number, _frame):
        if received and "RANK" not in os.environ:  # torchrun passes on what a terminal sends to all
            raise KeyboardInterrupt
        received.append(number)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: signals are not ours
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------- evaluation


def predict(network, images, checkpoint, tta="none"):
    """Logits N×classes, float32 on the CPU, of uint8 `images`, in large batches.

    `checkpoint` says how the network saw its images (mean, std, image_size, settings). Images
    are moved to the network's device batch by batch.
    """
    device = next(network.parameters()).device
    size = checkpoint["image_size"]
    batch_size = max(1, (512 if device.type == "cpu" else 4096) * 32**2 // size**2)
    precision = checkpoint["settings"].get("precision", "fp32")
    training, logits = network.training, []
    network.eval()
    with torch.no_grad(), autocast(device, precision):
        for chunk in images.split(batch_size):
            pixels = datasets.normalize(chunk, tuple(checkpoint["mean"]), tuple(checkpoint["std"]),
                                    size, device)
            logits.append(sum(network(view).float() for view in tta_views(pixels, tta)))
    network.train(training)
    return torch.cat(logits).cpu()


def tta_views(images, tta):
    """The views of `images` whose logits are added up: themselves; `flip`: mirrored as well;
    `full`: both also moved by a pixel up-left and down-right (Jordan 2024, section 3.5)."""
    if tta not in TTA:
        raise ValueError(f"tta={tta}: must be one of {', '.join(TTA)}")
    views = [images]
    if tta == "full":
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        views += [padded[:, :, :-2, :-2], padded[:, :, 2:, 2:]]
    return views if tta == "none" else views + [view.flip(3) for view in views]


def score(logits, labels, classes):
    """Loss, accuracy and accuracy per class of N×classes `logits`: sums divided by counts."""
    correct = logits.argmax(1) == labels
    totals = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[correct], minlength=classes)
    per_class = (hits / totals.clamp(min=1)).tolist()
    return {"loss": F.cross_entropy(logits.double(), labels, reduction="sum").item() / len(labels),
            "accuracy": correct.sum().item() / len(labels), "per_class": per_class}


# ---------------------------------------------------------------------------- the run folder


class RunFolder:
    """All that a run writes. Only process 0 writes; for the others every method does nothing."""

    def __init__(self, path, config, description, writes=True):
        self.path, self.config, self.description = Path(path), config, description
        self.writes, self.saved_step, self.pending = writes, None, None
        self.saver = ThreadPoolExecutor(1)

    def open(self, state, anew):
        """Make the files on disk agree with `state` (or empty the folder) and begin to write."""
        self.saved_step = None if anew else state.step
        if not self.writes:
            return
        if anew:
            clear_folder(self.path)
        for path in self.path.glob("*.tmp"):
            path.unlink()
        with contextlib.suppress(FileNotFoundError):  # else `state` is from last.pth
            os.replace(self.older(), self.path / "last.pth")
        rows = [row for row in read_rows(self.path) if int(row["epoch"]) <= state.epoch]
        lines = [",".join(COLUMNS), *(",".join(row[name] for name in COLUMNS) for row in rows)]
        networks.write_atomically(self.path / "metrics.csv", "\n".join(lines) + "\n")
        networks.write_atomically(self.path / "config.json",
                                  json.dumps(dataclasses.asdict(self.config), indent=1) + "\n")
        trim_events(self.path, state.step)
        self.events = self.path / f"events.out.tfevents.{time.time():.0f}.{state.step:09d}"
        networks.append(self.events, event_bytes(file_version="brain.Event:2"))

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
            print(line, flush=True)

    def scalars(self, values, step):
        """Add a point to each TensorBoard curve in `values` (tag → value)."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self.writes:
            points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
            networks.append(self.events, event_bytes(step=step, summary=Summary(value=points)))

    def row(self, row):
        """Add an epoch's row to metrics.csv, to TensorBoard and to the screen."""
        if not self.writes:
            return
        line = ",".join(format_cell(row[name]) for name in COLUMNS) + "\n"
        networks.append(self.path / "metrics.csv", line.encode())
        self.scalars({name: row[name] for name in COLUMNS[2:] if row[name] is not None},
                     row["step"])
        self.say("".join(f"{format_cell(row[name]):>{column_width(name)}}" for name in COLUMNS))

    def save(self, state, best=False):
        """Write `state` as last.pth in the background, and as best.pth too if it is the best."""
        weights = state.network.state_dict()
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise ValueError(f"the weights are not finite at step {state.step}; {self.last_good()}")
        self.wait()
        if not self.writes:
            self.saved_step = state.step
            return
        checkpoint = {**self.description, "epoch": state.epoch, "step": state.step,
                      "weights": weights}
        checkpoint, training = copy.deepcopy((checkpoint, training_state(state)))
        self.pending = self.saver.submit(self._write, checkpoint, training, best)

    def wait(self):
        """Wait for the checkpoint that is being written; raises what went wrong with it."""
        if self.pending:
            pending, self.pending = self.pending, None
            self.saved_step = pending.result()

    def _write(self, checkpoint, training, best):
        for path in (self.path / "metrics.csv", self.events):  # on the disk before the checkpoint
            with open(path, "ab") as file:
                os.fsync(file.fileno())
        if best:
            networks.save(self.path / "best.pth", checkpoint)
        keep, again = self.config.keep, self.saved_step == checkpoint["step"]
        networks.save(self.path / "last.pth", {**checkpoint, "training": training},
                      None if keep == 1 or again else self.older())
        if keep:
            for path in sorted(self.path.glob("step-*.pth"), reverse=True)[keep - 1:]:
                path.unlink()
        return checkpoint["step"]


def column_width(name):
    """How wide a column of the epochs' table is on the screen."""
    return max(len(name), 5 if name == "epoch" else 10) + 2


def format_cell(value):
    """A number as metrics.csv and the screen show it; nothing for None."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def read_rows(run):
    """The rows of a run's metrics.csv as dictionaries of text; [] without one."""
    path = Path(run) / "metrics.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows
            if set(row) == set(COLUMNS) and None not in row.values() and row["epoch"].isdecimal()]


def read_metrics(run):
    """metrics.csv as {column: [numbers]}, NaN where nothing was measured.

    Raises FileNotFoundError for a run without it, ValueError for one with a damaged row.
    """
    rows = read_rows(run)
    if not rows:
        raise FileNotFoundError(f"{run}: no run with a finished epoch (no rows in metrics.csv)")
    try:
        return {name: [float(row[name] or "nan") for row in rows] for name in COLUMNS}
    except ValueError as error:
        raise ValueError(f"{Path(run) / 'metrics.csv'}: damaged ({error})") from error


def event_bytes(**event):
    """A TensorBoard event as its file holds it.

    Written by hand because SummaryWriter's thread loses what the process has not lived to write,
    and prints a traceback when the disk is full.
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
            networks.write_atomically(path, b"".join(kept))
        else:
            path.unlink()


def newest_checkpoint(folder, device, say=print):
    """The newest checkpoint in `folder` that can be read and gone on from; None if there is none.

    A damaged one is named and the one before it taken; OSError when none is left.
    """
    paths = [folder / "last.pth", *sorted(folder.glob("step-*.pth"), reverse=True)]
    paths = [path for path in paths if path.exists()]
    for path in paths:
        try:
            checkpoint = networks.read(path, device)
            if not isinstance(checkpoint.get("training"), dict):
                raise ValueError(f"{path}: holds no training state to go on from")
            return checkpoint
        except (OSError, ValueError) as error:
            say(f"{error}; trying the checkpoint before it")
    if paths:
        raise OSError(f"{folder}: no checkpoint can be read; --overwrite starts anew")
    return None


def find_checkpoint(ckpt):
    """The checkpoint that `ckpt` means: a file, or best.pth or else last.pth of a run folder."""
    path = Path(ckpt)
    if not path.is_dir():
        return path
    for name in ("best.pth", "last.pth"):
        if (path / name).exists():
            return path / name
    raise FileNotFoundError(f"{path}: a folder without best.pth or last.pth")


def open_checkpoint(ckpt, device="auto"):
    """The network at `ckpt` (a file or a run folder), in evaluation mode, and the checkpoint."""
    path = find_checkpoint(ckpt)
    network, checkpoint = networks.load(path, choose_device(device))
    try:
        Config.from_json(checkpoint["settings"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return network.to(memory_format=torch.channels_last), checkpoint


def open_dataset(checkpoint, source=None, root=None):
    """The data set that the network of `checkpoint` was trained on, split as it was then.

    `source` and `root` take the place of the data set's name and folder. ValueError when its
    classes are not the network's.
    """
    config = Config.from_json(checkpoint["settings"])
    dataset = datasets.load(source or config.data, root or config.root, checkpoint["image_size"],
                            config.val if source is None else 0, config.seed, config.limit,
                            config.skip_bad)
    if len(dataset.classes) != len(checkpoint["classes"]):
        raise ValueError(f"data={dataset.name}: has {len(dataset.classes)} classes, the network "
                         f"{len(checkpoint['classes'])}")
    return dataset


# ---------------------------------------------------------------------------- the story


def train(config, resume=False, overwrite=False):
    """Train as `config` says and return the result, which is also in result.json.

    `resume` goes on with the run in `config.folder` if there is one; `overwrite` starts it anew.
    Raises FileExistsError for a run that exists when neither is asked for.
    """
    device = choose_device(config.device)
    make_repeatable(config, device)
    with join_workers(device) as workers, lock(config.folder, workers):
        say = print if workers.rank == 0 else lambda _line: None
        check_folder(config, resume, overwrite)
        dataset = datasets.load(config.data, config.root, config.image_size
                            or networks.image_size_of(config.model), config.val, config.seed,
                            config.limit, config.skip_bad)
        checkpoint = newest_checkpoint(config.folder, device, say) if resume else None
        if not checkpoint:
            say(f"{config.folder}: {'nothing to resume; ' if resume else ''}starting")
        description = describe(config, dataset)
        state = new_state(config, description, device)
        batches = batches_of(config, dataset, device, workers)
        if checkpoint:
            restore(state, checkpoint, len(batches))
        else:
            fit_first_layer(state.network, dataset)
        folder = RunFolder(config.folder, config, description, writes=workers.rank == 0)
        announce(state, config, dataset, device, workers, say)
        workers.any(False, state.totals)  # none writes before all have read
        try:
            folder.open(state, anew=checkpoint is None)
            with catch_signals() as stop, live_progress(config, len(batches)) as progress:
                while state.epoch < config.epochs:
                    train_epoch(state, batches, config, workers, folder, progress, stop)
                    end_epoch(state, dataset, batches, folder)
                    if workers.any(stop, state.totals):
                        raise Stopped(*stop[:1])
            folder.wait()
            result = finish(state, dataset, folder, workers)
            workers.meet()
            return result
        except Stopped as stopped:
            folder.wait()
            say(f"stopped at step {state.step}; saved. The same command with --resume goes on")
            sys.exit(128 + (*stopped.args, signal.SIGTERM)[0])
        finally:
            folder.close()


def make_repeatable(config, device):
    """Seed the weights and choose between speed and repeatability on a GPU."""
    torch.manual_seed(config.seed)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not config.deterministic
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.deterministic != torch.are_deterministic_algorithms_enabled():  # imports for a second
        torch.use_deterministic_algorithms(config.deterministic)


@contextlib.contextmanager
def lock(folder, workers):
    """Hold the run folder; ValueError when another process does. A dead process holds nothing."""
    if workers.rank:
        yield
        return
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise Busy(f"{folder}: another process is training this run") from None
    try:
        yield
    finally:
        held.release()


class Busy(ValueError):
    """The run folder is held by another process."""


def check_folder(config, resume, overwrite):
    """Raise what speaks against a run in `config.folder`, before any work is done."""
    if resume:
        check_same_run(config)
    elif not overwrite and any((config.folder / name).exists()
                               for name in ("config.json", "last.pth")):
        raise FileExistsError(f"{config.folder}: a run is there already; go on with it "
                              f"(--resume), take another name (--name=NAME) or start it anew "
                              f"(--overwrite)")


def clear_folder(folder):
    """Remove the run in `folder`, and only what a run writes."""
    for pattern in ("config.json", "metrics.csv", "result.json", "*.pth", "*.tmp", "events.*"):
        for path in folder.glob(pattern):
            path.unlink()
    shutil.rmtree(folder / "test", ignore_errors=True)


def describe(config, dataset):
    """What a checkpoint says of its network, besides weights and progress."""
    description = {"model": config.model, "options": dict(config.options),
                   "classes": list(dataset.classes),
                   "image_size": config.image_size or networks.image_size_of(config.model),
                   "mean": list(dataset.mean), "std": list(dataset.std),
                   "settings": dataclasses.asdict(config)}
    networks.check_description(description)
    return description


def batches_of(config, dataset, device, workers):
    """This process's training batches of a run."""
    return datasets.Batches(dataset.train, dataset.mean, dataset.std, config.batch_size,
                            config.augment, config.seed,
                            config.image_size or networks.image_size_of(config.model), device,
                            workers.rank, workers.world)


def new_state(config, description, device):
    """A network with fresh weights and its optimizer, at step 0."""
    network = networks.build(config.model, len(description["classes"]), description["image_size"],
                             **config.options)
    network = network.to(device, memory_format=torch.channels_last)
    if config.early_size:
        networks.check_size(network, config.early_size)
    if config.compile:
        network.compile()
    sums = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64,
                       device=device)
    return State(network, make_optimizer(config, network), sums, sums.clone())


def fit_first_layer(network, dataset):
    """Set the filters that a network takes from its training images before it is trained."""
    images = dataset.train.images[::max(1, len(dataset.train.images) // 5_000)]
    for module in network.modules():
        if isinstance(module, networks.WhiteningConv):
            device = module.weight.device
            module.fit(datasets.normalize(images, dataset.mean, dataset.std, device=device))


def training_state(state):
    """What a checkpoint keeps for going on, besides weights, epoch and step."""
    kept = {entry.name: getattr(state, entry.name) for entry in dataclasses.fields(state)
            if entry.name not in ("network", "optimizer", "epoch", "step")}
    return {**kept, "optimizer": {"state": state.optimizer.state_dict()["state"]}}


def restore(state, checkpoint, steps):
    """Put `state` where `checkpoint` was saved; ValueError when it is not one of this run.

    `steps` is the number of steps of an epoch.
    """
    optimizer, training = state.optimizer, dict(checkpoint["training"])
    saved = training.get("optimizer")
    training["optimizer"] = {"state": saved.get("state") if isinstance(saved, dict) else None}
    if training["optimizer"]["state"] != {}:  # a step that changes nothing, to compare with
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    if not (networks.made_like(training, training_state(state))
            and networks.made_like(checkpoint["weights"], state.network.state_dict())
            and 0 <= checkpoint["epoch"] <= checkpoint["step"] // steps <= checkpoint["epoch"]):
        raise ValueError("the checkpoint does not fit this run: its weights, its optimizer or its "
                         "place among the steps of an epoch are those of another")
    state.network.load_state_dict(checkpoint["weights"])
    optimizer.load_state_dict({**optimizer.state_dict(), **training.pop("optimizer")})
    for name, value in training.items():
        setattr(state, name, value)
    state.epoch, state.step = checkpoint["epoch"], checkpoint["step"]


def announce(state, config, dataset, device, workers, say):
    """Say what is about to be trained, on what, and from where."""
    say(f"{config.model} ({networks.count_parameters(state.network):,} parameters) on "
        f"{dataset.name}: {len(dataset.train.labels)} training, "
        f"{len(dataset.val.labels) if dataset.val else 0} validation images; {device}"
        + (f", {workers.world} processes" if workers.world > 1 else "") + f"; {config.folder}")
    if state.step:
        say(f"resuming at step {state.step} (epoch {state.epoch + 1} of {config.epochs})")
    if state.epoch < config.epochs:
        say("".join(f"{name:>{column_width(name)}}" for name in COLUMNS))


def end_epoch(state, dataset, batches, folder):
    """Validate, write the epoch's row, and save."""
    config = folder.config
    loss, correct, count = state.totals.tolist()
    validation = {"loss": None, "accuracy": None}
    if dataset.val:
        logits = predict(state.network, dataset.val.images, folder.description)
        validation = score(logits, dataset.val.labels, len(dataset.classes))
    steps = len(batches)
    lr = learning_rate(state.step - 1, config.epochs * steps, config.warmup * steps, config.lr,
                       config.schedule)
    state.epoch += 1
    folder.row({"epoch": state.epoch, "step": state.step, "train/loss": loss / max(count, 1),
                "train/accuracy": correct / max(count, 1), "val/loss": validation["loss"],
                "val/accuracy": validation["accuracy"], "lr": lr, "seconds": state.epoch_seconds,
                "images_per_second": steps * batches.batch_size / state.epoch_seconds})
    best = dataset.val is not None and validation["accuracy"] > state.best_accuracy
    if best:
        state.best_accuracy, state.best_epoch = validation["accuracy"], state.epoch
    state.seconds += state.epoch_seconds
    state.epoch_seconds = 0.0
    state.totals.zero_()
    state.logged.zero_()
    folder.save(state, best)


@contextlib.contextmanager
def live_progress(config, steps):
    """A function of (state, place in the epoch) that keeps a bar up to date on a terminal."""
    if not sys.stdout.isatty() or int(os.environ.get("RANK", 0)):
        yield lambda _state, _place: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("epoch {task.fields[epoch]}"), BarColumn(), TextColumn(
            "{task.completed}/{task.total}  loss {task.fields[loss]:.3f}  accuracy "
            "{task.fields[accuracy]:.1%}  {task.fields[speed]:.0f} images/s"),
            TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task("", total=config.epochs * steps, epoch=1, loss=math.nan,
                            accuracy=0.0, speed=0.0)
        shown = [0.0]

        def update(state, place):
            if time.monotonic() - shown[0] < 0.5:
                return
            shown[0] = time.monotonic()
            loss, correct, count = state.totals.tolist()
            bar.update(task, completed=state.step, epoch=f"{state.epoch + 1}/{config.epochs}",
                       loss=loss / max(count, 1), accuracy=correct / max(count, 1),
                       speed=place * config.batch_size / state.epoch_seconds)

        yield update


def finish(state, dataset, folder, workers):
    """Look at the test set, once; write result.json and TensorBoard's last pages."""
    if workers.rank:
        return None
    kept = folder.path / ("best.pth" if dataset.val else "last.pth")
    network, _ = open_checkpoint(kept, folder.config.device)
    logits = predict(network, dataset.test.images, folder.description)
    test = score(logits, dataset.test.labels, len(dataset.classes))
    with_tta = None
    if folder.config.tta != "none":
        views = predict(network, dataset.test.images, folder.description, folder.config.tta)
        with_tta = score(views, dataset.test.labels, len(dataset.classes))["accuracy"]
    train_row = read_metrics(folder.path)
    result = {
        "test/accuracy": test["accuracy"], "test/accuracy_tta": with_tta,
        "test/loss": test["loss"], "per_class": dict(zip(dataset.classes, test["per_class"])),
        "val/accuracy": state.best_accuracy if dataset.val else None,
        "train/accuracy": train_row["train/accuracy"][-1],
        "epoch": state.best_epoch if dataset.val else state.epoch, "epochs": state.epoch,
        "checkpoint": kept.name, "parameters": networks.count_parameters(network),
        "seconds": round(state.seconds, 3), "settings": dataclasses.asdict(folder.config),
        "command": command_of(folder.config), "processes": workers.world, **environment(network),
    }
    networks.write_atomically(folder.path / "result.json", json.dumps(result, indent=1) + "\n")
    with networks.writing(folder.path / "test"):
        write_board(folder, network, dataset, logits, result)
    print_result(result, folder.path)
    return result


def environment(network):
    """Versions, commit and hardware, as result.json keeps them."""
    device = next(network.parameters()).device
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"],
                            cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {"versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
            "commit": commit.stdout.strip() or None,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"{device.type}, {torch.get_num_threads()} threads, {processor_name()}"}


def processor_name():
    """The processor's name, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command_of(config):
    """The command line that makes this run again."""
    words = ["python", "train.py", f"--model={config.model}"]
    before = Config.create(config.model).all_settings()
    for name, value in config.all_settings().items():
        if before[name] == value:
            continue
        text = ",".join(map(str, value)) or "none" if isinstance(value, (tuple, list)) else value
        words.append(f"--{name}={text}")
    return shlex.join(words)


def write_board(folder, network, dataset, logits, result):
    """TensorBoard's graph, PR curve per class, hyper-parameters and Projector, in `test/`."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    shutil.rmtree(folder.path / "test", ignore_errors=True)
    threading.excepthook = lambda _what: None  # an error of its thread is raised here as well
    board = SummaryWriter(str(folder.path / "test"))
    images, labels = datasets.subset(dataset.test, 100, seed=0)
    names = [dataset.classes[label] for label in labels.tolist()]
    description = folder.description
    pixels = datasets.normalize(images, tuple(description["mean"]), tuple(description["std"]),
                            description["image_size"], next(network.parameters()).device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing says that it will be replaced one day
        board.add_graph(network, pixels[:1])
    probabilities = logits.softmax(1)
    for number, name in enumerate(dataset.classes):
        board.add_pr_curve(f"test/{name}", dataset.test.labels == number, probabilities[:, number],
                           result["epochs"])
    settings = {name: value if isinstance(value, (int, float, str, bool)) else str(value)
                for name, value in result["settings"].items()}
    for event in hparams(settings, {"test/accuracy": result["test/accuracy"]}):
        board.file_writer.add_summary(event)
    board.add_scalar("test/accuracy", result["test/accuracy"], result["epochs"])
    board.add_scalar("test/loss", result["test/loss"], result["epochs"])
    add_projector(board, network, images, pixels, names)
    board.close()


def add_projector(board, network, images, pixels, names):
    """Points for TensorBoard's Projector, with sprites and class names: pixels, and features."""
    caught = []
    hook = networks.last_linear(network).register_forward_pre_hook(
        lambda _module, inputs: caught.append(inputs[0]))
    try:
        with torch.no_grad():
            network(pixels)
    finally:
        hook.remove()
    sprites = images.float() / 255
    board.add_embedding(caught[0].float().flatten(1), names, sprites, tag="features")
    board.add_embedding(sprites.flatten(1), names, sprites, tag="pixels")


def print_result(result, path=None):
    """The table of per-class accuracy and the paths of what was written."""
    datasets.print_table(("class", "test accuracy"), [
        (name, f"{accuracy:.1%}") for name, accuracy in result["per_class"].items()])
    line = f"test accuracy {result['test/accuracy']:.2%}, loss {result['test/loss']:.4f}"
    if result.get("test/accuracy_tta") is not None:
        line += f"; {result['test/accuracy_tta']:.2%} with --tta={result['settings']['tta']}"
    print(line)
    if path:
        for name in ("result.json", "metrics.csv", "best.pth", "last.pth"):
            if (path / name).exists():
                print(path / name)
        print(f"tensorboard --logdir {path}")


# ---------------------------------------------------------------------------- commands


def train_command(**flags):
    """Train a network, or go on with a run (--resume)."""
    resume = datasets.parse_value("resume", str(flags.pop("resume", "false")), bool | str)
    overwrite = datasets.parse_value("overwrite", str(flags.pop("overwrite", "false")), bool)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite: take one of the two")
    given = parse_flags(flags)
    if isinstance(resume, str):
        path = Path(resume)
        path = path.parent if path.is_file() else path
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"--resume={resume}: no such run")
        given |= {"out": str(path.parent), "name": path.name}
    config = Config.create(**given)
    if resume:
        config = resumed_config(config, given)
    train(config, bool(resume), overwrite)


def resumed_config(config, given):
    """The saved settings of the run in `config.folder`, with those of `given` that may change.

    Without a run there, `config` itself. Raises ValueError for a flag that would change what the
    run means.
    """
    if not (config.folder / "config.json").exists():
        return config
    saved = read_config(config.folder / "config.json")
    options = {**saved.options, **{name: config.options[name] for name in given
                                   if name in config.options}}
    asked = {name: getattr(config, name) for name in given if hasattr(config, name)}
    asked |= {"out": config.out, "name": config.name, "options": options}
    config = dataclasses.replace(saved, **asked)
    check_same_run(config)
    return config


def check_same_run(config):
    """ValueError when the run in `config.folder` began with settings of another meaning."""
    path = config.folder / "config.json"
    if not path.exists():
        return
    now, before = config.all_settings(), read_config(path).all_settings()
    for name in sorted({*now, *before}):
        if now.get(name) != before.get(name) and name not in MAY_CHANGE:
            raise ValueError(f"--{name}={now.get(name)}: the run in {config.folder} has "
                             f"{before.get(name)}; a run goes on with the settings it began with "
                             f"(--name=NAME starts another)")
    if now["epochs"] < before["epochs"]:
        raise ValueError(f"--epochs={now['epochs']}: the run in {config.folder} is one of "
                         f"{before['epochs']} epochs, which may grow but not shrink")


def read_json(path, meaning):
    """`meaning` of what a JSON file holds; ValueError or OSError name what is wrong with it."""
    try:
        if os.path.getsize(path) > 1 << 24:
            raise ValueError("too large")
        return meaning(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged ({error})") from error


def read_config(path):
    """The settings in a config.json; ValueError or OSError name what is wrong with it."""
    return read_json(path, Config.from_json)


def evaluate(ckpt: str, data: str | None = None, root: str | None = None, tta: str = "none",
             device: str = "auto"):
    """Measure the network in CKPT (a file or a run folder) on the test images of its data set.

    `--data` takes another data set of the same classes; `--tta=flip` and `--tta=full` add up the
    logits of several views of each image.
    """
    network, checkpoint = open_checkpoint(ckpt, device)
    test = open_dataset(checkpoint, data, root).test
    logits = predict(network, test.images, checkpoint, tta)
    result = score(logits, test.labels, len(checkpoint["classes"]))
    print_result({"test/accuracy": result["accuracy"], "test/loss": result["loss"],
                  "per_class": dict(zip(checkpoint["classes"], result["per_class"]))})


def sweep(**flags):
    """Train a grid of runs: every flag with several values, separated by commas, is an axis.

    Within a value of a list, as of --augment, the parts are joined by + (--augment=flip+crop,none).
    Finished runs are skipped and stopped ones resumed; several sweeps can share a grid. The table
    is written to runs/<name>/sweep.csv and .md, the overlaid curves to curves.png.
    """
    axes = {name: text.split(",") for name, text in flags.items() if "," in text}
    if not axes:
        raise ValueError("sweep: no flag has several values (for example --lr=0.1,0.01)")
    fixed = {name: text for name, text in flags.items() if name not in axes}
    model = fixed.get("model", "models" if "model" in axes else Config.model)
    name = fixed.pop("name", "-".join(["sweep", model, *(axis for axis in axes)]))
    grid = []
    for values in itertools.product(*axes.values()):
        choice = dict(zip(axes, values))
        label = "_".join(f"{axis}={value}" for axis, value in choice.items()).replace("/", "_")
        grid.append((choice, Config.create(**parse_flags(
            {**fixed, **choice, "name": f"{name}/{label}"}))))
    results = {}
    while len(results) < len(grid):
        for number, (_, config) in enumerate(grid):
            if number not in results:
                with contextlib.suppress(Busy):
                    results[number] = finished_result(config) or train(config, resume=True)
        if len(results) < len(grid):
            time.sleep(5)  # what is left is being trained by another process
    write_sweep(grid[0][1].folder.parent, [choice for choice, _ in grid],
                [results[number] for number in range(len(grid))])
    run_script("visualize.py", "curves", *(str(config.folder) for _, config in grid),
               f"--out={grid[0][1].folder.parent / 'curves.png'}")


def finished_result(config):
    """The result of the run of `config` if it is there and complete, else None."""
    path = config.folder / "result.json"
    if not path.exists():
        return None
    check_same_run(config)
    result, epochs, *_ = read_json(path, lambda result: (
        result, int(result["epochs"]), *(format_cell(result[name]) for name in SWEEP_COLUMNS)))
    return result if epochs >= config.epochs else None


def write_sweep(folder, choices, results):
    """Print a sweep's table and write it as sweep.csv and sweep.md."""
    header = [*choices[0], *SWEEP_COLUMNS]
    rows = [[*choice.values(), *(format_cell(result[name]) for name in SWEEP_COLUMNS)]
            for choice, result in zip(choices, results)]
    datasets.print_table(header, rows, title=str(folder))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    networks.write_atomically(folder / "sweep.csv", text.getvalue())
    lines = [header, ["---"] * len(header), *rows]
    networks.write_atomically(folder / "sweep.md", "".join(
        f"| {' | '.join(line)} |\n" for line in lines))
    print(folder / "sweep.csv", folder / "sweep.md", sep="\n")


def experiments_book():
    """All that experiments.toml says."""
    path = Path(__file__).with_name("experiments.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def read_experiments(what="all"):
    """The entries of experiments.toml that `what` means: an id, a report's name, or `all`.

    An id and a run's name, such as 2.7/adam, mean that entry with this run only.
    """
    book = experiments_book()
    what, _, run = what.partition("/")
    entries = [entry for entry in book["experiment"]
               if what in ("all", entry["id"], entry["report"])]
    if not entries:
        raise ValueError(f"{what}: no such experiment; there are all, "
                         f"{', '.join([*book['reports'], *(e['id'] for e in book['experiment'])])}")
    if not run:
        return entries
    lines = entries[0].get("runs", {}) if what == entries[0]["id"] else {}
    if run not in lines:
        raise ValueError(f"{what}/{run}: no such run; {what} has {', '.join(lines) or 'none'}")
    return [{**entries[0], "runs": {run: lines[run]}, "figures": ()}]


def flags_of(line):
    """{name: text} of the flags of a command line."""
    return dict(word.removeprefix("--").split("=", 1) for word in shlex.split(line)[2:])


def config_of(line):
    """The settings that a command line of `train.py` asks for."""
    return Config.create(**parse_flags(flags_of(line)))


def reproduce(what: str = "all", data: str | None = None, root: str | None = None,
              limit: int | None = None, epochs: int | None = None, precision: str | None = None,
              seeds: int = 1, out: str = "runs/reproduce", results: str | None = None):
    """Run the experiments of the lab reports: WHAT is an id such as 4.11, a report, or all.

    An id and a run's name (2.7/adam) mean this run alone, without figures. Finished runs are
    skipped and stopped ones resumed. `--data`, `--root`, `--limit`, `--epochs` and `--precision`
    take the place of what the entries say; `--seeds` repeats every run. Ends in a table of
    reported and measured accuracies; `--results=FILE` keeps each of them in a CSV file once it is
    known.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: must be at least 1")
    given = {name: value for name, value in
             (("data", data), ("root", root), ("limit", limit), ("epochs", epochs),
              ("precision", precision))
             if value is not None}
    lines = {(entry["id"], name): line for entry in read_experiments()
             for name, line in entry.get("runs", {}).items()}
    rows = []
    for entry in read_experiments(what):
        print(f"\n{entry['id']}  {entry['shows']}", flush=True)
        for name in entry.get("runs", {}):
            done = [run_experiment(entry["id"], name, lines[entry["id"], name],
                                   {**given, "seed": seed}, out) for seed in range(seeds)]
            measured = compare(entry, name, done)
            rows += measured
            if results:
                keep_results(Path(results), measured)
        for line in entry.get("figures", ()):
            for run in re.findall(r"\{(\S+)/(\S+)\}", line):  # of other entries: made if missing
                run_experiment(*run, lines[run], {**given, "seed": 0}, out)
            draw_experiment(entry["id"], line, given, out)
    print_comparison(rows)


def run_folder_of(experiment, name, out, seed=0):
    """The folder of a run of an experiment; the first seed's has no number."""
    return Path(out) / f"{experiment}-{name}{f'-seed{seed}' if seed else ''}"


def run_experiment(experiment, name, line, given, out):
    """The result of one run of an experiment, made now or before."""
    folder = run_folder_of(experiment, name, out, given["seed"])
    flags = flags_of(line)
    values = {**parse_flags(flags), **given, "out": str(folder.parent), "name": folder.name}
    if "limit" in flags and "limit" in given:
        values["limit"] = min(int(flags["limit"]), given["limit"])
    if "limit" in given or given.get("data") == "shapes":  # holds out a tenth
        values["val"] = 0 if flags.get("val") == "0" else None
    config = Config.create(**values)
    return finished_result(config) or train(config, resume=True)


def draw_experiment(experiment, line, given, out):
    """Run a command line of an experiment, with the folders of its runs put in."""
    def folder(match):
        owner, _, name = match.group(1).rpartition("/")
        return str(run_folder_of(owner or experiment, name, out))

    if "limit" in given:
        line = re.sub(r"--steps=\d+", "--steps=2", line)
    script, *words = shlex.split(re.sub(r"\{([^}]+)\}", folder, line))[1:]
    if "{" not in line and script != "network.py":  # it reads no run: it needs the data's name
        words += [f"--{name}={given[name]}" for name in ("data", "root") if name in given]
        words += [f"--out={out}/{experiment}-{words[0]}"] * (script == "visualize.py")
    run_script(script, *words)


def compare(entry, name, done):
    """Rows of a comparison: what was reported of a run, and what its seeds measured."""
    reported = entry.get("reported", {}).get(name, {"test": None})
    settings = done[0]["settings"]
    rows = []
    for part, claim in reported.items():
        measured = [100 * result[f"{part}/accuracy"] for result in done
                    if result[f"{part}/accuracy"] is not None]
        rows.append({
            "id": entry["id"], "run": name, "accuracy": part, "reported": claim,
            "measured": round(statistics.mean(measured), 2) if measured else None,
            "std": round(statistics.stdev(measured), 2) if len(measured) > 1 else None,
            "seeds": len(done), "epochs": done[0]["epochs"],
            "seconds": round(statistics.mean(result["seconds"] for result in done), 1),
            "device": done[0]["device"] + ", bf16" * (settings["precision"] == "bf16"),
            "data": Path(settings["data"]).name,
            "commit": done[0]["commit"]})
    return rows


def print_comparison(rows):
    """Print reported and measured accuracies side by side."""
    def cells(row):
        known = None not in (row["reported"], row["measured"])
        measured = "" if row["measured"] is None else f"{row['measured']:.2f}" + (
            f" ± {row['std']:.2f}" if row["std"] is not None else "")
        return (row["id"], row["run"], row["accuracy"], str(row["reported"] or "–"), measured,
                f"{row['measured'] - row['reported']:+.2f}" if known else "–",
                f"{row['seconds']:.0f}")

    datasets.print_table(("id", "run", "accuracy", "reported %", "measured %", "difference",
                          "seconds"), map(cells, rows))


def keep_results(path, rows):
    """Put `rows` into the CSV file of measured results, in place of older rows of the same runs."""
    kept = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            kept = list(csv.DictReader(file))
    new = {(row["id"], row["run"], row["accuracy"]) for row in rows}
    kept = [row for row in kept if (row["id"], row["run"], row["accuracy"]) not in new]
    order = [entry["id"] for entry in read_experiments()]
    kept = sorted([*kept, *rows], key=lambda row: order.index(row["id"]))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    networks.write_atomically(path, text.getvalue())


def results_table(path: str = "results.csv", readme: str = "README.md"):
    """Write the table of measured results from PATH into README, between its two markers."""
    text = Path(readme).read_text(encoding="utf-8")
    start, end = "<!-- results -->\n", "<!-- end of results -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{readme}: needs the lines {start.strip()} and {end} once each")
    before, after = text.split(start)[0], text.split(end)[1]
    networks.write_atomically(readme, before + start + comparison_markdown(path) + end + after)


def comparison_markdown(path):
    """All runs of experiments.toml with what results.csv says of them, as a Markdown table."""
    with open(path, newline="", encoding="utf-8") as file:
        measured = {(row["id"], row["run"], row["accuracy"]): row for row in csv.DictReader(file)}
    lines = ["| id | run | accuracy of | reported % | measured % | images | note |",
             "|---|---|---|---|---|---|---|"]
    reasons = experiments_book()["images"]
    for entry in read_experiments():
        note = entry.get("note", "")
        for name, line in entry.get("runs", {}).items():
            planned = config_of(line).epochs
            for part, claim in entry.get("reported", {}).get(name, {"test": None}).items():
                row = measured.get((entry["id"], name, part))
                figure, images = "not measured", ""
                if row:
                    figure = row["measured"] + (f" ± {row['std']}" if row["std"] else "")
                    if int(row["epochs"]) != planned:
                        figure += f" after {row['epochs']} of {planned} epochs"
                    images = row["data"]
                    if claim and float(row["measured"]) < claim:
                        reason = f"below the report: {reasons.get(images, 'not explained')}"
                        note = f"{note}; {reason}" if note else reason
                lines.append(f"| {entry['id']} | {name} | {part} | {claim or '–'} | {figure} | "
                             f"{images} | {note} |")
                note = ""
    return "\n".join(lines) + "\n"


def benchmark(model: str = "lenet", data: str = "shapes", root: str = "data",
              batch_size: int = 128, augment: tuple[str, ...] = ("flip", "crop"),
              rounds: int = 5, seconds: float = 2.0, device: str = "auto",
              precision: str = "auto"):
    """Compare this package's training loop with what bounds it and with the usual pipeline.

    In one process, in turn, ROUNDS times about SECONDS each: (a) the training loop as it is, with
    augmentation, metrics, progress and logging; (b) the bare step on one resident batch; (c) the
    usual pipeline, torchvision's data set class, PIL transforms and a DataLoader with two workers;
    (d) a large matrix product. Prints median images/s, the ratios a/b and a/c, and the share of
    (d)'s arithmetic rate. Network, optimizer, batch size, augmentation and images are the same.
    """
    if rounds < 1 or seconds <= 0:
        raise ValueError(f"rounds={rounds}, seconds={seconds:g}: must be above 0")
    usual_transforms(augment)
    place = choose_device(device)
    config = Config.create(model, data=data, root=root, batch_size=batch_size, augment=augment,
                           epochs=1, val=0, precision=precision, device=device, save_every=1e6,
                           lr=1e-4)  # so low that no network diverges over the rounds
    dataset = datasets.load(data, root, networks.image_size_of(model), val=0)
    state = new_state(config, describe(config, dataset), place)
    batches = batches_of(config, dataset, place, Workers())
    images, labels = next(batches.epoch(0))
    one_step = bare_steps(config, state, images, labels, 3, place) / 3
    steps = int(max(3, min(len(batches), seconds / one_step)))
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "a: this package": lambda: package_steps(config, dataset, state, steps, place, folder),
            "b: bare step": lambda: bare_steps(config, state, images, labels, steps, place),
            "c: usual pipeline": lambda: usual_steps(config, dataset, state, steps, place),
        }
        rates = {name: [] for name in (*runs, "d")}
        for _ in range(rounds):
            for name, run in runs.items():
                rates[name].append(steps * batch_size / run())
            rates["d"].append(matrix_rate(place, precision))
    a, b, c, d = (statistics.median(values) for values in rates.values())
    operations = 6 * networks.multiply_adds(state.network, images.shape[3])
    rows = [(name, f"{rate:.0f}", f"{min(rates[name]):.0f} to {max(rates[name]):.0f}",
             f"{rate * operations / d:.1%}") for name, rate in zip(runs, (a, b, c))]
    datasets.print_table(
        ("what", "images/s", "lowest to highest", "share of d"),
        [*rows, ("d: matrix product", f"{d / operations:.0f}", f"{d / 1e9:.0f} GFLOP/s", "100%")],
        title=f"{model}, batch {batch_size}, {','.join(augment) or 'no augmentation'}, {steps} "
              f"steps × {rounds} rounds, {environment(state.network)['device']}")
    print(f"a/b {a / b:.3f}   a/c {a / c:.2f}   (ratios of medians)")


def timed(function, device, times=1):
    """Mean seconds of a call, the device's work included."""
    def finish_work():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish_work()
    started = time.perf_counter()
    for _ in range(times):
        function()
    finish_work()
    return (time.perf_counter() - started) / times


def package_steps(config, dataset, state, steps, device, folder):
    """Seconds that `train_epoch` takes for `steps` steps, from the draw of the epoch's plan on."""
    split = datasets.Split(dataset.train.images[:steps * config.batch_size],
                           dataset.train.labels[:steps * config.batch_size])
    batches = batches_of(config, dataclasses.replace(dataset, train=split), device, Workers())
    state.epoch = state.step = 0
    run = RunFolder(folder, config, describe(config, dataset))
    run.open(state, anew=True)
    try:
        with live_progress(config, steps) as progress:
            return timed(lambda: train_epoch(state, batches, config, Workers(), run, progress, []),
                         device)
    finally:
        run.close()


def bare_steps(config, state, images, labels, steps, device):
    """Seconds for `steps` forward and backward passes and updates on one resident batch."""
    def step():
        with autocast(device, config.precision):
            logits = state.network(images)
        state.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()
        state.optimizer.step()

    state.network.train()
    step()  # the first one chooses algorithms and reserves memory
    return timed(step, device, steps) * steps


def usual_transforms(augment):
    """torchvision's transforms of PIL images that do what `augment` names."""
    from torchvision import transforms

    known = {"crop": transforms.RandomCrop(32, padding=4),
             "flip": transforms.RandomHorizontalFlip()}
    if unknown := [name for name in augment if name not in known]:
        raise ValueError(f"augment={unknown[0]}: torchvision has none to compare with; there are "
                         f"{', '.join(known)}, none")
    return [known[name] for name in augment]


def usual_steps(config, dataset, state, steps, device):
    """Seconds for `steps` steps fed by PIL transforms and a DataLoader with two workers."""
    from torchvision import datasets as sources
    from torchvision import transforms

    source = object.__new__(sources.CIFAR10)  # torchvision's own __getitem__, on these images
    source.data = dataset.train.images[:steps * config.batch_size].permute(0, 2, 3, 1).numpy()
    source.targets = dataset.train.labels.tolist()
    source.target_transform = None
    source.transform = transforms.Compose(
        [*usual_transforms(config.augment), transforms.ToTensor(),
         transforms.Normalize(dataset.mean, dataset.std)])
    loader = torch.utils.data.DataLoader(source, config.batch_size, shuffle=True, num_workers=2,
                                         drop_last=True)
    state.network.to(memory_format=torch.contiguous_format)
    state.network.train()

    def epoch():
        for images, labels in loader:
            with autocast(device, config.precision):
                logits = state.network(images.to(device))
            state.optimizer.zero_grad()
            loss = F.cross_entropy(logits.float(), labels.to(device))
            loss.backward()
            state.optimizer.step()
            loss.item()  # the tutorial's running loss

    try:
        return timed(epoch, device)
    finally:
        state.network.to(memory_format=torch.channels_last)


def matrix_rate(device, precision, size=2048):
    """Operations per second of a size×size matrix product in `precision`."""
    with autocast(device, precision):
        matrix = torch.randn(size, size, device=device)
        return 2 * size**3 / timed(lambda: matrix @ matrix, device, 5)


def run_script(script, *words):
    """Run a script of this package with this Python; ValueError when it fails."""
    path = Path(__file__).with_name(script)
    if subprocess.run([sys.executable, str(path), *words], check=False).returncode:
        raise ValueError(f"{script} {' '.join(words)}: failed")


def settings_help(words):
    """The settings of a run with their defaults, those of the network named in `words` if any."""
    model = next((word.partition("=")[2] for word in words if word.startswith("--model=")),
                 Config.model)
    defaults = Config.create(model)
    lines = ["  --resume[=RUN]        go on with the run, or start it if there is none",
             "  --overwrite           start anew where a run is already", ""]
    for entry in dataclasses.fields(Config):
        value = getattr(defaults, entry.name)
        if entry.name != "options":
            text = ",".join(value) if isinstance(value, tuple) else str(value).lower()
            lines.append(f"  --{entry.name + '=' + text:<28} {entry.metadata['help']}")
    lines.append(f"options of {model}:")
    for name, (_, value) in networks.options_of(model).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
        lines.append(f"  --{name}={text}")
    return "\n".join(lines)


train_command.help = sweep.help = settings_help

if __name__ == "__main__":
    datasets.command_line({"train": train_command, "evaluate": evaluate, "sweep": sweep,
                           "reproduce": reproduce, "results_table": results_table,
                           "benchmark": benchmark}, default="train")
