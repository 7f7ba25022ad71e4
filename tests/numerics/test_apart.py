"""Sums and application as ops of their own, between which processes exchange."""

import pytest
import torch
from torch import Tensor

import criterion
from bnext import reference
from bnext._activation import ACTIVATIONS, parameter
from bnext.reference import reduced_dims
from cases import DTYPES, LAYOUTS, SHAPES, Case, dtype_id, make, shape_id

moments = torch.ops.bnext.batch_norm_moments.default
join = torch.ops.bnext.batch_norm_join.default
apply = torch.ops.bnext.batch_norm_apply.default
backward_sums = torch.ops.bnext.batch_norm_backward_sums.default
backward_apply = torch.ops.bnext.batch_norm_backward_apply.default
EPS = 1e-5


def parts_of(case: Case, sizes: list[int]) -> list[Case]:
    """A batch as several processes have it."""

    def split(t: Tensor | None) -> list[Tensor | None]:
        return [None] * len(sizes) if t is None else [*t.split(sizes)]

    tensors = (split(case.x), split(case.residual), split(case.grad_out))
    return [
        Case(x, case.weight, case.bias, residual, *case.stats, dy)
        for x, residual, dy in zip(*tensors, strict=True)
    ]  # fmt: skip


def joined(parts: list[Case]) -> tuple[Tensor, Tensor]:
    """Save_stats [3, C] of all parts, and each part's count."""
    counts = [p.x.numel() // p.x.shape[1] for p in parts]
    device = parts[0].x.device
    counted = torch.tensor(counts, dtype=torch.float64, device=device)
    each = torch.stack([moments(p.x, EPS) for p in parts])  # [parts, 3, C]
    return join(parts[0].x, each, counted, None, None, None, None, EPS), counted


def run(case: Case, sizes: list[int], act: str | None = None, param: float = 0.0):
    """Output, mask-joined gradients: forward and backward of all parts, put together."""
    parts, kind = parts_of(case, sizes), ACTIVATIONS[act]
    stats, counts = joined(parts)
    needs_mask = kind.needs == "sign" and case.residual is not None
    applied = [
        apply(p.x, p.weight, p.bias, stats, p.residual, kind.kind, param, needs_mask)
        for p in parts
    ]  # fmt: skip
    given = [
        (p.bias, p.residual if kind.needs == "sum" else None, mask if needs_mask else None,
         kind.kind, param)
        for p, (_, mask) in zip(parts, applied, strict=True)
    ]  # fmt: skip
    sums = [
        backward_sums(p.grad_out, p.x, p.weight, stats, *more)
        for p, more in zip(parts, given, strict=True)
    ]
    total = torch.stack(sums).sum(0)
    with_residual = case.residual is not None and act is not None
    grads = [
        backward_apply(p.grad_out, p.x, p.weight, stats, total / counts.sum(), *more, True,
                       with_residual)
        for p, more in zip(parts, given, strict=True)
    ]  # fmt: skip
    residual = torch.cat([g[1] for g in grads]) if with_residual else None
    output, dx = torch.cat([y for y, _ in applied]), torch.cat([g[0] for g in grads])
    return output, dx, residual, *total, stats


def check(case: Case, sizes: list[int], act: str | None = None) -> None:
    param = parameter(act, None)
    output, dx, residual, bias, weight, _ = run(case, sizes, act, param)
    expected = reference.forward(
        case.x, case.weight, case.bias, case.residual, act=act, act_param=param
    )
    allowance = 1 if act in (None, "relu") else 8
    criterion.assert_as_good_as_torch(
        output, None, expected.output, allowance * expected.magnitude, "output"
    )
    z = expected.pre.detach().requires_grad_()
    f = reference.ACTIVATIONS[act](z, param) if act else z
    slope = torch.autograd.grad(f.sum(), z)[0]
    if act in ("relu", "relu6"):  # as the forward rounded it
        passed = (output > 0) & (output < 6 if act == "relu6" else True)
        slope = passed.cpu().double()
    dy = slope * case.grad_out.cpu().double()
    wanted = reference.backward(dy, case.x, case.weight)
    flat = reference.backward(case.grad_out, case.x, case.weight)
    factor = allowance * (2 if case.x.dtype is torch.float64 else 1)
    for name, got in (("input", dx), ("weight", weight), ("bias", bias)):
        magnitude = torch.maximum(
            getattr(wanted, f"{name}_magnitude"), getattr(flat, f"{name}_magnitude")
        )
        value = getattr(wanted, name)
        if name != "input":  # doubles of sums that were made in the input's precision
            compute = torch.float64 if case.x.dtype is torch.float64 else torch.float32
            got = got.to(compute)
        criterion.assert_as_good_as_torch(got, None, value, factor * magnitude, name)
    if residual is not None:
        eps = 16 * torch.finfo(case.x.dtype).eps
        torch.testing.assert_close(residual.cpu(), dy.to(case.x.dtype), rtol=eps, atol=eps)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0][0] > 2], ids=shape_id)
