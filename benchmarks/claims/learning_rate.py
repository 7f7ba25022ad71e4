"""Higher learning rates, on a multilayer perceptron and a small convolutional network."""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.claims.data import CLASSES, Data
from benchmarks.claims.finding import (
    COLORS,
    NORMS,
    WITH,
    WITHOUT,
    Finding,
    Setup,
    draw,
    spread,
    steps_words,
    verdict,
)
from benchmarks.claims.training import History, cnn, mlp, train

STATEMENT = "Higher learning rates (the paper's figure 3)"
FACTORS = 1, 5, 30, 100
EVERY = 10
# A rate is of use if it ends within this share of the best accuracy without batch norm.
USEFUL = 0.95


class Network(NamedTuple):
    make: Callable[[Data, bool], nn.Module]
    lr: float  # x1
    steps: int


NETWORKS = {"MLP": Network(mlp, 0.1, 1500), "CNN": Network(cnn, 0.05, 400)}
Runs = dict[tuple[str, str, int], list[History]]

PAPER = (
    "The paper's own table, for Inception on ImageNet (Ioffe & Szegedy 2015, arXiv:1502.03167, "
    "figure 3), steps to Inception's best accuracy of 72.2 % and the best accuracy: Inception "
    "31.0e6, 72.2 %; BN-Baseline 13.3e6, 72.7 %; BN-x5 2.1e6, 73.0 %; BN-x30 2.7e6, 74.8 %; "
    "BN-x5-Sigmoid never, 69.8 %."
)


def failed(history: History) -> bool:
    """The loss is not finite, or the network ends no better than twice chance."""
    return history.diverged or history.accuracies[-1] <= 2 / CLASSES


def run(setup: Setup) -> Finding:
    factors = FACTORS[1:3] if setup.quick else FACTORS
    jobs = [(n, b, f, s) for n in NETWORKS for b in NORMS for f in factors for s in setup.seeds]
    runs: Runs = {}
    for network, norm, factor, seed in setup.track(jobs):
        torch.manual_seed(seed)
        make, lr, steps = NETWORKS[network]
        model = make(setup.data, NORMS[norm])
        history = train(model, setup.data, lr * factor, setup.steps(steps), seed, EVERY)
        runs.setdefault((network, norm, factor), []).append(history)

    sentences, cells, rows = [], [], []
    goals: dict[str, float] = {}
    for network in NETWORKS:
        best = {
            f: statistics.mean(max(h.accuracies) for h in runs[network, WITHOUT, f])
            for f in factors
        }
        base = max(best, key=lambda f: best[f])
        goals[network] = best[base]
        each_goal = [max(h.accuracies) for h in runs[network, WITHOUT, base]]
        reached = {
            key[1:]: [h.steps_to(g) for h, g in zip(each, each_goal, strict=True)]
            for key, each in runs.items()
            if key[0] == network
        }
        sentences.append(_sentence(network, runs, base, best[base], reached))
        for (norm, factor), steps in reached.items():
            each = runs[network, norm, factor]
            cells.append(
                (
                    f"{network}, x{factor}, {norm}",
                    steps_words(steps),
                    spread([h.accuracies[-1] for h in each]),
                    f"{sum(map(failed, each))} of {len(each)}",
                )
            )
            rows += [
                {
                    "network": network, "norm": norm, "lr": f"{NETWORKS[network].lr * factor:g}",
                    "seed": seed, "steps": s if math.isfinite(s) else "",
                    "best": f"{max(h.accuracies):.4f}", "final": f"{h.accuracies[-1]:.4f}",
                    "failed": int(failed(h)),
                }
                for seed, h, s in zip(setup.seeds, each, steps, strict=True)
            ]  # fmt: skip
    x1 = ", ".join(f"{n.lr:g} for the {name}" for name, n in NETWORKS.items())
    note = (
        f"x1 is a learning rate of {x1}, without momentum. Steps: to the best accuracy "
        "of the same seed without batch norm, at the rate that is best without. Failed: the loss "
        "is not finite, or the accuracy in the end at most twice that of chance."
    )
    header = ["", "steps to the best without", "final accuracy", "failed"]
    figure = _figure(runs, factors, goals)
    return Finding(" ".join(sentences), header, cells, rows, figure, [note, PAPER])


def _sentence(
    network: str, runs: Runs, base: int, goal: float, reached: dict[tuple[str, int], list[float]]
) -> str:
    useful = {
        norm: max(
            (f for (n, b, f), each in runs.items() if (n, b) == (network, norm)
             and statistics.mean(h.accuracies[-1] for h in each) >= USEFUL * goal),
            default=0,
        )
        for norm in NORMS
    }  # fmt: skip
    means = {f: statistics.mean(steps) for (norm, f), steps in reached.items() if norm == WITH}
    fastest = min(means, key=lambda f: means[f])
    confirmed = useful[WITH] > useful[WITHOUT] and means[fastest] < statistics.mean(
        reached[WITHOUT, base]
    )
    return (
        f"That the {network} takes higher learning rates {verdict(confirmed)}: the best accuracy "
        f"without batch norm, {goal:.3f} at x{base}, takes "
        f"{steps_words(reached[WITHOUT, base])} steps, and with batch norm "
        f"{steps_words(reached[WITH, fastest])} at x{fastest}; the highest rate of use, which ends "
        f"within {1 - USEFUL:.0%} of that accuracy, is {_rate(useful[WITHOUT])} without and "
        f"{_rate(useful[WITH])} with."
    )


def _rate(factor: int) -> str:
    return f"x{factor}" if factor else "none"


def _figure(runs: Runs, factors: tuple[int, ...], goals: dict[str, float]) -> Figure:
    figure = Figure(figsize=(10, 7), layout="constrained")
    for (network, goal), (left, right) in zip(goals.items(), figure.subplots(2, 2), strict=True):
        for norm in NORMS:
            each = [runs[network, norm, f] for f in factors]
            finals = [[h.accuracies[-1] for h in some] for some in zip(*each, strict=True)]
            draw(left, factors, finals, marker="o", label=norm, color=COLORS[norm])
            for share, factor in enumerate(factors, 1):
                some = runs[network, norm, factor]
                if any(map(failed, some)):
                    continue
                style = {"color": COLORS[norm], "alpha": share / len(factors)}
                x, y = some[0].steps, [h.accuracies for h in some]
                draw(right, x, y, label=f"{norm}, x{factor}", **style)
        left.set(title=f"{network}, after the last step", xscale="log", xlabel="learning rate, x")
        left.set(ylabel="test accuracy")
        right.set(title=f"{network}, runs that did not fail", xscale="log", xlabel="step")
        for axis in (left, right):
            axis.axhline(goal, color="black", linewidth=0.8, linestyle=":")
            if axis.get_legend_handles_labels()[0]:  # not if all failed
                axis.legend(fontsize=7)
    return figure
