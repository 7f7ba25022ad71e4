"""Turning the batch norms of an existing model into bnext's, and back, in place."""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import fx, nn
from torch.nn.modules import batchnorm, conv
from torch.nn.utils import parametrize

from bnext import distributed, modules
from bnext import fuse as fusing
from bnext._effects import own_class
from bnext._libraries import adapt, own_activation
from bnext._registry import OURS, THEIRS
from bnext._trace import trace
from bnext._waiting import is_watched

__all__ = ["ConversionReport", "conversion_report", "convert", "revert"]

M = TypeVar("M", bound=nn.Module)


def convert(model: M, *, fuse: bool = False) -> M:
    """Turn every batch norm in :attr:`model` into bnext's, in place.

    Only the class of each module changes. Modules, parameters, buffers, hooks, flags and an
    optimizer's references stay as they are. Converted are modules of exactly these classes:

    - :class:`torch.nn.BatchNorm1d`, ``2d``, ``3d``, the lazy ones and ``SyncBatchNorm``;
    - timm's ``BatchNormAct2d`` and ``FrozenBatchNormAct2d``, whose ``act`` is then computed in the
      same pass if its ``drop`` is an identity;
    - torchvision's ``FrozenBatchNorm2d`` and its copies in transformers;
    - those that :func:`bnext.register` was given.

    Subclasses of them (parametrised modules, for example) may compute something else; they and
    other norms are left alone: see :func:`conversion_report`. Converting a second time changes
    nothing.

    With :attr:`fuse`, a batch norm is computed in one pass with the addition and the activation
    that alone take its output, as by :class:`bnext.BatchNormAct2d`: one of them or both. The
    activation may be any of :func:`bnext.functional.batch_norm_act`'s, as a module of torch.nn, a
    function or a method of tensors. Identities may stand in between, and dropout, which keeps a
    call from being fused where it drops values. The batch norm may be at the end of a module whose
    caller adds or activates. All modules, parameters, buffers, names and hooks stay as they are. A
    module whose ``forward`` calls what is fused becomes a subclass of its own class.

    - At each call the new ``forward`` looks at the modules. If another tool has replaced one, has
      changed its class or ``forward`` or put a hook on it, and under torch.fx and
      :func:`torch.jit.script`, it calls one after the other, as before.
    - It is the code that torch.fx traced. As in any traced code, plain Python attributes and global
      state that ``forward`` reads keep their values from the time of conversion. (A
      :class:`torch.nn.Sequential` is not traced; it can still be sliced and appended to.)
    - It is for calls with the default of each optional argument, and if ``forward`` asks by
      ``isinstance`` for the type of an input, for tensors and lists. Other calls run the model's
      own ``forward``.

    A batch norm is left as it is where something else could see the difference: its output is
    used elsewhere, or what it reads may be changed before the last of the operations. A ``forward``
    is left alone if torch.fx cannot trace it or its graph would not fit every call: it asks for
    the type of another value, differs between training and eval, switches gradients or autocast on
    or off, uses :mod:`torch.utils.checkpoint`, draws random numbers except through a module,
    changes tensors other than parameters and buffers, or changes anything in Python.
    ``conversion_report(model, fuse=True)`` says which and why.

    Tracing runs ``forward`` and then puts back what it changed, even if it raised: attributes of
    the model, its class and the objects in it; lists, dicts, sets, deques and NumPy's arrays there;
    globals and closures that ``forward`` or a function it names uses; the generators of random
    numbers. It does not notice other effects, such as printing or those in C extensions' objects.

    Args:
        model: any module, possibly a batch norm itself.
        fuse: whether to fuse batch norms with the addition and the activation after them.

    Returns:
        :attr:`model`.

    Warns:
        UserWarning: Opacus has wrapped the model, and could no longer find its batch norms.

    Example::

        >>> model = bnext.convert(torchvision.models.resnet50(), fuse=True)
    """
    kinds = {type(module) for module in model.modules()}
    for kind in kinds:
        adapt(kind)
    if kinds & OURS.keys() and any(map(_is_of_opacus, model.modules())):
        warnings.warn(
            "convert: Opacus has wrapped this model. It knows batch norms, which mix samples, by "
            "their exact class, and after conversion finds none. See 'Does it work with ...?' in "
            "the README.",
            stacklevel=2,
        )
    _swap_classes(model, OURS)
    if fuse:
        fusing.fuse(model)
    return model


