"""Right on a GPU or a Mac before one is at hand: what runs where, in which type, and what waits.

PyTorch can pretend. Fake tensors of a device of another type run forward and backward without any
data, and a dispatch mode sees each operator with the devices and types of what goes in and out.
"""

import json
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import deconv
import network
import train
import visualize
from lab import smoothness

# What a fake number answers makes torch.cov complain; storage without data has no address.
pytestmark = pytest.mark.filterwarnings("ignore:cov", "ignore:Accessing the data pointer")
DEVICE = "fakegpu"
MODULES = {Path(module.__file__).name for module in (data, deconv, network, train, visualize)}
CASES = {
    "lenet": ("lenet", {"dropout": 0.2, "augment": ("flip", "crop", "cutout")}),
    "resnet18": ("resnet18", {}),
    "vgg_a_bn, on_nan=skip": ("vgg_a_bn", {"on_nan": "skip"}),
    "speednet, muon, early size": ("speednet", {"early_size": 24}),
    "resnet20, adamw": ("resnet20", {"optimizer": "adamw"}),
    "resnet20, adagrad": ("resnet20", {"optimizer": "adagrad"}),
    "lenet, rmsprop, on_nan=skip": ("lenet", {"optimizer": "rmsprop", "on_nan": "skip"}),
}
# What asks for the value of a tensor, which has none here: item(), bool(), tolist(), int() …
# What is computed on the device is finite; numbers on the CPU, such as those of units, are small.
ANSWERS = {"aten._local_scalar_dense.default":
           lambda tensor: 1.0 if tensor.is_floating_point() else int(tensor.device.type == DEVICE),
           "aten.is_nonzero.default": lambda _tensor: True,
           "aten.equal.default": lambda _tensor: True}
# Backward passes that CUDA cannot repeat bit for bit: an error with --deterministic.
UNSTEADY = {f"aten.{name}_backward.default" for name in (
    "adaptive_max_pool2d", "_adaptive_avg_pool2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa",
    "upsample_bicubic2d", "reflection_pad2d", "fractional_max_pool2d", "grid_sampler_2d")}
cases = pytest.mark.parametrize("model, settings", CASES.values(), ids=CASES)


def register_device():
    """Make the device known to torch; False where this release has not what that needs, or there
    is a real one: torch takes one kind alone, and the other's backward passes would fail.

    Once, and before the first backward pass of this process: with that, torch counts the devices.
    """
    if torch.accelerator.is_available():
        return False
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: F401
        from torch.utils import backend_registration as registration

        class Backend(registration._DummyBackendModule):
            _is_in_bad_fork = staticmethod(lambda: False)
            manual_seed_all = staticmethod(lambda _seed: None)
            get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])

        registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=Backend())
    except (ImportError, AttributeError):
        return False
    return True


PRETENDS = register_device()


class Watch(TorchDispatchMode):
    """Notes operators that `mixed` devices, `waits` for the device, and `doubles` on it.

    A copy between the devices is a wait: from the device because the number is wanted, to it
    because the memory it comes from is not pinned.
    """

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self):
        """Forget what was noted."""
        self.mixed, self.waits, self.doubles, self.names = [], [], [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, inputs = str(function), self.tensors((args, kwargs))
        if name in ANSWERS:
            if inputs[0].device.type == DEVICE:
                self.note(self.waits, name)
            return ANSWERS[name](inputs[0])
        self.names.add(name)
        for tensor in inputs:
            tensor.constant = None  # a fake number on the CPU has a value, which cannot be moved
        result = function(*args, **(kwargs or {}))
        outputs = self.tensors(result)
        devices = {tensor.device.type for tensor in [*inputs, *outputs]}
        if len(devices) > 1:
            copies = name in ("aten._to_copy.default", "aten.copy_.default")
            self.note(self.waits if copies else self.mixed, name)
        if any(tensor.device.type == DEVICE and tensor.dtype == torch.float64
               for tensor in [*inputs, *outputs]):
            self.note(self.doubles, name)
        return result

    @staticmethod
    def tensors(values):
        return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]

    def note(self, notes, what):
        """Add `what`, with the line of the package that did it."""
        lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"
                 for frame in traceback.extract_stack()
                 if Path(frame.filename).name in MODULES]
        notes.append(f"{what} at {lines[-1] if lines else 'the backward pass'}")

    def assert_clean(self):
        """Nothing mixed devices, and no float64 was on the device."""
        assert self.mixed == [] and self.doubles == []


