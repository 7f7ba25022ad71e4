"""Stand-ins for the classes of timm, torchvision and transformers that bnext knows by name.

They compute the same from the same attributes. `standing_in` lets pickle find them, too.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, _assert, nn


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, num_features, apply_act=True, act_layer=nn.ReLU, drop_layer=None, **kwargs):
        super().__init__(num_features, **kwargs)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = act_layer() if apply_act else nn.Identity()

    def forward(self, x):
        _assert(x.dim() == 4, "expected a 4D input")
        training = self.training
        if training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training,
            self.momentum, self.eps,
        )  # fmt: skip
        return self.act(self.drop(x))


class SyncBatchNormAct(nn.SyncBatchNorm):
    pass


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    def __init__(self, num_features, eps=1e-5, apply_act=True, act_layer=nn.ReLU, drop_layer=None):
        super().__init__(num_features, eps)
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = act_layer() if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        x = x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
        return self.act(self.drop(x))


class DetrFrozenBatchNorm2d(nn.Module):
    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(n))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class GELU(nn.Module):
    def __init__(self, inplace: bool = False):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


HOMES: dict[str, tuple[type, ...]] = {
    "timm.layers.norm_act": (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d),
    "timm.layers.activations": (GELU,),
    "torchvision.ops.misc": (FrozenBatchNorm2d,),
    "transformers.models.detr.modeling_detr": (DetrFrozenBatchNorm2d,),
}
for _home, _kinds in HOMES.items():
    for _kind in _kinds:
        _kind.__module__ = _home


@contextmanager
def standing_in() -> Iterator[None]:
    """Puts the stand-ins into `sys.modules`, where the libraries may be too."""
    before = dict(sys.modules)
    for home, kinds in HOMES.items():
        parts = home.split(".")
        for length in range(1, len(parts) + 1):
            sys.modules[".".join(parts[:length])] = ModuleType(".".join(parts[:length]))
        for kind in kinds:
            setattr(sys.modules[home], kind.__name__, kind)
    try:
        yield
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in {home.split(".")[0] for home in HOMES}:
                del sys.modules[name]
        sys.modules.update(before)
