"""Batch normalisation over processes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from bnext._activation import Act, check_activation, named, parameter
from bnext._call import check_residual, normalize
from bnext._sync import sharing, sync_normalize
from bnext.modules import _BatchNormAct, act_repr, add_by_its_rules, fx_leaf, statistics

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(_BatchNorm):
    r"""Batch normalisation by the statistics of all processes: :class:`torch.nn.SyncBatchNorm`.

    Same constructor, parameters, buffers and ``state_dict``; see there. The differences: it runs on
    the CPU too, by any backend of :mod:`torch.distributed` (gloo, NCCL), and may have an
    activation and a residual, as :class:`bnext.BatchNormAct2d` has. It is no subclass of torch's,
    because :class:`torch.nn.parallel.DistributedDataParallel` refuses those on the CPU.

    In training, processes exchange their counts, means and sums of squares about these, in
    float64, by one all-gather (two for layers of more than 1,024 channels, or fewer where more than
    42 processes share a batch), and backward the sums for the gradient by one all-reduce. All of
    them get the same statistics bit for bit. Their batches may differ in size or be empty. With one
    process, without a group and in eval nothing is exchanged, and the op of
    :class:`bnext.BatchNorm2d` runs. The group is looked up at each call.

    Args:
        act, act_param: as in :class:`bnext.BatchNormAct2d`. Default: ``None``, no activation. All
            others as in :class:`torch.nn.SyncBatchNorm`.

    Shape:
        - Input: :math:`(N, C, *)`
        - Residual: as the input, or ``None``
        - Output: as the input

    Raises:
        RuntimeError: processes disagree on channels or dtype, or one did not take part: it names
            them, and running statistics have not changed. (On a GPU, which the host does not wait
            for, a disagreement is an assertion of the device.)
        ValueError: there is one value per channel in all processes together.

    Example::

        >>> model = bnext.SyncBatchNorm.convert_sync_batchnorm(model)
    """

    # What was pickled without them, or was torch's, has none.
    act: str | None = None
    act_param: float | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: Act = None,
        act_param: float | None = None,
    ) -> None:
        name, act_param = named(act, act_param)
        # Only if asked for: torch before 2.13 refuses the argument.
        optional: dict[str, Any] = {} if bias else {"bias": False}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **optional
        )
        self.process_group = process_group
        self.act, self.act_param = name, act_param

    _check_input_dim: Any = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels: Any = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise by the statistics of all processes, add the residual, apply the activation.

        Arguments, result and errors are those of :meth:`bnext.BatchNormAct2d.forward`, besides the
        errors that the class names.
        """
        check_activation(self.act, self.act_param)
        act, act_param = self.act, parameter(self.act, self.act_param)
        if not isinstance(input, Proxy):
            self._check_input_dim(input)
            self._check_non_zero_input_channels(input)
        elif getattr(input.tracer, "root", None) is not self:
            return fx_leaf(self, input, residual)
        check_residual(residual)
        if residual is None or ((residual.shape, residual.dtype) == (input.shape, input.dtype)):
            return self._normalize(input, residual, act, act_param)
        return add_by_its_rules(
            lambda x: self._normalize(x, None, None, 0.0), statistics(self)[:3], input, residual,
            act, act_param,
        )  # fmt: skip

    def can_wait(self, input: Tensor) -> bool:
        """Whether the result may be computed later, with what follows it."""
        return self.act is None

    def _normalize(
        self, input: Tensor, residual: Tensor | None, act: str | None, act_param: float
    ) -> Tensor:
        running_mean, running_var, num_batches_tracked, training = statistics(self)
        group = sharing(self.process_group) if self.training else None
        if group is not None:
            output: Tensor = sync_normalize(
                input, self.weight, self.bias, residual, running_mean, running_var,
                num_batches_tracked, self.momentum, self.eps, act, act_param, group,
            )  # fmt: skip
            return output
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
        activation of a :class:`bnext.BatchNormAct2d` or of timm's class of that name. Parameters
        and buffers stay the same objects.

        Args:
            module: any module, possibly a batch norm itself.
            process_group: the processes to synchronise; all by default.

        Returns:
            :attr:`module`, or what a batch norm became.

        Raises:
            ValueError: a batch norm has an activation that the kernels do not have.
        """
        from bnext._libraries import adapt, own_activation  # which knows this class

        if isinstance(module, _BatchNorm):
            adapt(type(module))
            own = own_activation(module)
            if isinstance(own, str):
                raise ValueError(
                    f"module: {type(module).__name__} would lose its activation: {own}. Its "
                    "library may have a conversion of its own"
                )
            # torch's method makes a new module with the parameters and buffers of the old.
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
            converted.__class__ = cls
            converted._modules.clear()  # timm's act is a module
            if isinstance(module, _BatchNormAct):
                own = module.act, module.act_param
            vars(converted).update(zip(("act", "act_param"), own or (None, None), strict=True))
            module = converted
        for name, child in module.named_children():
            setattr(module, name, cls.convert_sync_batchnorm(child, process_group))
        return module
