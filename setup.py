"""Builds the extension bnext._C: writes a build.ninja and runs ninja.

torch.utils.cpp_extension cannot build CUDA code beside a CPU-only torch. This extension uses only
the stable C ABI of torch, so the few flags that it needs are written out here.

Environment
    CXX, CFLAGS, CXXFLAGS, LDFLAGS  the compiler, and flags appended to its command lines
    MAX_JOBS                        parallel compiler processes (default: the CPUs it may use)
    BNEXT_CUDA                      whether to build the CUDA kernels: 0 | 1 | auto (the default: if
                                    torch has CUDA and nvcc works) | gpu (auto, and a GPU is found)
    CUDA_HOME                       the CUDA toolkit (default: the one of the nvcc on PATH, or else
                                    of PyPI's cuda-toolkit[nvcc,crt,cudart,cccl] beside torch)
    TORCH_CUDA_ARCH_LIST            e.g. "8.0;9.0+PTX" (default: this machine's GPUs, else
                                    DEFAULT_CUDA_ARCHS, and PTX for later ones)
    NVCC_APPEND_FLAGS               flags appended to nvcc's command lines
    BNEXT_SANITIZE                  sanitizers to build with, e.g. address,undefined
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

try:
    import ninja
    import pybind11
    from setuptools import Extension, setup
    from setuptools.command.build_ext import build_ext
except ModuleNotFoundError as error:
    raise SystemExit(
        f"bnext: no {error.name} for {sys.executable}, which the build needs. Install it: pip "
        "install setuptools pybind11 ninja"
    ) from None

from _backend import MINIMUM_TORCH, ROOT, Torch, find_torch

PYTHON = sys.implementation.cache_tag
LIBRARY = f"_C.{PYTHON}.so"
CSRC = ROOT / "csrc"
SANITIZE = [f"-fsanitize={s}" for s in [os.environ.get("BNEXT_SANITIZE")] if s]

# csrc/cpu/*kernels.cpp are compiled once for each of these. The order matters: if several objects
# define an inline function, the linker keeps the first one's code, which must run everywhere.
CPU_ISAS = {"default": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CPU_ISAS["avx2"] = "-mavx2 -mfma -mf16c -mprfchw"
    CPU_ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprfchw"
    CPU_ISAS["avx512"] += " -mprefer-vector-width=512"
    CPU_ISAS["avx512"] += " -Wno-uninitialized"  # a false alarm in the intrinsics of gcc 12
# By default gcc leaves parts of their inner loops out of line, which costs up to 17 % (backward of
# bfloat16, 32x512x7x7, channels last, AVX-512).
INLINING = "--param inline-unit-growth=200 --param large-function-growth=400"
# csrc/cuda/launch_*.cu are compiled once for each of these.
CUDA_TYPES = ("float", "double", "bfloat16", "float16")
# Used if there is no GPU to ask. 8.6 and 8.9 run code for 8.0, and later ones compile the PTX of
# 10.0 at first use. Each takes 460 s to compile on one core of Zen 3.
DEFAULT_CUDA_ARCHS = ("8.0", "9.0", "10.0")
TOOLS = (
    "Needed are gcc 12 or clang 15, or newer, and Python's headers: apt install g++ python3-dev "
    "(Debian, Ubuntu), dnf install gcc-c++ python3-devel (Fedora)."
)


@dataclass(frozen=True)
class Cuda:
    """The CUDA toolkit of an nvcc; if there is none, `missing` says why."""

    missing: str = ""
    nvcc: str = ""
    version: str = ""
    archs: tuple[str, ...] = ()
    include_folders: tuple[str, ...] = ()
    library_flags: tuple[str, ...] = ()

    def arch_flags(self) -> list[str]:
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def find_cuda(torch: Torch) -> Cuda:
    choice = os.environ.get("BNEXT_CUDA", "auto")
    if choice not in ("auto", "gpu", "0", "1"):
        raise SystemExit(f"bnext: BNEXT_CUDA must be auto, gpu, 0 or 1, not {choice!r}")
    if choice == "0":
        return Cuda("BNEXT_CUDA=0")
    if choice == "gpu" and not gpu_archs():
        return Cuda(
            "nvidia-smi listed no GPU at build time; BNEXT_CUDA=1 builds for one all the same"
        )
    if choice != "1" and not torch.cuda:
        return Cuda(
            f"it is built against torch {torch.version}, which has no CUDA; BNEXT_CUDA=1 builds "
            "for a GPU all the same"
        )
    cuda = probe_cuda(torch)
    if choice == "1" and cuda.missing:
        raise SystemExit(f"bnext: BNEXT_CUDA=1, but {cuda.missing}")
    return cuda


def probe_cuda(torch: Torch | None = None) -> Cuda:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    folders = [f"{home}/bin"] if home else os.get_exec_path()
    if torch and not home:  # last PyPI's, in torch's environment
        folders += map(str, torch.path.parent.glob("nvidia/cu*/bin"))
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if not nvcc:
        return Cuda(f"no nvcc in {home}/bin" if home else "no nvcc on PATH, no CUDA_HOME set")
    # nvcc may be a script or a link, so it is asked where its toolkit is. Preprocessing an empty
    # file also shows whether it accepts the host compiler.
    probe = run([nvcc, *host_compiler(), "-std=c++20", "-v", "-E", "-x", "cu", os.devnull])
    if probe.returncode:
        return Cuda(f"{nvcc} does not work: {complaint(probe)}")
    settings = dict(re.findall(r"^#\$ (\w+)=(.*)$", probe.stderr, re.M))
    version = re.search(r"\bV([\d.]+)", run([nvcc, "--version"]).stdout)
    includes = shlex.split(settings.get("INCLUDES", ""))
    folders = [word.removeprefix("-isystem").removeprefix("-I") for word in includes]
    libraries = shlex.split(settings.get("LIBRARIES", ""))
    libraries.append(f"-L{Path(nvcc).resolve().parents[1] / 'lib'}")  # PyPI's has no lib64
    known = set(re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]).stdout))
    return Cuda(
        nvcc=nvcc,
        version=version[1] if version else "unknown",
        archs=cuda_archs(known),
        include_folders=tuple(filter(None, folders)),
        library_flags=tuple(libraries),
    )


def cuda_archs(known: set[str]) -> tuple[str, ...]:
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if wrong := [arch for arch in listed if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch)]:
        raise SystemExit(f"bnext: TORCH_CUDA_ARCH_LIST takes numbers like 9.0 or 9.0+PTX: {wrong}")
    if not listed and all(arch.replace(".", "") in known for arch in gpu_archs()):
        listed = gpu_archs()
    if not listed:
        listed = [arch for arch in DEFAULT_CUDA_ARCHS if arch.replace(".", "") in known]
        listed[-1] += "+PTX"  # later GPUs compile that at first use
    return tuple(listed)


def gpu_archs() -> list[str]:
    """The compute capabilities of this machine's GPUs."""
    if not shutil.which("nvidia-smi"):
        return []
    gpus = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return sorted(set(gpus.stdout.split())) if gpus.returncode == 0 else []


