"""Plots of timings; each says where the numbers come from."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import report, summary
from benchmarks.cases import DIRECTIONS

COLORS = {
    "bnext": "tab:blue", "eager": "tab:orange", "aten": "tab:red", "compile": "tab:green",
    "copy": "black",
}  # fmt: skip


# Of pairs of dtype and layout; a hue for a dtype.
SHADES = {
    ("float32", "nchw"): "tab:blue", ("float32", "channels_last"): "lightsteelblue",
    ("bfloat16", "nchw"): "tab:orange", ("bfloat16", "channels_last"): "navajowhite",
}  # fmt: skip


def speedups(path: Path, facts: Mapping[str, str], found: summary.Times) -> None:
    """Bars of bnext's speed over eager PyTorch, which is the line at 1: means over the shapes.

    Of outputs in warm memory nothing is shown.
    """
    found = {key: by_provider for key, by_provider in found.items() if key.allocator != "warm"}
    kinds = {
        "forward": ("bn", "forward"), "backward": ("bn", "backward"),
        **{f"{name}\nfused": (variant, "both") for variant, name in summary.FUSED.items()},
    }  # fmt: skip
    kinds = {k: v for k, v in kinds.items() if any(key[:2] == v for key in found)}
    groups = summary.groups(found)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    width = 0.84 / len(groups)
    for i, (dtype, layout) in enumerate(groups):
        means = []
        for variant, direction in kinds.values():
            wanted = {"variant": variant, "direction": direction, "dtype": dtype, "layout": layout}
            some = summary.speedups(found, "eager", **wanted)
            means.append(statistics.geometric_mean(some) if some else 0.0)
        places = [x + (i - (len(groups) - 1) / 2) * width for x in range(len(kinds))]
        color, label = SHADES.get((dtype, layout)), summary.named(dtype, layout)
        bars = axis.bar(places, means, 0.92 * width, color=color, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axis.axhline(1, color="black", linewidth=1)
    axis.text(len(kinds) - 0.5, 1.02, "eager", fontsize=8, va="bottom", ha="right")
    axis.set_xticks(range(len(kinds)), list(kinds))
    axis.set_ylabel("times as fast as eager PyTorch")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    sizes = len({key.shape for key in found})
    title = f"Training, batch norms of ResNet-50: geometric mean of {sizes} shapes"
    axis.set_title(("Smoke test: " if "smoke test" in facts else "") + title, fontsize=11)
    figure.supxlabel(report.caption(facts), fontsize=7)
    figure.savefig(path, dpi=110)


def bandwidth(path: Path, timings: report.Timings, title: str, facts: Mapping[str, str]) -> None:
    """Bars of useful bandwidth by shape, the copy as steps; a column per dtype and layout."""
    groups = report.grouped(timings, lambda key: (key.direction, key.case.dtype, key.case.layout))
    columns = list(dict.fromkeys(group[1:] for group in groups))
    figure = Figure(figsize=(4.2 * max(2, len(columns)) + 1, 8), layout="constrained")
    axes = figure.subplots(2, max(1, len(columns)), squeeze=False)
    for row, direction in zip(axes, DIRECTIONS[:2], strict=True):
        for axis, column in zip(row, columns, strict=False):
            _bars(axis, groups.get((direction, *column), {}))
            axis.set_title(", ".join((direction, *column)), fontsize=10)
        row[0].set_ylabel("useful GB/s (the least bytes / time)")
    figure.suptitle(title)
    figure.supxlabel(report.caption(facts), fontsize=8)
    figure.savefig(path, dpi=110)


def _bars(axis: Any, group: report.Timings) -> None:
    names = [n for n in COLORS if n != "copy" and any(n in p for p in group.values())]
    if not names:
        return
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        speeds = {
            shape + (i - (len(names) - 1) / 2) * width: report.useful_gb_per_s(key, p, name)
            for shape, (key, p) in enumerate(group.items())
            if name in p
        }
        axis.bar(list(speeds), list(speeds.values()), width, color=COLORS[name], label=name)
    copies = [report.useful_gb_per_s(key, p, "copy") for key, p in group.items()]
    edges = [shape - 0.5 for shape in range(len(group) + 1)]
    axis.stairs(copies, edges, color=COLORS["copy"], linewidth=1.5, label="copy")
    axis.set_xticks(range(len(group)), [k.case.size for k in group], rotation=60, fontsize=8)
    axis.legend(fontsize=8)


def largest(path: Path, timings: report.Timings, facts: Mapping[str, str]) -> None:
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
    bandwidth(path, some, title, facts)


def speedup(path: Path, timings: report.Timings, facts: Mapping[str, str]) -> None:
    """Forward plus backward, by dtype, layout and batch: geometric mean, worst and best."""
    some = {k: p for k, p in timings.items() if k.case.layers and k.direction == "both"}
    figure = Figure(figsize=(13, 8), layout="constrained")
    modes = list(dict.fromkeys(key.setting for key in some))
    axes = figure.subplots(max(1, len(modes)), 1, squeeze=False)
    for axis, mode in zip(axes[:, 0], modes, strict=False):
        groups = report.grouped(
            {k: p for k, p in some.items() if k.setting == mode},
            lambda k: f"{k.case.dtype}\n{k.case.layout}\n{k.case.variant}\nN={k.case.shape[0]}",
        )
        peers = {"best of the others": report.best_peer_ms, "eager": report.eager_ms}
        for i, (name, peer) in enumerate(peers.items()):
            ratios = [report.speedups(group, peer) for group in groups.values()]
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
    figure.supxlabel(report.caption(facts), fontsize=8)
    figure.savefig(path, dpi=110)
