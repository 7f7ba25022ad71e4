"""Whitening, and the part of it that batch norm keeps: variances are one, covariances stay."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnext
from benchmarks import cpu_clock
from benchmarks.claims.data import Data
from benchmarks.claims.finding import Finding, Setup, spread, verdict
from benchmarks.claims.training import mlp, train

STATEMENT = "Whitening, and what batch norm leaves of it"
WIDTH, STEPS, EPS = 32, 200, 1e-5
RIDGE = 1e-12  # keeps a direction without variance from being divided by zero
WIDTHS = 16, 32, 64, 128, 256
Transform = Callable[[Tensor], Tensor]


def eigen(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x: [N, C] less its mean, and the eigenvalues and eigenvectors of its covariance."""
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    return centred, values, vectors


def standardise(x: Tensor) -> Tensor:
    """What batch norm does: each feature by itself."""
    return bnext.functional.batch_norm(x, None, None, training=True, eps=EPS)


def decorrelate(x: Tensor) -> Tensor:
    """Onto the axes of the covariance: no covariances, the variances stay different."""
    centred, _, vectors = eigen(x)
    return centred @ vectors


def whiten(x: Tensor) -> Tensor:
    """Decorrelated, standardised and turned back (ZCA): the covariance is the identity."""
    centred, values, vectors = eigen(x)
    return centred @ (vectors * (values + RIDGE).rsqrt()) @ vectors.T


def colour(x: Tensor) -> Tensor:
    """The reverse: white features are given a covariance, here the one they had."""
    _, values, vectors = eigen(x)
    return whiten(x) @ (vectors * (values + RIDGE).sqrt()) @ vectors.T


TRANSFORMS: dict[str, Transform] = {
    "as they are": lambda x: x,
    "standardised (bnext)": standardise,
    "decorrelated (PCA)": decorrelate,
    "whitened (ZCA)": whiten,
    "coloured again": colour,
}
BNEXT, ZCA = "standardised (bnext)", "whitened (ZCA)"


class Covariance(NamedTuple):
    matrix: Tensor
    least: float  # variance
    largest: float  # variance
    correlation: float  # between two features, absolute, on average
    from_white: float  # largest difference from the identity

    @classmethod
    def of(cls, x: Tensor) -> "Covariance":
        matrix = torch.cov(x.double().T, correction=0)
        variances = matrix.diag()
        correlations = matrix / torch.outer(variances, variances).sqrt()
        others = correlations[~torch.eye(len(matrix), dtype=torch.bool)].abs().mean().item()
        identity = torch.eye(len(matrix), dtype=matrix.dtype)
        least, largest = variances.min().item(), variances.max().item()
        return cls(matrix, least, largest, others, (matrix - identity).abs().max().item())


def activations(data: Data, seed: int, steps: int) -> Tensor:
    """[N, WIDTH]: what batch norm is given in the second hidden layer of a trained network."""
    torch.manual_seed(seed)
    model = mlp(data, norm=True, act=nn.ReLU, width=WIDTH)
    train(model, data, 0.1, steps, seed, every=steps)
    second = [i for i, layer in enumerate(model) if isinstance(layer, nn.BatchNorm1d)][1]
    with torch.no_grad():
        inputs: Tensor = model.eval()[:second](data.images)
    return inputs


def identity_error(x: Tensor) -> float:
    """Of a batch norm with gamma = std and beta = mean, which should give x back."""
    norm = bnext.BatchNorm1d(x.shape[1], eps=EPS, dtype=x.dtype)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    with torch.no_grad():
        norm.weight.copy_((var + EPS).sqrt())
        norm.bias.copy_(mean)
        return ((norm(x) - x).abs().max() / x.abs().max()).item()


def step(transform: Transform, x: Tensor) -> cpu_clock.Call:
    """Forward and backward."""
    x = x.clone().requires_grad_()
    grad_out = torch.randn_like(x)
    return lambda: torch.autograd.grad(transform(x), x, grad_out)


