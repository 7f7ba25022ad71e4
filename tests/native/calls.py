"""The kernels' arguments for ctypes, and calls of them with tensors of the CPU."""

import ctypes
import math
from ctypes import c_bool, c_double, c_int, c_int64, c_uint8, c_uint32, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

import masks
from bnext._activation import ACTIVATIONS
from native.emulated import Emulator, Limits

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # as DType
STAGES = [
    "train_forward", "eval_forward", "train_backward", "eval_backward", "double_backward",
    "apply_backward",
]  # fmt: skip
ELEMENTWISE, RESIDENT, STREAMING = range(3)
ROWS, COLUMNS = range(2)
BLOCK, CLUSTER, GRID, STREAM = range(4)


class Fields(ctypes.Structure):
    """A struct of csrc/problem.h or csrc/cuda/plan.h."""

    def __repr__(self) -> str:
        return str({name: getattr(self, name) for name, _ in self._fields_})


class Problem(Fields):
    _fields_ = [
        ("stage", c_uint8), ("n", c_int64), ("c", c_int64), ("hw", c_int64),
        ("channels_last", c_bool), ("dtype", c_uint8), ("act", c_uint8), ("residual", c_bool),
        ("has_mask", c_bool), ("need_input", c_bool), ("need_params", c_bool),
        ("need_residual", c_bool), ("alignment", c_int),
    ]  # fmt: skip


class CudaInfo(Fields):
    _fields_ = [
        ("capability", c_int), ("sms", c_int), ("shared_bytes_per_sm", c_int64),
        ("shared_bytes_per_block", c_int64), ("l2_bytes", c_int64), ("max_cluster_blocks", c_int),
    ]  # fmt: skip


class CudaPlan(Fields):
    _fields_ = [
        ("family", c_uint8), ("map", c_uint8), ("team", c_uint8), ("vector", c_int),
        ("threads", c_int), ("warp_rows", c_int), ("warp_sets", c_int),
        ("bins_per_channel", c_int64), ("interleaved", c_bool), ("rows", c_int64),
        ("row_items", c_int64), ("ends", c_uint8), ("magic_shift", c_int), ("magic", c_uint32),
        *((name, c_int64) for name in (
            "group", "groups", "team_blocks", "teams", "rows_per_block", "items_per_thread",
            "groups_per_launch", "launches",
        )),
        ("keeps_output", c_bool), *((name, c_int64) for name in (
            "slab_bytes", "shared_bytes", "workspace_bytes", "bytes_moved", "bytes_floor",
        )),
    ]  # fmt: skip


class Vector(Fields):
    _fields_ = [("data", c_void_p), ("stride", c_int64), ("dtype", c_uint8)]


class ForwardArgs(Fields):
    _fields_ = [
        ("input", c_void_p), ("residual", c_void_p), ("output", c_void_p),
        ("mask", c_void_p), ("weight", Vector), ("bias", Vector), ("frozen_mean", Vector),
        ("frozen_var", Vector), ("running_mean", Vector), ("running_var", Vector),
        ("num_batches_tracked", c_void_p), ("moments", c_void_p), ("save_stats", c_void_p),
        ("momentum", c_double),
        ("cumulative", c_bool), ("eps", c_double), ("act_param", c_double),
    ]  # fmt: skip


class BackwardArgs(Fields):
    _fields_ = [
        ("grad_out", c_void_p), ("input", c_void_p), ("residual", c_void_p),
        ("mask", c_void_p), ("weight", Vector), ("bias", Vector), ("save_stats", c_void_p),
        ("grad_means", c_void_p), ("running_mean", Vector), ("running_var", Vector),
        ("grad_input", c_void_p), ("grad_residual", c_void_p), ("grad_weight", Vector),
        ("grad_bias", Vector), ("eps", c_double), ("act_param", c_double),
    ]  # fmt: skip


class DoubleBackwardArgs(Fields):
    _fields_ = [
        ("grad_grad_input", c_void_p), ("grad_grad_residual", c_void_p), ("grad_out", c_void_p),
        ("input", c_void_p), ("residual", c_void_p), ("mask", c_void_p), ("weight", Vector),
        ("bias", Vector), ("grad_grad_weight", Vector), ("grad_grad_bias", Vector),
        ("save_stats", c_void_p), ("running_mean", Vector), ("running_var", Vector),
        ("grad_grad_out", c_void_p), ("grad_input", c_void_p), ("grad_weight", Vector),
        ("eps", c_double), ("act_param", c_double),
    ]  # fmt: skip


class JoinArgs(Fields):
    _fields_ = [
        ("moments", c_void_p), ("rank_stride", c_int64), ("row_stride", c_int64),
        ("counts", c_void_p), ("count_stride", c_int64), ("ranks", c_int64), ("c", c_int64),
        ("running_mean", Vector), ("running_var", Vector), ("num_batches_tracked", c_void_p),
        ("save_stats", c_void_p), ("momentum", c_double), ("cumulative", c_bool),
        ("eps", c_double),
    ]  # fmt: skip


