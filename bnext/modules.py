"""Drop-in modules: torch.nn's batch norms with the forward pass on bnext's ops.

Each subclasses torch.nn's class of the same name and adds no state, so that whatever looks for a
batch norm finds one, and `convert` can turn one into the other by its class alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from bnext._activation import activate, check_activation, parameter
from bnext._call import is_scripting, normalize, tracing_state
from bnext._detours import compose, undone_on_error

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
]


def statistics(
    module: torch.nn.modules.batchnorm._NormBase,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
    """(running_mean, running_var, num_batches_tracked, training) of a call of `module` now.

    What the call does not need is not read: old and stripped modules may lack it.
    """
    training = module.training
    if training and not module.track_running_stats:
        return None, None, None, True
    try:
        # Without Module.__getattr__, which takes 0.4 us each.
        buffers = module._buffers
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        num_batches_tracked = buffers["num_batches_tracked"] if training else None
    except KeyError:  # computed, or not there, which the attribute says
        running_mean, running_var = module.running_mean, module.running_var
        num_batches_tracked = module.num_batches_tracked if training else None
    training = training or (running_mean is None and running_var is None)
    return running_mean, running_var, num_batches_tracked, training


def fx_leaf(module: torch.nn.Module, input: Proxy, residual: Any) -> Any:
    """A call of `module` in the graph of torch.fx, which keeps torch.nn's modules whole too."""
    tracer: Any = input.tracer
    arguments = (input,) if residual is None else (input, residual)
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, {})


