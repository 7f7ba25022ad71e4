"""The gradients of a batch normalisation whose batch several processes share."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnext._activation import ACTIVATIONS
from bnext._autograd import composed_backward, saved_bias
from bnext._check import check_input, check_like_input, check_param
from bnext._exchange import Group, Joined, all_reduce, join
from bnext._ops import EAGER

__all__ = ["sharing", "sync_normalize"]


@torch.compiler.disable  # a graph ends before it and another begins after it
def sync_normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    act: str | None,
    act_param: float,
    group: Group,
) -> Tensor:
    """Normalise by the statistics of all processes of a group, add the residual and activate."""
    x = check_input(input)  # before anything is written, and by all processes or none
    check_param("weight", weight, x)
    check_param("bias", bias, x)
    check_like_input("residual", residual, x, optional=True)
    joined = join(
        input.detach(), running_mean, running_var, num_batches_tracked, momentum, eps, group
    )
    output: Tensor = _SyncFunction.apply(
        input, weight, bias, residual, (joined, eps, act, act_param)
    )
    return output


class _SyncFunction(torch.autograd.Function):
    """Has gradients for (input, weight, bias, residual)."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        rest: tuple[Joined, float, str | None, float],
    ) -> Tensor:
        joined, eps, act, act_param = rest
        kind, needs = ACTIVATIONS[act]
        saves_mask = needs == "sign" and residual is not None
        output: Tensor
        output, mask = EAGER.apply(
            input, weight, bias, joined.save_stats, residual, kind, act_param, saves_mask
        )
        ctx.save_for_backward(
            input, weight, joined.save_stats,
            saved_bias(weight, bias, kind != 0 and not saves_mask),
            residual if needs == "sum" else None, mask,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.rest = joined, eps, kind, act_param
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return None, None, None, None, None
        need_input, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
        input, weight, save_stats, bias, residual, mask = ctx.saved_tensors
        joined, eps, act, act_param = ctx.rest
        if torch.is_grad_enabled():
            return *composed_backward(
                grad_out, input, weight, save_stats, eps, None, None, bias, residual, mask, act,
                act_param, need_input, need_weight, need_bias, need_residual,
                mean_of=lambda sums: _AllReduce.apply(sums, joined.group) / joined.count,
            ), None  # fmt: skip
        grad_input = grad_weight = grad_bias = grad_residual = None
        operands = bias, residual, mask, act, act_param
        sums = EAGER.backward_sums(grad_out, input, weight, save_stats, *operands)  # [2, C]
        if need_bias:
            like = weight if bias is None else bias
            grad_bias = sums[0].to(like.dtype).view_as(like)
        if need_weight:
            grad_weight = sums[1].to(weight.dtype).view_as(weight)
        if need_input:
            sums = all_reduce(sums.clone() if need_weight or need_bias else sums, joined.group)
        if need_input or (need_residual and act):
            grad_input, grad_residual = EAGER.backward_apply(
                grad_out, input, weight, save_stats, sums / joined.count, *operands, need_input,
                need_residual and act != 0,
            )  # fmt: skip
        if need_residual and not act:
            grad_residual = grad_out
        return grad_input, grad_weight, grad_bias, grad_residual, None


class _AllReduce(torch.autograd.Function):
    """The sum over processes, which may be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_reduce(tensor.clone(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        summed: Tensor = _AllReduce.apply(grad.contiguous(), ctx.group)
        return summed, None


def sharing(group: Group) -> Group | None:
    """The processes that share a batch, all if `group` is None; None where there is but one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    ranks = dist.get_world_size(group)
    if ranks < 0:
        raise RuntimeError(
            "bnext: SyncBatchNorm: process_group: expected one that this process, rank "
            f"{dist.get_rank()}, is in, got {group}"
        )
    return group if ranks > 1 else None
