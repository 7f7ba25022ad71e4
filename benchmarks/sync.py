"""SyncBatchNorm over processes: torchrun --nproc-per-node 2 -m benchmarks sync."""

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

import bnext
from benchmarks import cases, report
from benchmarks.arguments import BadArgumentError
from bnext._exchange import all_gather_single, message_bytes

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
SMALL_BYTES, LARGE_BYTES = 512, 1 << 20


class ManualSync(nn.BatchNorm2d):
    """What one writes where torch.nn.SyncBatchNorm does not run: nn.BatchNorm2d by the mean of all
    processes' means, of values and squares, which it asks them for.
    """

    def forward(self, input: Tensor) -> Tensor:
        dims = (0, 2, 3)
        means = torch.stack([input.mean(dims), input.square().mean(dims)])
        mean, square = all_reduce(means) / dist.get_world_size()
        var = square - mean.square()
        count = input.numel() // input.shape[1] * dist.get_world_size()
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1)), momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return torch.addcmul(shift.view(-1, 1, 1), input, scale.view(-1, 1, 1))


def providers(device: torch.device) -> dict[str, Callable[[int], nn.Module]]:
    """The first is compared with the second; the third exchanges nothing."""
    sync: Callable[[int], nn.Module] = ManualSync if device.type == "cpu" else nn.SyncBatchNorm
    return {
        "bnext.SyncBatchNorm": bnext.SyncBatchNorm,
        "nn.BatchNorm2d + all_reduce" if device.type == "cpu" else "nn.SyncBatchNorm": sync,
        "bnext.BatchNorm2d, alone": bnext.BatchNorm2d,
    }


@dataclass
class Traffic:
    """Of the collectives that one process starts."""

    collectives: int = 0
    bytes_sent: int = 0


