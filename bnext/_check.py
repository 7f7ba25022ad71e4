"""The twin of csrc/check.h for tensors without memory: same verdicts, same messages.

Sizes may be symbols. What an op requires goes through `torch._check`, which defers it if a size is
unknown. A comparison that only chooses a memory format takes the answer that needs no guard.
"""

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from bnext._activation import BY_KIND

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Input(NamedTuple):
    """The input of an op, and the matrix that its memory is."""

    tensor: Tensor
    channels: int
    empty: bool
    channels_last: bool


def fail(message: str) -> NoReturn:
    raise RuntimeError(f"bnext: {message}")


def require(condition: Any, message: str) -> None:
    """Check a condition on sizes now, or when the graph runs if it is not known yet."""
    torch._check(condition, lambda: f"bnext: {message}")


def type_name(tensor: Tensor) -> str:
    """A dtype's name in torch's messages: Float, Long, ..."""
    return tensor.type().rpartition(".")[2].removesuffix("Tensor")


def _known(condition: Any) -> bool:
    """Whether a condition on sizes is known to hold."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # it loads sympy

    return guard_or_false(condition)


def _always(condition: Any) -> bool:
    """Whether a condition on sizes holds for all possible sizes."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def dense_strides(sizes: Any, channels_last: bool = False) -> list[Any]:
    """The strides of a tensor of these sizes, dense in the format."""
    order = list(range(len(sizes)))
    if channels_last:
        order.append(order.pop(1))
    strides, stride = [1] * len(sizes), 1
    for d in reversed(order):
        strides[d] = stride
        stride = stride * torch.sym_max(sizes[d], 1)
    return strides


def is_dense(tensor: Tensor, channels_last: bool = False) -> bool:
    expected = dense_strides(tensor.shape, channels_last)
    return all(
        _known(stride == dense) or _known(size == 1)
        for size, stride, dense in zip(tensor.shape, tensor.stride(), expected, strict=True)
    )


def _is_channels_last(tensor: Tensor) -> bool:
    if tensor.dim() not in (4, 5) or is_dense(tensor):
        return False
    return is_dense(tensor, True) or suggest_memory_format(tensor) is not torch.contiguous_format


def check_act(act: int, input: Tensor) -> str:
    """What backward needs of a kind of activation."""
    if input is None:
        fail("input: expected a tensor, got None")
    if act not in BY_KIND:
        kinds = ", ".join(f"{kind} ({name or 'none'})" for kind, (name, _) in BY_KIND.items())
        fail(f"act: expected a kind of activation, one of {kinds}, got {act}")
    return BY_KIND[act][1].needs


def check_input(input: Tensor) -> Input:
    sizes = input.shape
    if len(sizes) < 2 and not (len(sizes) == 1 and _known(sizes[0] == 0)):
        fail(f"input: expected at least 2 dimensions [N, C, ...], got {list(sizes)}")
    if input.dtype not in DTYPES:
        fail(
            f"\"batch_norm\" not implemented for '{type_name(input)}' "
            "(input: expected float32, float64, bfloat16 or float16)"
        )
    n, c, hw = sizes[0], sizes[1] if len(sizes) > 1 else 0, math.prod(sizes[2:])
    return Input(input, c, _known(n * c * hw == 0), _is_channels_last(input))


def mask_shape(x: Input, channels_last: bool) -> tuple[Any, Any]:
    """The shape of one bit per element, in whole bytes for each row (see csrc/problem.h)."""
    sizes = x.tensor.shape
    n, c, hw = sizes[0], x.channels, math.prod(sizes[2:])
    if _known(c != 1) and (channels_last or _known(hw == 1)):
        if _known(c % 4 == 0):
            return n * hw, (c + 7) // 8
        slices = (c + 56) // 57
        width = (c + slices - 1) // slices
        return n * hw, (c + width - 1) // width * ((width + 14) // 8)
    rows, width = (1, n * hw) if _known(c == 1) else (n * c, hw)
    return rows, (width + 7) // 8 + (width % 8 + 6) // 8


def check_device(name: str, tensor: Tensor, x: Input) -> None:
    """A meta tensor among others is enough to end up here."""
    expected, device = x.tensor.device, tensor.device
    if device != expected:
        fail(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{expected} and {device}! {name}: Tensor on device {device} is not on the expected "
            f"device {expected}!"
        )


def check_like_input(name: str, tensor: Tensor | None, x: Input, *, optional: bool = False) -> None:
    if tensor is None:
        if not optional:
            fail(f"{name}: expected a tensor, got None")
        return
    check_device(name, tensor, x)
    if tensor.dtype != x.tensor.dtype:
        fail(f"{name}: expected scalar type {type_name(x.tensor)} but found {type_name(tensor)}")
    sizes, expected = tensor.shape, x.tensor.shape
    message = f"{name}: expected input's shape {list(expected)}, got {list(sizes)}"
    require(len(sizes) == len(expected), message)
    for size, other in zip(sizes, expected, strict=True):
        require(size == other, message)


def _at_one_stride(tensor: Tensor) -> bool:
    count = stride = 1
    for size, step in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if _known(size == 1):
            continue
        if _known(count == 1):
            stride = step
        if not _known(step == stride * count):
            return False
        count = count * size
    return True