def add_by_its_rules(
    norm: Callable[[Tensor], Tensor],
    state: Sequence[Tensor | None],
    input: Tensor,
    residual: Tensor,
    act: str | None,
    act_param: float,
) -> Tensor:
    """Activate ``norm(input) + residual`` where no op fuses the addition, all or nothing."""
    if torch.compiler.is_compiling():  # which would have refused it by now
        return activate(norm(input) + residual, act, act_param)
    # The usual reason to refuse, in torch's words: within a transform nothing can be undone.
    torch._C._infer_size(input.shape, residual.shape)
    with undone_on_error(*state):
        return activate(norm(input) + residual, act, act_param)


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """The forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch, and in training move the running statistics; see the class."""
        # The two common calls, in few instructions: on a small tensor the call is the cost.
        if type(input) is Tensor:
            self._check_input_dim(input)
            training = self.training
            # Without Module.__getattr__, which takes 0.4 us each.
            parameters, buffers = self._parameters, self._buffers
            try:
                weight, bias = parameters["weight"], parameters["bias"]
                running_mean, running_var = buffers["running_mean"], buffers["running_var"]
                num_batches_tracked = buffers["num_batches_tracked"] if training else None
            except KeyError:  # pruned, parametrised, or not needed
                return self._normalize(input, None, None, 0.0)
            if self.track_running_stats if training else running_mean is not None:
                return normalize(
                    input, weight, bias, None, running_mean, running_var, num_batches_tracked,
                    training, self.momentum, self.eps, None, 0.0,
                )  # fmt: skip
        return self._normalize(input, None, None, 0.0)

    def _scripted_forward(self, input: Tensor) -> Tensor:
        return self._compose(input, None, None, 0.0)

    # torch.jit.script, which knows no `try`, compiles a function that is wrapped in its place.
    forward.__wrapped__ = _scripted_forward  # type: ignore[attr-defined]

    def _compose(
        self, input: Tensor, residual: Tensor | None, act: str | None, act_param: float
    ) -> Tensor:
        self._check_input_dim(input)
        tracked = not self.training or self.track_running_stats
        return compose(
            input,
            self.weight,
            self.bias,
            residual,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.num_batches_tracked if self.training and tracked else None,
            self.training or (self.running_mean is None and self.running_var is None),
            self.momentum,
            self.eps,
            act,
            act_param,
        )

    @torch.jit.unused
    def _normalize(
        self, input: Tensor, residual: Tensor | None, act: str | None, act_param: float
    ) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):
            if getattr(input.tracer, "root", None) is not self:
                return fx_leaf(self, input, residual)
        else:
            self._check_input_dim(input)
            if (
                isinstance(residual, Tensor)
                and tracing_state() is None  # there shapes are tensors, and all goes to `compose`
                and (residual.shape != input.shape or residual.dtype != input.dtype)
            ):
                return add_by_its_rules(
                    lambda x: self._normalize(x, None, None, 0.0), statistics(self)[:3],
                    input, residual, act, act_param,
                )  # fmt: skip
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # pruning and parametrisations compute what they took away
            weight, bias = self.weight, self.bias
        running_mean, running_var, num_batches_tracked, training = statistics(self)
        return normalize(
            input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
            training, self.momentum, self.eps, act, act_param,
        )  # fmt: skip


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    r"""Batch normalisation of a 2D or 3D input: a drop-in for :class:`torch.nn.BatchNorm1d`.

    Same constructor, parameters, buffers, ``state_dict``, results and errors; see there. What
    differs: a call that raises has not counted a batch. See :class:`bnext.BatchNorm2d`.

    Shape:
        - Input: :math:`(N, C)` or :math:`(N, C, L)`
        - Output: as the input

    Example::

        >>> m = bnext.BatchNorm1d(100)
        >>> output = m(torch.randn(20, 100))
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    r"""Batch normalisation of a 4D input: a drop-in for :class:`torch.nn.BatchNorm2d`.

    Same constructor, parameters, buffers, ``state_dict``, results and errors; see there. What
    differs: the activation is read from memory once where it fits the cache, the batch is counted
    in the same op, and a call that raises has not counted one.

    What it computes is Algorithm 1 of `Ioffe & Szegedy, 2015 <https://arxiv.org/abs/1502.03167>`__,
    with torch.nn's running statistics. :func:`bnext.explain` says how a given shape is computed.

    Shape:
        - Input: :math:`(N, C, H, W)`, contiguous or channels_last without a copy
        - Output: as the input, in its memory format

    Example::

        >>> m = bnext.BatchNorm2d(100)
        >>> output = m(torch.randn(20, 100, 35, 45))
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    r"""Batch normalisation of a 5D input: a drop-in for :class:`torch.nn.BatchNorm3d`.

    Same constructor, parameters, buffers, ``state_dict``, results and errors; see there. What
    differs: a call that raises has not counted a batch. See :class:`bnext.BatchNorm2d`.

    Shape:
        - Input: :math:`(N, C, D, H, W)`, contiguous or channels_last_3d without a copy
        - Output: as the input, in its memory format

    Example::

        >>> m = bnext.BatchNorm3d(100)
        >>> output = m(torch.randn(20, 100, 35, 45, 10))
    """


class LazyBatchNorm1d(_BatchNorm, torch.nn.LazyBatchNorm1d):
    """A :class:`bnext.BatchNorm1d` that takes its channels from the first input.

    As :class:`torch.nn.LazyBatchNorm1d`.
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_BatchNorm, torch.nn.LazyBatchNorm2d):
    """A :class:`bnext.BatchNorm2d` that takes its channels from the first input.

    As :class:`torch.nn.LazyBatchNorm2d`.
    """

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_BatchNorm, torch.nn.LazyBatchNorm3d):
    """A :class:`bnext.BatchNorm3d` that takes its channels from the first input.

    As :class:`torch.nn.LazyBatchNorm3d`.
    """

    cls_to_become = BatchNorm3d


def act_repr(act: str | None, act_param: float | None) -> str:
    """The activation as `extra_repr` gives it."""
    return f"act={act!r}" + ("" if act_param is None else f", act_param={act_param}")


class _BatchNormAct(_BatchNorm):
    """The activation and the residual."""

    __constants__ = [*torch.nn.BatchNorm2d.__constants__, "act", "act_param"]  # noqa: RUF012
    act: str | None
    act_param: float | None = None  # what was pickled before there was one has none

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: str | None = "relu",
        act_param: float | None = None,
    ) -> None:
        check_activation(act, act_param)
        # Only where asked for: torch before 2.13 has no such argument, and says so.
        optional: dict[str, Any] = {} if bias else {"bias": False}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **optional
        )
        self.act = act
        self.act_param = None if act_param is None else float(act_param)  # a script takes no int

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise a batch, add :attr:`residual` and apply the activation; see the class."""
        if is_scripting():
            param = parameter(self.act, self.act_param)
            return self._compose(input, residual, self.act, param)
        else:  # noqa: RET505  (the script compiler leaves out an else, not what follows)
            act, act_param = self.act, self.act_param
            check_activation(act, act_param)
            return self._normalize(input, residual, act, parameter(act, act_param))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {act_repr(self.act, self.act_param)}"


