"""Builds the emulator, with kernels compiled by the host compiler, and loads it."""

import ctypes
import fcntl
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Collection
from pathlib import Path

import ninja

import setup

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
HOST = [HERE / "harness.cpp", CSRC / "cuda" / "plan.cpp"]
EMULATOR = [HERE / f"{name}.cpp" for name in ("emulation", "fiber", "memory", "api")]

COMMON = ["-std=c++20", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing",
          "-fvisibility-inlines-hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
          f"-I{HERE}"]  # fmt: skip
# Warnings of kernels are nvcc's to give: gcc does not see which bins have a channel.
KERNELS = ["-w"]
# variant -> (flags of everything, flags of kernels alone)
VARIANTS = {
    "plain": (["-O1"], []),
    # The calls that ThreadSanitizer's instrumentation makes are answered by memory.cpp.
    "checked": (["-O1", "-DBNEXT_INSTRUMENTED"], ["-fsanitize=thread"]),
    "sanitized": (["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []),
}


def build(name: str, variant: str, sources: list[Path], kernels: list[Path],
          types: Collection[str] = setup.CUDA_TYPES) -> Path:  # fmt: skip
    """Brings build/native/<variant>/<name>.so up to date; returns its path."""
    folder = ROOT / "build" / "native" / variant
    folder.mkdir(parents=True, exist_ok=True)
    common, instrumented = VARIANTS[variant]
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        f"flags = {shlex.join(COMMON + common)}",
        "rule compile",
        "  command = $cxx $flags $more -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {shlex.join(common)} -shared -Wl,-z,defs $in -o $out",
    ]
    objects = []

    def compile_file(source: Path, suffix: str, flags: list[str]) -> None:
        objects.append(f"{name}-{source.stem}{suffix}.o")
        lines.extend([f"build {objects[-1]}: compile {source}", f"  more = {shlex.join(flags)}"])

    for source in EMULATOR + sources:
        compile_file(source, "", [])
    for source in kernels:
        for suffix, flag in setup.cuda_variants(source).items():
            if suffix[1:] in ("", *types):
                compile_file(source, suffix, [*KERNELS, *instrumented, *flag.split()])
    lines.append(f"build {name}.so: link {' '.join(objects)}")
    file = folder / f"{name}.ninja"
    run_ninja(file, "\n".join(lines) + "\n", f"{name}.so")
    return folder / f"{name}.so"


def run_ninja(file: Path, text: str, *targets: str) -> None:
    """Builds by a manifest that says `text`; processes that do so side by side take turns."""
    command = [Path(ninja.BIN_DIR) / "ninja", "-C", file.parent, "-f", file.name, *targets]
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # see sanitize.sh
    with (file.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, f"{shlex.join(map(str, command))}\n{result.stdout[-8000:]}"


class Limits(ctypes.Structure):
    """Mirrors machine.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "shared_bytes_per_block", "shared_bytes_per_sm", "sms", "max_cluster_blocks",
    )]  # fmt: skip


class Statistics(ctypes.Structure):
    """Mirrors machine.h."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "launches", "switches", "barriers", "shuffles", "copies", "summed_again", "bytes_read",
        "bytes_written",
    )]  # fmt: skip


class Emulator:
    """A loaded library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.bnext_error.restype = ctypes.c_char_p
        self.library.bnext_set_seed.argtypes = [ctypes.c_uint64]

    def seed(self, seed: int) -> None:
        self.library.bnext_set_seed(seed)

    def error(self) -> str:
        """What went wrong in the last call; with the source line of the access, if it was one."""
        text = self.library.bnext_error().decode()
        before, _, offset = text.partition(" at +")
        if not offset:
            return text
        command = ["addr2line", "-e", self.path, hex(int(offset, 16) - 1)]
        line = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return f"{before} ({Path(line.split()[0]).name})"

    def statistics(self) -> Statistics:
        """Of the calls since the last time it was asked."""
        statistics = Statistics()
        self.library.bnext_get_statistics(ctypes.byref(statistics))
        return statistics

    def kernels(self) -> dict[str, bool]:
        """The names of the kernels in the library, and whether each was launched."""
        addresses = (ctypes.c_uint64 * 1000)()
        n = self.library.bnext_launched(addresses, ctypes.c_int64(1000))
        assert n <= len(addresses)
        lines = subprocess.run(["nm", "-C", self.path], capture_output=True, text=True).stdout
        pattern = r"^(\w+) \w (?:void )?bnext::(?:\(\S+ \S+\)::)?(\w+_kernel\b[^{\n]*)$"
        found = re.findall(pattern, lines, re.M)
        return {name: int(address, 16) in set(addresses[:n]) for address, name in found}


def selftest(variant: str) -> Emulator:
    return Emulator(build("selftest", variant, [], [HERE / "selftest.cpp"]))


def kernels(variant: str) -> Emulator:
    return Emulator(build("kernels", variant, HOST, sorted(CSRC.glob("cuda/launch*.cu"))))


def kernels_with_defects(variant: str, change: Callable[[str, str], str]) -> Emulator:
    """Kernels of float32 from a copy of their sources: change(file name, text) -> text."""
    copy = ROOT / "build" / "native" / "defects" / "csrc"
    for file in [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.*")]:
        target = copy / file.relative_to(CSRC)
        text = change(file.name, file.read_text())
        if not target.exists() or target.read_text() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    sources = [*HOST, HERE / "other_dtypes.cpp"]
    files = sorted(copy.glob("cuda/launch*.cu"))
    return Emulator(build("defects", variant, sources, files, ["float"]))
