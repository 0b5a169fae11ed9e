"""The training loop beside what bounds it and beside the usual pipeline; see BENCHMARKS.md."""

import dataclasses
import statistics
import tempfile
import time
from functools import partial

import torch
import torch.nn.functional as F

import train
from data import CROP, Split, Table, load
from network import image_size_of, multiply_adds


def benchmark(model: str = "lenet", data: str = "shapes", root: str = "data",
              batch_size: int = 128, augment: tuple[str, ...] = ("flip", "crop"),
              rounds: int = 5, seconds: float = 2.0, device: str = "auto",
              precision: str = "auto", compile: bool = False):
    """Compare this package's training loop with what bounds it and with the usual pipeline.

    In one process, in turn, ROUNDS times about SECONDS each: (a) the training loop as it is, with
    augmentation, metrics, progress and logging; (b) the bare step on one resident batch; (c) the
    usual pipeline, torchvision's data set class, PIL transforms and a DataLoader with two workers;
    (d) a large matrix product. Tells median images/s, the ratios a/b and a/c, and the share of
    (d)'s arithmetic rate. Network, optimizer, batch size, augmentation and images are the same.
    """
    if rounds < 1 or seconds <= 0:
        raise ValueError(f"rounds={rounds}, seconds={seconds:g}: must be above 0")
    usual_transforms(augment, 32)  # complains of what torchvision has not
    chosen = train.choose_device(device)
    config = train.Config.create(
        model, data=data, root=root, batch_size=batch_size, augment=augment, epochs=1, val=0,
        precision=precision, device=device, compile=compile, save_minutes=1e6,
        early_size=None, uncropped_epochs=0,  # (b) and (c) have neither
        lr=1e-4)  # so low that no network diverges over the rounds
    with train.repeatable(config, chosen), tempfile.TemporaryDirectory() as folder:
        dataset = load(data, root, image_size_of(model), val=0)
        # The usual pipeline makes N×C×H×W batches, and its networks stay as they were built.
        state, usual = (train.new_state(config, train.describe(config, dataset), chosen)
                        for _ in range(2))
        usual.network.to(memory_format=torch.contiguous_format)
        batches = train.batches_of(config, dataset, chosen, train.Workers())
        images, labels = next(batches.epoch(0))
        config = dataclasses.replace(config, batch_size=len(labels))  # there may be fewer images
        # As many steps as take SECONDS: the same number for each of the three ways.
        one_step = bare_steps(config, state, images, labels, 3, chosen) / 3
        steps = int(min(len(batches), max(3, seconds / one_step)))  # (a) and (c) are one epoch
        bare_steps(config, usual, images.contiguous(), labels, 1, chosen)  # to be as warm
        ways = {
            "a: this package": lambda: package_steps(config, dataset, state, steps, chosen, folder),
            "b: bare step": lambda: bare_steps(config, state, images, labels, steps, chosen),
            "c: usual pipeline": lambda: usual_steps(config, dataset, usual, steps, chosen)}
        rates = {name: [] for name in (*ways, "d")}
        # In turn, so that a machine that grows warm or busy slows all of them alike.
        for _ in range(rounds):
            for name, way in ways.items():
                rates[name].append(steps * config.batch_size / way())
            rates["d"].append(matrix_rate(chosen, precision))
    title = (f"{model}, batch {config.batch_size}, {','.join(augment) or 'no augmentation'}, "
             f"{steps} steps × {rounds} rounds, {train.environment(chosen)['device']}")
    # A forward pass is one multiply-add a weight, the backward pass two: six operations in all.
    return rates_table(rates, 6 * multiply_adds(state.network, images.shape[3]), title)


def rates_table(rates, operations, title):
    """The table of median `rates`, images/s of a, b, c and operations/s of d, and a line of ratios.

    `operations` are those that one image costs.
    """
    *ways, _ = rates
    a, b, c, d = (statistics.median(values) for values in rates.values())
    rows = [(name, f"{rate:.0f}", f"{min(rates[name]):.0f} to {max(rates[name]):.0f}",
             f"{rate * operations / d:.1%}") for name, rate in zip(ways, (a, b, c))]
    rows.append(("d: matrix product", f"{d / operations:.0f}", f"{d / 1e9:.0f} GFLOP/s", "100%"))
    return (Table(("what", "images/s", "lowest to highest", "share of d"), rows, title),
            f"a/b {a / b:.3f}   a/c {a / c:.2f}   (ratios of medians)")


