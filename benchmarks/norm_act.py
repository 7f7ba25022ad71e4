"""Batch norm, residual and ReLU as networks of torch.nn write them."""

from torch import Tensor, nn
from torch.nn import functional as F


class NormAct(nn.Module):
    """relu(norm(x) + residual), in place behind the norm as torchvision's ResNet does it."""

    def __init__(self, norm: nn.Module, relu: bool = True) -> None:
        super().__init__()
        self.norm, self.relu = norm, relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if self.relu else y