KIB = 1024
H100 = CudaInfo(90, 132, 228 * KIB, 227 * KIB, 50 * KIB**2, 16)
A100 = CudaInfo(80, 108, 164 * KIB, 163 * KIB, 40 * KIB**2, 1)
# Two of everything: tensors of a few hundred KiB are large for it.
SMALL = CudaInfo(90, 2, 64 * KIB, 63 * KIB, 512 * KIB, 8)


class EmulatorError(Exception):
    """An error of the emulator."""


def pointer(t: Tensor | None) -> int | None:
    return None if t is None or t.numel() == 0 else t.data_ptr()


def vector(t: Tensor | None) -> Vector:
    if t is None:
        return Vector(None, 1, 0)
    return Vector(pointer(t), t.stride(0) or 1, DTYPES.index(t.dtype))


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def problem(x: Tensor, stage: str, **fields) -> Problem:
    """As the ops describe it: see canonical() in csrc/problem.h."""
    n, c, hw = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    channels_last = c > 1 and (hw == 1 or is_channels_last(x))
    if c == 1:
        n, hw = 1, n * hw
    p = Problem(
        STAGES.index(stage), n, c, hw, channels_last,
        DTYPES.index(x.dtype), 0, False, False, True, True, False, 16,
    )  # fmt: skip
    act = ACTIVATIONS[fields.pop("act", None)]
    residual = fields.get("residual", False)
    fields["act"] = act.kind
    fields.setdefault("has_mask", act.needs == "sign" and residual)
    if "backward" in stage:
        fields["need_residual"] = residual
        fields["residual"] = residual and act.needs == "sum"
    for name, value in fields.items():
        setattr(p, name, value)
    return p


def plan(e: Emulator, p: Problem, info: CudaInfo = H100, family: int = -1, team: int = -1,
         **fields) -> CudaPlan:  # fmt: skip
    """The plan for a problem on a GPU, which the emulator becomes; `fields` are changed."""
    limits = Limits(
        info.shared_bytes_per_block, info.shared_bytes_per_sm, info.sms, info.max_cluster_blocks
    )
    e.library.bnext_set_limits(ctypes.byref(limits))
    result = CudaPlan()
    if e.library.bnext_plan(ctypes.byref(p), ctypes.byref(info), family, team,
                            ctypes.byref(result)):  # fmt: skip
        raise EmulatorError(e.error())
    for name, value in fields.items():
        setattr(result, name, value)
    return result


