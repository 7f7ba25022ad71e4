"""The usual architectures, small: as users write them, with torch.nn's batch norms."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Basic(nn.Module):
    """The basic block of a ResNet as torchvision writes it: one ReLU module for both places."""

    expansion = 1

    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or c_in != c:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c, 1, stride, bias=False), nn.BatchNorm2d(c)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """That of a ResNet-50, with functional ReLUs and the sum the other way around."""

    expansion = 4

    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c, 1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, stride, 1, bias=False), nn.BatchNorm2d(c)
        self.conv3, self.bn3 = nn.Conv2d(c, 4 * c, 1, bias=False), nn.BatchNorm2d(4 * c)
        self.downsample = nn.Identity()
        if stride != 1 or c_in != 4 * c:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, 4 * c, 1, stride, bias=False), nn.BatchNorm2d(4 * c)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = torch.relu(self.bn2(self.conv2(y)))
        return (self.downsample(x) + self.bn3(self.conv3(y))).relu()


class ResNet(nn.Module):
    def __init__(self, block: type[nn.Module], depths: list[int]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        c_in, stages = 8, []
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(block(c_in, 8 * 2**i, 2 if i and not j else 1))
                c_in = 8 * 2**i * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layers = nn.ModuleList(stages)
        self.fc = nn.Linear(c_in, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class ConvBNReLU(nn.Sequential):
    def __init__(self, c_in: int, c: int, kernel: int, groups: int = 1) -> None:
        convolution = nn.Conv2d(c_in, c, kernel, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(c), nn.ReLU(inplace=True))


class Inverted(nn.Module):
    """A MobileNet's: its last batch norm has no activation, only the residual."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            ConvBNReLU(c, 2 * c, 1), ConvBNReLU(2 * c, 2 * c, 3, 2 * c),
            nn.Conv2d(2 * c, c, 1, bias=False), nn.BatchNorm2d(c),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class MobileNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(ConvBNReLU(3, 8, 3), Inverted(8), nn.Hardtanh(0.0, 6.0), Inverted(8))


class DenseLayer(nn.Module):
    """Batch norm and ReLU before each convolution, on what all layers before returned."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(c), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(c, 8, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBNReLU(3, 8, 3)
        self.layers = nn.ModuleDict({f"layer{i}": DenseLayer(8 + 4 * i) for i in range(3)})
        self.norm5 = nn.BatchNorm2d(20)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers.values():
            features.append(layer(features))
        return F.relu(self.norm5(torch.cat(features, 1)), inplace=True).mean((2, 3))
