"""Batch normalisation as functions: the way from PyTorch's calls to bnext's ops, and gradients.

An ordinary eager call goes straight to an op (through :class:`BatchNormFunction` where a gradient
is wanted). One that a tracer, a transform or a tensor subclass watches is routed by `_detour`, and
one that the op refused by `_after_refusal`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.overrides import has_torch_function_variadic
from torch.utils._python_dispatch import _detect_infra_mode

from bnext._autograd import (
    BatchNormFunction,
    apply,
    is_inference,
    refuse_gradients_of_statistics,
    traced_apply,
)
from bnext._ops import _C, DEVICES, EAGER

__all__ = ["BatchNormFunction", "batch_norm", "batch_norm_act"]

train, inference = EAGER.train, EAGER.inference
# Looked up once: on a small tensor the call is the cost, and each dot is 10 ns of it.
is_scripting: Callable[[], bool] = torch.jit.is_scripting
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
is_grad_enabled = torch.is_grad_enabled
is_inference_mode = torch.is_inference_mode_enabled
tracing_state = torch._C._get_tracing_state
transforms_active = torch._C._are_functorch_transforms_active
_is_tracing: Callable[[], bool] = torch.jit.is_tracing
# Tensors the ops take as they are: besides plain ones, those that only stand in for them.
_NATIVE_TYPES: tuple[type, ...] = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
_NO_OVERRIDE = torch._C._disabled_torch_function_impl
_TENSOR_OR_NONE = (Tensor, type(None))
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    if not is_scripting() and has_torch_function_variadic(
        input, running_mean, running_var, weight, bias
    ):
        node: Tensor | None = _fx_node(
            batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps
        )
        if node is not None:
            return node
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
        if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
            node: Tensor | None = _fx_node(
                batch_norm_act, input, running_mean, running_var, weight, bias, residual,
                training, momentum, eps, act,
            )  # fmt: skip
            if node is not None:
                return node
        if not (
            isinstance(input, Tensor)
            and isinstance(running_mean, _TENSOR_OR_NONE)
            and isinstance(running_var, _TENSOR_OR_NONE)
            and isinstance(weight, _TENSOR_OR_NONE)
            and isinstance(bias, _TENSOR_OR_NONE)
            and type(training) is bool
            and momentum is not None  # which only a module with a counter has a meaning for
        ):
            _ask_torch(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if input.dim() < 2:
            if input.numel() == 0:  # torch passes it on, without channels as well
                output = F.batch_norm(
                    input, running_mean, running_var, weight, bias, training, momentum, eps
                )
                return output.relu() if is_relu(act) else output
            if input.dim() == 1 and running_mean is None and running_var is None:
                raise IndexError(
                    "Dimension out of range (expected to be in range of [-1, 0], but got 1): "
                    f"expected an input of at least 2 dimensions (N, C, *), got {[*input.shape]}"
                )
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
        or has_torch_function_variadic(weight, bias, residual, running_mean, running_var)
        or is_dynamo_compiling()
        or transforms_active()
        or forward_ad._current_level >= 0
        or tracing_state() is not None
    ):
        detour = _detour(input, weight, bias, residual, running_mean, running_var, training)
        if detour is not None:
            return detour(
                input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
                training, momentum, eps, relu,
            )  # fmt: skip
    if (
        (training and input.shape[0] == 1)
        or type(momentum) is not float
        or type(eps) is not float
        or eps <= 0.0
        or running_mean is None
        or running_var is None
    ):
        _check_values(input, running_mean, running_var, training, momentum, eps)
    try:
        if (
            is_grad_enabled()
            and (
                (weight is not None and weight.requires_grad)
                or input.requires_grad
                or (bias is not None and bias.requires_grad)
                or (residual is not None and residual.requires_grad)
                or (running_mean is not None and running_mean.requires_grad)
                or (running_var is not None and running_var.requires_grad)
            )
            and not is_inference_mode()
        ):
            return apply(
                input, weight, bias, residual,
                (running_mean, running_var, num_batches_tracked, training, momentum, eps, relu),
            )  # fmt: skip
        output: Tensor
        if training:
            if num_batches_tracked is not None and is_inference(num_batches_tracked):
                num_batches_tracked.add_(0)  # raises, unless in inference mode
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
        return _after_refusal(
            error, input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
            training, momentum, eps, relu,
        )  # fmt: skip


def _check_values(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> None:
    """Refuse what :func:`torch.nn.functional.batch_norm` refuses beyond shapes and dtypes."""
    without = (running_mean is None) + (running_var is None)
    if training and without == 1 and input.numel() > 0:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if (
        (training and math.prod(input.shape[2:], start=input.shape[0]) == 1)
        or (without and not training)
        or not isinstance(momentum, float | int | None)
        or not isinstance(eps, float | int)
        or eps <= 0.0
    ):
        momentum = 0.0 if momentum is None else momentum
        _ask_torch(input, running_mean, running_var, None, None, training, momentum, eps)


def _ask_torch(input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any,
               training: Any, momentum: Any, eps: Any) -> None:  # fmt: skip
    """Raise what the installed torch raises for arguments like these, in its own words.

    Its checks need no values, so meta tensors stand in for those given.
    """
    input, running_mean, running_var, weight, bias = (
        torch.empty(t.shape, device="meta") if isinstance(t, Tensor) else t
        for t in (input, running_mean, running_var, weight, bias)
    )
    F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _fx_node(function: Callable[..., Tensor], *args: Any) -> Any:
    """The call as a leaf of the graph that torch.fx traces; None where no proxy is among `args`."""
    for arg in args:
        if isinstance(arg, Proxy):
            return arg.tracer.create_proxy("call_function", function, args, {})
    return None


def _detour(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
) -> Callable[..., Tensor] | None:
    """How to run a call that is not an ordinary eager one; None for the ordinary way."""
    if any(map(_overrides, (input, weight, bias, residual, running_mean, running_var))):
        return _overridden
    if (
        forward_ad._current_level >= 0
        or tracing_state() is not None
        or type(input) not in _NATIVE_TYPES
    ):
        return compose
    transformed = transforms_active()
    compiling, ahead_of_time = torch.compiler.is_compiling(), type(input) is FunctionalTensor
    if compiling or ahead_of_time:
        # In eval the compiler folds and fuses ATen's batch norm; in training ours is faster. What
        # is exported is for others, which only know ATen's.
        exporting = torch.compiler.is_exporting() or (ahead_of_time and _exports_ahead_of_time())
        if not training or transformed or exporting:
            return _counted_first
        return _traced if compiling else None
    if transformed:
        grad = torch._C._functorch.TransformType.Grad
        stack = torch._C._functorch.get_interpreter_stack() or []
        return _traced if all(level.key() == grad for level in stack) else compose
    return None


def _counted_first(
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
    """`compose` with torch.nn's operations in their order, for passes over the graph."""
    if num_batches_tracked is not None:
        momentum = count(num_batches_tracked, momentum)
    return compose(
        input,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        None,
        training,
        momentum,
        eps,
        relu,
    )


