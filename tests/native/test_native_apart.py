"""The CUDA kernels' sums and application as calls of their own, against the float64 reference."""

import dataclasses

import pytest
import torch
from torch import Tensor

import criterion
from bnext import reference
from bnext._activation import parameter
from cases import DTYPES, Case, dtype_id, make, shape_id
from native import calls
from native.calls import ELEMENTWISE, SMALL, STREAMING
from native.checks import both, check_gradients, slopes
from native.test_native import LAYOUTS, NCHW, NHWC, RAGGED, SHORT_ROWS, SLICED

CASES = [*LAYOUTS.values(), (SHORT_ROWS[4], NCHW), RAGGED, (SLICED["five"], NHWC)]


def statistics(case: Case) -> torch.Tensor:
    """Save_stats [3, C] from the moments that a call gives."""
    p = calls.problem(case.x, "train_forward", need_input=False)
    count = p.n * p.hw

    def run(e):
        plan = calls.plan(e, p, SMALL)
        assert plan.family == STREAMING and plan.launches == 2
        moments = torch.empty(3, p.c, dtype=torch.float64)
        calls.forward(e, plan, p, case.x, moments=moments)
        return calls.Forward(None, None, moments)

    mean, m2, low = both().run(run).save_stats
    wide = case.x.double().transpose(0, 1).flatten(1)
    expected_mean, expected_var = wide.mean(1), wide.var(1, correction=0)
    eps = 2 * torch.finfo(torch.float32).eps if case.x.dtype is not torch.float64 else 1e-14
    spread = expected_var.sqrt() + expected_mean.abs()
    assert bool(((mean - expected_mean).abs() <= eps * spread).all())
    assert bool(((m2 / count - expected_var).abs() <= 8 * eps * expected_var).all())
    assert bool((low.abs() <= 2.0**-53 * mean.abs()).all())
    return torch.stack([mean, (m2 / count + 1e-5).rsqrt(), low])


def check(case: Case, act: str | None) -> None:
    stats, residual, param = statistics(case), case.residual is not None, parameter(act, None)
    affine = {"weight": case.weight, "bias": case.bias}
    fields = {"act": act, "residual": residual}
    p = calls.problem(case.x, "eval_forward", **fields)
    ours = both().run(lambda e: calls.forward(
        e, calls.plan(e, p, SMALL), p, case.x, residual=case.residual, save_stats=stats,
        act_param=param, **affine,
    ))  # fmt: skip
    expected = reference.forward(
        case.x, case.weight, case.bias, case.residual, act=act, act_param=param
    )
    allowance = 1 if act in (None, "relu") else 8
    criterion.assert_as_good_as_torch(
        ours.output, None, expected.output, allowance * expected.magnitude, "output"
    )

    given = {
        "mask": ours.mask, "residual": case.residual if act == "silu" else None,
        "save_stats": stats, "act_param": param, **affine,
    }  # fmt: skip
    p = calls.problem(case.x, "train_backward", **fields, need_input=False)
    p.need_residual = False
    sums = both().run(lambda e: calls.backward(
        e, calls.plan(e, p, SMALL), p, case.grad_out, case.x, dtype=torch.float64, **given
    ))  # fmt: skip
    means = torch.stack([sums.bias, sums.weight]) / (p.n * p.hw)
    p = calls.problem(case.x, "apply_backward", **fields, need_params=False)

    def run_apply(e):
        plan = calls.plan(e, p, SMALL)
        assert plan.family == ELEMENTWISE and plan.launches == 1 and plan.workspace_bytes == 0
        return calls.backward(e, plan, p, case.grad_out, case.x, grad_means=means, **given)

    applied = both().run(run_apply)
    active = ours.output > 0 if act == "relu" else None
    dy = case.grad_out if active is not None else slopes(expected.pre, act, param) * case.grad_out
    wanted = reference.backward(dy, case.x, case.weight, active=active)
    compute = torch.float64 if case.x.dtype is torch.float64 else torch.float32
    grads = dataclasses.replace(applied, weight=sums.weight.to(compute), bias=sums.bias.to(compute))
    check_gradients(grads, case, wanted, allowance)


@pytest.mark.parametrize(("act", "residual"), [(None, False), ("relu", False), ("relu", True),
                                               ("silu", False), ("silu", True)])  # fmt: skip
@pytest.mark.parametrize("dtypes", [DTYPES[i] for i in (0, 1, 2, 4)], ids=dtype_id)
@pytest.mark.parametrize("layout", CASES, ids=shape_id)
def test_is_the_references(layout, dtypes, act, residual) -> None:
    check(make(*layout, dtypes, residual=residual), act)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("c", [1, 3, 200])
def test_processes_join(c, dtype, momentum) -> None:
    """Three, of which the first is empty."""
    parts = [torch.randn(n, c, dtype=torch.float64) + 1e6 * torch.rand(c) for n in (0, 5, 40)]
    moments = torch.zeros(3, 4, c, dtype=torch.float64)[:, 1:]  # with a gap before each
    for i, part in enumerate(parts[1:], 1):
        mean = part.mean(0)
        moments[i] = torch.stack([mean, (part - mean).square().sum(0), torch.zeros(c)])
    counts = torch.tensor([0, 5, 40], dtype=torch.float64)
    old = torch.randn(c).to(dtype), torch.rand(c).to(dtype)
    states: list[tuple[Tensor, ...]] = []

    def run(e):
        states.append((old[0].clone(), old[1].clone(), torch.tensor(3)))
        *running, counter = states[-1]
        if momentum is None:
            counter += 1  # a launch of its own has counted
        return calls.join(e, moments, counts, tuple(running), counter, momentum)

    mean, invstd, low = both().run(run).save_stats
    whole = torch.cat(parts)
    about = whole[0]
    offset = (whole - about).mean(0)
    var = (whole - about - offset).square().mean(0)
    torch.testing.assert_close(mean - about + low, offset, rtol=0, atol=1e-9)
    torch.testing.assert_close(invstd, (var + 1e-5).rsqrt(), rtol=1e-9, atol=0)
    factor = 0.25 if momentum is None else momentum
    for got, was, value in zip(states[0], old, (about + offset, var * 45 / 44), strict=False):
        expected = (1 - factor) * was.double() + factor * value
        rtol = 1e-2 if dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(got, expected.to(dtype), rtol=rtol, atol=1e-6)
