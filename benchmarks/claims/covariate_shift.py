"""Figure 1: faster convergence, and how the distribution of a layer's inputs moves."""

import statistics
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnext
from benchmarks.claims.finding import (
    COLORS,
    NORMS,
    WITH,
    WITHOUT,
    Finding,
    Setup,
    draw,
    judge,
    spread,
    steps_words,
)
from benchmarks.claims.training import History, mlp, train

STATEMENT = "Faster convergence and less internal covariate shift (the paper's figure 1)"
STEPS, EVERY, LEARNING_RATE, STD = 3000, 20, 0.5, 0.1
PERCENTILES = 15, 50, 85
UNIT = 0


def sigmoid_inputs(model: nn.Sequential, images: Tensor) -> list[Tensor]:
    """[N, width] of each hidden layer, as a training step would see it; nothing is counted."""
    inputs, x = [], images
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Sigmoid):
                inputs.append(x)
            if isinstance(layer, nn.BatchNorm1d):
                weight, bias = layer.weight, layer.bias
                x = bnext.functional.batch_norm(x, None, None, weight, bias, True, eps=layer.eps)
            else:
                x = layer(x)
    return inputs


def drift(before: Tensor, after: Tensor) -> float:
    """How far the units' inputs [N, width] moved, in standard deviations, on average.

    The distance is Wasserstein's between normal distributions of the same mean and deviation.
    """
    (std, mean), (new_std, new_mean) = (torch.std_mean(x, 0) for x in (before, after))
    return (torch.hypot(new_mean - mean, new_std - std) / std).mean().item()


class Watch:
    """Looks at the inputs of the sigmoids during training."""

    def __init__(self, model: nn.Sequential, images: Tensor) -> None:
        self.inputs: Callable[[], list[Tensor]] = lambda: sigmoid_inputs(model, images)
        self.last = self.inputs()
        self.percentiles: list[list[float]] = []  # of a unit of the last hidden layer
        self.drifts: list[list[float]] = []  # of each layer

    def __call__(self, step: int) -> None:
        inputs = self.inputs()
        shares = torch.tensor(PERCENTILES) / 100
        self.percentiles.append(inputs[-1][:, UNIT].quantile(shares).tolist())
        self.drifts.append([drift(*pair) for pair in zip(self.last, inputs, strict=True)])
        self.last = inputs


def run(setup: Setup) -> Finding:
    runs: dict[str, list[tuple[History, Watch]]] = {name: [] for name in NORMS}
    for name, seed in setup.track([(name, seed) for name in NORMS for seed in setup.seeds]):
        torch.manual_seed(seed)
        model = mlp(setup.data, NORMS[name], std=STD)
        watch = Watch(model, setup.data.test_images)
        steps = setup.steps(STEPS)
        history = train(model, setup.data, LEARNING_RATE, steps, seed, EVERY, at_checks=watch)
        runs[name].append((history, watch))

    goals = [max(history.accuracies) for history, _ in runs[WITHOUT]]
    reached = {
        name: [h.steps_to(goal) for (h, _), goal in zip(runs[name], goals, strict=True)]
        for name in NORMS
    }
    final = {name: [h.accuracies[-1] for h, _ in runs[name]] for name in NORMS}
    moved = {
        name: [[statistics.mean(layer) for layer in zip(*w.drifts, strict=True)] for _, w in each]
        for name, each in runs.items()
    }  # by seed and layer
    last = {name: [layers[-1] for layers in each] for name, each in moved.items()}
    sentence = (
        f"Faster convergence {judge(reached[WITH], reached[WITHOUT])}: the best accuracy of the "
        f"network without batch norm, {spread(goals)}, takes it {steps_words(reached[WITHOUT])} "
        f"steps, and with batch norm {steps_words(reached[WITH])}. Less internal covariate shift "
        f"{judge(last[WITH], last[WITHOUT])}: in {EVERY} steps the inputs of the last hidden "
        f"layer's sigmoids move by "
        f"{spread(last[WITHOUT])} of their standard deviation without, {spread(last[WITH])} with."
    )
    cells = [
        [name, spread(final[name]), steps_words(reached[name])]
        + [spread([layers[i] for layers in moved[name]]) for i in range(3)]
        for name in NORMS
    ]
    rows = [
        {"norm": name, "seed": seed, "step": step, "test_accuracy": f"{accuracy:.4f}"}
        | {f"p{p}": f"{v:.4f}" for p, v in zip(PERCENTILES, values, strict=True)}
        | {f"drift_{i}": f"{d:.4f}" for i, d in enumerate(drifts, 1)}
        for name, each in runs.items()
        for seed, (history, watch) in zip(setup.seeds, each, strict=True)
        for step, accuracy, values, drifts in zip(
            history.steps, history.accuracies, watch.percentiles, watch.drifts, strict=True
        )
    ]
    note = (
        "Drift: the distance of Wasserstein between normal distributions with the inputs' means "
        "and standard deviations, per unit, divided by that deviation. Batch norm fixes both up to "
        "gamma and beta, so that it is small by construction. Whether that is why training is "
        "faster is disputed: Santurkar et al. 2018 (arXiv:1805.11604) add shift behind batch norm, "
        "train as fast, and find the cause in a smoother loss."
    )
    header = ["", "test accuracy", "steps to the best without"]
    header += [f"drift, layer {i}" for i in (1, 2, 3)]
    return Finding(sentence, header, cells, rows, _figure(runs, moved), [note])


def _figure(
    runs: dict[str, list[tuple[History, Watch]]], moved: dict[str, list[list[float]]]
) -> Figure:
    figure = Figure(figsize=(10, 7), layout="constrained")
    (accuracy, drifts), below = figure.subplots(2, 2)
    below[1].sharey(below[0])
    for (name, each), axis, shift in zip(runs.items(), below, (-0.2, 0.2), strict=True):
        steps = each[0][0].steps
        draw(accuracy, steps, [h.accuracies for h, _ in each], label=name, color=COLORS[name])
        for share, values in zip(
            PERCENTILES, zip(*each[0][1].percentiles, strict=True), strict=True
        ):
            axis.plot(
                steps, values, label=f"{share} %", color=COLORS[name], alpha=share / 100 + 0.1
            )
        axis.set(title=f"inputs of a sigmoid in the last hidden layer, {name}", xlabel="step")
        axis.legend(fontsize=8)
        layers = [*zip(*moved[name], strict=True)]
        means, spreads = (
            [f(layer) for layer in layers] for f in (statistics.mean, statistics.stdev)
        )
        places = [i + shift for i in range(1, 4)]
        drifts.bar(places, means, 0.38, yerr=spreads, label=name, color=COLORS[name], capsize=3)
    accuracy.set(title="3 x 100 sigmoid units, batch 60", xlabel="step", ylabel="test accuracy")
    drifts.set(
        title=f"drift of the inputs in {EVERY} steps", ylabel="standard deviations", yscale="log"
    )
    drifts.set_xticks([1, 2, 3], [f"layer {i}" for i in (1, 2, 3)])
    for axis in (accuracy, drifts):
        axis.legend(fontsize=8)
    for axis in below:
        axis.title.set_fontsize(9)
    return figure
