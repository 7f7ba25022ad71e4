"""The cost of a call on a tiny tensor, eager and compiled, and of a second derivative."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import bnext
from benchmarks import cpu_clock, report

CHANNELS = 4
CPU = torch.device("cpu")
_MODES: dict[str, tuple[bool, Callable[[], AbstractContextManager[object]]]] = {
    "eval no_grad": (False, torch.no_grad),
    "eval inference_mode": (False, torch.inference_mode),
    "training forward": (True, nullcontext),
    "training forward + backward": (True, nullcontext),
}


def _call(module: nn.Module, mode: str, device: torch.device) -> cpu_clock.Call:
    x = torch.randn(2, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(0)).to(device)
    if mode != "training forward + backward":
        x.requires_grad_(mode == "training forward")
        return lambda: module(x)
    wanted = (x.requires_grad_(), *module.parameters())
    grad_out = torch.ones_like(x)
    return lambda: torch.autograd.grad(module(x), wanted, grad_out)


def _second_derivative(module: nn.Module, memory_format: torch.memory_format) -> cpu_clock.Call:
    """What a gradient penalty adds: the gradients of dx for dy, x and the weight."""
    x, dy, v = (
        torch.randn(32, 64, 56, 56, generator=torch.Generator().manual_seed(seed))
        .contiguous(memory_format=memory_format).requires_grad_(seed < 2)
        for seed in range(3)
    )  # fmt: skip
    (dx,) = torch.autograd.grad(module(x), x, dy, create_graph=True)
    wanted = dy, x, module.weight
    return lambda: torch.autograd.grad(dx, wanted, v, retain_graph=True)


@dataclass(frozen=True)
class Comparison:
    mode: str
    calls: dict[str, cpu_clock.Call]
    context: Callable[[], AbstractContextManager[object]]
    repeat: int
    rounds: int


def one_call(
    mode: str, compiled: bool, repeat: int, rounds: int, device: torch.device = CPU
) -> Comparison:
    training, context = _MODES[mode]
    norms = nn.BatchNorm2d, bnext.BatchNorm2d
    modules = [norm(CHANNELS, device=device).train(training) for norm in norms]
    if compiled:
        torch.compiler.reset()
        modules = [torch.compile(module, fullgraph=True) for module in modules]
    calls = dict(zip(("torch", "bnext"), (_call(m, mode, device) for m in modules), strict=True))
    return Comparison(f"{mode}, compiled" if compiled else mode, calls, context, repeat, rounds)


def _comparisons(rounds: int, repeat: int) -> Iterator[Comparison]:
    for compiled, mode in product((False, True), _MODES):
        yield one_call(mode, compiled, repeat, rounds)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        calls = {
            "torch": _second_derivative(nn.BatchNorm2d(64), memory_format),
            "bnext": _second_derivative(bnext.BatchNorm2d(64), memory_format),
        }
        layout = "channels_last" if memory_format is torch.channels_last else "contiguous"
        name = f"second derivative, 32x64x56x56 {layout}"
        yield Comparison(name, calls, nullcontext, 1, min(rounds, 15))


def measure(comparison: Comparison) -> tuple[dict[str, cpu_clock.Timing], float]:
    """The times, and the median ratio of bnext's to torch's in the same round."""
    with comparison.context():
        for call in comparison.calls.values():
            for _ in range(comparison.repeat):
                call()
        timed = cpu_clock.alternate(
            comparison.calls, float("inf"), comparison.repeat, comparison.rounds
        )
    pairs = zip(timed["bnext"].seconds, timed["torch"].seconds, strict=True)
    return timed, statistics.median(a / b for a, b in pairs)


def run(out: Path, facts: dict[str, str], rounds: int, repeat: int) -> int:
    torch.set_num_threads(1)
    console = Console()
    console.print(report.facts_table(facts))
    title = f"one call on 2x{CHANNELS}x2x2 unless it says otherwise, us: medians of paired rounds"
    table = report.numbers_table(title, ["mode"], ["nn.BatchNorm2d", "bnext.BatchNorm2d", "ratio"])
    rows = []
    for comparison in _comparisons(rounds, repeat):
        timed, ratio = measure(comparison)
        torch_us, bnext_us = timed["torch"].ms * 1e3, timed["bnext"].ms * 1e3
        table.add_row(comparison.mode, f"{torch_us:.2f}", f"{bnext_us:.2f}", f"{ratio:.2f}")
        rows.append(
            {
                "mode": comparison.mode,
                "torch_us": f"{torch_us:.3f}",
                "bnext_us": f"{bnext_us:.3f}",
                "ratio": f"{ratio:.3f}",
                "rounds": comparison.rounds,
            }
        )
        report.write_csv(out / "overhead.csv", facts, rows)
    console.print(table)
    console.print(f"Written to {out}/overhead.csv", highlight=False)
    return 0
