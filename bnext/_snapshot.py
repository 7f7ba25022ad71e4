"""Finds out what a module's forward changed in Python, and puts it back."""

import pickle
import random
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import nn

__all__ = ["Snapshot", "names"]

Pairs = list[tuple[Any, Any]]

# Their functions and classes hold no state of the model.
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "bnext"}
# Their objects lead to the whole process, not to the model.
_NOT_ENTERED = {"torch", "numpy", "logging"}
_ATOMS = {
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size,
    *weakref.ProxyTypes,
}  # fmt: skip


@dataclass(frozen=True)
class _Record:
    """A mutable thing: its name, what it held as (key, value) pairs, how to read and write it."""

    name: str
    has_named_values: bool
    before: Pairs
    read: Callable[[], Pairs]
    write: Callable[[Pairs], None]

    def what_changed(self, now: Pairs) -> str:
        if not self.has_named_values:
            return self.name
        old, new = dict(self.before), dict(now)
        changed = (k for k in {**new, **old} if old.get(k, old) is not new.get(k, new))
        return self.name + next(changed, "order")


class Snapshot:
    """The state in Python that :attr:`forward`, called on :attr:`module`, can reach.

    It consists of the attributes of the module, of its submodules, of all objects they hold and of
    their classes; nested lists, dicts, sets and deques; NumPy's arrays; the global variables,
    closures and defaults of the functions and methods whose names occur in forward or in one of
    these; and the generators of random numbers. The elements of tensors are not part of it.
    """

    def __init__(self, module: nn.Module, forward: Any) -> None:
        self.functions: list[types.FunctionType] = []
        """Those of the user whose names occur."""
        self._records: list[_Record] = []
        self._seen: dict[int, Any] = {}
        self._classes: list[type] = []
        self._names: set[str] = set()  # the names that occur in the functions
        self._queue: deque[tuple[str, Any]] = deque()
        self._add("the module's ", module)
        self._add("forward", forward)
        while self._queue:
            self._visit(*self._queue.popleft())
            if not self._queue:
                for kind in self._classes:
                    for name in self._names & vars(kind).keys():
                        self._add(f"{kind.__qualname__}.{name}", _function(vars(kind)[name]))
        self._watch_pickled(
            "the state of Python's random numbers", random.getstate, random.setstate
        )
        state = torch.get_rng_state()
        self._watch(
            "the state of torch's random numbers",
            lambda: [(None, bytes(torch.get_rng_state().tolist()))],
            lambda _: torch.set_rng_state(state),
        )
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"]
            self._watch_pickled(
                "the state of NumPy's random numbers", numpy.random.get_state,
                numpy.random.set_state,
            )  # fmt: skip

    def restore(self) -> str | None:
        """Put back what changed, and name the first such thing."""
        changed = None
        for record in self._records:
            now = record.read()
            if not _same(record.before, now):
                changed = changed or record.what_changed(now)
                record.write(record.before)
        return changed

    def _add(self, name: str, value: Any) -> None:
        if type(value) not in _ATOMS and id(value) not in self._seen:
            self._seen[id(value)] = value
            self._queue.append((name, value))

    def _watch(
        self,
        name: str,
        read: Callable[[], Pairs],
        write: Callable[[Pairs], None],
        has_named_values: bool = False,
    ) -> None:
        self._records.append(_Record(name, has_named_values, read(), read, write))

    def _watch_pickled(
        self, name: str, get: Callable[[], Any], put: Callable[[Any], object]
    ) -> None:
        def write(pairs: Pairs) -> None:
            put(pickle.loads(pairs[0][1]))

        self._watch(name, lambda: [(None, pickle.dumps(get()))], write)

    def _visit(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor | types.ModuleType):
            return
        if isinstance(value, types.FunctionType):
            self._visit_function(value)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, types.MethodType):
            self._add(name, value.__self__)
            self._add(name, value.__func__)
        elif isinstance(value, random.Random):
            if not isinstance(value, random.SystemRandom):  # has no state
                self._watch_pickled(name, value.getstate, value.setstate)
        elif type(value).__name__ == "ndarray" and _library(type(value)) == "numpy":
            elements = value.copy()
            self._watch(
                name, lambda: [(None, value.tobytes())], lambda _: value.__setitem__(..., elements)
            )
        else:
            self._visit_container(name, value)
            self._visit_object(name, value)

    def _visit_container(self, name: str, value: Any) -> None:
        kind = next((kind for kind in _CONTAINERS if isinstance(value, kind)), None)
        if kind is None:
            return
        write = _CONTAINERS[kind]
        if write is not None:
            self._watch(name, partial(_read, kind, value), partial(write, value))
        for key, element in _read(kind, value):
            self._add(f"{name}'s keys", key)
            self._add(name, element)

    def _visit_object(self, name: str, value: Any) -> None:
        kind = type(value)
        if not name.endswith((" ", ".")):
            name = f"{name}."
        if isinstance(value, nn.Module):
            for child, module in value._modules.items():
                self._add(f"{name}{child}", module)
        elif _library(kind) in _NOT_ENTERED:
            return
        self._visit_class(kind)
        if isinstance(value, partial):
            self._add(name, (value.func, value.args, value.keywords))
        if isinstance(fields := getattr(value, "__dict__", None), dict):
            self._visit_namespace(name, fields)
        if slots := _slots(kind):  # type: ignore[arg-type]
            read = partial(_read_attributes, value, slots)
            self._watch(name, read, partial(_write_attributes, value, slots), True)
            for slot, field in read():
                self._add(f"{name}{slot}", field)

    def _visit_namespace(
        self, name: str, scope: dict[str, Any], keys: Collection[str] | None = None
    ) -> None:
        def read() -> Pairs:
            if keys is None:
                return [*scope.items()]
            return [(key, scope[key]) for key in keys if key in scope]

        def write(pairs: Pairs) -> None:
            for key in [*scope] if keys is None else keys:
                scope.pop(key, None)
            scope.update(pairs)

        self._watch(name, read, write, True)
        for key, value in read():
            self._add(f"{name}{key}", value)

    def _visit_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if _library(base) in _LIBRARIES or base in self._classes:
                continue
            self._classes.append(base)
            name = f"{base.__qualname__}."
            read = partial(_read_class, base)
            self._watch(name, read, partial(_write_class, base), True)
            for key, value in read():
                if not isinstance(value, type) and _function(value) is None:
                    self._add(f"{name}{key}", value)

    def _visit_function(self, function: types.FunctionType) -> None:
        if _library(function) in _LIBRARIES:
            return
        self.functions.append(function)
        used = {*names(function.__code__)}
        self._names |= used
        scopes = [("the global ", function.__globals__)]
        for prefix, scope in scopes:  # grows by the modules among the globals
            self._visit_namespace(prefix, scope, used)
            for name in sorted(used & scope.keys()):
                module = scope[name]
                if (
                    isinstance(module, types.ModuleType)
                    and _root(module.__name__) not in _LIBRARIES
                    and all(vars(module) is not known for _, known in scopes)
                ):
                    scopes.append((f"{prefix}{name}.", vars(module)))
        self._visit_namespace(f"{function.__qualname__}.", function.__dict__)
        self._add(f"a default of {function.__qualname__}", function.__defaults__)
        self._add(f"a default of {function.__qualname__}", function.__kwdefaults__)
        for name, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            name = f"{function.__qualname__}'s nonlocal {name}"
            contents = ["cell_contents"]
            read = partial(_read_attributes, cell, contents)
            self._watch(name, read, partial(_write_attributes, cell, contents))
            for _, value in read():
                self._add(name, value)


