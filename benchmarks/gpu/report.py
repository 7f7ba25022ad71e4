"""The GPU benchmark's CSV, tables and plots."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.gpu.cases import DIRECTIONS, LAYOUTS, Case
from benchmarks.report import COLORS, numbers_table
from benchmarks.timing import Timing

LARGE_BYTES = 200e6  # from here on the share of the copy counts, and not the launches


class Key(NamedTuple):
    case: Case
    direction: str
    mode: str


class Cost(NamedTuple):
    peak_bytes: int | None
    kernels: list[str] | None  # names, in order


Timings = dict[Key, dict[str, Timing]]
Costs = dict[tuple[Case, str, str], Cost]


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


def ceiling_ms(key: Key, timings: Mapping[str, Timing]) -> float:
    """The time of copying the floor's bytes; a copy moves two tensors."""
    return timings["copy"].ms * key.case.kind.floor(key.direction) / 2


def best_peer_ms(timings: Mapping[str, Timing]) -> float:
    return min(t.ms for name, t in timings.items() if name not in ("bnext", "copy"))


def rows(timings: Timings, costs: Costs) -> Iterable[dict[str, Any]]:
    for key, by_provider in timings.items():
        case, ceiling = key.case, ceiling_ms(key, by_provider)
        for name, timed in by_provider.items():
            is_copy = name == "copy"
            tensors = 2 if is_copy else case.kind.floor(key.direction)
            share = 1.0 if is_copy else ceiling / timed.ms
            cost = costs.get((case, key.direction, name), Cost(None, None))
            low, high = timed.quartiles_ms
            peak, kernels = cost
            yield {
                "shape": case.size,
                "layers": case.layers,
                "dtype": case.dtype,
                "layout": case.layout,
                "variant": case.variant,
                "direction": key.direction,
                "mode": key.mode,
                "provider": name,
                "median_ms": f"{timed.ms:.5f}",
                "lower_quartile_ms": f"{low:.5f}",
                "upper_quartile_ms": f"{high:.5f}",
                "rounds": len(timed.seconds),
                "tensor_mb": f"{case.bytes / 1e6:.3f}",
                "useful_gb_per_s": f"{case.bytes * tensors / timed.ms / 1e6:.4g}",
                "share_of_copy": f"{share:.3g}",
                "time_over_bnext": f"{timed.ms / by_provider['bnext'].ms:.3f}",
                "launches": "" if kernels is None else len(kernels),
                "uses_cudnn": "" if kernels is None else any("cudnn" in k for k in kernels),
                "peak_mib": "" if peak is None else f"{peak / 2**20:.1f}",
            }


def _grouped(timings: Timings, by: Callable[[Key], Any]) -> dict[Any, Timings]:
    groups: dict[Any, Timings] = {}
    for key, providers in timings.items():
        groups.setdefault(by(key), {})[key] = providers
    return groups


def speedups(group: Timings, peer: Callable[[Mapping[str, Timing]], float]) -> list[float]:
    return [peer(p) / p["bnext"].ms for p in group.values()]


def network_speedup(group: Timings, peer: Callable[[Mapping[str, Timing]], float]) -> float | None:
    """The ratio of what all of ResNet-50's layers take, or None for other shapes."""
    layers = [(key.case.layers, p) for key, p in group.items() if key.case.layers]
    ours = sum(n * p["bnext"].ms for n, p in layers)
    return sum(n * peer(p) for n, p in layers) / ours if layers else None


def eager_ms(timings: Mapping[str, Timing]) -> float:
    return timings["eager"].ms