def timed(function, device, times=1):
    """Mean seconds of a call, the device's work included."""
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(
        device.type, lambda: None)  # of this process's device
    wait()
    started = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - started) / times


def package_steps(config, dataset, state, steps, device, folder):
    """Seconds that `train_epoch` takes for `steps` steps, from the draw of the epoch's plan on."""
    split = Split(*(part[:steps * config.batch_size] for part in dataset.train))
    batches = train.batches_of(config, dataclasses.replace(dataset, train=split), device,
                               train.Workers())
    state.epoch = state.step = 0
    run = train.RunFolder(folder, config, train.describe(config, dataset))
    run.open(state, anew=True)
    try:
        with train.live_progress(config, batches) as progress:
            return timed(lambda: train.train_epoch(state, batches, config, train.Workers(), run,
                                                   progress, []), device)
    finally:
        run.close()


def take_step(config, state, images, labels):
    """A forward and backward pass and an update on one batch; returns the loss."""
    with train.autocast(images.device, config.precision):
        logits = state.network(images)
    state.optimizer.zero_grad()
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    state.optimizer.step()
    return loss


def bare_steps(config, state, images, labels, steps, device):
    """Seconds for `steps` of `take_step` on one resident batch."""
    step = partial(take_step, config, state, images, labels)
    state.network.train()
    step()  # the first one chooses algorithms and reserves memory
    return timed(step, device, steps) * steps


def usual_transforms(augment, size):
    """torchvision's transforms of PIL images of size×size that do what `augment` names."""
    from torchvision import transforms

    known = {"crop": transforms.RandomCrop(size, padding=round(size * CROP)),
             "flip": transforms.RandomHorizontalFlip()}
    if unknown := [name for name in augment if name not in known]:
        raise ValueError(f"augment={unknown[0]}: torchvision has none to compare with; there are "
                         f"{', '.join(known)}, none")
    return [known[name] for name in augment]


def usual_loader(config, dataset, steps, device):
    """torchvision's data set class and PIL transforms on these images, in a DataLoader."""
    from torchvision import transforms
    from torchvision.datasets import CIFAR10

    source = object.__new__(CIFAR10)  # its own __getitem__
    source.data = dataset.train.images[:steps * config.batch_size].permute(0, 2, 3, 1).numpy()
    source.targets = dataset.train.labels.tolist()
    source.target_transform = None
    side = dataset.train.images.shape[3]
    resized = [transforms.Resize(config.size)] if side != config.size else []
    source.transform = transforms.Compose(
        [*usual_transforms(config.augment, side), *resized, transforms.ToTensor(),
         transforms.Normalize(dataset.mean, dataset.std)])
    return torch.utils.data.DataLoader(source, config.batch_size, shuffle=True, num_workers=2,
                                       drop_last=True, pin_memory=device.type == "cuda")


def usual_steps(config, dataset, state, steps, device):
    """Seconds for `steps` steps fed by PIL transforms and a DataLoader with two workers."""
    loader, on_cuda = usual_loader(config, dataset, steps, device), device.type == "cuda"

    def epoch():
        for images, labels in loader:
            loss = take_step(config, state, images.to(device, non_blocking=on_cuda),
                             labels.to(device, non_blocking=on_cuda))
            loss.item()  # the tutorial's running loss

    state.network.train()
    return timed(epoch, device)


def matrix_rate(device, precision, size=2048):
    """Operations per second of a size×size matrix product, in the type in which training computes,
    and with TF32 where its convolutions have it."""
    kind = torch.bfloat16 if train.in_bf16(device, precision) else torch.float32
    matrix = torch.randn(size, size, device=device, dtype=kind)
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before, products.allow_tf32 = products.allow_tf32, convolutions.allow_tf32
    try:
        matrix @ matrix  # to be as warm
        return 2 * size**3 / timed(lambda: matrix @ matrix, device, 5)
    finally:
        products.allow_tf32 = before