def _same(before: Pairs, now: Pairs) -> bool:
    def identical(a: Any, b: Any) -> bool:
        return a is b or (type(a) is type(b) is bytes and a == b)

    return len(before) == len(now) and all(
        identical(k, key) and identical(v, value)
        for (k, v), (key, value) in zip(before, now, strict=True)
    )


def _read(kind: type, value: Any) -> Pairs:
    if issubclass(kind, dict):
        return [*kind.items(value)]
    return [(None, element) for element in kind.__iter__(value)]  # type: ignore[attr-defined]


def _write_dict(value: dict[Any, Any], pairs: Pairs) -> None:
    kind = OrderedDict if isinstance(value, OrderedDict) else dict
    kind.clear(value)
    for key, element in pairs:
        kind.__setitem__(value, key, element)


def _write_list(value: list[Any], pairs: Pairs) -> None:
    list.__setitem__(value, slice(None), [element for _, element in pairs])


def _write_set(value: set[Any], pairs: Pairs) -> None:
    set.clear(value)
    set.update(value, (element for _, element in pairs))


def _write_deque(value: deque[Any], pairs: Pairs) -> None:
    deque.clear(value)
    deque.extend(value, (element for _, element in pairs))


def _write_bytearray(value: bytearray, pairs: Pairs) -> None:
    value[:] = bytes(element for _, element in pairs)


_CONTAINERS: dict[type, Callable[[Any, Pairs], None] | None] = {
    OrderedDict: _write_dict, dict: _write_dict, list: _write_list, set: _write_set,
    deque: _write_deque, bytearray: _write_bytearray, tuple: None, frozenset: None,
}  # fmt: skip


def _read_attributes(owner: Any, names: list[str]) -> Pairs:
    def is_set(name: str) -> bool:
        try:
            return hasattr(owner, name)
        except ValueError:  # an empty cell
            return False

    return [(name, getattr(owner, name)) for name in names if is_set(name)]


def _write_attributes(owner: Any, names: list[str], pairs: Pairs) -> None:
    for name, _ in _read_attributes(owner, names):
        object.__delattr__(owner, name)
    for name, value in pairs:
        object.__setattr__(owner, name, value)


def _read_class(kind: type) -> Pairs:
    return [*vars(kind).items()]


def _write_class(kind: type, pairs: Pairs) -> None:
    before = dict(pairs)
    for name, value in [*vars(kind).items()]:
        if name not in before:
            type.__delattr__(kind, name)
        elif value is not before[name]:
            type.__setattr__(kind, name, before[name])


@cache
def _slots(kind: type) -> list[str]:
    slots = []
    for base in kind.__mro__:
        own = vars(base).get("__slots__", ())
        for slot in (own,) if isinstance(own, str) else own:
            private = slot.startswith("__") and not slot.endswith("__")
            slots.append(f"_{base.__name__.lstrip('_')}{slot}" if private else slot)
    return [slot for slot in slots if slot not in ("__dict__", "__weakref__")]


def names(code: types.CodeType) -> Iterator[str]:
    """The names that occur in a function's code."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant  # perhaps for setattr


def _function(value: Any) -> Any:
    """The function that an attribute of a class runs, if any."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    if isinstance(value, cached_property):
        return value.func
    if not isinstance(value, types.FunctionType):
        value = getattr(value, "__wrapped__", None)  # as functools.cache has
    return value if isinstance(value, types.FunctionType) else None


def _library(value: Any) -> str:
    return _root(str(value.__module__))


@cache
def _root(module: str) -> str:
    return module.partition(".")[0]