def tables(timings: Timings) -> Iterable[Table]:
    """Per mode: geometric means over the shapes, and the worst shape."""
    for mode, some in _grouped(timings, lambda key: key.mode).items():
        table = numbers_table(
            f"{mode}: bnext's speed, geometric mean over the shapes (worst)",
            ["dtype", "layout", "variant", "direction"],
            ["cases", "vs best", "vs eager", "53 layers\nvs eager", "of copy\n>= 200 MB"],
        )
        groups = _grouped(
            some, lambda k: (k.case.dtype, k.case.layout, k.case.variant, k.direction)
        )
        for names, group in groups.items():
            best, eager = speedups(group, best_peer_ms), speedups(group, eager_ms)
            network = network_speedup(group, eager_ms)
            large = {k: p for k, p in group.items() if k.case.bytes >= LARGE_BYTES}
            shares = [ceiling_ms(k, p) / p["bnext"].ms for k, p in large.items()]
            table.add_row(
                *names,
                str(len(group)),
                f"{statistics.geometric_mean(best):.2f} ({min(best):.2f})",
                f"{statistics.geometric_mean(eager):.2f} ({min(eager):.2f})",
                "" if network is None else f"{network:.2f}",
                f"{statistics.geometric_mean(shares):.2f} ({min(shares):.2f})" if shares else "",
            )
        yield table


def _caption(facts: Mapping[str, str]) -> str:
    names = "gpu", "cuda", "torch", "bnext", "commit", "date"
    return ", ".join(f"{name} {facts[name]}" for name in names if name in facts)


def plot_bandwidth(path: Path, timings: Timings, facts: Mapping[str, str]) -> None:
    """Of the largest batch in the first dtype: useful bandwidth by shape, the copy as a step."""
    first = next(iter(timings))
    some = {
        key: p for key, p in timings.items()
        if key.case.layers and key.mode == first.mode and key.case.dtype == first.case.dtype
        and key.case.variant == first.case.variant
    }  # fmt: skip
    batch = max((key.case.shape[0] for key in some), default=0)
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, len(LAYOUTS), squeeze=False)
    for row, direction in enumerate(DIRECTIONS[:2]):
        for column, layout in enumerate(LAYOUTS):
            group = {
                key: p for key, p in some.items()
                if (key.direction, key.case.layout) == (direction, layout)
                and key.case.shape[0] == batch
            }  # fmt: skip
            _bars(axes[row][column], group)
            axes[row][column].set_title(f"{direction}, {layout}", fontsize=10)
        axes[row][0].set_ylabel("useful GB/s")
    figure.suptitle(
        f"Batch norm of ResNet-50's shapes, N = {batch}, {first.case.dtype}, {first.mode}"
    )
    figure.supxlabel(_caption(facts), fontsize=8)
    figure.savefig(path, dpi=110)


def _bars(axis: Any, group: Timings) -> None:
    if not group:
        return
    names = [n for n in next(iter(group.values())) if n != "copy"]
    width = 0.8 / len(names)
    floors = [key.case.bytes * key.case.kind.floor(key.direction) / 1e6 for key in group]
    for i, name in enumerate(names):
        speeds = {
            x + (i - (len(names) - 1) / 2) * width: floor / p[name].ms
            for x, (floor, p) in enumerate(zip(floors, group.values(), strict=True))
            if name in p
        }
        axis.bar(
            list(speeds), list(speeds.values()), width,
            color=COLORS.get(name, "tab:red"), label=name,
        )  # fmt: skip
    copies = [2 * key.case.bytes / 1e6 / p["copy"].ms for key, p in group.items()]
    edges = [x - 0.5 for x in range(len(group) + 1)]
    axis.stairs(copies, edges, color=COLORS["copy"], linewidth=1.5, label="copy")
    axis.set_xticks(range(len(group)), [k.case.size for k in group], rotation=60, fontsize=8)
    axis.legend(fontsize=8)


def plot_speedup(path: Path, timings: Timings, facts: Mapping[str, str]) -> None:
    """Forward and backward together, by dtype, layout and batch: geometric mean, worst and best."""
    some = {k: p for k, p in timings.items() if k.case.layers and k.direction == "both"}
    figure = Figure(figsize=(13, 8), layout="constrained")
    modes = list(dict.fromkeys(key.mode for key in some))
    axes = figure.subplots(max(1, len(modes)), 1, squeeze=False)
    for axis, mode in zip(axes[:, 0], modes, strict=False):
        groups = _grouped(
            {k: p for k, p in some.items() if k.mode == mode},
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
    figure.supxlabel(_caption(facts), fontsize=8)
    figure.savefig(path, dpi=110)
