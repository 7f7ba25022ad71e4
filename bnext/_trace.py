"""Traces one module's forward by torch.fx and leaves the module and the process as they were.

All children are leaves. The graph is that of calls without optional arguments, and where a forward
asks for the type of an input, of calls with inputs of one type. A forward whose graph would not be
right for each of these is refused.
"""

import abc
import builtins
import contextlib
import inspect
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast, get_args

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import TorchDispatchMode

from bnext._snapshot import Snapshot, names

__all__ = ["IN_PLACE_OPERATORS", "Traced", "trace"]

IN_PLACE_OPERATORS = {
    getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "imatmul")
}


class Traced(NamedTuple):
    """A forward's graph, and the inputs for which it asks whether they are of a type."""

    graph: fx.Graph
    asked: tuple[str, ...]


def trace(module: nn.Module, kind: type[nn.Module], input_type: type = Tensor) -> Traced | str:
    """The graph of `kind.forward` on the module, or why there is none that fits every call.

    It takes only the arguments that have no default. An input that the forward asks about is taken
    for one of :attr:`input_type`.
    """
    if "forward" in vars(module):
        return "is the instance's own"
    parameters = [*inspect.signature(kind.forward).parameters.values()][1:]
    required = [p for p in parameters if p.default is p.empty]
    kinds = {p.kind for p in required}
    if others := kinds - {*_OPTIONAL, inspect.Parameter.POSITIONAL_OR_KEYWORD}:
        return f"has arguments that are {min(others).description}"
    inputs = [p.name for p in required if p.kind not in _OPTIONAL]
    if kinds and not inputs:
        return "takes any arguments"
    found = _attempt(module, kind, inputs, input_type, inline=True)
    if isinstance(found, str) and found.startswith(_UNTRACEABLE):
        # Perhaps for what a function of the user does, which a call in the graph can do.
        around = _attempt(module, kind, inputs, input_type, inline=False)
        return found if isinstance(around, str) else around
    return found


def _attempt(
    module: nn.Module, kind: type[nn.Module], inputs: list[str], input_type: type, inline: bool
) -> Traced | str:
    """Trace once, through the functions that forward calls or around them."""
    own, training = type(module), {m: m.training for m in module.modules()}
    try:
        snapshot = Snapshot(module, kind.forward)
    except Exception as error:  # a user's object may raise anything when looked at
        return f"holds what cannot be put back: {error or type(error).__name__}"
    effects, found = _NoEffects(), list[Traced]()
    reason: str | None = None
    tracer = _Tracer(inputs, input_type, [] if inline else snapshot.functions)
    try:
        module.__class__ = kind
        for mode in (True, False):
            for m in training:
                m.training = mode
            with effects, _answering(tracer, snapshot.functions):
                graph = tracer.trace(module)
                for node in graph.nodes:  # else the code that is written of it registers them
                    node.meta.pop("is_wrapped", None)
                found.append(Traced(graph, tuple(sorted(tracer.asked))))
            if any(m.training is not mode for m in training):
                reason = "changes the module's training mode"
    except Exception as error:  # a user's forward may raise anything where it finds no values
        message = str(error).strip().partition("\n")[0]
        reason = f"{_UNTRACEABLE}: {message or type(error).__name__}"
    finally:
        module.__class__ = own
        for m, mode in training.items():
            m.training = mode
        changed = snapshot.restore()
    if changed is not None:
        return f"changes {changed}"
    if tracer.reason is not None:  # the forward may have caught the error
        reason = f"{_UNTRACEABLE}: {tracer.reason}"
    reason = effects.reason or reason
    if reason is None and str(found[0].graph) != str(found[1].graph):
        reason = "differs between training and eval"
    return reason or found[0]


