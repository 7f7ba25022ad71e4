"""Fuses a batch norm, a residual addition and a ReLU, for :func:`bnext.convert`.

Batch norms and ReLUs stay as they are. The module that calls them gets a subclass of its own class,
whose ``forward`` calls `batch_norm_relu` instead; that looks at the two modules at each call.

Each module's own ``forward`` is traced by torch.fx with all its children as leaves, so one that
cannot be traced loses only its own fusions. That of ``nn.Sequential`` needs no tracing.
"""

import functools
import importlib
import itertools
import operator
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as hooks

from bnext import modules
from bnext._trace import IN_PLACE_OPERATORS, trace

__all__ = ["FusedForward", "batch_norm_relu", "find", "fuse", "fused", "unfuse"]

_OURS = {modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d}
_FUSIBLE: set[type] = {*_OURS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}
_RELUS: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS: set[Any] = {operator.add, torch.add, "add"}
_IN_PLACE_ADDS: set[Any] = {operator.iadd, "add_"}


def batch_norm_relu(
    bn: nn.Module,
    relu: nn.Module | None,
    input: Any,
    residual: Any = None,
    add_in_place: bool = False,
) -> Tensor:
    """Return ``relu(bn(input) + residual)``, in one pass if the modules are still what was fused.

    If another tool has replaced them, hooked them or overridden their ``forward``, or if torch.fx
    traces the input, they are called one after the other.
    """
    if (
        type(bn) in _OURS
        and not _is_watched(bn)
        and (relu is None or (type(relu) is nn.ReLU and not _is_watched(relu)))
        and isinstance(input, Tensor)
        and (residual is None or isinstance(residual, Tensor))
        and (not add_in_place or cast(Tensor, residual).dtype == input.dtype)
    ):
        return cast(modules._BatchNorm, bn)._normalize(input, residual, "relu", 0.0)
    output = bn(input)
    if residual is not None:
        output = (operator.iadd if add_in_place else operator.add)(output, residual)
    return F.relu(output) if relu is None else relu(output)


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
        or "forward" in module.__dict__
    )


class FusedForward:
    """First base of the class of a module whose ``forward`` holds fused calls."""

    _original: type[nn.Module]
    _recipe: tuple[Callable[..., type[nn.Module]], tuple[Any, ...]]  # makes this class again
    _fused: tuple[str, ...]  # the names of the batch norms

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, self._recipe, *super().__reduce_ex__(protocol)[2:]


def _new(make: Callable[..., type[nn.Module]], arguments: tuple[Any, ...]) -> nn.Module:
    kind = make(*arguments)
    return kind.__new__(kind)


def _subclass(original: type[nn.Module], **contents: Any) -> type[nn.Module]:
    names = ("__module__", "__qualname__", "__doc__")
    contents |= {name: getattr(original, name) for name in names}
    return type(original.__name__, (FusedForward, original), {**contents, "_original": original})


@dataclass(frozen=True)
class _Module:
    """A module among a forward's globals; pickle does not take the module itself."""

    name: str


@functools.cache  # blocks that are alike share a class, so they compile once
def _fused_class(
    original: type[nn.Module],
    source: str,
    scripted_source: str,
    names: tuple[tuple[str, Any], ...],
    fused: tuple[str, ...],
) -> type[nn.Module]:
    scope = {k: importlib.import_module(v.name) if isinstance(v, _Module) else v for k, v in names}
    forward = fx.graph_module._forward_from_src(source, scope)
    # torch.jit.script compiles this one: it knows no functions of modules.
    scripted = fx.graph_module._forward_from_src(scripted_source, dict(scope))
    forward.__wrapped__ = scripted  # type: ignore[attr-defined]
    recipe = _fused_class, (original, source, scripted_source, names, fused)
    return _subclass(original, forward=forward, _recipe=recipe, _fused=fused)


@functools.cache
def _fused_sequential(original: type[nn.Module]) -> type[nn.Module]:
    recipe = _fused_sequential, (original,)
    return _subclass(original, forward=_sequential_forward, _recipe=recipe)


def _sequential_forward(self: nn.Sequential, input: Any) -> Any:
    bn = None  # not called yet: the next module may be its ReLU
    for module in self:
        if bn is not None:
            if type(module) is nn.ReLU:
                input, bn = batch_norm_relu(bn, module, input), None
                continue
            input, bn = bn(input), None
        if type(module) in _OURS:
            bn = module
        else:
            input = module(input)
    return input if bn is None else bn(input)


_sequential_forward.__wrapped__ = nn.Sequential.forward  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Fusion:
    """Calls of a traced forward that become one: relu(bn(x)), or relu(bn(x) + residual)."""

    bn: fx.Node
    add: fx.Node | None
    relu: fx.Node

    @property
    def residual(self) -> tuple[fx.Node, ...]:
        """The other summand, if there is one."""
        if self.add is None:
            return ()
        return tuple(n for n in self.add.all_input_nodes if n is not self.bn)


@dataclass(frozen=True)
class _Plan:
    """What a module becomes, and which of the batch norms that it calls are fused then."""

    kind: type[nn.Module]
    called: set[nn.Module]
    fused: set[nn.Module]


def fuse(model: nn.Module) -> None:
    """Fuse in place what `find` finds in :attr:`model`."""
    for module in [*model.modules()]:
        if _is_parent(module) and isinstance(plan := _plan(module), _Plan) and plan.fused:
            module.__class__ = plan.kind


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in [*model.modules()]:
        module.__class__ = _own_class(module)


