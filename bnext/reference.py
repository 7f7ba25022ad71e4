"""Batch normalisation in float64, from Ioffe & Szegedy (2015), and the bound on a result's error.

Algorithm 1 is `forward` with batch statistics, Algorithm 2 is `forward` with given ones plus
`updated_running_stats`, and the gradients are the formulas of section 3. Nothing here calls a batch
norm; the tests, `bnext.verify` and the benchmarks compare with this file. A magnitude is the sum of
the absolute values of the terms that make up a value.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# f(z, param) by name, from its definition. A NaN passes all of them.
ACTIVATIONS: dict[str | None, Callable[[Tensor, float], Tensor]] = {
    None: lambda z, _: z,
    "relu": lambda z, _: torch.where(z <= 0, 0.0, z),
    "relu6": lambda z, _: torch.where(z <= 0, 0.0, torch.where(z >= 6, 6.0, z)),
    "leaky_relu": lambda z, slope: torch.where(z <= 0, slope * z, z),
    "silu": lambda z, _: z / (1 + torch.exp(-z)),
    "hardswish": lambda z, _: z * torch.where(z <= -3, 0.0, torch.where(z >= 3, 6.0, z + 3)) / 6,
    "gelu": lambda z, _: z * torch.erfc(-z / math.sqrt(2)) / 2,
    "gelu_tanh": lambda z, _: (
        z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
    ),
    "elu": lambda z, alpha: torch.where(z <= 0, alpha * torch.expm1(z.clamp(max=0)), z),
    "tanh": lambda z, _: torch.sinh(z.clamp(-20, 20)) / torch.cosh(z.clamp(-20, 20)),
    "sigmoid": lambda z, _: 1 / (1 + torch.exp(-z)),
}

# A stored mean is off by a unit of rounding or two, fewer than the 8 that `bound` counts.
MEAN_ROUNDING = 1 / 4


class Operands(NamedTuple):
    """The tensors of one call."""

    x: Tensor  # [N, C, *]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    residual: Tensor | None  # [N, C, *]
    grad_out: Tensor  # [N, C, *]
    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]
    num_batches_tracked: Tensor  # []


class Forward(NamedTuple):
    """What `forward` returns."""

    output: Tensor  # [N, C, *]
    pre: Tensor  # [N, C, *], before the activation
    mean: Tensor  # [C]
    invstd: Tensor  # [C]
    magnitude: Tensor  # [N, C, *], of `pre`


class Backward(NamedTuple):
    """The gradients for each argument of `forward`."""

    input: Tensor  # [N, C, *]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    residual: Tensor  # [N, C, *]
    input_magnitude: Tensor  # [N, C, *]
    weight_magnitude: Tensor  # [C]
    bias_magnitude: Tensor  # [C]


def reduced_dims(x: Tensor) -> list[int]:
    """All dimensions but the channel's."""
    return [d for d in range(x.dim()) if d != 1]


def per_channel(t: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...], to broadcast over x: [N, C, *]."""
    return t.double().reshape([1, -1] + [1] * (x.dim() - 2))


def batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the batch; x: [N, C, *] -> [C], [C]."""
    x = x.double()
    dims = reduced_dims(x)
    mean = x.mean(dims)
    mean = mean + (x - per_channel(mean, x)).mean(dims)  # removes the first mean's rounding
    return mean, (x - per_channel(mean, x)).square().mean(dims)


def forward(
    x: Tensor,  # [N, C, *]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    residual: Tensor | None = None,  # [N, C, *]
    stats: tuple[Tensor, Tensor] | None = None,  # mean, var: [C], [C]; None: the batch's
    eps: float = 1e-5,
    act: str | None = None,
    act_param: float = 0.0,
) -> Forward:
    """The output is act((x - mean) / sqrt(var + eps) * weight + bias + residual)."""
    mean, var = batch_stats(x) if stats is None else (stats[0].double(), stats[1].double())
    invstd = 1 / torch.sqrt(var + eps)
    pre = (x.double() - per_channel(mean, x)) * per_channel(invstd, x)
    magnitude = pre.abs() + MEAN_ROUNDING * per_channel(mean.abs() * invstd, x)
    if weight is not None:
        pre = pre * per_channel(weight, x)
        magnitude = magnitude * per_channel(weight, x).abs()
    for term in (None if bias is None else per_channel(bias, x), residual):
        if term is not None:
            pre, magnitude = pre + term.double(), magnitude + term.double().abs()
    return Forward(ACTIVATIONS[act](pre, act_param), pre, mean, invstd, magnitude)


