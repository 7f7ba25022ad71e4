"""How a call is timed on a GPU: events, CUDA graphs, a flushed L2; launches and peak memory."""

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.cpu_clock import Call, Timing, rounds_within

MARKER = "spin_kernel"  # what torch.cuda._sleep launches


class Mode(NamedTuple):
    cold: bool  # the L2 holds none of the operands
    graph: bool  # replayed from a CUDA graph, which is the GPU's time alone; else called by Python

    def __str__(self) -> str:
        return f"{'cold' if self.cold else 'warm'} {'graph' if self.graph else 'eager'}"


MODES = {str(mode): mode for mode in (Mode(c, g) for g in (True, False) for c in (True, False))}


class CudaClock:
    """Make calls and their operands on its stream: `with clock.stream_in_use(): ...`."""

    def __init__(self, device: torch.device) -> None:
        torch.cuda.set_device(device.index or 0)
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.stream = torch.cuda.Stream(device)
        # A flush reads four times the L2. It does not write, so no call pays for a write-back.
        self.scrap = torch.ones(4 * l2_bytes // 4, device=device)
        self.sum = torch.empty((), device=device)
        torch.cuda.synchronize()

    def stream_in_use(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self.stream)

    def flush(self) -> None:
        torch.sum(self.scrap, dim=0, out=self.sum)

    def warm_up(self, seconds: float = 0.5) -> None:
        """Raises the GPU's clocks, which are low after idling."""
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            self.flush()
            torch.cuda.synchronize()

    def time(self, call: Call, mode: Mode, budget_s: float) -> Timing:
        """Medians of event pairs; nothing is subtracted.

        Each cold call follows a flush, during which the CPU queues work. Warm calls repeat until
        they exceed the events' resolution.
        """
        for _ in range(3):
            call()
        (estimate,) = self._pairs(call, 1, flushed=False)
        repeat = 1 if mode.cold else max(1, min(20, int(200e-6 / max(estimate, 1e-9))))

        def run() -> None:
            for _ in range(repeat):
                call()

        if mode.graph:
            graph = self._captured(run)
            run = graph.replay
            run()
        (estimate,) = self._pairs(run, 1, mode.cold)
        seconds = self._pairs(run, rounds_within(budget_s, estimate), mode.cold)
        return Timing([s / repeat for s in seconds], [])

    def _pairs(self, run: Call, count: int, flushed: bool) -> list[float]:
        def event() -> torch.cuda.Event:
            return torch.cuda.Event(enable_timing=True)

        events = [(event(), event()) for _ in range(count)]
        for start, end in events:
            if flushed:
                self.flush()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    @staticmethod
    def _captured(call: Call) -> torch.cuda.CUDAGraph:
        # torch.cuda.graph() would empty the caches, which takes tens of milliseconds each time.
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            call()
        finally:
            graph.capture_end()
        return graph

    @staticmethod
    def peak_bytes(call: Call) -> int | None:
        """The most memory that a call holds, including its results."""
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    @staticmethod
    def launches(calls: Mapping[str, Call]) -> dict[str, list[str]]:
        """The names of what each call launches, memsets and copies too, from the profiler."""
        for call in calls.values():
            call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for call in calls.values():
                torch.cuda._sleep(1)
                call()
            torch.cuda.synchronize()
        on_gpu = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA]
        names = [e.name for e in sorted(on_gpu, key=lambda e: e.time_range.start)]
        found = list(parts(names, MARKER))
        if len(found) != len(calls):
            raise RuntimeError(f"the profiler saw {len(found)} of {len(calls)} calls: {names}")
        return dict(zip(calls, found, strict=True))


def parts(names: Sequence[str], marker: str) -> Iterator[list[str]]:
    """The names that follow each name with the marker."""
    starts = [i for i, name in enumerate(names) if marker in name]
    for start, end in itertools.pairwise([*starts, len(names)]):
        yield list(names[start + 1 : end])
