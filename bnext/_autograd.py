"""The gradients of batch normalisation: what forward saves, and what backward makes of it.

One set of functions holds the formulas, `_forward`, `_save` and `_backward`; two autograd functions
call them, in the form that costs least and in the form that Dynamo and functorch ask for.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bnext._ops import EAGER, TRACED, Ops

__all__ = ["BatchNormFunction", "apply", "traced_apply"]

_Grads: TypeAlias = tuple[Tensor | None, ...]


def _forward(
    ops: Ops,
    save_mask: bool,
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
) -> tuple[Any, ...]:
    """Returns (output, save_stats, relu_mask)."""
    outputs: tuple[Any, ...]
    if (running_mean is not None and running_mean.requires_grad) or (
        running_var is not None and running_var.requires_grad
    ):
        raise RuntimeError("batch norm has no gradients for running_mean and running_var")
    if training:
        outputs = ops.train(
            input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
            momentum, eps, relu, save_mask,
        )  # fmt: skip
        return outputs
    output, relu_mask = ops.inference(
        input, weight, bias, residual, running_mean, running_var, eps, relu, save_mask
    )
    return output, None, relu_mask


def _save(
    ctx: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    save_stats: Tensor | None,
    relu_mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
) -> None:
    """Keep what `_backward` needs: never the output, nor in training the running statistics."""
    if save_stats is not None:
        running_mean = running_var = None
    ctx.save_for_backward(input, weight, bias, relu_mask, save_stats, running_mean, running_var)
    ctx.set_materialize_grads(False)
    ctx.eps = eps
    ctx.relu = relu


def _backward(ctx: Any, grad_out: Tensor | None) -> _Grads:
    """Gradients of (input, weight, bias, residual): the paper's formulas (section 3), in one op."""
    if grad_out is None:
        return None, None, None, None
    need_input, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    relu = ctx.relu
    if not relu and not (need_input or need_weight or need_bias):
        return None, None, None, grad_out
    gradients: Callable[..., _Grads] = EAGER.backward
    if torch.compiler.is_dynamo_compiling():
        gradients = TRACED.backward
    elif torch.is_grad_enabled():
        gradients = _differentiable_backward
    grad_input, grad_weight, grad_bias, grad_residual = gradients(
        grad_out, *ctx.saved_tensors, ctx.eps, relu,
        need_input, need_weight, need_bias, need_residual and relu,
    )  # fmt: skip
    if need_residual and not relu:
        grad_residual = grad_out
    return grad_input, grad_weight, grad_bias, grad_residual


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


class BatchNormFunction(torch.autograd.Function):
    """Batch normalisation with gradients for (input, weight, bias, residual), as eager calls it.

    ``rest`` is the other arguments of `_forward`: the fewer arguments, the cheaper the call, and
    ``forward`` taking the context costs a third of the form with `setup_context`.
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
        output, save_stats, relu_mask = _forward(EAGER, True, input, weight, bias, residual, *rest)
        running_mean, running_var, _, _, _, eps, relu = rest
        _save(ctx, input, weight, bias, save_stats, relu_mask, running_mean, running_var, eps, relu)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None) -> _Grads:
        """Return a gradient for each argument, where it was asked for."""
        return *_backward(ctx, grad_out), None


# Function.apply itself only looks for functorch: 3 of 12 us, and callers of this have looked.
apply: Callable[..., Tensor] = super(torch.autograd.Function, BatchNormFunction).apply


class _TracedFunction(torch.autograd.Function):
    """`BatchNormFunction` in the form that Dynamo and functorch's transforms ask for."""

    @staticmethod
    def forward(*args: Any) -> tuple[Any, ...]:
        """Run the op; also returns what is to be saved."""
        return _forward(TRACED, True, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save for backward."""
        input, weight, bias, _, running_mean, running_var, _, _, _, eps, relu = inputs
        _, save_stats, relu_mask = output
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        _save(ctx, input, weight, bias, save_stats, relu_mask, running_mean, running_var, eps, relu)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> _Grads:
        """Return a gradient for each argument, where it was asked for."""
        return *_backward(ctx, grad_out), None, None, None, None, None, None, None


def traced_apply(*args: Any) -> Tensor:
    """Batch normalisation for Dynamo and functorch; the arguments are those of `_forward`."""
    output: Tensor
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4])
    if torch.compiler.is_compiling() and not wanted:
        output = _forward(TRACED, False, *args)[0]
    else:  # a transform may want a gradient at another level than the one that shows
        output = _TracedFunction.apply(*args)[0]  # type: ignore[no-untyped-call]
    return output