def moved_module(module, *args, memory_format=None, **kwargs):
    """`nn.Module.to`, which swaps a parameter's inside, as fake parameters do not like."""
    for part in module.modules():
        for values, wrap in ((part._parameters, nn.Parameter), (part._buffers, None)):
            for name, value in values.items():
                if value is not None:
                    layout = {"memory_format": memory_format} if memory_format and (
                        value.ndim == 4) else {}
                    moved = value.detach().to(*args, **kwargs, **layout)
                    values[name] = wrap(moved, value.requires_grad) if wrap else moved
    return module


@pytest.fixture
def watch(monkeypatch):
    """A `Watch` over everything, in a world where no tensor has data."""
    if not PRETENDS:
        pytest.skip(f"torch {torch.__version__} has not the private interfaces that pretend a "
                    f"device")
    from torch._subclasses.fake_tensor import FakeTensorMode

    caches = [value for module in (data, network, train, visualize)
              for value in vars(module).values() if hasattr(value, "cache_clear")]
    watch, set_item = Watch(), torch.Tensor.__setitem__

    def noting_set_item(tensor, index, value):
        if tensor.device.type == DEVICE and isinstance(value, (int, float)):
            watch.note(watch.waits, "tensor[…] = a Python number")  # CUDA copies it from the CPU
        set_item(tensor, index, value)

    monkeypatch.setattr(torch.Tensor, "__setitem__", noting_set_item)
    monkeypatch.setattr(nn.Module, "to", moved_module)
    for cache in caches:
        cache.cache_clear()
    with FakeTensorMode(), watch:
        yield watch
    for cache in caches:  # no tensor without data may remain in them
        cache.cache_clear()


def dataset_of(count):
    """`count` training and test images."""
    split = data.Split(torch.zeros(count, 32, 32, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
                       torch.zeros(count, dtype=torch.long))
    return data.Dataset("none", data.SHAPES, split, None, split, (0.5,) * 3, (0.25,) * 3)


def begun(model, settings, steps=3):
    """(config, state, batches) of a run on the device."""
    config = train.Config.create(model, **{"data": "shapes", "val": 0, "batch_size": 4,
                                           "epochs": 2, "precision": "fp32", **settings})
    dataset, device = dataset_of(4 * steps), torch.device(DEVICE, 0)
    state = train.new_state(config, train.describe(config, dataset), device)
    train.fit_first_layer(state.network, dataset)
    return config, state, train.batches_of(config, dataset, device, train.Workers())


def take_step(config, state, batch):
    train.train_step(state, *batch, config, train.Workers(), 0.1, config.batch_size)
    state.step += 1


@cases
def test_a_step_neither_waits_nor_mixes_devices(model, settings, watch):
    config, state, batches = begun(model, settings)
    stream = batches.epoch(0, size=settings.get("early_size"))
    first = next(stream)  # and the plan of the epoch, which comes from the CPU
    watch.assert_clean()
    watch.clear()
    state.network.train()
    for batch in (first, next(stream), next(stream)):  # the first makes the optimizer's state
        take_step(config, state, batch)
    watch.assert_clean()
    assert watch.waits == [] and not watch.names & UNSTEADY
    assert {value.device.type for value in state.network.state_dict().values()} == {DEVICE}


@pytest.mark.parametrize("way", ["store", "device"])
def test_batches_are_made_on_the_device(way, watch):
    batches = data.Batches(dataset_of(12).train, (0.5,) * 3, (0.25,) * 3, 4,
                           ("flip", "crop", "cutout"), device=torch.device(DEVICE, 0), way=way)
    stream = batches.epoch(0)
    next(stream)  # and the plan of the epoch, which comes from the CPU
    watch.clear()
    images, labels = next(stream)
    assert {images.device.type, labels.device.type} == {DEVICE}
    watch.assert_clean()
    assert watch.waits == []


class NoFolder:
    """A run folder that is not there."""

    def scalars(self, _values, _step):
        pass


@pytest.mark.parametrize("model, settings", [CASES["lenet"], CASES["speednet, muon, early size"],
                                             CASES["vgg_a_bn, on_nan=skip"]])
def test_an_epoch_waits_at_the_declared_points_alone(model, settings, watch, monkeypatch):
    monkeypatch.setattr(train, "POINT_STEPS", 2)
    config, state, batches = begun(model, settings)
    watch.clear()
    in_step, shown, real_step = [], [], train.train_step

    def noting_step(state, *arguments):
        if state.step == 0:
            watch.clear()  # of the epoch's plan
        before = len(watch.waits)
        real_step(state, *arguments)
        in_step.extend(watch.waits[before:])

    def bar(state, step):
        shown.append((step, len(watch.waits), state.epoch_seconds > 0))
        watch.waits.clear()

    monkeypatch.setattr(train, "train_step", noting_step)
    train.train_epoch(state, batches, config, train.Workers(), NoFolder(), bar, [])
    watch.assert_clean()
    # One reading of four sums each, and the clock is read after it.
    assert in_step == [] and shown == [(2, 4, True), (3, 4, True)]
    assert watch.waits == []


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_a_resumed_run_waits_no_more_than_before(optimizer, watch):
    """A checkpoint is read onto the CPU, where some optimizers keep their counters of steps."""
    config, state, batches = begun("lenet", {"optimizer": optimizer})
    batch = next(batches.epoch(0))
    take_step(config, state, batch)
    devices = [tensor.device.type for tensor in train.changing(state)]
    on_cpu = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda tensor: tensor.cpu(),
        {"weights": state.network.state_dict(), "training": train.training_state(state),
         "epoch": 0, "step": 1})
    config, state, _ = begun("lenet", {"optimizer": optimizer})
    train.restore(state, on_cpu, len(batches))
    assert [tensor.device.type for tensor in train.changing(state)] == devices
    watch.clear()
    take_step(config, state, batch)
    watch.assert_clean()
    assert watch.waits == []


