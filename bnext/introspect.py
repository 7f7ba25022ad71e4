"""What was built, and how a given batch norm would be computed: the plan, in words and as data.

``python -m bnext.introspect`` prints both for the machine it runs on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bnext._ops import _C, DOUBLE_BACKWARD_DEVICES
from bnext.functional import is_relu

__all__ = ["Explanation", "build_info", "explain"]


def build_info() -> dict[str, Any]:
    """What this bnext was built with and for, and why a part is missing.

    Returns:
        A new dict: versions, compiler, CPU instruction sets, and whether and for which GPU
        architectures the CUDA part was built.
    """
    return dict(_C.build_info())


@dataclass(frozen=True)
class Explanation:
    """How a batch norm is computed, as :func:`explain` found it; printing it is readable."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    memory_format: torch.memory_format
    training: bool
    act: str | None
    residual: bool
    device: _C.DeviceInfo
    forward: _C.Plan
    backward: _C.Plan
    notes: tuple[str, ...]

    def __str__(self) -> str:
        activation = "" if self.act is None else f", then {self.act}"
        return "\n".join(
            [
                f"batch norm of {self.shape} {_name(self.dtype)} {_name(self.memory_format)}, "
                f"{'training' if self.training else 'eval'}"
                f"{', plus a residual' if self.residual else ''}{activation}",
                f"  on     {self.device.threads} threads, {self.device.isa}, caches "
                f"{_size(self.device.l1_bytes)} / {_size(self.device.l2_bytes)} / "
                f"{_size(self.device.l3_bytes)}",
                f"  forward  {_words(self.forward)}",
                f"  backward {_words(self.backward)}",
                *(f"  note: {note}" for note in self.notes),
            ]
        )


def explain(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    training: bool = True,
    device: torch.device | str = "cpu",
    act: str | None = None,
    residual: bool = False,
    num_threads: int | None = None,
) -> Explanation:
    """Say how a batch norm of a given shape would be computed on this machine; runs nothing.

    Args:
        shape: of the input, :math:`(N, C, *)`.
        dtype: of the input.
        memory_format: of the input.
        training: whether it normalises by batch statistics.
        device: where the input is; the CPU is described.
        act: the activation, ``"relu"`` or ``None``.
        residual: whether a residual is added.
        num_threads: as if torch had that many; its own number by default.

    Returns:
        The plans of forward and backward: kernel family, work split, instruction set, and the bytes
        each moves to and from memory beside the floor, what no kernel could do without.

    Raises:
        ValueError: no such batch norm exists, or :attr:`device` cannot be described.

    Example::

        >>> print(bnext.explain((32, 64, 56, 56)))
    """
    if torch.device(device).type != "cpu":
        raise ValueError(f"explain describes the CPU, not {device}: no other kernels are built")
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"an input has 2 to 5 dimensions, (N, C, *), but shape is {tuple(shape)}")
    if len(shape) != {torch.channels_last: 4, torch.channels_last_3d: 5}.get(
        memory_format, len(shape)
    ):
        raise ValueError(f"no tensor of {len(shape)} dimensions is in {memory_format}")
    info = _C.cpu_device_info(torch.get_num_threads() if num_threads is None else num_threads)
    relu = is_relu(act)

    def plan(stage: str) -> _C.Plan:
        return _C.plan(
            shape[0], shape[1], math.prod(shape[2:]),
            memory_format is not torch.contiguous_format,
            _name(dtype), f"{'train' if training else 'eval'}_{stage}", relu, residual, info,
        )  # fmt: skip

    return Explanation(
        tuple(shape), dtype, memory_format, training, act, residual, info,
        plan("forward"), plan("backward"), _notes(training),
    )  # fmt: skip


def _notes(training: bool) -> tuple[str, ...]:
    """What goes to ATen's kernels on purpose; `bnext.functional._detour` is where."""
    compiled = (
        "torch.compile and torch.export keep this op"
        if training
        else "torch.compile, torch.export and ONNX export are given ATen's batch_norm, which they "
        "fold into the convolution before"
    )
    return (
        compiled,
        "ATen runs torch.jit's script and trace, forward-mode AD, torch.func's vmap and jvp, "
        "tensor subclasses (DTensor, ...), devices and layouts without kernels (xpu, mkldnn)",
        "a gradient that is differentiated again (create_graph=True) is one op on "
        f"{', '.join(sorted(DOUBLE_BACKWARD_DEVICES))}; elsewhere, and from the third derivative "
        "on, it is composed of ATen's operations",
    )


def _words(plan: _C.Plan) -> str:
    ratio = plan.bytes_moved / plan.bytes_floor
    stores = ", stores past the cache" if plan.nontemporal_stores else ""
    return (
        f"{plan.family} by {plan.index_map}, {plan.tasks} tasks{stores}; moves "
        f"{_size(plan.bytes_moved)}, {ratio:.2f}x the floor of {_size(plan.bytes_floor)}"
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
    for training in (True, False):
        print(explain((32, 64, 56, 56), training=training))
