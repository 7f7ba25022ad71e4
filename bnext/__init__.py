"""bnext: batch normalisation for PyTorch that reads the activation from memory once."""

from bnext import functional
from bnext.convert import ConversionReport, conversion_report, convert, revert
from bnext.introspect import Explanation, build_info, explain
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
    "ConversionReport",
    "Explanation",
    "build_info",
    "conversion_report",
    "convert",
    "explain",
    "functional",
    "revert",
]
