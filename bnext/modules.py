"""Drop-in modules: torch.nn's batch norms with the forward pass on bnext's ops.

Each is a subclass of torch.nn's class of the same name and adds no state. So whatever looks for a
batch norm finds one, and `convert` only has to change a module's class.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from bnext._activation import Act, activate, check_activation, named, parameter
from bnext._call import is_scripting, normalize, tracing_state
from bnext._detours import compose, undone_on_error

__all__ = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct1d", "BatchNormAct2d",
    "BatchNormAct3d", "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d",
]  # fmt: skip


def statistics(
    module: torch.nn.modules.batchnorm._NormBase,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
    """(running_mean, running_var, num_batches_tracked, training) of a call of `module` now.

    Reads only what the call needs: old and stripped modules may lack the rest.
    """
    training = module.training
    if training and not module.track_running_stats:
        return None, None, None, True
    try:
        # Without Module.__getattr__, which takes 0.4 us each.
        buffers = module._buffers
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
        num_batches_tracked = buffers["num_batches_tracked"] if training else None
    except KeyError:  # computed or missing: the attribute knows
        running_mean, running_var = module.running_mean, module.running_var
        num_batches_tracked = module.num_batches_tracked if training else None
    training = training or (running_mean is None and running_var is None)
    return running_mean, running_var, num_batches_tracked, training


def fx_leaf(module: torch.nn.Module, input: Proxy, residual: Any) -> Any:
    """A call of `module` in torch.fx's graph, where torch.nn's modules stay whole too."""
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
    """Activate ``norm(input) + residual``, which no op fuses; an error leaves `state` unchanged."""
    if torch.compiler.is_compiling():  # it refuses before anything runs
        return activate(norm(input) + residual, act, act_param)
    # Raises the usual error first, because within a transform nothing can be undone.
    torch._C._infer_size(input.shape, residual.shape)
    with undone_on_error(*state):
        return activate(norm(input) + residual, act, act_param)


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch, and in training move the running statistics.

        Args:
            input: float32, float64, bfloat16 or float16, on the device of the parameters, which
                have its dtype or are float32. The class says of which shape.

        Returns:
            A new tensor of :attr:`input`'s shape, dtype and memory format.

        Raises:
            ValueError: :attr:`input` has another number of dimensions, or in training only one
                value per channel.
            RuntimeError: shapes, dtypes or devices do not fit together, or there is no kernel for
                them. No batch is counted then, whatever the error.
        """
        # The two common calls, in few instructions: on a small tensor calling is the cost.
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

    # torch.jit.script knows no `try`. It compiles the function that `forward` says it wraps.
    forward.__wrapped__ = _scripted_forward  # type: ignore[attr-defined]

    def _compose(
        self, input: Tensor, residual: Tensor | None, act: str | None, act_param: float
    ) -> Tensor:
        self._check_input_dim(input)
        tracked = not self.training or self.track_running_stats
        return compose(
            input, self.weight, self.bias, residual,
            self.running_mean if tracked else None, self.running_var if tracked else None,
            self.num_batches_tracked if self.training and tracked else None,
            self.training or (self.running_mean is None and self.running_var is None),
            self.momentum, self.eps, act, act_param,
        )  # fmt: skip

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
                and tracing_state() is None  # shapes are tensors there, and `compose` takes all
                and (residual.shape != input.shape or residual.dtype != input.dtype)
            ):
                return add_by_its_rules(
                    lambda x: self._normalize(x, None, None, 0.0), statistics(self)[:3],
                    input, residual, act, act_param,
                )  # fmt: skip
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:  # pruning and parametrisations compute them
            weight, bias = self.weight, self.bias
        running_mean, running_var, num_batches_tracked, training = statistics(self)
        return normalize(
            input, weight, bias, residual, running_mean, running_var, num_batches_tracked,
            training, self.momentum, self.eps, act, act_param,
        )  # fmt: skip


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    r"""Batch normalisation of a 2D or 3D input: a drop-in for :class:`torch.nn.BatchNorm1d`.

    Same constructor, parameters, buffers, ``state_dict``, results and errors; see there. The one
    difference: a call that raises has not counted a batch. See :class:`bnext.BatchNorm2d`.

    Shape:
        - Input: :math:`(N, C)` or :math:`(N, C, L)`
        - Output: as the input

    Example::

        >>> m = bnext.BatchNorm1d(100)
        >>> output = m(torch.randn(20, 100))
    """


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    r"""Batch normalisation of a 4D input: a drop-in for :class:`torch.nn.BatchNorm2d`.

    Same constructor, parameters, buffers, ``state_dict``, results and errors; see there. The
    differences: the activation is read from memory once if it fits the cache, the same op counts
    the batch, and a call that raises has not counted one.

    It computes Algorithm 1 of `Ioffe & Szegedy, 2015 <https://arxiv.org/abs/1502.03167>`__ with
    torch.nn's running statistics. :func:`bnext.explain` says how it computes a given shape.

    Shape:
        - Input: :math:`(N, C, H, W)`, contiguous or channels_last without a copy
        - Output: as the input, in its memory format

    Example::

        >>> m = bnext.BatchNorm2d(100)
        >>> output = m(torch.randn(20, 100, 35, 45))
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    r"""Batch normalisation of a 5D input: a drop-in for :class:`torch.nn.BatchNorm3d`.

    Same constructor, parameters, buffers, ``state_dict``, results and errors; see there. The one
    difference: a call that raises has not counted a batch. See :class:`bnext.BatchNorm2d`.

    Shape:
        - Input: :math:`(N, C, D, H, W)`, contiguous or channels_last_3d without a copy
        - Output: as the input, in its memory format

    Example::

        >>> m = bnext.BatchNorm3d(100)
        >>> output = m(torch.randn(20, 100, 35, 45, 10))
    """


class LazyBatchNorm1d(_BatchNorm, torch.nn.LazyBatchNorm1d):
    """:class:`torch.nn.LazyBatchNorm1d` that becomes a :class:`bnext.BatchNorm1d`.

    Its first input says how many channels there are.

    Example::

        >>> m = bnext.LazyBatchNorm1d()
        >>> output = m(torch.randn(20, 100))
        >>> m.num_features
        100
    """

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_BatchNorm, torch.nn.LazyBatchNorm2d):
    """As :class:`bnext.LazyBatchNorm1d`; becomes a :class:`bnext.BatchNorm2d`."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_BatchNorm, torch.nn.LazyBatchNorm3d):
    """As :class:`bnext.LazyBatchNorm1d`; becomes a :class:`bnext.BatchNorm3d`."""

    cls_to_become = BatchNorm3d


