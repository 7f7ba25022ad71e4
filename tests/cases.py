"""The grid of inputs that the tests walk through: layouts, dtypes, and how to make each."""

from dataclasses import dataclass

import torch
from torch import Tensor

# name -> (shape, memory format)
LAYOUTS: dict[str, tuple[tuple[int, ...], torch.memory_format]] = {
    "nc": ((6, 5), torch.contiguous_format),
    "ncl": ((4, 3, 7), torch.contiguous_format),
    "nchw": ((3, 4, 5, 3), torch.contiguous_format),
    "nhwc": ((3, 4, 5, 3), torch.channels_last),
    "ncdhw": ((2, 3, 2, 3, 3), torch.contiguous_format),
    "ndhwc": ((2, 3, 2, 3, 3), torch.channels_last_3d),
}
# Sizes that no vector divides, sizes beyond one chunk, and more channels than tasks.
SHAPES: list[tuple[tuple[int, ...], torch.memory_format]] = [
    *LAYOUTS.values(),
    ((2, 1), torch.contiguous_format),
    ((37, 130), torch.contiguous_format),
    ((2, 3, 1, 1), torch.contiguous_format),
    ((2, 17, 1, 1), torch.channels_last),
    ((1, 1, 1, 2), torch.contiguous_format),
    ((5, 7, 7, 7), torch.contiguous_format),
    ((5, 7, 7, 7), torch.channels_last),
    ((3, 33, 17), torch.contiguous_format),
    ((2, 2, 31, 33), torch.contiguous_format),
    ((2, 67, 13, 11), torch.channels_last),
    ((1, 1, 300, 301), torch.contiguous_format),
    ((1, 1, 300, 301), torch.channels_last),
    ((64, 3, 49), torch.contiguous_format),
]
# (input, parameters, running statistics)
DTYPES: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = [
    (torch.float32, torch.float32, torch.float32),
    (torch.float64, torch.float64, torch.float64),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32, torch.float32),
    (torch.float16, torch.float16, torch.float16),
]
AFFINE = {
    "plain": (False, False),
    "weight": (True, False),
    "bias": (False, True),
    "affine": (True, True),
}


def shape_id(value: object) -> str | None:
    """pytest id of a (shape, memory format)."""
    if isinstance(value, tuple) and isinstance(value[-1], torch.memory_format):
        suffix = "" if value[1] is torch.contiguous_format else "-" + str(value[1]).split(".")[-1]
        return "x".join(map(str, value[0])) + suffix
    return None


def dtype_id(value: object) -> str:
    """pytest id of a dtype or a tuple of them."""
    if isinstance(value, tuple):
        return "-".join(map(dtype_id, value))
    return str(value).removeprefix("torch.")


@dataclass
class Case:
    """The arguments of one batch norm; absent ones are None."""

    x: Tensor  # [N, C, *]
    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    residual: Tensor | None  # [N, C, *]
    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]
    grad_out: Tensor  # [N, C, *]

    @property
    def stats(self) -> tuple[Tensor, Tensor]:
        return self.running_mean, self.running_var


def make(
    shape: tuple[int, ...],
    memory_format: torch.memory_format = torch.contiguous_format,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = DTYPES[0],
    device: torch.device | str = "cpu",
    affine: tuple[bool, bool] = (True, True),
    residual: bool = False,
) -> Case:
    """Random arguments from the current seed: per channel another mean and spread."""
    x_dtype, param_dtype, stat_dtype = dtypes
    c = shape[1]
    over = [1, c] + [1] * (len(shape) - 2)

    def tensor() -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    def placed(t: Tensor) -> Tensor:
        return t.to(device, x_dtype).contiguous(memory_format=memory_format)

    x = tensor() * (torch.rand(over, dtype=torch.float64) + 0.5) + 2 * torch.randn(over)
    return Case(
        x=placed(x),
        weight=(torch.rand(c) * 2 - 0.5).to(device, param_dtype) if affine[0] else None,
        bias=torch.randn(c).to(device, param_dtype) if affine[1] else None,
        residual=placed(tensor()) if residual else None,
        running_mean=torch.randn(c).to(device, stat_dtype),
        running_var=(torch.rand(c) + 0.5).to(device, stat_dtype),
        grad_out=placed(tensor()),
    )
