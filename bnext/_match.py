"""Which calls of a traced forward become one: a batch norm, an addition and an activation.

The batch norm waits from its call to the last of the others. So nothing else may read what is
between them, and nothing that runs meanwhile may change what the batch norm has still to read.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from bnext import _waiting as waiting
from bnext._activation import of_module
from bnext._effects import ADDS, IN_PLACE_ADDS, Effects, called, calls
from bnext._waiting import can_pass

__all__ = ["Chain", "Tail", "compute", "match", "rewrite"]

# A call of each takes the arguments of the module after its input.
_ACTIVATIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, F.relu_: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU,
    "relu": nn.ReLU, "relu_": nn.ReLU, F.relu6: nn.ReLU6, F.hardtanh: nn.Hardtanh,
    F.hardtanh_: nn.Hardtanh, F.leaky_relu: nn.LeakyReLU, F.leaky_relu_: nn.LeakyReLU,
    F.silu: nn.SiLU, F.hardswish: nn.Hardswish, F.gelu: nn.GELU, F.elu: nn.ELU, F.elu_: nn.ELU,
    F.tanh: nn.Tanh, torch.tanh: nn.Tanh, torch.tanh_: nn.Tanh, "tanh": nn.Tanh, "tanh_": nn.Tanh,
    F.sigmoid: nn.Sigmoid, torch.sigmoid: nn.Sigmoid, torch.sigmoid_: nn.Sigmoid,
    "sigmoid": nn.Sigmoid, "sigmoid_": nn.Sigmoid,
}  # fmt: skip


@dataclass(frozen=True)
class Tail:
    """The batch norm at the end of a module, which its caller may compute."""

    bn: nn.Module
    added: bool = False  # to a residual
    reads_input: bool = True  # still, when the rest of the module has run
    custom: tuple[nn.Module, ...] = ()  # the modules around it whose forward is traced


@dataclass(frozen=True)
class Chain:
    """A call of a module with a tail, and what follows it."""

    tail: Tail
    nodes: tuple[fx.Node, ...]
    added: bool
    activated: bool
    returned: bool  # from forward, not activated

    @property
    def gains(self) -> bool:
        """Whether anything is fused here."""
        return self.activated or self.added > self.tail.added

    @property
    def residual(self) -> fx.Node | None:
        """The other summand, if there is one."""
        for previous, node in zip(self.nodes, self.nodes[1:], strict=False):
            if calls(node, ADDS):
                return _other(node, previous)
        return None


def match(
    call: fx.Node,
    tail: Tail,
    module: nn.Module,
    effects: Effects,
    taken: Collection[fx.Node],
) -> Chain | str:
    """What is fused with a call, or why nothing is; other calls have :attr:`taken` some nodes."""
    if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], fx.Node):
        return "it is not called with one positional argument"
    nodes, added, activated, reason = [call], tail.added, False, ""
    while not (activated or reason):
        last = nodes[-1]
        if len(last.users) != 1:
            reason = (
                "its output is used more than once" if last.users else "nothing uses its output"
            )
            break
        node = next(iter(last.users))
        if node.op == "output":
            break
        if node in taken:
            reason = "another batch norm is fused with the addition"
        elif calls(node, ADDS) and not added:
            reason = _why_not_added(node, last, module, effects)
            added = not reason
        elif _can_pass(node, module):
            pass
        elif node.all_input_nodes == [last] and _activation(node, module) is not None:
            activated = True
        else:
            reason = f"{_words(node, module)} takes its output"
        if not reason:
            nodes.append(node)
    returned = not reason and not activated and node.args[0] is nodes[-1]
    chain = Chain(tail, tuple(nodes), added, activated, returned)
    if returned and _why_not_waiting(chain, module, effects):
        chain = replace(chain, returned=False)
    if not (chain.gains or chain.returned):
        return reason or "forward returns it"
    return _why_not_waiting(chain, module, effects) or chain


def _can_pass(node: fx.Node, module: nn.Module) -> bool:
    return node.op == "call_module" and len(node.args) == 1 and can_pass(called(node, module))


def _why_not_added(node: fx.Node, value: fx.Node, module: nn.Module, effects: Effects) -> str:
    if len(node.args) != 2 or node.kwargs:
        return "it is scaled by an addition"
    a, b = node.args
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return "what is added to it is no other tensor"
    if calls(node, IN_PLACE_ADDS) and a is not value and effects.is_read_after(a, node, module):
        return "it is added in place to what something else may read"
    return ""


def _why_not_waiting(chain: Chain, module: nn.Module, effects: Effects) -> str:
    call, bn = chain.nodes[0], chain.tail.bn
    reads = effects.memory(call.all_input_nodes if chain.tail.reads_input else [], module)
    node, last = call, chain.nodes[-1]
    while (node.next.op != "output") if chain.returned else (node is not last):
        node = node.next
        if node in chain.nodes:
            if calls(node, ADDS) and chain.residual is not None:
                reads |= effects.memory([chain.residual], module)
            continue
        if node.op == "call_module" and bn in [*called(node, module).modules()]:
            return "it is called again in between"
        inputs = effects.memory(node.all_input_nodes, module)
        kept = {str(n.target) for n in inputs if n.op == "get_attr"}
        if any(module.get_submodule(name.rpartition(".")[0]) is bn for name in kept):
            return f"{_words(node, module)} takes what it holds"
        if effects.call_writes(node, module) and (inputs & reads or kept):
            return f"{_words(node, module)} may change what it reads"
    return ""


def _other(add: fx.Node, value: fx.Node) -> fx.Node:
    return next(n for n in add.all_input_nodes if n is not value)


def _activation(node: fx.Node, module: nn.Module) -> tuple[str | None, float | None] | None:
    if node.op == "call_module":
        return of_module(called(node, module)) if len(node.args) == 1 else None
    if not calls(node, _ACTIVATIONS):
        return None
    try:
        return of_module(_ACTIVATIONS[node.target](*node.args[1:], **node.kwargs))
    except (TypeError, AssertionError):  # arguments that the module does not have
        return None


def _words(node: fx.Node, module: nn.Module) -> str:
    if node.op == "call_module":
        return f"{type(called(node, module)).__name__} {node.target}"
    if node.op == "call_method":
        return f"the method {node.target}"
    return f"the function {getattr(node.target, '__name__', node.target)}"


def rewrite(graph: fx.Graph, chain: Chain, module: nn.Module) -> fx.Node:
    """Let a chain's batch norm wait; returns the last value, which still waits if returned."""
    value: fx.Node | None = None
    for node in chain.nodes:
        with graph.inserting_before(node):
            if node.op == "call_module":
                arguments = graph.get_attr(str(node.target)), *node.args
                new = graph.call_function(waiting.call, arguments)
            elif calls(node, ADDS):
                assert value is not None
                function = waiting.add
                if calls(node, IN_PLACE_ADDS):
                    function = waiting.add_into if node.args[0] is value else waiting.add_onto
                new = graph.call_function(function, (value, _other(node, value)))
            else:
                act, act_param = _activation(node, module) or (None, None)
                activate = waiting.Activate(node.target, str(act), act_param)
                new = graph.call_function(activate, node.args, node.kwargs)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        value = new
    assert value is not None
    # A module may be replaced by one that lets it wait.
    if not (chain.returned or isinstance(value.target, waiting.Activate)):
        with graph.inserting_after(value):
            compute(graph, value)
    return value


def compute(graph: fx.Graph, value: fx.Node) -> None:
    """Compute what waits, at the place where the graph inserts."""
    computed = graph.call_function(waiting.result, (value,))
    value.replace_all_uses_with(computed, lambda user: user is not computed)
