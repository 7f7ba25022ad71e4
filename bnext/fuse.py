"""Finding what :func:`bnext.convert` can fuse: a batch norm, a residual addition, a ReLU.

Each module's own ``forward`` is traced by torch.fx with all its children as leaves, so that one
that cannot be traced costs nothing but its own fusions. Where the ReLU is a module that only this
batch norm feeds, the two modules change class and no code changes. Else the module gets a subclass
of its own class, whose ``forward`` is the traced code with the fused calls in it.
"""

import functools
import importlib
import inspect
import operator
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from bnext import modules

__all__ = ["Fusion", "FusedForward", "FusedReLU", "find", "fuse", "unfuse"]

_ACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: modules.BatchNormAct1d,
    nn.BatchNorm2d: modules.BatchNormAct2d,
    nn.BatchNorm3d: modules.BatchNormAct3d,
    modules.BatchNorm1d: modules.BatchNormAct1d,
    modules.BatchNorm2d: modules.BatchNormAct2d,
    modules.BatchNorm3d: modules.BatchNormAct3d,
}
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    modules.BatchNormAct1d: modules.BatchNorm1d,
    modules.BatchNormAct2d: modules.BatchNorm2d,
    modules.BatchNormAct3d: modules.BatchNorm3d,
}
_RELUS: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADDS: set[Any] = {operator.add, torch.add, "add"}
_IN_PLACE_ADDS: set[Any] = {operator.iadd, "add_"}


class FusedReLU(nn.ReLU):
    """The place of a ReLU that the batch norm before it does: returns its input."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the input."""
        return input


class FusedForward:
    """First base of a module's class where its ``forward`` holds fused calls."""

    _original: type[nn.Module]
    _source: str
    _globals: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        names = {k: _Module(v.__name__) if isinstance(v, types.ModuleType) else v
                 for k, v in self._globals.items()}  # fmt: skip
        return _new, (self._original, self._source, names), self.__dict__


@dataclass(frozen=True)
class _Module:
    """A module among a forward's globals, which pickle does not take itself."""

    name: str


def _new(original: type[nn.Module], source: str, names: dict[str, Any]) -> nn.Module:
    restored = {
        k: importlib.import_module(v.name) if isinstance(v, _Module) else v
        for k, v in names.items()
    }
    kind = _fused_class(original, source, tuple(restored.items()))  # type: ignore[arg-type]
    return kind.__new__(kind)


@functools.cache  # one class for all blocks that are alike, so that they compile once
def _fused_class(original: type[nn.Module], source: str, names: tuple[Any, ...]) -> type[nn.Module]:
    forward = fx.graph_module._forward_from_src(source, dict(names))
    contents = {
        "forward": forward,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_original": original,
        "_source": source,
        "_globals": dict(names),
    }
    return type(original.__name__, (FusedForward, original), contents)


@dataclass(frozen=True)
class Fusion:
    """Calls of a traced forward that become one: relu(bn(x)) or relu(bn(x) + residual)."""

    bn: fx.Node
    add: fx.Node | None
    relu: fx.Node
    own_relu: nn.Module | None  # the ReLU's module, where nothing else calls it

    @property
    def residual(self) -> tuple[fx.Node, ...]:
        """The other summand, if there is one."""
        return (
            ()
            if self.add is None
            else tuple(n for n in self.add.all_input_nodes if n is not self.bn)
        )


def fuse(model: nn.Module) -> None:
    """Fuse in place what `find` finds in :attr:`model`."""
    for module, graph, fusions in list(_plans(model, {})):
        for fusion in fusions:
            bn = module.get_submodule(str(fusion.bn.target))
            bn.__class__ = _ACT[type(bn)]
            vars(bn).update(act="relu", _fused=True)
            if fusion.own_relu is not None:
                fusion.own_relu.__class__ = FusedReLU
        _rewrite(module, graph, [fusion for fusion in fusions if fusion.own_relu is None])


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in list(model.modules()):
        if isinstance(module, FusedForward):
            module.__class__ = module._original  # type: ignore[assignment]
        elif type(module) is FusedReLU:
            module.__class__ = nn.ReLU  # type: ignore[assignment]
        elif vars(module).pop("_fused", False):
            del module.act
            module.__class__ = _PLAIN[type(module)]


