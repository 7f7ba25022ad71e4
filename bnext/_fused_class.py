"""The classes of modules whose forward is fused: subclasses of their own, made of traced code.

They are pickled as the recipe that makes them again.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from bnext._waiting import result, sequential_head

__all__ = [
    "Code",
    "FusedForward",
    "NamedModule",
    "fused_class",
    "fused_sequential",
    "sequential_forward",
]


class FusedForward:
    """First base of the class of a module whose ``forward`` holds fused calls."""

    _original: type[nn.Module]
    _recipe: tuple[Callable[..., type[nn.Module]], tuple[Any, ...]]  # makes this class again
    _fused: tuple[str, ...]  # the names of the batch norms
    _tail: str | None  # that of the one that its caller may compute

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
class NamedModule:
    """A module among a forward's globals; pickle does not take the module itself."""

    name: str


@dataclass(frozen=True)
class Code:
    """The code of a traced forward, and for which calls it is."""

    source: str
    scripted: str
    head: str | None  # the code that leaves the batch norm at the end waiting
    names: tuple[tuple[str, Any], ...]
    asked: tuple[str, ...]  # these inputs are
    input_type: type  # of this type

    def compiled(self) -> Any:
        """The forward."""
        forward = self.compile(self.source)
        # torch.jit.script compiles this one: it knows no functions of modules.
        forward.__wrapped__ = self.compile(self.scripted)
        return forward

    def compile(self, source: str) -> Any:
        """The function of a source."""
        scope = {
            name: importlib.import_module(value.name) if isinstance(value, NamedModule) else value
            for name, value in self.names
        }
        return fx.graph_module._forward_from_src(source, scope)


@functools.cache  # blocks that are alike share a class, so they compile once
def fused_class(
    original: type[nn.Module], codes: tuple[Code, ...], fused: tuple[str, ...], tail: str | None
) -> type[nn.Module]:
    forward = _guarded(original, codes) if _is_guarded(original, codes) else codes[0].compiled()
    contents = {} if (head := codes[0].head) is None else {"_head": codes[0].compile(head)}
    recipe = fused_class, (original, codes, fused, tail)
    return _subclass(
        original, forward=forward, _recipe=recipe, _fused=fused, _tail=tail, **contents
    )


def _is_guarded(original: type[nn.Module], codes: tuple[Code, ...]) -> bool:
    parameters = inspect.signature(original.forward).parameters.values()
    return codes[0].asked != () or any(
        p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters
    )


def _guarded(original: type[nn.Module], codes: tuple[Code, ...]) -> Any:
    """A forward that runs the traced code for the calls that it is for, and else the original."""
    scope = {**original.forward.__globals__, "_original": original.forward}
    declared, passed = list[str](), list[str]()  # in the signature, and to the original
    inputs, conditions = list[str](), list[str]()
    for p in inspect.signature(original.forward).parameters.values():
        name, default = p.name, f"_default_{p.name}"
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            name = ("*" if p.kind is p.VAR_POSITIONAL else "**") + name
            conditions.append(f"not {p.name}")
        elif p.kind is p.KEYWORD_ONLY and not any(d.startswith("*") for d in declared):
            declared.append("*")
        passed.append(f"{name}={name}" if p.kind is p.KEYWORD_ONLY else name)
        if p.default is p.empty:
            declared.append(name)
            inputs += [name] if name == p.name else []
        else:
            declared.append(f"{name}={default}")
            conditions.append(f"{name} is {default}")
            scope[default] = p.default
    lines = [f"def forward({', '.join(declared)}):"]
    for i, code in enumerate(codes):
        scope |= {f"_fused_{i}": code.compiled(), f"_type_{i}": code.input_type}
        tests = [*conditions, *(f"type({name}) is _type_{i}" for name in code.asked)]
        lines += [
            f"    if {' and '.join(tests)}:",
            f"        return _fused_{i}({', '.join(inputs)})",
        ]
    lines.append(f"    return _original({', '.join(passed)})")
    forward = fx.graph_module._forward_from_src("\n".join(lines), scope)
    forward.__wrapped__ = original.forward  # type: ignore[attr-defined]
    return forward


@functools.cache
def fused_sequential(original: type[nn.Module]) -> type[nn.Module]:
    recipe = fused_sequential, (original,)
    return _subclass(
        original, forward=sequential_forward, _head=sequential_head, _recipe=recipe, _tail=None
    )


def sequential_forward(self: nn.Sequential, input: Any) -> Any:
    return result(sequential_head(self, input))


sequential_forward.__wrapped__ = nn.Sequential.forward  # type: ignore[attr-defined]