_UNTRACEABLE = "cannot be traced"
# They look at the type of what stands for a list.
_LIST_FUNCTIONS: tuple[Callable[..., Any], ...] = (torch.cat, torch.concat, torch.stack)
_OPTIONAL = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_CHECKPOINTS = torch.utils.checkpoint.checkpoint, torch.utils.checkpoint.checkpoint_sequential


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

    def __init__(
        self, inputs: list[str], input_type: type, leaves: list[types.FunctionType]
    ) -> None:
        super().__init__(autowrap_functions=(*_LIST_FUNCTIONS, *_CHECKPOINTS, *leaves))
        self._autowrap_search += [torch, torch.utils.checkpoint]
        self.asked: set[str] = set()
        self.reason: str | None = None
        self._inputs, self._input_type, self._modes = inputs, input_type, _modes()

    def create_args_for_root(self, root_fn: Any, *_: Any, **__: Any) -> tuple[Any, list[Any]]:
        annotations = inspect.unwrap(root_fn).__annotations__
        inputs = [
            self.create_proxy("placeholder", name, (), {}, type_expr=annotations.get(name))
            for name in self._inputs
        ]
        return root_fn, [self.root, *inputs]

    def refuse(self, reason: str) -> TraceError:
        """The error to raise; the trace is lost even if the forward catches it."""
        self.reason = reason
        return TraceError(reason)

    def answer(self, value: fx.Proxy, classinfo: Any) -> bool:
        """``isinstance(value, classinfo)`` of an input, if its type decides that."""
        if value.node.op != "placeholder":
            raise self.refuse("asks for the type of a value that is no input")
        if not all(
            getattr(type(c), "__instancecheck__", None) in _BY_TYPE for c in _each(classinfo)
        ):
            raise self.refuse("asks for more than the type of a value")
        self.asked.add(str(value.node.target))
        return issubclass(self._input_type, classinfo)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise self.refuse("branches on a value, and a graph has no branches")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise self.refuse("iterates over a value, whose length a graph does not know")

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Proxy:
        if target in _CHECKPOINTS:
            raise self.refuse("runs a part under torch.utils.checkpoint, which is left as it is")
        return super().create_proxy(kind, target, *args, **kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:  # a node does not record the mode it must run in
            raise self.refuse("switches gradients, inference mode or autocast on or off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Value:
            return a.node  # before torch.fx asks for its type
        attributes = {*vars(self.root)}
        argument = super().create_arg(a)
        if kept := vars(self.root).keys() - attributes:  # fx put there what it cannot write down
            for name in kept:
                delattr(self.root, name)
            raise self.refuse(f"computes with a {type(a).__name__} that is no part of the module")
        return argument


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"),
    )  # fmt: skip


class _Value(fx.Proxy):
    """A proxy whose `+=` does not become `+`, and whose type only `_answering` tells."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # isinstance looks here
        raise cast(_Tracer, self.tracer).refuse("asks for the type of a value")


@contextlib.contextmanager
def _answering(tracer: _Tracer, functions: list[types.FunctionType]) -> Iterator[None]:
    """Let these functions ask isinstance about a value, and modules be given one."""

    def is_instance(value: Any, classinfo: Any) -> bool:
        if type(value) is _Value:
            return tracer.answer(value, classinfo)
        return builtins.isinstance(value, classinfo)

    def set_attribute(module: nn.Module, name: str, value: Any) -> None:
        if type(value) is _Value:
            raise tracer.refuse(f"changes the module's {name}")
        set_any(module, name, value)

    scopes = [
        function.__globals__
        for function in functions
        if "isinstance" in names(function.__code__)
        and function.__globals__.setdefault("isinstance", is_instance) is is_instance
    ]
    set_any, nn.Module.__setattr__ = nn.Module.__setattr__, set_attribute  # type: ignore
    try:
        yield
    finally:
        nn.Module.__setattr__ = set_any  # type: ignore[method-assign]
        for scope in scopes:
            scope.pop("isinstance", None)


_BY_TYPE = type.__instancecheck__, abc.ABCMeta.__instancecheck__


def _each(classinfo: Any) -> Iterator[Any]:
    if isinstance(classinfo, tuple | types.UnionType):
        for kind in classinfo if isinstance(classinfo, tuple) else get_args(classinfo):
            yield from _each(kind)
    else:
        yield classinfo


def _in_place(target: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _target in IN_PLACE_OPERATORS:
    setattr(_Value, f"__{_target.__name__}__", _in_place(_target))
