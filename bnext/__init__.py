"""bnext: batch normalisation for PyTorch that reads the activation from memory once."""

from typing import TYPE_CHECKING, Any

from bnext import functional
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
    from bnext.introspect import Explanation, build_info, explain

__version__ = "0.1.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
    "ConversionReport",
    "Explanation",
    "build_info",
    "conversion_report",
    "convert",
    "explain",
    "functional",
    "revert",
]


def __getattr__(name: str) -> Any:
    # Imported when asked for: `python -m bnext.introspect` would find itself imported already.
    if name in ("Explanation", "build_info", "explain"):
        from bnext import introspect

        return getattr(introspect, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
