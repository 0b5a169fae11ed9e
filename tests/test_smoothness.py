"""How smooth a loss is: answers worked out by hand."""

import io
import math

import pytest
import torch
from torch import nn

import data
import train
import visualize
from lab import smoothness


def test_smoothness_along_the_gradient_of_a_quadratic():
    curvature = torch.tensor([1.0, 3.0])

    def loss_of(weights):
        return (curvature * weights["x"] ** 2).sum() / 2

    # At (1, 1) the gradient g is (1, 3); a step η moves by −ηg and changes it by −η(1, 9).
    measures = smoothness.along_gradient(loss_of, {"x": torch.ones(2)}, [0.1, 0.2])
    assert measures["beta"] == pytest.approx(math.sqrt(82 / 10))
    assert measures["change_low"] == pytest.approx(0.1 * math.sqrt(82))
    assert measures["change_high"] == pytest.approx(0.2 * math.sqrt(82))
    assert measures["loss_high"] == pytest.approx((0.9**2 + 3 * 0.7**2) / 2)
    assert measures["loss_low"] == pytest.approx((0.8**2 + 3 * 0.4**2) / 2)


def test_measuring_smoothness_leaves_running_statistics_alone():
    layers = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    before = {name: buffer.clone() for name, buffer in layers.named_buffers()}
    loss_of = visualize.batch_loss(layers, torch.randn(6, 3, 4, 4), torch.tensor([0, 1] * 3))
    smoothness.along_gradient(loss_of, dict(layers.named_parameters()), [0.1])
    assert all(torch.equal(before[name], buffer) for name, buffer in layers.named_buffers())


def test_filters_of_the_images_are_fitted_as_in_training(few_shapes):
    seen, dataset = {}, data.load("shapes", limit=64)
    fit = train.fit_first_layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit_first_layer", lambda network, *others: (
            fit(network, *others), seen.update(weight=network.conv1[0].weight))[0])
        smoothness.short_run("speednet", 0.01, dataset, torch.device("cpu"), 1, 8, 0)
    assert torch.equal(seen["weight"][:12], -seen["weight"][12:])


def test_a_short_run_leaves_the_random_numbers_of_who_calls_alone(few_shapes):
    dataset, before = data.load("shapes", limit=16), torch.get_rng_state()
    first, again = (smoothness.short_run("lenet", 0.01, dataset, torch.device("cpu"), 2, 8, 0)
                    for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert [row["loss"] for row in first] == [row["loss"] for row in again]


def test_the_command_keeps_what_it_measured_and_names_are_literal(tmp_path, monkeypatch,
                                                                  few_shapes, coarse_figures):
    flags = {"models": "lenet", "data": "shapes", "steps": 2, "every": 1, "lrs": (0.1, 0.2),
             "batch_size": 4, "out": str(tmp_path)}
    figure, table = smoothness.smoothness(**flags)
    assert figure.path == tmp_path / "smoothness.png" and table.exists()
    monkeypatch.setattr(smoothness, "short_run", None)  # all is there
    smoothness.smoothness(**flags)
    rows = [{"model": "_a$b$", "lr": 1, "step": 0, "loss": 1} | dict.fromkeys(
        smoothness.MEASURES, 1)]
    figure = smoothness.draw_smoothness(rows, ["_a$b$"], 1, 1, "$x^{")
    figure.savefig(io.BytesIO(), dpi=20)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_a$b$"]


def test_where_a_measure_is_no_number_the_curve_has_a_gap():
    rows = [{"model": "a", "lr": lr, "step": step, "loss": 1.0} | dict.fromkeys(
        smoothness.MEASURES, math.nan if lr == 1 or step % 2 else step + 1.0)
        for lr in (2, 1) for step in range(8)]
    rows[4]["beta"] = math.nan  # the gradients beyond all bounds, not the losses
    figure = smoothness.draw_smoothness(rows, ["a"], 2, 2, "")
    [line] = figure.axes[3].lines
    assert [*line.get_xdata()] == [0, 2, 4, 6]
    assert [*map(str, line.get_ydata())] == ["1.0", "3.0", "nan", "7.0"]
    [band] = figure.axes[1].collections
    assert {x for x, _ in band.get_paths()[0].vertices.tolist()} == {0, 2, 4, 6}


def test_runs_that_all_diverge_are_one_line(tmp_path, few_shapes, refused):
    assert "lrs=1e+30" in refused(smoothness.COMMANDS, [
        "smoothness", "--models=lenet", "--data=shapes", "--steps=3", "--every=1", "--lrs=1e30",
        "--batch_size=4", f"--out={tmp_path}"])


def test_what_is_measured_once_is_drawn_and_what_never_is_has_no_scale():
    rows = [{"model": "a", "lr": 1, "step": step, "loss": 1.0} | dict.fromkeys(
        smoothness.MEASURES, math.nan if step else 2.0) for step in range(3)]
    figure = smoothness.draw_smoothness(rows, ["a"], 1, 10, "")
    assert figure.axes[3].lines[0].get_marker() not in ("None", "", None)
    rows[0] |= {"beta": math.inf, "change_low": math.inf, "change_high": math.inf}
    figure = smoothness.draw_smoothness(rows, ["a"], 1, 10, "")
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log", "linear", "linear"]
