"""Tables (rich), CSV and plots; where the numbers come from goes into all of them."""

import csv
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

import bnext
from benchmarks.providers import FLOOR_TENSORS, Case, Verdict
from benchmarks.timing import Timing
from bnext import _C

COLORS = {"bnext": "tab:blue", "eager": "tab:orange", "compile": "tab:green", "copy": "black"}


class Key(NamedTuple):
    allocator: str
    direction: str
    case: Case


Timings = dict[Key, dict[str, Timing]]
Verdicts = dict[Case, dict[str, Verdict]]


def provenance() -> dict[str, str]:
    """Machine, versions, date and commit: what a figure is worth nothing without."""
    threads = torch.get_num_threads()
    cpu = _C.cpu_device_info(threads)
    build = bnext.build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git_commit(),
        "cpu": _cpu_model(),
        "threads": str(threads),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "isa": cpu.isa,
        "caches": f"L1 {cpu.l1_bytes >> 10} KiB, L2 {cpu.l2_bytes >> 10} KiB, "
        f"L3 {cpu.l3_bytes >> 10} KiB",
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bnext": bnext.__version__,
        "compiler": str(build["compiler"]),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str:
    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def facts_table(facts: Mapping[str, str]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name, value, style="dim")
    return table


def numbers_table(title: str, labels: Iterable[str], numbers: Iterable[str]) -> Table:
    """Without rows yet; narrow enough for 80 columns, which is what a log has."""
    table = Table(title=title, box=SIMPLE, padding=0, pad_edge=False)
    for label in labels:
        table.add_column(label, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def error_table(verdicts: Verdicts) -> Table:
    """The worst over the shapes."""
    names = list(next(iter(verdicts.values())))
    title = "largest error against float64, relative to the largest value"
    table = numbers_table(title, ["case"], names)
    table.caption = "* beyond the tests' bound: twice eager's error plus unavoidable roundings"
    for dtype, layout in dict.fromkeys((case.dtype, case.layout) for case in verdicts):
        some = [v for case, v in verdicts.items() if (case.dtype, case.layout) == (dtype, layout)]
        worst = (max(v[name].error for v in some) for name in names)
        marks = ("*" if any(v[name].failures for v in some) else "" for name in names)
        cells = (f"{error:.1e}{mark}" for error, mark in zip(worst, marks, strict=True))
        table.add_row(f"{dtype} {layout}", *cells)
    return table


def ceiling_ms(key: Key, timings: Mapping[str, Timing]) -> float:
    """The time of copying as many bytes as the floor: 1 copy forward (2E), 1.5 backward (3E)."""
    return timings["copy"].ms * FLOOR_TENSORS[key.direction] / 2


def useful_gb_per_s(key: Key, ms: float) -> float:
    """Of the floor's bytes: who moves more than the floor is not rewarded for it."""
    return key.case.bytes * FLOOR_TENSORS[key.direction] / ms / 1e6


def _groups(timings: Timings) -> dict[tuple[str, str, str, str], Timings]:
    groups: dict[tuple[str, str, str, str], Timings] = {}
    for key, providers in timings.items():
        group = key.direction, key.allocator, key.case.dtype, key.case.layout
        groups.setdefault(group, {})[key] = providers
    return groups


def _others(timings: Timings) -> list[str]:
    """Who is compared with bnext: everybody but the copy."""
    return [name for name in next(iter(timings.values())) if name not in ("bnext", "copy")]


def timing_tables(timings: Timings) -> Iterable[Table]:
    for (direction, allocator, dtype, layout), group in _groups(timings).items():
        title = f"{direction}, {dtype}, {layout}, {allocator} allocator, median ms"
        others = _others(group)
        copies = {"forward": "copy", "backward": "1.5\ncopies"}[direction]
        columns = [copies, "bnext", *others, *(f"vs\n{name}" for name in others)]
        columns += [f"vs {copies}", "useful\nGB/s", "faults"]
        table = numbers_table(title, ["N, C, H, W"], columns)
        for key, by_provider in group.items():
            ours, ceiling = by_provider["bnext"], ceiling_ms(key, by_provider)
            table.add_row(
                f"{key.case.batch}x{key.case.shape}",
                f"{ceiling:.3f}",
                f"{ours.ms:.3f}",
                *(f"{by_provider[name].ms:.3f}" for name in others),
                *(f"{by_provider[name].ms / ours.ms:.2f}x" for name in others),
                f"{ours.ms / ceiling:.2f}",
                f"{useful_gb_per_s(key, ours.ms):.1f}",
                str(ours.median_faults),
            )
        yield table


def summary_table(timings: Timings) -> Table:
    """Geometric means over the distinct shapes, and the worst shape."""
    others = _others(timings)
    table = numbers_table(
        "speed of bnext against the others, its time in copies: geometric mean (worst)",
        ["direction", "malloc", "dtype", "layout"],
        [*(f"vs {name}" for name in others), "time/copy"],
    )
    for group, members in _groups(timings).items():
        cells = []
        for name in others:
            speedups = [p[name].ms / p["bnext"].ms for p in members.values()]
            cells.append(f"{statistics.geometric_mean(speedups):.2f} ({min(speedups):.2f})")
        slowness = [p["bnext"].ms / ceiling_ms(key, p) for key, p in members.items()]
        cells.append(f"{statistics.geometric_mean(slowness):.2f} ({max(slowness):.2f})")
        table.add_row(*group, *cells)
    return table


def timing_rows(timings: Timings) -> Iterable[dict[str, Any]]:
    for key, by_provider in timings.items():
        case, ceiling = key.case, ceiling_ms(key, by_provider)
        for name, timed in by_provider.items():
            low, high = timed.quartiles_ms
            yield {
                "direction": key.direction,
                "allocator": key.allocator,
                "dtype": case.dtype,
                "layout": case.layout,
                "batch": case.batch,
                "channels": case.shape.channels,
                "size": case.shape.size,
                "layers": case.shape.layers,
                "provider": name,
                "median_ms": f"{timed.ms:.4f}",
                "lower_quartile_ms": f"{low:.4f}",
                "upper_quartile_ms": f"{high:.4f}",
                "rounds": len(timed.seconds),
                "page_faults": timed.median_faults,
                "ceiling_ms": f"{ceiling:.4f}",
                "time_over_ceiling": f"{timed.ms / ceiling:.3f}",
                "time_over_bnext": f"{timed.ms / by_provider['bnext'].ms:.3f}",
                "useful_gb_per_s": f"{useful_gb_per_s(key, timed.ms):.2f}",
            }


def write_csv(path: Path, facts: Mapping[str, str], rows: Iterable[dict[str, Any]]) -> None:
    """Facts as `# name: value` lines first (pandas: comment="#")."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot_bandwidth(out: Path, timings: Timings, facts: Mapping[str, str]) -> None:
    """One picture per allocator: bars of useful bandwidth per shape, a step for the copy."""
    for allocator in dict.fromkeys(key.allocator for key in timings):
        groups = _groups({key: p for key, p in timings.items() if key.allocator == allocator})
        columns = list(dict.fromkeys((dtype, layout) for _, _, dtype, layout in groups))
        figure = Figure(figsize=(4.2 * len(columns) + 1, 7), layout="constrained")
        axes = figure.subplots(len(FLOOR_TENSORS), len(columns), squeeze=False)
        for row, direction in enumerate(FLOOR_TENSORS):
            for column, (dtype, layout) in enumerate(columns):
                axis = axes[row][column]
                _plot_group(axis, groups[direction, allocator, dtype, layout])
                axis.set_title(f"{direction}, {dtype}, {layout}", fontsize=10)
            floor = FLOOR_TENSORS[direction]
            axes[row][0].set_ylabel(f"useful GB/s ({floor} tensors / time)")
        axes[0][0].legend(fontsize=8)
        figure.suptitle(f"Training batch norm, ResNet-50's shapes, {allocator} allocator")
        figure.supxlabel(caption(facts), fontsize=8)
        figure.savefig(out / f"bandwidth-{allocator}.png", dpi=110)


def _plot_group(axis: Any, group: Timings) -> None:
    names = [name for name in COLORS if name in next(iter(group.values())) and name != "copy"]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        x = [shape + (i - (len(names) - 1) / 2) * width for shape in range(len(group))]
        y = [useful_gb_per_s(key, p[name].ms) for key, p in group.items()]
        axis.bar(x, y, width, color=COLORS[name], label=name)
    ceilings = [useful_gb_per_s(key, ceiling_ms(key, p)) for key, p in group.items()]
    edges = [shape - 0.5 for shape in range(len(group) + 1)]
    axis.stairs(ceilings, edges, color=COLORS["copy"], linewidth=1.5, label="copy (ceiling)")
    axis.set_xticks(
        range(len(group)), [str(key.case.shape) for key in group], rotation=60, fontsize=8
    )


def caption(facts: Mapping[str, str]) -> str:
    return (
        f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}, torch {facts['torch']}, "
        f"bnext {facts['bnext']} ({facts['commit']}), {facts['date']}"
    )
