"""Batch normalisation in float64, from Ioffe & Szegedy (2015), and the suite's one error criterion.

Algorithm 1 is `forward` with batch statistics, Algorithm 2 `forward` with given ones plus
`updated_running_stats`, the gradients are the formulas of section 3. Nothing here calls a batch
norm of anybody's: every test measures against this file.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Unit of the arithmetic: sums and products are never narrower than float32.
_COMPUTE_EPS = {
    torch.float64: torch.finfo(torch.float64).eps,
    torch.float32: torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.float32).eps,
    torch.float16: torch.finfo(torch.float32).eps,
}


# A stored mean is off by a unit of rounding or two: the count of 8 would be too much.
MEAN_ROUNDING = 1 / 4


def reduced_dims(x: Tensor) -> list[int]:
    """All dimensions but the channel's."""
    return [d for d in range(x.dim()) if d != 1]


def per_channel(t: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...], to broadcast over x: [N, C, *]."""
    return t.double().reshape([1, -1] + [1] * (x.dim() - 2))


@dataclass(frozen=True)
class Forward:
    output: Tensor  # [N, C, *]
    pre: Tensor  # [N, C, *], before the activation
    mean: Tensor  # [C]
    var: Tensor  # [C], biased
    invstd: Tensor  # [C]
    magnitude: Tensor  # [N, C, *], the sum of the absolute terms that make up `pre`


@dataclass(frozen=True)
class Backward:
    input: Tensor  # [N, C, *]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    residual: Tensor  # [N, C, *]
    input_magnitude: Tensor  # [N, C, *], sums of absolute terms as above
    weight_magnitude: Tensor  # [C]
    bias_magnitude: Tensor  # [C]


def batch_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the batch; x: [N, C, *] -> [C], [C]."""
    x = x.double()
    dims = reduced_dims(x)
    mean = x.mean(dims)
    mean = mean + (x - per_channel(mean, x)).mean(dims)  # takes away the first mean's rounding
    return mean, (x - per_channel(mean, x)).square().mean(dims)


def forward(
    x: Tensor,  # [N, C, *]
    weight: Tensor | None = None,  # [C]
    bias: Tensor | None = None,  # [C]
    residual: Tensor | None = None,  # [N, C, *]
    stats: tuple[Tensor, Tensor] | None = None,  # mean, var: [C], [C]; None: the batch's
    eps: float = 1e-5,
    relu: bool = False,
) -> Forward:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)."""
    mean, var = batch_stats(x) if stats is None else (stats[0].double(), stats[1].double())
    invstd = 1 / torch.sqrt(var + eps)
    pre = (x.double() - per_channel(mean, x)) * per_channel(invstd, x)
    magnitude = pre.abs() + MEAN_ROUNDING * per_channel(mean.abs() * invstd, x)
    if weight is not None:
        pre = pre * per_channel(weight, x)
        magnitude = magnitude * per_channel(weight, x).abs()
    if bias is not None:
        pre = pre + per_channel(bias, x)
        magnitude = magnitude + per_channel(bias, x).abs()
    if residual is not None:
        pre = pre + residual.double()
        magnitude = magnitude + residual.double().abs()
    # Not clamp(min=0): a NaN stays.
    output = torch.where(pre <= 0, torch.zeros_like(pre), pre) if relu else pre
    return Forward(output, pre, mean, var, invstd, magnitude)


def backward(
    grad_out: Tensor,  # [N, C, *]
    x: Tensor,  # [N, C, *]
    weight: Tensor | None = None,  # [C]
    stats: tuple[Tensor, Tensor] | None = None,  # frozen mean, var; None: the batch's
    eps: float = 1e-5,
    active: Tensor | None = None,  # [N, C, *] bool: where the ReLU let the value pass
) -> Backward:
    """Section 3 of the paper, line by line; with given statistics only the first term stays."""
    frozen = stats is not None
    mean, var = stats if stats is not None else batch_stats(x)
    dims = reduced_dims(x)
    m = x.numel() // x.shape[1]
    dy = grad_out.double()
    if active is not None:
        dy = torch.where(active, dy, torch.zeros_like(dy))
    centred = x.double() - per_channel(mean, x)
    std = torch.sqrt(per_channel(var, x) + eps)
    xhat = centred / std
    dxhat = dy if weight is None else dy * per_channel(weight, x)
    dx = dxhat / std
    magnitude = dx.abs()
    xhat_magnitude = xhat.abs() + MEAN_ROUNDING * per_channel(mean, x).abs() / std
    if not frozen:
        dvar = per_channel((dxhat * centred).sum(dims), x) * -0.5 / std**3
        dmean = per_channel((-dxhat / std).sum(dims), x)
        dmean = dmean + dvar * per_channel((-2 * centred).sum(dims), x) / m
        dx = dx + dvar * 2 * centred / m + dmean / m
        abs_dvar = per_channel((dxhat.abs() * xhat_magnitude).sum(dims), x) * 0.5 / std**2
        abs_dmean = per_channel((dxhat / std).abs().sum(dims), x)
        magnitude = magnitude + abs_dvar * 2 * xhat_magnitude * std / m + abs_dmean / m
    return Backward(
        input=dx,
        weight=(dy * xhat).sum(dims),
        bias=dy.sum(dims),
        residual=dy,
        input_magnitude=magnitude,
        weight_magnitude=(dy.abs() * xhat_magnitude).sum(dims),
        bias_magnitude=dy.abs().sum(dims),
    )


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


@dataclass(frozen=True)
class Exact:
    """Training's results in extended precision, each with the sum of absolute terms behind it."""

    mean: tuple[np.ndarray, np.ndarray]  # [C], as var, weight, bias
    var: tuple[np.ndarray, np.ndarray]  # unbiased
    output: tuple[np.ndarray, np.ndarray]  # [N, C, *], as input
    input: tuple[np.ndarray, np.ndarray]
    weight: tuple[np.ndarray, np.ndarray]
    bias: tuple[np.ndarray, np.ndarray]