def with_team(plan: CudaPlan, p: Problem, team_blocks: int, teams: int = 0) -> CudaPlan:
    """Cut for teams of another size (of the same kind); 0 teams: one for each group."""
    changed = CudaPlan.from_buffer_copy(plan)
    changed.team_blocks = team_blocks
    changed.teams = min(teams or plan.groups, plan.groups)
    unit = 8 // plan.vector if plan.map == ROWS else 1
    changed.rows_per_block = -(-plan.rows // (team_blocks * unit)) * unit
    if plan.team == STREAM:
        changed.groups_per_launch = changed.teams
    else:
        step = plan.threads // 32 // plan.warp_sets * plan.warp_rows
        changed.items_per_thread = -(-changed.rows_per_block // step)
        operands = 2 if "backward" in STAGES[p.stage] else 1
        item = plan.vector * DTYPES[p.dtype].itemsize
        slab = -(-operands * changed.items_per_thread * plan.threads * item // 32) * 32
        changed.shared_bytes += slab - plan.slab_bytes
        changed.slab_bytes = slab
    if plan.team in (GRID, STREAM):
        entries = team_blocks + (plan.team == GRID)
        changed.workspace_bytes = changed.teams * entries * plan.group * 32
    return changed


@dataclass
class Forward:
    output: Tensor | None  # [N, C, *]
    mask: Tensor | None  # [mask rows, bytes of a row]
    save_stats: Tensor | None  # [3, C]


@dataclass
class Backward:
    input: Tensor | None  # [N, C, *]
    residual: Tensor | None  # [N, C, *]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]


def save_stats(mean: Tensor, invstd: Tensor) -> Tensor:
    """[3, C]; a GPU's kernels do not know what a double cannot hold of the mean."""
    return torch.stack([mean, invstd, torch.zeros_like(mean)]).double()


def mask_shape(p: Problem) -> tuple[int, int]:
    rows = p.n * (p.hw if p.channels_last else p.c)
    return rows, masks.row_bytes_of(p.c, p.hw, p.channels_last)


def forward(e: Emulator, plan: CudaPlan, p: Problem, x: Tensor, *, weight=None, bias=None,
            residual=None, frozen=None, save_stats=None, moments=None, running=(None, None),
            num_batches_tracked=None, momentum=0.1, eps=1e-5, act_param=0.0,
            info=None) -> Forward:  # fmt: skip
    """`momentum` None: the cumulative average. Running statistics are updated in place, `moments`
    are written; `save_stats` are given, or else saved in training. `info`: the GPU to plan for;
    then `plan` becomes what ran.
    """
    training = STAGES[p.stage] == "train_forward"
    output = torch.empty_like(x) if p.need_input else None
    mask = None
    if p.has_mask and (training or save_stats is not None):
        mask = torch.empty(mask_shape(p), dtype=torch.uint8)
    if training and moments is None:
        save_stats = torch.empty(3, p.c, dtype=torch.float64)
    args = ForwardArgs(
        pointer(x), pointer(residual), pointer(output), pointer(mask), vector(weight),
        vector(bias), *map(vector, frozen or (None, None)), *map(vector, running),
        pointer(num_batches_tracked), pointer(moments), pointer(save_stats),
        momentum or 0.0, momentum is None, eps, act_param,
    )  # fmt: skip
    where = None if info is None else ctypes.byref(info)
    if e.library.bnext_forward(ctypes.byref(plan), ctypes.byref(p), ctypes.byref(args), where):
        raise EmulatorError(f"{e.error()}: {plan}")
    return Forward(output, mask, save_stats)


def backward(e: Emulator, plan: CudaPlan, p: Problem, grad_out: Tensor, x: Tensor, *, weight=None,
             bias=None, mask=None, save_stats=None, grad_means=None, frozen=None, residual=None,
             dtype=None, eps=1e-5, act_param=0.0) -> Backward:  # fmt: skip
    """`dtype`: of the parameters' gradients; None: the weight's, or float32."""
    c, dtype = p.c, dtype or (torch.float32 if weight is None else weight.dtype)
    out = Backward(
        torch.empty_like(x) if p.need_input else None,
        torch.empty_like(x) if p.need_residual else None,
        torch.empty(c, dtype=dtype) if p.need_params else None,
        torch.empty(c, dtype=dtype) if p.need_params else None,
    )
    args = BackwardArgs(
        pointer(grad_out), pointer(x), pointer(residual), pointer(mask), vector(weight),
        vector(bias), pointer(save_stats), pointer(grad_means),
        *map(vector, frozen or (None, None)), pointer(out.input), pointer(out.residual),
        vector(out.weight), vector(out.bias), eps, act_param,
    )  # fmt: skip
    if e.library.bnext_backward(ctypes.byref(plan), ctypes.byref(p), ctypes.byref(args)):
        raise EmulatorError(f"{e.error()}: {plan}")
    return out


def join(e: Emulator, moments: Tensor, counts: Tensor, running: tuple[Tensor, Tensor],
         num_batches_tracked: Tensor, momentum: float | None,
         eps: float = 1e-5) -> Forward:  # fmt: skip
    """Moments [ranks, 3, C] and counts [ranks]; running statistics are updated in place."""
    ranks, _, c = moments.shape
    save_stats = torch.empty(3, c, dtype=torch.float64)
    args = JoinArgs(
        pointer(moments), moments.stride(0), moments.stride(1), pointer(counts), counts.stride(0),
        ranks, c, *map(vector, running), pointer(num_batches_tracked), pointer(save_stats),
        momentum or 0.0, momentum is None, eps,
    )  # fmt: skip
    if e.library.bnext_join(ctypes.byref(args)):
        raise EmulatorError(e.error())
    return Forward(None, None, save_stats)


@dataclass
class DoubleBackward:
    input: Tensor | None
    weight: Tensor | None
    grad_out: Tensor | None


def double_backward(e: Emulator, plan: CudaPlan, p: Problem, by: tuple[Tensor | None, ...],
                    grad_out: Tensor, x: Tensor, *, weight=None, bias=None, mask=None,
                    save_stats=None, frozen=None, needs=(True, True, True), eps=1e-5,
                    act_param=0.0) -> DoubleBackward:  # fmt: skip
    """`by`: grad_grad_input, _weight, _bias and _residual; `needs`: in DoubleBackward's order."""
    grad_grad_input, grad_grad_weight, grad_grad_bias, grad_grad_residual = by
    out = DoubleBackward(
        torch.empty_like(x) if needs[0] else None,
        torch.empty(p.c, dtype=weight.dtype) if needs[1] else None,
        torch.empty_like(x) if needs[2] else None,
    )
    args = DoubleBackwardArgs(
        pointer(grad_grad_input), pointer(grad_grad_residual), pointer(grad_out), pointer(x), None,
        pointer(mask), vector(weight), vector(bias), vector(grad_grad_weight),
        vector(grad_grad_bias), pointer(save_stats), *map(vector, frozen or (None, None)),
        pointer(out.grad_out), pointer(out.input), vector(out.weight), eps, act_param,
    )  # fmt: skip
    if e.library.bnext_double_backward(ctypes.byref(plan), ctypes.byref(p), ctypes.byref(args)):
        raise EmulatorError(f"{e.error()}: {plan}")
    return out
