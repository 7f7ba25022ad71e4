"""The ops themselves: schemas, fake kernels, masks, what is undefined when it is not asked for."""

from itertools import product

import pytest
import torch
from torch import Tensor

import bnext
import masks
from bnext import reference
from cases import LAYOUTS, make

train = torch.ops.bnext.batch_norm_train.default
inference = torch.ops.bnext.batch_norm_inference.default
backward = torch.ops.bnext.batch_norm_backward.default
double_backward = torch.ops.bnext.batch_norm_double_backward.default

SHAPES = {
    **LAYOUTS,
    "one channel": ((3, 1, 5, 3), torch.contiguous_format),
    "one channel, nhwc": ((3, 1, 5, 3), torch.channels_last),
    "one pixel": ((3, 9, 1, 1), torch.contiguous_format),
    "one pixel, nhwc": ((3, 9, 1, 1), torch.channels_last),
    "one image": ((1, 4, 5, 3), torch.contiguous_format),
    "one image, nhwc": ((1, 4, 5, 3), torch.channels_last),
    "one row, 3-D": ((3, 9, 1), torch.contiguous_format),
    "narrow": ((3, 20, 2, 2), torch.contiguous_format),
    "empty": ((0, 4, 5, 3), torch.contiguous_format),
}


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    return masks.unpack(mask, x, x.is_cuda)


def forward_args(case, training: bool, relu: bool, save_mask: bool) -> tuple:
    stats = (case.running_mean.clone(), case.running_var.clone())
    head = (case.x, case.weight, case.bias, *stats)
    added = (case.residual, int(relu), 0.0, save_mask)
    if training:
        counter = torch.zeros((), dtype=torch.int64, device=case.x.device)
        return (*head, counter, 0.1, 1e-5, *added)
    return (*head, 1e-5, *added)


def backward_args(case, training: bool, relu: bool, need=(True,) * 4) -> tuple:
    op = train if training else inference
    outputs = op(*forward_args(case, training, relu, True))
    saved = outputs[1] if training else None
    stats = (None, None) if training else case.stats
    mask = outputs[-1] if relu and case.residual is not None else None
    return (
        case.grad_out, case.x, case.weight, saved, 1e-5, *stats, case.bias, None, mask, int(relu),
        0.0, *need,
    )  # fmt: skip


def double_backward_args(case, training: bool, relu: bool, need=(True,) * 3) -> tuple:
    grads = (torch.randn_like(case.x), torch.randn_like(case.weight), torch.randn_like(case.bias))
    residual = torch.randn_like(case.x) if relu and case.residual is not None else None
    return (*grads, residual, *backward_args(case, training, relu, ()), *need)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("layout", SHAPES)
def test_opcheck(layout, relu, residual, training, device) -> None:
    case = make(*SHAPES[layout], device=device, residual=residual)
    utils = ["test_schema", "test_faketensor"]
    if layout in ("nchw", "nhwc", "nc"):
        utils += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    op = train if training else inference
    for save_mask in (False, True):
        torch.library.opcheck(op, forward_args(case, training, relu, save_mask), test_utils=utils)
    if case.x.numel():
        need = (True, True, True, relu and residual)
        torch.library.opcheck(backward, backward_args(case, training, relu, need), test_utils=utils)
        args = double_backward_args(case, training, relu)
        torch.library.opcheck(double_backward, args, test_utils=utils)


