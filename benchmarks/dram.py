"""Bytes that bnext moves through a GPU's memory, counted by Nsight Compute (ncu)."""

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.arguments import BadArgumentError
from benchmarks.cases import Case
from benchmarks.gpu_clock import MARKER, CudaClock
from benchmarks.providers import Subject

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
# Tensors much larger than the L2: what a kernel leaves there is counted with the flush after it.
CASES = [
    Case(shape, "bfloat16", layout, variant)
    for shape in ((128, 256, 56, 56), (64, 64, 112, 112))
    for layout in ("nchw", "channels_last")
    for variant in ("bn", "bn_add_relu", "frozen")
]
PLAN = [(case, direction) for case in CASES for direction in ("forward", "backward")]


class Kernel(NamedTuple):
    name: str
    read: float
    written: float


def workload(device: torch.device) -> int:
    """Runs marker, call, marker and flush for each entry of PLAN. To be run under ncu."""
    clock = CudaClock(device)
    with clock.stream_in_use():
        for case, direction in PLAN:
            subject = Subject.of("bnext", case, case.operands(device))
            call = subject.call(direction)
            call()
            clock.flush()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            call()
            torch.cuda._sleep(1)
            clock.flush()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            del subject, call
            torch.cuda.empty_cache()
    return 0


def kernels(lines: Iterable[str]) -> list[Kernel]:
    """From ncu's CSV with a line per kernel and metric, in order; other lines are its messages."""
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        kernel = found.setdefault(row["ID"], {"name": row["Kernel Name"]})
        kernel[row["Metric Name"]] = row["Metric Value"].replace(",", "")
    return [Kernel(k["name"], *(float(k[metric]) for metric in METRICS)) for k in found.values()]


def calls(found: Iterable[Kernel]) -> list[list[Kernel]]:
    """The kernels of each call; what the flush after it wrote counts as one more."""
    groups: list[list[Kernel]] = []
    for kernel in found:
        if MARKER in kernel.name:
            groups.append([])
        elif groups:
            groups[-1].append(kernel)
    pairs = zip(groups[::2], groups[1::2], strict=True)
    return [[*call, Kernel("left in the L2", 0.0, sum(k.written for k in f))] for call, f in pairs]


def rows(found: list[list[Kernel]]) -> list[dict[str, str | int]]:
    return [
        {
            "shape": case.size,
            "dtype": case.dtype,
            "layout": case.layout,
            "variant": case.variant,
            "direction": direction,
            "kernels": len(call) - 1,
            "read_mb": f"{sum(k.read for k in call) / 1e6:.2f}",
            "written_mb": f"{sum(k.written for k in call) / 1e6:.2f}",
            "tensors_moved": f"{sum(k.read + k.written for k in call) / case.bytes:.3f}",
            "tensors_at_least": case.kind.floor(direction),
        }
        for (case, direction), call in zip(PLAN, found, strict=True)
    ]


def run(out: Path, facts: dict[str, str], device: torch.device) -> int:
    if shutil.which("ncu") is None:
        raise BadArgumentError("ncu (Nsight Compute) is not on PATH")
    console = Console(width=110)
    log = out / "ncu.log"
    out.mkdir(parents=True, exist_ok=True)
    command = [
        "ncu", "--csv", "--log-file", str(log), "--print-units", "base", "--metrics",
        ",".join(METRICS), "--clock-control", "none", "--cache-control", "none",
        "--profile-from-start", "off", sys.executable, "-m", "benchmarks", "dram", "--workload",
        "--device", str(device),
    ]  # fmt: skip
    status = subprocess.run(command, check=False).returncode
    if status:
        console.print(
            f"[red]ncu failed ({status}):[/red] {log.read_text() if log.exists() else ''}"
        )
        return status
    facts = facts | report.gpu_facts(device)
    found = rows(calls(kernels(log.read_text().splitlines(keepends=True))))
    report.write_csv(out / "dram.csv", facts, found)
    labels = list(found[0])[:5]
    table = report.numbers_table("tensors moved through DRAM", labels, list(found[0])[5:])
    for row in found:
        table.add_row(*map(str, row.values()))
    console.print(table)
    return 0
