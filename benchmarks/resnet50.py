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
from benchmarks import cpu_clock, report

CLASSES = 1000


class Bottleneck(nn.Module):
    """Residual block with three convolutions (He et al. 2016), stride in the 3x3."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class ResNet50(nn.Sequential):
    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)]
        layers += [nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
        inputs = 64
        for width, blocks, stride in (64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2):
            for i in range(blocks):
                layers.append(Bottleneck(inputs, width, 1 if i else stride))
                inputs = 4 * width
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)
        super().__init__(*layers, *head)


NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nn.BatchNorm2d": lambda model: model,
    "convert": bnext.convert,
    "convert(fuse=True)": lambda model: bnext.convert(model, fuse=True),
}


def model(norm: str) -> nn.Module:
    """A ResNet-50 with the same initial parameters for every norm."""
    torch.manual_seed(0)
    return NORMS[norm](ResNet50())


class Settings(NamedTuple):
    device: torch.device
    batch: int
    size: int  # of the square images
    steps: int  # per round
    budget_s: float  # for the rounds of one precision


class Precision(NamedTuple):
    autocast: torch.dtype | None
    memory_format: torch.memory_format
    tolerance: float  # of the first loss: the networks differ only by roundings


PRECISIONS = {
    f"{name}, {layout}": Precision(dtype, memory_format, tolerance)
    for name, dtype, tolerance in (("AMP bfloat16", torch.bfloat16, 5e-2), ("float32", None, 1e-3))
    for layout, memory_format in (
        ("channels_last", torch.channels_last),
        ("nchw", torch.contiguous_format),
    )
}
# What there is time for on a GPU, where each is compiled too.
ON_GPU = "AMP bfloat16, channels_last", "float32, nchw"


def training_step(
    model: nn.Module, precision: Precision, settings: Settings, compiled: bool
) -> Callable[[], Tensor]:
    """A call that trains on one batch and returns the loss."""
    device, batch, size = settings[:3]
    model = model.to(device, memory_format=precision.memory_format).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    images = images.to(device, memory_format=precision.memory_format)
    labels = torch.randint(CLASSES, (batch,), generator=generator).to(device)
    if compiled:
        model.compile(dynamic=False)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, precision.autocast, enabled=bool(precision.autocast)):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


class Result(NamedTuple):
    first_loss: float
    timing: cpu_clock.Timing  # of a round
    peak_bytes: int | None  # beyond what was held before the step


def measure(precision: Precision, settings: Settings, compiled: bool) -> dict[str, Result]:
    """The networks with each norm take turns."""
    torch._dynamo.reset()
    on_gpu = settings.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(settings.device.index or 0)
    losses, peaks, calls = {}, dict.fromkeys(NORMS), dict[str, cpu_clock.Call]()
    for name in NORMS:
        step = training_step(model(name), precision, settings, compiled)
        losses[name] = float(step())
        if on_gpu:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks[name] = torch.cuda.max_memory_allocated() - held

        def timed(step: Callable[[], Tensor] = step) -> None:
            for _ in range(settings.steps):
                step()
            if on_gpu:
                torch.cuda.synchronize()

        calls[name] = timed
    timings = cpu_clock.alternate(calls, settings.budget_s)
    return {name: Result(losses[name], timings[name], peaks[name]) for name in NORMS}


@torch.backends.cudnn.flags(enabled=True, benchmark=True)
def run(
    out: Path, facts: dict[str, str], settings: Settings, minutes: float, with_compile: bool
) -> int:
    console = Console(width=110)
    end = time.perf_counter() + minutes * 60
    if settings.device.type == "cuda":
        facts |= report.gpu_facts(settings.device)
        tf32 = "on" if torch.backends.cudnn.allow_tf32 else "off"
        facts["convolutions"] = f"TF32 {tf32} in float32"
    facts["step"] = f"{settings.batch} images of {settings.size}x{settings.size}"
    console.print(report.facts_table(facts))
    table = report.numbers_table(
        "ResNet-50 training step", ["precision", "mode", "batch norm"],
        ["first loss", "images/s", "vs nn", "peak GiB"],
    )  # fmt: skip
    rows, wrong = [], False
    precisions = ON_GPU if settings.device.type == "cuda" else PRECISIONS
    runs = [(m, p) for m in ("eager", "compile")[: 1 + with_compile] for p in precisions]
    for mode, precision in runs:
        if time.perf_counter() > end:
            console.print(f"left out, no time: {precision}, {mode}")
            continue
        results = measure(PRECISIONS[precision], settings, mode == "compile")
        base = results["nn.BatchNorm2d"]
        for name, result in results.items():
            differs = abs(result.first_loss - base.first_loss) / abs(base.first_loss)
            wrong |= not differs <= PRECISIONS[precision].tolerance
            speed = settings.batch * settings.steps / result.timing.ms * 1e3
            peak = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**30:.2f}"
            ratio = base.timing.ms / result.timing.ms
            cells = f"{result.first_loss:.5f}", f"{speed:.1f}", f"{ratio:.3f}", peak
            table.add_row(precision, mode, name, *cells)
            columns = "first_loss", "images_per_s", "speed_over_torch", "peak_gib"
            labels = {"precision": precision, "mode": mode, "batch_norm": name}
            rows.append(labels | dict(zip(columns, cells, strict=True)))
            report.write_csv(out / "resnet50.csv", facts, rows)
    console.print(table)
    if wrong:
        console.print("[red]a first loss differs: not the same network[/red]")
    return int(wrong)
