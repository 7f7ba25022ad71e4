"""The formulas of forward and backward, beside the code that computes them, and their check."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

import bnext
from benchmarks.claims.data import Data
from benchmarks.claims.finding import Finding, Setup, verdict
from bnext import reference

STATEMENT = "The formulas of forward and backward, and the code that computes them"
BATCH, FEATURES, EPS, MOMENTUM = 12, 5, 1e-5, 0.1
STEP = 1e-5  # of the finite differences, whose error is its square and 1e-16 / STEP
TOLERANCE = 1e-7  # of a derivative, against them


class Formula(NamedTuple):
    name: str
    text: str
    function: Callable[..., object]  # of bnext/reference.py
    code: str  # a part of the line that computes it

    @property
    def line(self) -> str:
        lines = inspect.getsource(self.function).splitlines()
        (line,) = (line.strip() for line in lines if self.code in line)
        return line


FORMULAS = (
    Formula("mean", "μ = Σ xᵢ / m", reference.batch_stats, "mean = x.mean("),
    Formula("variance", "σ² = Σ (xᵢ − μ)² / m", reference.batch_stats, ".square().mean("),
    Formula("inverse deviation", "s = 1 / √(σ² + ε)", reference.forward, "invstd = "),
    Formula("normalised", "x̂ᵢ = (xᵢ − μ) s", reference.forward, "pre = (x.double()"),
    Formula("scaled", "γ x̂ᵢ", reference.forward, "pre = pre * "),
    Formula("output", "yᵢ = γ x̂ᵢ + β", reference.forward, "pre + term"),
    Formula(
        "gradient of x",
        "∂l/∂xᵢ = γ s (dyᵢ − Σ dyⱼ / m − x̂ᵢ Σ dyⱼ x̂ⱼ / m)",
        reference.backward, "dx = dy + sign",
    ),
    Formula(
        "gradients of γ, β", "∂l/∂γ = Σ dyᵢ x̂ᵢ,  ∂l/∂β = Σ dyᵢ",
        reference.backward, "(dy * xhat).sum(dims), dy.sum(dims)",
    ),
    Formula(
        "running mean", "E[x] ← (1 − f) E[x] + f μ",
        reference.updated_running_stats, "running_mean.double() +",
    ),
    Formula(
        "running variance", "Var[x] ← (1 − f) Var[x] + f σ² m / (m − 1)",
        reference.updated_running_stats, "running_var.double() +",
    ),
)  # fmt: skip


def operands(data: Data, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, of real images through random weights, gamma, beta and dy, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    some = torch.randperm(len(data.images), generator=generator)[:BATCH]
    x = data.images[some].flatten(1).double()
    x = x @ random(x.shape[1], FEATURES) / x.shape[1] ** 0.5
    return x, random(FEATURES), random(FEATURES), random(BATCH, FEATURES)


def errors(data: Data, seed: int) -> dict[str, dict[str, float]]:
    """Of bnext's op, relative to the largest value: by what it is compared with, and quantity."""
    x, gamma, beta, dy = operands(data, seed)
    running = torch.zeros(FEATURES).double(), torch.ones(FEATURES).double()
    y = reference.forward(x, gamma, beta, eps=EPS).output
    d = reference.backward(dy, x, gamma, eps=EPS)
    exact = {"y": y, "dx": d.input, "dγ": d.weight, "dβ": d.bias}
    statistics = reference.updated_running_stats(x, *running, MOMENTUM)
    exact |= dict(zip(("running mean", "running variance"), statistics, strict=True))
    found = {}
    for dtype in (torch.float64, torch.float32):
        mine = [t.to(dtype).requires_grad_() for t in (x, gamma, beta)]
        buffers = [t.to(dtype, copy=True) for t in running]
        output = bnext.functional.batch_norm(
            mine[0], *buffers, *mine[1:], training=True, momentum=MOMENTUM, eps=EPS
        )
        gradients = torch.autograd.grad(output, mine, dy.to(dtype))
        results = dict(zip(exact, (output, *gradients, *buffers), strict=True))
        name = f"formulas, {str(dtype).removeprefix('torch.')}"
        found[name] = {key: _error(results[key], exact[key]) for key in exact}
        if dtype is torch.float64:
            numeric = [_differences(mine, i, dy) for i in range(3)]
            names = ("dx", "dγ", "dβ")
            found["finite differences, float64"] = {
                name: _error(gradient, difference)
                for name, gradient, difference in zip(names, gradients, numeric, strict=True)
            }
    return found


