"""The batch norms of ResNet-50 (He et al. 2016, stride in the 3x3) on 224x224 images, as data."""

from typing import NamedTuple


class Shape(NamedTuple):
    channels: int
    size: int  # height = width
    layers: int  # how many of the network's 53 batch norms have this shape

    def __str__(self) -> str:
        return f"{self.channels}x{self.size}x{self.size}"


RESNET50 = (
    Shape(64, 112, 1),
    Shape(64, 56, 6),
    Shape(256, 56, 4),
    Shape(128, 56, 1),
    Shape(128, 28, 7),
    Shape(512, 28, 5),
    Shape(256, 28, 1),
    Shape(256, 14, 11),
    Shape(1024, 14, 7),
    Shape(512, 14, 1),
    Shape(512, 7, 5),
    Shape(2048, 7, 4),
)

# Large and aligned; small with rows of 49 elements.
QUICK = (Shape(64, 56, 6), Shape(512, 7, 5))
