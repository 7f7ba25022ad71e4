"""How a call is timed on the CPU: alternating rounds in one process, and a fixed allocator."""

import contextlib
import ctypes
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
LEAST_ROUNDS, MOST_ROUNDS = 5, 50

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


@dataclass(frozen=True)
class Timing:
    seconds: list[float]  # one per round
    faults: list[int]  # minor page faults, one per round

    @property
    def ms(self) -> float:
        return statistics.median(self.seconds) * 1e3

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low * 1e3, high * 1e3

    @property
    def median_faults(self) -> int:
        return round(statistics.median(self.faults))


def alternate(
    calls: Mapping[str, Call], budget_s: float, repeat: int = 1, most_rounds: int = 101
) -> dict[str, Timing]:
    """Times every call once a round, `repeat` times in a row, until the budget is spent.

    The order of each round is random, so that no call always follows the same one. A call's result
    is freed outside the timed region. There are at least 5 rounds, after 3 that do not count.
    """
    results = {name: Timing([], []) for name in calls}
    shuffled = random.Random(0)
    for call in [*calls.values()] * 3:
        call()
    end = time.perf_counter() + budget_s
    for done in range(most_rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in shuffled.sample(list(calls), len(calls)):
            call, result, output = calls[name], results[name], None
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            for _ in range(repeat):
                output = call()
            result.seconds.append((time.perf_counter() - start) / repeat)
            result.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
            del output
    return results


def keep_freed_memory() -> str | None:
    """Stops the process from returning memory to the system, or says why that is impossible.

    By default glibc returns every block over 32 MB when it is freed, and the next output of that
    size takes a page fault per 4 KiB, which can cost more than the batch norm. After this call
    freed blocks are kept and reused, for every provider alike. It cannot be undone: call it last.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return "the C library has no mallopt"
    options = (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1)
    if not all(mallopt(option, value) for option, value in options):
        return "mallopt was refused"
    return None


def touch(size_bytes: int) -> None:
    """After `keep_freed_memory`: makes sure that this much free memory has been written to."""
    torch.empty(size_bytes, dtype=torch.uint8).fill_(0)


def rounds_within(budget_s: float, seconds: float) -> int:
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget_s / max(seconds, 1e-9))))


class CpuClock:
    """Stands in for the GPU's clock in smoke tests: no graphs, launches or flushes."""

    def stream_in_use(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def warm_up(self) -> None:
        pass

    def time(self, call: Call, mode: object, budget_s: float) -> Timing:
        del mode
        rounds = rounds_within(budget_s, self._once(call))
        return Timing([self._once(call) for _ in range(rounds)], [])

    @staticmethod
    def _once(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def peak_bytes(self, call: Call) -> int | None:
        del call
        return None

    def launches(self, calls: Mapping[str, Call]) -> dict[str, list[str]]:
        del calls
        return {}