def revert(model: M) -> M:
    """Undo :func:`convert`: give the batch norms in :attr:`model` their classes back, in place.

    Use it before tools that compare torch.nn's classes exactly, such as torch.ao's fusion, and
    convert again afterwards. It also undoes ``fuse=True``. A :class:`bnext.BatchNormAct2d` of the
    model itself stays, and so does a :class:`bnext.SyncBatchNorm` with an activation: as torch.nn's
    they would lose it. :func:`conversion_report` lists these.

    Args:
        model: any module, possibly a batch norm itself.

    Returns:
        :attr:`model`.
    """
    fusing.unfuse(model)
    return _swap_classes(model, THEIRS)


def _is_of_opacus(module: nn.Module) -> bool:
    wraps = any(kind.__module__.startswith("opacus.grad_sample") for kind in type(module).__mro__)
    return wraps or "autograd_grad_sample_hooks" in vars(module)


def _swap_classes(model: M, classes: dict[type[nn.Module], type[nn.Module]]) -> M:
    for module in model.modules():
        if type(module) in classes and not _has_more(module):
            module.__class__ = classes[type(module)]
    return model


def _has_more(module: nn.Module) -> bool:
    """Whether torch.nn's class of a batch norm would lose its activation."""
    return isinstance(module, distributed.SyncBatchNorm) and module.act is not None


@dataclass(frozen=True)
class ConversionReport:
    """The normalisation layers of a model, by name, as :func:`conversion_report` found them."""

    bnext: tuple[str, ...]
    """bnext's own, which :func:`revert` turns back."""
    convertible: tuple[str, ...]
    """Those that :func:`convert` would turn into bnext's."""
    left_alone: dict[str, str]
    """Those that neither touches, and why."""
    fused: tuple[str, ...] = ()
    """Those computed together with what follows: by ``fuse=True``, or by themselves."""
    fusible: tuple[str, ...] = ()
    """Those that it would fuse; like the next field, only found with ``fuse=True``."""
    unfused: dict[str, str] = field(default_factory=dict)
    """Those that it leaves unfused, and why."""
    redundant_biases: tuple[str, ...] = ()
    """Convolutions whose bias the batch norm after them removes again."""

    def __str__(self) -> str:
        lines = [f"{len(self.bnext)} of bnext, {len(self.convertible)} to convert"]
        for name, why in self.left_alone.items():
            lines.append(f"left alone: {name or '(the model)'}: {why}")
        if self.fused or self.fusible or self.unfused:
            lines.append(f"{len(self.fused)} fused, {len(self.fusible)} to fuse")
        for name, why in self.unfused.items():
            lines.append(f"unfused: {name or '(the model)'}: {why}")
        lines += [f"redundant: the bias of {name}" for name in self.redundant_biases]
        return "\n".join(lines)


def conversion_report(model: nn.Module, *, fuse: bool = False) -> ConversionReport:
    """Say which norms of :attr:`model` are bnext's, can be converted, or are left alone and why.

    Changes nothing; call it before or after :func:`convert`. With :attr:`fuse` it also traces the
    model's code and says what ``convert(model, fuse=True)`` would fuse, and why not the rest.

    Before a batch norm a convolution's bias is redundant: in training the subtracted mean contains
    it, and its gradient is zero (section 3.2 of the paper); ``bias=False`` saves both. The report
    lists such biases in :class:`torch.nn.Sequential`, and with :attr:`fuse` also in any ``forward``
    that could be traced, but none where a hook or a ``forward`` of its own may change the output.

    Example::

        >>> print(bnext.conversion_report(model))
        0 of bnext, 53 to convert
    """
    bnext, convertible, left_alone = [], [], {}
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        kind = type(module)
        adapt(kind)
        if kind in THEIRS and not _has_more(module):
            bnext.append(name)
        elif kind in OURS:
            convertible.append(name)
        elif _is_norm(module):
            left_alone[name] = _why_left_alone(module)
    fused = fusing.fused(model)
    found, why = fusing.find(model) if fuse else (set(), {})
    own = {module: own_activation(module) for module in names if not _has_more(module)}
    fused |= {m for m, act in own.items() if type(m) in THEIRS and isinstance(act, tuple)}
    if fuse:
        found |= {m for m, act in own.items() if isinstance(act, tuple)}
        why |= {m: reason for m, reason in own.items() if isinstance(reason, str)}
        others = (m for m in names if type(m) in THEIRS and m not in found | fused | why.keys())
        why |= dict.fromkeys(others, "fusing does not know its class")
    return ConversionReport(
        tuple(bnext),
        tuple(convertible),
        left_alone,
        tuple(name for module, name in names.items() if module in fused),
        tuple(name for module, name in names.items() if module in found - fused),
        {names[module]: why[module] for module in why if module not in found | fused},
        tuple(names[module] for module in _redundant_biases(model, fuse)),
    )


