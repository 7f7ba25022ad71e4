"""Cost per call on a tiny tensor, module against module, one thread."""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

import bnext
from benchmarks import report, timing

CHANNELS = 4
_MODES: dict[str, tuple[bool, Callable[[], AbstractContextManager[object]]]] = {
    "eval no_grad": (False, torch.no_grad),
    "eval inference_mode": (False, torch.inference_mode),
    "training forward": (True, nullcontext),
    "training forward + backward": (True, nullcontext),
}


def _call(module: nn.Module, mode: str) -> timing.Call:
    x = torch.randn(2, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(0))
    if mode != "training forward + backward":
        x.requires_grad_(mode == "training forward")
        return lambda: module(x)
    wanted = (x.requires_grad_(), *module.parameters())
    grad_out = torch.ones_like(x)
    return lambda: torch.autograd.grad(module(x), wanted, grad_out)


def run(out: Path, rounds: int, repeat: int) -> int:
    torch.set_num_threads(1)
    console = Console()
    facts = report.provenance()
    console.print(report.facts_table(facts))
    title = f"one call on 2x{CHANNELS}x2x2, us: medians of {rounds} paired rounds"
    table = report.numbers_table(title, ["mode"], ["nn.BatchNorm2d", "bnext.BatchNorm2d", "ratio"])
    rows = []
    for mode, (training, context) in _MODES.items():
        torchs, ours = nn.BatchNorm2d(CHANNELS), bnext.BatchNorm2d(CHANNELS)
        calls = {
            "torch": _call(torchs.train(training), mode),
            "bnext": _call(ours.train(training), mode),
        }
        with context():
            for call in calls.values():
                for _ in range(repeat):
                    call()
            timed = timing.alternate(calls, float("inf"), repeat, rounds)
        pairs = zip(timed["bnext"].seconds, timed["torch"].seconds, strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        torch_us, bnext_us = timed["torch"].ms * 1e3, timed["bnext"].ms * 1e3
        table.add_row(mode, f"{torch_us:.2f}", f"{bnext_us:.2f}", f"{ratio:.2f}")
        rows.append(
            {
                "mode": mode,
                "torch_us": f"{torch_us:.3f}",
                "bnext_us": f"{bnext_us:.3f}",
                "ratio": f"{ratio:.3f}",
                "rounds": rounds,
            }
        )
    console.print(table)
    report.write_csv(out / "overhead.csv", facts, rows)
    console.print(f"Written to {out}/overhead.csv", highlight=False)
    return 0
