"""Turning the batch norms of an existing model into bnext's, and back, in place."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules import batchnorm
from torch.nn.utils import parametrize

from bnext import modules

__all__ = ["ConversionReport", "conversion_report", "convert", "revert"]

M = TypeVar("M", bound=nn.Module)

_CONVERTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    nn.LazyBatchNorm1d: modules.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: modules.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: modules.LazyBatchNorm3d,
}
_REVERTED = {ours: theirs for theirs, ours in _CONVERTED.items()}


def convert(model: M) -> M:
    """Turn every batch norm of torch.nn in :attr:`model` into bnext's, in place.

    Only the class of each module changes: modules, parameters, buffers, hooks and an optimizer's
    references stay the same objects, training flags, dtypes, devices and ``requires_grad`` as they
    are. Exactly :class:`torch.nn.BatchNorm1d`, ``2d``, ``3d`` and the lazy ones are converted.
    Subclasses of them (``SyncBatchNorm``, parametrised modules, other libraries'), which may
    compute something else, and other norms are left alone: see :func:`conversion_report`.
    Converting a second time changes nothing.

    Args:
        model: any module, possibly a batch norm itself.

    Returns:
        :attr:`model`.

    Example::

        >>> model = bnext.convert(torchvision.models.resnet50())
    """
    return _swap_classes(model, _CONVERTED)


def revert(model: M) -> M:
    """Undo :func:`convert`: turn bnext's batch norms in :attr:`model` into torch.nn's, in place.

    For what asks for torch.nn's classes exactly, such as torch.ao's fusion of modules; convert
    again afterwards. A :class:`bnext.BatchNormAct2d` is left as it is: as a
    :class:`torch.nn.BatchNorm2d` it would lose its activation. :func:`conversion_report` lists
    these.

    Args:
        model: any module, possibly a batch norm itself.

    Returns:
        :attr:`model`.
    """
    return _swap_classes(model, _REVERTED)


def _swap_classes(model: M, classes: dict[type[nn.Module], type[nn.Module]]) -> M:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model


@dataclass(frozen=True)
class ConversionReport:
    """The normalisation layers of a model, by name, as :func:`conversion_report` found them."""

    bnext: tuple[str, ...]
    """bnext's own, which :func:`revert` turns back."""
    convertible: tuple[str, ...]
    """torch.nn's, which :func:`convert` would turn into bnext's."""
    left_alone: dict[str, str]
    """Those that neither touches, and why."""

    def __str__(self) -> str:
        lines = [f"{len(self.bnext)} of bnext, {len(self.convertible)} to convert"]
        for name, why in self.left_alone.items():
            lines.append(f"left alone: {name or '(the model)'}: {why}")
        return "\n".join(lines)


def conversion_report(model: nn.Module) -> ConversionReport:
    """Say which norms of :attr:`model` are bnext's, can be converted, or are left alone and why.

    Changes nothing; ask before or after :func:`convert`.

    Example::

        >>> print(bnext.conversion_report(model))
        0 of bnext, 53 to convert
    """
    bnext, convertible, left_alone = [], [], {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind in _REVERTED:
            bnext.append(name)
        elif kind in _CONVERTED:
            convertible.append(name)
        elif _is_norm(module):
            left_alone[name] = _why_left_alone(module)
    return ConversionReport(tuple(bnext), tuple(convertible), left_alone)


def _is_norm(module: nn.Module) -> bool:
    known = isinstance(module, batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm | nn.RMSNorm)
    is_leaf = next(module.children(), None) is None
    return known or (is_leaf and "norm" in type(module).__name__.lower())


def _why_left_alone(module: nn.Module) -> str:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, modules._BatchNorm):
        if isinstance(module, modules._BatchNormAct):
            return f"{kind}: torch.nn has no batch norm with an activation to revert to"
        return f"{kind}: a subclass of bnext's"
    if parametrize.is_parametrized(module):
        return f"{kind}: parametrised, which made a class of its own; convert before parametrising"
    if isinstance(module, torch.nn.SyncBatchNorm):
        return f"{kind}: normalises over processes"
    if isinstance(module, batchnorm._BatchNorm):
        return f"{kind}: a subclass, which may compute something else"
    return f"{kind}: not a batch norm of torch.nn"
