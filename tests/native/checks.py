"""Calls of the CUDA kernels under the emulator, against the float64 reference."""

import dataclasses
import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

import criterion
import masks
from bnext import reference
from bnext._activation import parameter
from cases import Case
from native import calls, emulated
from native.calls import H100, RESIDENT


class Both:
    """The emulator with every access checked, and the fast one (sanitize.sh: with sanitizers)."""

    def __init__(self) -> None:
        self.checked = emulated.kernels("checked")
        self.plain = emulated.kernels(os.environ.get("BNEXT_EMULATION", "plain"))

    def run(self, call, seed: int = 1):
        """call(emulator) twice."""
        self.checked.seed(seed)
        first = call(self.checked)
        self.plain.seed(seed + 1)
        second = call(self.plain)
        assert_same_bits(first, second)
        return first


def assert_same_bits(a, b) -> None:
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@functools.cache
def both() -> Both:
    return Both()


@dataclass
class Setting:
    """How to call: what follows the normalisation, and by which plan."""

    act: str | None = None
    family: int = RESIDENT
    team: int | None = None
    info: calls.CudaInfo = H100
    team_blocks: int | None = None  # instead of the plan's
    teams: int = 0

    def plan(self, e: emulated.Emulator, p: calls.Problem) -> calls.CudaPlan:
        plan = calls.plan(e, p, self.info, self.family, -1 if self.team is None else self.team)
        return calls.with_team(plan, p, self.team_blocks, self.teams) if self.team_blocks else plan


def problem(case: Case, setting: Setting, stage: str, **fields) -> calls.Problem:
    residual = case.residual is not None
    return calls.problem(case.x, stage, act=setting.act, residual=residual, **fields)


def check_training(case: Case, setting: Setting, **fields) -> calls.CudaPlan:
    """Forward and backward against the reference; returns the forward's plan."""
    x, affine = case.x, {"weight": case.weight, "bias": case.bias}
    p = problem(case, setting, "train_forward", **fields)
    states: list[list[Tensor]] = []

    def run_forward(e):
        state = [case.running_mean.clone(), case.running_var.clone(), torch.tensor(3)]
        states.append(state)
        return calls.forward(
            e, setting.plan(e, p), p, x, residual=case.residual, running=tuple(state[:2]),
            num_batches_tracked=state[2], act_param=parameter(setting.act, None), **affine,
        )  # fmt: skip

    ours = both().run(run_forward)
    torch.testing.assert_close(*states, rtol=0, atol=0)
    act, param = setting.act, parameter(setting.act, None)
    expected = reference.forward(x, case.weight, case.bias, case.residual, act=act, act_param=param)
    # Some roundings of f(z) and f'(z) besides.
    allowance = 1 if act in (None, "relu") else 8
    criterion.assert_as_good_as_torch(
        ours.output, None, expected.output, allowance * expected.magnitude, "output"
    )
    *stats, low = ours.save_stats
    torch.testing.assert_close(stats, [expected.mean, expected.invstd], rtol=1e-5, atol=1e-6)
    assert bool((low.abs() <= 2.0**-53 * stats[0].abs()).all())
    new = reference.updated_running_stats(x, case.running_mean, case.running_var, 0.1)
    for got, want in zip(states[0], new, strict=False):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-2, atol=1e-2)
    assert states[0][2] == 4
    active = ours.output > 0 if act == "relu" else None
    dy = (
        case.grad_out if act in (None, "relu") else slopes(expected.pre, act, param) * case.grad_out
    )
    if ours.mask is not None:
        passed, known = ours.output > 0, True
        if act == "relu6":  # what is rounded to 6 may have passed
            passed, known = passed & (ours.output < 6), ours.output != 6
        right = masks.unpack(ours.mask, x, cuda=True) == passed
        assert bool((right | ~torch.as_tensor(known)).all())

    p = problem(case, setting, "train_backward", **fields)
    grads = both().run(lambda e: calls.backward(
        e, setting.plan(e, p), p, case.grad_out, x, mask=ours.mask,
        residual=case.residual if p.residual else None, save_stats=ours.save_stats,
        act_param=param, **affine,
    ))  # fmt: skip
    wanted = reference.backward(dy, x, case.weight, active=active)
    if allowance > 1:  # where f' is small, 1 - t^2 is as far off as elsewhere
        flat = reference.backward(case.grad_out, x, case.weight)
        wanted = wanted._replace(
            input_magnitude=torch.maximum(wanted.input_magnitude, flat.input_magnitude),
            weight_magnitude=torch.maximum(wanted.weight_magnitude, flat.weight_magnitude),
            bias_magnitude=torch.maximum(wanted.bias_magnitude, flat.bias_magnitude),
        )
    check_gradients(grads, case, wanted, allowance)
    both().plain.seed(1)
    return setting.plan(both().plain, problem(case, setting, "train_forward", **fields))


def slopes(z: Tensor, act: str | None, param: float) -> Tensor:
    """f'(z), differentiated in float64."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(reference.ACTIVATIONS[act](z, param).sum(), z)[0]


def check_gradients(
    grads: calls.Backward, case: Case, expected: reference.Backward, allowance: int = 1
) -> None:
    # In float64 the reference rounds as often.
    factor = allowance * (2 if case.x.dtype is torch.float64 else 1)
    for name in ("input", "weight", "bias"):
        got = getattr(grads, name)
        if got is not None:
            criterion.assert_as_good_as_torch(
                got, None, getattr(expected, name),
                factor * getattr(expected, f"{name}_magnitude"), name,
            )  # fmt: skip
    if grads.residual is not None:
        eps = 0 if allowance == 1 else 16 * torch.finfo(case.x.dtype).eps
        torch.testing.assert_close(
            grads.residual, expected.residual.to(case.x.dtype), rtol=eps, atol=eps
        )
