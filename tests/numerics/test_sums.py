"""How exact long sums are: of values of one sign, about an outlier, far from zero, near overflow.

Errors are in units of rounding (`criterion.units`); no result depends on PyTorch's own error, which
changes with its threads and vectors.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import criterion
from bnext.functional import batch_norm, batch_norm_act
from cases import dtype_id

CF, CL = torch.contiguous_format, torch.channels_last
SHAPES = {
    "256x8": ((256, 8), CF),
    "4097x8": ((4097, 8), CF),
    "37x16x7": ((37, 16, 7), CF),
    "64x16x7x7": ((64, 16, 7, 7), CF),
    "4x8x64x64": ((4, 8, 64, 64), CF),
    "4x8x64x64-cl": ((4, 8, 64, 64), CL),
    "32x64x14x14-cl": ((32, 64, 14, 14), CL),
}
Values = Callable[[Tensor], Tensor]


def scales(t: Tensor) -> Tensor:
    """[1, C, 1, ...]: another mantissa for every channel."""
    c = torch.arange(t.shape[1], dtype=torch.float64)
    return (1.1 + 0.9 * c / t.shape[1]).view(1, -1, *[1] * (t.dim() - 2))


def filled(values: Values) -> Values:
    return lambda t: torch.empty_like(t).copy_(values(t))


def of_loss(loss: Values) -> Values:
    def gradient(y: Tensor) -> Tensor:
        leaf = y.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    return gradient


# name -> grad_out of an output
GRADIENTS: dict[str, Values] = {
    "normal": torch.randn_like,
    "positive": torch.rand_like,
    "constant": filled(scales),
    "expanded": lambda y: torch.tensor(1.3).to(y.dtype).expand(y.shape),
    "expanded channels": lambda y: scales(y).to(y.dtype).expand(y.shape),
    "y.mean()": of_loss(torch.mean),
    "y.sum()": of_loss(torch.sum),
    "two values": filled(lambda y: scales(y) * torch.where(torch.rand_like(y) < 0.5, 1, 1.7)),
    "masked": filled(lambda y: scales(y) * (torch.rand_like(y) < 0.5)),
    "relu": filled(scales),
}


def outlier(value: float, row: bool = False) -> Values:
    """Normal values after a first one, or a first sample, of another size."""

    def values(t: Tensor) -> Tensor:
        x = torch.randn_like(t)
        x[0 if row else (0, slice(None), *[0] * (t.dim() - 2))] = value
        return x

    return values


# name -> input like a tensor
INPUTS: dict[str, Values] = {
    "normal": torch.randn_like,
    "first value 6": outlier(6),
    "first value -8": outlier(-8),
    "first sample 6": outlier(6, row=True),
    "first sample +10": lambda t: torch.randn_like(t) + 10 * (torch.arange(len(t)) == 0).view(
        -1, *[1] * (t.dim() - 1)
    ),
    "relu": lambda t: torch.relu(torch.randn_like(t) - 1),
    "two values": lambda t: torch.where(torch.rand_like(t) < 0.5, 1, 3),
    "sparse": lambda t: torch.rand_like(t) < 0.01,
}  # fmt: skip


FEW = ["256x8", "64x16x7x7", "4x8x64x64-cl"]


def place(values: Tensor, shape: str, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).contiguous(memory_format=SHAPES[shape][1])


def params(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else dtype


def assert_within(bounds: dict[str, tuple[Tensor, float]]) -> None:
    """name -> (errors per channel, bound), in units."""
    errors = {name: float(error.max()) for name, (error, _) in bounds.items()}
    assert all(errors[name] <= bound for name, (_, bound) in bounds.items()), errors


def check_backward(kind: str, shape: str, dtype: torch.dtype) -> None:
    x = place(torch.randn(SHAPES[shape][0], dtype=torch.float64), shape, dtype).requires_grad_()
    weight = (torch.rand(x.shape[1]) + 0.5).to(params(dtype)).requires_grad_()
    bias = torch.randn(x.shape[1]).to(params(dtype)).requires_grad_()
    act = "relu" if kind == "relu" else None
    y = batch_norm_act(x, None, None, weight, bias, training=True, act=act)
    grad_out = GRADIENTS[kind](y.detach())
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), grad_out)
    if act:
        grad_out = grad_out * (y > 0)
    expected = criterion.exact(x.detach(), weight.detach(), bias.detach(), grad_out)
    assert_within(
        {
            "dx": (criterion.units(dx, expected.input), 4),
            "dweight": (criterion.units(dweight, expected.weight), 4),
            "dbias": (criterion.units(dbias, expected.bias), 4),
        }
    )


def check_forward(kind: str, shape: str, dtype: torch.dtype) -> None:
    values = INPUTS[kind](torch.empty(SHAPES[shape][0], dtype=torch.float64))
    x = place(values * scales(values), shape, dtype)
    mean = torch.zeros(x.shape[1], dtype=params(dtype))
    var = torch.zeros_like(mean)
    y = batch_norm(x, mean, var, training=True, momentum=1.0)
    expected = criterion.exact(x, torch.ones_like(mean), torch.zeros_like(mean), x)
    assert_within(
        {
            "mean": (criterion.units(mean, expected.mean), 4),
            "var": (criterion.units(var, expected.var), 6),  # twice as often rounded
            "y": (criterion.units(y, expected.output), 4),
        }
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_in_float32(kind, shape) -> None:
    check_backward(kind, shape, torch.float32)


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize(
    "kind", ["normal", "positive", "constant", "two values", "y.mean()", "masked"]
)
def test_gradients_in_float64(kind, shape) -> None:
    check_backward(kind, shape, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("kind", ["normal", "constant", "two values", "masked"])
def test_gradients_in_16_bits(kind, shape, dtype) -> None:
    check_backward(kind, shape, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", INPUTS)
def test_statistics_in_float32(kind, shape) -> None:
    check_forward(kind, shape, torch.float32)


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize(
    "kind", ["normal", "first value -8", "first sample 6", "two values", "sparse"]
)
def test_statistics_in_float64(kind, shape) -> None:
    check_forward(kind, shape, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize(
    "kind", ["normal", "first value -8", "first sample 6", "two values", "sparse"]
)
def test_statistics_in_16_bits(kind, shape, dtype) -> None:
    check_forward(kind, shape, dtype)


# name -> grad_out whose sums leave float32 on the way: for good, and in between
OVERFLOWING: dict[str, Values] = {
    "constant": lambda y: torch.full_like(y, 1e37),
    "halves": filled(
        lambda y: torch.where(torch.arange(y[:, 0].numel()) < y[:, 0].numel() // 2, 1e37, -1e37)
        .view(len(y), 1, *y.shape[2:])
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", OVERFLOWING)
def test_sums_of_grad_out_beyond_float32(kind, shape, dtype) -> None:
    """dbias may be infinite; dweight and dx are far from it."""
    x = place(torch.randn(SHAPES[shape][0]) * 1e-18, shape, dtype).requires_grad_()
    weight = torch.full((x.shape[1],), 1e-8, requires_grad=True)
    bias = torch.zeros(x.shape[1], requires_grad=True)
    y = batch_norm(x, None, None, weight, bias, True)
    grad_out = OVERFLOWING[kind](y.detach())
    grads = torch.autograd.grad(y, (x, weight, bias), grad_out)
    expected = criterion.exact(x.detach(), weight.detach(), bias.detach(), grad_out)
    for grad, value in zip(grads, (expected.input, expected.weight, expected.bias), strict=True):
        assert criterion.units(grad, value).max() <= 4


FAR_MEANS = [
    *((torch.float32, 10.0**e) for e in range(3, 8)),
    *((torch.float64, 10.0**e) for e in range(3, 9)),
]


@pytest.mark.parametrize(("dtype", "ratio"), FAR_MEANS, ids=str)
@pytest.mark.parametrize("shape", ["256x8", "64x16x7x7", "4x8x64x64", "4x8x64x64-cl"])
def test_a_far_mean_costs_nothing(shape, dtype, ratio) -> None:
    """8 units of what a mean of 0 would give, for means of up to 1e7 (1e8) standard deviations."""
    x = place(
        torch.randn(SHAPES[shape][0], dtype=torch.float64) + ratio, shape, dtype
    ).requires_grad_()
    weight = (torch.rand(x.shape[1]) + 0.5).to(dtype).requires_grad_()
    bias = torch.randn(x.shape[1]).to(dtype).requires_grad_()
    y = batch_norm(x, None, None, weight, bias, True)
    grad_out = torch.randn_like(y) + 2  # so that the mean's error would reach dweight
    dx, dweight, _ = torch.autograd.grad(y, (x, weight, bias), grad_out)
    expected = criterion.exact(x.detach(), weight.detach(), bias.detach(), grad_out)
    assert_within(
        {
            "y": (criterion.units(y, expected.output), 8),
            "dx": (criterion.units(dx, expected.input), 8),
            "dweight": (criterion.units(dweight, expected.weight), 8),
        }
    )