def act_repr(act: str | None, act_param: float | None) -> str:
    """The activation as `extra_repr` gives it."""
    return f"act={act!r}" + ("" if act_param is None else f", act_param={act_param}")


class _BatchNormAct(_BatchNorm):
    __constants__ = [*torch.nn.BatchNorm2d.__constants__, "act", "act_param"]  # noqa: RUF012
    act: str | None
    act_param: float | None = None  # for modules pickled before there was one

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
        act: Act = "relu",
        act_param: float | None = None,
    ) -> None:
        name, act_param = named(act, act_param)
        # Only if asked for: torch before 2.13 refuses the argument.
        optional: dict[str, Any] = {} if bias else {"bias": False}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **optional
        )
        self.act = name
        self.act_param = None if act_param is None else float(act_param)  # a script takes no int

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise a batch, add :attr:`residual` and apply the activation.

        Args:
            input: as in :meth:`bnext.BatchNorm2d.forward`.
            residual: what to add before the activation, or ``None``.

        Returns:
            A new tensor of :attr:`input`'s shape, dtype and memory format, as long as
            :attr:`residual` has its shape and dtype; else what ``+`` makes of the two.

        Raises:
            TypeError: :attr:`residual` is no tensor. All else is as in
                :meth:`bnext.BatchNorm2d.forward`.
        """
        if is_scripting():
            param = parameter(self.act, self.act_param)
            return self._compose(input, residual, self.act, param)
        else:  # noqa: RET505  (the script compiler skips an else, but not what follows)
            act, act_param = self.act, self.act_param
            check_activation(act, act_param)
            return self._normalize(input, residual, act, parameter(act, act_param))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {act_repr(self.act, self.act_param)}"


class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    r"""Batch normalisation, residual and activation of a 2D or 3D input, in one pass.

    As :class:`bnext.BatchNormAct2d`, for inputs :math:`(N, C)` and :math:`(N, C, L)`.

    Example::

        >>> m = bnext.BatchNormAct1d(100)
        >>> output = m(torch.randn(20, 100))
    """


class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    r"""Batch normalisation, residual and activation of a 4D input, in one pass.

    .. math::
        y = \mathrm{act}\left(\frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma
        + \beta + \mathrm{residual}\right)

    It replaces ``act(bn(x) + residual)`` or ``act(bn(x))``. Neither the normalised tensor nor the
    sum is written to memory.
    Parameters, buffers and ``state_dict`` are those of :class:`bnext.BatchNorm2d`.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, bias: as in
            :class:`torch.nn.BatchNorm2d` (which has :attr:`bias` from torch 2.13 on)
        act: a name, a module of torch.nn such as ``nn.SiLU()``, its class, or ``None`` for no
            activation; see :func:`bnext.functional.batch_norm_act`. The attribute of this name
            holds the activation's name. Default: ``"relu"``
        act_param: the negative slope of ``"leaky_relu"`` or the alpha of ``"elu"``. Default:
            ``None``, which means torch.nn's default, or what the module given as :attr:`act` has

    Shape:
        - Input: :math:`(N, C, H, W)`
        - Residual: as the input, or ``None``. One of another shape or dtype is added by the rules
          of ``+``, outside the fused pass (:meth:`torch.jit.script` takes none).
        - Output: as the input, in its memory format

    Raises:
        ValueError: :attr:`act` is unknown or takes no :attr:`act_param`.
        TypeError: :attr:`act_param` is no number.

    .. warning::
        Tools that replace batch norms by type or attributes drop the activation, for example
        :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` (use :class:`bnext.SyncBatchNorm`'s),
        :func:`torch.nn.utils.fuse_conv_bn_eval` and timm's ``freeze_batch_norm_2d``. They may
        replace a batch norm that :func:`bnext.convert` fused: its caller notices.

    Example::

        >>> m = bnext.BatchNormAct2d(64)
        >>> x, shortcut = torch.randn(2, 8, 64, 14, 14)
        >>> output = m(x)
        >>> output = m(x, shortcut)
    """


class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    r"""Batch normalisation, residual and activation of a 5D input, in one pass.

    As :class:`bnext.BatchNormAct2d`, for inputs :math:`(N, C, D, H, W)`.

    Example::

        >>> m = bnext.BatchNormAct3d(100)
        >>> output = m(torch.randn(2, 100, 5, 7, 7))
    """
