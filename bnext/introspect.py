"""What was built, and how a batch norm would be computed: the plan, in words and as data.

``python -m bnext.introspect`` prints both for the machine it runs on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from bnext._activation import ACTIVATIONS, Act, named
from bnext._ops import _C, DOUBLE_BACKWARD_DEVICES
from bnext._predict import Prediction, predict

__all__ = ["GPUS", "CudaInfo", "Explanation", "build_info", "explain"]

CudaInfo = _C.CudaInfo
"""What the plan knows of a GPU: capability (times 10), SMs, shared memory, L2, cluster size."""

_KIB, _MIB = 1024, 1024 * 1024
GPUS = MappingProxyType(
    {
        "A100": CudaInfo(80, 108, 164 * _KIB, 163 * _KIB, 40 * _MIB, 1),
        "RTX 3090": CudaInfo(86, 82, 100 * _KIB, 99 * _KIB, 6 * _MIB, 1),
        "H100": CudaInfo(90, 132, 228 * _KIB, 227 * _KIB, 50 * _MIB, 16),
        "H200": CudaInfo(90, 132, 228 * _KIB, 227 * _KIB, 60 * _MIB, 16),
        "B200": CudaInfo(100, 148, 228 * _KIB, 227 * _KIB, 126 * _MIB, 16),
        "RTX 4090": CudaInfo(89, 128, 100 * _KIB, 99 * _KIB, 72 * _MIB, 1),
        "RTX 5090": CudaInfo(120, 170, 100 * _KIB, 99 * _KIB, 96 * _MIB, 8),
    }
)
"""Some GPUs by name, to ask :func:`explain` about without having them."""


def build_info() -> dict[str, Any]:
    """What this bnext was built with and for, and why a part is missing.

    Returns:
        A new dict: versions, compiler, CPU instruction sets, and whether and for which GPU
        architectures the CUDA part was built.
    """
    return dict(_C.build_info())


@dataclass(frozen=True)
class Explanation:
    """How a batch norm is computed, as :func:`explain` found it; made to be printed."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format
    training: bool
    act: str | None
    residual: bool
    device: _C.DeviceInfo | CudaInfo
    forward: _C.Plan | _C.CudaPlan
    backward: _C.Plan | _C.CudaPlan
    predicted: tuple[Prediction | None, Prediction | None]
    """Seconds and share of copy bandwidth, forward and backward, of a GPU of :data:`GPUS`."""
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"batch norm of {self.shape} {_name(self.dtype)} {_name(self.memory_format)}, "
            f"{'training' if self.training else 'eval'}"
            f"{', plus a residual' if self.residual else ''}"
            f"{'' if self.act is None else f', then {self.act}'}",
            f"  on       {_device_words(self.device)}",
            f"  forward  {_words(self.forward)}{_prediction_words(self.predicted[0])}",
            f"  backward {_words(self.backward)}{_prediction_words(self.predicted[1])}",
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def explain(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    training: bool = True,
    device: torch.device | str | CudaInfo = "cpu",
    act: Act = None,
    residual: bool = False,
    num_threads: int | None = None,
) -> Explanation:
    """Say how a batch norm of a given shape would be computed; runs nothing.

    Args:
        shape: of the input, :math:`(N, C, *)`.
        dtype: of the input.
        memory_format: of the input.
        training: whether it normalises by batch statistics.
        device: where the input is: ``"cpu"``, a GPU of this machine (``"cuda"``, ``"cuda:1"``), or
            the numbers of any GPU (one of :data:`GPUS`, or a :class:`CudaInfo`).
        act: the activation, or ``None``; see :func:`bnext.functional.batch_norm_act`.
        residual: whether a residual is added.
        num_threads: how many threads a CPU has; torch's number by default.

    Returns:
        The plans of forward and backward: kernel family, work split, instruction set, the bytes
        that each moves to and from memory, and the least that any kernel must move. Plans for a GPU
        rest on estimates, and so does the time predicted for each, because none has been measured
        yet.

    Raises:
        ValueError: no such batch norm exists, or :attr:`device` cannot be described.

    Example::

        >>> print(bnext.explain((32, 64, 56, 56)))
        >>> h200 = bnext.introspect.GPUS["H200"]
        >>> print(bnext.explain((32, 64, 56, 56), torch.bfloat16, device=h200))
    """
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"an input has 2 to 5 dimensions, (N, C, *), but shape is {tuple(shape)}")
    if len(shape) != {torch.channels_last: 4, torch.channels_last_3d: 5}.get(
        memory_format, len(shape)
    ):
        raise ValueError(f"no tensor of {len(shape)} dimensions is in {memory_format}")
    info = device if isinstance(device, CudaInfo) else _device_info(device, num_threads)
    act, _ = named(act, None)

    def plan(stage: str) -> Any:
        problem = (
            shape[0], shape[1], math.prod(shape[2:]),
            memory_format is not torch.contiguous_format,
            _name(dtype), f"{'train' if training else 'eval'}_{stage}", act or "none", residual,
        )  # fmt: skip
        if isinstance(info, CudaInfo):
            return _C.plan_cuda(*problem, info)
        return _C.plan(*problem, info)

    plans = plan("forward"), plan("backward")

    def predicted(direction: int) -> Prediction | None:
        if not isinstance(info, CudaInfo):
            return None
        stage = f"{'train' if training else 'eval'}_{('forward', 'backward')[direction]}"
        needs = ACTIVATIONS[act].needs
        return predict(plans[direction], info, math.prod(shape), dtype.itemsize, stage, needs)

    return Explanation(
        tuple(shape), dtype, memory_format, training, act, residual, info, *plans,
        (predicted(0), predicted(1)), _notes(training),
    )  # fmt: skip


