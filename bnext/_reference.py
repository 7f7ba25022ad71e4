"""What batch norm should give: the paper's formulas in float64, and how far off one may be."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["EPS", "MOMENTUM", "Mode", "Operands", "reference", "worst"]

MOMENTUM, EPS = 0.1, 1e-5


class Mode(NamedTuple):
    """Of a call."""

    training: bool
    residual: bool
    relu: bool

    def __str__(self) -> str:
        parts = ["train" if self.training else "eval"]
        return " + ".join([*parts, *["residual"] * self.residual, *["relu"] * self.relu])


class Operands(NamedTuple):
    """Of one call."""

    x: Tensor  # [N, C, *]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    residual: Tensor | None  # [N, C, *]
    grad_out: Tensor  # [N, C, *]
    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]
    num_batches_tracked: Tensor  # []

    @property
    def differentiable(self) -> list[Tensor]:
        """What gets a gradient."""
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]

    def with_own_stats(self) -> "Operands":
        """A copy whose running statistics a call may change."""
        return Operands(*self[:5], *(t.clone() for t in self[5:]))

    def to(self, device: torch.device | str) -> "Operands":
        """The same values on a device, without gradients."""
        return Operands._make(None if t is None else t.detach().to(device) for t in self)


def reference(t: Operands, mode: Mode, output: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The same in float64: value, and the sum of the absolute terms that it is made of.

    Algorithms 1 and 2 of Ioffe & Szegedy (2015) and the gradients of its section 3, simplified.
    Where a ReLU let values pass is taken from ``output``.
    """
    x, dims = t.x.double(), [0, *range(2, t.x.dim())]
    over = [1, -1] + [1] * (x.dim() - 2)
    weight, bias, running_mean, running_var = (
        p.double().view(over) for p in (t.weight, t.bias, t.running_mean, t.running_var)
    )
    count = x.numel() // x.shape[1]
    if mode.training:
        mean = x.mean(dims, keepdim=True)
        var = (x - mean).square().mean(dims, keepdim=True)
    else:
        mean, var = running_mean, running_var
    invstd = 1 / torch.sqrt(var + EPS)
    normalized = (x - mean) * invstd
    # A stored mean is off by a rounding or two: of the eight that `worst` allows, a quarter.
    normalized_terms = normalized.abs() + mean.abs() * invstd / 4
    y = normalized * weight + bias
    y_terms = normalized_terms * weight.abs() + bias.abs()
    dy = t.grad_out.double()
    if t.residual is not None:
        y, y_terms = y + t.residual.double(), y_terms + t.residual.double().abs()
    if mode.relu:
        y = y.clamp(min=0)
        dy = dy * (output > 0)
    grad_weight, grad_bias = (dy * normalized).sum(dims, True), dy.sum(dims, True)
    weight_terms = (dy.abs() * normalized_terms).sum(dims, True)
    bias_terms = dy.abs().sum(dims, True)
    dx, dx_terms = dy, dy.abs()
    if mode.training:
        dx = dx - (grad_bias + normalized * grad_weight) / count
        dx_terms = dx_terms + (bias_terms + normalized_terms * weight_terms) / count
    found = {
        "output": (y, y_terms),
        "grad_input": (dx * weight * invstd, dx_terms * weight.abs() * invstd),
        "grad_weight": (grad_weight.flatten(), weight_terms.flatten()),
        "grad_bias": (grad_bias.flatten(), bias_terms.flatten()),
        "grad_residual": (dy, dy.abs()),
        "running_mean": (running_mean, running_mean.abs()),
        "running_var": (running_var, running_var.abs()),
    }
    if mode.training:
        old = (1 - MOMENTUM) * running_mean
        terms = old.abs() + MOMENTUM * x.abs().mean(dims, True)
        found["running_mean"] = old + MOMENTUM * mean, terms
        unbiased = (1 - MOMENTUM) * running_var + MOMENTUM * var * count / (count - 1)
        found["running_var"] = unbiased, unbiased
    for name in ("running_mean", "running_var"):
        found[name] = found[name][0].flatten(), found[name][1].flatten()
    if t.residual is None:
        del found["grad_residual"]
    return found


def worst(actual: Tensor, value: Tensor, terms: Tensor) -> float:
    """The largest error of any channel, in units of what its roundings may add up to.

    That is 8 roundings of float32 (float64 for float64) of the terms, and one into the dtype of the
    result. Not a number counts as infinitely wrong.
    """
    info = torch.finfo(actual.dtype)
    compute_eps = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
    allowed = 8 * compute_eps * terms + info.eps / 2 * value.abs() + info.tiny * info.eps
    errors = (actual.double() - value).abs().nan_to_num(torch.inf)
    if errors.dim() > 1:
        errors, allowed = (e.transpose(0, 1).flatten(1).amax(1) for e in (errors, allowed))
    return float((errors / allowed).max())