def host_compiler() -> list[str]:
    """The options that make nvcc use the user's compiler, e.g. `ccache clang++ -stdlib=libc++`."""
    command = words("CXX")
    if not command:
        return []
    options = [word.startswith("-") for word in [*command, "-"]].index(True)
    return ["-ccbin", command[options - 1], *map(for_host_compiler, command[options:])]


def for_host_compiler(option: str) -> str:
    """The nvcc option that passes on an option; nvcc would split an unescaped one at commas."""
    escaped = option.replace(",", "\\,")
    return f'-Xcompiler="{escaped}"'


def run(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=text, capture_output=True, text=True)


def complaint(failed: subprocess.CompletedProcess[str]) -> str:
    lines = failed.stderr.strip().splitlines() or ["it says nothing"]
    return next((line for line in lines if re.match("[^#].*(error|fatal)", line)), lines[-1])


def words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def cxx() -> list[str]:
    return words("CXX") or ["g++"]


def check_tools() -> None:
    """Ends a build that could not succeed and says what to install."""
    try:
        run([*cxx(), "--version"])
    except OSError as error:
        raise SystemExit(
            f"bnext: cannot run the C++ compiler {cxx()[0]} ({error.strerror}); CXX can name "
            f"another. {TOOLS}"
        ) from None
    include = sysconfig.get_path("include")
    for header, missing in (
        ("<concepts>", f"{shlex.join(cxx())} does not compile C++20"),
        (f'"{CSRC}/cpu/float16.h"', f"{shlex.join(cxx())} has no type for float16"),
        ("<Python.h>", f"there is no Python.h in {include}"),
    ):
        flags = ["-std=c++20", *words("CFLAGS"), *words("CXXFLAGS"), "-isystem", include]
        probe = run([*cxx(), *flags, "-fsyntax-only", "-x", "c++", "-"], f"#include {header}\n")
        if probe.returncode:
            raise SystemExit(f"bnext: {missing} ({complaint(probe)}). {TOOLS}")


