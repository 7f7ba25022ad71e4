"""The CUDA kernels of the double backward on the CPU, against the float64 reference."""

import dataclasses

import pytest
import torch

import criterion
import masks
from bnext import reference
from cases import DTYPES, Case, dtype_id, make, shape_id
from native import calls
from native.calls import COLUMNS, ROWS, SMALL
from native.checks import both
from native.test_native import LAYOUTS, NCHW, NHWC, RAGGED, SHORT_ROWS, SLICED

CASES = [
    *(layout for (v, _), layout in LAYOUTS.items() if v < 8), (SHORT_ROWS[4], NCHW), RAGGED,
    (SLICED["one"], NHWC), (SLICED["five"], NHWC),
]  # fmt: skip


def run(case: Case, act: str | None, training: bool, needs=(True, True, True), param: float = 0.0):
    """What the first backward is differentiated by, second derivatives, where f' is 1."""
    stats = None if training else case.stats
    z = reference.forward(case.x, case.weight, case.bias, case.residual, stats).output
    active = {None: None, "relu": z > 0, "relu6": (z > 0) & (z < 6), "leaky_relu": z > 0}[act]
    mask = masks.pack(active, case.x, cuda=True) if act and case.residual is not None else None
    mean, var = reference.batch_stats(case.x)
    by = (
        torch.randn_like(case.x), torch.randn_like(case.weight), torch.randn_like(case.bias),
        None if case.residual is None else torch.randn_like(case.x),
    )  # fmt: skip
    p = calls.problem(case.x, "double_backward", act=act, residual=False, has_mask=mask is not None)
    p.need_input = needs[0] or needs[2]
    ours = both().run(lambda e: calls.double_backward(
        e, calls.plan(e, p, SMALL), p, by, case.grad_out, case.x, weight=case.weight,
        bias=case.bias, mask=mask, needs=needs, act_param=param,
        save_stats=calls.save_stats(mean, (var + 1e-5).rsqrt()) if training else None,
        frozen=None if training else case.stats,
    ))  # fmt: skip
    return by, ours, active


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("act", "residual"), [(None, False), (None, True), ("relu", False),
                                               ("relu", True), ("relu6", True)])  # fmt: skip
@pytest.mark.parametrize("dtypes", [DTYPES[i] for i in (0, 1, 2, 4)], ids=dtype_id)
@pytest.mark.parametrize("layout", CASES, ids=shape_id)
def test_is_the_references(layout, dtypes, act, residual, training) -> None:
    case = make(*layout, dtypes, residual=residual)
    by, ours, active = run(case, act, training)
    outputs = by if residual else by[:3]
    criterion.assert_second_derivatives(
        case, training, active, outputs, (ours.input, ours.weight, ours.grad_out)
    )


@pytest.mark.parametrize("residual", [False, True])
def test_leaky_relu_passes_a_share_of_both(residual) -> None:
    """Its slope goes with grad_out, and with the gradient that comes of it."""
    case, param = make(*LAYOUTS[4, ROWS], residual=residual), 0.25
    by, ours, active = run(case, "leaky_relu", True, param=param)
    slope = torch.where(active, 1.0, param)
    scaled = dataclasses.replace(case, grad_out=case.grad_out * slope)
    outputs = by if residual else by[:3]
    criterion.assert_second_derivatives(
        scaled, True, None, outputs, (ours.input, ours.weight, ours.grad_out / slope)
    )


@pytest.mark.parametrize("needed", range(3))
def test_only_what_is_needed_is_written(needed) -> None:
    case = make(*LAYOUTS[4, COLUMNS], DTYPES[2])
    needs = tuple(i == needed for i in range(3))
    _, ours, _ = run(case, None, True, needs)
    assert [t is not None for t in (ours.input, ours.weight, ours.grad_out)] == [*needs]
