"""The calls that are measured: shapes, dtypes, layouts, and what follows the normalisation."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.arguments import BadArgumentError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward", "backward", "both")
BATCHES = (32, 64, 128, 256)


class Variant(NamedTuple):
    training: bool
    residual: bool
    act: str | None

    def floor(self, direction: str) -> int:
        """How many activation-sized tensors must cross the memory bus."""
        forward, backward = (3, 4) if self.residual else (2, 3)
        return {"forward": forward, "backward": backward}.get(direction, forward + backward)


VARIANTS = {
    "bn": Variant(True, False, None),
    "bn_relu": Variant(True, False, "relu"),
    "bn_silu": Variant(True, False, "silu"),
    "bn_add_relu": Variant(True, True, "relu"),
    "frozen": Variant(False, False, None),
}


class Operands(NamedTuple):
    x: Tensor  # [N, C, *]
    residual: Tensor | None  # [N, C, *]
    grad_out: Tensor  # [N, C, *]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: str
    layout: str
    variant: str
    layers: int = 0  # how many of ResNet-50's 53 batch norms have this shape

    def __str__(self) -> str:
        return f"{self.size} {self.dtype} {self.layout} {self.variant}"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def bytes(self) -> int:
        """The size of one activation tensor."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    @property
    def kind(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def memory_format(self) -> torch.memory_format:
        if self.layout == "nchw":
            return torch.contiguous_format
        return torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d

    def operands(self, device: torch.device) -> Operands:
        """The same values at every call on a device."""
        generator = torch.Generator(device).manual_seed(0)

        def activation() -> Tensor:
            options = {"dtype": DTYPES[self.dtype], "memory_format": self.memory_format}
            return torch.empty(self.shape, device=device, **options).normal_(generator=generator)

        x = activation().requires_grad_()
        residual = activation().requires_grad_() if self.kind.residual else None
        return Operands(x, residual, activation())


class Shape(NamedTuple):
    channels: int
    size: int  # height = width
    layers: int


# The batch norms of ResNet-50 (He et al. 2016, stride in the 3x3) on 224x224 images.
RESNET50 = (
    Shape(64, 112, 1),
    Shape(64, 56, 6),
    Shape(256, 56, 4),
    Shape(128, 56, 1),
    Shape(128, 28, 7),
    Shape(512, 28, 5),
    Shape(256, 28, 1),
    Shape(256, 14, 11),
    Shape(1024, 14, 7),
    Shape(512, 14, 1),
    Shape(512, 7, 5),
    Shape(2048, 7, 4),
)
# One is large and aligned, one small with rows of 49 elements.
QUICK = (Shape(64, 56, 6), Shape(512, 7, 5))


def resnet50(
    batches: Iterable[int],
    dtypes: Iterable[str],
    variants: Iterable[str],
    layouts: Iterable[str] = LAYOUTS,
    shapes: Iterable[Shape] = RESNET50,
) -> list[Case]:
    return [
        Case((batch, s.channels, s.size, s.size), dtype, layout, variant, s.layers)
        for variant in variants
        for dtype in dtypes
        for layout in layouts
        for batch in batches
        for s in shapes
    ]


def full() -> list[Case]:
    """All cases for a GPU, the most wanted first because time may run out."""
    others = [
        Case((125_000, 50), "float32", "nchw", "bn"),
        Case((6_000_000, 1), "float32", "nchw", "bn"),
        Case((64, 64, 512, 512), "float32", "nchw", "bn"),
        *(Case((8, 64, 16, 56, 56), "bfloat16", layout, "bn") for layout in LAYOUTS),
    ]
    return [
        *resnet50(BATCHES, ("bfloat16",), ("bn",)),
        *others,
        *resnet50((32, 256), ("bfloat16",), ("bn_relu", "bn_add_relu")),
        *resnet50((64,), ("bfloat16",), ("frozen",)),
        *resnet50(BATCHES, ("float32", "float16"), ("bn",)),
    ]


def quick() -> list[Case]:
    others = [Case((125, 50), "float32", "nchw", "bn")]
    return [*resnet50((4,), ("bfloat16",), VARIANTS, shapes=QUICK), *others]


def matching(cases: Iterable[Case], pattern: str) -> list[Case]:
    every = list(cases)
    some = [case for case in every if re.search(pattern, str(case))]
    if not some:
        raise BadArgumentError(
            f"argument --filter: {pattern!r} matches none of {len(every)} cases, such as {every[0]}"
        )
    return some
