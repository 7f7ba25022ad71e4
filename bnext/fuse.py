"""Fuses a batch norm, a residual addition and an activation, for :func:`bnext.convert`.

All modules stay as they are. The module that calls a batch norm gets a subclass of its own class,
in whose ``forward`` the batch norm waits for what follows: see `bnext._waiting`. A module that
ends with a batch norm gets one that can leave it to the caller.

Each module's own ``forward`` is traced by torch.fx with all its children as leaves, so one that
cannot be traced loses only its own fusions. That of ``nn.Sequential`` needs no tracing.
"""

import copy
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor, fx, nn

from bnext._activation import of_module
from bnext._effects import FUSIBLE, Effects, own_class
from bnext._fused_class import (
    Code,
    FusedForward,
    NamedModule,
    fused_class,
    fused_sequential,
    sequential_forward,
)
from bnext._libraries import own_activation
from bnext._match import Chain, Tail, compute, match, rewrite
from bnext._trace import Traced, trace
from bnext._waiting import ADAPTED, OURS, can_pass, head_of, is_sequential, sequential_head

__all__ = ["FusedForward", "find", "fuse", "fused", "unfuse"]


@dataclass(frozen=True)
class _Plan:
    """What a module may become, and what is fused then."""

    make: Callable[[], type[nn.Module]]
    tail: Tail | None = None
    fused: set[nn.Module] = field(default_factory=set)
    users: set[nn.Module] = field(default_factory=set)  # the callees that leave a batch norm to it
    unfused: dict[nn.Module, str] = field(default_factory=dict)

    def take(self, tail: Tail) -> None:
        """Fuse the batch norm at a callee's end."""
        self.fused.add(tail.bn)
        self.users.update(tail.custom)


def fuse(model: nn.Module) -> None:
    """Fuse in place what `find` finds in :attr:`model`."""
    plans, kinds = _Plans(), {}
    for module in [*model.modules()]:
        if _is_parent(module) and isinstance(plan := plans.of(module), _Plan) and plan.fused:
            for changed in (module, *plan.users):
                kinds[changed] = cast(_Plan, plans.of(changed)).make
    for module, make in kinds.items():
        module.__class__ = make()


def unfuse(model: nn.Module) -> None:
    """Undo `fuse`."""
    for module in [*model.modules()]:
        module.__class__ = own_class(module)