def find(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """The names of the batch norms that `fuse` would fuse, and why it would not for the others."""
    why: dict[str, str] = {}
    names = {module: name for name, module in model.named_modules()}
    found = []
    for module, _, fusions in _plans(model, why):
        found += [names[module.get_submodule(str(fusion.bn.target))] for fusion in fusions]
    return found, why


def _plans(
    model: nn.Module, why: dict[str, str]
) -> Iterator[tuple[nn.Module, fx.Graph, list[Fusion]]]:
    """Every module whose forward holds something to fuse; `why` gets the names of the others."""
    names = {module: name for name, module in model.named_modules()}
    graphs = {
        m: _trace(m)
        for m in names
        if type(m) not in _ACT
        and type(m).forward is not nn.Module.forward  # ModuleList and the like
        and any(type(c) in _ACT for c in m.modules())
    }
    # What two parents hold, or what is called twice, is somebody else's as well.
    parents = Counter(child for m in names for child in m._modules.values() if child is not None)
    calls: Counter[nn.Module] = Counter()
    for module, graph in graphs.items():
        if not isinstance(graph, str):
            for node in graph.nodes:
                if node.op == "call_module":
                    calls[module.get_submodule(str(node.target))] += 1
    uses = Counter({m: max(parents[m], calls[m]) for m in names})
    for module, name in names.items():
        if type(module) not in _ACT:
            continue
        why[name] = "no forward that could be traced calls it" if name else "it is the model itself"
        if uses[module] > 1:
            why[name] = "called from more than one place"
    for module, graph in graphs.items():
        children = [c for c in module.children() if names.get(c) in why]
        if isinstance(graph, str):
            for child in children:
                why[names[child]] = f"forward of {names[module] or 'the model'} {graph}"
            continue
        fusions = []
        for node in graph.nodes:
            if node.op != "call_module":
                continue
            bn = module.get_submodule(str(node.target))
            if type(bn) not in _ACT or why[names[bn]].startswith("called"):
                continue
            fusion = _match(node, module, uses)
            if fusion is None:
                why[names[bn]] = "no ReLU, nor an addition and a ReLU, alone takes its output"
            elif type(module).forward is nn.Sequential.forward and fusion.own_relu is None:
                # Its code stays as it is: slicing it and appending to it must go on working.
                why[names[bn]] = "its ReLU, in a Sequential, is called from more than one place"
            else:
                del why[names[bn]]
                fusions.append(fusion)
        if fusions:
            yield module, graph, fusions


class _Tracer(fx.Tracer):
    """Traces one forward; whatever it calls is a leaf."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Everything is."""
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Stand in for a node's value."""
        return _Value(node, self)


class _Value(fx.Proxy):
    """A proxy that passes for nothing but a tensor, and whose `+=` is not taken for `+`."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance looks here. A forward that asks is not the same for every kind of argument.
        if "isinstance" in sys._getframe(1).f_code.co_names and not _is_torchs(sys._getframe(1)):
            raise fx.proxy.TraceError("asks for the type of a value")
        return _Value


def _is_torchs(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("torch.")


def _in_place(target: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


_IN_PLACE = {getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "imatmul")}
for _target in _IN_PLACE:
    setattr(_Value, f"__{_target.__name__}__", _in_place(_target))


def _trace(module: nn.Module) -> fx.Graph | str:
    """The graph of a module's own forward, or why there is none that holds for every call."""
    if "forward" in vars(module):
        return "is the instance's own"
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return "has optional arguments"
    training, attributes = module.training, dict(vars(module))
    graphs, texts = [], []
    try:
        for mode in (True, False):
            module.training = mode
            graphs.append(_Tracer().trace(module))
            texts.append(str(graphs[-1]))
    except Exception as error:  # whatever a user's forward makes of values that are not there
        message = str(error).strip().partition("\n")[0]
        return f"cannot be traced: {message or type(error).__name__}"
    finally:
        module.training = training
        changed = vars(module).keys() ^ attributes.keys() or any(
            vars(module)[k] is not v for k, v in attributes.items() if k != "training"
        )
        vars(module).clear()
        vars(module).update(attributes)
    if changed:
        return "changes the module"
    return graphs[0] if texts[0] == texts[1] else "differs between training and eval"


def _match(bn: fx.Node, module: nn.Module, uses: Counter[nn.Module]) -> Fusion | None:
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
    between, other = [], bn.next
    while other is not node:
        if other is not add:
            between.append(other)
        other = other.next
    if any(_mutates(other, module) and tensors & {*other.all_input_nodes} for other in between):
        return None  # all is read where the ReLU is called
    relu = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return Fusion(bn, add, node, relu if relu and add is None and uses[relu] == 1 else None)


def _mutates(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return node.target in _IN_PLACE or name.endswith("_") or bool(node.kwargs.get("inplace"))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _calls(node: fx.Node, targets: set[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _is_relu(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) is nn.ReLU
    return _calls(node, _RELUS)


def _rewrite(module: nn.Module, graph: fx.Graph, fusions: list[Fusion]) -> None:
    if not fusions:
        return
    for fusion in fusions:
        with graph.inserting_before(fusion.relu):
            call = graph.call_module(str(fusion.bn.target), (*fusion.bn.args, *fusion.residual))
        fusion.relu.replace_all_uses_with(call)
        for node in (fusion.relu, fusion.add, fusion.bn):
            if node is not None:
                graph.erase_node(node)
    graph.lint()
    code = graph.python_code("self")
    used = {*re.findall(r"\w+", code.src)}
    names = tuple((name, value) for name, value in code.globals.items() if name in used)
    original = module._original if isinstance(module, FusedForward) else type(module)
    module.__class__ = _fused_class(original, code.src, names)  # type: ignore[arg-type]
