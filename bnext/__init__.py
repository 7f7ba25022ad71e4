"""bnext: exact and fused batch normalisation for PyTorch, a drop-in for torch.nn's."""

import importlib
from typing import TYPE_CHECKING, Any

from bnext import functional
from bnext._registry import register
from bnext.convert import ConversionReport, conversion_report, convert, revert
from bnext.distributed import SyncBatchNorm
from bnext.modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)

if TYPE_CHECKING:
    from bnext import introspect, verify
    from bnext.introspect import Explanation, build_info, explain

__version__ = "0.2.0"

_LAZY_MODULES = ("introspect", "verify")
_LAZY = ("Explanation", "build_info", "explain", *_LAZY_MODULES)

__all__ = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct1d", "BatchNormAct2d",
    "BatchNormAct3d", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d", "SyncBatchNorm",
    "ConversionReport", "Explanation", "build_info", "conversion_report", "convert", "explain",
    "functional", "introspect", "register", "revert", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Imported on demand, or `python -m bnext.introspect` would find itself imported already.
    if name in _LAZY_MODULES:
        return importlib.import_module(f"bnext.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module("bnext.introspect"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