def backward(
    grad_out: Tensor,  # [N, C, *]
    x: Tensor,  # [N, C, *]
    weight: Tensor | None = None,  # [C]
    stats: tuple[Tensor, Tensor] | None = None,  # frozen mean, var; None: the batch's
    eps: float = 1e-5,
    active: Tensor | None = None,  # [N, C, *] bool: where the ReLU passed
) -> Backward:
    """Section 3 of the paper; with given statistics only the first term of dx remains."""
    mean, var = batch_stats(x) if stats is None else stats
    dims = reduced_dims(x)
    dy = grad_out.double()
    if active is not None:
        dy = torch.where(active, dy, torch.zeros_like(dy))
    invstd = 1 / torch.sqrt(per_channel(var, x) + eps)
    xhat = (x.double() - per_channel(mean, x)) * invstd
    xhat_magnitude = xhat.abs() + MEAN_ROUNDING * per_channel(mean, x).abs() * invstd
    scale = invstd if weight is None else invstd * per_channel(weight, x)

    def gradients(dy: Tensor, xhat: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
        dx = dy
        if stats is None:
            dx = dy + sign * (dy.mean(dims, True) + xhat * (dy * xhat).mean(dims, True))
        return dx * (scale if sign < 0 else scale.abs()), (dy * xhat).sum(dims), dy.sum(dims)

    return Backward(*gradients(dy, xhat, -1), dy, *gradients(dy.abs(), xhat_magnitude, 1))


def updated_running_stats(
    x: Tensor, running_mean: Tensor, running_var: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """The exponential average; the variance is the unbiased m/(m-1) one of Algorithm 2, step 10."""
    mean, var = batch_stats(x)
    m = x.numel() // x.shape[1]
    return (
        (1 - factor) * running_mean.double() + factor * mean,
        (1 - factor) * running_var.double() + factor * var * m / (m - 1),
    )


def results(
    t: Operands, training: bool, momentum: float, eps: float, active: Tensor | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Value and magnitude of a step's results, by name; `active` is None if there is no ReLU."""
    stats = None if training else (t.running_mean, t.running_var)
    act = None if active is None else "relu"
    y = forward(t.x, t.weight, t.bias, t.residual, stats, eps, act)
    d = backward(t.grad_out, t.x, t.weight, stats, eps, active)
    mean, var = t.running_mean.double(), t.running_var.double()
    mean_magnitude = mean.abs()
    if training:
        batch_magnitude = t.x.double().abs().mean(reduced_dims(t.x))
        mean_magnitude = (1 - momentum) * mean_magnitude + momentum * batch_magnitude
        mean, var = updated_running_stats(t.x, mean, var, momentum)
    return {
        "output": (y.output, y.magnitude),
        "grad_input": (d.input, d.input_magnitude),
        "grad_weight": (d.weight, d.weight_magnitude),
        "grad_bias": (d.bias, d.bias_magnitude),
        **({} if t.residual is None else {"grad_residual": (d.residual, d.residual.abs())}),
        "running_mean": (mean, mean_magnitude),
        "running_var": (var, var),
    }


def bound(value: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The error that no implementation with results in `dtype` can avoid, element by element.

    The arithmetic is in float32 (float64 for float64), and eps_c is its unit. A sum of terms that
    take a few roundings each is off by up to some eps_c times the magnitude: 8 here, for a
    subtraction, three products, two sums, and one for each of the two statistics. Storing it adds
    half a unit of the value in its dtype, or half the smallest subnormal.
    """
    info = torch.finfo(dtype)
    compute_eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    half_subnormal = info.smallest_normal * info.eps / 2
    return 8 * compute_eps * magnitude + info.eps / 2 * value.abs() + half_subnormal
