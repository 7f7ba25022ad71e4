"""Calls that do not go straight to an op: where tracers, transforms and subclasses take them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.utils._python_dispatch import _detect_infra_mode

from bnext._activation import activate
from bnext._autograd import refuse_gradients_of_statistics, traced_apply

_is_tracing: Callable[[], bool] = torch.jit.is_tracing
# The tensors that the ops take as they are: plain ones, and those that only stand in for them.
NATIVE_TYPES: tuple[type, ...] = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
tracing_state = torch._C._get_tracing_state
transforms_active = torch._C._are_functorch_transforms_active
_NO_OVERRIDE = torch._C._disabled_torch_function_impl


def find_detour(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
) -> Callable[..., Tensor] | None:
    """How to run a call that may be no ordinary eager one; None if it is one."""
    if any(map(_overrides, (input, weight, bias, residual, running_mean, running_var))):
        return compose
    if (
        forward_ad._current_level >= 0
        or tracing_state() is not None
        or type(input) not in NATIVE_TYPES
    ):
        return compose
    transformed = transforms_active()
    compiling, ahead_of_time = torch.compiler.is_compiling(), type(input) is FunctionalTensor
    if compiling or ahead_of_time:
        # In eval the compiler folds and fuses ATen's batch norm; in training ours is faster. Those
        # who receive an exported graph know only ATen's.
        exporting = torch.compiler.is_exporting() or (ahead_of_time and _exports_ahead_of_time())
        if not training or transformed or exporting:
            return _counted_first
        return _traced if compiling else None
    if transformed:
        grad = torch._C._functorch.TransformType.Grad
        stack = torch._C._functorch.get_interpreter_stack() or []
        return _traced if all(level.key() == grad for level in stack) else compose
    return None


def _exports_ahead_of_time() -> bool:
    """Whether AOTAutograd is exporting, which `torch.compiler.is_exporting` does not say."""
    mode = _detect_infra_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    return mode is not None and bool(mode.export)


def _overrides(tensor: Any) -> bool:
    """Whether a tensor has its own `__torch_function__`. Active modes do not count."""
    kind = type(tensor)
    return kind not in NATIVE_TYPES and (
        getattr(kind, "__torch_function__", _NO_OVERRIDE) is not _NO_OVERRIDE
    )


def fx_node(function: Callable[..., Tensor], *args: Any) -> Any:
    """The call as a leaf of the graph that torch.fx traces; None if `args` contain no proxy."""
    for arg in args:
        if isinstance(arg, Proxy):
            return arg.tracer.create_proxy("call_function", function, args, {})
    return None


def _counted_first(*args: Any) -> Tensor:
    """`compose` with the counter first, as in torch.nn: graph passes look for this order."""
    num_batches_tracked, training, momentum, *rest = args[6:]
    if num_batches_tracked is not None:
        momentum = count(num_batches_tracked, momentum)
    counted = (*args[:6], None, training, momentum, *rest)
    return compose(*counted)


def _traced(*args: Any) -> Tensor:
    input, weight, bias, residual, running_mean, running_var, *rest = args
    num_batches_tracked, training, momentum, eps, act, act_param = rest
    if not (isinstance(momentum, float | int | None) and isinstance(eps, float | int)):
        # NumPy's scalars, and tensors, whose values are not known yet: torch takes or refuses them.
        return compose(*args)
    check_values(input, running_mean, running_var, training, momentum, eps)
    if torch.is_grad_enabled():
        refuse_gradients_of_statistics(running_mean, running_var)
    if num_batches_tracked is not None and not is_native_counter(num_batches_tracked, input):
        momentum = count(num_batches_tracked, momentum)
        num_batches_tracked = None
    if residual is input:
        residual = input.view_as(input)  # Dynamo does not take a tensor twice
    return traced_apply(
        input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
        training, momentum, eps, act, act_param,
    )  # fmt: skip


def compose(
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
    """A batch norm from ATen's operations, for whoever knows only those (and TorchScript)."""
    if residual is not None and not _is_tracing():
        if residual.shape != input.shape:
            raise RuntimeError(
                f"residual: expected input's shape {input.shape}, got {residual.shape}"
            )
        if residual.device != input.device:
            raise RuntimeError(
                f"residual: expected input's device {input.device}, got {residual.device}"
            )
    factor = 0.0
    if momentum is not None:
        factor = momentum
    elif num_batches_tracked is not None:
        factor = 1.0 / (float(num_batches_tracked) + 1.0)
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if residual is not None:
        output = output + residual
    return activate(output, act, act_param)


def check_values(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> None:
    """Refuse what :func:`torch.nn.functional.batch_norm` refuses beyond shapes and dtypes."""
    without = (running_mean is None) + (running_var is None)
    if training and without == 1 and input.numel() > 0:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if (
        (training and math.prod(input.shape[2:], start=input.shape[0]) == 1)
        or (without and not training)
        or not (momentum is None or _is_float(momentum))
        or not _is_float(eps)
        or eps <= 0.0
    ):
        momentum = 0.0 if momentum is None else momentum
        ask_torch(input, running_mean, running_var, None, None, training, momentum, eps)


def _is_float(number: Any) -> bool:
    return isinstance(number, float) or (isinstance(number, int) and abs(number) < 2**63)


def ask_torch(input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any,
               training: Any, momentum: Any, eps: Any) -> None:  # fmt: skip
    """Raise what the installed torch raises for such arguments; meta tensors suffice for that."""
    input, running_mean, running_var, weight, bias = (
        torch.empty(t.shape, device="meta") if isinstance(t, Tensor) else t
        for t in (input, running_mean, running_var, weight, bias)
    )
    F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def is_native_counter(num_batches_tracked: Tensor, input: Tensor) -> bool:
    """Whether the op can count in it. In anything else with an `add_`, torch counts."""
    return (
        num_batches_tracked.dtype is torch.int64
        and num_batches_tracked.numel() == 1
        and num_batches_tracked.device == input.device
    )


def count(num_batches_tracked: Tensor, momentum: float | None) -> float:
    """Count a batch and return the weight of its statistics."""
    num_batches_tracked.add_(1)
    return 1.0 / float(num_batches_tracked) if momentum is None else momentum


@contextmanager
def undone_on_error(*state: Tensor | None) -> Iterator[None]:
    """Restore the values of running statistics and counter if a call fails."""
    before = [(t, t.detach().clone()) for t in state if t is not None and _has_values(t)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        raise


def _has_values(tensor: Tensor) -> bool:
    """Whether a batch norm may write to a tensor, and its values can be compared."""
    return (
        tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_nested or isinstance(tensor, FakeTensor))
        and not (isinstance(tensor, FunctionalTensor) or transforms_active())
    )
