"""The gradients of batch normalisation: what forward saves, and what backward makes of it.

Two autograd functions share one backward: `BatchNormFunction` is what eager calls, at the least
cost; `_TracedFunction` has the form that Dynamo and functorch ask for. Where the gradient is to be
differentiated again, `_GradientFunction` runs that backward, and has one of its own.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bnext._ops import DOUBLE_BACKWARD_DEVICES, EAGER, TRACED

__all__ = ["BatchNormFunction", "apply", "traced_apply"]

_Grads: TypeAlias = tuple[Tensor | None, ...]
# One lookup less a call each.
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
is_grad_enabled = torch.is_grad_enabled
is_inference: Callable[[Tensor], bool] = Tensor.is_inference


def _backward(ctx: Any, grad_out: Tensor | None) -> _Grads:
    """Gradients by the formulas of the paper's section 3, in one op."""
    if grad_out is None:
        return None, None, None, None, None
    need_input, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
    eps, relu = ctx.eps_and_relu
    grads: _Grads = (None, None, None, None)
    if relu or need_input or need_weight or need_bias:
        op = _differentiable_backward if is_grad_enabled() else EAGER.backward
        if is_dynamo_compiling():
            op = TRACED.backward
        grads = op(
            grad_out, *ctx.saved_tensors, eps, relu, need_input, need_weight, need_bias,
            need_residual and relu,
        )  # fmt: skip
    if need_residual and not relu:
        return *grads[:3], grad_out, None
    return *grads, None


def refuse_gradients_of_statistics(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Raise torch's error where a running statistic asks for a gradient."""
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                "The function 'native_batch_norm' is not differentiable with respect to argument "
                f"'{name}'. This input cannot have requires_grad True."
            )


def _refuse_inference_tensors(counter: Tensor | None, *saved: Tensor | None) -> None:
    """Let torch refuse what it cannot count in or save, before the op has run."""
    if counter is not None:
        counter.add_(0)
    with torch.enable_grad():
        for tensor in saved:  # running statistics too: torch saves them
            if tensor is not None:
                torch.ones((), device=tensor.device, requires_grad=True) * tensor


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
        if (running_mean is not None and running_mean.requires_grad) or (
            running_var is not None and running_var.requires_grad
        ):
            refuse_gradients_of_statistics(running_mean, running_var)
        # Nothing is saved that backward does without, since all of it may change before: not the
        # output, not in training the running statistics, and the bias only for the sign of a ReLU,
        # or for its shape where that is not the weight's.
        if not relu and weight is not None and bias is not None and weight.dim() + bias.dim() == 2:
            saved_bias = None
        else:
            saved_bias = bias
        if training:
            if (
                is_inference(input)
                or (weight is not None and is_inference(weight))
                or (saved_bias is not None and is_inference(saved_bias))
                or (running_mean is not None and is_inference(running_mean))
                or (running_var is not None and is_inference(running_var))
                or (num_batches_tracked is not None and is_inference(num_batches_tracked))
            ):
                _refuse_inference_tensors(
                    num_batches_tracked, input, weight, saved_bias, running_mean, running_var
                )
            output, save_stats, relu_mask = EAGER.train(
                input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
                momentum, eps, relu, relu and residual is not None,
            )  # fmt: skip
            ctx.save_for_backward(input, weight, saved_bias, relu_mask, save_stats, None, None)
        else:
            output, relu_mask = EAGER.inference(
                input, weight, bias, residual, running_mean, running_var, eps, relu,
                relu and residual is not None,
            )  # fmt: skip
            ctx.save_for_backward(
                input, weight, saved_bias, relu_mask, None, running_mean, running_var
            )
        ctx.set_materialize_grads(False)
        ctx.eps_and_relu = eps, relu
        return output

    backward = staticmethod(_backward)


# The engine calls this with what `backward` takes; the one inherited looks `backward` up: 0.4 us.
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
        input, weight, bias, residual, running_mean, running_var, _, training, _, eps, relu = inputs
        _, save_stats, relu_mask = output
        if training:
            running_mean = running_var = None
        if not relu and weight is not None and bias is not None and weight.dim() + bias.dim() == 2:
            bias = None
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        if not relu or residual is None:
            relu_mask = None  # it is empty
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
        output = TRACED.train(*args[:7], *args[8:], True)[0]
    else:  # a transform may want a gradient at another level than the one that shows
        output = _TracedFunction.apply(*args)[0]
    return output


def _differentiable_backward(grad_out: Tensor, *args: Any) -> _Grads:
    """The backward op in a form that can be differentiated; its arguments."""
    fused = grad_out.device.type in DOUBLE_BACKWARD_DEVICES
    if fused and not torch._C._are_functorch_transforms_active():
        grads: _Grads = _GradientFunction.apply(grad_out, *args)
        return grads
    return _composed_backward(grad_out, *args)


class _GradientFunction(torch.autograd.Function):
    """The backward op, and its own gradients for (grad_out, input, weight) in one op."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> _Grads:
        """Run the backward op, whose arguments these are, and save what it was given."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:8])
        ctx.eps_relu_needs = args[8:]
        grads: _Grads = EAGER.backward(*args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> _Grads:
        """Gradients by the formulas of csrc/formulas.h."""
        grad_out, input, weight, *rest = ctx.saved_tensors
        need_grad_out, need_input, need_weight, *others = ctx.needs_input_grad
        nothing = (None,) * len(others)
        if torch.is_grad_enabled():
            return *_third_derivative(ctx, grad_grads), *nothing
        eps, relu, *_ = ctx.eps_relu_needs
        save_stats = rest[2]
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_grad_residual = grad_grads
        if grad_grad_input is None:
            grad_grad_input = torch.zeros_like(input)
        # With frozen statistics the gradient for the input does not depend on the input.
        need_input = need_input and (save_stats is not None or grad_grad_weight is not None)
        grads = EAGER.double_backward(
            grad_grad_input, grad_grad_weight, grad_grad_bias, grad_grad_residual,
            grad_out, input, weight, *rest, eps, relu, need_grad_out, need_input, need_weight,
        )  # fmt: skip
        return *grads, *nothing


def _third_derivative(ctx: Any, grad_grads: tuple[Tensor | None, ...]) -> _Grads:
    """What `_GradientFunction.backward` returns, from operations that have derivatives."""
    # The gradient wanted is a partial one: through aliases, or it would count what grad_out, a
    # function of the output, owes to input and weight as well.
    saved: list[Any] = list(ctx.saved_tensors)
    saved[:3] = (None if t is None else t.view_as(t) for t in saved[:3])
    grads = _composed_backward(*saved, *ctx.eps_relu_needs)
    needs = ctx.needs_input_grad[:3]
    by = {
        g: gg for g, gg in zip(grads, grad_grads, strict=True) if g is not None and gg is not None
    }
    found = iter(
        torch.autograd.grad(
            tuple(by), [t for t, need in zip(saved, needs, strict=False) if need],
            tuple(by.values()), create_graph=True, allow_unused=True,
        )
    )  # fmt: skip
    return tuple(next(found) if need else None for need in needs)


def _composed_backward(
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
