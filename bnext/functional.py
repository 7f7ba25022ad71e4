"""Batch normalisation as functions."""

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from bnext._activation import Act, activate, named, parameter
from bnext._autograd import BatchNormFunction
from bnext._call import is_scripting, normalize
from bnext._detours import ask_torch, compose, fx_node

__all__ = ["BatchNormFunction", "batch_norm", "batch_norm_act"]

_TENSOR_OR_NONE = (Tensor, type(None))


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

    Same arguments, results and errors; see there. The differences: the activation is read from
    memory once if it fits the cache, and a call that raises has changed no running statistic.
    """
    if not is_scripting() and has_torch_function_variadic(
        input, running_mean, running_var, weight, bias
    ):
        node: Tensor | None = fx_node(
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
    act: Act = "relu",
    act_param: float | None = None,
) -> Tensor:
    r"""Apply batch normalisation, add a residual and apply an activation, in one pass.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma
        + \beta + \mathrm{residual}\right)

    Equal to ``act(batch_norm(input, ...) + residual)``, without writing an intermediate result to
    memory. Backward needs the sign of the sum for ReLU, ReLU6 and leaky ReLU (one bit per element,
    or nothing if there is no residual), and computes the sum again for the others, which keeps the
    residual alive.
    The normalisation is Algorithm 1 of
    `Ioffe & Szegedy, 2015 <https://arxiv.org/abs/1502.03167>`__.

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
        act: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"silu"``, ``"hardswish"``, ``"gelu"``,
            ``"gelu_tanh"``, ``"elu"``, ``"tanh"``, ``"sigmoid"``; a module of torch.nn that
            computes one of these, such as ``nn.LeakyReLU(0.1)``, or its class; or ``None`` (also
            ``nn.Identity``) for no activation. A script takes names only.
        act_param: the negative slope of ``"leaky_relu"`` (default 0.01) or the alpha of ``"elu"``
            (default 1.0); ``None`` where :attr:`act` is a module, which has its own.

    Shape:
        - Input, residual, output: :math:`(N, C)`, :math:`(N, C, L)`, :math:`(N, C, H, W)` or
          :math:`(N, C, D, H, W)`; the output is in :attr:`input`'s memory format.

    Returns:
        The normalised tensor, of :attr:`input`'s dtype.

    Raises:
        ValueError: :attr:`act` is unknown or takes no :attr:`act_param`, :attr:`eps` is not
            positive, or in training there is only one value per channel.
        TypeError: :attr:`residual` is no tensor, or :attr:`act_param` no number.
        RuntimeError: shapes, dtypes or devices do not fit together.

    Example::

        >>> x, shortcut = torch.randn(2, 8, 16, 8, 8)
        >>> y = bnext.functional.batch_norm_act(x, None, None, residual=shortcut, training=True)
    """
    if is_scripting():
        return compose(
            input, weight, bias, residual, running_mean, running_var, None,
            training, momentum, eps, act, parameter(act, act_param),  # type: ignore[arg-type]
        )  # fmt: skip
    else:  # noqa: RET505  (the script compiler skips an else, but not what follows)
        act, act_param = named(act, act_param)
        if has_torch_function_variadic(input, running_mean, running_var, weight, bias, residual):
            node: Tensor | None = fx_node(
                batch_norm_act, input, running_mean, running_var, weight, bias, residual,
                training, momentum, eps, act, act_param,
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
            and momentum is not None  # None means something only to a module with a counter
        ):
            ask_torch(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if input.dim() < 2:
            if input.numel() == 0:  # torch accepts it, even without channels
                output = F.batch_norm(
                    input, running_mean, running_var, weight, bias, training, momentum, eps
                )
                return activate(output, act, parameter(act, act_param))
            if input.dim() == 1 and running_mean is None and running_var is None:
                raise IndexError(
                    "Dimension out of range (expected to be in range of [-1, 0], but got 1): "
                    f"expected an input of at least 2 dimensions (N, C, *), got {[*input.shape]}"
                )
        return normalize(
            input, weight, bias, residual, running_mean, running_var, None,
            training, momentum, eps, act, parameter(act, act_param),
        )  # fmt: skip
