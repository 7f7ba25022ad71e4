"""hypothesis draws shapes, strides, dtypes and modes; what holds for all of them."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_backward import check_backward
from test_forward import check_forward
from torch import Tensor

from bnext import reference
from bnext.functional import batch_norm, batch_norm_act
from cases import DTYPES, Case


@st.composite
def shapes(draw: st.DrawFn, max_numel: int = 6000) -> tuple[int, ...]:
    """[N, C, *] with at least two values per channel; sizes around vector widths are likely."""
    size = st.one_of(st.integers(1, 5), st.sampled_from([7, 8, 9, 15, 16, 17, 31, 33, 49, 64, 65]))
    shape = draw(st.lists(size, min_size=2, max_size=5))
    while math.prod(shape) > max_numel:
        shape[shape.index(max(shape))] //= 2
    if math.prod(shape) < 2 * shape[1]:
        shape[0] = 2
    return tuple(shape)


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor of this shape: permuted in memory, sliced with steps, expanded, at some offset."""
    ndim = len(shape)
    order = draw(st.permutations(range(ndim)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(ndim)]
    expanded = draw(st.sampled_from([None, None, None, 0, ndim - 1]))
    offset = draw(st.integers(0, 9))
    sizes = [
        1 if d == expanded else s * step
        for d, (s, step) in enumerate(zip(shape, steps, strict=True))
    ]
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(math.prod(sizes) + offset, generator=generator, dtype=torch.float64)
    flat = (flat * 1.5 + 0.5).to(dtype)
    t = flat[offset:].view([sizes[d] for d in order]).permute([order.index(d) for d in range(ndim)])
    t = t[
        tuple(
            slice(None, None, step) if d != expanded else slice(None)
            for d, step in enumerate(steps)
        )
    ]
    return t.expand(shape)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, bool, bool]:
    shape = draw(shapes())
    dtype, param_dtype, stat_dtype = draw(st.sampled_from(DTYPES))
    seed = draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    c = shape[1]

    def channelwise(dtype: torch.dtype) -> Tensor:
        return torch.randn(c, generator=generator).to(dtype)

    case = Case(
        x=draw(strided(shape, dtype, seed)),
        weight=channelwise(param_dtype) if draw(st.booleans()) else None,
        bias=channelwise(param_dtype) if draw(st.booleans()) else None,
        residual=draw(strided(shape, dtype, seed + 1)) if draw(st.booleans()) else None,
        running_mean=channelwise(stat_dtype),
        running_var=channelwise(stat_dtype).abs() + 0.5,
        grad_out=draw(strided(shape, dtype, seed + 2)),
    )
    return case, draw(st.booleans()), draw(st.booleans())


def on(case: Case, device: torch.device) -> Case:
    if device.type == "cpu":
        return case
    return Case(**{k: None if t is None else t.to(device) for k, t in vars(case).items()})


def small_strides_of_size_1() -> tuple[Case, bool, bool]:
    """Dense in channels_last, though the last dimension, of size 1, has the stride of the first."""
    generator = torch.Generator().manual_seed(0)
    x, residual, grad_out = torch.randn(3, 2, 2, 3, generator=generator).transpose(2, 3)[..., None]
    ones = torch.ones(3)
    return Case(x, ones, ones, residual, ones, ones, grad_out), True, False


@example(drawn=small_strides_of_size_1())
@given(drawn=cases())
def test_forward_matches_reference(drawn, device) -> None:
    case, training, relu = drawn
    check_forward(on(case, device), training, relu)


@example(drawn=small_strides_of_size_1())
@given(drawn=cases())
def test_backward_matches_reference(drawn, device) -> None:
    case, training, relu = drawn
    check_backward(on(case, device), training, relu)


@given(shape=shapes(), seed=st.integers(0, 2**20), power=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_statistics(shape, seed, power, device) -> None:
    """Every operation before eps is exact under it, so the numbers must agree to the bit."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    results = []
    for factor in (1.0, 2.0**power):
        mean = torch.zeros(shape[1], device=device)
        var = torch.zeros(shape[1], device=device)
        batch_norm(x * factor, mean, var, training=True, momentum=1.0)
        results.append((mean / factor, var / factor / factor))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@given(shape=shapes(), seed=st.integers(0, 2**20))
def test_negated_input_negates_the_output(shape, seed, device) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    y = batch_norm(x, None, None, training=True)
    assert torch.equal(batch_norm(-x, None, None, training=True), -y)


@given(shape=shapes(), seed=st.integers(0, 2**20))
def test_channels_do_not_know_each_other(shape, seed, device) -> None:
    """A channel alone gives what it gives among others, to rounding (the split may differ)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(device)
    y = batch_norm(x, None, None, training=True)
    c = int(torch.randint(shape[1], (), generator=generator))
    alone = batch_norm(x[:, c : c + 1], None, None, training=True)
    torch.testing.assert_close(alone, y[:, c : c + 1], rtol=1e-5, atol=1e-5)


@given(shape=shapes(), seed=st.integers(0, 2**20))
def test_grad_input_sums_to_zero_and_is_orthogonal_to_xhat(shape, seed, device) -> None:
    """What the two mean terms of the training gradient take away."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(shape, generator=generator).double().to(device) for _ in range(2))
    x.requires_grad_()
    y = batch_norm(x, None, None, training=True)
    (dx,) = torch.autograd.grad(y, x, dy)
    dims = reference.reduced_dims(x)
    expected = reference.backward(dy, x.detach())
    scale = expected.input_magnitude.sum(dims) * 1e-13
    assert (dx.sum(dims).abs() <= scale).all()
    # eps keeps it from being exactly orthogonal: the remainder is known.
    forward = reference.forward(x.detach())
    remainder = (dy * forward.output).sum(dims) * forward.invstd * 1e-5 * forward.invstd**2
    assert ((dx * y).sum(dims) - remainder).abs().le(scale * y.abs().amax(dims)).all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@given(shape=shapes(), seed=st.integers(0, 2**20))
def test_relu_is_the_clamped_plain_output_bit_for_bit(shape, seed, training, device) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    mean, var = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
    for r in (None, residual):
        plain, relu = (
            batch_norm_act(x, mean.clone(), var.clone(), None, None, r, training, act=act)
            for act in (None, "relu")
        )
        if training and r is not None:  # a mask to write may mean another way through memory
            torch.testing.assert_close(relu, plain.clamp(min=0), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(relu, plain.clamp(min=0))
