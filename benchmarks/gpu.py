"""The kernel benchmark on a GPU: checks, times and counts every provider, case by case."""

import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import providers, report
from benchmarks.cases import DIRECTIONS, Case
from benchmarks.check import check
from benchmarks.cpu_clock import Call, CpuClock
from benchmarks.gpu_clock import CudaClock, Mode
from benchmarks.providers import Subject, chosen

# Shares of the total time: compiling ahead, and counting launches at the end.
COMPILE_SHARE, COUNT_SHARE = 0.25, 0.15
SECONDS_BETWEEN_WRITES = 20


def _compile(case: Case, device: str) -> None:
    """Runs in its own process and leaves the code in Inductor's cache on disk."""
    providers.why_not_compiled(device)
    subject = Subject.of("compile", case, case.operands(torch.device(device)))
    subject.backward(subject.forward(), retain_graph=False)
    torch.cuda.empty_cache()


def compiled_ahead(cases: list[Case], device: torch.device, seconds: float) -> set[Case]:
    """Compiles on all cores; returns the cases that were finished in time."""
    threads = "TORCHINDUCTOR_COMPILE_THREADS"
    before = os.environ.get(threads)
    os.environ[threads] = "1"
    workers = max(1, min(16, (os.cpu_count() or 1) - 2))
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            futures = {pool.submit(_compile, case, str(device)): case for case in cases}
            wait(futures, timeout=seconds)
            pool.shutdown(wait=True, cancel_futures=True)
        done = [f for f in futures if f.done() and not f.cancelled() and f.exception() is None]
        return {futures[f] for f in done}
    finally:
        os.environ.pop(threads)
        if before is not None:
            os.environ[threads] = before


class Run:
    """What has been measured on a device so far."""

    def __init__(
        self, device: torch.device, modes: list[Mode], budget_s: float, out: Path,
        facts: dict[str, str],
    ) -> None:  # fmt: skip
        self.device, self.modes, self.budget_s = device, modes, budget_s
        self.out, self.facts = out, facts
        self.next_write = time.perf_counter() + SECONDS_BETWEEN_WRITES
        self.on_gpu = device.type == "cuda"
        self.clock = CudaClock(device) if self.on_gpu else CpuClock()
        self.to_compile: set[Case] = set()
        self.timings: report.Timings = {}
        self.costs: report.Costs = {}
        self.problems: list[str] = []
        self.failed = False

    def subjects(self, case: Case) -> dict[str, Subject]:
        peers = [*["aten"] * self.on_gpu, *["compile"] * (case in self.to_compile)]
        return providers.subjects(case, self.device, *peers)

    def measure(self, case: Case) -> None:
        subjects = self.subjects(case)
        verdicts = check(case, subjects)
        self.problems += [failure for v in verdicts.values() for failure in v.failures]
        self.failed |= bool(verdicts["bnext"].failures)
        found: report.Timings = {}
        for direction in DIRECTIONS:
            for name in ("copy", *subjects):
                with chosen(name):
                    call = providers.call(subjects, name, direction)
                    for mode in self.modes:
                        key = report.Key(case, direction, str(mode))
                        timing = self.clock.time(call, mode, self.budget_s)
                        found.setdefault(key, {})[name] = timing
                    peak = self.clock.peak_bytes(call)
                    self.costs[case, direction, name] = report.Cost(peak, None)
        self.timings |= found  # whole, because a half one has nothing to be compared with

    def count(self, case: Case) -> None:
        """Counts launches. Call it after all timing: the profiler slows down what follows it."""
        calls: dict[tuple[str, str], Call] = {}
        for name, subject in self.subjects(case).items():
            with chosen(name):
                for direction in DIRECTIONS:
                    calls[direction, name] = subject.call(direction)
        named = {" ".join(key): _with_chosen(key[1], call) for key, call in calls.items()}
        for (direction, name), kernels in zip(
            calls, self.clock.launches(named).values(), strict=False
        ):
            known = self.costs[case, direction, name]
            self.costs[case, direction, name] = known._replace(kernels=kernels)

    def each(self, cases: Iterable[Case], what: str, end: float, progress: Progress) -> list[Case]:
        """Does `what` for one case after the other and returns the cases it did."""
        done = []
        for case in progress.track(list(cases), description=what):
            if time.perf_counter() > end:
                break
            try:
                with self.clock.stream_in_use():
                    getattr(self, what)(case)
                done.append(case)
                if time.perf_counter() > self.next_write:
                    self.write()
                    self.next_write = time.perf_counter() + SECONDS_BETWEEN_WRITES
            except RuntimeError as error:
                self.problems.append(f"{case}: {type(error).__name__}: {error}")
                self.failed |= not isinstance(error, torch.OutOfMemoryError)
                if isinstance(error, torch.AcceleratorError):
                    break  # the process can no longer use the GPU
            if self.on_gpu:
                torch.cuda.empty_cache()
        return done

    def write(self) -> None:
        """What there is so far: a run may be cut off."""
        if not self.timings:
            return
        facts = dict(self.facts)
        if self.problems:
            facts["wrong or left out"] = "; ".join(self.problems)
        rows = report.gpu_rows(self.timings, self.costs)
        report.write_csv(self.out / "gpu.csv", facts, rows)


def _with_chosen(provider: str, call: Call) -> Call:
    def chosen_call() -> object:
        with chosen(provider):
            return call()

    return chosen_call


def run(
    out: Path,
    facts: dict[str, str],
    cases: list[Case],
    device: torch.device,
    modes: list[Mode],
    budget_s: float,
    minutes: float,
    with_compile: bool,
) -> int:
    start, seconds = time.perf_counter(), minutes * 60
    console = Console(width=110)
    facts = facts | report.gpu_facts(device)
    reason = providers.why_not_compiled(str(device)) if with_compile else "--no-compile"
    facts["torch.compile"] = f"left out: {reason}" if reason else "inductor, static shapes"
    console.print(report.facts_table(facts))
    this = Run(device, modes, budget_s, out, facts)
    if not reason:
        budget = COMPILE_SHARE * seconds
        this.to_compile = compiled_ahead(cases, device, budget) if this.on_gpu else set(cases)
        facts["torch.compile"] += f", {len(this.to_compile)} of {len(cases)} cases"
    this.clock.warm_up()
    with Progress(console=console, auto_refresh=False) as progress:
        end = start + (1 - COUNT_SHARE) * seconds
        try:
            measured = this.each(cases, "measure", end, progress)
        except KeyboardInterrupt:
            this.write()
            raise
        facts["cases"] = f"{len(measured)} of {len(cases)} in {minutes:g} minutes"
        this.write()
        this.each(measured, "count", start + seconds, progress)
        this.write()
    for problem in this.problems:
        console.print(f"[red]wrong or left out:[/red] {problem}", highlight=False)
    if not this.timings:
        console.print("[red]nothing was timed.[/red]")
        return 1
    for table in report.gpu_tables(this.timings):
        console.print(table)
    with report.plotting(console):
        from benchmarks import plots

        plots.largest(out / "gpu-bandwidth.png", this.timings, facts)
        plots.speedup(out / "gpu-speedup.png", this.timings, facts)
    console.print(f"Measured {facts['cases']}. Written to {out}/gpu*")
    return int(this.failed)
