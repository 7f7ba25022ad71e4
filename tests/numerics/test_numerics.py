"""The ladder: inputs on which sums of squares, float32 accumulators or shared state go wrong."""

import math
import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import criterion
from bnext import reference
from bnext.functional import batch_norm, batch_norm_act
from cases import DTYPES, dtype_id, make

FORMATS = [torch.contiguous_format, torch.channels_last]
FORMAT_IDS = ["nchw", "nhwc"]


def train(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return batch_norm(x, None, None, weight, bias, True)


def check_train(x: Tensor, what: str, torch_allowance: float = 2**-5) -> Tensor:
    """Forward and the gradient of x for a random grad_out, against the reference."""
    grad_out = torch.randn(x.shape, dtype=torch.float64).to(x)
    outputs = []
    for function in (batch_norm, F.batch_norm):
        leaf = x.detach().requires_grad_()
        y = function(leaf, None, None, training=True)
        outputs.append((y.detach(), *torch.autograd.grad(y, leaf, grad_out)))
    (y, dx), (torch_y, torch_dx) = outputs
    forward = reference.forward(x)
    criterion.assert_as_good_as_torch(
        y, torch_y, forward.output, forward.magnitude, f"{what}: output", torch_allowance
    )
    backward = reference.backward(grad_out, x)
    criterion.assert_as_good_as_torch(
        dx, torch_dx, backward.input, backward.input_magnitude, f"{what}: grad", torch_allowance
    )
    return y


@pytest.mark.parametrize("dtype", [d[0] for d in DTYPES[:3]] + [torch.float16], ids=dtype_id)
@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (3, 3, 7, 7), (5, 17, 3, 11), (2, 1, 101, 107)])
def test_constant_input_gives_exactly_bias(shape, memory_format, dtype, device) -> None:
    bias = torch.randn(shape[1], device=device).to(dtype)
    weight = torch.randn(shape[1], device=device).to(dtype) * 3
    expected = bias.view(1, -1, 1, 1).expand(shape)
    for constant in (0.0, 1.0, -0.1, 100.0, 1 / 3, 1e4, 12345.678, -6e4, 1e-3, 1e-7):
        x = torch.full(shape, constant, dtype=dtype, device=device)
        y = train(x.contiguous(memory_format=memory_format), weight, bias)
        assert torch.equal(y, expected), f"constant {constant}"


