"""A resident launch that is refused, because fewer blocks can run at once than were planned for."""

import ctypes

import pytest
import torch

import criterion
from bnext import reference
from cases import make
from native import calls
from native.calls import CLUSTER, GRID, RESIDENT, STREAMING
from native.checks import both
from native.emulated import Limits

GPU = calls.CudaInfo(90, 4, 64 * calls.KIB, 63 * calls.KIB, 512 * calls.KIB, 1)
CLUSTERS = calls.CudaInfo(90, 4, 64 * calls.KIB, 63 * calls.KIB, 512 * calls.KIB, 8)


def forward(info: calls.CudaInfo, **limits: int) -> calls.CudaPlan:
    """A call on a GPU that has less than was asked: the plan that ran."""
    case, e = make((4, 2, 60, 100)), both().checked
    p = calls.problem(case.x, "train_forward")
    plan = calls.plan(e, p, info, family=-1)
    assert plan.family == RESIDENT and plan.team == (GRID if info is GPU else CLUSTER)
    has = {
        "shared_bytes_per_block": info.shared_bytes_per_block, "sms": info.sms,
        "shared_bytes_per_sm": info.shared_bytes_per_sm,
        "max_cluster_blocks": info.max_cluster_blocks, **limits,
    }  # fmt: skip
    e.library.bnext_set_limits(ctypes.byref(Limits(**has)))
    ours = calls.forward(
        e, plan, p, case.x, weight=case.weight, bias=case.bias, info=info,
        num_batches_tracked=torch.tensor(3),
    )  # fmt: skip
    expected = reference.forward(case.x, case.weight, case.bias)
    criterion.assert_as_good_as_torch(ours.output, None, expected.output, expected.magnitude)
    return plan


@pytest.mark.parametrize(
    ("info", "limits"), [(GPU, {"sms": 1}), (CLUSTERS, {"max_cluster_blocks": 1})]
)
def test_streams_instead(info, limits) -> None:
    assert forward(info, **limits).family == STREAMING


@pytest.mark.parametrize("info", [GPU, CLUSTERS])
def test_runs_as_planned_where_it_can(info) -> None:
    assert forward(info).family == RESIDENT


def test_other_errors_are_reported() -> None:
    with pytest.raises(calls.EmulatorError, match="more shared memory"):
        forward(GPU, shared_bytes_per_block=1024)