@pytest.mark.parametrize("need", list(product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_gradients_not_asked_for_are_undefined(layout, training, need, device) -> None:
    case = make(*LAYOUTS[layout], device=device, residual=True)
    args = backward_args(case, training, True, need)
    grads = backward(*args)
    assert [g is not None for g in grads] == list(need)
    torch.library.opcheck(backward, args, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize(
    ("weight", "bias"),
    [(True, False), (False, True), (False, False)],
    ids=["weight", "bias", "none"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_backward_with_part_of_the_parameters(training, weight, bias, device) -> None:
    case = make((3, 4, 5, 3), device=device, affine=(weight, bias), residual=True)
    need = (True, weight, bias, True)
    args = backward_args(case, training, True, need)
    assert [g is not None for g in backward(*args)] == list(need)
    torch.library.opcheck(backward, args, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("layout", [name for name in SHAPES if name != "empty"])
def test_mask_bits_are_the_signs_of_the_pre_activation(layout, dtype, training, device) -> None:
    stat_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    case = make(*SHAPES[layout], (dtype, stat_dtype, stat_dtype), device, residual=True)
    op = train if training else inference
    output, *_, mask = op(*forward_args(case, training, True, True))
    bits = unpack_mask(mask, case.x)
    expected = reference.forward(
        case.x, case.weight, case.bias, case.residual, None if training else case.stats
    ).pre
    decided = expected.abs() > 1e-5
    assert decided.double().mean() > 0.9
    assert torch.equal(bits[decided], (expected > 0)[decided])
    assert torch.equal(bits, output > 0), "an output that rounds to zero would be the only reason"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [name for name in SHAPES if name != "empty"])
def test_padding_of_a_mask_is_not_read(layout, dtype, device) -> None:
    case = make(*SHAPES[layout], (dtype, torch.float32, torch.float32), device, residual=True)
    args = backward_args(case, True, True, (True, True, True, True))
    (at,) = (i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dtype == torch.uint8)
    padded = args[at] | ~masks.pack(torch.ones_like(case.x), case.x, case.x.is_cuda)
    expected = backward(*args)
    got = backward(*args[:at], padded, *args[at + 1 :])
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)


def test_mask_bit_is_set_unless_not_positive(device) -> None:
    """NaN passes, both zeros do not: torch's threshold_backward. The padding bits are zero."""
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([0.0, -0.0, nan, inf, -inf, 1e-45, -1e-45, 1.0, -1.0], device=device)
    expected = ~(values <= 0)
    for shape, memory_format in (((1, 2, 9, 1), torch.contiguous_format), ((9, 2), None)):
        x = torch.zeros(shape, device=device)
        view = values.view(1, 1, 9, 1) if len(shape) == 4 else values.view(9, 1)
        residual = view.expand(shape).contiguous()
        stats = torch.zeros(2, device=device), torch.ones(2, device=device)
        y, mask = inference(x, None, None, *stats, 1e-5, residual, 1, 0.0, True)
        bits = unpack_mask(mask, x)
        assert torch.equal(bits, expected.view_as(view).expand(shape)), (shape, memory_format)
        assert (
            torch.equal(y, torch.where(bits, residual, torch.zeros(())).to(device))
            or y.isnan().any()
        )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("save_mask", [False, True])
def test_mask_is_saved_only_where_it_is_needed(save_mask, residual, relu, device) -> None:
    case = make((3, 4, 5, 3), device=device, residual=residual)
    for op, training in ((train, True), (inference, False)):
        mask = op(*forward_args(case, training, relu, save_mask))[-1]
        assert (mask is not None) == save_mask
        assert not save_mask or (mask.numel() > 0) == (residual and relu)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_save_stats_are_the_batchs_in_float64(layout, device) -> None:
    case = make(*LAYOUTS[layout], device=device)
    case.x = case.x + 100
    _, stats, _ = train(*forward_args(case, True, False, False))
    expected = reference.forward(case.x)
    assert stats.dtype == torch.float64 and stats.shape == (3, case.x.shape[1])
    torch.testing.assert_close(stats[0], expected.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[1], expected.invstd, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_recomputed_signs_are_forwards_bit_for_bit(memory_format, training, dtype, device) -> None:
    """Pre-activations within a few units of rounding around zero: a sign recomputed in another
    order of operations would differ on many of these 40 000."""
    params = torch.float64 if dtype is torch.float64 else torch.float32
    case = make((4, 10, 25, 40), memory_format, (dtype, params, params), device)
    case.weight = case.weight * 1024  # else float16 would round the smallest ones to zero
    mean, var = case.stats if not training else reference.batch_stats(case.x)
    # A bias that puts one element of each channel, and what is close to it, at zero.
    scale = case.weight.double() / (var.double() + 1e-5).sqrt()
    pivot = case.x[1, :, 2, 3].double()
    case.bias = ((mean.double() - pivot) * scale).to(params)
    near = pivot.view(1, -1, 1, 1) * (1 + torch.randn_like(case.x.double()) * 1e-7)
    if not training:
        case.x = near.to(dtype).contiguous(memory_format=memory_format)
    # Whole numbers: their sums over the elements that pass are exact, and say which passed.
    case.grad_out = torch.randint_like(case.x, 1, 9)
    y = (train if training else inference)(*forward_args(case, training, True, True))[0]
    grad_input, _, grad_bias, _ = backward(
        *backward_args(case, training, True, (True,) * 3 + (False,))
    )
    passed = y > 0
    assert 0 < int(passed.sum()) < y.numel()
    assert torch.equal(grad_bias, (case.grad_out.to(params) * passed).sum((0, 2, 3)))
    if not training:
        assert torch.equal(grad_input != 0, passed)


def test_training_op_returns_nothing_that_aliases_its_inputs(device) -> None:
    case = make((3, 4, 5, 3), device=device, residual=True)
    args = forward_args(case, True, True, True)
    pointers = {t.data_ptr() for t in args if isinstance(t, Tensor)}
    assert not pointers & {t.data_ptr() for t in train(*args)}


def test_ops_are_listed_with_the_schemas_of_the_design() -> None:
    schema = str(train._schema)
    for argument in (
        "Tensor(a!)? running_mean",
        "Tensor(b!)? running_var",
        "Tensor(c!)? num_batches",
    ):
        assert argument in schema
    assert not inference._schema.is_mutable and not backward._schema.is_mutable


def test_profiler_shows_the_ops_by_name() -> None:
    bn = bnext.BatchNorm2d(3)
    with torch.profiler.profile() as profile:
        bn(torch.randn(4, 3, 8, 8)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"bnext::batch_norm_train", "bnext::batch_norm_backward"} <= names
