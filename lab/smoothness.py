"""How smooth the loss of a network is while it trains, after Santurkar et al. 2018.

    python -m lab smoothness --models=vgg_a,vgg_a_bn --steps=500

Short runs with a constant learning rate; the measures of the paper's figure 4 along the way.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

import network as networks
import train
import visualize
from data import Batches, load, name_of, progress, text_of

MEASURES = ("loss_low", "loss_high", "change_low", "change_high", "beta")


@torch.enable_grad()
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

    _, gradient = loss_and_gradient(weights)
    slope = nn.utils.get_total_norm(gradient).item()
    losses, changes, betas = [], [], []
    for size in sizes:  # the GPU waits twice each time; with eight sizes every few steps it may
        loss, ahead = loss_and_gradient({name: weight - size * part for (name, weight), part
                                         in zip(weights.items(), gradient)})
        losses.append(loss)
        changes.append(nn.utils.get_total_norm(
            [after - before for after, before in zip(ahead, gradient)]).item())
        betas.append(changes[-1] / max(size * slope, 1e-30))  # at a minimum it is 0 / 0
    losses, changes, betas = map(torch.tensor, (losses, changes, betas))
    return dict(zip(MEASURES, (value.item() for value in (  # NaN where one of them is
        losses.min(), losses.max(), changes.min(), changes.max(), betas.max()))))


@torch.random.fork_rng(devices=[])  # the random numbers of who calls are not touched
def short_run(model, lr, dataset, device, steps, batch_size, seed, every=0):
    """Train `model` for `steps` with SGD (momentum 0.9, constant `lr`): a row for each step.

    With `every`, each so many steps a row has `along_gradient`'s measures, for eight step sizes,
    on the very mini-batch of the step and before it is taken; all else has NaN there.
    """
    torch.manual_seed(seed)
    size = networks.image_size_of(model)
    network = networks.build(model, len(dataset.classes), size).to(
        device, memory_format=torch.channels_last).train()  # as the batches come
    train.fit_first_layer(network, dataset, size)
    batches = Batches(dataset.train, dataset.mean, dataset.std, batch_size, ("flip", "crop"), seed,
                      size, device)
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9)
    stream = itertools.chain.from_iterable(map(batches.epoch, itertools.count()))
    # From half to four times `lr`, evenly in their logarithm.
    sizes = [lr / 2 * 8 ** (index / 7) for index in range(8)]
    rows, losses = [], []
    for step in progress(range(steps), f"{model}, learning rate {lr:g}"):
        images, labels = next(stream)
        rows.append({"model": model, "lr": lr, "step": step, "loss": math.nan,
                     **dict.fromkeys(MEASURES, math.nan)})
        if every and step % every == 0:
            rows[-1] |= along_gradient(visualize.batch_loss(network, images, labels),
                                       dict(network.named_parameters()), sizes)
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    # Only here the GPU waits for the losses.
    return [row | {"loss": loss} for row, loss in zip(rows, torch.stack(losses).tolist())]


def draw_smoothness(rows, models, lr, every, title):
    """Four plots of `short_run`'s rows, all `models` in each (Santurkar et al. 2018, figure 4): the
    band of losses over separate runs, and the three measures along the gradient, of the run at
    `lr`, each `every` steps; where they are no numbers, there is a gap."""
    figure = visualize.new_figure(11, 7.4, title)
    losses, ahead, gradients, beta = (
        visualize.plot(figure, (2, 2, position), name, "step", unit)
        for position, (name, unit) in enumerate((
            ("loss over separate runs, one for each learning rate", "training loss"),
            ("variation of the loss along the gradient", "loss ahead"),
            ("gradient predictiveness: change of the gradient", "l2 distance"),
            ("effective β-smoothness along the gradient", "largest change / distance moved")), 1))
    for index, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        measured = [row for row in own if row["lr"] == lr and row["step"] % every == 0]
        steps, *columns = ([row[name] for row in measured] for name in ("step", *MEASURES))
        loss_low, loss_high, change_low, change_high, largest = columns
        draw_band(losses, *loss_range(own), index)
        draw_band(ahead, steps, loss_low, loss_high, index)
        draw_band(gradients, steps, change_low, change_high, index)
        beta.plot(steps, largest, ("-", "--", ":")[index % 3], marker=".", markersize=4,
                  color=visualize.COLORS[index % len(visualize.COLORS)])
    visualize.add_legend(figure, dict(zip(models, ahead.collections)))
    for axes in figure.axes:
        visualize.log_scale(axes)
    return figure


def loss_range(rows):
    """The steps, and the lowest and the highest loss of all runs at each of them."""
    losses = {}
    for row in rows:  # a loss that is NaN has gone beyond all bounds
        loss = math.inf if math.isnan(row["loss"]) else row["loss"]
        losses.setdefault(row["step"], []).append(loss)
    return [*losses], [*map(min, losses.values())], [*map(max, losses.values())]


def draw_band(axes, steps, low, high, index):
    """The band of model number `index`, told from others in grey print by its hatching; only its
    lower edge where the upper is beyond all bounds."""
    axes.plot(steps, low, alpha=0.45, linewidth=0.8, color=visualize.COLORS[
        index % len(visualize.COLORS)])
    axes.fill_between(steps, low, high, alpha=0.45, linewidth=0.8, hatch=("", "////", "....")[
        index % 3], color=visualize.COLORS[index % len(visualize.COLORS)])


def smoothness(models: tuple[str, ...] = ("vgg_a", "vgg_a_bn"), data: str = "cifar10",
               root: str = "data", steps: int = 500, every: int = 10, batch_size: int = 128,
               lrs: tuple[float, ...] = (1e-3, 2e-3, 1e-4, 5e-4), seed: int = 0,
               out: str | None = None, format: visualize.Format = "png", device: str = "auto"):
    """Compare how smooth MODELS' losses are while they train: two measures, not one.

    The band between the highest and lowest training loss of separate runs at LRS, step by step;
    and the three measures of Santurkar et al. (2018, figure 4) along the gradient of a step, taken
    each EVERY steps of the run at the first of LRS. Finished runs are kept in a CSV file beside the
    figure.
    """
    models, lrs = visualize.listed(models), visualize.listed(lrs)
    visualize.need(steps=steps, every=every, batch_size=batch_size, models=len(models),
                   lrs=len(lrs), lr=min(lrs, default=0))
    for model in models:
        networks.options_of(model)
    dataset = load(data, root, val=0)
    key = visualize.fingerprint(*dataset.train, seed, steps, every, batch_size, lrs[0])
    table = visualize.figure_path(None, "smoothness", out).with_name(f"smoothness-{key}.csv")
    rows = visualize.read_table(table, ["model", "lr", "step", "loss", *MEASURES])
    done = {(row["model"], row["lr"]) for row in rows}
    # Along the gradient one run of each is measured: each time that takes nine backward passes.
    for model, lr in (run for run in itertools.product(models, lrs) if run not in done):
        rows += short_run(model, lr, dataset, train.choose_device(device), steps, batch_size, seed,
                          every if lr == lrs[0] else 0)
        visualize.write_table(table, rows)
    batch_size = min(batch_size, len(dataset.train.labels))
    title = (f"{name_of(data)}, batches of {batch_size}; bands: learning rates "
             f"{', '.join(f'{lr:g}' for lr in sorted(lrs))}; along the gradient: at {lrs[0]:g}, "
             f"steps of {lrs[0] / 2:g} to {4 * lrs[0]:g}")
    rows = [row for row in rows if row["model"] in models and row["lr"] in lrs]
    if steps > 1 and not any(row["step"] and math.isfinite(row["loss"]) for row in rows):
        raise ValueError(f"lrs={text_of(lrs)}: the loss of all runs is infinite after a step")
    figure = draw_smoothness(rows, models, lrs[0], every, title)
    return visualize.save_figure(figure, None, "smoothness", out, format), table


COMMANDS = {"smoothness": smoothness}
