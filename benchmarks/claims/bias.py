"""Why the gradient must go through the statistics: x = u + b (the paper's section 2)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnext
from benchmarks.claims.data import CLASSES, Data
from benchmarks.claims.finding import Finding, Setup, spread, verdict

STATEMENT = "The gradient must go through the statistics: x = u + b"
STEPS, LEARNING_RATE = 200, 1.0
EPS = 1e-5


def centred(x: Tensor) -> Tensor:
    """The paper's example: x - E[x], whose gradient step takes E[x] for a constant."""
    return x - x.mean(0).detach()


def frozen(x: Tensor) -> Tensor:
    """Normalised by the batch's statistics, taken for constants."""
    var, mean = torch.var_mean(x.detach(), 0, correction=0)
    return bnext.functional.batch_norm(x, mean, var, training=False, eps=EPS)


def through(x: Tensor) -> Tensor:
    """Normalised by the batch's statistics, which the gradient goes through."""
    return bnext.functional.batch_norm(x, None, None, training=True, eps=EPS)


NORMALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "centred, mean constant": centred,
    "normalised, statistics constant": frozen,
    "bnext, through the statistics": through,
}
OURS = "bnext, through the statistics"


class Descent(NamedTuple):
    """Of b alone, by the gradient that a normalisation gives it; a value per step."""

    sizes: list[float]  # of b
    losses: list[float]
    output_change: float  # the largest, since the first step
    gradient: float  # the largest of b's, relative to the gradients that it sums


def descend(normalise: Callable[[Tensor], Tensor], data: Data, seed: int, steps: int) -> Descent:
    """Train b in float64, with u = Wx of the images and the classes as the units."""
    generator = torch.Generator().manual_seed(seed)
    images = data.images.flatten(1).double()
    weights = torch.randn(images.shape[1], CLASSES, generator=generator, dtype=torch.float64)
    u = images @ weights / images.shape[1] ** 0.5
    b = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
    sizes, losses, change, gradient = [], [], 0.0, 0.0
    first: Tensor | None = None
    for _ in range(steps + 1):
        x = u + b
        output = normalise(x)
        loss = F.cross_entropy(output, data.labels)
        grad_x, grad_b = torch.autograd.grad(loss, (x, b))
        first = output.detach() if first is None else first
        change = max(change, (output - first).abs().max().item())
        gradient = max(gradient, (grad_b.abs() / grad_x.abs().sum(0)).max().item())
        sizes.append(b.norm().item())
        losses.append(loss.item())
        with torch.no_grad():
            b -= LEARNING_RATE * grad_b
    return Descent(sizes, losses, change, gradient)


class Network(nn.Module):
    """Convolutions with a bias each, batch norm behind all but the last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 3, padding=1), bnext.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, 2, padding=1), bnext.BatchNorm2d(16)
        self.head = nn.Conv2d(16, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.head(x).mean((2, 3))


def bias_gradients(data: Data, seed: int) -> dict[str, float]:
    """Of each convolution, by name: its bias' gradient, relative to that of its weight."""
    torch.manual_seed(seed)
    model = Network(data.images.shape[1])
    loss = F.cross_entropy(model(data.images[:60]), data.labels[:60])
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name: (conv.bias.grad.norm() / conv.weight.grad.norm()).item()  # type: ignore[union-attr]
        for name, conv in model.named_modules()
        if isinstance(conv, nn.Conv2d)
    }


def run(setup: Setup) -> Finding:
    steps = setup.steps(STEPS)
    runs: dict[str, list[Descent]] = {name: [] for name in NORMALISATIONS}
    for name, seed in setup.track([(n, seed) for n in NORMALISATIONS for seed in setup.seeds]):
        runs[name].append(descend(NORMALISATIONS[name], setup.data, seed, steps))
    biases = [bias_gradients(setup.data, seed) for seed in setup.seeds]
    redundant = bnext.conversion_report(Network(1), fuse=True).redundant_biases

    wrong = [run for name, each in runs.items() if name != OURS for run in each]
    growth = [run.sizes[-1] / (steps * run.sizes[1]) for run in wrong]
    grows = all(0.99 < g < 1.01 for g in growth)
    still = max(run.output_change for run in wrong)
    zero = max(run.gradient for run in runs[OURS])
    confirmed = grows and still < 1e-9 and zero < 1e-12
    sizes = ", ".join(
        f"{spread([run.sizes[-1] for run in each])} ({name})"
        for name, each in runs.items()
        if name != OURS
    )
    largest = max(gradients[name] for gradients in biases for name in redundant)
    sentence = (
        f"The counter-example {verdict(confirmed)}: with the statistics kept out of the gradient, "
        f"b {'grows by the same amount in every step' if grows else 'does not grow steadily'}, in "
        f"{steps} to a length of {sizes}, while no output moves by more than {still:.0e}; through "
        f"the statistics its gradient is at most {zero:.0e} of the terms that it sums, and b stays "
        f"at {max(run.sizes[-1] for run in runs[OURS]):.0e}. A "
        f"convolution's bias before batch norm is as redundant: its gradient is at most "
        f"{largest:.0e} of the weight's, and bnext.conversion_report names "
        f"{' and '.join(redundant)}."
    )
    cells = [
        (
            name,
            spread([run.sizes[-1] for run in each]),
            spread([run.losses[0] for run in each], ".6f"),
            spread([run.losses[-1] for run in each], ".6f"),
            f"{max(run.output_change for run in each):.0e}",
        )
        for name, each in runs.items()
    ]
    rows = [
        {"normalisation": name, "seed": seed, "step": step, "b": f"{b:.6g}", "loss": f"{loss:.12f}"}
        for name, each in runs.items()
        for seed, run in zip(setup.seeds, each, strict=True)
        for step, (b, loss) in enumerate(zip(run.sizes, run.losses, strict=True))
    ]
    header = ["", "length of b", "first loss", "last loss", "output moved by"]
    return Finding(sentence, header, cells, rows, _figure(runs, biases))


def _figure(runs: dict[str, list[Descent]], biases: list[dict[str, float]]) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    sizes, losses, gradients = figure.subplots(1, 3)
    for (name, each), style in zip(runs.items(), ("-", "--", "-"), strict=True):
        for run in each:
            label = name if run is each[0] else None
            sizes.plot(run.sizes, style, label=label, color=f"C{[*runs].index(name) + 1}")
            losses.plot(run.losses, style, label=label, color=f"C{[*runs].index(name) + 1}")
    sizes.set(title="length of b", xlabel="step")
    losses.set(title="loss", xlabel="step")
    losses.set_ylim(0, 1.1 * max(max(run.losses) for each in runs.values() for run in each))
    for axis in (sizes, losses):
        axis.legend(fontsize=7)
    for seed, by_name in enumerate(biases):
        gradients.plot([*by_name], [*by_name.values()], "o", color="C0", alpha=0.6, label=seed)
    gradients.set(title="gradient of a convolution's bias\nover that of its weight", yscale="log")
    return figure
