"""The Keras way of use: Conv2D, Flatten, BatchNormalization, with Keras' layer and with bnext's."""

import os
import statistics
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import cpu_clock
from benchmarks.claims.data import CLASSES, Data
from benchmarks.claims.finding import Finding, LeftOutError, Setup, draw, spread, verdict
from bnext import reference

STATEMENT = "BatchNormalization in Keras 3: Keras' own layer and bnext's"
EPOCHS, BATCH, LEARNING_RATE = 15, 60, 0.01
IMAGES = 1440  # of an epoch
# Of the pixels, whose mean is moved to that many standard deviations.
MEANS_OVER_STD = 1.0, 10.0, 100.0, 1e3, 1e4
EXACT_AT = 1e3
KERAS, BNEXT = "keras", "bnext.keras"


def layers() -> dict[str, Any]:
    """The two classes; LeftOutError where there is no Keras on torch."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        import keras  # type: ignore[import-not-found, unused-ignore]

        import bnext.keras
    except ImportError as error:
        raise LeftOutError(str(error)) from error
    return {KERAS: keras.layers.BatchNormalization, BNEXT: bnext.keras.BatchNormalization}


def network(norm: Any, data: Data) -> Any:
    import keras

    channels, *size = data.images.shape[1:]
    model = keras.Sequential(
        [
            keras.layers.Input((*size, channels)),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.Flatten(),
            norm(),
            keras.layers.Dense(CLASSES),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(LEARNING_RATE), loss, metrics=["accuracy"])
    return model


class Fit(NamedTuple):
    accuracies: list[float]  # of the test images, after each epoch
    losses: list[float]  # in training


def fit(norm: Any, data: Data, seed: int, epochs: int) -> Fit:
    """model.fit from the seed's initial weights, over the seed's order of the images."""
    import keras

    keras.utils.set_random_seed(seed)
    model = network(norm, data)
    x, test = (images.movedim(1, -1).numpy() for images in (data.images, data.test_images))
    y, test_y = data.labels.numpy(), data.test_labels.numpy()
    history = model.fit(
        x[:IMAGES], y[:IMAGES], BATCH, epochs, verbose=0, validation_data=(test, test_y)
    ).history
    return Fit(history["val_accuracy"], history["loss"])


def error(norm: Any, data: Data, ratio: float) -> float:
    """The largest of a training call's outputs, whose variance is one, against float64."""
    x = data.images.flatten(1)
    x = x[:, x.std(0) > 0.1]
    x = ((x - x.mean(0)) / x.std(0) + ratio).float()
    exact = reference.forward(x, eps=1e-3).output
    output: Tensor = norm()(x, training=True)
    return (output.detach().double() - exact).abs().max().item()


def step_times(kinds: dict[str, Any], data: Data, quick: bool) -> dict[str, cpu_clock.Timing]:
    models = {name: network(norm, data) for name, norm in kinds.items()}
    x, y = data.images[:BATCH].movedim(1, -1).numpy(), data.labels[:BATCH].numpy()
    calls = {name: lambda model=model: model.train_on_batch(x, y) for name, model in models.items()}
    return cpu_clock.alternate(calls, 0.1 if quick else 5.0)


def layer_times(kinds: dict[str, Any], quick: bool) -> dict[str, cpu_clock.Timing]:
    """Forward and backward of the layer alone, on a larger activation [64, 28, 28, 32]."""
    x = torch.randn(64, 28, 28, 32, requires_grad=True)
    grad_out = torch.randn_like(x)

    def call(layer: Any) -> cpu_clock.Call:
        layer.build(x.shape)
        wanted = x, layer.gamma.value, layer.beta.value
        return lambda: torch.autograd.grad(layer(x, training=True), wanted, grad_out)

    calls = {name: call(norm()) for name, norm in kinds.items()}
    return cpu_clock.alternate(calls, 0.1 if quick else 3.0)


