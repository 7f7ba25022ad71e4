"""A small ResNet on scikit-learn's handwritten digits, with nn.BatchNorm2d and with bnext."""

import copy
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import bnext
from benchmarks import report

BATCH = 64
# Both networks do the same arithmetic in different orders. The first losses differ only by
# roundings, which training then amplifies.
FIRST_STEPS, TOLERANCE = 3, 1e-4


class Block(nn.Module):
    """Basic residual block (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        y = y + self.shortcut(x)
        return y.relu()


def resnet() -> nn.Sequential:
    stem = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
    blocks = Block(32, 32, 1), Block(32, 64, 2), Block(64, 128, 2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [1437, 1, 8, 8] and labels, then the 360 held out, stratified."""
    # Imported here, because the other benchmarks do not need scikit-learn.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, random_state=0, stratify=data.target
    )
    return images[train], labels[train], images[test], labels[test]


@dataclass
class Run:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)  # one per step
    accuracies: list[float] = field(default_factory=list)  # one per epoch
    images_per_s: list[float] = field(default_factory=list)  # one per epoch

    @classmethod
    def of(cls, model: nn.Module, steps: int) -> "Run":
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        return cls(model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps))

    def epoch(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.model.train()
        start = time.perf_counter()
        for images, labels in batches:
            loss = F.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.scheduler.step()
            self.losses.append(loss.item())
        seconds = time.perf_counter() - start
        self.images_per_s.append(sum(len(labels) for _, labels in batches) / seconds)

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> None:
        self.model.eval()
        self.accuracies.append((self.model(images).argmax(1) == labels).float().mean().item())


def run(out: Path, facts: dict[str, str], epochs: int) -> int:
    console = Console()
    console.print(report.facts_table(facts))
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    model = resnet()
    steps = epochs * math.ceil(len(labels) / BATCH)
    runs = {
        "nn.BatchNorm2d": Run.of(model, steps),
        "bnext": Run.of(bnext.convert(copy.deepcopy(model)), steps),
    }
    with Progress(console=console, auto_refresh=False) as progress:
        for epoch in progress.track(range(epochs), description="training"):
            order = torch.split(torch.randperm(len(labels)), BATCH)
            batches = [(images[i], labels[i]) for i in order]
            # They take turns to go first, so that neither always follows a pause.
            for each in list(runs.values())[:: 1 if epoch % 2 else -1]:
                each.epoch(batches)
                each.test(test_images, test_labels)
            _write(out, facts, runs)

    theirs, ours = runs.values()
    first = max(_differences(runs)[:FIRST_STEPS])
    noise = math.sqrt(2 * theirs.accuracies[-1] * (1 - theirs.accuracies[-1]) / len(test_labels))
    gap = ours.accuracies[-1] - theirs.accuracies[-1]
    facts |= {
        "first steps": f"largest relative difference of the loss in steps 1 to {FIRST_STEPS}: "
        f"{first:.1e} (allowed {TOLERANCE:.0e})",
        "test accuracy": f"bnext minus nn.BatchNorm2d: {gap:+.4f}, standard error {noise:.4f}",
    }
    console.print(_table(runs, len(labels), len(test_labels)))
    for name in ("first steps", "test accuracy"):
        console.print(f"{name}: {facts[name]}", highlight=False)
    _write(out, facts, runs)
    with report.plotting(console):
        _plot(out, facts, runs)
    console.print(f"Written to {out}/train.csv, train.png", highlight=False)
    if not first <= TOLERANCE:
        console.print("[red]the losses differ by more than roundings at the start[/red]")
        return 1
    return 0


def _table(runs: dict[str, Run], train_size: int, test_size: int) -> Table:
    table = report.numbers_table(
        f"digits: {train_size} training images, {test_size} test images",
        ["batch norm"],
        ["first loss", "last epoch's", "test accuracy", "images/s"],
    )
    for name, each in runs.items():
        epoch_steps = len(each.losses) // len(each.accuracies)
        table.add_row(
            name,
            f"{each.losses[0]:.6f}",
            f"{sum(each.losses[-epoch_steps:]) / epoch_steps:.5f}",
            f"{each.accuracies[-1]:.4f}",
            f"{torch.tensor(each.images_per_s).median():.0f}",
        )
    return table


def _differences(runs: dict[str, Run]) -> list[float]:
    """Of the losses, relative, by step."""
    theirs, ours = runs.values()
    return [abs(a - b) / abs(a) for a, b in zip(theirs.losses, ours.losses, strict=True)]


def _write(out: Path, facts: dict[str, str], runs: dict[str, Run]) -> None:
    theirs, ours = runs.values()
    epoch_steps = len(theirs.losses) // len(theirs.accuracies)
    rows = []
    for step, difference in enumerate(_differences(runs)):
        row = {"step": step + 1, "loss_torch": f"{theirs.losses[step]:.7f}"}
        row |= {"loss_bnext": f"{ours.losses[step]:.7f}", "difference": f"{difference:.2e}"}
        epoch, last = divmod(step + 1, epoch_steps)
        for name, each in ("torch", theirs), ("bnext", ours):
            row[f"accuracy_{name}"] = "" if last else f"{each.accuracies[epoch - 1]:.4f}"
            row[f"images_per_s_{name}"] = "" if last else f"{each.images_per_s[epoch - 1]:.0f}"
        rows.append(row)
    report.write_csv(out / "train.csv", facts, rows)


def _plot(out: Path, facts: dict[str, str], runs: dict[str, Run]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axis, accuracy_axis = figure.subplots(1, 2)
    for (name, each), style in zip(runs.items(), ("-", "--"), strict=True):
        loss_axis.semilogy(range(1, len(each.losses) + 1), each.losses, style, label=name)
        speed = torch.tensor(each.images_per_s).median()
        label = f"{name}: {each.accuracies[-1]:.4f}, {speed:.0f} images/s"
        accuracy_axis.plot(range(1, len(each.accuracies) + 1), each.accuracies, style, label=label)
    loss_axis.set(xlabel="step", ylabel="training loss", title="A small ResNet on 8x8 digits")
    accuracy_axis.set(xlabel="epoch", ylabel="test accuracy", ylim=(0.8, 1.005))
    for axis in (loss_axis, accuracy_axis):
        axis.legend(fontsize=8)
    figure.supxlabel(report.caption(facts), fontsize=8)
    figure.savefig(out / "train.png", dpi=110)