@pytest.mark.parametrize("tta", train.TTA)
@pytest.mark.parametrize("model, settings", [CASES["lenet"], CASES["speednet, muon, early size"]])
def test_predict_waits_for_the_images_and_the_end(model, settings, tta, watch):
    config, state, _ = begun(model, settings)
    about = network.describe(train.describe(config, dataset_of(8))).preprocessing
    about(dataset_of(1).test.images, torch.device(DEVICE, 0))  # fills the cache of constants
    watch.clear()
    logits = train.predict(state.network, dataset_of(8).test.images, about, tta)
    watch.assert_clean()
    assert logits.shape == (8, 10) and logits.device.type == "cpu" and len(watch.waits) == 2


@pytest.mark.parametrize("model, layer", [("lenet", "conv2"), ("resnet20", "conv3_x"),
                                          ("speednet", "conv2_x"), ("vgg_a_bn", "fc")])
def test_figures_are_computed_on_the_device(model, layer, watch, monkeypatch):
    config, state, batches = begun(model, {})
    about = network.describe(train.describe(config, dataset_of(8))).preprocessing
    images, labels = next(batches.epoch(0))
    with monkeypatch.context() as answers:  # values that are not there: one kind, one position
        answers.setattr(torch.Tensor, "unique", lambda maps, dim, return_inverse: (
            maps[:1], torch.zeros(len(maps), dtype=torch.long, device=maps.device)))
        answers.setattr(torch.Tensor, "nonzero", lambda lines: torch.zeros(
            1, lines.ndim, dtype=torch.long, device=lines.device))
        answers.setattr(torch.Tensor, "any", lambda values, *_, **__: values.ndim == 4)  # of fields
        answers.setattr(network, "exact_type", lambda device: torch.float32)  # as on MPS
        watch.clear()
        network.receptive_fields(state.network, layer, 32)
        watch.assert_clean()
    watch.clear()
    maps = visualize.feature_maps(state.network, [layer], images)[layer]
    assert maps.device.type == DEVICE and watch.waits == []
    for rule in deconv.RULES:
        # It waits at each operator, to learn what it does, which a figure may.
        monkeypatch.setattr(deconv, "signature", lambda _mask: object())
        assert deconv.project(state.network, layer, images, rule=rule).device.type == DEVICE
    visualize.top_activations(state.network, layer, dataset_of(8).test.images, about, [0, 1], 3)
    directions = [visualize.filter_normalized_direction(state.network, data.generator(0))] * 2
    watch.clear()
    with visualize.moved(state.network, directions, (0.5, -0.5)):
        pass
    assert watch.waits == []
    smoothness.along_gradient(visualize.batch_loss(state.network, images, labels),
                              dict(state.network.named_parameters()), [0.1, 0.2])
    watch.assert_clean()


class Done:
    """An exchange between processes that is over at once."""

    def wait(self):
        pass


