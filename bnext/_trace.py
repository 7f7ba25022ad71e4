"""Traces one module's forward by torch.fx and leaves the module and the process as they were.

All children are leaves. A forward whose graph would not be right for every call is refused.
"""

import inspect
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import TorchDispatchMode

from bnext._snapshot import Snapshot

__all__ = ["IN_PLACE_OPERATORS", "trace"]

IN_PLACE_OPERATORS = {
    getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "imatmul")
}


def trace(module: nn.Module, kind: type[nn.Module]) -> fx.Graph | str:
    """The graph of `kind.forward` on the module, or why there is none that fits every call."""
    if "forward" in vars(module):
        return "is the instance's own"
    parameters = [*inspect.signature(kind.forward).parameters.values()][1:]
    if any(p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return "has optional arguments"
    own, training = type(module), {m: m.training for m in module.modules()}
    try:
        snapshot = Snapshot(module, kind.forward)
    except Exception as error:  # a user's object may raise anything when looked at
        return f"holds what cannot be put back: {error or type(error).__name__}"
    effects, graphs = _NoEffects(), list[fx.Graph]()
    reason: str | None = None
    try:
        module.__class__ = kind
        for mode in (True, False):
            for m in training:
                m.training = mode
            with effects:
                graphs.append(_Tracer().trace(module))
            if any(m.training is not mode for m in training):
                reason = "changes the module's training mode"
    except Exception as error:  # a user's forward may raise anything where it finds no values
        message = str(error).strip().partition("\n")[0]
        reason = f"cannot be traced: {message or type(error).__name__}"
    finally:
        module.__class__ = own
        for m, mode in training.items():
            m.training = mode
        changed = snapshot.restore()
    if changed is not None:
        return f"changes {changed}"
    if (reason := effects.reason or reason) is not None:
        return reason
    return graphs[0] if str(graphs[0]) == str(graphs[1]) else "differs between training and eval"


class _NoEffects(TorchDispatchMode):
    """Refuses operations that would change more than a graph while a forward is traced."""

    reason: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.reason = "changes a tensor that is no parameter or buffer"
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self.reason = "draws random numbers"
        if self.reason is not None:
            raise TraceError(self.reason)
        return func(*args, **(kwargs or {}))


class _Tracer(fx.Tracer):
    """Traces one forward; whatever it calls is a leaf."""

    proxy_buffer_attributes = True  # else a forward that changes a buffer would do so now

    def __init__(self) -> None:
        super().__init__()
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:  # a node does not record the mode it must run in
            raise TraceError("switches gradients, inference mode or autocast on or off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        attributes = {*vars(self.root)}
        argument = super().create_arg(a)
        if kept := vars(self.root).keys() - attributes:  # fx put there what it cannot write down
            for name in kept:
                delattr(self.root, name)
            raise TraceError(f"computes with a {type(a).__name__} that is no part of the module")
        return argument


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
    )  # fmt: skip


class _Value(fx.Proxy):
    """A proxy that pretends to be a tensor and nothing else, and whose `+=` does not become `+`."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance looks here. A forward that asks may differ for another kind of argument.
        if "isinstance" in sys._getframe(1).f_code.co_names and not _is_exempt(sys._getframe(1)):
            raise TraceError("asks for the type of a value")
        return _Value


def _is_exempt(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(("torch.", "bnext."))


def _in_place(target: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _target in IN_PLACE_OPERATORS:
    setattr(_Value, f"__{_target.__name__}__", _in_place(_target))
