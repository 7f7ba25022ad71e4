"""The gradients of batch normalisation: what forward saves, and how backward uses it.

Two autograd functions share one backward: `BatchNormFunction`, which costs eager the least, and
`_TracedFunction`, whose form Dynamo and functorch need. If the gradient is to be differentiated
again, `_GradientFunction` runs that backward and has a backward of its own.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bnext._activation import ACTIVATIONS, BY_KIND, through
from bnext._ops import DOUBLE_BACKWARD_DEVICES, EAGER, TRACED

__all__ = ["BatchNormFunction", "apply", "composed_backward", "saved_bias", "traced_apply"]

_Grads: TypeAlias = tuple[Tensor | None, ...]
# Each saves a lookup per call.
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
is_grad_enabled = torch.is_grad_enabled
is_inference: Callable[[Tensor], bool] = Tensor.is_inference
# Not saved by a plain batch norm in training: running statistics, bias, residual, mask.
_NO_OPERANDS = (None, None, None, None, None)


def _backward(ctx: Any, grad_out: Tensor | None) -> _Grads:
    """Gradients by the formulas of section 3 of the paper, in one op."""
    if grad_out is None:
        return None, None, None, None, None
    need_input, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
    input, weight, save_stats, *operands = ctx.saved_tensors
    strides = None
    if input is None:  # not needed, but the op takes one, whose format the gradient has
        strides = ctx.strides
        if grad_out.stride() != strides:
            grad_out = grad_out.new_empty_strided(grad_out.shape, strides).copy_(grad_out)
        input = grad_out
    eps, act, act_param = ctx.eps_and_act
    grads: _Grads = (None, None, None, None)
    if is_dynamo_compiling():
        op = TRACED.backward
    elif is_grad_enabled():
        op = _differentiable_backward
    elif act == 0 and not operands and need_input and need_weight and need_bias:
        op = None  # defaults cost less than passing them
        grads = EAGER.backward(grad_out, input, weight, save_stats, eps)
    else:
        op = EAGER.backward
    if op and (act or need_input or need_weight or need_bias):
        grads = op(
            grad_out, input, weight, save_stats, eps, *(operands or _NO_OPERANDS), act, act_param,
            need_input, need_weight, need_bias, need_residual and act != 0,
        )  # fmt: skip
    if strides is not None and grads[0] is not None and grads[0].stride() != strides:
        # The same memory: they differ where the size is 1.
        grads = (grads[0].as_strided(grads[0].shape, strides), *grads[1:])
    if need_residual and not act:
        return *grads[:3], grad_out, None
    return *grads, None


def refuse_gradients_of_statistics(running_mean: Tensor | None, running_var: Tensor | None) -> None:
    """Raise torch's error if a running statistic requires a gradient."""
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
        for tensor in saved:  # includes running statistics, because torch saves them
            if tensor is not None:
                torch.ones((), device=tensor.device, requires_grad=True) * tensor


def saved_bias(weight: Tensor | None, bias: Tensor | None, needs_z: bool) -> Tensor | None:
    """The bias if backward reads it: for z, or for its shape if that is not the weight's."""
    if needs_z or weight is None or bias is None or weight.dim() + bias.dim() != 2:
        return bias
    return None