def test_gradients_travel_during_the_backward_pass(monkeypatch):
    """Two processes with the same images: every sum is twice what one has."""
    twin = network.build("vgg_a_bn", image_size=32)
    first, travelled = next(twin.parameters()), []

    def all_reduce(flat, async_op):
        assert async_op and flat.dtype == torch.float32
        travelled.append((flat.numel(), first.grad is None))
        flat.mul_(2)
        return Done()

    def loss():
        return (twin(images) * weights).sum()

    images, weights = torch.randn(4, 3, 32, 32), torch.randn(4, 10)
    expected = torch.autograd.grad(loss(), [*twin.parameters()])
    monkeypatch.setattr(train.distributed, "all_reduce", all_reduce)
    value, sums = loss(), torch.tensor([1.0, 2.0, 4.0])
    with train.Workers(0, 2).sharing(twin, [*twin.parameters()], sums):
        value.backward()
    assert all(torch.allclose(parameter.grad, 2 * gradient, rtol=1e-4, atol=1e-5)
               for parameter, gradient in zip(twin.parameters(), expected))
    assert sums.tolist() == [2, 4, 8] and not any(
        parameter._post_accumulate_grad_hooks for parameter in twin.parameters())
    statistics = sum(buffer.numel() for buffer in twin.buffers() if buffer.is_floating_point())
    assert travelled[0] == (statistics + 3, True)
    assert [early for _, early in travelled[1:]] == [True] * (len(travelled) - 2) + [False]
    assert sum(values for values, _ in travelled[1:]) == network.count_parameters(twin)


def test_buckets_by_hand():
    one, two, three, four = (torch.zeros(count) for count in (5, 1, 4, 2))
    found = train.buckets_of([one, two, three, four], most=5)
    assert [[part.numel() for part in bucket] for bucket in found] == [[2, 4], [1, 5]]


@pytest.mark.parametrize("model, settings", [CASES["resnet18"], CASES["lenet"]])
def test_a_step_of_several_processes_waits_no_more(model, settings, watch, monkeypatch):
    monkeypatch.setattr(train.distributed, "all_reduce", lambda flat, async_op: Done())
    config, state, batches = begun(model, settings)
    batch = next(batches.epoch(0))
    watch.clear()
    train.train_step(state, *batch, config, train.Workers(0, 2), 0.1, config.batch_size)
    watch.assert_clean()
    assert watch.waits == []


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    given = {}
    monkeypatch.setattr(train.distributed, "rendezvous", lambda _url: iter([("store", 1, 2)]))
    monkeypatch.setattr(train.distributed, "init_process_group",
                        lambda backend, **keywords: given.update(keywords, backend=backend))
    monkeypatch.setattr(train.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: given.update(current=device))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    device = train.choose_device("cuda")
    with train.repeatable(train.Config(), device), train.join_workers(device) as workers:
        assert workers == train.Workers(1, 2)
    assert device == given["device_id"] == given["current"] == torch.device("cuda", 1)
    assert given["backend"] == "nccl" and given["rank"] == 1 and given["world_size"] == 2
    assert given["timeout"].total_seconds() > 3600  # as long as process 0 may work alone
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="2 GPUs"):
        train.choose_device("cuda")
    with pytest.raises(ValueError, match="device=mps"), train.join_workers(torch.device("mps")):
        pass


@pytest.mark.parametrize("precision, supported, bf16", [
    ("auto", True, True), ("auto", False, False), ("bf16", False, True), ("fp32", True, False)])