def _exports_ahead_of_time() -> bool:
    """Whether AOTAutograd exports, which `torch.compiler.is_exporting` does not say."""
    mode = _detect_infra_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    return mode is not None and bool(mode.export)


def _overrides(tensor: Any) -> bool:
    """Whether a tensor has its own `__torch_function__`, leaving out active modes."""
    kind = type(tensor)
    return kind not in _NATIVE_TYPES and (
        getattr(kind, "__torch_function__", _NO_OVERRIDE) is not _NO_OVERRIDE
    )


def _overridden(*args: Any) -> Tensor:
    """For proxies of torch.fx and tensors with a `__torch_function__`, which knows torch's."""
    node = _fx_node(normalize, *args)
    return compose(*args) if node is None else node


def _after_refusal(
    error: RuntimeError,
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
    """Run what the op refused but torch takes, and raise `error` for the rest.

    The arguments decide, not the error: one that was raised after the op must not run it again.
    """
    if num_batches_tracked is not None and not is_native_counter(num_batches_tracked, input):
        with undone_on_error(num_batches_tracked):
            return normalize(
                input, weight, bias, residual, running_mean, running_var, None,
                training, count(num_batches_tracked, momentum), eps, relu,
            )  # fmt: skip
    tensors = [
        t for t in (input, weight, bias, residual, running_mean, running_var) if t is not None
    ]
    if input.is_cuda and "cuda" not in DEVICES:
        raise RuntimeError(
            "bnext was built without CUDA and cannot normalise a tensor on a GPU: "
            f"{_C.build_info()['cuda_missing']}"
        ) from error
    if input.numel() == 0 or not all(map(_has_kernels, tensors)):
        with undone_on_error(running_mean, running_var, num_batches_tracked):
            return compose(
                input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
                training, momentum, eps, relu,
            )  # fmt: skip
    if input.dtype not in _DTYPES:
        raise NotImplementedError(str(error)) from error  # torch's type for a dtype
    raise error


def _has_kernels(tensor: Tensor) -> bool:
    return (
        type(tensor) in _NATIVE_TYPES
        and tensor.device.type in DEVICES
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized)
    )


def is_native_counter(num_batches_tracked: Tensor, input: Tensor) -> bool:
    """Whether the op can count in it; anything else that has an `add_` is torch's to count in."""
    return (
        num_batches_tracked.dtype is torch.int64
        and num_batches_tracked.numel() == 1
        and num_batches_tracked.device == input.device
    )


def count(num_batches_tracked: Tensor, momentum: float | None) -> float:
    """Count a batch, and return the weight of its statistics."""
    num_batches_tracked.add_(1)
    return 1.0 / float(num_batches_tracked) if momentum is None else momentum


@contextmanager
def undone_on_error(*state: Tensor | None) -> Iterator[None]:
    """Give running statistics and counter their values back where a call does not succeed."""
    before = [(t, t.detach().clone()) for t in state if t is not None and _has_values(t)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in before:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        raise


def _has_values(tensor: Tensor) -> bool:
    """Whether a batch norm may have written to a tensor, and its values can be compared."""
    return (
        tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_nested or isinstance(tensor, FakeTensor))
        and not (isinstance(tensor, FunctionalTensor) or transforms_active())
    )


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
    if residual is not None and not _is_tracing():
        if residual.shape != input.shape:
            raise RuntimeError(
                f"residual: expected input's shape {input.shape}, got {residual.shape}"
            )
        if residual.device != input.device:
            raise RuntimeError(
                f"residual: expected input's device {input.device}, got {residual.device}"
            )
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


def _traced(
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
    if not (isinstance(momentum, float | int | None) and isinstance(eps, float | int)):
        # NumPy's scalars and tensors, which have no value yet: torch takes them, or refuses.
        return compose(
            input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
            training, momentum, eps, relu,
        )  # fmt: skip
    _check_values(input, running_mean, running_var, training, momentum, eps)
    if is_grad_enabled():
        refuse_gradients_of_statistics(running_mean, running_var)
    if num_batches_tracked is not None and not is_native_counter(num_batches_tracked, input):
        momentum = count(num_batches_tracked, momentum)
        num_batches_tracked = None
    if residual is input:
        residual = input.view_as(input)  # Dynamo takes no tensor twice
    return traced_apply(
        input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
        training, momentum, eps, relu,
    )  # fmt: skip
