"""The compiled ops, and their fake kernels for tracing, compiling and meta tensors."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

from bnext._check import (
    Input,
    check_act,
    check_act_is_linear,
    check_act_operands,
    check_any_statistics,
    check_counter,
    check_input,
    check_joined,
    check_like_input,
    check_mask,
    check_matrix,
    check_param,
    check_save_stats,
    check_statistic,
    dense_strides,
    fail,
    mask_shape,
)
from bnext._extension import _C

__all__ = ["DEVICES", "DOUBLE_BACKWARD_DEVICES", "EAGER", "TRACED", "_C"]


class Ops(NamedTuple):
    """The ops; pass all arguments by position."""

    train: Any
    inference: Any
    backward: Any
    double_backward: Any
    # For several processes: what they exchange comes between the sums and what is made of them.
    moments: Any
    join: Any
    apply: Any
    backward_sums: Any
    backward_apply: Any


TRACED = Ops(
    torch.ops.bnext.batch_norm_train.default,
    torch.ops.bnext.batch_norm_inference.default,
    torch.ops.bnext.batch_norm_backward.default,
    torch.ops.bnext.batch_norm_double_backward.default,
    torch.ops.bnext.batch_norm_moments.default,
    torch.ops.bnext.batch_norm_join.default,
    torch.ops.bnext.batch_norm_apply.default,
    torch.ops.bnext.batch_norm_backward_sums.default,
    torch.ops.bnext.batch_norm_backward_apply.default,
)
# What an OpOverload calls, without its Python frame (0.2 us). Dynamo knows only the overloads.
EAGER = Ops(*(op._op for op in TRACED))


def _devices(op: str) -> frozenset[str]:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return frozenset(key.lower() for key in ("CPU", "CUDA") if has_kernel(f"bnext::{op}", key))


# The types of devices that have kernels. Where there is none for the double backward, ATen's
# operations compute second derivatives.
DEVICES = _devices("batch_norm_train") | {"meta"}
DOUBLE_BACKWARD_DEVICES = _devices("batch_norm_double_backward")


def _output(x: Input) -> Tensor:
    return x.tensor.new_empty_strided(
        x.tensor.shape, dense_strides(x.tensor.shape, x.channels_last)
    )


def _mask(x: Input, needs: str, residual: Tensor | None) -> Tensor:
    shape = mask_shape(x, x.channels_last) if needs == "sign" and residual is not None else (0,)
    return x.tensor.new_empty(shape, dtype=torch.uint8)


# An output that a call lacks is undefined in C++ and None here, though the schema says Tensor.
@torch.library.register_fake("bnext::batch_norm_train")
def _fake_train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    residual: Tensor | None = None,
    act: int = 0,
    act_param: float = 0.0,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    needs = check_act(act, input)
    x = check_input(input)
    check_statistic("running_mean", running_mean, x)
    check_statistic("running_var", running_var, x)
    check_param("weight", weight, x)
    check_param("bias", bias, x)
    check_counter(num_batches_tracked, x)
    check_like_input("residual", residual, x, optional=True)
    save_stats = input.new_empty((3, x.channels), dtype=torch.float64)
    return _output(x), save_stats, _mask(x, needs, residual) if save_mask else None


@torch.library.register_fake("bnext::batch_norm_inference")
def _fake_inference(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    act: int = 0,
    act_param: float = 0.0,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    needs = check_act(act, input)
    x = check_input(input)
    check_statistic("running_mean", running_mean, x, evaluates=True)
    check_statistic("running_var", running_var, x, evaluates=True)
    check_param("weight", weight, x)
    check_param("bias", bias, x)
    check_like_input("residual", residual, x, optional=True)
    return _output(x), _mask(x, needs, residual) if save_mask else None


@torch.library.register_fake("bnext::batch_norm_backward")
def _fake_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_stats: Tensor | None,
    eps: float,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    act: int = 0,
    act_param: float = 0.0,
    need_input: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    need_residual: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    needs = check_act(act, input)
    x = check_input(input)
    check_like_input("grad_out", grad_out, x)
    check_param("weight", weight, x)
    check_param("bias", bias, x)
    check_like_input("residual", residual, x, optional=True)
    check_mask(mask, x)
    check_save_stats(save_stats, x)
    check_any_statistics(save_stats, running_mean, running_var, x)
    check_statistic("running_mean", running_mean, x)
    check_statistic("running_var", running_var, x)
    shift = bias if bias is not None else weight
    if (need_weight and weight is None) or (need_bias and shift is None):
        fail("weight, bias: expected where their gradients are asked for")
    check_act_operands(act, needs, residual, mask, need_residual)
    return (
        _output(x) if need_input else None,
        weight.new_empty(weight.shape) if need_weight and weight is not None else None,
        shift.new_empty(shift.shape) if need_bias and shift is not None else None,
        _output(x) if need_residual else None,
    )


@torch.library.register_fake("bnext::batch_norm_double_backward")
def _fake_double_backward(
    grad_grad_input: Tensor,
    grad_grad_weight: Tensor | None,
    grad_grad_bias: Tensor | None,
    grad_grad_residual: Tensor | None,
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_stats: Tensor | None,
    eps: float,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    act: int = 0,
    act_param: float = 0.0,
    need_grad_out: bool = True,
    need_input: bool = True,
    need_weight: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs = check_act(act, input)
    x = check_input(input)
    check_like_input("grad_grad_input", grad_grad_input, x)
    check_like_input("grad_out", grad_out, x)
    check_like_input("grad_grad_residual", grad_grad_residual, x, optional=True)
    check_save_stats(save_stats, x)
    check_statistic("running_mean", running_mean, x)
    check_statistic("running_var", running_var, x)
    check_param("weight", weight, x)
    check_param("bias", bias, x)
    check_param("grad_grad_weight", grad_grad_weight, x)
    check_param("grad_grad_bias", grad_grad_bias, x)
    check_any_statistics(save_stats, running_mean, running_var, x)
    if need_weight and weight is None:
        fail("weight: expected where its gradient is asked for")
    check_like_input("residual", residual, x, optional=True)
    check_mask(mask, x)
    check_act_operands(act, needs, residual, mask, grad_grad_residual is not None)
    check_act_is_linear(act, needs)
    return (
        _output(x) if need_grad_out else None,
        _output(x) if need_input else None,
        weight.new_empty(weight.shape) if need_weight and weight is not None else None,
    )


@torch.library.register_fake("bnext::batch_norm_moments")
def _fake_moments(input: Tensor, eps: float) -> Tensor:
    x = check_input(input)
    return input.new_empty((3, x.channels), dtype=torch.float64)


@torch.library.register_fake("bnext::batch_norm_join")
def _fake_join(
    input: Tensor,
    moments: Tensor,
    counts: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    if input is None:
        fail("input: expected a tensor, got None")
    x = check_input(input)
    check_statistic("running_mean", running_mean, x, joins=True)
    check_statistic("running_var", running_var, x, joins=True)
    check_counter(num_batches_tracked, x)
    check_joined(moments, counts, x)
    return input.new_empty((3, x.channels), dtype=torch.float64)


@torch.library.register_fake("bnext::batch_norm_apply")
def _fake_apply(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    save_stats: Tensor,
    residual: Tensor | None = None,
    act: int = 0,
    act_param: float = 0.0,
    save_mask: bool = False,
) -> tuple[Tensor, Tensor | None]:
    needs = check_act(act, input)
    x = check_input(input)
    check_param("weight", weight, x)
    check_param("bias", bias, x)
    check_matrix("save_stats", save_stats, 3, x)
    check_like_input("residual", residual, x, optional=True)
    return _output(x), _mask(x, needs, residual) if save_mask else None


def _check_given_statistics(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_stats: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    act: int,
    need_residual: bool,
) -> Input:
    needs = check_act(act, input)
    x = check_input(input)
    check_like_input("grad_out", grad_out, x)
    check_like_input("residual", residual, x, optional=True)
    check_param("weight", weight, x)
    check_param("bias", bias, x)
    check_mask(mask, x)
    check_matrix("save_stats", save_stats, 3, x)
    check_act_operands(act, needs, residual, mask, need_residual)
    return x


@torch.library.register_fake("bnext::batch_norm_backward_sums")
def _fake_backward_sums(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_stats: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    act: int = 0,
    act_param: float = 0.0,
) -> Tensor:
    x = _check_given_statistics(
        grad_out, input, weight, save_stats, bias, residual, mask, act, False
    )
    return input.new_empty((2, x.channels), dtype=torch.float64)


@torch.library.register_fake("bnext::batch_norm_backward_apply")
def _fake_backward_apply(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None,
    save_stats: Tensor,
    grad_means: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    act: int = 0,
    act_param: float = 0.0,
    need_input: bool = True,
    need_residual: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    x = _check_given_statistics(
        grad_out, input, weight, save_stats, bias, residual, mask, act, need_residual
    )
    check_matrix("grad_means", grad_means, 2, x)
    return _output(x) if need_input else None, _output(x) if need_residual else None


def _train_with_negative_bit(*args: Any) -> Any:
    """The op if a tensor has the negative bit; torch's own fallback cannot write to such a one."""
    resolved = [a.resolve_neg() if isinstance(a, Tensor) else a for a in args]
    outputs = TRACED.train(*resolved)
    for buffer, new in zip(args[3:6], resolved[3:6], strict=True):
        if buffer is not None and buffer.is_neg():
            buffer.copy_(new)
    return outputs


