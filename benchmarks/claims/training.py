"""The networks, with and without bnext's batch norms, and their training."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnext
from benchmarks.claims.data import CLASSES, Data

BATCH = 60  # the paper's


def mlp(
    data: Data,
    norm: bool,
    act: Callable[[], nn.Module] = nn.Sigmoid,
    width: int = 100,
    std: float | None = None,
    dropout: float = 0.0,
    affine: bool = True,
) -> nn.Sequential:
    """The paper's network of section 4.1: three hidden layers, batch norm before the activation.

    The weights are N(0, std^2); by default Glorot's, with which both variants can learn.
    """
    inputs = data.images[0].numel()
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(3):
        layers.append(nn.Linear(inputs, width, bias=not norm))  # before batch norm it is redundant
        if norm:
            layers.append(bnext.BatchNorm1d(width, affine=affine))
        layers.append(act())
        if dropout:
            layers.append(nn.Dropout(dropout))
        inputs = width
    return _initialise(nn.Sequential(*layers, nn.Linear(inputs, CLASSES)), std)


def cnn(data: Data, norm: bool) -> nn.Sequential:
    """Four convolutions with ReLU, batch norm before it."""
    layers: list[nn.Module] = []
    inputs = data.images.shape[1]
    first = 1 if data.images.shape[-1] < 16 else 2  # so that larger images cost little more
    for outputs, stride in (16, first), (16, 2), (32, 1), (32, 2):
        layers.append(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norm))
        if norm:
            layers.append(bnext.BatchNorm2d(outputs))
        layers.append(nn.ReLU())
        inputs = outputs
    head = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * inputs, CLASSES)
    return _initialise(nn.Sequential(*layers, *head), None)


def _initialise(model: nn.Sequential, std: float | None) -> nn.Sequential:
    for module in model:
        if isinstance(module, nn.Linear | nn.Conv2d):
            if std is None:
                nn.init.xavier_uniform_(module.weight)
            else:
                nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


@dataclass
class History:
    """What a run left: the loss of every step, and the test accuracy at some."""

    losses: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.losses[-1])

    def steps_to(self, accuracy: float) -> float:
        """The first step at which the test accuracy is that; infinite if it never is."""
        reached = (s for s, a in zip(self.steps, self.accuracies, strict=True) if a >= accuracy)
        return next(reached, math.inf)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Of the network in eval mode, with the running statistics."""
    model.eval()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return right


def train(
    model: nn.Module,
    data: Data,
    lr: float,
    steps: int,
    seed: int,
    every: int = 50,
    weight_decay: float = 0.0,
    at_checks: Callable[[int], None] | None = None,
) -> History:
    """Plain SGD. A run whose loss is not finite any more stops there: it has diverged."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr, weight_decay=weight_decay)
    history = History()
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(data.labels), generator=generator)
        batch, order = order[:BATCH], order[BATCH:]
        loss = F.cross_entropy(model(data.images[batch]), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.losses.append(loss.item())
        if step % every == 0 or step == steps or history.diverged:
            history.steps.append(step)
            history.accuracies.append(accuracy(model, data.test_images, data.test_labels))
            if at_checks is not None:
                at_checks(step)
        if history.diverged:
            break
    return history