def _error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


def _loss(x: Tensor, gamma: Tensor, beta: Tensor, dy: Tensor) -> Tensor:
    return (bnext.functional.batch_norm(x, None, None, gamma, beta, True, eps=EPS) * dy).sum()


def _differences(tensors: list[Tensor], which: int, dy: Tensor) -> Tensor:
    """Central differences of the loss whose gradient for the output is dy."""
    moved = [t.detach().clone() for t in tensors]
    values = moved[which].view(-1)
    result = torch.empty_like(values)
    for i, value in enumerate(values.tolist()):
        values[i] = value + STEP
        above = _loss(*moved, dy)
        values[i] = value - STEP
        result[i] = (above - _loss(*moved, dy)) / (2 * STEP)
        values[i] = value
    return result.view_as(moved[which])


def gradchecks(data: Data, seed: int) -> bool:
    """Whether torch's own checks of the first and the second derivative pass."""
    *inputs, _ = operands(data, seed)

    def function(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return bnext.functional.batch_norm(x, None, None, gamma, beta, True, eps=EPS)

    tensors = [t.requires_grad_() for t in inputs]
    check, check_twice = torch.autograd.gradcheck, torch.autograd.gradgradcheck
    first = check(function, tensors, raise_exception=False)
    return first and check_twice(function, tensors, raise_exception=False)


def run(setup: Setup) -> Finding:
    each = [errors(setup.data, seed) for seed in setup.track(setup.seeds)]
    passed = [gradchecks(setup.data, seed) for seed in setup.seeds]
    worst = {kind: max(v for e in each for v in e[kind].values()) for kind in each[0]}
    numeric = worst["finite differences, float64"]
    right = all(passed) and numeric < TOLERANCE and worst["formulas, float64"] < 1e-12
    sentence = (
        f"That bnext computes the paper's formulas {verdict(right)}: to "
        f"{worst['formulas, float64']:.0e} of the largest value in float64, "
        f"{worst['formulas, float32']:.0e} in float32; its gradients are those of "
        f"finite differences to {numeric:.0e}, and torch's gradcheck and gradgradcheck pass for "
        f"{sum(passed)} of {len(passed)} seeds."
    )
    cells = [[f.name, f.text, f"`{f.line}`"] for f in FORMULAS]
    rows = [
        {"compared_with": kind, "quantity": name, "seed": seed, "relative_error": f"{value:.3e}"}
        for seed, by_kind in zip(setup.seeds, each, strict=True)
        for kind, by_name in by_kind.items()
        for name, value in by_name.items()
    ]
    note = (
        "The code is bnext/reference.py's, in float64, which tests and benchmarks compare with; "
        "the kernels' is csrc/formulas.h. pre is y before an activation, dy the gradient of y, f "
        "the momentum; backward multiplies its dx by γ s where it returns it."
    )
    failures = [] if right else ["a gradient of bnext is wrong"]
    return Finding(sentence, ["", "formula", "code"], cells, rows, _figure(each), [note], failures)


def _figure(each: list[dict[str, dict[str, float]]]) -> Figure:
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    text, axis = figure.subplots(1, 2, width_ratios=[3, 2])
    text.axis("off")
    for i, formula in enumerate(FORMULAS):
        top = 1 - i / len(FORMULAS)
        text.text(0, top, formula.text, fontsize=12, va="top")
        text.text(0, top - 0.055, formula.line, fontsize=7, family="monospace", va="top")
    for kind in each[0]:
        names = [*each[0][kind]]
        worst = [max(max(e[kind][name] for e in each), 1e-18) for name in names]
        axis.semilogy(names, worst, "o", label=kind)
    axis.tick_params(axis="x", rotation=30)
    axis.set(title="largest error over the seeds, relative to the largest value")
    axis.legend(fontsize=8)
    return figure