def run(setup: Setup) -> Finding:
    found: dict[str, list[Covariance]] = {name: [] for name in TRANSFORMS}
    errors = []
    for seed in setup.track(setup.seeds):
        x = activations(setup.data, seed, setup.steps(STEPS))
        for name, transform in TRANSFORMS.items():
            found[name].append(Covariance.of(transform(x.double())))
        errors.append(identity_error(x))
    times: dict[int, dict[str, cpu_clock.Timing]] = {}
    for width in WIDTHS[:2] if setup.quick else WIDTHS:
        x = torch.randn(1024, width, generator=torch.Generator().manual_seed(0))
        calls = {name: step(TRANSFORMS[name], x) for name in (BNEXT, ZCA)}
        times[width] = cpu_clock.alternate(calls, 0.1 if setup.quick else 1.0)

    ratios = {w: t[ZCA].ms / t[BNEXT].ms for w, t in times.items()}
    before, ours, white = (
        statistics.mean(c.correlation for c in found[name]) for name in ("as they are", BNEXT, ZCA)
    )
    unit = max(abs(v - 1) for c in found[BNEXT] for v in (c.least, c.largest))
    confirmed = unit < 0.01 and white < 0.01 and max(errors) < 1e-5
    wide = max(ratios)
    sentence = (
        f"Standardising without decorrelating {verdict(confirmed)}: bnext makes every variance "
        f"one (to {unit:.0e}) and leaves the correlations at {ours:.2f} on average "
        f"({before:.2f} before); full whitening takes them to {white:.0e}, and "
        f"{ratios[wide]:.0f} times as long, forward and backward on 1024x{wide}; gamma = std "
        f"and beta = mean give the input back to {max(errors):.0e} of its largest value."
    )
    cells = [
        (
            name,
            spread([c.least for c in each], ".2g"),
            spread([c.largest for c in each], ".2g"),
            spread([c.correlation for c in each], ".2g"),
            spread([c.from_white for c in each], ".2g"),
        )
        for name, each in found.items()
    ]
    rows = [
        {
            "kind": "covariance", "transform": name, "seed": seed, "width": WIDTH,
            "least_variance": f"{c.least:.6g}", "largest_variance": f"{c.largest:.6g}",
            "mean_correlation": f"{c.correlation:.6g}", "from_identity": f"{c.from_white:.6g}",
            "identity_error": f"{error:.3g}" if name == BNEXT else "", "median_ms": "",
        }
        for name, each in found.items()
        for seed, c, error in zip(setup.seeds, each, errors, strict=True)
    ]  # fmt: skip
    rows += [
        dict.fromkeys(rows[0], "")
        | {"kind": "time", "transform": name, "width": width, "median_ms": f"{timing.ms:.4f}"}
        for width, by_name in times.items()
        for name, timing in by_name.items()
    ]
    note = (
        "Decorrelation, standardisation and colouring, in float64, of what the second hidden "
        f"layer's batch norm is given ({WIDTH} features, all training images). Time ratios, "
        "forward and backward, 1024 rows: "
        + ", ".join(f"{r:.0f} at {w} features" for w, r in ratios.items())
        + "."
    )
    header = ["", "least variance", "largest", "mean |correlation|", "largest |cov - I|"]
    return Finding(sentence, header, cells, rows, _figure(found, times), [note])


def _figure(
    found: dict[str, list[Covariance]], times: dict[int, dict[str, cpu_clock.Timing]]
) -> Figure:
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3).flat
    for axis, (name, each) in zip(axes, found.items(), strict=False):
        matrix = each[0].matrix
        limit = matrix.abs().max().item()
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set_title(f"{name}: covariance", fontsize=9)
        figure.colorbar(image, ax=axis)
    for name in (BNEXT, ZCA):
        axes[5].loglog([*times], [t[name].ms for t in times.values()], "o-", label=name)
    axes[5].set(title="forward and backward, 1024 rows", xlabel="features", ylabel="ms")
    axes[5].set_xticks([*times], [*times])
    axes[5].minorticks_off()
    axes[5].legend(fontsize=8)
    return figure
