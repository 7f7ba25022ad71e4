"""ResNet-50's batch norms on the CPU, alone and with what follows them: checked, then timed."""

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import cpu_clock, providers, report, summary
from benchmarks.cases import DIRECTIONS, DTYPES, Case
from benchmarks.check import check

CPU = torch.device("cpu")
ALLOCATORS = {
    "fresh": "the C library's own behaviour: outputs over 32 MB are new memory and page-fault",
    "warm": "freed memory is kept: outputs land in memory already written to",
}


def subjects(case: Case, with_compile: bool) -> dict[str, providers.Subject]:
    """Everyone for the plain batch norm; for it with what follows, the same modules in eager."""
    if case.variant != "bn":
        return providers.subjects(case, CPU)
    has_onednn = providers.takes_onednn(DTYPES[case.dtype])
    return providers.subjects(case, CPU, *["compile"] * with_compile, *["onednn"] * has_onednn)


def check_all(cases: list[Case], with_compile: bool, progress: Progress) -> report.Verdicts:
    verdicts: report.Verdicts = {}
    for case in progress.track(cases, description="checking"):
        verdicts[case] = check(case, subjects(case, with_compile))
        for failure in verdicts[case]["bnext"].failures:
            progress.console.print(f"[red]beyond the bound:[/red] {failure}", highlight=False)
    return verdicts


def measure(
    cases: list[Case],
    allocator: str,
    with_compile: bool,
    budget_s: float,
    progress: Progress,
) -> Iterator[report.Timings]:
    """Of one case after the other."""
    for case in progress.track(cases, description=f"timing, {allocator} allocator"):
        if allocator == "warm":
            cpu_clock.touch(12 * case.bytes)  # operands, retained outputs, results and reserve
        some = subjects(case, with_compile)
        found: report.Timings = {}
        for direction in DIRECTIONS[:2]:
            calls = {name: providers.call(some, name, direction) for name in ("copy", *some)}
            key = report.Key(case, direction, allocator)
            found[key] = cpu_clock.alternate(calls, budget_s)
        yield found


def run(
    out: Path, facts: dict[str, str], cases: list[Case], budget_s: float, with_compile: bool
) -> int:
    console = Console()
    reason = providers.why_not_compiled() if with_compile else "--no-compile"
    facts["torch.compile"] = f"left out: {reason}" if reason else "inductor, static shapes"
    # A refreshing thread would take a core from what is timed.
    with Progress(console=console, auto_refresh=False) as progress:
        verdicts = check_all(cases, reason is None, progress)
        console.print(report.error_table(verdicts))
        if any(verdict["bnext"].failures for verdict in verdicts.values()):
            console.print("[red]bnext is wrong; nothing was timed.[/red]")
            return 1
        timings: report.Timings = {}
        for allocator in ALLOCATORS:
            if allocator == "warm":
                no_warm = cpu_clock.keep_freed_memory()
                facts["warm allocator"] = f"left out: {no_warm}" if no_warm else "mallopt"
                if no_warm:
                    break
            for found in measure(cases, allocator, reason is None, budget_s, progress):
                timings |= found
                write(out, facts, timings)
    for table in report.cpu_tables(timings):
        console.print(table)
    for allocator, meaning in ALLOCATORS.items():
        console.print(f"{allocator} allocator: {meaning}.", highlight=False)
    console.print(report.facts_table(facts))
    found_times = write(out, facts, timings)
    with report.plotting(console):
        from benchmarks import plots

        plots.speedups(out / "speedup.png", facts, found_times)
    console.print(summary.headline(facts, found_times), highlight=False)
    console.print(f"Written to {out}/kernels.csv, speedup.png", highlight=False)
    return 0


def write(out: Path, facts: dict[str, str], timings: report.Timings) -> summary.Times:
    """What there is so far, because a run may be interrupted."""
    found = report.times(timings)
    facts = {"summary": summary.headline(facts, found)} | facts
    report.write_csv(out / "kernels.csv", facts, report.cpu_rows(timings))
    return found