def exact(
    x: Tensor,  # [N, C, *]
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
    grad_out: Tensor,  # [N, C, *]
    eps: float = 1e-5,
) -> Exact:
    """Forward and backward in numpy's longdouble, for errors in units of the last place.

    Values are taken about the first of their channel, so that a far mean costs nothing, and
    magnitudes have no term for the rounding of the mean.
    """
    dims = tuple(reduced_dims(x))
    over = [1, -1] + [1] * (x.dim() - 2)
    wide, dy = (t.double().numpy().astype(np.longdouble) for t in (x, grad_out))
    w, b = (t.double().numpy().astype(np.longdouble).reshape(over) for t in (weight, bias))
    m = x.numel() // x.shape[1]
    first = wide[0].reshape(x.shape[1], -1)[:, 0].reshape(over)

    def total(t: np.ndarray) -> np.ndarray:
        return t.sum(dims, keepdims=True)

    d = wide - first
    mean = total(d) / m
    centred = d - mean
    var = total(centred**2) / m
    invstd = 1 / np.sqrt(var + eps)
    h = centred * invstd
    mean_dy, mean_dy_h = total(dy) / m, total(dy * h) / m
    abs_dy, abs_dy_h = total(abs(dy)), total(abs(dy * h))
    return Exact(
        mean=((first + mean).ravel(), (abs(first + mean) + np.sqrt(var)).ravel()),
        var=((var * m / (m - 1)).ravel(), (var * m / (m - 1)).ravel()),
        output=(h * w + b, abs(h * w) + abs(b)),
        input=(
            (dy - mean_dy - h * mean_dy_h) * w * invstd,
            (abs(dy) + abs_dy / m + abs(h) * abs_dy_h / m) * abs(w) * invstd,
        ),
        weight=((mean_dy_h * m).ravel(), abs_dy_h.ravel()),
        bias=((mean_dy * m).ravel(), abs_dy.ravel()),
    )