def fused(model: nn.Module) -> set[nn.Module]:
    """The batch norms that their callers fuse with a ReLU."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if not isinstance(module, FusedForward):
            continue
        if isinstance(module, nn.Sequential) and type(module).forward is _sequential_forward:
            found |= {*_before_a_relu(module)}
        else:
            children = dict(module.named_modules(remove_duplicate=False))
            found |= {children[name] for name in module._fused if name in children}
    return {bn for bn in found if type(bn) in _OURS}


def find(model: nn.Module) -> tuple[set[nn.Module], dict[nn.Module, str]]:
    """The batch norms that `fuse` has fused or would fuse, and why it does not fuse the others."""
    names = {module: name for name, module in model.named_modules()}
    why = {bn: "no forward that could be traced calls it" for bn in names if type(bn) in _FUSIBLE}
    if model in why:
        why[model] = "it is the model itself"
    found = fused(model)
    for module, name in names.items():
        if not _is_parent(module):
            continue
        plan = _plan(module)
        if isinstance(plan, str):
            reason = f"forward of {name or 'the model'} {plan}"
            why |= {child: reason for child in module.children() if child in why}
        else:
            reason = "no ReLU, nor an addition and a ReLU, alone takes its output"
            why |= dict.fromkeys(plan.called, reason)
            found |= plan.fused
    return found, {bn: reason for bn, reason in why.items() if bn not in found}


def _before_a_relu(module: nn.Module) -> Iterator[nn.Module]:
    for bn, relu in itertools.pairwise(module.children()):
        if type(bn) in _FUSIBLE and type(relu) is nn.ReLU:
            yield bn


def _own_class(module: nn.Module) -> type[nn.Module]:
    # Only of the class itself: a subclass of a fused class is another tool's.
    kind: type[nn.Module] = vars(type(module)).get("_original", type(module))
    return kind


def _is_parent(module: nn.Module) -> bool:
    return (
        type(module) not in _FUSIBLE
        and any(type(child) in _FUSIBLE for child in module.modules())
        and not issubclass(_own_class(module), FusedForward)
        and type(module).forward is not nn.Module.forward  # ModuleList and the like
    )


def _plan(module: nn.Module) -> _Plan | str:
    """What fusing makes of a module, or why its forward stays."""
    if isinstance(module, fx.GraphModule):
        return "is torch.fx's, which writes it anew: fuse the model before it is traced"
    kind = _own_class(module)
    if kind.forward is nn.Sequential.forward and "forward" not in vars(module):
        called = {child for child in module.children() if type(child) in _FUSIBLE}
        new = _fused_sequential(kind)  # type: ignore[arg-type]
        return _Plan(new, called, {*_before_a_relu(module)})
    graph = trace(module, kind)
    if isinstance(graph, str):
        return graph
    scripted = graph.python_code("self")
    called, targets, calls = set(), [], [n for n in graph.nodes if n.op == "call_module"]
    for node in calls:
        bn = module.get_submodule(str(node.target))
        if type(bn) in _FUSIBLE:
            called.add(bn)
            if (fusion := _match(node, module)) is not None:
                _rewrite(graph, fusion)
                targets.append(str(node.target))
    graph.lint()
    code = graph.python_code("self")
    used = {*re.findall(r"\w+", code.src + scripted.src)}
    names = tuple(
        (name, _Module(value.__name__) if isinstance(value, types.ModuleType) else value)
        for name, value in {**scripted.globals, **code.globals}.items()
        if name in used
    )
    new = _fused_class(kind, code.src, scripted.src, names, tuple(targets))  # type: ignore[arg-type]
    return _Plan(new, called, {module.get_submodule(target) for target in targets})


def _match(bn: fx.Node, module: nn.Module) -> _Fusion | None:
    if len(bn.args) != 1 or bn.kwargs:
        return None
    add, node = None, _only_user(bn)
    if node is not None and _calls(node, _ADDS | _IN_PLACE_ADDS):
        if len(node.args) != 2 or node.kwargs:  # torch.add's alpha
            return None
        a, b = node.args
        if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return None
        if _calls(node, _IN_PLACE_ADDS) and a is not bn:
            return None  # changes the other tensor
        add, node = node, _only_user(node)
    if node is None or not _is_relu(node, module):
        return None
    tensors = {*bn.all_input_nodes, *(add.all_input_nodes if add else ())}
    other = bn.next
    while other is not node:  # the fused call, at the ReLU's place, reads everything there
        if other is not add and _mutates(other, module, tensors):
            return None
        other = other.next
    return _Fusion(bn, add, node)


def _mutates(node: fx.Node, module: nn.Module, tensors: set[fx.Node]) -> bool:
    """Whether a call may change one of the tensors, or what a batch norm holds."""
    if node.op == "call_module":
        in_place = getattr(module.get_submodule(str(node.target)), "inplace", False)
        return bool(in_place and tensors & {*node.all_input_nodes})
    # A function may do so through a view.
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return (
        node.target in IN_PLACE_OPERATORS or name.endswith("_") or bool(node.kwargs.get("inplace"))
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _calls(node: fx.Node, targets: set[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _is_relu(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    return _calls(node, _RELUS)


def _rewrite(graph: fx.Graph, fusion: _Fusion) -> None:
    with graph.inserting_before(fusion.relu):
        relu = None
        if fusion.relu.op == "call_module":
            relu = graph.get_attr(str(fusion.relu.target))
        bn = graph.get_attr(str(fusion.bn.target))
        in_place = (True,) if fusion.add and _calls(fusion.add, _IN_PLACE_ADDS) else ()
        arguments = (bn, relu, *fusion.bn.args, *fusion.residual, *in_place)
        call = graph.call_function(batch_norm_relu, arguments)
    fusion.relu.replace_all_uses_with(call)
    for node in (fusion.relu, fusion.add, fusion.bn):
        if node is not None:
            graph.erase_node(node)
