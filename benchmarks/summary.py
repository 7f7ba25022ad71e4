"""The tables and the chart of a kernels.csv, as the README shows them."""

import csv
import statistics
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.arguments import BadArgumentError

ALLOCATORS = ("fresh", "warm")
PEERS = {"eager": "eager", "compile": "torch.compile", "onednn": "oneDNN"}
FUSED = {"bn_relu": "BN + ReLU", "bn_silu": "BN + SiLU", "bn_add_relu": "BN + add + ReLU"}


class Key(NamedTuple):
    variant: str
    direction: str  # forward, backward, or both
    dtype: str
    layout: str
    allocator: str  # or, on a GPU, the clock's mode
    shape: tuple[str, ...]


Times = dict[Key, dict[str, float]]  # milliseconds by provider, and of the least bytes' copy


def read(file: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The facts and the rows that `report.write_csv` wrote."""
    lines = file.read_text().splitlines()
    facts = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    return facts, list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def times(rows: Iterable[Mapping[str, Any]]) -> Times:
    found: Times = {}
    for row in rows:
        shape = str(row["channels"]), str(row["size"])
        names = (row[name] for name in ("variant", "direction", "dtype", "layout", "allocator"))
        by_provider = found.setdefault(Key(*names, shape), {"copies": float(row["ceiling_ms"])})
        by_provider[row["provider"]] = float(row["median_ms"])
    return with_sums(found)


def with_sums(found: Times) -> Times:
    """With the sums of forward and backward, where both were measured."""
    for key, forward in [*found.items()]:
        backward = found.get(key._replace(direction="backward"))
        if key.direction == "forward" and backward:
            both = {name: ms + backward[name] for name, ms in forward.items()}
            found[key._replace(direction="both")] = both
    return found


def speedups(found: Times, peer: str, **wanted: str) -> list[float]:
    """How many times as fast as a peer bnext is, a number for each shape."""
    return [
        by_provider[peer] / by_provider["bnext"]
        for key, by_provider in found.items()
        if peer in by_provider and wanted.items() <= key._asdict().items()
    ]


def mean(found: Times, peer: str, **wanted: str) -> str:
    """The geometric mean over the shapes and, in brackets, the worst."""
    some = speedups(found, peer, **wanted)
    return f"{statistics.geometric_mean(some):.2f} ({min(some):.2f})" if some else ""


def groups(found: Times) -> list[tuple[str, str]]:
    """The pairs of dtype and layout that were measured."""
    return list(dict.fromkeys((key.dtype, key.layout) for key in found))


def named(dtype: str, layout: str) -> str:
    return f"{dtype}, {layout.replace('nchw', 'NCHW')}"


def headline(facts: Mapping[str, str], found: Times) -> str:
    """What to quote: bnext's speed over eager, outputs in fresh memory, as geometric means."""
    parts = []
    for variant, name in {"bn": "batch norm", **FUSED}.items():
        ways = ("forward", "backward") if variant == "bn" else ("both",)
        for way in ways:
            some = speedups(found, "eager", variant=variant, direction=way, allocator="fresh")
            if some:
                words = f"{name} {way}" if variant == "bn" else name
                parts.append(f"{words} {statistics.geometric_mean(some):.2f}")
    return (
        f"Times as fast as eager PyTorch on {facts['cpu']} ({facts['isa']}), {facts['threads']} "
        f"threads: {', '.join(parts)} (fused: forward and backward)"
    )


def plain_table(found: Times) -> str:
    """Of the batch norm alone, in Markdown."""
    peers = [p for p in PEERS if any(p in by_provider for by_provider in found.values())]
    columns = [(peer, allocator) for peer, allocator in product(peers, ALLOCATORS)]
    heads = [f"vs {PEERS[peer]}, {allocator}" for peer, allocator in columns]
    lines = [["", *heads, "of a copy's speed, warm"]]
    for (dtype, layout), direction in product(groups(found), ("forward", "backward")):
        wanted = {"variant": "bn", "direction": direction, "dtype": dtype, "layout": layout}
        cells = [mean(found, peer, allocator=a, **wanted) for peer, a in columns]
        share = mean(found, "copies", allocator="warm", **wanted)
        lines.append([f"{direction}, {named(dtype, layout)}", *cells, share])
    return markdown(lines)


def fused_table(found: Times) -> str:
    """Of the fused blocks, forward and backward together, against the modules in eager."""
    lines = [["", *FUSED.values()]]
    for dtype, layout in groups(found):
        wanted = {"direction": "both", "dtype": dtype, "layout": layout, "allocator": "fresh"}
        cells = [mean(found, "eager", variant=variant, **wanted) for variant in FUSED]
        lines.append([named(dtype, layout), *cells])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    rule = "|---" * len(lines[0]) + "|"
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, rule, *rest])


def run(out: Path, file: Path) -> int:
    """Prints the tables of a kernels.csv in Markdown and draws its chart, speedup.png."""
    try:
        facts, rows = read(file)
        found = times(rows)
        print(f"{headline(facts, found)}\n\n{plain_table(found)}\n\n{fused_table(found)}\n")
    except (OSError, KeyError, ValueError):
        raise BadArgumentError(f"argument file: expected a kernels.csv, got {file}") from None
    from benchmarks import plots, report

    with report.plotting(Console()):
        out.mkdir(parents=True, exist_ok=True)
        plots.speedups(out / "speedup.png", facts, found)
        print(f"Written to {out}/speedup.png")
    return 0
