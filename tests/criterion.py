"""The suite's one error criterion, and training in extended precision for the sums' tests."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnext import reference
from bnext.reference import bound, reduced_dims
from tests.cases import Case


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
    expected: Tensor,  # the float64 reference's value
    magnitude: Tensor,  # the sum of absolute terms behind it
    what: str = "",
    torch_allowance: float = 2**-5,
) -> None:
    """Per channel: |actual - expected| <= 2 |torchs - expected| + bound, the largest of each.

    PyTorch's error counts up to `torch_allowance` of the magnitude: where it is plainly wrong, it
    is no excuse.

    The bound is `bnext.reference`'s. Errors are compared per channel, so that one channel of large
    values does not hide another's.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape} != {expected.shape}"
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
    unavoidable = _channel_max(bound(expected, magnitude, actual.dtype), finite)
    error = (value - expected).abs()
    assert not error[finite].isnan().any(), f"{what}: NaN where the reference is finite"
    allowed = unavoidable
    if torchs is not None:
        torch_error = (torchs.double().to(actual.device) - expected).abs().nan_to_num(0.0, 0.0)
        ceiling = torch_allowance * _channel_max(magnitude, finite)
        allowed = allowed + 2 * torch.minimum(_channel_max(torch_error, finite), ceiling)
    excess = _channel_max(error, finite) - allowed
    if excess.numel() and bool((excess > 0).any()):
        c = int(excess.argmax())
        raise AssertionError(
            f"{what}: channel {c}: error {_channel_max(error, finite)[c]:.3e}, allowed "
            f"{allowed[c]:.3e} (bound alone {unavoidable[c]:.3e})"
        )


def assert_second_derivatives(
    case: Case,
    training: bool,
    active: Tensor | None,  # [N, C, *] bool: where the ReLU passed; None: there is none
    by: tuple[Tensor, ...],  # dx, dweight, dbias (and dresidual) are multiplied by these
    ours: tuple[Tensor | None, ...],  # the products' gradients for x, weight and grad_out
) -> None:
    """Errors are within some units of rounding of the terms that the results are made of."""
    leaves = [case.x, case.weight, case.grad_out]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    stats = None if training else tuple(s.double() for s in case.stats)
    first = reference.backward(wide[2], wide[0], wide[1], stats, active=active)
    outputs = (first.input, first.weight, first.bias, first.residual)[: len(by)]
    expected = torch.autograd.grad(outputs, wide, [b.double() for b in by], allow_unused=True)

    mean, var = reference.batch_stats(case.x) if stats is None else stats
    invstd = (var + 1e-5).rsqrt()
    normalized = (case.x.double() - reference.per_channel(mean, case.x)) * reference.per_channel(
        invstd, case.x
    )
    dims = reduced_dims(case.x)
    # Per channel, the largest of each. A rounded mean adds nothing: what it lost is given back.
    h = normalized.abs().amax(dims)
    u, g = (t.double().abs().amax(dims) for t in (by[0], case.grad_out))
    v = by[3].double().abs().amax(dims) if len(by) > 3 else 0
    ggw, ggb = by[1].double().abs(), by[2].double().abs()
    a = case.weight.double().abs() * invstd
    m = case.x.numel() // case.x.shape[1]
    terms = {
        "input": 4 * invstd * g * (ggw * (1 + h**2) + 3 * a * u * (1 + h**2)),
        "weight": 3 * invstd * m * u * g * (1 + h**2),
        "grad_out": a * u * (2 + h**2) + ggw * h + ggb + v,
    }
    for (what, scale), actual, wanted in zip(terms.items(), ours, expected, strict=True):
        value = torch.zeros_like(wanted) if actual is None else actual.double()
        error = (value - wanted).abs()
        eps, stored = torch.finfo(torch.float32).eps, torch.finfo(case.x.dtype).eps
        if what == "weight":
            stored = torch.finfo(case.weight.dtype).eps
        if case.x.dtype is torch.float64:
            eps = stored = torch.finfo(torch.float64).eps
        if error.dim() > 1:
            error, wanted = error.amax(dims), wanted.abs().amax(dims)
        allowed = 8 * eps * scale + stored * wanted.abs() + torch.finfo(case.x.dtype).tiny
        assert (error <= allowed).all(), f"{what}: {error} > {allowed}"


def _channel_max(t: Tensor, where: Tensor) -> Tensor:
    """[N, C, *] -> [C], [C] -> [C]: the largest element of each channel among `where`."""
    t = torch.where(where, t, torch.zeros_like(t))
    if t.dim() == 1 or t.numel() == 0:
        return t.reshape(-1) if t.dim() == 1 else t.new_zeros(t.shape[1])
    return t.amax(reduced_dims(t))
