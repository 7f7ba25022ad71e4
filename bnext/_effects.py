"""What the calls of a traced forward do to memory: which may write it, and which share it."""

import operator
from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import conv

from bnext._trace import IN_PLACE_OPERATORS, Traced, trace
from bnext._waiting import OURS, is_sequential, is_watched

__all__ = ["ADDS", "FUSIBLE", "IN_PLACE_ADDS", "Effects", "called", "calls", "own_class"]

FUSIBLE: set[type[nn.Module]] = {*OURS, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}

IN_PLACE_ADDS: set[Any] = {operator.iadd, "add_"}
ADDS: set[Any] = {operator.add, torch.add, "add", *IN_PLACE_ADDS}

_COPIES: set[Any] = {  # not operator.add: a sum of lists shares their tensors
    torch.add, "add", torch.mul, "mul", operator.mul, torch.cat, torch.concat, torch.stack,
}  # fmt: skip
_LIBRARIES = ("torch", "_operator", "builtins", "math")  # what ends in no "_" writes nothing


class Effects:
    """What modules and calls may do, as far as their code tells."""

    def __init__(self) -> None:
        self._traced: dict[nn.Module, Traced | str] = {}

    def traced(self, module: nn.Module) -> Traced | str:
        """A module's forward, traced once."""
        if module not in self._traced:
            self._traced[module] = trace(module, own_class(module))
        return self._traced[module]

    def copies(self, module: nn.Module) -> bool:
        """Whether what a module returns shares no memory with its input."""
        kind = own_class(module)
        if is_watched(module):
            return False
        if is_sequential(kind):
            return any(map(self.copies, module.children()))
        if kind in FUSIBLE or kind is nn.Linear:
            return True
        if kind.forward.__module__.startswith("torch.nn.modules."):
            return kind.forward.__module__ == conv.__name__
        traced = self.traced(module)
        return isinstance(traced, Traced) and not self._reach_inputs(
            next(n for n in traced.graph.nodes if n.op == "output"), module
        )

    def writes(self, module: nn.Module) -> bool:
        """Whether a module may change its input."""
        kind = own_class(module)
        if is_watched(module):
            return True
        if is_sequential(kind):
            for child in module.children():
                if self.writes(child):
                    return True
                if self.copies(child):
                    break
            return False
        if kind in FUSIBLE:  # does not; what it holds may be hooked
            return any(map(self.writes, module.children()))
        if kind.forward.__module__.startswith("torch.nn.modules."):
            return any(getattr(m, "inplace", False) for m in module.modules())
        traced = self.traced(module)
        return isinstance(traced, str) or any(
            self.call_writes(n, module) and self._reach_inputs(n, module)
            for n in traced.graph.nodes
        )

    def call_writes(self, node: fx.Node, module: nn.Module) -> bool:
        """Whether a call may change one of its inputs."""
        if node.op == "call_module":
            return self.writes(called(node, module))
        if node.op not in ("call_function", "call_method"):
            return False
        name = str(getattr(node.target, "__name__", node.target))
        return (
            node.target in IN_PLACE_OPERATORS
            or (name.endswith("_") and not name.endswith("__"))
            or "out" in node.kwargs
            or any(flag is True for flag in (*node.args, node.kwargs.get("inplace")))
            or not (getattr(node.target, "__module__", None) or "torch").startswith(_LIBRARIES)
        )

    def memory(
        self, nodes: Iterable[fx.Node], module: nn.Module, end: fx.Node | None = None
    ) -> set[fx.Node]:
        """The values that these were made of without a copy: if two share memory, they share one.

        What :attr:`end` was made of does not count.
        """
        found, todo = set[fx.Node](), [*nodes]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                if node is not end and not self._call_copies(node, module):
                    todo += node.all_input_nodes
        return found

    def is_read_after(self, value: fx.Node, write: fx.Node, module: nn.Module) -> bool:
        """Whether anything may read the memory of a value after a call that writes it."""
        changed = self.memory([value], module)
        later = write.next
        while later.op != "root":
            if self.memory(later.all_input_nodes, module, end=write) & changed:
                return True
            later = later.next
        return any(n.op in ("placeholder", "get_attr") for n in changed)

    def _call_copies(self, node: fx.Node, module: nn.Module) -> bool:
        if node.op == "call_module":
            return self.copies(called(node, module))
        return calls(node, _COPIES)

    def _reach_inputs(self, node: fx.Node, module: nn.Module) -> bool:
        memory = self.memory(node.all_input_nodes, module)
        return any(n.op in ("placeholder", "get_attr") for n in memory)


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class before it was fused."""
    # Only of the class itself: a subclass of a fused class is another tool's.
    kind: type[nn.Module] = vars(type(module)).get("_original", type(module))
    return kind


def called(node: fx.Node, module: nn.Module) -> nn.Module:
    """The module that a node calls."""
    return module.get_submodule(str(node.target))


def calls(node: fx.Node, targets: Container[Any]) -> bool:
    """Whether a node calls one of these functions, or methods by name."""
    return node.op in ("call_function", "call_method") and node.target in targets