class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    r"""Batch normalisation, residual and activation of a 2D or 3D input, in one pass.

    See :class:`bnext.BatchNormAct2d`, of which this is the form for :math:`(N, C)` and
    :math:`(N, C, L)`.

    Example::

        >>> m = bnext.BatchNormAct1d(100)
        >>> output = m(torch.randn(20, 100))
    """


class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    r"""Batch normalisation, residual and activation of a 4D input, in one pass.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma
        + \beta + \mathrm{residual}\right)

    In place of ``act(bn(x) + residual)`` or ``act(bn(x))``: with ReLU neither the normalised tensor
    nor the sum is written to memory; other activations follow in torch's operations. A
    :class:`bnext.BatchNorm2d` with the same parameters, buffers and ``state_dict``.

    Args:
        num_features: :math:`C`, as in :class:`torch.nn.BatchNorm2d`, as is all that follows but
            :attr:`act` and :attr:`act_param`
        eps: added to the variance. Default: 1e-5
        momentum: the weight of the batch in the running statistics; ``None`` for their cumulative
            average. Default: 0.1
        affine: whether there are :math:`\gamma` and :math:`\beta`. Default: ``True``
        track_running_stats: whether there are running statistics. Default: ``True``
        device: where the parameters are
        dtype: the type of the parameters
        bias: whether there is a :math:`\beta` (from torch 2.13 on). Default: ``True``
        act: a name, or ``None`` for no activation; see :func:`bnext.functional.batch_norm_act`.
            Default: ``"relu"``
        act_param: the negative slope of ``"leaky_relu"``, the alpha of ``"elu"``; ``None`` for
            torch.nn's default

    Shape:
        - Input: :math:`(N, C, H, W)`
        - Residual: as the input, or ``None``. One of another shape or dtype is added by the rules
          of ``+``, outside the fused pass (:meth:`torch.jit.script` takes none).
        - Output: as the input, in its memory format

    Raises:
        ValueError: :attr:`act` is unknown or takes no :attr:`act_param`; else as
            :class:`torch.nn.BatchNorm2d`.
        TypeError: :attr:`act_param` is no number, or the residual no tensor.

    .. warning::
        What replaces a batch norm by its type or attributes, such as
        :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` (use :class:`bnext.SyncBatchNorm`'s),
        :func:`torch.nn.utils.fuse_conv_bn_eval` or timm's ``freeze_batch_norm_2d``, takes this for
        one and drops the activation. A batch norm that :func:`bnext.convert` fused with the ReLU
        after it may be replaced: its caller notices.

    Example::

        >>> m = bnext.BatchNormAct2d(64)
        >>> x, shortcut = torch.randn(2, 8, 64, 14, 14)
        >>> output = m(x)
        >>> output = m(x, shortcut)
    """


class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    r"""Batch normalisation, residual and activation of a 5D input, in one pass.

    See :class:`bnext.BatchNormAct2d`, of which this is the form for :math:`(N, C, D, H, W)`.

    Example::

        >>> m = bnext.BatchNormAct3d(100)
        >>> output = m(torch.randn(2, 100, 5, 7, 7))
    """
