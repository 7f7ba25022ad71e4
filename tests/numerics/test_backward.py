"""First derivatives against section 3 of the paper: all inputs, layouts, dtypes, every subset."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import criterion
from bnext import reference
from bnext.functional import batch_norm, batch_norm_act
from cases import AFFINE, DTYPES, LAYOUTS, SHAPES, Case, dtype_id, make, shape_id


def leaf(t: Tensor | None, requires_grad: bool = True) -> Tensor | None:
    """A fresh leaf over the same strides and memory."""
    return None if t is None else t.detach().requires_grad_(requires_grad)


def gradients(case: Case, training: bool, relu: bool) -> tuple[Tensor, list[Tensor | None]]:
    """bnext's output and the gradients of x, weight, bias, residual."""
    leaves = [leaf(t) for t in (case.x, case.weight, case.bias, case.residual)]
    x, weight, bias, residual = leaves
    y = batch_norm_act(
        x, case.running_mean.clone(), case.running_var.clone(), weight, bias, residual, training,
        act="relu" if relu else None,
    )  # fmt: skip
    given = [t for t in leaves if t is not None]
    # Not .backward(): accumulation into a leaf would give the gradient the leaf's strides.
    grads = iter(torch.autograd.grad(y, given, case.grad_out))
    return y.detach(), [None if t is None else next(grads) for t in leaves]


def check_backward(case: Case, training: bool, relu: bool) -> None:
    y, (dx, dweight, dbias, dresidual) = gradients(case, training, relu)
    stats = None if training else case.stats
    # The ReLU's decision belongs to the forward: where rounding makes it differ from float64's,
    # the gradient follows the output that was returned. That it differs only there is checked.
    active = None
    dy = case.grad_out
    if relu:
        active = y > 0
        expected = reference.forward(case.x, case.weight, case.bias, case.residual, stats)
        eps = torch.finfo(case.x.dtype).eps
        undecided = expected.pre.abs() <= 8 * eps * (expected.magnitude + per_channel_scale(case))
        assert (active == (expected.pre > 0))[~undecided].all(), "ReLU passed the wrong elements"
        dy = torch.where(active, dy, torch.zeros_like(dy))
    torchs = [leaf(t) for t in (case.x, case.weight, case.bias)]
    F.batch_norm(
        torchs[0],
        case.running_mean.clone(),
        case.running_var.clone(),
        torchs[1],
        torchs[2],
        training,
    ).backward(dy)
    expected = reference.backward(case.grad_out, case.x, case.weight, stats, active=active)
    rows = [
        ("grad_input", dx, torchs[0], expected.input, expected.input_magnitude),
        ("grad_weight", dweight, torchs[1], expected.weight, expected.weight_magnitude),
        ("grad_bias", dbias, torchs[2], expected.bias, expected.bias_magnitude),
    ]
    for name, actual, torch_leaf, value, magnitude in rows:
        if torch_leaf is None:
            assert actual is None
            continue
        assert actual is not None and torch_leaf.grad is not None, name
        assert actual.dtype == torch_leaf.dtype, name
        criterion.assert_as_good_as_torch(actual, torch_leaf.grad, value, magnitude, name)
    assert dx is not None
    assert dx.is_contiguous(memory_format=memory_format_of(y)), "grad_input's memory format"
    if case.residual is not None:
        assert dresidual is not None and torch.equal(dresidual, dy), "grad_residual is not exact"


def per_channel_scale(case: Case) -> Tensor:
    """How much an error of one unit in the mean is amplified: |mean| * invstd * |weight|."""
    mean, var = reference.batch_stats(case.x)
    scale = mean.abs() / (torch.minimum(var, case.running_var.double()) + 1e-5).sqrt()
    if case.weight is not None:
        scale = scale * case.weight.double().abs()
    return reference.per_channel(scale + case.running_mean.double().abs(), case.x)


