"""The activations: what the kernels know of each, and how torch's operations compute it."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnext._extension import _C

__all__ = [
    "ACTIVATIONS", "BY_KIND", "Act", "Activation", "activate", "check_activation", "named",
    "of_module", "parameter", "through",
]  # fmt: skip

if TYPE_CHECKING:
    Act = str | nn.Module | type[nn.Module] | None
else:
    Act = str | None  # all that a script takes


class Activation(NamedTuple):
    """A row of csrc/activation.h."""

    kind: int
    needs: str  # what backward needs of z = bn(x) + residual: "nothing", "sign" or "sum"


ACTIVATIONS: dict[str | None, Activation] = {
    None if name == "none" else name: Activation(kind, needs)
    for name, (kind, needs) in _C.activations().items()
}

BY_KIND = {a.kind: (name, a) for name, a in ACTIVATIONS.items()}


def activate(z: Tensor, act: str | None, act_param: float) -> Tensor:
    """f(z), as torch.nn.functional computes it (TorchScript compiles it)."""
    if act is None:
        return z
    if act == "relu":
        return F.relu(z)
    if act == "relu6":
        return F.relu6(z)
    if act == "leaky_relu":
        return F.leaky_relu(z, act_param)
    if act == "silu":
        return F.silu(z)
    if act == "hardswish":
        return F.hardswish(z)
    if act == "gelu":
        return F.gelu(z)
    if act == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if act == "elu":
        return F.elu(z, act_param)
    if act == "tanh":
        return torch.tanh(z)
    if act == "sigmoid":
        return torch.sigmoid(z)
    raise ValueError(f"act: there is no activation named {act}")  # a script checks nothing before


def through(dy: Tensor, z: Tensor, act: str | None, act_param: float) -> Tensor:
    """The gradient dy f'(z), from operations that have derivatives."""
    aten = torch.ops.aten
    out: Tensor
    if act == "relu":
        out = aten.threshold_backward(dy, z, 0)
    elif act == "relu6":
        out = aten.hardtanh_backward(dy, z, 0, 6)
    elif act == "leaky_relu":
        out = aten.leaky_relu_backward(dy, z, act_param, False)
    elif act == "silu":
        s = z.sigmoid()  # aten.silu_backward has no derivative
        out = dy * s * (1 + z * (1 - s))
    elif act == "hardswish":
        out = aten.hardswish_backward(dy, z)
    elif act in ("gelu", "gelu_tanh"):
        out = aten.gelu_backward(dy, z, approximate="tanh" if act == "gelu_tanh" else "none")
    elif act == "elu":
        out = aten.elu_backward(dy, act_param, 1, 1, False, z)
    elif act == "tanh":
        out = aten.tanh_backward(dy, z.tanh())
    else:
        out = aten.sigmoid_backward(dy, z.sigmoid())
    return out


def parameter(act: str | None, act_param: float | None) -> float:
    """The given parameter of an activation, else torch.nn's default."""
    if act is None:
        return 0.0
    if act_param is not None:
        return act_param
    if act == "leaky_relu":
        return 0.01
    return 1.0 if act == "elu" else 0.0


def check_activation(act: Any, act_param: float | None) -> None:
    """Raise if there is no such activation."""
    try:
        known = act in ACTIVATIONS
    except TypeError:  # it has no hash
        known = False
    if not known:
        names = ", ".join(repr(name) for name in ACTIVATIONS if name is not None)
        raise ValueError(
            f"act must be one of {names}, a module of torch.nn or its class that computes one of "
            f"these, or None, but got {act!r}"
        )
    if act_param is None:
        return
    if act not in ("leaky_relu", "elu"):
        raise ValueError(f"act_param must be None where act is {act!r}, but got {act_param!r}")
    if not isinstance(act_param, float | int):
        raise TypeError(f"act_param must be a float or None, but got {act_param!r}")


# The classes of torch.nn that have no parameter.
_PLAIN: dict[type[nn.Module], str | None] = {
    nn.Identity: None, nn.ReLU: "relu", nn.SiLU: "silu", nn.Hardswish: "hardswish",
    nn.Tanh: "tanh", nn.Sigmoid: "sigmoid",
}  # fmt: skip
_CLASSES = {*_PLAIN, nn.ReLU6, nn.Hardtanh, nn.GELU, nn.LeakyReLU, nn.ELU}


def of_module(module: nn.Module) -> tuple[str | None, float | None] | None:
    """The name and parameter of the activation that a module of torch.nn computes.

    ``None`` if there is none. Subclasses may compute something else and have none; hooks and a
    `forward` of the instance's own are not looked at.
    """
    kind = type(module)
    if kind in _PLAIN:
        return _PLAIN[kind], None
    if kind in (nn.ReLU6, nn.Hardtanh):
        limits: Any = module.min_val, module.max_val
        return ("relu6", None) if limits == (0, 6) else None
    if kind is nn.GELU:
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(module.approximate))
        return None if name is None else (name, None)
    if kind is nn.LeakyReLU and isinstance(module.negative_slope, float | int):
        if module.inplace and module.negative_slope < 0:  # its backward raises
            return None
        return "leaky_relu", float(module.negative_slope)
    if kind is nn.ELU and isinstance(module.alpha, float | int):
        if module.inplace and module.alpha < 0:  # its backward raises
            return None
        return "elu", float(module.alpha)
    return None


def named(act: Act, act_param: float | None) -> tuple[str | None, float | None]:
    """The name and parameter of an activation that is given in any of the ways; raises if none."""
    name: Any = act
    if isinstance(act, type) and act in _CLASSES:
        name, _ = of_module(act()) or (act, None)
    elif isinstance(act, nn.Module) and (found := of_module(act)) is not None:
        if act_param is not None:
            raise ValueError(f"act_param must be None where act is {act}, but got {act_param!r}")
        return found
    check_activation(name, act_param)
    return name, act_param