@pytest.mark.parametrize("constant", [1e19, -1e30, 3e38, 1e-38, 1e-44])
def test_extreme_constants_give_exactly_bias_in_float32(constant, device) -> None:
    bias = torch.randn(3, device=device)
    for shape in ((3, 3, 7, 7), (1, 3, 100, 100)):
        x = torch.full(shape, constant, device=device)
        assert torch.equal(train(x, None, bias), bias.view(1, -1, 1, 1).expand(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("shape", [(4, 3, 9, 9), (2, 2, 70, 70)])
def test_mean_over_std_up_to_1e7(shape, memory_format, dtype, device) -> None:
    for exponent in range(2, 8):
        x = torch.randn(shape, dtype=torch.float64) + 10.0**exponent
        x = x.to(device, dtype).contiguous(memory_format=memory_format)
        check_train(x, f"mean/std 1e{exponent}", torch_allowance=1.0)


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e4, 1e5, 1e6, 1e7])
def test_variance_of_a_far_mean_is_exact_to_rounding(ratio, device) -> None:
    """E[x^2] - E[x]^2 in float32 loses everything from a ratio of 1e4 on."""
    for shape in ((4, 3, 9, 9), (2, 2, 90, 90), (50, 3)):
        x = (torch.randn(shape, dtype=torch.float64) + ratio).to(device, torch.float32)
        for memory_format in FORMATS if len(shape) == 4 else FORMATS[:1]:
            mean = torch.zeros(shape[1], device=device)
            var = torch.zeros(shape[1], device=device)
            batch_norm(x.contiguous(memory_format=memory_format), mean, var, None, None, True, 1.0)
            expected_mean, expected_var = reference.updated_running_stats(x, mean, var, 1.0)
            torch.testing.assert_close(mean.double(), expected_mean, rtol=2e-7, atol=0)
            torch.testing.assert_close(var.double(), expected_var, rtol=2e-6, atol=0)


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
def test_a_far_mean_costs_no_accuracy(memory_format, ratio, device) -> None:
    """The mean is not rounded to float32 before it is subtracted, unlike PyTorch's."""
    shape, eps = (4, 5, 9, 9), torch.finfo(torch.float32).eps
    x = (torch.randn(shape, dtype=torch.float64) + ratio).to(device, torch.float32)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    weight = (torch.rand(5, device=device) + 1).requires_grad_()
    dy = torch.randn(shape, device=device) + 2  # so that the mean's error would reach grad_weight
    stats = (x.detach().double().mean((0, 2, 3)), torch.ones(5, device=device))
    for frozen in (None, stats):
        # float64 statistics are not accepted with a float32 input: round them, and use those.
        frozen = None if frozen is None else (frozen[0].float(), frozen[1])
        y = batch_norm(x, *(frozen or (None, None)), weight, training=frozen is None)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        forward = reference.forward(x.detach(), weight.detach(), stats=frozen)
        backward = reference.backward(dy, x.detach(), weight.detach(), frozen)
        assert (y - forward.output).abs().max() <= 8 * eps * forward.output.abs().max()
        assert (dx - backward.input).abs().max() <= 16 * eps * dx.abs().max()
        scale = (dy.double() * forward.output).abs().sum((0, 2, 3))
        assert ((dweight - backward.weight).abs() <= 8 * eps * scale).all()


@pytest.mark.parametrize("scale", [1e19, 1e30])
@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
def test_squares_beyond_float32_do_not_overflow(memory_format, scale, device) -> None:
    x = (torch.randn(4, 3, 9, 9) * scale).to(device).contiguous(memory_format=memory_format)
    x.requires_grad_()
    y = train(x)
    grad_out = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, grad_out)
    x = x.detach()
    forward = reference.forward(x)
    criterion.assert_as_good_as_torch(y.detach(), None, forward.output, forward.magnitude, "output")
    backward = reference.backward(grad_out, x)
    criterion.assert_as_good_as_torch(dx, None, backward.input, backward.input_magnitude, "grad")


