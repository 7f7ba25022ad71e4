"""The batch norms of timm, torchvision and transformers, computed by bnext.

Nothing here imports a library. `adapt` knows their classes by name, and makes for each that a model
has the subclass that `convert` puts in its place. Any input that is not a plain case goes to the
library's own ``forward``, which is also what torch.fx and TorchScript take.
"""

import re
from collections.abc import Callable
from functools import wraps
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from bnext import modules
from bnext._activation import activate, of_module, parameter
from bnext._call import normalize, tracing_state
from bnext._effects import FUSIBLE
from bnext._registry import OURS, register
from bnext._waiting import ADAPTED, is_watched
from bnext.distributed import SyncBatchNorm

__all__ = ["Frozen", "WithAct", "adapt", "own_activation"]


class _Adapted(nn.Module):
    """First base of every class that `adapt` makes."""

    _theirs: type[nn.Module]

    def can_wait(self, input: Tensor) -> bool:
        """Whether the result may be computed later, with what follows it."""
        return self._takes(input)

    def _takes(self, input: Any) -> bool:
        return isinstance(input, Tensor) and input.dim() == 4 and tracing_state() is None

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        if "_theirs" not in vars(type(self)):  # a subclass has a name of its own
            return reduced
        return _new, (self._theirs,), *reduced[2:]


def _new(theirs: type[nn.Module]) -> nn.Module:
    adapt(theirs)
    kind = OURS[theirs]
    return kind.__new__(kind)


class Frozen(_Adapted):
    """A batch norm whose statistics and parameters are all buffers."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float

    def forward(self, x: Any) -> Tensor:
        """Normalise by the buffers."""
        return self._normalize(x, None, None, 0.0)

    def _normalize(
        self, input: Any, residual: Tensor | None, act: str | None, act_param: float
    ) -> Tensor:
        if self._takes(input) and (
            residual is None or (residual.shape, residual.dtype) == (input.shape, input.dtype)
        ):
            return normalize(
                input, self.weight, self.bias, residual, self.running_mean, self.running_var, None,
                False, 0.0, self._epsilon(), act, act_param,
            )  # fmt: skip
        output: Tensor = self._theirs.forward(self, input)
        return activate(output if residual is None else output + residual, act, act_param)

    def _takes(self, input: Any) -> bool:
        """Whether the library's arithmetic would neither promote nor broadcast the input."""
        return super()._takes(input) and all(
            t.dtype == input.dtype and t.shape == input.shape[1:2] and not t.requires_grad
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )

    def _epsilon(self) -> float:
        return self.eps


class _FrozenLikeDetr(Frozen):
    def _epsilon(self) -> float:
        return 1e-5  # a constant of its forward


class WithAct(_Adapted):
    """A batch norm that holds its activation, and before that something to drop values."""

    # Without annotations of drop and act, which torch.jit.script would read.
    _normalize: Callable[..., Tensor]

    def forward(self, x: Any) -> Tensor:
        """Normalise and activate, in one pass if the kernels have the activation."""
        after: Any = self
        if not self._takes(x):
            output: Tensor = self._theirs.forward(self, x)
        elif isinstance(act := self.activation(), str):
            output = after.act(after.drop(self._normalize(x, None, None, 0.0)))
        else:
            output = self._normalize(x, None, act[0], parameter(*act))
        return output

    def can_wait(self, input: Tensor) -> bool:
        """Only without an activation of its own."""
        return super().can_wait(input) and self.activation() == (None, None)

    def activation(self) -> tuple[str | None, float | None] | str:
        """What the kernel computes of ``act``, or why that has to be called."""
        after: Any = self
        drop, act = after.drop, after.act
        if type(drop) is not nn.Identity:
            return "its drop is no Identity"
        if is_watched(drop) or is_watched(act):
            return "a hook or a forward of its own is on its drop or act"
        name = _ACTIVATIONS.get(_name(type(act)))
        known = of_module(act) if name is None else (name, None)
        return "its act is none that the kernels have" if known is None else known


_KNOWN: dict[str, tuple[type[nn.Module], ...]] = {
    "timm.layers.norm_act.BatchNormAct2d": (WithAct, modules._BatchNorm),
    "timm.layers.norm_act.FrozenBatchNormAct2d": (WithAct, Frozen),
    "torchvision.ops.misc.FrozenBatchNorm2d": (Frozen,),
}
# A copy of DETR's in each of its descendants.
_TRANSFORMERS = re.compile(r"transformers\.models\.\w+\.modeling_\w+\.\w+FrozenBatchNorm2d")
# timm's, which take the argument `inplace`.
_ACTIVATIONS = {
    f"timm.layers.activations.{kind}": name
    for kind, name in {
        "GELU": "gelu", "GELUTanh": "gelu_tanh", "Sigmoid": "sigmoid", "Tanh": "tanh",
    }.items()
}  # fmt: skip


ADAPTED.add(SyncBatchNorm)
FUSIBLE.update((nn.SyncBatchNorm, SyncBatchNorm))


def adapt(theirs: type[nn.Module]) -> None:
    """Register what `convert` makes of a class, if it is one that is known here."""
    name = _name(theirs)
    bases = (_FrozenLikeDetr,) if _TRANSFORMERS.fullmatch(name) else _KNOWN.get(name)
    if bases is None or theirs in OURS:
        return

    first = bases[0].forward

    def forward(self: Any, x: Any) -> Any:
        return first(self, x)

    # torch.jit.script compiles what a function wraps, with the globals of the function itself.
    names = theirs.forward.__globals__
    forward = FunctionType(forward.__code__, names, "forward", None, forward.__closure__)
    contents = {
        "__module__": __name__,
        "__doc__": theirs.__doc__,
        "_theirs": theirs,
        "forward": wraps(theirs.forward)(forward),
    }
    ours = type(theirs.__name__, (*bases, theirs), contents)
    register(theirs, ours)
    ADAPTED.add(ours)
    FUSIBLE.update((theirs, ours))


def own_activation(module: nn.Module) -> tuple[str | None, float | None] | str | None:
    """What a batch norm computes with itself once converted, or why not; ``None`` without one."""
    kind: Any = OURS.get(type(module), type(module))
    act: tuple[str | None, float | None] | str = (None, None)
    if issubclass(kind, WithAct):
        act = kind.activation(module)
    elif isinstance(module, SyncBatchNorm):
        act = module.act, module.act_param
    return None if act == (None, None) else act


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