class BatchNormFunction(torch.autograd.Function):
    """Batch normalisation with gradients for (input, weight, bias, residual), as eager calls it.

    ``rest`` is (running_mean, running_var, num_batches_tracked, training, momentum, eps, act,
    act_param). Fewer arguments make a call cheaper, and a ``forward`` that takes the context costs
    a third of one with `setup_context`.
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
        output: Tensor
        running_mean, running_var, num_batches_tracked, training, momentum, eps, act, param = rest
        if (running_mean is not None and running_mean.requires_grad) or (
            running_var is not None and running_var.requires_grad
        ):
            refuse_gradients_of_statistics(running_mean, running_var)
        # A saved tensor must not change before backward. So only what backward needs is saved: not
        # the output, nor in training the running statistics.
        kind, needs = ACTIVATIONS[act]
        saves_mask = needs == "sign" and residual is not None
        read_bias = saved_bias(weight, bias, kind != 0 and not saves_mask)
        saved_residual = residual if needs == "sum" else None
        added = () if act is None and residual is None else (residual, kind, param, saves_mask)
        if training:
            if (
                is_inference(input)
                or (weight is not None and is_inference(weight))
                or (read_bias is not None and is_inference(read_bias))
                or (running_mean is not None and is_inference(running_mean))
                or (running_var is not None and is_inference(running_var))
                or (num_batches_tracked is not None and is_inference(num_batches_tracked))
            ):
                _refuse_inference_tensors(
                    num_batches_tracked, input, weight, read_bias, running_mean, running_var
                )
            output, save_stats, mask = EAGER.train(
                input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                *added,
            )  # fmt: skip
            if added or read_bias is not None:
                ctx.save_for_backward(
                    input, weight, save_stats, None, None, read_bias, saved_residual, mask
                )
            else:
                ctx.save_for_backward(input, weight, save_stats)
        else:
            output, mask = EAGER.inference(
                input, weight, bias, running_mean, running_var, eps, *added
            )
            # Only the weight's gradient and an activation's read the input. One made in inference
            # mode is refused where it is saved, as by torch.
            ctx.save_for_backward(
                input if kind or ctx.needs_input_grad[1] or is_inference(input) else None,
                weight, None, running_mean, running_var, read_bias, saved_residual, mask,
            )  # fmt: skip
            ctx.strides = output.stride()
        ctx.set_materialize_grads(False)
        ctx.eps_and_act = eps, kind, param
        return output

    backward = staticmethod(_backward)


# The engine calls this with `backward`'s arguments. The inherited one takes 0.4 us to look it up.
BatchNormFunction._backward_cls.apply = _backward  # type: ignore[attr-defined]
# Function.apply takes 3 of 12 us to look for functorch, which the callers of this have done.
apply: Callable[..., Tensor] = super(torch.autograd.Function, BatchNormFunction).apply


class _TracedFunction(torch.autograd.Function):
    """`BatchNormFunction` in the form that Dynamo and functorch need."""

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
        act: str | None,
        act_param: float,
    ) -> tuple[Tensor | None, ...]:
        """Return (output, save_stats, mask)."""
        added = residual, ACTIVATIONS[act].kind, act_param, True
        if training:
            output, save_stats, mask = TRACED.train(
                input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                *added,
            )  # fmt: skip
            return output, save_stats, mask
        output, mask = TRACED.inference(input, weight, bias, running_mean, running_var, eps, *added)
        return output, None, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        input, weight, bias, residual, running_mean, running_var, _, training, *rest = inputs
        _, eps, act, act_param = rest
        _, save_stats, mask = output
        kind, needs = ACTIVATIONS[act]
        saves_mask = needs == "sign" and residual is not None
        if training:
            running_mean = running_var = None
        ctx.mark_non_differentiable(*(t for t in output[1:] if t is not None))
        ctx.save_for_backward(
            input, weight, save_stats, running_mean, running_var,
            saved_bias(weight, bias, kind != 0 and not saves_mask),
            residual if needs == "sum" else None, mask if saves_mask else None,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.eps_and_act = eps, kind, act_param

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None) -> _Grads:
        return *_backward(ctx, grad_out), None, None, None, None, None, None, None


def traced_apply(*args: Any) -> Tensor:
    """Batch normalisation for Dynamo and functorch; the arguments of `_TracedFunction`."""
    output: Tensor
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4])
    if torch.compiler.is_compiling() and not wanted:
        *tensors, _, momentum, eps, act, act_param = args
        residual = tensors.pop(3)
        added = residual, ACTIVATIONS[act].kind, act_param
        output = TRACED.train(*tensors, momentum, eps, *added)[0]
    else:  # a transform may want a gradient at a level other than the visible one
        output = _TracedFunction.apply(*args)[0]
    return output


def _differentiable_backward(grad_out: Tensor, *args: Any) -> _Grads:
    """The backward op in a form that can be differentiated; takes the op's arguments."""
    curved = BY_KIND[args[9]][1].needs == "sum"
    fused = grad_out.device.type in DOUBLE_BACKWARD_DEVICES and not curved
    if fused and not torch._C._are_functorch_transforms_active():
        grads: _Grads = _GradientFunction.apply(grad_out, *args)
        return grads
    return composed_backward(grad_out, *args)


