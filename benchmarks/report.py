"""Tables (rich), CSV and plots; all of them say where the numbers come from."""

import csv
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

import bnext
from benchmarks.cases import DIRECTIONS, Case
from benchmarks.check import Verdict
from benchmarks.cpu_clock import Timing
from bnext import _C

COLORS = {
    "bnext": "tab:blue", "eager": "tab:orange", "aten": "tab:red", "compile": "tab:green",
    "copy": "black",
}  # fmt: skip
LARGE_BYTES = 200e6  # in larger tensors the share of the copy counts, not the launches


class Key(NamedTuple):
    case: Case
    direction: str
    setting: str  # the allocator on the CPU, the clock's mode on a GPU


class Cost(NamedTuple):
    peak_bytes: int | None
    kernels: list[str] | None  # names, in order


Timings = dict[Key, dict[str, Timing]]
Costs = dict[tuple[Case, str, str], Cost]
Peer = Callable[[Mapping[str, Timing]], float]  # the milliseconds to compare bnext with
Verdicts = dict[Case, dict[str, Verdict]]


def provenance() -> dict[str, str]:
    """Machine, versions, date and commit, without which a figure means nothing."""
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


def gpu_facts(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"gpu": "none: a smoke test, its figures mean nothing"}
    gpu = torch.cuda.get_device_properties(device)
    return {
        "gpu": gpu.name,
        "gpu details": f"compute capability {gpu.major}.{gpu.minor}, "
        f"{gpu.multi_processor_count} SMs, L2 {gpu.L2_cache_size >> 20} MiB, "
        f"{gpu.total_memory >> 30} GiB",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
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
    """A table without rows, narrow enough for the 80 columns of a log."""
    table = Table(title=title, box=SIMPLE, padding=0, pad_edge=False)
    for label in labels:
        table.add_column(label, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def error_table(verdicts: Verdicts) -> Table:
    """The worst error over the shapes."""
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
    """The time to copy the floor's bytes; a copy moves two tensors."""
    return timings["copy"].ms * key.case.kind.floor(key.direction) / 2


def useful_gb_per_s(key: Key, timings: Mapping[str, Timing], provider: str) -> float:
    """Bandwidth that counts only the floor's bytes: moving more is not rewarded."""
    tensors = 2 if provider == "copy" else key.case.kind.floor(key.direction)
    return key.case.bytes * tensors / timings[provider].ms / 1e6


def eager_ms(timings: Mapping[str, Timing]) -> float:
    return timings["eager"].ms


def best_peer_ms(timings: Mapping[str, Timing]) -> float:
    return min(t.ms for name, t in timings.items() if name not in ("bnext", "copy"))


def speedups(group: Timings, peer: Peer) -> list[float]:
    return [peer(p) / p["bnext"].ms for p in group.values()]


def network_speedup(group: Timings, peer: Peer) -> float | None:
    """The ratio of the times of all ResNet-50 layers, or None for other shapes."""
    layers = [(key.case.layers, p) for key, p in group.items() if key.case.layers]
    ours = sum(n * p["bnext"].ms for n, p in layers)
    return sum(n * peer(p) for n, p in layers) / ours if layers else None


def grouped(timings: Timings, by: Callable[[Key], Any]) -> dict[Any, Timings]:
    groups: dict[Any, Timings] = {}
    for key, providers in timings.items():
        groups.setdefault(by(key), {})[key] = providers
    return groups


def _mean_and_worst(ratios: list[float], worst: Callable[[list[float]], float] = min) -> str:
    return f"{statistics.geometric_mean(ratios):.2f} ({worst(ratios):.2f})" if ratios else ""


def cpu_tables(timings: Timings) -> Iterable[Table]:
    """A table of shapes per direction, allocator, dtype and layout; then one table of all."""
    others = [name for name in next(iter(timings.values())) if name not in ("bnext", "copy")]
    summary = numbers_table(
        "speed of bnext against the others, its time in copies: geometric mean (worst)",
        ["direction", "malloc", "dtype", "layout"],
        [*(f"vs {name}" for name in others), "time/copy"],
    )
    groups = grouped(timings, lambda k: (k.direction, k.setting, k.case.dtype, k.case.layout))
    for (direction, allocator, dtype, layout), group in groups.items():
        title = f"{direction}, {dtype}, {layout}, {allocator} allocator, median ms"
        copies = {"forward": "copy", "backward": "1.5\ncopies"}[direction]
        columns = [copies, "bnext", *others, *(f"vs\n{name}" for name in others)]
        columns += [f"vs {copies}", "useful\nGB/s", "faults"]
        table = numbers_table(title, ["N, C, H, W"], columns)
        for key, by_provider in group.items():
            ours, ceiling = by_provider["bnext"], ceiling_ms(key, by_provider)
            table.add_row(
                key.case.size,
                f"{ceiling:.3f}",
                f"{ours.ms:.3f}",
                *(f"{by_provider[name].ms:.3f}" for name in others),
                *(f"{by_provider[name].ms / ours.ms:.2f}x" for name in others),
                f"{ours.ms / ceiling:.2f}",
                f"{useful_gb_per_s(key, by_provider, 'bnext'):.1f}",
                str(ours.median_faults),
            )
        yield table
        ratios = [speedups(group, lambda p, name=name: p[name].ms) for name in others]
        slowness = [p["bnext"].ms / ceiling_ms(key, p) for key, p in group.items()]
        cells = *map(_mean_and_worst, ratios), _mean_and_worst(slowness, max)
        summary.add_row(direction, allocator, dtype, layout, *cells)
    yield summary


def gpu_tables(timings: Timings) -> Iterable[Table]:
    """A table per mode: geometric means over the shapes, and the worst shape."""
    for mode, some in grouped(timings, lambda key: key.setting).items():
        table = numbers_table(
            f"{mode}: bnext's speed, geometric mean over the shapes (worst)",
            ["dtype", "layout", "variant", "direction"],
            ["cases", "vs best", "vs eager", "53 layers\nvs eager", "of copy\n>= 200 MB"],
        )
        groups = grouped(some, lambda k: (k.case.dtype, k.case.layout, k.case.variant, k.direction))
        for names, group in groups.items():
            network = network_speedup(group, eager_ms)
            large = {k: p for k, p in group.items() if k.case.bytes >= LARGE_BYTES}
            table.add_row(
                *names,
                str(len(group)),
                *(_mean_and_worst(speedups(group, peer)) for peer in (best_peer_ms, eager_ms)),
                "" if network is None else f"{network:.2f}",
                _mean_and_worst([ceiling_ms(k, p) / p["bnext"].ms for k, p in large.items()]),
            )
        yield table


def _timed(timings: Mapping[str, Timing], provider: str) -> dict[str, Any]:
    low, high = timings[provider].quartiles_ms
    return {
        "provider": provider,
        "median_ms": f"{timings[provider].ms:.5f}",
        "lower_quartile_ms": f"{low:.5f}",
        "upper_quartile_ms": f"{high:.5f}",
        "rounds": len(timings[provider].seconds),
        "time_over_bnext": f"{timings[provider].ms / timings['bnext'].ms:.3f}",
    }


def cpu_rows(timings: Timings) -> Iterable[dict[str, Any]]:
    for key, by_provider in timings.items():
        case, ceiling = key.case, ceiling_ms(key, by_provider)
        for name, timing in by_provider.items():
            yield {
                "direction": key.direction,
                "allocator": key.setting,
                "dtype": case.dtype,
                "layout": case.layout,
                "batch": case.shape[0],
                "channels": case.shape[1],
                "size": case.shape[2],
                "layers": case.layers,
                **_timed(by_provider, name),
                "page_faults": timing.median_faults,
                "ceiling_ms": f"{ceiling:.4f}",
                "time_over_ceiling": f"{timing.ms / ceiling:.3f}",
                "useful_gb_per_s": f"{useful_gb_per_s(key, by_provider, name):.2f}",
            }


def gpu_rows(timings: Timings, costs: Costs) -> Iterable[dict[str, Any]]:
    for key, by_provider in timings.items():
        case, ceiling = key.case, ceiling_ms(key, by_provider)
        for name, timing in by_provider.items():
            share = 1.0 if name == "copy" else ceiling / timing.ms
            peak, kernels = costs.get((case, key.direction, name), Cost(None, None))
            yield {
                "shape": case.size,
                "layers": case.layers,
                "dtype": case.dtype,
                "layout": case.layout,
                "variant": case.variant,
                "direction": key.direction,
                "mode": key.setting,
                **_timed(by_provider, name),
                "tensor_mb": f"{case.bytes / 1e6:.3f}",
                "useful_gb_per_s": f"{useful_gb_per_s(key, by_provider, name):.4g}",
                "share_of_copy": f"{share:.3g}",
                "launches": "" if kernels is None else len(kernels),
                "uses_cudnn": "" if kernels is None else any("cudnn" in k for k in kernels),
                "peak_mib": "" if peak is None else f"{peak / 2**20:.1f}",
            }


def write_csv(path: Path, facts: Mapping[str, str], rows: Iterable[dict[str, Any]]) -> None:
    """Writes facts as `# name: value` lines first (pandas: comment="#")."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = list(rows)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot_bandwidth(path: Path, timings: Timings, title: str, facts: Mapping[str, str]) -> None:
    """Bars of useful bandwidth by shape, the copy as steps; a column per dtype and layout."""
    groups = grouped(timings, lambda key: (key.direction, key.case.dtype, key.case.layout))
    columns = list(dict.fromkeys(group[1:] for group in groups))
    figure = Figure(figsize=(4.2 * max(2, len(columns)) + 1, 8), layout="constrained")
    axes = figure.subplots(2, max(1, len(columns)), squeeze=False)
    for row, direction in zip(axes, DIRECTIONS[:2], strict=True):
        for axis, column in zip(row, columns, strict=False):
            _bars(axis, groups.get((direction, *column), {}))
            axis.set_title(", ".join((direction, *column)), fontsize=10)
        row[0].set_ylabel("useful GB/s (the least bytes / time)")
    figure.suptitle(title)
    figure.supxlabel(caption(facts), fontsize=8)
    figure.savefig(path, dpi=110)


def _bars(axis: Any, group: Timings) -> None:
    names = [n for n in COLORS if n != "copy" and any(n in p for p in group.values())]
    if not names:
        return
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        speeds = {
            shape + (i - (len(names) - 1) / 2) * width: useful_gb_per_s(key, p, name)
            for shape, (key, p) in enumerate(group.items())
            if name in p
        }
        axis.bar(list(speeds), list(speeds.values()), width, color=COLORS[name], label=name)
    copies = [useful_gb_per_s(key, p, "copy") for key, p in group.items()]
    edges = [shape - 0.5 for shape in range(len(group) + 1)]
    axis.stairs(copies, edges, color=COLORS["copy"], linewidth=1.5, label="copy")
    axis.set_xticks(range(len(group)), [k.case.size for k in group], rotation=60, fontsize=8)
    axis.legend(fontsize=8)


def plot_largest(path: Path, timings: Timings, facts: Mapping[str, str]) -> None:
    """ResNet-50's shapes at their largest batch, with the first case's dtype, variant and mode."""
    first = next(iter(timings))
    some = {
        key: p for key, p in timings.items()
        if key.case.layers and key.direction != "both" and key.setting == first.setting
        and (key.case.dtype, key.case.variant) == (first.case.dtype, first.case.variant)
    }  # fmt: skip
    batch = max((key.case.shape[0] for key in some), default=0)
    some = {key: p for key, p in some.items() if key.case.shape[0] == batch}
    title = f"Batch norm of ResNet-50's shapes, N = {batch}, {first.case.dtype}, {first.setting}"
    plot_bandwidth(path, some, title, facts)


def plot_speedup(path: Path, timings: Timings, facts: Mapping[str, str]) -> None:
    """Forward plus backward, by dtype, layout and batch: geometric mean, worst and best."""
    some = {k: p for k, p in timings.items() if k.case.layers and k.direction == "both"}
    figure = Figure(figsize=(13, 8), layout="constrained")
    modes = list(dict.fromkeys(key.setting for key in some))
    axes = figure.subplots(max(1, len(modes)), 1, squeeze=False)
    for axis, mode in zip(axes[:, 0], modes, strict=False):
        groups = grouped(
            {k: p for k, p in some.items() if k.setting == mode},
            lambda k: f"{k.case.dtype}\n{k.case.layout}\n{k.case.variant}\nN={k.case.shape[0]}",
        )
        peers = {"best of the others": best_peer_ms, "eager": eager_ms}
        for i, (name, peer) in enumerate(peers.items()):
            ratios = [speedups(group, peer) for group in groups.values()]
            means = [statistics.geometric_mean(r) for r in ratios]
            below = [max(0.0, m - min(r)) for m, r in zip(means, ratios, strict=True)]
            above = [max(0.0, max(r) - m) for m, r in zip(means, ratios, strict=True)]
            places = [x + 0.4 * i for x in range(len(groups))]
            axis.bar(places, means, 0.38, yerr=[below, above], label=f"vs {name}", capsize=2)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks([x + 0.2 for x in range(len(groups))], list(groups), fontsize=6)
        axis.set_ylabel("times as fast")
        axis.set_title(mode, fontsize=10)
        axis.legend(fontsize=8)
    figure.suptitle(
        "bnext, forward + backward: geometric mean over ResNet-50's shapes, worst, best"
    )
    figure.supxlabel(caption(facts), fontsize=8)
    figure.savefig(path, dpi=110)


def caption(facts: Mapping[str, str]) -> str:
    machine = ("gpu", "cuda") if "gpu" in facts else ("cpu", "threads", "isa")
    names = *machine, "torch", "bnext", "commit", "date"
    return ", ".join(f"{name} {facts[name]}" for name in names if name in facts)
