"""A training step of ResNet-50 on synthetic images, with torch's batch norms and with bnext's."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import bnext
from benchmarks import report
from benchmarks.providers import NormAct

CLASSES, WARM_UP_STEPS = 1000, 5
Norm = Callable[[int], nn.Module]  # relu(norm(x) + residual)


class Bottleneck(nn.Module):
    """Residual block with three convolutions (He et al. 2016), stride in the 3x3."""

    def __init__(self, inputs: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = norm(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), norm(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(y), self.shortcut(x))


class ResNet50(nn.Sequential):
    def __init__(self, norm: Norm) -> None:
        layers = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), norm(64)]
        layers.append(nn.MaxPool2d(3, 2, padding=1))
        inputs = 64
        for width, blocks, stride in (64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2):
            for i in range(blocks):
                layers.append(Bottleneck(inputs, width, 1 if i else stride, norm))
                inputs = 4 * width
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)
        super().__init__(*layers, *head)


def _torchs(channels: int) -> nn.Module:
    return NormAct(nn.BatchNorm2d(channels))


NORMS = ("nn.BatchNorm2d", "bnext.convert", "BatchNormAct2d")


def model(norm: str) -> nn.Module:
    """A ResNet-50 with the same initial parameters for every norm."""
    torch.manual_seed(0)
    if norm == "nn.BatchNorm2d":
        return ResNet50(_torchs)
    # Also converts the shortcuts' norms, which have no activation, beside BatchNormAct2d.
    return bnext.convert(ResNet50(_torchs if norm == "bnext.convert" else bnext.BatchNormAct2d))


class Settings(NamedTuple):
    device: torch.device
    batch: int
    size: int  # of the square images
    steps: int  # timed


class Precision(NamedTuple):
    autocast: torch.dtype | None
    memory_format: torch.memory_format
    tolerance: float  # of the first loss: the networks differ only by roundings


PRECISIONS = {
    "AMP bfloat16, channels_last": Precision(torch.bfloat16, torch.channels_last, 5e-2),
    "float32, nchw": Precision(None, torch.contiguous_format, 1e-3),
}


class Result(NamedTuple):
    first_loss: float
    images_per_s: float
    peak_bytes: int | None


def train(model: nn.Module, precision: Precision, settings: Settings, compiled: bool) -> Result:
    device, batch, size, steps = settings
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device.index or 0)
    model = model.to(device, memory_format=precision.memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    images = images.to(device, memory_format=precision.memory_format)
    labels = torch.randint(CLASSES, (batch,), generator=generator).to(device)
    if compiled:
        torch._dynamo.reset()
        model.compile(dynamic=False)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, precision.autocast, enabled=bool(precision.autocast)):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize(device)

    first_loss = float(step())
    for _ in range(WARM_UP_STEPS if on_gpu else 0):
        step()
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Result(first_loss, batch * steps / seconds, peak)


@torch.backends.cudnn.flags(enabled=True, benchmark=True)
def run(out: Path, settings: Settings, minutes: float, with_compile: bool) -> int:
    console = Console(width=110)
    end = time.perf_counter() + minutes * 60
    facts = report.provenance() | report.gpu_facts(settings.device)
    images = f"{settings.batch} images of {settings.size}x{settings.size}"
    facts["step"] = f"{images}, {settings.steps} steps timed"
    facts["convolutions"] = f"TF32 {'on' if torch.backends.cudnn.allow_tf32 else 'off'} in float32"
    console.print(report.facts_table(facts))
    table = report.numbers_table(
        "ResNet-50 training step", ["precision", "mode", "batch norm"],
        ["first loss", "images/s", "vs nn", "peak GiB"],
    )  # fmt: skip
    rows, wrong = [], False
    runs = [(m, p) for m in ("eager", "compile")[: 1 + with_compile] for p in PRECISIONS]
    for mode, precision in runs:
        base: Result | None = None
        for name in NORMS:
            if time.perf_counter() > end:
                console.print(f"left out, no time: {precision}, {mode}, {name}")
                continue
            result = train(model(name), PRECISIONS[precision], settings, mode == "compile")
            base = base or result
            differs = abs(result.first_loss - base.first_loss) / abs(base.first_loss)
            wrong |= not differs <= PRECISIONS[precision].tolerance
            speed = result.images_per_s / base.images_per_s
            peak = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.2f}"
            cells = f"{result.first_loss:.5f}", f"{result.images_per_s:.1f}", f"{speed:.3f}", peak
            table.add_row(precision, mode, name, *cells)
            columns = "first_loss", "images_per_s", "speed_over_torch", "peak_gib"
            labels = {"precision": precision, "mode": mode, "batch_norm": name}
            rows.append(labels | dict(zip(columns, cells, strict=True)))
            report.write_csv(out / "resnet50.csv", facts, rows)
    console.print(table)
    if wrong:
        console.print("[red]a first loss differs: not the same network[/red]")
    return int(wrong)
