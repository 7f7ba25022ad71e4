"""What nvcc makes of the kernels: no warnings, no spills, registers in bounds, short hot loops.

Compiled for each architecture alone, once for each change of the sources (build/nvcc); Hopper's are
the extension's own where that has them.
"""

import os
import re
import subprocess
from pathlib import Path

import ninja
import pytest

import bnext
from benchmarks import sass

ARCHS = ("sm_80", sass.ARCH, "sm_100", "sm_120")
# All of them take an hour of a core: what is left out has fewer registers to fill, or is bfloat16
# with other conversions.
ALL = os.environ.get("BNEXT_TEST_ALL_KERNELS") == "1"
COMPILED = [
    (arch, name)
    for arch in ARCHS
    for name in sass.objects()
    if ALL or (not name.endswith(sass.ALONE) and (arch == sass.ARCH or "bfloat16" in name))
]
# An SM's 65536 among two blocks of half kMaxCudaThreads (csrc/cuda/plan.h): 16 warps.
MAX_REGISTERS = 128
# All shared memory is dynamic, the plan counts it; from Hopper on the system has some of a block's.
MAX_STATIC_SHARED_BYTES = {"sm_80": 0}
SYSTEMS_SHARED_BYTES = 1024
# Four of Ampere's kernels, bfloat16's backward by columns, lack 2 to 12 registers, those of slices
# most; two of 10.0's, of slices, lack 2.
MAX_STACK_BYTES = {"sm_80": 48, "sm_100": 8}
# Instructions an element of the hot loops of bfloat16 in 16-byte accesses on sm_90, rows and
# columns: what lets memory be the limit.
LIMITS = {
    r"resident_forward_kernel<\w+, 8, \d, 0> (none|relu)": 11,
    r"resident_forward_kernel<\w+, 8, \d, 0> add relu": 15,
    r"resident_backward_kernel<\w+, 8, \d, 0> none": 15,
    r"resident_backward_kernel<\w+, 8, \d, 0> sign": 16,
    r"resident_backward_kernel<\w+, 8, \d, 0> mask": 18,
    r"apply_forward_kernel<\w+, 8, \d, 0> (none|relu)": 6,
    r"reduce_backward_kernel<\w+, 8, \d, 0> (none|sign) frozen": 12,
    # One activation, compiled alone; f' is computed twice, by columns in accesses of 8 bytes.
    r"resident_forward_kernel<\w+, 8, \d, 0> silu": 16.5,
    r"resident_backward_kernel<\w+, 8, 0, 0> silu": 38,
    r"resident_backward_kernel<\w+, 4, 1, 0> silu": 42,
    # Rows of odd length.
    r"resident_forward_kernel<\w+, 8, 0, 1> (none|relu)": 20,
    r"resident_forward_kernel<\w+, 8, 0, 1> add relu": 25,
    r"resident_backward_kernel<\w+, 8, 0, 1> (none|sign)": 25,
    r"resident_backward_kernel<\w+, 8, 0, 1> mask": 30,
    # Slices of channels.
    r"resident_forward_kernel<\w+, 8, 1, 1> (none|relu)": 15,
    r"resident_forward_kernel<\w+, 8, 1, 1> add relu": 19,
    r"resident_backward_kernel<\w+, 8, 1, 1> (none|sign)": 20,
    r"resident_backward_kernel<\w+, 8, 1, 1> mask": 24,
}
# Where an instruction takes two floats.
PAIRED_ARCH = "sm_100"
LIMITS_PAIRED = {
    r"resident_forward_kernel<\w+, 8, \d, 0> (none|relu)": 8.5,
    r"resident_forward_kernel<\w+, 8, \d, 0> add relu": 12,
    r"resident_backward_kernel<\w+, 8, \d, 0> none": 11.5,
    r"resident_backward_kernel<\w+, 8, \d, 0> mask": 15,
}
MAX_FP64 = 0.25