_library = torch.library.Library("bnext", "IMPL")
_library.impl("batch_norm_train", _train_with_negative_bit, "Negative")


def _in_fake_mode(
    mode: FakeTensorMode, func: Any, types: Any, args: Any = (), kwargs: Any = None
) -> Any:
    """An op under FakeTensorMode. Fake tensors may carry real ones; the mode's own way of running
    those takes an absent optional tensor for a changed one.
    """
    carries_real = mode.propagate_real_tensors
    mode.propagate_real_tensors = False
    try:
        outputs: Any = mode.__torch_dispatch__(func, types, args, kwargs or {})
    finally:
        mode.propagate_real_tensors = carries_real
    real = [
        a.real_tensor if isinstance(a, FakeTensor) else a.clone() if isinstance(a, Tensor) else a
        for a in args
    ]
    tensors = [r for r, a in zip(real, args, strict=True) if isinstance(a, Tensor)]
    if carries_real and all(isinstance(t, Tensor) for t in tensors):
        made = func(*real)
        pairs = (outputs, made) if isinstance(outputs, tuple) else ((outputs,), (made,))
        for fake, output in zip(*pairs, strict=True):
            if fake is not None:
                fake.real_tensor = output
    return outputs


for _op in TRACED:
    torch.library.register_torch_dispatch(_op, FakeTensorMode, _in_fake_mode)