def test_two_parts_are_one_batch(shape, dtypes, device) -> None:
    n = shape[0][0]
    check(make(*shape, dtypes, device=device), [n - 1, 1])


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=dtype_id)
def test_every_activation(dtypes, layout, act, residual, device) -> None:
    case = make(*LAYOUTS[layout], dtypes, device=device, residual=residual)
    check(case, [case.x.shape[0] - 1, 1], act)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_part_may_be_empty(layout, device) -> None:
    case = make(*LAYOUTS[layout], device=device, residual=True)
    check(case, [0, 2, 1], "relu")
    assert not moments(case.x[:0], EPS).any()


def test_a_mean_far_from_zero_costs_no_digits(device) -> None:
    """Two rows that differ by a few units of a double whose size is 2^30 of them."""
    x = torch.randn(8, 3, 64, dtype=torch.float64, device=device) + 2.0**30
    mean, m2, low = moments(x, EPS)
    wide = x.cpu().transpose(0, 1).flatten(1)
    d = wide - wide[:, :1]  # exact
    expected_m2 = (d - d.mean(1, keepdim=True)).square().sum(1)
    exact_mean = d.mean(1) - (mean.cpu() - wide[:, 0])
    torch.testing.assert_close(low.cpu(), exact_mean, rtol=0, atol=2.0**-48)
    torch.testing.assert_close(m2.cpu(), expected_m2, rtol=1e-13, atol=0)


def test_joining_keeps_what_a_double_cannot_hold_of_the_mean(device) -> None:
    x = torch.randn(8, 3, 64, dtype=torch.float64, device=device) + 2.0**30
    each = torch.stack([moments(part, EPS) for part in x.split([3, 5])])
    counts = torch.tensor([3.0 * 64, 5 * 64], dtype=torch.float64, device=device)
    mean, invstd, low = join(x, each, counts, None, None, None, None, EPS).cpu()
    wide = x.cpu().transpose(0, 1).flatten(1)
    d = wide - wide[:, :1]  # exact
    exact = d.mean(1) - (mean - wide[:, 0])
    assert bool((exact.abs() > 2.0**-30).any()), "nothing is lost"
    torch.testing.assert_close(low, exact, rtol=0, atol=2.0**-48)
    torch.testing.assert_close(invstd, (d.var(1, correction=0) + EPS).rsqrt(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_either_gradient_alone(dtype, act, needs, device) -> None:
    case = make(*LAYOUTS["nchw"], (dtype, torch.float32, torch.float32), device, residual=True)
    stats, kind = joined([case])[0], ACTIVATIONS[act]
    _, mask = apply(case.x, case.weight, case.bias, stats, case.residual, kind.kind, 0.0, True)
    given = (case.bias, case.residual if act == "silu" else None, mask if act == "relu" else None,
             kind.kind, 0.0)  # fmt: skip
    head = (case.grad_out, case.x, case.weight, stats)
    means = backward_sums(*head, *given) / (case.x.numel() // case.x.shape[1])
    both = backward_apply(*head, means, *given, True, True)
    alone = backward_apply(*head, means, *given, *needs)
    for need, one, expected in zip(needs, alone, both, strict=True):
        if not need:
            assert one is None
        else:
            torch.testing.assert_close(one, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [((6, 5, 7), torch.contiguous_format)], ids=shape_id)
def test_sums_are_the_gradients_before_they_are_rounded(shape, device) -> None:
    case = make(*shape, DTYPES[0], device=device)
    *_, bias, weight, stats = run(case, [6])
    mean, invstd, _ = stats.cpu()
    over = (1, -1, 1)
    h = (case.x.cpu().double() - mean.view(over)) * invstd.view(over)
    dy, dims = case.grad_out.cpu().double(), reduced_dims(case.x)
    torch.testing.assert_close(bias.cpu(), dy.sum(dims), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(weight.cpu(), (dy * h).sum(dims), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sizes", [[6], [4, 2], [0, 5, 1]])
def test_running_statistics_are_those_of_the_whole_batch(sizes, momentum, dtypes, device) -> None:
    case = make((6, 5, 7), dtypes=dtypes, device=device)
    parts = parts_of(case, sizes)
    counts = torch.tensor([7.0 * n for n in sizes], dtype=torch.float64, device=device)
    each = torch.stack([moments(p.x, EPS) for p in parts])
    mean, var = case.running_mean.clone(), case.running_var.clone()
    counter = torch.tensor(3, device=device)
    join(parts[0].x, each, counts, mean, var, counter, momentum, EPS)
    factor = 0.25 if momentum is None else momentum
    wanted = reference.updated_running_stats(case.x, case.running_mean, case.running_var, factor)
    for got, want in zip((mean, var), wanted, strict=True):
        torch.testing.assert_close(
            got, want.to(got), rtol=2 * torch.finfo(got.dtype).eps, atol=1e-6
        )
    assert counter == 4


def test_nothing_anywhere_is_counted_but_not_learnt_from(device) -> None:
    x = torch.empty(0, 3, 4, device=device)
    mean, var, counter = (t.to(device) for t in (torch.ones(3), torch.ones(3), torch.tensor(0)))
    none = torch.zeros(2, 3, 3, dtype=torch.float64, device=device)
    stats = join(x, none, none[:, 0, 0], mean, var, counter, 0.1, EPS)
    assert not stats.any() and counter == 1
    assert bool((mean == 1).all()) and bool((var == 1).all())