@contextmanager
def counting(traffic: Traffic) -> Iterator[None]:
    every = "all_gather_single", "all_gather_into_tensor", "all_gather", "all_reduce"
    names = [name for name in every if hasattr(dist, name)]
    originals = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[0] if name == "all_reduce" else args[1]
            traffic.collectives += 1
            traffic.bytes_sent += sent.numel() * sent.element_size()
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(dist, name, counted(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


class Clock:
    """Of all processes at once: a call begins when the last one is ready."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], object]) -> float:
        self._wait()
        dist.barrier()
        start = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - start

    def median(self, call: Callable[[], object], rounds: int) -> float:
        call()
        return statistics.median(self.seconds(call) for _ in range(rounds))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    case: cases.Case, device: torch.device, rounds: int
) -> tuple[dict[str, float], dict[str, Traffic]]:
    """Milliseconds of forward and backward, alternating, and what one of them sends."""
    x, _, grad_out = case.operands(device)
    modules = {name: make(case.shape[1]) for name, make in providers(device).items()}
    modules = {name: module.to(device) for name, module in modules.items()}
    clock, order = Clock(device), random.Random(0)

    def step(module: nn.Module) -> None:
        x.grad = None
        y: Tensor = module(x)
        y.backward(grad_out)

    traffic = {name: Traffic() for name in modules}
    for name, module in modules.items():
        with counting(traffic[name]):
            step(module)
        step(module)
    expected = F.batch_norm(x.detach(), None, None, training=True)
    found = modules["bnext.BatchNorm2d, alone"](x.detach())
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(rounds):
        for name in order.sample([*modules], len(modules)):
            seconds[name].append(clock.seconds(lambda m=modules[name]: step(m)))
    return {name: statistics.median(s) * 1e3 for name, s in seconds.items()}, traffic


@dataclass(frozen=True)
class Link:
    """What a step of a ring takes: a collective is a ring of such steps."""

    latency: float  # seconds
    bytes_per_s: float

    def gather(self, size: float, ranks: int) -> float:
        """Seconds of an all-gather of so many bytes a process."""
        return (ranks - 1) * (self.latency + size / self.bytes_per_s)

    def reduce(self, size: float, ranks: int) -> float:
        """Seconds of an all-reduce: a reduce-scatter and an all-gather of a part each."""
        return 2 * (ranks - 1) * (self.latency + size / ranks / self.bytes_per_s)


def measure_link(device: torch.device, rounds: int) -> Link:
    ranks, clock = dist.get_world_size(), Clock(device)

    def seconds(size: int) -> float:
        sent = torch.zeros(size // 8, dtype=torch.float64, device=device)
        received = sent.new_empty(ranks * sent.numel())
        return clock.median(lambda: all_gather_single(received, sent), rounds)

    small, large = (seconds(size) / (ranks - 1) for size in (SMALL_BYTES, LARGE_BYTES))
    return Link(small, LARGE_BYTES / max(large - small, 1e-9))


def predicted_ms(link: Link, ranks: int) -> float:
    """What the exchanges of a step of ResNet-50 add."""
    total = 0.0
    for shape in cases.RESNET50:
        messages = message_bytes(shape.channels, ranks)
        forward = sum(link.gather(size, ranks) for size in messages)
        total += shape.layers * (forward + link.reduce(16 * shape.channels, ranks))
    return total * 1e3


def run(out: Path, facts: dict[str, str], batch: int, quick: bool) -> int:
    if "RANK" not in os.environ:
        raise BadArgumentError("start it as torchrun --nproc-per-node 2 -m benchmarks sync")
    device = torch.device("cpu")
    if bnext.build_info()["cuda"] and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        return _run(out, facts, batch, quick, device)
    finally:
        dist.destroy_process_group()


def _run(out: Path, facts: dict[str, str], batch: int, quick: bool, device: torch.device) -> int:
    ranks, is_first = dist.get_world_size(), dist.get_rank() == 0
    facts = facts | report.gpu_facts(device) | {
        "processes": str(ranks), "backend": dist.get_backend(), "batch of each": str(batch),
    }  # fmt: skip

    def write(rows: list[dict[str, object]]) -> None:
        columns = "shape", "layers", "provider", "ranks", "ms", "collectives", "bytes_sent"
        if is_first:
            empty: dict[str, object] = dict.fromkeys(columns, "")
            report.write_csv(out / "sync.csv", facts, (empty | row for row in rows))

    shapes, rounds = (cases.QUICK, 3) if quick else (cases.RESNET50, 11)
    console = Console(quiet=not is_first)
    rows: list[dict[str, object]] = []
    totals: dict[str, float] = {}
    sent: dict[str, Traffic] = {}
    for case in cases.resnet50((batch,), ("float32",), ("bn",), ("nchw",), shapes):
        times, traffic = measure(case, device, rounds)
        console.print(f"{case}: " + ", ".join(f"{n} {t:.2f} ms" for n, t in times.items()))
        for name, ms in times.items():
            totals[name] = totals.get(name, 0.0) + case.layers * ms
            total = sent.setdefault(name, Traffic())
            total.collectives += case.layers * traffic[name].collectives
            total.bytes_sent += case.layers * traffic[name].bytes_sent
            rows.append({
                "shape": case.size, "layers": case.layers, "provider": name, "ms": f"{ms:.3f}",
                "collectives": traffic[name].collectives, "bytes_sent": traffic[name].bytes_sent,
            })  # fmt: skip
        write(rows)
    link = measure_link(device, 5 if quick else 101)
    if is_first:
        ours, theirs, alone = totals
        console.print(
            f"\nThe batch norms of {'a part of ' if quick else ''}ResNet-50, {ranks} processes, "
            f"N = {batch} each, forward and backward: {ours} {totals[ours]:.1f} ms, {theirs} "
            f"{totals[theirs]:.1f} ms ({totals[theirs] / totals[ours]:.2f} times), {alone} "
            f"{totals[alone]:.1f} ms"
        )
        for name, traffic in sent.items():
            kilobytes = traffic.bytes_sent / 1e3
            console.print(f"{name}: {traffic.collectives} collectives, {kilobytes:.0f} kB a step")
        step = f"{link.latency * 1e6:.0f} us, {link.bytes_per_s / 1e9:.2f} GB/s"
        console.print(
            f"\nA step of a ring here: {step}. With these, a prediction of what the exchanges of a "
            "step of ResNet-50 would add: an all-gather is a ring of ranks - 1 steps, an "
            "all-reduce one of twice as many."
        )
        for other in RANKS:
            ms = predicted_ms(link, other)
            console.print(f"{other:5} ranks: {ms:9.1f} ms predicted")
            rows.append({"provider": "predicted exchanges", "ranks": other, "ms": f"{ms:.3f}"})
        facts["ring step"] = f"{link.latency * 1e6:.1f} us, {link.bytes_per_s / 1e9:.3f} GB/s"
        write(rows)
        console.print(f"{out / 'sync.csv'}")
    return 0
