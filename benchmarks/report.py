"""Tables (rich) and CSV; all of them say where the numbers come from."""

import contextlib
import csv
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import bnext
from benchmarks import summary
from benchmarks.cases import Case
from benchmarks.check import Verdict
from benchmarks.cpu_clock import Timing
from bnext import _C

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


def provenance(quick: bool = False) -> dict[str, str]:
    """Machine, versions, date and commit, without which a figure means nothing."""
    threads = torch.get_num_threads()
    cpu = _C.cpu_device_info(threads)
    build = bnext.build_info()
    return {
        **({"smoke test": "its figures mean nothing"} if quick else {}),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git_commit(),
        "cpu": _cpu_model(),
        "threads": str(threads),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "isa": f"{cpu.isa}, torch {torch.backends.cpu.get_cpu_capability()}",
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
        others = ":(top)", ":(top,exclude)benchmarks/results"  # but what another benchmark wrote
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *others)
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
    names = [*dict.fromkeys(name for verdict in verdicts.values() for name in verdict)]
    title = "largest error against float64, relative to the largest value"
    table = numbers_table(title, ["case"], names)
    table.caption = (
        "* of another implementation: beyond what bnext is held to, which is twice eager's error "
        "plus unavoidable roundings"
    )
    for dtype, layout in dict.fromkeys((case.dtype, case.layout) for case in verdicts):
        some = [v for case, v in verdicts.items() if (case.dtype, case.layout) == (dtype, layout)]
        by_name = [[v[name] for v in some if name in v] for name in names]
        cells = (
            f"{max(v.error for v in own):.1e}{'*' * any(v.failures for v in own)}" if own else ""
            for own in by_name
        )
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
    """A table of shapes per direction, allocator and kind of case; then one table of all."""
    every = dict.fromkeys(name for by_provider in timings.values() for name in by_provider)
    peers = [name for name in every if name not in ("bnext", "copy")]
    summary = numbers_table(
        "speed of bnext against the others, its time in copies: geometric mean (worst)",
        ["variant", "direction", "malloc", "dtype", "layout"],
        [*(f"vs {name}" for name in peers), "time/copy"],
    )
    groups = grouped(
        timings,
        lambda k: (k.case.variant, k.direction, k.setting, k.case.dtype, k.case.layout),
    )
    for (variant, direction, allocator, dtype, layout), group in groups.items():
        others = [name for name in peers if name in next(iter(group.values()))]
        title = f"{variant} {direction}, {dtype}, {layout}, {allocator} allocator, median ms"
        floor = next(iter(group)).case.kind.floor(direction)
        copies = f"{floor / 2:g}\ncopies"
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
        ratios = [
            speedups(group, lambda p, name=name: p[name].ms) if name in others else []
            for name in peers
        ]
        slowness = [p["bnext"].ms / ceiling_ms(key, p) for key, p in group.items()]
        cells = *map(_mean_and_worst, ratios), _mean_and_worst(slowness, max)
        summary.add_row(variant, direction, allocator, dtype, layout, *cells)
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


def times(timings: Timings) -> summary.Times:
    found = {}
    for key, by_provider in timings.items():
        case, ms = key.case, {name: timing.ms for name, timing in by_provider.items()}
        shape = tuple(map(str, case.shape[1:3]))
        named = summary.Key(
            case.variant, key.direction, case.dtype, case.layout, key.setting, shape
        )
        found[named] = ms | {"copies": ceiling_ms(key, by_provider)}
    return summary.with_sums(found)


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
                "variant": case.variant,
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


@contextlib.contextmanager
def plotting(console: Console) -> Iterator[None]:
    """Around what needs matplotlib: without it there are no plots, and nothing measured is lost."""
    try:
        yield
    except ImportError as error:
        console.print(f"No plots: {error}", highlight=False)


def caption(facts: Mapping[str, str]) -> str:
    machine = ("gpu", "cuda") if "gpu" in facts else ("cpu", "threads", "isa")
    names = *machine, "torch", "bnext", "commit", "date"
    return ", ".join(f"{name} {facts[name]}" for name in names if name in facts)