def _redundant_biases(model: nn.Module, traced: bool) -> list[nn.Module]:
    calls = [call for parent in model.modules() for call in _convolutions(parent, traced)]
    # A bias is needed if something else reads the convolution in another call.
    needed = {module for module, redundant in calls if not redundant}
    return [module for module in dict(calls) if module not in needed]


def _convolutions(parent: nn.Module, traced: bool) -> Iterator[tuple[nn.Module, bool]]:
    """The convolutions with a bias that a module calls, and whether only batch norms read them."""
    kind = own_class(parent)
    calls: list[tuple[nn.Module, list[nn.Module | None]]] = []
    sequential = issubclass(kind, nn.Sequential) and kind.forward is nn.Sequential.forward
    if sequential and "forward" not in vars(parent):
        following = itertools.pairwise([*parent._modules.values(), None])
        calls = [(module, [reader]) for module, reader in following if module is not None]
    elif traced and any(isinstance(child, conv._ConvNd) for child in [*parent.modules()][1:]):
        found = trace(parent, kind)
        nodes = () if isinstance(found, str) else found.graph.nodes
        called = {n: parent.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"}
        calls = [
            (module, [called.get(n) if _normalizes(n, node) else None for n in node.users])
            for node, module in called.items()
        ]
        # One whose parameters the forward reads itself.
        read = [str(n.target).rpartition(".")[0] for n in nodes if n.op == "get_attr"]
        calls += [(parent.get_submodule(owner), []) for owner in read]
    for module, readers in calls:
        if isinstance(module, conv._ConvNd) and module.bias is not None:
            yield module, _is_plain(module) and bool(readers) and all(map(_is_batch_norm, readers))


def _normalizes(call: fx.Node, value: fx.Node) -> bool:
    """Whether a batch norm so called takes a value as its input, and not as a residual."""
    places = [name for name, v in (*enumerate(call.args), *call.kwargs.items()) if v is value]
    return places in ([0], ["input"])


def _is_batch_norm(module: nn.Module | None) -> bool:
    return isinstance(module, batchnorm._BatchNorm) and _is_plain(module)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what torch.nn's or bnext's does, and nothing looks on."""
    files = (conv.__name__, batchnorm.__name__, modules.__name__, distributed.__name__)
    return type(module).forward.__module__ in files and not is_watched(module)


def _is_norm(module: nn.Module) -> bool:
    known = isinstance(module, batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
    is_leaf = next(module.children(), None) is None
    return known or (is_leaf and "norm" in type(module).__name__.lower())


def _why_left_alone(module: nn.Module) -> str:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, modules._BatchNorm | distributed.SyncBatchNorm):
        if isinstance(module, modules._BatchNormAct) or _has_more(module):
            return f"{kind}: torch.nn has no batch norm with an activation to revert to"
        return f"{kind}: a subclass of bnext's"
    if parametrize.is_parametrized(module):
        return f"{kind}: parametrised, which made a class of its own; convert before parametrising"
    if isinstance(module, batchnorm.SyncBatchNorm):
        return f"{kind}: normalises over processes in a way of its own"
    if isinstance(module, batchnorm._BatchNorm):
        return f"{kind}: a subclass, which may compute something else (see bnext.register)"
    return f"{kind}: no batch norm that bnext knows (see bnext.register)"
