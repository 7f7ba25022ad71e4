"""ResNet-50's batch norms on the CPU, alone and with what follows them: checked, then timed."""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import cpu_clock, plots, providers, report
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
        for failure in (f for verdict in verdicts[case].values() for f in verdict.failures):
            progress.console.print(f"[red]beyond the bound:[/red] {failure}", highlight=False)
    return verdicts


def measure(
    cases: list[Case], allocator: str, with_compile: bool, budget_s: float, progress: Progress
) -> report.Timings:
    timings: report.Timings = {}
    for case in progress.track(cases, description=f"timing, {allocator} allocator"):
        if allocator == "warm":
            cpu_clock.touch(12 * case.bytes)  # operands, retained outputs, results and reserve
        some = subjects(case, with_compile)
        for direction in DIRECTIONS[:2]:
            calls = {name: providers.call(some, name, direction) for name in ("copy", *some)}
            key = report.Key(case, direction, allocator)
            timings[key] = cpu_clock.alternate(calls, budget_s)
    return timings


def run(cases: list[Case], out: Path, budget_s: float, with_compile: bool) -> int:
    console = Console()
    facts = report.provenance()
    reason = providers.why_not_compiled() if with_compile else "--no-compile"
    facts["torch.compile"] = f"left out: {reason}" if reason else "inductor, static shapes"
    # A refreshing thread would take a core from what is timed.
    with Progress(console=console, auto_refresh=False) as progress:
        verdicts = check_all(cases, reason is None, progress)
        console.print(report.error_table(verdicts))
        if any(verdict["bnext"].failures for verdict in verdicts.values()):
            console.print("[red]bnext is wrong; nothing was timed.[/red]")
            return 1
        timings = measure(cases, "fresh", reason is None, budget_s, progress)
        no_warm = cpu_clock.keep_freed_memory()
        facts["warm allocator"] = f"left out: {no_warm}" if no_warm else "mallopt"
        if no_warm is None:
            timings |= measure(cases, "warm", reason is None, budget_s, progress)
    facts = {"summary": report.headline(timings, facts)} | facts
    console.print(facts["summary"], highlight=False)
    for table in report.cpu_tables(timings):
        console.print(table)
    for allocator, meaning in ALLOCATORS.items():
        console.print(f"{allocator} allocator: {meaning}.", highlight=False)
    console.print(report.facts_table(facts))
    report.write_csv(out / "kernels.csv", facts, report.cpu_rows(timings))
    plain = {key: p for key, p in timings.items() if key.case.variant == "bn"}
    for allocator, some in report.grouped(plain, lambda key: key.setting).items():
        title = f"Training batch norm, ResNet-50's shapes, {allocator} allocator"
        plots.bandwidth(out / f"bandwidth-{allocator}.png", some, title, facts)
    console.print(f"Written to {out}/kernels.csv and bandwidth-*.png", highlight=False)
    return 0
