"""How long a CUDA plan should take, from what can be counted without a GPU: a prediction.

Memory, the issue of instructions, exchanges between blocks and launches, each at its own rate; the
first two overlap.
"""

from typing import NamedTuple

from bnext._ops import _C

__all__ = ["Prediction", "predict"]


class _Speed(NamedTuple):
    """What a plan does not ask for, from the data sheets."""

    bytes_per_s: float
    clock_hz: float  # boost


# By SMs and capability, which tell the GPUs of `bnext.introspect.GPUS` apart; H100 and H200 differ
# in their L2, as their drivers report it.
_SPEEDS = {
    (108, 80, 40): _Speed(2.039e12, 1.41e9),
    (82, 86, 6): _Speed(0.936e12, 1.70e9),
    (132, 90, 50): _Speed(3.35e12, 1.83e9),
    (132, 90, 60): _Speed(4.8e12, 1.83e9),
    (148, 100, 126): _Speed(8.0e12, 1.85e9),
    (128, 89, 72): _Speed(1.008e12, 2.52e9),
    (170, 120, 96): _Speed(1.792e12, 2.41e9),
}
# A copy reaches this share of the data sheet's bandwidth.
_COPY_SHARE = 0.88
# Of an SM's four instructions a clock for 32 threads, what kernels reach that wait for memory too.
_ISSUE_SHARE = 0.55
# Instructions an element in 16-byte accesses of 2-byte elements, counted by `python -m benchmarks
# sass`, by stage: training's loops, and those of one pass.
_INSTRUCTIONS = {
    "train_forward": 10.5, "train_backward": 14.0, "eval_forward": 4.5, "eval_backward": 8.0,
}  # fmt: skip
# More of them: of the activation's kind, forward and backward, and outside of the hot loops.
_ACTIVATION = {"nothing": (0.0, 0.0), "sign": (0.0, 2.5), "sum": (5.5, 21.5)}
OUTSIDE = 3.0
# Of rows whose ends are masked, and of slices of channels, whose ends are stored one by one.
_ENDS = {"whole": 0.0, "ragged": 9.0, "sliced": 4.0}
# What is left of them, without the activation's, where an instruction takes two floats:
# compute capability 10.x.
_PAIRED = 0.76
# Of a launch, a cluster's exchange, a grid's and a block's: seconds a turn (estimates).
_LAUNCH, _EXCHANGE = 2.5e-6, {"block": 1e-6, "cluster": 2e-6, "grid": 5e-6, "stream": 1e-6}


class Prediction(NamedTuple):
    """Of one plan."""

    seconds: float
    copy_share: float  # a copy's time for the bytes that no kernel could do without, of it


def instructions(
    stage: str, needs: str, access_bytes: int, ends: str = "whole", capability: int = 90
) -> float:
    """Of an element, with the activation's and those outside of the hot loops."""
    share = _PAIRED if capability // 10 == 10 else 1.0
    wide = share * _INSTRUCTIONS[stage] + OUTSIDE + _ENDS[ends]
    # An access costs about as much whatever it holds, an activation does not.
    return wide * (0.5 + 0.5 * 16 / access_bytes) + _ACTIVATION[needs]["backward" in stage]


def predict(
    plan: _C.CudaPlan,
    device: _C.CudaInfo,
    elements: float,
    element_bytes: int,
    stage: str,
    needs: str,
) -> Prediction | None:
    """The time of a plan; None where nothing is known of the GPU's speed.

    `needs`: of the sum that the activation is applied to, as in csrc/activation.h.
    """
    speed = _SPEEDS.get((device.sms, device.capability, device.l2_bytes >> 20))
    if speed is None:
        return None
    copy_rate = speed.bytes_per_s * _COPY_SHARE
    access_bytes = plan.vector * element_bytes
    ends = plan.ends
    if ends == "ragged" and plan.index_map == "columns":
        ends = "sliced"
        elements *= 32 // plan.warp_rows * plan.warp_sets * plan.vector / plan.group  # some idle
    issued = elements * instructions(stage, needs, access_bytes, ends, device.capability)
    issue_rate = device.sms * 4 * 32 * speed.clock_hz * _ISSUE_SHARE
    turns = -(-plan.groups // plan.teams) if plan.family == "resident" else plan.launches
    # Blocks that run side by side hide each other's exchanges.
    waves = max(1.0, plan.teams * plan.team_blocks / (2 * device.sms))
    exchanges = turns * _EXCHANGE[plan.team] * (waves if plan.team != "grid" else 1)
    busy = max(plan.bytes_moved / copy_rate, issued / issue_rate)
    seconds = busy + (exchanges if plan.family != "elementwise" else 0) + plan.launches * _LAUNCH
    return Prediction(seconds, plan.bytes_floor / copy_rate / seconds)