def units(actual: Tensor, expected: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """[C]: the largest error of each channel, in units of rounding of its largest magnitude.

    A unit is 2^-24, for float64 2^-53. What 16-bit storage adds does not count. A value beyond the
    dtype must be infinite; NaN is an infinite error.
    """
    info = torch.finfo(actual.dtype)
    value, magnitude = expected
    got = actual.detach().double().numpy()
    error = abs(got - value)
    beyond = abs(value) > info.max
    error[beyond] = np.where(got == np.copysign(math.inf, value), 0, math.inf)[beyond]
    if info.bits == 16:
        error = np.maximum(error - info.eps / 2 * np.maximum(abs(value), info.smallest_normal), 0)
    if actual.dim() > 1:
        dims = tuple(reduced_dims(actual))
        error, magnitude = error.max(dims), magnitude.max(dims)
    unit = 2.0**-53 if actual.dtype is torch.float64 else 2.0**-24
    relative = np.divide(error, unit * magnitude, out=error.copy(), where=error != 0)
    return torch.from_numpy(relative.astype(np.float64)).nan_to_num(math.inf)


def assert_as_good_as_torch(
    actual: Tensor,  # [N, C, *] or [C]
    torchs: Tensor | None,  # PyTorch's result in the same dtype; None: only the bound counts
    expected: Tensor,  # the float64 reference
    magnitude: Tensor,  # the sum of absolute terms behind `expected`
    what: str = "",
    torch_allowance: float = 2**-5,
) -> None:
    """Per channel: |actual - expected| <= 2 |torchs - expected| + bound, the largest of each.

    PyTorch's error counts up to `torch_allowance` of the magnitude: where it is plainly wrong, it
    is no excuse.

    The bound is what no implementation can avoid. A value that is a sum of terms t_i, each made by
    a few roundings in arithmetic of unit eps_c, is off by up to some eps_c * sum |t_i| (8 here: a
    subtraction, three products, two sums, one more for each of the two statistics); storing it in
    the output's dtype adds eps_o / 2 * |value|, or half the smallest subnormal. The mean is such a
    sum as well, whose error all of its channel shares (MEAN_ROUNDING). Errors are compared
    per channel, so that one channel of large values does not hide another's.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
    eps_compute = _COMPUTE_EPS[actual.dtype]
    info = torch.finfo(actual.dtype)
    expected = expected.to(actual.device)
    # What the dtype cannot hold is an infinity of the right sign, in the reference as well.
    stored = expected.to(actual.dtype)
    finite = stored.isfinite()
    torch.testing.assert_close(
        actual[~finite], stored[~finite], rtol=0, atol=0, equal_nan=True,
        msg=lambda m: f"{what}: {m}",
    )  # fmt: skip
    value = actual.double()
    magnitude = magnitude.to(actual.device).double().nan_to_num(0.0, 0.0, 0.0)
    half_subnormal = info.smallest_normal * info.eps / 2
    bound = 8 * eps_compute * magnitude + info.eps / 2 * expected.abs() + half_subnormal
    error = (value - expected).abs()
    assert not error[finite].isnan().any(), f"{what}: NaN where the reference is finite"
    allowed = _channel_max(bound, finite)
    if torchs is not None:
        torch_error = (torchs.double().to(actual.device) - expected).abs().nan_to_num(0.0, 0.0)
        ceiling = torch_allowance * _channel_max(magnitude, finite)
        allowed = allowed + 2 * torch.minimum(_channel_max(torch_error, finite), ceiling)
    excess = _channel_max(error, finite) - allowed
    if excess.numel() and bool((excess > 0).any()):
        c = int(excess.argmax())
        raise AssertionError(
            f"{what}: channel {c}: error {_channel_max(error, finite)[c]:.3e}, allowed "
            f"{allowed[c]:.3e} (bound alone {_channel_max(bound, finite)[c]:.3e})"
        )


def _channel_max(t: Tensor, where: Tensor) -> Tensor:
    """[N, C, *] -> [C], [C] -> [C]: the largest element of each channel among `where`."""
    t = torch.where(where, t, torch.zeros_like(t))
    if t.dim() == 1 or t.numel() == 0:
        return t.reshape(-1) if t.dim() == 1 else t.new_zeros(t.shape[1])
    return t.amax(reduced_dims(t))
