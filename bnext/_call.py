"""One call of a batch norm: from its arguments to an op.

An ordinary eager call goes straight to it (through `BatchNormFunction` if a gradient is wanted).
A tracer, a transform or a tensor subclass leads to a detour. Torch gets what the op refuses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from bnext._activation import ACTIVATIONS
from bnext._autograd import apply, is_inference
from bnext._detours import (
    NATIVE_TYPES,
    check_values,
    compose,
    count,
    find_detour,
    fx_node,
    is_native_counter,
    undone_on_error,
)
from bnext._ops import _C, DEVICES, EAGER

train, inference = EAGER.train, EAGER.inference
# Looked up once: on a small tensor calling is the cost, and each dot takes 10 ns.
is_scripting: Callable[[], bool] = torch.jit.is_scripting
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
is_grad_enabled = torch.is_grad_enabled
is_inference_mode = torch.is_inference_mode_enabled
tracing_state = torch._C._get_tracing_state
transforms_active = torch._C._are_functorch_transforms_active
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def normalize(
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
) -> Tensor:
    """Normalise, add the residual and activate: what every function and module of bnext calls."""
    if (
        type(input) is not Tensor
        or has_torch_function_variadic(weight, bias, residual, running_mean, running_var)
        or is_dynamo_compiling()
        or transforms_active()
        or forward_ad._current_level >= 0
        or tracing_state() is not None
    ):
        node: Tensor | None = fx_node(
            normalize, input, weight, bias, residual, running_mean, running_var,
            num_batches_tracked, training, momentum, eps, act, act_param,
        )  # fmt: skip
        if node is not None:
            return node
        detour = find_detour(input, weight, bias, residual, running_mean, running_var, training)
        if detour is not None:
            return detour(
                input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
                training, momentum, eps, act, act_param,
            )  # fmt: skip
    if (
        (training and input.shape[0] == 1)
        or type(momentum) is not float
        or type(eps) is not float
        or eps <= 0.0
        or running_mean is None
        or running_var is None
    ):
        check_values(input, running_mean, running_var, training, momentum, eps)
    added: tuple[Any, ...] = ()
    if act is not None or residual is not None:
        check_residual(residual)
        added = residual, ACTIVATIONS[act].kind, act_param
    try:
        if (
            is_grad_enabled()
            and (
                (weight is not None and weight.requires_grad)
                or input.requires_grad
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
                or (running_mean is not None and running_mean.requires_grad)
                or (running_var is not None and running_var.requires_grad)
            )
            and not is_inference_mode()
        ):
            return apply(
                input, weight, bias, residual,
                (running_mean, running_var, num_batches_tracked, training, momentum, eps, act,
                 act_param),
            )  # fmt: skip
        if training:
            if num_batches_tracked is not None and is_inference(num_batches_tracked):
                num_batches_tracked.add_(0)  # raises, unless in inference mode
            output: Tensor = train(
                input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                *added,
            )[0]  # fmt: skip
        else:
            output = inference(input, weight, bias, running_mean, running_var, eps, *added)[0]
        return output
    except RuntimeError as error:
        return _after_refusal(
            error, input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
            training, momentum, eps, act, act_param,
        )  # fmt: skip


def check_residual(residual: Tensor | None) -> None:
    """Raise if it is neither a tensor nor absent."""
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(f"residual: expected a tensor or None, got {type(residual).__name__}")


def _after_refusal(error: RuntimeError, *args: Any) -> Tensor:
    """Run what the op refused but torch takes, and raise `error` for the rest.

    The arguments decide, not the error: an error raised after the op must not run it again.
    """
    tensors, num_batches_tracked, training, momentum, *rest = args[:6], *args[6:]
    input, *_, running_mean, running_var = tensors
    if num_batches_tracked is not None and not is_native_counter(num_batches_tracked, input):
        with undone_on_error(num_batches_tracked):
            momentum = count(num_batches_tracked, momentum)
            counted = (*tensors, None, training, momentum, *rest)
            return normalize(*counted)
    if input.is_cuda and "cuda" not in DEVICES:
        raise RuntimeError(
            "bnext was built without CUDA and cannot normalise a tensor on a GPU: "
            f"{_C.build_info()['cuda_missing']}"
        ) from error
    if input.numel() == 0 or not all(_has_kernels(t) for t in tensors if t is not None):
        with undone_on_error(running_mean, running_var, num_batches_tracked):
            return compose(*args)
    if input.dtype not in _DTYPES:
        raise NotImplementedError(str(error)) from error  # as torch does for a dtype
    raise error


def _has_kernels(tensor: Tensor) -> bool:
    return (
        type(tensor) in NATIVE_TYPES
        and tensor.device.type in DEVICES
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized)
    )
