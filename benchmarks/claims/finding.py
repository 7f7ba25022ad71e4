"""What an experiment is given, what it finds, and how that is worded, printed and written."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import report
from benchmarks.claims.data import Data

WITHOUT, WITH = "without batch norm", "with batch norm"
COLORS = {WITHOUT: "tab:orange", WITH: "tab:blue"}
NORMS = {WITHOUT: False, WITH: True}


class LeftOutError(Exception):
    """Why an experiment cannot run here."""


@dataclass(frozen=True)
class Setup:
    """What every experiment is given."""

    data: Data
    seeds: Sequence[int]
    quick: bool
    track: Callable[[Sequence[Any]], Iterable[Any]]  # moves the progress bar

    def steps(self, full: int) -> int:
        return max(10, full // 40) if self.quick else full


@dataclass(frozen=True)
class Finding:
    """What every experiment returns."""

    sentence: str  # made from the numbers
    header: Sequence[str]
    cells: Sequence[Sequence[str]]
    rows: list[dict[str, Any]]  # of the CSV
    figure: Figure
    notes: Sequence[str] = ()
    failures: Sequence[str] = ()  # of bnext: no finding, a fault


def verdict(confirmed: bool) -> str:
    return "is confirmed" if confirmed else "is not confirmed"


def clearly_less(smaller: Sequence[float], larger: Sequence[float]) -> bool:
    """Whether two means are apart by more than two standard errors."""
    difference = statistics.mean(larger) - statistics.mean(smaller)
    if not math.isfinite(difference):
        return difference > 0
    return difference > 2 * math.hypot(
        *(statistics.stdev(v) / len(v) ** 0.5 for v in (smaller, larger))
    )


def judge(smaller: Sequence[float], larger: Sequence[float]) -> str:
    """The verdict on a claim that one mean is smaller than the other."""
    if clearly_less(smaller, larger):
        return verdict(True)
    return verdict(False) if clearly_less(larger, smaller) else "is within the seeds' noise"


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation over the seeds."""
    if not all(map(math.isfinite, values)):
        return f"not finite in {sum(not math.isfinite(v) for v in values)} of {len(values)}"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def steps_words(steps: Sequence[float]) -> str:
    """As `spread`, of steps that some seeds never reach."""
    reached = [s for s in steps if math.isfinite(s)]
    if not reached:
        return "never"
    missed = f" ({len(steps) - len(reached)} of {len(steps)} never)" * (len(reached) < len(steps))
    if len(reached) == 1:
        return f"{reached[0]:.0f}{missed}"
    return spread(reached, ".0f") + missed


def draw(axis: Any, x: Sequence[float], runs: Sequence[Sequence[float]], **style: Any) -> None:
    """The mean of runs as a line, their standard deviation as a band."""
    means = [statistics.mean(values) for values in zip(*runs, strict=True)]
    spreads = [statistics.stdev(values) for values in zip(*runs, strict=True)]
    (line,) = axis.plot(x, means, **style)
    pairs = [*zip(means, spreads, strict=True)]
    low, high = [m - s for m, s in pairs], [m + s for m, s in pairs]
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def table(finding: Finding) -> Table:
    result = Table(box=SIMPLE, padding=0, pad_edge=False)
    for i, label in enumerate(finding.header):
        result.add_column(label, overflow="fold", justify="right" if i else "left")
    for row in finding.cells:
        result.add_row(*map(escape, row))
    return result


def show(console: Console, title: str, finding: Finding) -> None:
    console.rule(title, align="left")
    console.print(table(finding))
    for text in (finding.sentence, *finding.notes):
        console.print(text, highlight=False, markup=False)


def write(out: Path, name: str, facts: Mapping[str, str], finding: Finding) -> None:
    facts = {**facts, "finding": finding.sentence}
    report.write_csv(out / f"claims-{name}.csv", facts, finding.rows)
    finding.figure.supxlabel(report.caption(facts), fontsize=7)
    finding.figure.savefig(out / f"claims-{name}.png", dpi=100)


def write_page(
    out: Path, facts: Mapping[str, str], sections: Iterable[tuple[str, str, Any]]
) -> None:
    """All findings on one page: (name, statement, the finding or why there is none)."""
    lines = ["# What the paper claims, and what was found", ""]
    lines += [
        "Written by `python -m benchmarks claims`. Mean ± standard deviation over the seeds.",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, statement, finding in sections:
        lines += ["", f"## {statement}", "", f"    python -m benchmarks claims --only {name}", ""]
        if not isinstance(finding, Finding):
            lines.append(f"Left out: {finding}")
            continue
        lines += [f"**{finding.sentence}**", "", f"![{statement}](claims-{name}.png)", ""]
        lines += [_markdown(finding.header), _markdown(["---"] * len(finding.header))]
        lines += [*map(_markdown, finding.cells), ""]
        for note in finding.notes:
            lines += [note, ""]
        lines.append(f"[claims-{name}.csv](claims-{name}.csv)")
    (out / "claims.md").write_text("\n".join(lines) + "\n")


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