class _GradientFunction(torch.autograd.Function):
    """The backward op, whose own gradients for (grad_out, input, weight) are one op too."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> _Grads:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:4], *args[5:10])
        ctx.numbers = args[4], *args[10:]
        grads: _Grads = EAGER.backward(*args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor | None) -> _Grads:
        grad_out, input, weight, save_stats, *operands = ctx.saved_tensors
        need_grad_out, need_input, need_weight, *others = ctx.needs_input_grad
        nothing = (None,) * len(others)
        if torch.is_grad_enabled():
            return *_third_derivative(ctx, grad_grads), *nothing
        eps, act, act_param, *_ = ctx.numbers
        grad_grad_input, grad_grad_weight, grad_grad_bias, grad_grad_residual = grad_grads
        if grad_grad_input is None:
            grad_grad_input = torch.zeros_like(input)
        # With frozen statistics dx does not depend on the input.
        need_input = need_input and (save_stats is not None or grad_grad_weight is not None)
        grads = EAGER.double_backward(
            grad_grad_input, grad_grad_weight, grad_grad_bias, grad_grad_residual,
            grad_out, input, weight, save_stats, eps, *operands, act, act_param,
            need_grad_out, need_input, need_weight,
        )  # fmt: skip
        return *grads, *nothing


def _third_derivative(ctx: Any, grad_grads: tuple[Tensor | None, ...]) -> _Grads:
    """What `_GradientFunction.backward` returns, from operations that have derivatives."""
    # A partial gradient is wanted. Without aliases it would include the dependence of grad_out, a
    # function of the output, on input and weight.
    saved: list[Any] = list(ctx.saved_tensors)
    saved[:3] = (None if t is None else t.view_as(t) for t in saved[:3])
    eps, *rest = ctx.numbers
    args = (*saved[:4], eps, *saved[4:], *rest)
    grads = composed_backward(*args)
    needs = ctx.needs_input_grad[:3]
    pairs = zip(grads, grad_grads, strict=True)
    by = {g: gg for g, gg in pairs if g is not None and gg is not None}
    wanted = [t for t, need in zip(saved, needs, strict=False) if need]
    found = iter(torch.autograd.grad(
        tuple(by), wanted, tuple(by.values()), create_graph=True, allow_unused=True
    ))  # fmt: skip
    return tuple(next(found) if need else None for need in needs)


def composed_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_stats: Tensor | None,
    eps: float,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    act: int,
    act_param: float,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
    mean_of: Callable[[Tensor], Tensor] | None = None,
) -> _Grads:
    """The backward op from operations that can be differentiated any number of times.

    `mean_of`: from sums over this process's batch to means over all processes'; None: there is one.
    """
    dims = [0, *range(2, input.dim())]
    acc_t = torch.float32 if input.dtype in (torch.bfloat16, torch.float16) else input.dtype

    def batch_mean(values: Tensor) -> Tensor:
        return values.mean(dims, True) if mean_of is None else mean_of(values.sum(dims, True))

    def per_channel(tensor: Tensor) -> Tensor:
        return tensor.to(acc_t).view(-1, *[1] * (input.dim() - 2))

    x, dy = input.to(acc_t), grad_out.to(acc_t)
    if running_mean is not None and running_var is not None:
        mean, var = per_channel(running_mean), per_channel(running_var)
    else:
        mean = batch_mean(x)
        var = batch_mean((x - mean).square())
    invstd = torch.rsqrt(var + eps)
    normalized = (x - mean) * invstd
    if mask is not None:
        with torch.no_grad():  # the op unpacks it: f' is what it makes of a gradient of ones
            slope = TRACED.backward(
                torch.ones_like(input), input, weight, save_stats, eps, running_mean,
                running_var, bias, None, mask, act, act_param, False, False, False, True,
            )[3]  # fmt: skip
        dy = (dy * slope).masked_fill(slope == 0, 0.0)
    elif act:
        z = normalized if weight is None else normalized * per_channel(weight)
        z = z if bias is None else z + per_channel(bias)
        z = z if residual is None else z + residual.to(acc_t)
        dy = through(dy, z, BY_KIND[act][0], act_param)
    grad_input = grad_weight = grad_bias = None
    if need_input:
        grad_input = dy
        if save_stats is not None:
            grad_input = dy - batch_mean(dy) - normalized * batch_mean(dy * normalized)
        grad_input = grad_input * (invstd if weight is None else invstd * per_channel(weight))
        grad_input = grad_input.to(input.dtype)
    if need_weight and weight is not None:
        grad_weight = (dy * normalized).sum(dims).to(weight.dtype)
    if need_bias:
        param = weight if weight is not None else bias
        grad_bias = dy.sum(dims).to(acc_t if param is None else param.dtype)
    return grad_input, grad_weight, grad_bias, dy.to(input.dtype) if need_residual else None
