"""What nvcc makes of the kernels: no warnings, no spills, registers in bounds, short hot loops.

Compiled for each architecture alone, once for each change of the sources (build/nvcc).
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

import bnext
from benchmarks import sass

# All that setup.py compiles for Hopper, and but for float16, which is bfloat16 with other
# conversions, for the others.
COMPILED = [
    (arch, name)
    for arch in ("sm_80", "sm_90a", "sm_100", "sm_120")
    for name in sass.objects()
    if arch == "sm_90a" or not name.endswith(".float16")
]
# An SM's 65536 among two blocks of half kMaxCudaThreads (csrc/cuda/plan.h): 16 warps.
MAX_REGISTERS = 128
# All shared memory is dynamic, the plan counts it.
MAX_STATIC_SHARED_BYTES = 0
# One of Ampere's kernels, bfloat16's sums of a backward by columns with ReLU, lacks 8 registers.
MAX_SPILL_BYTES = {"sm_80": 32}
# Instructions an element of the hot loops of bfloat16 in 16-byte accesses on sm_90a, rows and
# columns: what lets memory be the limit.
LIMITS = {
    r"resident_forward_kernel<\w+, 8, \d, 0, [01], false>": 11,
    r"resident_forward_kernel<\w+, 8, \d, 0, 1, true>": 15,
    r"resident_backward_kernel<\w+, 8, \d, 0, 0>": 15,
    r"resident_backward_kernel<\w+, 8, \d, 0, 1>": 16,
    r"resident_backward_kernel<\w+, 8, \d, 0, 2>": 18,
    r"apply_forward_kernel<\w+, 8, \d, 0, [01], false>": 6,
    r"reduce_backward_kernel<\w+, 8, \d, 0, 0, true>": 12,
    # Rows of odd length.
    r"resident_forward_kernel<\w+, 8, 0, 2, [01], false>": 23,
    r"resident_backward_kernel<\w+, 8, 0, 2, [01]>": 29,
}
MAX_FP64 = 0.25


@dataclass
class Usage:
    """What ptxas says of a kernel."""

    kernel: str
    spill_stores: int
    spill_loads: int
    registers: int
    shared_bytes: int


@pytest.fixture(scope="module")
def logs() -> Path:
    """A folder with nvcc's output for each file and architecture."""
    if not bnext.build_info()["cuda"]:
        pytest.skip(f"bnext was built without CUDA: {bnext.build_info()['cuda_missing']}")
    try:
        return sass.compile_kernels(COMPILED)
    except sass.MissingToolError as error:
        pytest.skip(f"the CUDA kernels were not compiled: {error}")


def usages(log: str) -> list[Usage]:
    found = []
    for entry in log.split("Compiling entry function '")[1:]:
        name = entry.split("'")[0]
        demangled = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout
        stores, loads = re.search(
            r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        registers = re.search(r"Used (\d+) registers", entry)[1]
        shared = re.search(r"(\d+) bytes smem", entry)
        found.append(Usage(demangled.strip(), int(stores), int(loads), int(registers),
                           int(shared[1]) if shared else 0))  # fmt: skip
    return found


@pytest.mark.parametrize(("arch", "name"), COMPILED)
def test_resources(logs, arch, name) -> None:
    kernels = usages((logs / f"{name}.{arch}.log").read_text())
    assert kernels
    over = [
        k for k in kernels
        if k.registers > MAX_REGISTERS or k.shared_bytes > MAX_STATIC_SHARED_BYTES
        or max(k.spill_stores, k.spill_loads) > MAX_SPILL_BYTES.get(arch, 0)
    ]  # fmt: skip
    assert not over, "\n".join(map(str, over))


@pytest.fixture(scope="module")
def counted(logs) -> list[sass.Kernel]:
    try:
        return [
            k for name in sass.objects() if "bfloat16" in name
            for k in sass.measure(logs / f"{name}.sm_90a", "sm_90a")
        ]  # fmt: skip
    except sass.MissingToolError as error:
        pytest.skip(f"the kernels' instructions were not counted: {error}")


@pytest.mark.parametrize("pattern", LIMITS)
def test_instructions_of_hot_loops(counted, pattern) -> None:
    kernels = [k for k in counted if re.search(pattern, k.kernel)]
    assert kernels, "no such kernel"
    over = [k for k in kernels if not 0 < k.total <= LIMITS[pattern]]
    assert not over, "\n".join(map(str, over))


def test_hot_loops_leave_double_and_local_memory_alone(counted) -> None:
    over = [
        k for k in counted if "__nv_bfloat16, 8" in k.kernel
        and (k.fp64 > MAX_FP64 or k.local or k.warps < 16)
    ]  # fmt: skip
    assert not over, "\n".join(map(str, over))


def test_usages_are_read_from_the_log() -> None:
    log = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'
ptxas info    : Function properties for _Z1kv
    64 bytes stack frame, 92 bytes spill stores, 256 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 48 bytes smem, 64 bytes cumulative stack size
"""
    assert usages(log) == [Usage("k()", 92, 256, 128, 48)]