def memory_format_of(y: Tensor) -> torch.memory_format:
    for ndim, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if y.dim() == ndim and y.is_contiguous(memory_format=memory_format):
            return memory_format
    return torch.contiguous_format


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_affine_gradients_match_reference(shape, dtypes, training, device) -> None:
    check_backward(make(*shape, dtypes, device), training, relu=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("residual", [False, True], ids=["relu", "add-relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_relu_gradients_match_reference(shape, residual, dtypes, training, device) -> None:
    check_backward(make(*shape, dtypes, device, residual=residual), training, relu=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_option_matches_reference(layout, affine, relu, residual, training, device) -> None:
    case = make(*LAYOUTS[layout], device=device, affine=AFFINE[affine], residual=residual)
    check_backward(case, training, relu)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_every_subset_gets_the_gradients_of_the_whole(layout, relu, training, device) -> None:
    case = make(*LAYOUTS[layout], device=device, residual=True)
    _, whole = gradients(case, training, relu)
    inputs = (case.x, case.weight, case.bias, case.residual)
    for wanted in product([False, True], repeat=4):
        leaves = [leaf(t, w) for t, w in zip(inputs, wanted, strict=True)]
        x, weight, bias, residual = leaves
        y = batch_norm_act(
            x, case.running_mean.clone(), case.running_var.clone(), weight, bias, residual,
            training, act="relu" if relu else None,
        )  # fmt: skip
        assert y.requires_grad == any(wanted)
        if not any(wanted):
            continue
        y.backward(case.grad_out)
        for t, w, expected in zip(leaves, wanted, whole, strict=True):
            assert (t.grad is not None) == w
            # Frozen statistics may take a leaner pass when the sums are not asked for.
            if w:
                torch.testing.assert_close(t.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_grad_out_of_any_strides(training, device) -> None:
    for layout in ("nchw", "nhwc"):
        case = make(*LAYOUTS[layout], device=device)
        other = torch.channels_last if layout == "nchw" else torch.contiguous_format
        for grad_out in (
            case.grad_out.contiguous(memory_format=other),
            torch.randn((), device=device).expand(case.x.shape),
            torch.randn(4, device=device).view(1, 4, 1, 1).expand(case.x.shape),
            torch.randn(6, 8, 10, 6, device=device)[::2, ::2, ::2, ::2],
        ):
            case.grad_out = grad_out
            check_backward(case, training, relu=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_strided_inputs_get_gradients_of_their_shape(training, device) -> None:
    big = torch.randn(5, 8, 9, 10, device=device)
    channels_last = big.contiguous(memory_format=torch.channels_last)
    for x in (
        big[:, 1:6],
        big[..., 1::2],
        big.permute(2, 0, 3, 1),
        big[:1].expand(4, -1, -1, -1),
        channels_last[:, 2:7],
        channels_last[..., ::3],
        big[0].transpose(0, 1),
        big[0, 0].t(),
    ):
        case = make(tuple(x.shape), device=device)
        case.x = x
        check_backward(case, training, relu=True)


def test_two_forwards_before_one_backward(device) -> None:
    first, second = make((4, 3, 5), device=device), make((4, 3, 5), device=device)
    x1, x2 = leaf(first.x), leaf(second.x)
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    y1 = batch_norm(x1, mean, var, training=True)
    y2 = batch_norm(x2, mean, var, training=True)
    (y1 * first.grad_out + y2 * second.grad_out).sum().backward()
    for x, case in ((x1, first), (x2, second)):
        expected = reference.backward(case.grad_out, case.x)
        criterion.assert_as_good_as_torch(x.grad, None, expected.input, expected.input_magnitude)


def test_backward_twice_with_retained_graph_is_equal(device) -> None:
    case = make((4, 3, 5), device=device)
    x, weight = leaf(case.x), leaf(case.weight)
    y = batch_norm_act(x, None, None, weight, case.bias, training=True)
    first = torch.autograd.grad(y, (x, weight), case.grad_out, retain_graph=True)
    second = torch.autograd.grad(y, (x, weight), case.grad_out)
    assert all(map(torch.equal, first, second))


def test_output_may_be_changed_in_place(device) -> None:
    case = make((4, 3, 5), device=device)
    x, twin = leaf(case.x), leaf(case.x)
    torch.relu_(batch_norm(x, None, None, case.weight, case.bias, True)).backward(case.grad_out)
    batch_norm(twin, None, None, case.weight, case.bias, True).relu().backward(case.grad_out)
    assert torch.equal(x.grad, twin.grad)


def test_input_changed_after_forward_is_an_error(device) -> None:
    x = torch.randn(4, 3, device=device, requires_grad=True)
    inner = x * 1
    y = batch_norm(inner, None, None, training=True)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_running_stats_changed_after_eval_forward_follow_torch(device) -> None:
    """Frozen statistics are needed in backward: a change in between must not go unseen."""
    outcomes = []
    for function in (batch_norm, F.batch_norm):
        x = torch.randn(4, 3, device=device, requires_grad=True)
        mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
        y = function(x, mean, var)
        var.mul_(4)
        try:
            y.sum().backward()
            outcomes.append("value")
        except RuntimeError:
            outcomes.append("error")
    assert outcomes[0] == outcomes[1]


def test_unused_output_gives_no_gradient(device) -> None:
    x = torch.randn(4, 3, device=device, requires_grad=True)
    y = batch_norm(x, None, None, training=True)
    z = x * 2
    z.sum().backward()
    assert y.grad_fn is not None
    assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_products_beyond_float16_do_not_overflow(training, device) -> None:
    """dy * (x - mean) is 16 times float16's largest number; the gradients fit (PyTorch's NCHW
    kernel on CUDA rounds the product to the input's dtype)."""
    case = make((8, 3, 16), dtypes=DTYPES[4], device=device)
    case.x = (case.x.float() * 1024).half()
    case.grad_out = (case.grad_out.float() * 64).half()
    case.running_var = torch.full_like(case.running_var, 1024.0**2)
    case.running_mean = torch.zeros_like(case.running_mean)
    expected = reference.backward(
        case.grad_out, case.x, case.weight, None if training else case.stats
    )
    _, (dx, dweight, _, _) = gradients(case, training, relu=False)
    assert dx is not None and dweight is not None
    criterion.assert_as_good_as_torch(dx, None, expected.input, expected.input_magnitude)
    criterion.assert_as_good_as_torch(dweight, None, expected.weight, expected.weight_magnitude)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("weight", "bias", "need_weight", "need_bias"),
    [(False, False, True, False), (False, False, False, True), (False, True, True, False)],
)
def test_gradient_of_an_absent_parameter_is_refused(
    weight, bias, need_weight, need_bias, training, device
) -> None:
    case = make((4, 3, 5), device=device)
    saved = torch.zeros(3, 3, dtype=torch.float64, device=device) if training else None
    stats = (None, None) if training else case.stats
    with pytest.raises(RuntimeError, match="weight"):
        torch.ops.bnext.batch_norm_backward(
            case.grad_out, case.x, case.weight if weight else None, saved, 1e-5, *stats,
            case.bias if bias else None, need_weight=need_weight, need_bias=need_bias,
        )  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivative_for_an_absent_weight_is_refused(training) -> None:
    case = make((4, 3, 5))
    saved = torch.zeros(3, 3, dtype=torch.float64) if training else None
    stats = (None, None) if training else case.stats
    with pytest.raises(RuntimeError, match="weight"):
        torch.ops.bnext.batch_norm_double_backward(
            case.x, None, None, None, case.grad_out, case.x, None, saved, 1e-5, *stats
        )  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(0, 300), (2, 300, 0), (0, 300, 2, 2)])
def test_parameter_gradients_of_an_empty_input_are_zero(shape, training, device) -> None:
    """Fresh memory is full of an earlier tensor's NaNs: a gradient not written shows."""
    case = make(shape, device=device)
    x, weight, bias = (leaf(t) for t in (case.x, case.weight, case.bias))
    grad_out = leaf(case.grad_out)
    y = batch_norm(x, *case.stats, weight, bias, training)
    grads = ()
    for _ in range(4):
        poison = [torch.full((300,), math.nan, device=device) for _ in range(8)]
        del poison
        first = torch.autograd.grad(y, (x, weight, bias), grad_out, create_graph=True)
        poison = [torch.full((300,), math.nan, device=device) for _ in range(8)]
        del poison
        second = torch.autograd.grad(first[0].sum(), weight, retain_graph=True)
        grads = (*grads, *first[1:], *second)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
