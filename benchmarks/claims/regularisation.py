"""Overfitting on few images: batch norm beside dropout and weight decay."""

import statistics

import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.claims.data import TEST_LIMIT, Data
from benchmarks.claims.finding import (
    COLORS,
    NORMS,
    WITH,
    WITHOUT,
    Finding,
    Setup,
    clearly_less,
    judge,
    spread,
    verdict,
)
from benchmarks.claims.training import accuracy, mlp, train

STATEMENT = "Control of overfitting with less dropout and weight decay"
STEPS, LEARNING_RATE, IMAGES = 1000, 0.1, 300
REGULARISERS = {
    "nothing": (0.0, 0.0),
    "dropout 0.1": (0.1, 0.0),
    "dropout 0.25": (0.25, 0.0),
    "dropout 0.5": (0.5, 0.0),
    "weight decay 1e-4": (0.0, 1e-4),
    "weight decay 1e-3": (0.0, 1e-3),
    "weight decay 1e-2": (0.0, 1e-2),
}


def few(data: Data) -> Data:
    """The first images train the network, those not used for that test it too."""
    images = torch.cat([data.test_images, data.images[IMAGES:]])[:TEST_LIMIT]
    labels = torch.cat([data.test_labels, data.labels[IMAGES:]])[:TEST_LIMIT]
    return Data(data.name, data.images[:IMAGES], data.labels[:IMAGES], images, labels)


def run(setup: Setup) -> Finding:
    data = few(setup.data)
    names = [*REGULARISERS][::3] if setup.quick else [*REGULARISERS]
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}  # train and test accuracy
    jobs = [(norm, name, seed) for norm in NORMS for name in names for seed in setup.seeds]
    for norm, name, seed in setup.track(jobs):
        torch.manual_seed(seed)
        dropout, decay = REGULARISERS[name]
        model = mlp(data, NORMS[norm], nn.ReLU, dropout=dropout)
        steps = setup.steps(STEPS)
        history = train(model, data, LEARNING_RATE, steps, seed, every=steps, weight_decay=decay)
        trained = accuracy(model, data.images, data.labels)
        runs.setdefault((norm, name), []).append((trained, history.accuracies[-1]))

    gaps = {key: [a - b for a, b in each] for key, each in runs.items()}
    tests = {key: [b for _, b in each] for key, each in runs.items()}
    means = {key: statistics.mean(values) for key, values in tests.items()}
    best = {norm: max((means[norm, name], name) for name in names)[1] for norm in NORMS}
    alone, without, both = (
        tests[key] for key in ((WITH, "nothing"), (WITHOUT, best[WITHOUT]), (WITH, best[WITH]))
    )
    sentence = (
        f"A smaller gap between training and test accuracy by batch norm alone "
        f"{judge(gaps[WITH, 'nothing'], gaps[WITHOUT, 'nothing'])}: "
        f"{spread(gaps[WITHOUT, 'nothing'])} without, {spread(gaps[WITH, 'nothing'])} with. Batch "
        f"norm in place of another regulariser {verdict(not clearly_less(alone, without))}: it "
        f"tests at {spread(alone)}, and {best[WITHOUT]}, the best without it, at "
        f"{spread(without)}. Needing nothing else {verdict(not clearly_less(alone, both))}: with "
        f"{best[WITH]}, the best, it tests at {spread(both)}."
    )
    cells = [
        (
            f"{norm}, {name}",
            spread([a for a, _ in runs[norm, name]]),
            spread(tests[norm, name]),
            spread(gaps[norm, name]),
        )
        for norm in NORMS
        for name in names
    ]
    rows = [
        {"norm": norm, "regulariser": name, "seed": seed, "train": f"{a:.4f}", "test": f"{b:.4f}"}
        for (norm, name), each in runs.items()
        for seed, (a, b) in zip(setup.seeds, each, strict=True)
    ]
    note = (
        f"Trained on {len(data.labels)} images, tested on {len(data.test_labels)}: 3 x 100 ReLU "
        f"units, {setup.steps(STEPS)} steps. The paper's section 4.2.1 took dropout away and "
        "divided the weight decay by 5, on ImageNet."
    )
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, values, label in (left, tests, "test accuracy"), (right, gaps, "training minus test"):
        for norm, shift in zip(NORMS, (-0.2, 0.2), strict=True):
            axis.errorbar(
                [statistics.mean(values[norm, name]) for name in names],
                [i + shift for i in range(len(names))],
                xerr=[statistics.stdev(values[norm, name]) for name in names],
                fmt="o", capsize=3, label=norm, color=COLORS[norm],
            )  # fmt: skip
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel=label)
        axis.legend(fontsize=8)
    header = ["", "training accuracy", "test accuracy", "gap"]
    return Finding(sentence, header, cells, rows, figure, [note])
