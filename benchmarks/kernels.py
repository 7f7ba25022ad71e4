"""ResNet-50's batch norms: every provider is right first, then timed."""

import re
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks import providers, report, timing
from benchmarks.providers import Case
from benchmarks.shapes import QUICK, RESNET50, Shape

__all__ = ["QUICK", "RESNET50", "cases", "run"]

ALLOCATORS = {
    "fresh": "the C library's own behaviour: outputs over 32 MB are new memory and page-fault",
    "warm": "freed memory is kept: outputs land in memory already written to",
}


def cases(
    shapes: Iterable[Shape], batch: int, dtypes: list[str], layouts: list[str], pattern: str
) -> list[Case]:
    every = [
        Case(s, batch, dtype, layout) for dtype in dtypes for layout in layouts for s in shapes
    ]
    return [case for case in every if re.search(pattern, str(case))]


def check(cases: list[Case], with_compile: bool, progress: Progress) -> report.Verdicts:
    """Everybody against the float64 reference, on the operands that are timed later."""
    verdicts: report.Verdicts = {}
    for case in progress.track(cases, description="checking"):
        verdicts[case] = providers.check(case, providers.batch_norms(case, with_compile))
        for failure in (f for verdict in verdicts[case].values() for f in verdict.failures):
            progress.console.print(f"[red]beyond the bound:[/red] {failure}", highlight=False)
    return verdicts


def measure(
    cases: list[Case], allocator: str, with_compile: bool, budget_s: float, progress: Progress
) -> report.Timings:
    timings: report.Timings = {}
    for case in progress.track(cases, description=f"timing, {allocator} allocator"):
        if allocator == "warm":
            timing.touch(12 * case.bytes)  # operands, retained outputs, results, and room
        operands = case.operands()
        norms = providers.batch_norms(case, with_compile)
        for direction in providers.FLOOR_TENSORS:
            calls = providers.calls(norms, operands, direction)
            key = report.Key(allocator, direction, case)
            timings[key] = timing.alternate(calls, budget_s)
    return timings


def run(cases: list[Case], out: Path, budget_s: float, with_compile: bool) -> int:
    console = Console()
    facts = report.provenance()
    reason = providers.why_not_compiled() if with_compile else "--no-compile"
    facts["torch.compile"] = f"left out: {reason}" if reason else "inductor, static shapes"
    # No refreshing thread: it would take a core from what is timed.
    with Progress(console=console, auto_refresh=False) as progress:
        verdicts = check(cases, reason is None, progress)
        console.print(report.error_table(verdicts))
        if any(verdict["bnext"].failures for verdict in verdicts.values()):
            console.print("[red]bnext is wrong; nothing was timed.[/red]")
            return 1
        timings = measure(cases, "fresh", reason is None, budget_s, progress)
        no_warm = timing.keep_freed_memory()
        facts["warm allocator"] = f"left out: {no_warm}" if no_warm else "mallopt"
        if no_warm is None:
            timings |= measure(cases, "warm", reason is None, budget_s, progress)
    for table in report.timing_tables(timings):
        console.print(table)
    console.print(report.summary_table(timings))
    for allocator, meaning in ALLOCATORS.items():
        console.print(f"{allocator} allocator: {meaning}.", highlight=False)
    console.print(report.facts_table(facts))
    report.write_csv(out / "kernels.csv", facts, report.timing_rows(timings))
    report.plot_bandwidth(out, timings, facts)
    console.print(f"Written to {out}/kernels.csv and bandwidth-*.png", highlight=False)
    return 0