@pytest.fixture(scope="module")
def cubins() -> Path:
    """A folder with the machine code of each object and architecture."""
    if not bnext.build_info()["cuda"]:
        pytest.skip(f"bnext was built without CUDA: {bnext.build_info()['cuda_missing']}")
    try:
        return sass.compile_kernels(COMPILED)
    except sass.MissingToolError as error:
        pytest.skip(f"the CUDA kernels were not compiled: {error}")


def test_what_an_older_build_has_left_is_not_counted(tmp_path, monkeypatch) -> None:
    manifest, source = tmp_path / "build.ninja", tmp_path / "forward.cu"
    source.touch()
    manifest.write_text(
        "rule nvcc\n"
        "  command = echo $out: $in > $out.d && touch $out\n"
        "  depfile = $out.d\n"
        "  deps = gcc\n"
        f"build cuda/launch_forward.cu.bfloat16.o: nvcc {source}\n"
    )
    subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", tmp_path], check=True)
    manifest.write_text("")  # of a build without CUDA
    monkeypatch.setattr(sass.setup, "build_folder", lambda: tmp_path)
    monkeypatch.setattr(sass, "_tool", lambda name: pytest.fail(f"{name} reads it"))
    assert not sass._take_built(sass.ARCH, "launch_forward.bfloat16", tmp_path)


def measured(folder: Path, arch: str, name: str) -> list[sass.Kernel]:
    try:
        return sass.measure(folder, arch, name)
    except sass.MissingToolError as error:
        pytest.skip(f"the kernels' instructions were not counted: {error}")


@pytest.mark.parametrize(("arch", "name"), [(a, n) for a, n in COMPILED if n.startswith("launch_")])
def test_resources(cubins, arch, name) -> None:
    kernels = measured(cubins, arch, name)
    assert any(k.reduce for k in kernels) and any(k.apply for k in kernels), "loops are found"
    most = MAX_STACK_BYTES.get(arch, 0)
    shared = MAX_STATIC_SHARED_BYTES.get(arch, SYSTEMS_SHARED_BYTES)
    over = [
        k for k in kernels
        if k.registers > MAX_REGISTERS or k.shared > shared or k.stack > most
        or (most == 0 and k.local)
    ]  # fmt: skip
    assert not over, "\n".join(map(str, over))


@pytest.fixture(scope="module")
def counted(cubins) -> list[sass.Kernel]:
    return [
        k for arch, name in COMPILED if arch == sass.ARCH and "bfloat16" in name
        for k in measured(cubins, arch, name)
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", LIMITS)
def test_instructions_of_hot_loops(counted, pattern) -> None:
    if pattern.endswith(sass.ALONE) and not ALL:
        pytest.skip("BNEXT_TEST_ALL_KERNELS=1 compiles it")
    check_limit(counted, pattern, LIMITS[pattern])


def check_limit(counted: list[sass.Kernel], pattern: str, limit: float) -> None:
    kernels = [k for k in counted if re.search(pattern + "$", f"{k.kernel} {k.fused}")]
    assert kernels, "no such kernel"
    over = [k for k in kernels if not 0 < k.total <= limit]
    assert not over, "\n".join(map(str, over))


@pytest.mark.parametrize("pattern", LIMITS_PAIRED)
def test_instructions_where_one_takes_two_floats(cubins, pattern) -> None:
    direction = "forward" if "forward" in pattern else "backward"
    counted = measured(cubins, PAIRED_ARCH, f"launch_{direction}.bfloat16")
    check_limit(counted, pattern, LIMITS_PAIRED[pattern])


def test_hot_loops_leave_double_and_local_memory_alone(counted) -> None:
    over = [
        k for k in counted if "__nv_bfloat16, 8" in k.kernel
        and (k.fp64 > MAX_FP64 or k.local or k.warps < 16)
    ]  # fmt: skip
    assert not over, "\n".join(map(str, over))
