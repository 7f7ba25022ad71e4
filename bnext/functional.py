"""Batch normalisation as functions: the way from PyTorch's calls to bnext's ops, and gradients.

An ordinary eager call goes straight to an op (through :class:`BatchNormFunction` where a gradient
is wanted). One that a tracer, a transform or a tensor subclass watches is routed by `_detour`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from bnext._autograd import BatchNormFunction, apply, traced_apply
from bnext._ops import _C, EAGER

__all__ = ["BatchNormFunction", "batch_norm", "batch_norm_act"]

train, inference = EAGER.train, EAGER.inference
# Looked up once: on a small tensor the call is the cost, and each dot is 10 ns of it.
is_scripting: Callable[[], bool] = torch.jit.is_scripting
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
is_grad_enabled = torch.is_grad_enabled
tracing_state = torch._C._get_tracing_state
transforms_active = torch._C._are_functorch_transforms_active
_is_tracing: Callable[[], bool] = torch.jit.is_tracing
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Tensors the ops take as they are: besides plain ones, those that only stand in for them.
_NATIVE_TYPES: tuple[type, ...] = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Apply batch normalisation, as :func:`torch.nn.functional.batch_norm` does.

    Same arguments, results and errors; see there. What differs: the activation is read from memory
    once where it fits the cache, and a call that raises has changed no running statistic.
    """
    return batch_norm_act(
        input, running_mean, running_var, weight, bias, None, training, momentum, eps, None
    )


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str | None = "relu",
) -> Tensor:
    r"""Apply batch normalisation, add a residual and apply an activation, in one pass.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma
        + \beta + \mathrm{residual}\right)

    Equal to ``relu(batch_norm(input, ...) + residual)``, of which neither intermediate result is
    written to memory; what backward needs of the activation is one bit per element, or nothing
    where there is no residual. The normalisation is Algorithm 1 of `Ioffe & Szegedy, 2015
    <https://arxiv.org/abs/1502.03167>`__.

    Args:
        input: :math:`(N, C, *)` with up to three spatial dimensions.
        running_mean: :math:`(C)`, updated in place if :attr:`training`. ``None``: not tracked.
        running_var: :math:`(C)`, like :attr:`running_mean`, of the unbiased variance.
        weight: :math:`\gamma` of shape :math:`(C)`; ``None`` for ones.
        bias: :math:`\beta` of shape :math:`(C)`; ``None`` for zeros.
        residual: a tensor of :attr:`input`'s shape and dtype, or ``None``.
        training: normalise by the statistics of the batch, not by the running ones.
        momentum: the weight of the batch in the running statistics.
        eps: added to the variance.
        act: ``"relu"``, or ``None`` for no activation.

    Shape:
        - Input, residual, output: :math:`(N, C)`, :math:`(N, C, L)`, :math:`(N, C, H, W)` or
          :math:`(N, C, D, H, W)`; the output is in :attr:`input`'s memory format.

    Returns:
        The normalised tensor, of :attr:`input`'s dtype.

    Raises:
        ValueError: :attr:`act` is unknown, :attr:`eps` is not positive, or in training there is
            one value per channel only.
        RuntimeError: shapes, dtypes or devices do not fit together.

    Example::

        >>> x, shortcut = torch.randn(2, 8, 16, 8, 8)
        >>> y = bnext.functional.batch_norm_act(x, None, None, residual=shortcut, training=True)
    """
    if is_scripting():
        return compose(
            input, weight, bias, residual, running_mean, running_var, None,
            training, momentum, eps, act is not None,
        )  # fmt: skip
    else:  # noqa: RET505  (the script compiler leaves out an else, not what follows)
        if input.dim() == 0:
            raise IndexError("input: expected at least 2 dimensions, (N, C, *), got a scalar")
        return normalize(
            input, weight, bias, residual, running_mean, running_var, None,
            training, momentum, eps, is_relu(act),
        )  # fmt: skip


def is_relu(act: str | None) -> bool:
    """Whether an activation is ReLU rather than none; any other is an error."""
    if act is not None and act != "relu":
        raise ValueError(f"act must be 'relu' or None, but got {act!r}")
    return act is not None


def normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """What every function and module of bnext calls; the arguments of `BatchNormFunction`."""
    # Every instruction from here to the op counts: on small tensors the call is the cost.
    if (
        type(input) is not Tensor
        or is_dynamo_compiling()
        or transforms_active()
        or forward_ad._current_level >= 0
        or tracing_state() is not None
    ):
        detour = _detour(input, training)
        if detour is not None:
            return detour(
                input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
                training, momentum, eps, relu,
            )  # fmt: skip
    if (
        (training and input.shape[0] == 1)
        or eps <= 0.0
        or running_mean is None
        or running_var is None
    ):
        _check_values(input, running_mean, running_var, training, eps)
    try:
        if is_grad_enabled() and (
            (weight is not None and weight.requires_grad)
            or input.requires_grad
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
            or (running_mean is not None and running_mean.requires_grad)
        ):
            return apply(
                input, weight, bias, residual,
                (running_mean, running_var, num_batches_tracked, training, momentum, eps, relu),
            )  # fmt: skip
        output: Tensor
        if training:
            output = train(
                input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
                momentum, eps, relu, False,
            )[0]  # fmt: skip
        else:
            output = inference(
                input, weight, bias, residual, running_mean, running_var, eps, relu, False
            )[0]
        return output
    except RuntimeError as error:
        if input.shape == (0,):  # torch passes an empty tensor on, without channels as well
            pass
        elif not isinstance(error, NotImplementedError):
            if input.dtype in _DTYPES:
                raise
            raise NotImplementedError(str(error)) from error  # torch's type for a dtype
        elif input.is_cuda:
            raise RuntimeError(
                "bnext was built without CUDA and cannot normalise a tensor on a GPU: "
                f"{_C.build_info()['cuda_missing']}"
            ) from error
        # A device or layout without a kernel of ours (xpu, mkldnn, ...).
        return compose(
            input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
            training, momentum, eps, relu,
        )  # fmt: skip


def _check_values(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """Refuse what :func:`torch.nn.functional.batch_norm` refuses beyond shapes and dtypes."""
    if training and math.prod(input.shape[2:], start=input.shape[0]) == 1:
        raise ValueError(
            "batch normalisation needs more than 1 value per channel when training, but the input "
            f"has size {tuple(input.shape)}"
        )
    if eps <= 0.0:
        # Which eps is refused when depends on torch's version: ask the one installed.
        stats = torch.zeros(1, device="meta")
        F.batch_norm(torch.zeros(2, 1, device="meta"), stats, stats, training=training, eps=eps)
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError("running_mean and running_var must be given when not training")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or neither")


def _detour(input: Tensor, training: bool) -> Callable[..., Tensor] | None:
    """How to run a call that is not an ordinary eager one; None for the ordinary way."""
    if (
        forward_ad._current_level >= 0
        or tracing_state() is not None
        or type(input) not in _NATIVE_TYPES
    ):
        return compose
    transformed = transforms_active()
    if torch.compiler.is_compiling():
        # In eval the compiler folds and fuses ATen's batch norm; in training ours is faster.
        return _traced if training and not transformed else compose
    if transformed:
        grad = torch._C._functorch.TransformType.Grad
        stack = torch._C._functorch.get_interpreter_stack() or []
        return _traced if all(level.key() == grad for level in stack) else compose
    return None


def compose(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """The same from ATen's operations, for whoever only knows those (TorchScript compiles it)."""
    if residual is not None and not _is_tracing() and residual.shape != input.shape:
        raise RuntimeError(f"residual: expected input's shape {input.shape}, got {residual.shape}")
    factor = 0.0
    if momentum is not None:
        factor = momentum
    elif num_batches_tracked is not None:
        factor = 1.0 / (float(num_batches_tracked) + 1.0)
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if residual is not None:
        output = output + residual
    return F.relu(output) if relu else output


def _traced(*args: Any) -> Tensor:
    input, weight, bias, residual, running_mean, running_var, _, training, _, eps, _ = args
    _check_values(input, running_mean, running_var, training, eps)
    if residual is input:
        residual = input.view_as(input)  # Dynamo takes no tensor twice
    return traced_apply(input, weight, bias, residual, *args[4:])
