"""Forward, training and eval: outputs, running statistics, the counter, memory formats."""

import pytest
import torch
from torch.nn import functional as F

import bnext
import criterion
from bnext import reference
from bnext.functional import batch_norm, batch_norm_act
from cases import AFFINE, DTYPES, LAYOUTS, SHAPES, Case, dtype_id, make, shape_id


def torch_forward(case: Case, training: bool, relu: bool) -> torch.Tensor:
    """PyTorch's unfused way, in the same dtype; not touching the case's statistics."""
    y = F.batch_norm(
        case.x,
        case.running_mean.clone(),
        case.running_var.clone(),
        case.weight,
        case.bias,
        training,
    )
    if case.residual is not None:
        y = y + case.residual
    return torch.relu(y) if relu else y


def memory_order(t: torch.Tensor) -> list[int]:
    """The strides that place elements; those of dimensions of size 1 do not."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def check_forward(case: Case, training: bool, relu: bool) -> None:
    torchs = torch_forward(case, training, relu)
    expected = reference.forward(
        case.x,
        case.weight,
        case.bias,
        case.residual,
        None if training else case.stats,
        act="relu" if relu else None,
    )
    mean, var = case.running_mean.clone(), case.running_var.clone()
    y = batch_norm_act(
        case.x, mean, var, case.weight, case.bias, case.residual, training,
        act="relu" if relu else None,
    )  # fmt: skip
    assert y.dtype == case.x.dtype
    assert memory_order(y) == memory_order(torchs)
    criterion.assert_as_good_as_torch(y, torchs, expected.output, expected.magnitude, "output")
    if not training:
        assert torch.equal(mean, case.running_mean), "eval changed running_mean"
        assert torch.equal(var, case.running_var), "eval changed running_var"
        return
    torch_mean, torch_var = case.running_mean.clone(), case.running_var.clone()
    F.batch_norm(case.x, torch_mean, torch_var, case.weight, case.bias, True)
    new_mean, new_var = reference.updated_running_stats(case.x, *case.stats, 0.1)
    abs_mean, _ = reference.updated_running_stats(
        case.x.abs(), case.running_mean.abs(), new_var, 0.1
    )
    criterion.assert_as_good_as_torch(mean, torch_mean, new_mean, abs_mean, "running_mean")
    criterion.assert_as_good_as_torch(var, torch_var, new_var, new_var, "running_var")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_affine_output_matches_reference(shape, dtypes, training, device) -> None:
    check_forward(make(*shape, dtypes, device), training, relu=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_add_relu_output_matches_reference(shape, dtypes, training, device) -> None:
    check_forward(make(*shape, dtypes, device, residual=True), training, relu=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_option_matches_reference(layout, affine, relu, residual, training, device) -> None:
    case = make(*LAYOUTS[layout], device=device, affine=AFFINE[affine], residual=residual)
    check_forward(case, training, relu)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_batch_norm_has_torchs_signature_and_result(dtypes, device) -> None:
    case = make((4, 3, 5, 5), dtypes=dtypes, device=device)
    y = batch_norm(
        input=case.x, running_mean=case.running_mean, running_var=case.running_var,
        weight=case.weight, bias=case.bias, training=False, momentum=0.3, eps=1e-3,
    )  # fmt: skip
    expected = reference.forward(case.x, case.weight, case.bias, stats=case.stats, eps=1e-3)
    torchs = F.batch_norm(case.x, *case.stats, case.weight, case.bias, False, 0.3, 1e-3)
    criterion.assert_as_good_as_torch(y, torchs, expected.output, expected.magnitude)


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_running_stats_follow_momentum(layout, momentum, device) -> None:
    case = make(*LAYOUTS[layout], device=device)
    mean, var = reference.updated_running_stats(case.x, *case.stats, momentum)
    batch_norm(case.x, *case.stats, training=True, momentum=momentum)
    torch.testing.assert_close(case.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(case.running_var.double(), var, rtol=1e-6, atol=1e-6)


def test_momentum_none_averages_over_the_batches_seen(device) -> None:
    bn = bnext.BatchNorm2d(3, momentum=None, device=device)
    batches = [torch.randn(4, 3, 2, 5, device=device) * k + k for k in (1.0, 5.0, 0.25)]
    for x in batches:
        bn(x)
    assert int(bn.num_batches_tracked) == 3
    means, variances = zip(*(reference.batch_stats(x) for x in batches), strict=True)
    m = 4 * 2 * 5
    expected_var = torch.stack(variances).mean(0) * m / (m - 1)
    torch.testing.assert_close(
        bn.running_mean.double(), torch.stack(means).mean(0), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(bn.running_var.double(), expected_var, rtol=1e-5, atol=1e-6)


def test_momentum_none_averages_where_aten_runs(device) -> None:
    """Under forward-mode AD, and scripted."""
    ours = bnext.BatchNorm2d(3, momentum=None, device=device)
    scripted = torch.jit.script(bnext.BatchNorm2d(3, momentum=None, device=device))
    theirs = torch.nn.BatchNorm2d(3, momentum=None, device=device)
    for k in (1.0, 5.0, 0.25):
        x = torch.randn(4, 3, 2, 5, device=device) * k + k
        with torch.autograd.forward_ad.dual_level():
            ours(x)
        scripted(x), theirs(x)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        torch.testing.assert_close(scripted.state_dict(), theirs.state_dict())


def test_counter_counts_training_forwards_only(device) -> None:
    bn = bnext.BatchNorm1d(3, device=device)
    x = torch.randn(4, 3, device=device)
    bn(x), bn(x)
    bn.eval()(x)
    assert bn.num_batches_tracked.dtype == torch.int64
    assert int(bn.num_batches_tracked) == 2


def test_buffers_are_updated_in_place(device) -> None:
    bn = bnext.BatchNorm1d(3, device=device)
    before = {name: (buffer.data_ptr(), buffer) for name, buffer in bn.named_buffers()}
    bn(torch.randn(4, 3, device=device))
    for name, buffer in bn.named_buffers():
        assert (buffer.data_ptr(), id(buffer)) == (before[name][0], id(before[name][1]))


def test_training_without_running_stats_uses_the_batch(device) -> None:
    case = make((4, 3, 5), device=device)
    expected = reference.forward(case.x, case.weight, case.bias)
    y = batch_norm(case.x, None, None, case.weight, case.bias, True)
    criterion.assert_as_good_as_torch(y, None, expected.output, expected.magnitude)


def test_eps_is_added_to_the_variance_before_the_root(device) -> None:
    x = torch.randn(64, 3, device=device) * 0.01
    expected = reference.forward(x, eps=0.5)
    y = batch_norm(x, None, None, training=True, eps=0.5)
    criterion.assert_as_good_as_torch(y, None, expected.output, expected.magnitude)


def strided_inputs() -> dict[str, torch.Tensor]:
    """Tensors that no index map takes as they are; all [N, C, *]."""
    big = torch.randn(9, 10, 12, 14)
    c_last = big.contiguous(memory_format=torch.channels_last)
    return {
        "transposed": torch.randn(7, 5, 6).transpose(1, 2),
        "permuted": torch.randn(3, 4, 5, 6).permute(2, 0, 3, 1),
        "sliced batch": big[::2],
        "sliced channels": big[:, 2:7],
        "every other channel": big[:, ::2],
        "sliced rows": big[:, :, 1:10:3],
        "sliced columns": big[..., 3:],
        "sliced channels of channels_last": c_last[:, 1:6],
        "sliced columns of channels_last": c_last[..., ::2],
        "flipped": big.flip(3),
        "expanded batch": torch.randn(1, 3, 4, 5).expand(6, -1, -1, -1),
        "expanded channels": torch.randn(4, 1, 6).expand(-1, 3, -1),
        "expanded pixels": torch.randn(6, 3, 1, 1).expand(-1, -1, 4, 5),
        "matrix transposed": torch.randn(5, 8).t(),
        "matrix sliced": torch.randn(8, 12)[:, 1:10:2],
        "odd offset": torch.randn(1 + 4 * 3 * 5)[1:].view(4, 3, 5),
        "one pixel channels_last": torch.randn(4, 9, 1, 1).to(memory_format=torch.channels_last),
        "one channel channels_last": torch.randn(4, 1, 5, 6).to(memory_format=torch.channels_last),
        "batch of one, channels_last": c_last[:1],
        "3d sliced channels_last": torch.randn(2, 6, 3, 4, 5)
        .contiguous(memory_format=torch.channels_last_3d)[:, 1:5, ::2],
    }  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", strided_inputs())
def test_any_strides_and_torchs_memory_format(name, training, device) -> None:
    x = strided_inputs()[name].to(device)
    case = make(tuple(x.shape), device=device)
    case.x = x
    before = x.clone()
    check_forward(case, training, relu=True)
    assert torch.equal(x, before), "the input was written"


@pytest.mark.parametrize("residual_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("x_format", [torch.contiguous_format, torch.channels_last])
def test_residual_of_another_layout(x_format, residual_format, device) -> None:
    case = make((3, 4, 5, 6), x_format, device=device, residual=True)
    assert case.residual is not None
    case.residual = case.residual.contiguous(memory_format=residual_format)
    check_forward(case, True, relu=True)
    case.residual = torch.randn(4, device=device).view(1, 4, 1, 1).expand(3, 4, 5, 6)
    check_forward(case, False, relu=False)


def test_parameters_of_any_stride(device) -> None:
    case = make((5, 4, 3), device=device)
    case.weight = torch.randn(8, device=device)[::2]
    case.bias = torch.randn(1, device=device).expand(4)
    case.running_mean = torch.randn(8, device=device)[1::2]
    case.running_var = torch.rand(4, 2, device=device)[:, 1]
    check_forward(case, False, relu=False)
    check_forward(case, True, relu=False)
    stats = torch.zeros(8, device=device)
    batch_norm(case.x, stats[::2], torch.ones(4, device=device), training=True)
    assert not stats[::2].eq(0).any() and stats[1::2].eq(0).all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_dtypes_that_go_together(name, training, device) -> None:
    """The input's own, or float32 with 16-bit inputs; else an error that names the argument."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    for input_dtype in dtypes:
        for dtype in dtypes:
            case = make((4, 3, 5), dtypes=(input_dtype,) * 3, device=device)
            setattr(case, name, getattr(case, name).to(dtype))
            before = [t.clone() for t in case.stats]
            args = (case.x, *case.stats, case.weight, case.bias, training)
            if dtype is input_dtype or (dtype is torch.float32 and input_dtype.itemsize == 2):
                assert batch_norm(*args).dtype is input_dtype
                continue
            with pytest.raises(RuntimeError, match=name):
                batch_norm(*args)
            assert all(map(torch.equal, case.stats, before))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (2, 3, 4, 0), (0, 3, 2, 2, 2)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch_is_torchs(shape, training, device) -> None:
    ndim = max(len(shape) - 2, 1)
    ours = getattr(bnext, f"BatchNorm{ndim}d")(3, device=device).train(training)
    theirs = getattr(torch.nn, f"BatchNorm{ndim}d")(3, device=device).train(training)
    results = []
    for module in (ours, theirs):
        x = torch.randn(shape, device=device, requires_grad=True)
        y = module(x)
        y.sum().backward()
        results.append((y, x.grad, dict(module.named_buffers())))
    (y, grad, buffers), (torch_y, torch_grad, torch_buffers) = results
    assert y.shape == torch_y.shape and grad.shape == torch_grad.shape
    assert all(torch.equal(buffers[name], torch_buffers[name]) for name in torch_buffers)