@pytest.mark.parametrize(
    ("scale", "grad_scale", "eps"),
    [(1e25, 1e15, 1e-5), (1e19, 1e19, 1e-5), (1e-25, 1e-20, 1e-60), (1e-20, 1e-10, 1e-50)],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
def test_products_of_grad_out_beyond_float32(
    memory_format, training, scale, grad_scale, eps, device
) -> None:
    """dy * (x - mean) over- or underflows in float32; the gradients do not."""
    x = (torch.randn(4, 3, 9, 9) * scale).to(device).contiguous(memory_format=memory_format)
    grad_out = (torch.randn(4, 3, 9, 9) * grad_scale).to(x)
    x.requires_grad_()
    weight = torch.full((3,), min(scale, 1.0), device=device, requires_grad=True)
    stats = None
    if not training:
        stats = (torch.zeros(3, device=device), torch.full((3,), min(scale, 1e18) ** 2).to(x))
    y = batch_norm(x, *(stats or (None, None)), weight, training=training, eps=eps)
    dx, dweight = torch.autograd.grad(y, (x, weight), grad_out)
    expected = reference.backward(grad_out, x.detach(), weight.detach(), stats, eps)
    criterion.assert_as_good_as_torch(dx, None, expected.input, expected.input_magnitude, "dx")
    criterion.assert_as_good_as_torch(
        dweight, None, expected.weight, expected.weight_magnitude, "dweight"
    )


def test_running_variance_beyond_float32_is_infinite_and_the_mean_right(device) -> None:
    x = (torch.randn(4, 3, 9, 9) * 1e25).to(device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    y = batch_norm(x, mean, var, training=True, momentum=1.0)
    assert y.isfinite().all() and (var == math.inf).all()
    expected = reference.batch_stats(x)[0]
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e18)


@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
def test_float16_near_its_largest_number(memory_format, device) -> None:
    x = torch.randn(4, 3, 9, 9) * 8000 + torch.tensor([0.0, 3e4, -3e4]).view(1, 3, 1, 1)
    x = x.clamp(-65504, 65504).to(device, torch.float16).contiguous(memory_format=memory_format)
    check_train(x, "float16")
    both_ends = torch.tensor([65504.0, -65504.0] * 8, device=device).half().view(4, 1, 2, 2)
    y = train(both_ends.expand(4, 3, 2, 2).contiguous(memory_format=memory_format))
    assert torch.equal(y.abs(), torch.ones_like(y))


@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=dtype_id)
def test_subnormal_inputs(dtype, memory_format, device) -> None:
    """Kept, not flushed: with a tiny eps they decide the output."""
    tiny = torch.finfo(dtype).smallest_normal
    x = (torch.randint(-8, 9, (4, 3, 5, 5)).double() * tiny / 16).to(device, dtype)
    x = x.contiguous(memory_format=memory_format)
    assert (x != 0).any() and (x.abs() < tiny).all()
    eps = {torch.float64: 1e-300, torch.float32: 1e-40, torch.float16: 1e-12}[dtype]
    forward = reference.forward(x, eps=eps)
    y = batch_norm(x, None, None, training=True, eps=eps)
    criterion.assert_as_good_as_torch(y, None, forward.output, forward.magnitude, "output")


def test_subnormal_mean_is_kept(device) -> None:
    x = torch.full((4, 3, 5), 2e-40, device=device)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    batch_norm(x, mean, var, training=True, momentum=1.0)
    torch.testing.assert_close(mean, x[0, :, 0], rtol=0, atol=1.5e-45)


@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
def test_one_huge_channel_leaves_the_others_alone(memory_format, device) -> None:
    x = torch.randn(4, 6, 9, 9, device=device).contiguous(memory_format=memory_format)
    alone = train(x)
    others = [0, 1, 2, 4, 5]
    x[:, 3] *= 1e30
    y = check_train(x, "huge channel")
    assert torch.equal(y[:, others], alone[:, others])


@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
def test_one_outlier_in_a_far_channel(memory_format, device) -> None:
    """A single far value first: a shift taken from it would be useless for the rest."""
    x = torch.randn(4, 3, 30, 30, device=device) + 5
    for position in ((0, 0, 0), (3, 29, 29), (1, 7, 3)):
        y = x.clone()
        y[position[0], :, position[1], position[2]] = -1e6
        check_train(y.contiguous(memory_format=memory_format), f"outlier at {position}")


@pytest.mark.parametrize("size", [1, 3, 7, 17, 49, 1023])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_odd_sizes_and_misaligned_storage(size, dtypes, device) -> None:
    """Every place of a vector's tail, from every offset inside a cache line."""
    for c, offset in ((1, 0), (2, 1), (3, 3), (17, 5)):
        numel = 2 * c * size
        x = torch.randn(numel + offset).to(device, dtypes[0])[offset:].view(2, c, size)
        for channels_last in (False, True):
            if channels_last:
                x = x.as_strided((2, c, size, 1), (c * size, 1, c, c), offset)
            check_train(x, f"[2, {c}, {size}] at offset {offset}, channels_last {channels_last}")