def _check_per_channel(name: str, tensor: Tensor, x: Input, empty: bool) -> None:
    check_device(name, tensor, x)
    if empty:
        return
    numel = math.prod(tensor.shape)
    require(
        numel == x.channels,
        f"{name} should contain {x.channels} elements not {numel} (one per channel of input "
        f"{list(x.tensor.shape)}, got {list(tensor.shape)})",
    )
    half = x.tensor.dtype in (torch.bfloat16, torch.float16)
    if tensor.dtype != x.tensor.dtype and not (half and tensor.dtype == torch.float32):
        same = "torch: mixed dtype (CPU): all inputs must share same datatype. Or: "
        fail(
            f"{name}: expected scalar type {type_name(x.tensor)} but found {type_name(tensor)} "
            f"({'or Float; torch: ' if half else same}mixed dtype (CPU): expect parameter to have "
            "scalar type of Float)"
        )


def check_param(name: str, tensor: Tensor | None, x: Input) -> None:
    if tensor is None:
        return
    _check_per_channel(name, tensor, x, x.empty)
    if not x.empty and tensor.dim() != 1 and not _at_one_stride(tensor):
        fail(
            f"{name}: expected values at one stride in memory, got shape {list(tensor.shape)} with "
            "other strides"
        )


def check_statistic(
    name: str, tensor: Tensor | None, x: Input, *, evaluates: bool = False, joins: bool = False
) -> None:
    """`joins`: other processes' values meet it even where this one's input is empty."""
    empty = _known(x.channels == 0) if joins else x.empty
    if tensor is None:
        if evaluates and not empty:
            fail(f"{name} must be defined in evaluation mode")
        return
    _check_per_channel(name, tensor, x, empty)
    if not empty and tensor.dim() != 1:
        fail(
            f"TensorAccessor expected 1 dims but tensor has {tensor.dim()} ({name}: expected shape "
            f"[{x.channels}], got {list(tensor.shape)})"
        )


def check_counter(tensor: Tensor | None, x: Input) -> None:
    if tensor is None:
        return
    check_device("num_batches_tracked", tensor, x)
    message = (
        f"num_batches_tracked: expected one int64 value (Long), got {type_name(tensor)} "
        f"{list(tensor.shape)}"
    )
    require(tensor.dtype == torch.int64, message)
    require(math.prod(tensor.shape) == 1, message)


def _got(tensor: Tensor) -> str:
    dense = "" if is_dense(tensor) else "strided "
    return f"{dense}{type_name(tensor)} {list(tensor.shape)}"


def check_mask(tensor: Tensor | None, x: Input) -> None:
    if tensor is None:
        return
    check_device("mask", tensor, x)
    rows, row_bytes = mask_shape(x, x.channels_last)
    message = f"mask: expected contiguous Byte [{rows}, {row_bytes}], got {_got(tensor)}"
    require(tensor.dtype == torch.uint8 and is_dense(tensor), message)
    numel = math.prod(tensor.shape)
    # Where Inductor gives a convolution's output another format, it asks about that one before it
    # copies to the format with which the op was traced.
    other_rows, other_bytes = mask_shape(x, not x.channels_last)
    if not (x.tensor.dim() in (4, 5) and _always(numel == other_rows * other_bytes)):
        require(numel == rows * row_bytes, message)


def check_matrix(name: str, tensor: Tensor | None, rows: int, x: Input) -> None:
    if tensor is None:
        fail(f"{name}: expected a tensor, got None")
    check_device(name, tensor, x)
    message = f"{name}: expected contiguous Double [{rows}, {x.channels}], got {_got(tensor)}"
    require(tensor.dtype == torch.float64 and is_dense(tensor) and tensor.dim() == 2, message)
    require(tensor.shape[0] == rows, message)
    require(tensor.shape[1] == x.channels, message)


def check_save_stats(tensor: Tensor | None, x: Input) -> None:
    if tensor is not None:
        check_matrix("save_stats", tensor, 3, x)


def check_joined(moments: Tensor | None, counts: Tensor | None, x: Input) -> None:
    """Moments [ranks, 3, C] and counts [ranks] of several processes."""
    for name, tensor in (("moments", moments), ("counts", counts)):
        if tensor is None:
            fail(f"{name}: expected a tensor, got None")
        check_device(name, tensor, x)
    assert moments is not None and counts is not None
    sizes, c = moments.shape, x.channels
    message = (
        f"moments: expected Double [ranks, 3, {c}] with adjacent channels, got "
        f"{type_name(moments)} {list(sizes)}"
    )
    require(moments.dtype == torch.float64 and len(sizes) == 3, message)
    require(sizes[0] > 0, message)
    require(sizes[1] == 3, message)
    require(sizes[2] == c, message)
    require(_known(c <= 1) or moments.stride(2) == 1, message)
    message = f"counts: expected Double [{sizes[0]}], got {type_name(counts)} {list(counts.shape)}"
    require(counts.dtype == torch.float64 and counts.dim() == 1, message)
    require(counts.shape[0] == sizes[0], message)


def check_act_operands(
    act: int, needs: str, residual: Tensor | None, mask: Tensor | None, had_residual: bool
) -> None:
    name = BY_KIND[act][0] or "none"
    if act == 0 and had_residual:
        fail("act: expected one with a residual's gradient; without, that is grad_out")
    if needs == "sign" and mask is None and (had_residual or residual is not None):
        fail(f"mask: expected where a residual was added before {name}")
    if needs == "sum" and residual is None and had_residual:
        fail(f"residual: expected where one was added before {name}")


def check_act_is_linear(act: int, needs: str) -> None:
    """The double backward takes no activation with a second derivative."""
    if needs == "sum":
        name = BY_KIND[act][0]
        fail(f"act: expected none that is curved, got {name}")


def check_any_statistics(
    save_stats: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None, x: Input
) -> None:
    if save_stats is None and (running_mean is None or running_var is None) and not x.empty:
        fail("save_stats: expected it, or both running_mean and running_var, got neither")