def fused(model: nn.Module) -> set[nn.Module]:
    """The batch norms that their callers fuse with what follows."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if not isinstance(module, FusedForward):
            continue
        if type(module).forward is sequential_forward:
            found |= _sequence(module, _present_tail, bool).fused
        else:
            children = dict(module.named_modules(remove_duplicate=False))
            found |= {children[name] for name in module._fused if name in children}
    return {bn for bn in found if type(bn) in OURS | ADAPTED}


def find(model: nn.Module) -> tuple[set[nn.Module], dict[nn.Module, str]]:
    """The batch norms that `fuse` has fused or would fuse, and why it does not fuse the others."""
    names, plans = {module: name for name, module in model.named_modules()}, _Plans()
    why = {bn: "no forward that could be traced calls it" for bn in names if type(bn) in FUSIBLE}
    if model in why:
        why[model] = "it is the model itself"
    found = fused(model)
    for module, name in reversed(names.items()):  # callers know more
        if not _is_parent(module):
            continue
        plan = plans.of(module)
        if isinstance(plan, str):
            reason = f"forward of {name or 'the model'} {plan}"
            tails = [plans.tail(child) for child in _callees(module)]
            why |= {tail.bn: reason for tail in tails if tail is not None}
        else:
            why |= plan.unfused
            found |= plan.fused
    return found, {bn: reason for bn, reason in why.items() if bn not in found}


def _callees(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield child
        if type(child).forward is nn.Module.forward:  # ModuleList and the like
            yield from _callees(child)


def _is_parent(module: nn.Module) -> bool:
    return (
        type(module) not in FUSIBLE
        and any(type(child) in FUSIBLE for child in module.modules())
        and not issubclass(own_class(module), FusedForward)
        and type(module).forward is not nn.Module.forward
    )


def _sequence(
    module: nn.Module,
    tail_of: Callable[[nn.Module], Tail | None],
    copies: Callable[[nn.Module], bool],
) -> _Plan:
    """What is fused in a Sequential."""
    plan = _Plan(lambda: fused_sequential(own_class(module)))  # type: ignore[arg-type]
    tail, copied = None, False
    for name, child in module._modules.items():
        if child is None:
            continue
        if tail is not None and can_pass(child):
            continue
        if tail is not None and of_module(child) is not None:
            plan.take(tail)
            tail, copied = None, True
            continue
        if tail is not None:
            plan.unfused[tail.bn] = f"{type(child).__name__} {name} takes its output"
        tail = tail_of(child)
        if tail is not None:
            tail = replace(tail, reads_input=tail.reads_input and not copied)
        copied = copied or copies(child)
    if tail is not None:
        plan.unfused[tail.bn] = "forward returns it"
    return replace(plan, tail=tail)


def _present_tail(module: nn.Module) -> Tail | None:
    """The tail of a module as it is fused now."""
    if type(module) in FUSIBLE:
        return Tail(module) if own_activation(module) is None else None
    if head_of(module) is sequential_head:
        return _sequence(module, _present_tail, bool).tail
    name = vars(type(module)).get("_tail")
    return None if name is None else Tail(module.get_submodule(name))


class _Plans:
    """The plans of a model's modules, each made once."""

    def __init__(self) -> None:
        self._plans: dict[nn.Module, _Plan | str] = {}
        self._effects = Effects()

    def of(self, module: nn.Module) -> _Plan | str:
        """What fusing makes of a module, or why its forward stays."""
        if module not in self._plans:
            self._plans[module] = self._make(module)
        return self._plans[module]

    def tail(self, module: nn.Module) -> Tail | None:
        """The batch norm that a module's caller may compute."""
        if type(module) in FUSIBLE:
            return Tail(module) if own_activation(module) is None else None
        if not _is_parent(module) or type(module).__call__ is not nn.Module.__call__:
            return None
        plan = self.of(module)
        return None if isinstance(plan, str) else plan.tail

    def _make(self, module: nn.Module) -> _Plan | str:
        if isinstance(module, fx.GraphModule):
            return "is torch.fx's, which writes it anew: fuse the model before it is traced"
        kind = own_class(module)
        if is_sequential(kind) and "forward" not in vars(module):
            return _sequence(module, self.tail, self._effects.copies)
        traced = self._effects.traced(module)
        if isinstance(traced, str):
            return traced
        other = trace(module, kind, list) if traced.asked else ""
        plan = _Plan(lambda: fused_class(kind, tuple(codes), fused, path))  # type: ignore[arg-type]
        codes, tail = [], None
        for t, input_type in ((traced, Tensor), (other, list)):
            if isinstance(t, Traced):
                code, tail = self._code(t, input_type, module, plan)
                codes.append(code)
        paths = {m: path for path, m in module.named_modules()}
        fused = tuple(sorted(paths[bn] for bn in plan.fused))
        path = None if tail is None else paths[tail.bn]
        return replace(plan, tail=tail)

    def _code(
        self, traced: Traced, input_type: type, module: nn.Module, plan: _Plan
    ) -> tuple[Code, Tail | None]:
        graph = copy.deepcopy(traced.graph)  # `Effects` keeps the other
        scripted, head = graph.python_code("self"), None
        chains = self._chains(graph, traced.asked, module, plan)
        tail = next((self._tail(chain, module) for chain in chains if chain.returned), None)
        ends = [rewrite(graph, chain, module) for chain in chains]
        for chain, end in zip(chains, ends, strict=True):
            if chain.returned:
                head = graph.python_code("self").src
                with graph.inserting_before(next(iter(end.users))):  # the output
                    compute(graph, end)
        graph.lint()
        code = graph.python_code("self")
        used = {*re.findall(r"\w+", code.src + scripted.src)}
        names = tuple(
            (name, NamedModule(value.__name__) if isinstance(value, types.ModuleType) else value)
            for name, value in {**scripted.globals, **code.globals}.items()
            if name in used
        )
        return Code(code.src, scripted.src, head, names, traced.asked, input_type), tail

    def _chains(
        self, graph: fx.Graph, asked: tuple[str, ...], module: nn.Module, plan: _Plan
    ) -> list[Chain]:
        chains: list[Chain] = []
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        for node in graph.nodes:
            if node.op != "call_module":
                continue
            tail = self.tail(module.get_submodule(str(node.target)))
            if tail is None:
                continue
            chain = match(node, tail, module, self._effects, {n for c in chains for n in c.nodes})
            if isinstance(chain, Chain):
                # Who asks for a head gives it one tensor.
                may_return = chain.returned and len(inputs) == 1 and not asked
                chain = replace(chain, returned=may_return)
                if chain.gains:
                    plan.take(tail)
                if chain.gains or chain.returned:
                    chains.append(chain)
            if isinstance(chain, str) or not chain.gains:
                plan.unfused[tail.bn] = chain if isinstance(chain, str) else "forward returns it"
        return chains

    def _tail(self, chain: Chain, module: nn.Module) -> Tail:
        call, residual = chain.nodes[0], chain.residual
        read = [*call.all_input_nodes] if chain.tail.reads_input else []
        read += [] if residual is None else [residual]
        memory = self._effects.memory(read, module)
        reads_input = any(n.op in ("placeholder", "get_attr") for n in memory)
        return Tail(chain.tail.bn, chain.added, reads_input, (module, *chain.tail.custom))
