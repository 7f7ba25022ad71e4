"""The gradients of batch normalisation: what forward saves, and what backward makes of it.

Two autograd functions share one backward: `BatchNormFunction` is what eager calls, at the least
cost; `_TracedFunction` has the form that Dynamo and functorch ask for.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bnext._ops import EAGER, TRACED

__all__ = ["BatchNormFunction", "apply", "traced_apply"]

_Grads: TypeAlias = tuple[Tensor | None, ...]


def _backward(ctx: Any, grad_out: Tensor | None) -> _Grads:
    """Gradients by the formulas of the paper's section 3, in one op."""
    if grad_out is None:
        return None, None, None, None, None
    need_input, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
    eps, relu = ctx.eps_and_relu
    if not relu and not (need_input or need_weight or need_bias):
        return None, None, None, grad_out, None
    if torch.compiler.is_dynamo_compiling():
        gradients = TRACED.backward
    elif torch.is_grad_enabled():
        gradients = _differentiable_backward
    else:
        gradients = EAGER.backward
    grad_input, grad_weight, grad_bias, grad_residual = gradients(
        grad_out, *ctx.saved_tensors, eps, relu,
        need_input, need_weight, need_bias, need_residual and relu,
    )  # fmt: skip
    if need_residual and not relu:
        grad_residual = grad_out
    return grad_input, grad_weight, grad_bias, grad_residual, None


class BatchNormFunction(torch.autograd.Function):
    """Batch normalisation with gradients for (input, weight, bias, residual), as eager calls it.

    ``rest`` is (running_mean, running_var, num_batches_tracked, training, momentum, eps, relu): the
    fewer arguments, the cheaper the call, and ``forward`` taking the context costs a third of the
    form with `setup_context`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        rest: tuple[Any, ...],
    ) -> Tensor:
        """Run the op and save for backward."""
        output: Tensor
        running_mean, running_var, num_batches_tracked, training, momentum, eps, relu = rest
        if running_mean is not None and (running_mean.requires_grad or running_var.requires_grad):
            raise RuntimeError("batch norm has no gradients for running_mean and running_var")
        if training:
            output, save_stats, relu_mask = EAGER.train(
                input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
                momentum, eps, relu, True,
            )  # fmt: skip
            # Never the output, nor the running statistics: both may change before backward.
            ctx.save_for_backward(input, weight, bias, relu_mask, save_stats, None, None)
        else:
            output, relu_mask = EAGER.inference(
                input, weight, bias, residual, running_mean, running_var, eps, relu, True
            )
            ctx.save_for_backward(input, weight, bias, relu_mask, None, running_mean, running_var)
        ctx.set_materialize_grads(False)
        ctx.eps_and_relu = eps, relu
        return output

    backward = staticmethod(_backward)


# The engine calls this with what `_backward` takes; the one inherited looks `backward` up: 0.4 us.
BatchNormFunction._backward_cls.apply = _backward  # type: ignore[attr-defined]
# Function.apply itself only looks for functorch: 3 of 12 us, and callers of this have looked.
apply: Callable[..., Tensor] = super(torch.autograd.Function, BatchNormFunction).apply


class _TracedFunction(torch.autograd.Function):
    """`BatchNormFunction` in the form that Dynamo and functorch ask for."""

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor | None, ...]:
        """Return (output, save_stats, relu_mask)."""
        if training:
            output, save_stats, relu_mask = TRACED.train(
                input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
                momentum, eps, relu, True,
            )  # fmt: skip
            return output, save_stats, relu_mask
        output, relu_mask = TRACED.inference(
            input, weight, bias, residual, running_mean, running_var, eps, relu, True
        )
        return output, None, relu_mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save for backward."""
        input, weight, bias, _, running_mean, running_var, _, training, _, eps, relu = inputs
        _, save_stats, relu_mask = output
        if training:
            running_mean = running_var = None
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        ctx.save_for_backward(input, weight, bias, relu_mask, save_stats, running_mean, running_var)
        ctx.set_materialize_grads(False)
        ctx.eps_and_relu = eps, relu

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> _Grads:
        """Those of `BatchNormFunction`."""
        return *_backward(ctx, grad_out), None, None, None, None, None, None


def traced_apply(*args: Any) -> Tensor:
    """Batch normalisation for Dynamo and functorch; the arguments of `_TracedFunction`."""
    output: Tensor
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4])
    if torch.compiler.is_compiling() and not wanted:
        output = TRACED.train(*args[:7], *args[8:], False)[0]
    else:  # a transform may want a gradient at another level than the one that shows
        output = _TracedFunction.apply(*args)[0]
    return output


def _differentiable_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu_mask: Tensor | None,
    save_stats: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> _Grads:
    """The backward op from operations that have derivatives of their own, to any order."""
    dims = [0, *range(2, input.dim())]
    acc_t = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype

    def per_channel(tensor: Tensor) -> Tensor:
        return tensor.to(acc_t).view(-1, *[1] * (input.dim() - 2))

    x, dy = input.to(acc_t), grad_out.to(acc_t)
    if running_mean is not None and running_var is not None:
        mean, var = per_channel(running_mean), per_channel(running_var)
    else:
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    invstd = torch.rsqrt(var + eps)
    normalized = (x - mean) * invstd
    if relu:
        with torch.no_grad():
            if relu_mask is None:
                output = normalized if weight is None else normalized * per_channel(weight)
                blocked = (output if bias is None else output + per_channel(bias)) <= 0
            else:  # unpacked by the op: where a residual's gradient of ones gets through
                blocked = TRACED.backward(
                    torch.ones_like(input), input, weight, bias, relu_mask, save_stats,
                    running_mean, running_var, eps, True, False, False, False, True,
                )[3] == 0  # fmt: skip
        dy = dy.masked_fill(blocked, 0.0)
    grad_input = grad_weight = grad_bias = None
    if need_input:
        grad_input = dy
        if save_stats is not None:
            grad_input = dy - dy.mean(dims, True) - normalized * (dy * normalized).mean(dims, True)
        grad_input = grad_input * (invstd if weight is None else invstd * per_channel(weight))
        grad_input = grad_input.to(input.dtype)
    if need_weight and weight is not None:
        grad_weight = (dy * normalized).sum(dims).to(weight.dtype)
    if need_bias:
        param = weight if weight is not None else bias
        grad_bias = dy.sum(dims).to(acc_t if param is None else param.dtype)
    return grad_input, grad_weight, grad_bias, dy.to(input.dtype) if need_residual else None
