"""The CUDA kernels on the CPU: the values that blocks sum about, and sums taken again in double.

Errors are in units of rounding (`criterion.units`).
"""

import dataclasses

import pytest
import torch
from torch import Tensor

import criterion
from cases import DTYPES, make, shape_id
from native import calls
from native.calls import BLOCK, CLUSTER, GRID, ROWS, SMALL, STREAMING
from native.checks import Setting, both, check_training

NCHW, NHWC = torch.contiguous_format, torch.channels_last
TEAMS = {
    "block": Setting(team=BLOCK),
    "cluster": Setting(team=CLUSTER),
    "grid": Setting(team=GRID, team_blocks=2, teams=2),
    "stream": Setting(family=STREAMING, info=SMALL),
}
# Rows, columns, rows taken as columns, columns of several pixels.
LAYOUTS = [
    ((4, 3, 32, 32), NCHW), ((64, 8, 8, 8), NHWC), ((128, 8, 5, 5), NCHW), ((64, 6, 8, 8), NHWC),
]  # fmt: skip
SMALLER = [((4, 3, 16, 16), NCHW), ((20, 8, 8, 8), NHWC), ((60, 8, 5, 5), NCHW)]


def blocks(plan: calls.CudaPlan) -> list[range]:
    """Which of a channel's values each block of a team with some has."""
    values = plan.vector if plan.map == ROWS else plan.bins_per_channel  # of a row of the matrix
    rows = [
        range(first, min(first + plan.rows_per_block, plan.rows))
        for first in range(0, plan.rows, plan.rows_per_block)
    ]
    return [range(values * r.start, values * r.stop) for r in rows]


def sampled(plan: calls.CudaPlan, block: range) -> list[int]:
    """Which of them make its pilot: place() and fraction() of csrc/cuda/items.cuh."""
    values = plan.vector if plan.map == ROWS else plan.bins_per_channel
    places = []
    for k in range(32):
        fraction = (k * 0x9E3779B9 + 0x80000000) % 2**32
        place = k << 27 | fraction >> 5
        row = block.start // values + (len(block) // values * place >> 32)
        places.append(row * values + (values * fraction >> 32))
    return places


def with_pilots(values: Tensor, plan: calls.CudaPlan, q: float) -> Tensor:
    """[C, M] as given, but each block's mean is sqrt(q) standard deviations from its pilot.

    The sampled values all are the pilot: the farther from the others it is, the larger is q.
    """
    values = values.double()
    for block in blocks(plan):
        part, places = values[:, block.start : block.stop], sampled(plan, block)
        inside = torch.tensor(places) - block.start
        low, high = torch.zeros(len(part), 1).double(), torch.full((len(part), 1), 1e4).double()
        for _ in range(60):
            part[:, inside] = pilot = (low + high) / 2
            far = (part.mean(1, True) - pilot) ** 2 > q * part.var(1, correction=0, keepdim=True)
            low, high = torch.where(far, low, pilot), torch.where(far, pilot, high)
    return values


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=shape_id)
@pytest.mark.parametrize("q", [0, 0.9, 1.1, 16])
def test_a_bad_pilot_is_found_and_costs_nothing(team, layout, q) -> None:
    case, setting = make(*layout), TEAMS[team]
    p = calls.problem(case.x, "train_forward")
    e = both().checked
    plan = setting.plan(e, p)
    n, c, h, w = layout[0]
    values = torch.randn(c, n * h * w)
    values = with_pilots(values, plan, q) if q else values
    case.x.copy_(3 + values.view(c, n, h, w).transpose(0, 1))
    e.statistics()
    mean, var = torch.zeros(2, c)
    y = calls.forward(
        e, plan, p, case.x, running=(mean, var), momentum=1.0, weight=case.weight, bias=case.bias
    ).output
    again = len(blocks(plan)) * plan.groups if q > 1 else 0
    assert e.statistics().summed_again == again
    expected = criterion.exact(case.x, case.weight, case.bias, case.grad_out)
    assert criterion.units(var, expected.var).max() <= 6
    assert criterion.units(mean, expected.mean).max() <= 2
    assert criterion.units(y, expected.output).max() <= 4


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("layout", SMALLER, ids=shape_id)
@pytest.mark.parametrize("mean", [1e3, 1e5, 1e7])
def test_a_far_mean_costs_float64_nothing(team, layout, mean) -> None:
    case, setting = make(*layout, DTYPES[1]), TEAMS[team]
    case.x += mean

    def call(function, stage: str, *operands: Tensor, **fields: Tensor | None):
        p = calls.problem(case.x, stage)
        return both().run(lambda e: function(
            e, setting.plan(e, p), p, *operands, case.x, weight=case.weight, bias=case.bias,
            **fields,
        ))  # fmt: skip

    y = call(calls.forward, "train_forward")
    grads = call(calls.backward, "train_backward", case.grad_out, save_stats=y.save_stats)
    expected = criterion.exact(case.x, case.weight, case.bias, case.grad_out)
    assert criterion.units(y.output, expected.output).max() <= 8
    assert criterion.units(grads.weight, expected.weight).max() <= 8
    assert criterion.units(grads.input, expected.input).max() <= 8


def put(x: Tensor, place: int, value: float) -> None:
    """At that place of the channel of that number."""
    n, inside = divmod(place, x[0, 0].numel())
    x[n, place, inside // x.shape[3], inside % x.shape[3]] = value


# A channel for each of the first 64 places, and more. The last has rows of odd length.
ODD_VALUES = [
    ((2, 65, 4, 8), NCHW), ((8, 65, 4, 2), NHWC), ((8, 65, 2, 4), NCHW), ((2, 68, 5, 13), NCHW),
]  # fmt: skip


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("layout", ODD_VALUES, ids=shape_id)
@pytest.mark.parametrize("value", [1e6, -1e18, 1e30])
def test_an_outlier_at_any_place(team, layout, value) -> None:
    case = make(*layout)
    for place in range(64):
        put(case.x, place, value)
    check_training(case, TEAMS[team])


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("layout", ODD_VALUES, ids=shape_id)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_not_finite_at_any_place(team, layout, value) -> None:
    case, setting = make(*layout), TEAMS[team]
    p = calls.problem(case.x, "train_forward")

    def run() -> calls.Forward:
        return both().run(lambda e: calls.forward(e, setting.plan(e, p), p, case.x))

    clean, odd = run(), torch.arange(case.x.shape[1]) % 2 == 1
    odd &= torch.arange(len(odd)) < 64
    for place in range(1, 64, 2):
        put(case.x, place, value)
    found = run()
    assert bool(found.output[:, odd].isnan().all())
    for got, want in ((found.output, clean.output), (found.save_stats, clean.save_stats)):
        torch.testing.assert_close(got[:, ~odd], want[:, ~odd], rtol=0, atol=0)


@pytest.mark.parametrize("team", TEAMS)
@pytest.mark.parametrize("layout", SMALLER, ids=shape_id)
@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("alignment", [16, 8])
def test_sums_of_gradients_that_no_float_holds(alignment, team, layout, act, dtypes) -> None:
    """They are taken again through each kind of gate, also where activations share a loop."""
    case = make(*layout, dtypes)
    case.grad_out.copy_((1 + torch.rand_like(case.grad_out)) * 2.0**126)
    case.weight *= 2.0**-10
    both().checked.statistics()
    check_training(case, dataclasses.replace(TEAMS[team], act=act), alignment=alignment)
    assert both().checked.statistics().summed_again > 0
