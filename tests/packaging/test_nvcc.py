"""What nvcc makes of the kernels: no warnings, no spills, registers and shared memory in bounds.

Compiled for each architecture alone, once for each change of the sources (build/nvcc).
"""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import ninja
import pytest

import bnext
import setup

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = {
    file.stem + variant: (file, flags)
    for file in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    for variant, flags in setup.cuda_variants(file).items()
}
ARCHS = ["sm_80", "sm_90a", "sm_100"]
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fmad=false", "-cubin", "-Xptxas", "-v",
         "-Werror", "all-warnings"]  # fmt: skip
# An SM's 65536 among the threads of a block (max_cuda_threads in csrc/cuda/plan.h), by the bins
# whose sums a thread keeps.
MAX_REGISTERS = {1: 128, 4: 168, 8: 255}
# All shared memory is dynamic, the plan counts it.
MAX_STATIC_SHARED_BYTES = 0
MAX_SPILL_BYTES = 0


@dataclass
class Usage:
    """What ptxas says of a kernel."""

    kernel: str
    spill_stores: int
    spill_loads: int
    registers: int
    shared_bytes: int

    def bins(self) -> int:
        columns = re.search(r"<\w+, (?:\(int\))?(\d), \(bnext::IndexMap\)1>", self.kernel)
        return int(columns[1]) if columns else 1


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if not found:
        pytest.skip("no nvcc: the CUDA kernels were not compiled by it")
    return found


@pytest.fixture(scope="module")
def logs() -> Path:
    """A folder with nvcc's output for each file and architecture."""
    if not bnext.build_info()["cuda"]:
        pytest.skip(f"bnext was built without CUDA: {bnext.build_info()['cuda_missing']}")
    folder = ROOT / "build" / "nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    flags = shlex.join(FLAGS + setup.host_compiler())
    lines = [
        "rule nvcc",
        f"  command = {nvcc()} {flags} $more -arch=$arch -MD -MF $out.d $in "
        "-o $out > $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for arch in ARCHS:
        for name, (file, more) in OBJECTS.items():
            lines += [f"build {name}.{arch}: nvcc {file}", f"  arch = {arch}", f"  more = {more}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", folder, "-k", "0", "-j", setup.max_jobs()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10000:]
    return folder


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


@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_resources(logs, name, arch) -> None:
    kernels = usages((logs / f"{name}.{arch}.log").read_text())
    assert kernels
    over = [
        k for k in kernels
        if k.registers > MAX_REGISTERS[k.bins()] or k.shared_bytes > MAX_STATIC_SHARED_BYTES
        or max(k.spill_stores, k.spill_loads) > MAX_SPILL_BYTES
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