def test_bf16_where_the_card_computes_in_it(precision, supported, bf16, monkeypatch):
    def is_supported(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert train.in_bf16(torch.device("cuda", 0), precision) is bf16
    assert train.in_bf16(torch.device("cpu"), precision) is (precision == "bf16")


def test_evaluation_takes_as_many_images_as_fit():
    def at_once(model):
        with torch.device("meta"):  # which counts as a GPU
            return train.images_at_once(network.build(model), network.image_size_of(model))

    # By hand: the first stage of lenet is 6×28×28 values, of resnet50 256×32×32; and of
    # resnet18_imagenet 64×112×112 at 224 pixels.
    assert network.largest_output(network.build("lenet"), 32) == 6 * 28 * 28
    assert at_once("lenet") == 4096 and at_once("resnet50") == 2**26 // (256 * 32 * 32) == 256
    assert at_once("resnet18_imagenet") == min(2**22 // 224**2, 2**26 // (64 * 112 * 112)) == 83
    assert train.images_at_once(network.build("lenet"), 32) == 512
    compiled = network.build("lenet")
    compiled.compile(backend=lambda *_: pytest.fail("one image is not worth compiling for"))
    assert network.largest_output(compiled, 32) == 6 * 28 * 28


def test_a_checkpoint_is_copied_to_the_cpu(watch):
    _, state, _ = begun("lenet", {"optimizer": "adamw"})
    for copied, kept in zip(train.copied(state.network.state_dict()).values(),
                            state.network.state_dict().values()):
        assert copied.device.type == "cpu" and copied.stride() == kept.stride()
    watch.assert_clean()


def test_what_is_copied_shares_nothing():
    number = torch.ones(2)
    copied = train.copied({"a": (number, [number, 3])})
    number.zero_()
    assert copied["a"][0].tolist() == [1, 1] and copied["a"][1][1] == 3


@pytest.mark.slow
def test_a_bare_machine(tmp_path):
    """Without git, a home, or a folder for the caches of torch and matplotlib."""
    nowhere = dict.fromkeys(("HOME", "MPLCONFIGDIR", "TORCH_HOME", "XDG_CACHE_HOME"), "/dev/null/x")
    root = Path(train.__file__).parent
    for words in (["train.py", "--data=shapes", "--limit=32", "--epochs=1", "--out=runs"],
                  ["train.py", "--data=shapes", "--limit=32", "--epochs=2", "--out=runs",
                   "--resume"],
                  ["visualize.py", "curves", "runs/lenet"], ["deconv.py", "reconstruct",
                                                             "runs/lenet"]):
        done = subprocess.run([sys.executable, str(root / words[0]), *words[1:]], cwd=tmp_path,
                              env={"PATH": "", "OMP_NUM_THREADS": "1", **nowhere},
                              capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert json.loads((tmp_path / "runs/lenet/result.json").read_text())["commit"] is None


# ---------------------------------------------------------------------------- a real one


@pytest.fixture
def device(request):
    """The device that `--device` names, with fp32 as exact there as it is on the CPU."""
    name = request.config.getoption("--device")
    if name == "cpu":
        pytest.skip("compares another device with the CPU: needs --device")
    return train.choose_device(name)


@pytest.mark.parametrize("way", ["store", "device", "host"])
def test_the_batches_of_a_device_are_those_of_the_cpu(device, way):
    dataset = data.load("shapes", limit=64, val=0)
    here, there = (data.Batches(dataset.train, dataset.mean, dataset.std, 16,
                                ("flip", "crop", "cutout"), device=place, way=way)
                   for place in ("cpu", device))
    for size in (None, 24):
        for (images, labels), (others, their_labels) in zip(here.epoch(1, size=size),
                                                            there.epoch(1, size=size)):
            assert others.device.type == device.type and torch.equal(labels, their_labels.cpu())
            assert torch.allclose(images, others.cpu(), atol=1e-5)


@pytest.mark.parametrize("model, layer", [("lenet", "conv2"), ("resnet20", "conv3_x"),
                                          ("speednet", "conv2_x"), ("vgg_a_bn", "conv4")])
def test_what_is_seen_on_a_device_is_what_is_seen_on_the_cpu(device, model, layer):
    dataset = data.load("shapes", limit=64, val=0)
    about = network.Preprocessing(32, dataset.mean, dataset.std)
    torch.manual_seed(0)
    built = network.build(model).eval()
    images, labels = about(dataset.test.images[:8]), dataset.test.labels[:8]

    def seen(on):
        built.to(on)
        x, y = images.to(on), labels.to(on)
        yield train.predict(built, dataset.test.images, about, "full")
        yield network.receptive_fields(built, layer, 32)
        yield visualize.feature_maps(built, [layer], x)[layer]
        for method in ("gradient", "gradcam"):
            yield visualize.relevance(built, x[:1], y[0], method, layer)[0]
        for rule in deconv.RULES:
            yield deconv.project(built, layer, x, rule=rule)
        yield deconv.moved(x, {"angle": 20, "translate": [2, 0], "scale": 1.2, "shear": [0, 0]})

    # The norm of all differences: a value close to zero may be rounded to the other side of it.
    for number, (one, other) in enumerate(zip(list(seen("cpu")), seen(device))):
        one, other = one.float(), other.cpu().float()
        assert (one - other).norm() < 0.01 * one.norm(), number