def max_jobs() -> str:
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    if not re.fullmatch("[1-9][0-9]*", jobs):
        raise SystemExit(f"bnext: MAX_JOBS must be a positive number, not {jobs!r}")
    return jobs


def bindings_flags(version: str, torch: Torch, cuda: Cuda) -> list[str]:
    """Flags of bindings.cpp: pybind11, and the macros behind bnext.build_info().

    They come before compile_flags, because torch contains an older pybind11.
    """
    flags = include(pybind11.get_include()) + include(sysconfig.get_path("include"))
    compiler = run([*cxx(), "--version"]).stdout.partition("\n")[0]
    facts = {
        "VERSION": version,
        "COMPILER": compiler,
        "TORCH_BUILD": torch.version,
        "CPU_ISAS": ",".join(CPU_ISAS),
        "NVCC": cuda.version,
        "CUDA_ARCHS": ";".join(cuda.archs),
        "CUDA_MISSING": cuda.missing,
    }
    return flags + [f"-DBNEXT_{name}={json.dumps(value)}" for name, value in facts.items()]


def compile_flags(torch: Torch, cuda: Cuda) -> list[str]:
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    flags += ["-Werror=return-type", "-Wno-maybe-uninitialized", "-Wno-psabi", f"-I{CSRC}"]
    flags += ["-ffp-contract=off"]  # backward must recompute the signs of forward's results
    major, minor = MINIMUM_TORCH
    flags += include(torch.path / "include")
    flags += [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]
    if cuda.nvcc:
        flags += ["-DBNEXT_WITH_CUDA", "-DUSE_CUDA"]
        for folder in cuda.include_folders:
            flags += include(folder)
    if SANITIZE:
        # From -O1 on, gcc takes minutes and not seconds for the kernels with both sanitizers.
        flags += [*SANITIZE, "-O0", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
    else:
        flags += ["-O3"]
    return [*flags, *words("CFLAGS"), *words("CXXFLAGS")]


def cuda_variants(source: Path) -> dict[str, str]:
    """The suffix and flags of every object that a .cu file is compiled to."""
    if not source.name.startswith("launch_"):
        return {"": ""}
    return {f".{name}": f"-DBNEXT_TYPE={name}" for name in CUDA_TYPES}


def include(folder: str | Path) -> list[str]:
    return ["-isystem", str(folder), nameless(folder)]


def nameless(folder: str | Path) -> str:
    """Keeps __FILE__ from putting a folder of the building machine into the binary."""
    return f"-ffile-prefix-map={folder}/="


def link_flags(torch: Torch, cuda: Cuda) -> list[str]:
    # libtorch.so is an empty library that only leads to others. The linker would drop it, and weak
    # symbols from libtorch_cuda would stay null under a CUDA torch.
    flags = [f"-L{torch.path / 'lib'}", "-Wl,--push-state,--no-as-needed,-ltorch,--pop-state"]
    flags += ["-ltorch_cpu", "-Wl,-z,now", *SANITIZE]
    # The conversions of float16, which libgcc_s.so has from gcc 12 on: the wheel runs where it is
    # older too.
    flags += ["-lgcc"]
    if cuda.nvcc:  # the static runtime, so that importing needs no driver and no libcudart
        flags += [*cuda.library_flags, "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        flags += ["-Wl,--exclude-libs,ALL"]
    return [*flags, *words("LDFLAGS")]


def nvcc_flags(cuda: Cuda) -> list[str]:
    flags = ["-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", f"-I{CSRC}"]
    flags += ["--expt-relaxed-constexpr"]  # constexpr functions of the shared headers
    flags += ["-fmad=false"]  # like -ffp-contract=off: the kernels say where they want an fma
    flags += ["-Xfatbin=-compress-all"]  # 4.4 MB an architecture
    flags += [for_host_compiler(nameless(f)) for f in (ROOT, *cuda.include_folders)]
    return [*flags, *host_compiler(), *cuda.arch_flags()]


def ninja_manifest(version: str, torch: Torch, cuda: Cuda) -> str:
    """The text of build.ninja: every object, then the library from them."""
    # -MD, not -MMD: a different torch in the same place must cause a rebuild too. ROOT comes first
    # because the last prefix that fits wins, and the environment may be in ROOT.
    compiler = f"{shell(cxx())} -MD -MF $out.d {shell([nameless(ROOT)])} $flags "
    compiler += shell(compile_flags(torch, cuda))
    appended = f"NVCC_APPEND_FLAGS={shell([os.environ.get('NVCC_APPEND_FLAGS', '')])}"
    nvcc = f"{appended} {shell([cuda.nvcc])} -MD -MF $out.d $flags {shell(nvcc_flags(cuda))}"
    link = f"{shell(cxx())} -shared -o $out $in {shell(link_flags(torch, cuda))}"
    lines = ["ninja_required_version = 1.5"]
    for name, command in {"cxx": compiler, **({"nvcc": nvcc} if cuda.nvcc else {})}.items():
        lines += [f"rule {name}", f"  command = {command} -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc", "  description = $out"]
    lines += ["rule link", f"  command = {link}", "  description = $out"]

    kernels = sorted(CSRC.glob("cpu/*kernels.cpp"))
    objects, statements = [], []

    def compile_file(tool: str, source: Path, variant: str = "", flags: str = "") -> None:
        objects.append(f"{source.relative_to(CSRC)}{variant}.o")
        duration = tool == "nvcc", source in kernels, source.stat().st_size
        text = f"build {objects[-1]}: {tool} {escape(source)}\n  flags = {flags}"
        statements.append((duration, text))

    bindings = shell(bindings_flags(version, torch, cuda))
    # The plan for a GPU is built even without CUDA.
    backends = ("*.cpp", "cpu/*.cpp", "cuda/*.cpp" if cuda.nvcc else "cuda/plan.cpp")
    for source in sorted({p for pattern in backends for p in CSRC.glob(pattern)} - {*kernels}):
        of_python = (f".{PYTHON}", bindings) if source.name == "bindings.cpp" else ()
        compile_file("cxx", source, *of_python)
    for source in sorted(CSRC.glob("cuda/*.cu")) if cuda.nvcc else []:
        for variant, flags in cuda_variants(source).items():
            compile_file("nvcc", source, variant, flags)
    for isa, flags in CPU_ISAS.items():
        for source in kernels:
            compile_file(
                "cxx", source, f".{isa}", f"-DBNEXT_ISA_NAMESPACE=isa_{isa} {flags} {INLINING}"
            )
    # ninja starts what is listed first, so the longest comes first and no core has to wait for it.
    statements.sort(key=lambda statement: statement[0], reverse=True)
    lines += [text for _, text in statements]
    return "\n".join([*lines, f"build {LIBRARY}: link {' '.join(objects)}", ""])


def shell(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def escape(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def build_folder() -> Path:
    return ROOT / "build" / sysconfig.get_platform()


class NinjaBuild(build_ext):
    """Compiles in one folder, so that every kind of install is incremental.

    Another Python compiles the bindings only, as long as the torch is the same.
    """

    def build_extension(self, ext: Extension) -> None:
        check_tools()
        jobs = max_jobs()
        torch = find_torch()
        if torch is None:
            raise SystemExit("bnext: no torch >= 2.11 to build against. Install torch first.")
        cuda = find_cuda(torch)
        kernels = f"with CUDA kernels ({cuda.version}, for {';'.join(cuda.archs)})"
        without = f"without CUDA kernels: {cuda.missing}"
        print(
            f"bnext: for torch {torch.version}, {without if cuda.missing else kernels}", flush=True
        )

        folder = build_folder()
        folder.mkdir(parents=True, exist_ok=True)
        manifest = ninja_manifest(self.distribution.get_version(), torch, cuda)
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-j", jobs]
        with open(folder / "lock", "w") as lock:  # ninja does not keep a second ninja out
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "build.ninja").write_text(manifest)
            if subprocess.call(command):
                raise SystemExit("bnext: the C++ build failed; the compiler's message is above.")

        library = folder / LIBRARY
        if b"\0libtorch.so\0" not in library.read_bytes():
            raise SystemExit("bnext: the linker dropped libtorch.so from the needed libraries.")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(library), str(target))


if __name__ == "__main__":
    setup(ext_modules=[Extension("bnext._C", [])], cmdclass={"build_ext": NinjaBuild})