def run(setup: Setup) -> Finding:
    kinds = layers()
    epochs = 1 if setup.quick else EPOCHS
    fits: dict[str, list[Fit]] = {name: [] for name in kinds}
    for name, seed in setup.track([(name, seed) for name in kinds for seed in setup.seeds]):
        fits[name].append(fit(kinds[name], setup.data, seed, epochs))
    errors = {n: [error(k, setup.data, r) for r in MEANS_OVER_STD] for n, k in kinds.items()}
    times = {
        "training step": step_times(kinds, setup.data, setup.quick),
        "layer": layer_times(kinds, setup.quick),
    }

    final = {name: [f.accuracies[-1] for f in each] for name, each in fits.items()}
    first = [abs(a.losses[0] - b.losses[0]) for a, b in zip(*fits.values(), strict=True)]
    theirs, ours = (errors[name][MEANS_OVER_STD.index(EXACT_AT)] for name in (KERAS, BNEXT))
    ms = {kind: [by_name[name].ms for name in kinds] for kind, by_name in times.items()}
    gap = abs(statistics.mean(final[KERAS]) - statistics.mean(final[BNEXT]))
    same = gap <= max(map(statistics.stdev, final.values()))
    sentence = (
        f"That both train alike {verdict(same)}: test accuracy {spread(final[KERAS])} with Keras' "
        f"layer, {spread(final[BNEXT])} with bnext's, first epoch's loss equal to "
        f"{max(first):.0e}. Where the mean is {EXACT_AT:.0f} standard deviations Keras' output, of "
        f"variance one, is off by {theirs:.0e} and bnext's by {ours:.0e}. A training step takes "
        f"{ms['training step'][0]:.2f} and {ms['training step'][1]:.2f} ms, the layer alone, on "
        f"64x28x28x32, {ms['layer'][0]:.2f} and {ms['layer'][1]:.2f} ms."
    )
    cells = [
        [name, spread(final[name])]
        + [f"{e:.0e}" for e in errors[name]]
        + [f"{times[kind][name].ms:.2f}" for kind in times]
        for name in kinds
    ]
    rows: list[dict[str, Any]] = [
        {"what": "test accuracy", "layer": name, "seed": seed, "at": epoch, "value": f"{value:.4f}"}
        for name, each in fits.items()
        for seed, one in zip(setup.seeds, each, strict=True)
        for epoch, value in enumerate(one.accuracies, 1)
    ]
    rows += [
        {"what": "error", "layer": name, "seed": "", "at": f"{ratio:g}", "value": f"{value:.3e}"}
        for name, values in errors.items()
        for ratio, value in zip(MEANS_OVER_STD, values, strict=True)
    ]
    rows += [
        {"what": "median ms", "layer": name, "seed": "", "at": kind, "value": f"{timing.ms:.4f}"}
        for kind, by_name in times.items()
        for name, timing in by_name.items()
    ]
    header = ["", "test accuracy", *(f"error at {r:g}" for r in MEANS_OVER_STD)]
    header += ["step, ms", "layer, ms"]
    note = (
        f"Conv2D(8, 3), Flatten, BatchNormalization, Dense({CLASSES}), model.fit; errors by the "
        "mean over the standard deviation. Keras' torch "
        "backend takes E[x^2] - E[x]^2 for the variance and normalises by elementwise operations."
    )
    failures = [] if ours < 1e-4 else [f"bnext.keras is off by {ours:.0e} at mean/std {EXACT_AT:g}"]
    return Finding(sentence, header, cells, rows, _figure(fits, errors, times), [note], failures)


def _figure(
    fits: dict[str, list[Fit]],
    errors: dict[str, list[float]],
    times: dict[str, dict[str, cpu_clock.Timing]],
) -> Figure:
    figure = Figure(figsize=(12, 4), layout="constrained")
    accuracy, exact, speed = figure.subplots(1, 3)
    for (name, each), style in zip(fits.items(), ("-o", "--s"), strict=True):
        epochs = range(1, len(each[0].accuracies) + 1)
        draw(accuracy, epochs, [f.accuracies for f in each], label=name)
        exact.loglog(MEANS_OVER_STD, errors[name], style, label=name)
        values = [by_name[name].ms for by_name in times.values()]
        shift = 0.2 if name == BNEXT else -0.2
        speed.bar([i + shift for i in range(len(values))], values, 0.38, label=name)
    accuracy.set(title="model.fit", xlabel="epoch", ylabel="test accuracy")
    exact.set(title="largest error of the output", xlabel="mean over standard deviation")
    speed.set(title="time", ylabel="ms")
    speed.set_xticks(range(len(times)), [*times])
    for axis in (accuracy, exact, speed):
        axis.legend(fontsize=8)
    return figure
