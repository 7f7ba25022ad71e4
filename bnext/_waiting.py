"""What a forward that `fuse` has rewritten calls: a batch norm there waits for what follows it.

Each function does what the model's own forward did at that place, unless a batch norm waits. They
look at the modules at each call: what another tool has replaced, hooked or given a ``forward`` of
its own is called as before, and so is everything if torch.fx traces the input.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from bnext import modules
from bnext._activation import of_module, parameter

__all__ = [
    "OURS", "Activate", "Waiting", "add", "add_into", "add_onto", "call", "can_pass", "head_of",
    "is_sequential", "is_watched", "result", "sequential_head",
]  # fmt: skip

OURS: set[type[nn.Module]] = {modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d}

# Modules that return their input in eval and where this attribute is 0.
_DROPOUTS = {
    "torch.nn.modules.dropout.Dropout": "p",
    "torch.nn.modules.dropout.Dropout1d": "p",
    "torch.nn.modules.dropout.Dropout2d": "p",
    "torch.nn.modules.dropout.Dropout3d": "p",
    "torchvision.ops.stochastic_depth.StochasticDepth": "p",
    "timm.layers.drop.DropPath": "drop_prob",
}


class Waiting(NamedTuple):
    """``bn(input) + residual``, not computed yet."""

    bn: nn.Module
    input: Tensor
    residual: Tensor | None = None

    def compute(self, act: str | None = None, act_param: float | None = None) -> Tensor:
        """The activated sum, in one pass."""
        if act is None and self.residual is None:
            return cast(Tensor, self.bn(self.input))
        bn = cast(modules._BatchNorm, self.bn)
        return bn._normalize(self.input, self.residual, act, parameter(act, act_param))


def call(module: nn.Module, value: Any) -> Any:
    """``module(value)``, which may wait."""
    watched = is_watched(module)
    if type(value) is Waiting:
        if not watched:
            act = of_module(module)
            if act is not None and act[0] is not None:
                return value.compute(*act)
            if can_pass(module) and not _drops(module):
                return value
        value = value.compute()
    if watched or not isinstance(value, Tensor):
        return module(value)
    if type(module) in OURS:
        return Waiting(module, value)
    head = head_of(module)
    return module(value) if head is None else head(module, value)


def add(value: Any, other: Any) -> Any:
    """``value + other``, which may wait."""
    if type(value) is Waiting and value.residual is None and isinstance(other, Tensor):
        return Waiting(value.bn, value.input, other)
    return result(value) + other


def add_into(value: Any, other: Any) -> Any:
    """``value += other``, which may wait."""
    if type(value) is Waiting and value.residual is None and _is_like(other, value.input):
        return Waiting(value.bn, value.input, other)
    return operator.iadd(result(value), other)


def add_onto(value: Any, other: Any) -> Any:
    """``other += value``, which may wait; nothing else reads ``other``."""
    if type(value) is Waiting and value.residual is None and _is_like(other, value.input):
        return Waiting(value.bn, value.input, other)
    return operator.iadd(other, result(value))


def _is_like(other: Any, input: Tensor) -> bool:
    """Whether adding in place could neither cast nor broadcast, nor raise."""
    return (
        isinstance(other, Tensor)
        and other.dtype == input.dtype
        # torch.jit.trace would record the comparison.
        and (torch.jit.is_tracing() or other.shape == input.shape)
    )


@dataclass(frozen=True)
class Activate:
    """An activation that a forward calls as a function or, by its name, as a method."""

    function: Callable[..., Any] | str
    act: str
    act_param: float | None

    @property
    def __name__(self) -> str:  # torch.fx writes it
        return f"activate_{self.act}"

    def __call__(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if type(value) is Waiting:
            return value.compute(self.act, self.act_param)
        if isinstance(self.function, str):
            return getattr(value, self.function)(*args, **kwargs)
        return self.function(value, *args, **kwargs)


def result(value: Any) -> Any:
    """What waits, computed."""
    return value.compute() if type(value) is Waiting else value


def can_pass(module: nn.Module) -> bool:
    """Whether a module returns its input, at least in eval."""
    return type(module) is nn.Identity or _name(module) in _DROPOUTS


def _drops(module: nn.Module) -> bool:
    attribute = _DROPOUTS.get(_name(module))
    return attribute is not None and module.training and getattr(module, attribute) != 0


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def head_of(module: nn.Module) -> Callable[[nn.Module, Any], Any] | None:
    """A module's forward that leaves the batch norm at its end waiting, if it has one."""
    kind = type(module)
    if "_head" in vars(kind):  # not of a subclass, which is another tool's
        return cast(Any, kind)._head  # type: ignore[no-any-return]
    return sequential_head if is_sequential(kind) else None


def is_sequential(kind: type[nn.Module]) -> bool:
    """Whether a class runs its modules one after the other, and that is all."""
    return kind.forward is nn.Sequential.forward and kind.__call__ is nn.Module.__call__


def sequential_head(self: nn.Module, value: Any) -> Any:
    """:class:`torch.nn.Sequential`'s forward, at whose end a batch norm may wait."""
    for module in cast(nn.Sequential, self):
        value = call(module, value)
    return value


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module may do more than its class's ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )
