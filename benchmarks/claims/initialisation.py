"""The standard deviation of the initial weights, over four decades."""

import math
import statistics

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.claims.finding import (
    COLORS,
    NORMS,
    WITH,
    WITHOUT,
    Finding,
    Setup,
    draw,
    spread,
    verdict,
)
from benchmarks.claims.training import mlp, train

STATEMENT = "Less sensitivity to the initial weights"
STEPS, LEARNING_RATE = 500, 0.1
STDS = [10 ** (half / 2) for half in range(-6, 3)]
# A standard deviation trains if it ends within this share of the best accuracy of all.
TRAINS = 0.9


def run(setup: Setup) -> Finding:
    stds = STDS[::4] if setup.quick else STDS
    finals: dict[tuple[str, float], list[float]] = {}
    jobs = [(norm, std, seed) for norm in NORMS for std in stds for seed in setup.seeds]
    for norm, std, seed in setup.track(jobs):
        torch.manual_seed(seed)
        model = mlp(setup.data, NORMS[norm], nn.ReLU, std=std)
        steps = setup.steps(STEPS)
        history = train(model, setup.data, LEARNING_RATE, steps, seed, every=steps)
        finals.setdefault((norm, std), []).append(history.accuracies[-1])

    means = {key: statistics.mean(values) for key, values in finals.items()}
    good = TRAINS * max(means.values())
    trains = {norm: [std for std in stds if means[norm, std] >= good] for norm in NORMS}
    sentence = (
        f"Less sensitivity {verdict(len(trains[WITH]) > len(trains[WITHOUT]))}: of the {len(stds)} "
        f"standard deviations from {stds[0]:g} to {stds[-1]:g}, {_range(trains[WITHOUT])} train "
        f"the network without batch norm to {good:.3f} in {setup.steps(STEPS)} steps, and "
        f"{_range(trains[WITH])} the one with it."
    )
    cells = [[f"{std:.2g}", *(spread(finals[norm, std]) for norm in NORMS)] for std in stds]
    rows = [
        {"norm": norm, "std": f"{std:.4g}", "seed": seed, "final": f"{value:.4f}"}
        for (norm, std), values in finals.items()
        for seed, value in zip(setup.seeds, values, strict=True)
    ]
    note = (
        "BN(aWu) = BN(Wu) for any a > 0: the scale of the weights does not matter to the output, "
        "but their gradient is divided by a, so that large weights learn slowly (the paper's "
        "section 3.3)."
    )
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for norm in NORMS:
        each = [*zip(*(finals[norm, std] for std in stds), strict=True)]
        draw(axis, stds, each, marker="o", label=norm, color=COLORS[norm])
    axis.axhline(good, color="black", linewidth=0.8, linestyle=":")
    axis.set(
        xscale="log", xlabel="standard deviation of the initial weights", ylabel="test accuracy",
        title=f"3 x 100 ReLU units, {setup.steps(STEPS)} steps",
    )  # fmt: skip
    axis.legend(fontsize=8)
    return Finding(sentence, ["std", *NORMS], cells, rows, figure, [note])


def _range(stds: list[float]) -> str:
    if not stds:
        return "none"
    decades = math.log10(stds[-1] / stds[0])
    return f"{len(stds)} ({stds[0]:.2g} to {stds[-1]:.2g}, {decades:.1f} decades)"