def _notes(training: bool) -> tuple[str, ...]:
    """What goes to ATen's kernels on purpose, as `bnext._detours` decides."""
    compiled = (
        "torch.compile keeps this op; torch.export and ONNX export are given ATen's batch_norm"
        if training
        else "torch.compile, torch.export and ONNX export are given ATen's batch_norm, which they "
        "fold into the convolution before"
    )
    return (
        compiled,
        "ATen runs torch.jit's script and trace, forward-mode AD, torch.func's vmap and jvp, "
        "tensor subclasses (DTensor, ...), devices and layouts without kernels (xpu, mkldnn)",
        "a gradient that is differentiated again (create_graph=True) is one op on "
        f"{', '.join(sorted(DOUBLE_BACKWARD_DEVICES))} (but for activations with a second "
        "derivative of their own); elsewhere, and from the third derivative on, it is composed of "
        "ATen's operations",
    )


def _device_info(device: torch.device | str, num_threads: int | None) -> _C.DeviceInfo | CudaInfo:
    device = torch.device(device)
    if device.type == "cpu":
        return _C.cpu_device_info(torch.get_num_threads() if num_threads is None else num_threads)
    if device.type != "cuda":
        raise ValueError(f"explain knows the plans for cpu and cuda, not for {device}")
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    try:
        return _C.cuda_device_info(index)
    except RuntimeError as error:
        raise ValueError(
            f"{error}. Give explain the numbers of a GPU instead: "
            'device=bnext.introspect.GPUS["H200"], or a bnext.introspect.CudaInfo'
        ) from error


def _device_words(device: _C.DeviceInfo | CudaInfo) -> str:
    if isinstance(device, CudaInfo):
        return (
            f"{device.sms} SMs of compute capability {device.capability / 10}, "
            f"{_size(device.shared_bytes_per_block)} of shared memory a block, "
            f"clusters of at most {device.max_cluster_blocks}, {_size(device.l2_bytes)} of L2"
        )
    caches = (device.l1_bytes, device.l2_bytes, device.l3_bytes)
    return f"{device.threads} threads, {device.isa}, caches {' / '.join(map(_size, caches))}"


def _words(plan: _C.Plan | _C.CudaPlan) -> str:
    ratio = plan.bytes_moved / plan.bytes_floor
    if isinstance(plan, _C.CudaPlan):
        blocks = {"block": "one block", "stream": f"{plan.team_blocks} blocks"}.get(
            plan.team, f"a {plan.team} of {plan.team_blocks} blocks"
        )
        work = (
            f"{plan.groups} groups of {plan.group} channels, each by {blocks} of {plan.threads} "
            f"threads, {plan.vector} elements an access, launches: {plan.launches}"
        )
    else:
        stores = ", stores past the cache" if plan.nontemporal_stores else ""
        work = f"{plan.tasks} tasks{stores}"
    return (
        f"{plan.family} by {plan.index_map}, {work}; moves "
        f"{_size(plan.bytes_moved)}, {ratio:.2f}x the floor of {_size(plan.bytes_floor)}"
    )


def _prediction_words(prediction: Prediction | None) -> str:
    if prediction is None:
        return ""
    return (
        f"; predicted, not measured: {prediction.seconds * 1e6:.0f} us, "
        f"{prediction.copy_share:.0%} of a copy's speed"
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def _name(value: torch.dtype | torch.memory_format) -> str:
    return str(value).removeprefix("torch.")


if __name__ == "__main__":
    for key, value in build_info().items():
        print(f"{key:24} {value}")
    print(f"{'torch':24} {torch.__version__}")
    print()
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for training in (True, False):
            print(explain((32, 64, 56, 56), training=training, device=device))