def test_output_covers_every_element(device) -> None:
    """Fresh memory is full of an earlier tensor's NaNs: an element not written shows."""
    for shape in ((3, 5, 7, 9), (2, 17, 1, 33), (40, 19, 1, 1), (1, 1, 257, 3)):
        for memory_format in FORMATS:
            case = make(shape, memory_format, device=device, residual=True)
            leaf, residual = case.x.requires_grad_(), case.residual.requires_grad_()
            for _ in range(4):
                poison = [torch.full(shape, math.nan, device=device) for _ in range(4)]
                del poison
                y = batch_norm_act(leaf, None, None, case.weight, case.bias, residual, True)
                grads = torch.autograd.grad(y, (leaf, residual), case.grad_out)
                assert all(t.isfinite().all() for t in (y, *grads))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_half_precision_conversion_rounds_to_nearest_even(dtype, device) -> None:
    """With frozen unit statistics the op is the identity: every finite number must come back."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = bits[bits.isfinite()].reshape(-1, 1).to(device)
    mean, var = torch.zeros(1, device=device), torch.ones(1, device=device)
    y = batch_norm(x, mean, var, eps=1e-30)
    assert torch.equal(y, x)
    half = batch_norm(x, mean, var * 4, eps=1e-30)
    assert torch.equal(half, (x.float() / 2).to(dtype))
    third = batch_norm(x, mean, var, torch.full((1,), 1 / 3, device=device), None, eps=1e-30)
    assert torch.equal(third, (x.float() * (1 / 3)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_half_precision_parameters_round_to_nearest_even(dtype, device) -> None:
    """Statistics and gradients that lie halfway between two numbers of the dtype; NaN stays."""
    step = torch.finfo(dtype).eps  # between 1 and 2
    big = 2 / step  # from here on only every other integer exists
    x = torch.tensor([[1, 1 + step, 1], [1 + step, 1 + 2 * step, math.nan]], device=device)
    x = x.to(dtype)
    grad_out = torch.tensor([[big, big, math.nan], [1, 3, 1]], device=device).to(dtype)
    mean, var = torch.zeros(2, 3, device=device, dtype=dtype)
    weight, bias = torch.ones_like(mean), torch.zeros_like(mean, requires_grad=True)
    y = batch_norm(x, mean, var, weight, bias, True, momentum=1.0)
    (dbias,) = torch.autograd.grad(y, bias, grad_out)
    assert mean[:2].tolist() == [1, 1 + 2 * step] and mean[2].isnan() and var[2].isnan()
    assert dbias[:2].tolist() == [big, big + 4] and dbias[2].isnan()


def test_more_rows_than_one_float32_counter_holds(device) -> None:
    """2^24 + 4 values per channel: a float32 count or a running sum of ones would stall."""
    x = torch.ones(2**24 + 4, 1, device=device)
    x[::2] = 3
    mean, var = torch.zeros(1, device=device), torch.zeros(1, device=device)
    batch_norm(x, mean, var, training=True, momentum=1.0)
    assert float(mean) == 2.0
    assert float(var) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.skipif(
    os.environ.get("BNEXT_TEST_LARGE") != "1", reason="takes 10 GB and a minute: BNEXT_TEST_LARGE=1"
)
@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
def test_more_elements_than_32_bits_count(memory_format, device) -> None:
    """Two channels of 2^30 values and some, of 2 +- 1 and 1 +- 1; its ends are told."""
    x = torch.zeros((2, 2, 2**26 + 3, 8), dtype=torch.float16, device=device)
    x = x.to(memory_format=memory_format)
    x[:, 0] = 1
    x[0] += 2
    x[1, 1, -1, -1] = 4
    assert x.numel() > 2**31
    mean, var = torch.zeros(2, device=device), torch.zeros(2, device=device)
    y = batch_norm(x, mean, var, training=True, momentum=1.0)
    assert mean.tolist() == [2, 1] and var.tolist() == [1, 1]
    assert y[1, :, -1, -1].tolist() == [-1, 3]
    assert y[0, :, 0, 0].tolist() == [1, 1] and y[1, :, 0, 0].tolist() == [-1, -1]
