"""Batch normalisation over processes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from bnext._activation import Act, activate, check_activation, named, parameter
from bnext._call import normalize
from bnext.modules import _BatchNormAct, act_repr, add_by_its_rules, fx_leaf, statistics

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(nn.SyncBatchNorm):
    r"""Batch normalisation by the statistics of all processes: :class:`torch.nn.SyncBatchNorm`.

    Same constructor, parameters, buffers, ``state_dict`` and errors; see there. The differences:
    without a process group and in eval bnext's op runs, and the module may have an activation, as
    :class:`bnext.BatchNormAct2d` has. Otherwise torch's module runs, on the devices that it
    supports (not the CPU), and residual and activation follow unfused.

    Args:
        act, act_param: as in :class:`bnext.BatchNormAct2d`. Default: ``None``, no activation. All
            others as in :class:`torch.nn.SyncBatchNorm`.

    Shape:
        - Input: :math:`(N, C, *)`
        - Residual: as the input, or ``None``
        - Output: as the input

    Example::

        >>> model = bnext.SyncBatchNorm.convert_sync_batchnorm(model)
    """

    act_param: float | None = None  # what was pickled before there was one has none

    def __init__(
        self, *args: Any, act: Act = None, act_param: float | None = None, **kwargs: Any
    ) -> None:
        name, act_param = named(act, act_param)
        super().__init__(*args, **kwargs)
        self.act, self.act_param = name, act_param

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise, add the residual and apply the activation."""
        check_activation(self.act, self.act_param)
        act, act_param = self.act, parameter(self.act, self.act_param)
        if not isinstance(input, Proxy):
            self._check_input_dim(input)
            self._check_non_zero_input_channels(input)
        elif getattr(input.tracer, "root", None) is not self:
            return fx_leaf(self, input, residual)
        fits = not isinstance(residual, Tensor) or (
            (residual.shape, residual.dtype) == (input.shape, input.dtype)
        )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if (self.training and distributed) or not fits:
            norm = super().forward
            if residual is not None:
                return add_by_its_rules(norm, statistics(self)[:3], input, residual, act, act_param)
            return activate(norm(input), act, act_param)
        running_mean, running_var, num_batches_tracked, training = statistics(self)
        return normalize(
            input, self.weight, self.bias, residual, running_mean, running_var,
            num_batches_tracked, training, self.momentum, self.eps, act, act_param,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        act = f", {act_repr(self.act, self.act_param)}" if self.act else ""
        return f"{super().extra_repr()}{act}"

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Turn every batch norm in :attr:`module` into a :class:`bnext.SyncBatchNorm`.

        torch.nn's method always makes a :class:`torch.nn.SyncBatchNorm`. This one also keeps the
        activation of a :class:`bnext.BatchNormAct2d`. Parameters and buffers stay the same objects.

        Args:
            module: any module, possibly a batch norm itself.
            process_group: the processes to synchronise; all by default.

        Returns:
            :attr:`module`, or what a batch norm became.
        """
        if isinstance(module, _BatchNorm):
            # torch's method makes a new module with the parameters and buffers of the old.
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
            converted.__class__ = cls
            activated = isinstance(module, _BatchNormAct | SyncBatchNorm)
            for name in ("act", "act_param"):
                vars(converted)[name] = getattr(module, name) if activated else None
            module = converted
        for name, child in module.named_children():
            setattr(module, name, cls.convert_sync_batchnorm(child, process_group))
        return module
