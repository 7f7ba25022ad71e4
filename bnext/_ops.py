"""The compiled ops, and their fake kernels: what tracing, compiling and meta tensors need to know.

Imports the compiled part (which registers ``torch.ops.bnext``) and nothing else of bnext.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from bnext._extension import _C

__all__ = ["DOUBLE_BACKWARD_DEVICES", "EAGER", "TRACED", "_C"]


class Ops(NamedTuple):
    """The ops, to be called by position."""

    train: Any
    inference: Any
    backward: Any
    double_backward: Any


TRACED = Ops(
    torch.ops.bnext.batch_norm_train.default,
    torch.ops.bnext.batch_norm_inference.default,
    torch.ops.bnext.batch_norm_backward.default,
    torch.ops.bnext.batch_norm_double_backward.default,
)
# What an OpOverload calls, without its Python frame (0.2 us). Dynamo only knows the former.
EAGER = Ops(*(op._op for op in TRACED))
# The types of devices that have it; on others a second derivative is composed of ATen's operations.
DOUBLE_BACKWARD_DEVICES = frozenset(
    key.lower()
    for key in ("CPU", "CUDA")
    if torch._C._dispatch_has_kernel_for_dispatch_key("bnext::batch_norm_double_backward", key)
)


def _check_devices(input: Tensor, *others: Tensor | None) -> None:
    """One meta tensor among others is enough to end up here."""
    for other in others:
        if other is not None and other.device != input.device:
            raise RuntimeError(
                f"bnext: expected all tensors on one device, but input is on {input.device} and "
                f"another on {other.device}"
            )


def _dense_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=suggest_memory_format(tensor))


def _relu_mask_like(input: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    """One bit per element, every row of the dense memory padded to whole bytes."""
    if not relu or residual is None:
        return input.new_empty(0, dtype=torch.uint8)
    n, c, spatial = input.shape[0], input.shape[1], math.prod(input.shape[2:])
    if c == 1:
        rows, width = 1, n * spatial
    elif spatial == 1 or suggest_memory_format(input) is not torch.contiguous_format:
        rows, width = n * spatial, c
    else:
        rows, width = n * c, spatial
    return input.new_empty((rows, (width + 7) // 8), dtype=torch.uint8)


# An output that a call does not have is undefined in C++ and None here; the schema says Tensor.
def _fake_train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    _check_devices(input, weight, bias, residual, running_mean, running_var, num_batches_tracked)
    save_stats = input.new_empty((2, input.shape[1]), dtype=torch.float64)
    mask = _relu_mask_like(input, relu, residual) if save_mask else None
    return _dense_like(input), save_stats, mask


def _fake_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    relu: bool,
    save_mask: bool,
) -> tuple[Tensor, Tensor | None]:
    _check_devices(input, weight, bias, residual, running_mean, running_var)
    return _dense_like(input), _relu_mask_like(input, relu, residual) if save_mask else None


def _fake_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu_mask: Tensor | None,
    save_stats: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    _check_devices(input, grad_out, weight, bias, relu_mask, save_stats, running_mean, running_var)
    param = weight if weight is not None else bias if bias is not None else input
    return (
        _dense_like(input) if need_input else None,
        param.new_empty(input.shape[1]) if need_weight else None,
        param.new_empty(input.shape[1]) if need_bias else None,
        _dense_like(input) if need_residual else None,
    )


def _fake_double_backward(
    grad_grad_input: Tensor,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_grad_residual: Tensor | None,
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu_mask: Tensor | None,
    save_stats: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    relu: bool,
    need_grad_out: bool,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _check_devices(input, grad_grad_input, grad_grad_weight, grad_grad_bias, grad_grad_residual)
    _check_devices(input, grad_out, weight, bias, relu_mask, save_stats, running_mean, running_var)
    return (
        _dense_like(input) if need_grad_out else None,
        _dense_like(input) if need_input else None,
        weight.new_empty(input.shape[1]) if need_weight and weight is not None else None,
    )


torch.library.register_fake("bnext::batch_norm_train", _fake_train)
torch.library.register_fake("bnext::batch_norm_inference", _fake_inference)
torch.library.register_fake("bnext::batch_norm_backward", _fake_backward)
torch.library.register_fake("bnext::batch_norm_double_backward", _fake_double_backward)
