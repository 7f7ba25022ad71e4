"""What the build promises about the shared object, and how it finds the torch to build against."""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch

import _backend
import bnext
import bnext._C

ROOT = Path(_backend.__file__).parent
EXTENSION = str(bnext._C.__file__)


def binutils(tool: str, *arguments: str) -> str:
    if not shutil.which(tool):
        pytest.skip(f"needs {tool}")
    command = [tool, *arguments, EXTENSION]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_only_the_stable_abi_of_torch_is_used() -> None:
    undefined = binutils("nm", "-D", "--undefined-only", "--demangle").splitlines()
    assert any("torch_call_dispatcher" in line or "aoti_torch_" in line for line in undefined)
    assert not [line for line in undefined if re.search(r"\b(c10|at|torch)::", line)]


def test_libtorch_stays_needed() -> None:
    """Through it weak CUDA symbols are found under a CUDA torch."""
    assert "[libtorch.so]" in binutils("readelf", "--dynamic")


@pytest.mark.parametrize("op", ["batch_norm_train", "batch_norm_inference", "batch_norm_backward"])
def test_the_ops_have_kernels_for_what_was_built(op) -> None:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel(f"bnext::{op}", "CPU")
    assert has_kernel(f"bnext::{op}", "CUDA") == bnext.build_info()["cuda"]


def test_build_info_says_what_there_is_of_cuda() -> None:
    info = bnext.build_info()
    if not info["cuda"]:
        assert info["cuda_missing"] and not info["nvcc"] and not info["cuda_archs"]
        return
    assert re.match(r"\d+\.\d+", info["nvcc"]) and not info["cuda_missing"]
    assert all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", a) for a in info["cuda_archs"].split(";"))


def test_no_cuda_library_is_needed_to_load() -> None:
    """The runtime is inside; what only a CUDA torch has is asked for weakly."""
    assert not re.search(
        r"NEEDED.*(libcuda|libcudart|torch_cuda|c10_cuda)", binutils("readelf", "-d")
    )
    undefined = binutils("nm", "-D", "--undefined-only")
    for line in undefined.splitlines():
        if "cuda" in line:
            assert line.split()[0] in ("w", "v"), line


def test_the_stream_is_found_under_a_cuda_torch() -> None:
    if not (bnext.build_info()["cuda"] and torch.version.cuda):
        pytest.skip("needs CUDA kernels in bnext._C and a CUDA torch")
    command = [sys.executable, "-c", "import torch, bnext"]
    environment = {**os.environ, "LD_DEBUG": "bindings"}
    log = subprocess.run(command, env=environment, capture_output=True, text=True).stderr
    assert re.search(r"_C\..*to .*libtorch_cuda.*aoti_torch_get_current_cuda_stream", log)


def test_no_folder_of_the_building_machine_is_named_inside() -> None:
    pybind11 = pytest.importorskip("pybind11")
    inside = Path(EXTENSION).read_bytes()
    assert b"torch/csrc/stable/" in inside, "__FILE__ is used"
    folders = [ROOT, Path(torch.__file__).parent, pybind11.get_include(), sys.base_prefix]
    assert not [folder for folder in folders if f"{folder}/".encode() in inside]
    assert b"site-packages" not in inside


def test_it_runs_beside_the_libgcc_of_gcc_11() -> None:
    """That of RHEL 9, whose glibc is the oldest that will do."""
    assert not re.search(r"GCC_1[2-9]", binutils("readelf", "--version-info"))


def test_every_symbol_is_bound_when_it_is_loaded() -> None:
    """So the linker makes the table of functions read-only."""
    assert re.search(r"FLAGS.*NOW", binutils("readelf", "--dynamic"))


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("ninja", "pybind11", "setuptools"):
        pytest.importorskip(name)
    for name in ("CXX", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH", "BNEXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module("setup")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


NOTHING = "/nowhere"
OLD = "case $* in *std=c++20*) echo 'g++: error: unrecognized option' >&2; exit 1;; esac"
GCC11 = "if grep -q float16; then echo \"error: '_Float16' does not name a type\" >&2; exit 1; fi"
BARE = "if grep -q Python.h; then echo 'fatal error: Python.h: No such file' >&2; exit 1; fi"


@pytest.mark.parametrize(
    ("variables", "messages"),
    [
        ({"BNEXT_CUDA": "1", "CUDA_HOME": NOTHING}, ["BNEXT_CUDA=1, but no nvcc in /nowhere/bin"]),
        ({"BNEXT_CUDA": "yes"}, ["BNEXT_CUDA must be auto, gpu, 0 or 1, not 'yes'"]),
        ({"MAX_JOBS": "all"}, ["MAX_JOBS must be a positive number, not 'all'"]),
        ({"MAX_JOBS": "0"}, ["MAX_JOBS must be a positive number, not '0'"]),
        ({"PATH": NOTHING}, ["compiler g++ (No such file", "apt install g++", "dnf install gcc-c"]),
        ({"CXX": "/nowhere/c++ -m64"}, ["compiler /nowhere/c++ (No such file", "apt install g++"]),
        ({"CXX": "{scripts}/old"}, ["old does not compile C++20", "unrecognized", "gcc 12 or"]),
        ({"CXX": "{scripts}/gcc11"}, ["has no type for float16 (error: '_Float16'", "gcc 12 or"]),
        ({"CXX": "{scripts}/bare"}, ["there is no Python.h in", "python3-dev", "python3-devel"]),
        ({"PYTHONPATH": "{scripts}/ninja"}, ["no ninja for", "pip install setuptools pybind11 ni"]),
        (
            {"PYTHONPATH": "{scripts}/pybind11"},
            ["no pybind11 for", "pip install setuptools pybind"],
        ),
    ],
)
def test_the_build_says_in_one_line_what_it_lacks(setup, tmp_path, variables, messages) -> None:
    copy, scripts = tmp_path / "bnext", tmp_path / "scripts"
    shutil.copytree(ROOT / "bnext", copy / "bnext", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    for name in ("setup.py", "_backend.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    script(scripts / "old", OLD)
    script(scripts / "gcc11", GCC11)
    script(scripts / "bare", BARE)
    for name in ("ninja", "pybind11"):
        (scripts / name).mkdir()
        (scripts / name / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    environment = {**os.environ, "BNEXT_CUDA": "0"}
    environment |= {name: value.format(scripts=scripts) for name, value in variables.items()}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=copy, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1 and not (copy / "build").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith("bnext: ") and all(message in line for message in messages), line


@pytest.mark.parametrize(
    ("choice", "gpus", "cuda", "reason"),
    [
        ("auto", "", False, "torch 3.0.0, which has no CUDA; BNEXT_CUDA=1"),
        ("auto", "9.0", False, "torch 3.0.0, which has no CUDA; BNEXT_CUDA=1"),
        ("auto", "", True, "no nvcc on PATH"),
        ("gpu", "", True, "nvidia-smi listed no GPU at build time; BNEXT_CUDA=1"),
        ("gpu", "9.0", False, "torch 3.0.0, which has no CUDA; BNEXT_CUDA=1"),
        ("gpu", "9.0", True, "no nvcc on PATH"),
        ("0", "9.0", True, "BNEXT_CUDA=0"),
    ],
)
def test_cuda_is_built_where_it_can_be_used(
    setup, monkeypatch, tmp_path, choice, gpus, cuda, reason
) -> None:
    answer = f"echo {gpus}" if gpus else "echo 'No devices were found'; exit 6"
    script(tmp_path / "nvidia-smi", answer)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BNEXT_CUDA", choice)
    found = setup.find_cuda(_backend.Torch(tmp_path, "3.0.0", cuda))
    assert reason in found.missing and not found.nvcc
    monkeypatch.setenv("BNEXT_CUDA", "1")
    with pytest.raises(SystemExit, match="BNEXT_CUDA=1, but no nvcc on PATH"):
        setup.find_cuda(_backend.Torch(tmp_path, "3.0.0", cuda))


def test_what_nvcc_complains_of_is_passed_on(setup, monkeypatch, tmp_path) -> None:
    text = "#$ g++ -Werror\ng++: error: no such option\n# --error 0x1 --"
    script(tmp_path / "nvcc", f"echo '{text}' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (
        setup.probe_cuda().missing == f"{tmp_path}/nvcc does not work: g++: error: no such option"
    )


def test_nvcc_may_be_the_one_of_pypi_beside_torch(setup, monkeypatch, tmp_path) -> None:
    torch_found = _backend.Torch(tmp_path / "torch", "3.0.0", cuda=False)
    toolkit = tmp_path / "nvidia" / "cu13"
    toolkit.mkdir(parents=True)
    nvcc = script(toolkit / "bin" / "nvcc", "echo compute_80 V13.0.1; echo '#$ LIBRARIES=-La' >&2")
    monkeypatch.setenv("PATH", NOTHING)
    monkeypatch.setenv("BNEXT_CUDA", "1")
    found = setup.find_cuda(torch_found)
    assert (found.nvcc, found.version) == (str(nvcc), "13.0.1")
    assert found.library_flags == ("-La", f"-L{toolkit}/lib")
    monkeypatch.setenv("CUDA_HOME", NOTHING)
    assert setup.probe_cuda(torch_found).missing == "no nvcc in /nowhere/bin"


@pytest.mark.parametrize(
    ("cxx", "options"),
    [
        ("", []),
        ("g++-12", ["-ccbin", "g++-12"]),
        ("ccache g++", ["-ccbin", "g++"]),
        ("clang++ -stdlib=libc++", ["-ccbin", "clang++", '-Xcompiler="-stdlib=libc++"']),
        ("ccache g++ -B /a,b", ["-ccbin", "g++", '-Xcompiler="-B"', r'-Xcompiler="/a\,b"']),
    ],
)
def test_nvcc_takes_the_compiler_of_cxx_and_its_options(setup, monkeypatch, cxx, options) -> None:
    monkeypatch.setenv("CXX", cxx)
    assert setup.host_compiler() == options


def test_jobs_are_as_many_as_the_cpus_this_process_may_use(setup, monkeypatch) -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert setup.max_jobs() == "1"
    finally:
        os.sched_setaffinity(0, allowed)
    assert setup.max_jobs() == str(len(allowed))
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.max_jobs() == "3"


def test_what_takes_longest_is_compiled_first(setup) -> None:
    torch_found = _backend.find_torch()
    manifest = setup.ninja_manifest("0", torch_found, setup.Cuda("none"))
    order = re.findall(r"^build (\S+)\.o:", manifest, re.M)
    assert [name for name in order if "kernels.cpp" in name] == order[: 3 * len(setup.CPU_ISAS)]
    assert order[0].startswith("cpu/backward_kernels.cpp")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set here")
def test_code_for_every_machine_has_no_avx_instruction() -> None:
    """An inline function that the AVX objects also define must come from the baseline's object."""
    users = {False: set(), True: set()}
    function = ""
    for line in binutils("objdump", "-d", "--demangle", "--no-show-raw-insn").splitlines():
        if name := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = name[1]
        elif re.search(r"%[yz]mm|\tv\w+ .*%xmm", line):
            users["isa_avx" in function].add(function)
    assert users[True]
    assert not [name for name in users[False] if re.search("bnext|std::|pybind11|torch", name)]


def test_version_has_one_source() -> None:
    assert bnext.build_info()["version"] == version("bnext") == bnext.__version__


def test_the_build_finds_the_running_torch() -> None:
    found = _backend.find_torch()
    assert found is not None
    assert found.path == Path(torch.__file__).parent
    assert found.version == torch.__version__
    assert found.cuda == (torch.version.cuda is not None)


def torch_in(folder: Path, number: str) -> str:
    """A folder for sys.path with the only file of a torch that the build reads."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{number}+cpu'\ncuda = None\n")
    return str(folder)


def test_the_build_passes_over_a_torch_that_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [torch_in(tmp_path / number, number) for number in ("2.9.1", "3.0.0")]
    monkeypatch.setattr(sys, "path", folders)
    found = _backend.find_torch()
    assert found == _backend.Torch(tmp_path / "3.0.0" / "torch", "3.0.0+cpu", cuda=False)


@pytest.mark.parametrize("place", ["on PATH", ".venv"])
def test_the_build_finds_a_torch_that_uv_and_build_hide(tmp_path, monkeypatch, place) -> None:
    """They run it by an interpreter without torch, in an environment of their own."""
    environment = tmp_path / ".venv"
    packages = Path(torch_in(environment / "lib" / "python3.10" / "site-packages", "3.0.0"))
    empty = str(tmp_path / "empty")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(_backend.sysconfig, "get_path", lambda *_, **__: empty)
    monkeypatch.setattr(_backend.site, "getsitepackages", list)
    monkeypatch.setattr(_backend.site, "getusersitepackages", lambda: empty)
    monkeypatch.setattr(_backend, "ROOT", tmp_path if place == ".venv" else tmp_path / "empty")
    monkeypatch.setenv("PATH", f"{environment}/bin" if place == "on PATH" else empty)
    found = _backend.find_torch()
    assert found == _backend.Torch(packages / "torch", "3.0.0+cpu", cuda=False)
    assert _backend._torch_requirement() == []
    shutil.rmtree(packages)
    assert _backend._torch_requirement() == ["torch>=2.11"]


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = '13.0'", True),
        ("cuda: str | None = '12.8'", True),
        ("cuda = '13.2'", True),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4'", False),
        ("cuda = None", False),
    ],
)
def test_the_build_sees_whether_torch_has_cuda(tmp_path, monkeypatch, line, cuda) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(f"__version__ = '3.0.0'\n{line}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert _backend.find_torch() == _backend.Torch(tmp_path / "torch", "3.0.0", cuda)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    if not shutil.which("make"):
        pytest.skip("needs make")
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCH", "VENV", "PYTHON")}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("target", "extras"),
    [
        ("build", []),
        ("demo", ["bench"]),
        ("test", ["test"]),
        ("lint", ["lint"]),
        ("wheels", ["release"]),
    ],
)
def test_make_installs_what_the_target_needs(tmp_path, target, extras) -> None:
    (torch_choice,) = make("-s", "torch").stdout.split()
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", torch_choice)
    steps = make("-n", target, f"VENV={tmp_path}/venv").stdout
    assert f'pip install --upgrade "{torch_choice}"' in steps
    assert re.findall(r'pip install --no-build-isolation -e "\.\[(.*)\]"', steps) == extras
    assert " -q" not in re.sub(r"setup\.py -q|sed.*", "", steps), "nothing hides for minutes"


def test_make_says_what_will_happen_before_it_does(tmp_path) -> None:
    python = script(tmp_path / "python", '[ "$1" = -c ] || { echo "this is $*"; exit 1; }')
    result = make("build", f"VENV={tmp_path}/venv", f"PYTHON={python}", "TORCH=torch==3.0.0")
    before, _ = result.stdout.split("this is -m venv")
    assert before.startswith("bnext: torch==3.0.0") and "GB" in before and "minute" in before


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("sys.version_info = (3, 8)", "needs Python 3.10 or newer, and {python} is 3.8"),
        ("sys.modules['ensurepip'] = None", "apt install python3-venv"),
    ],
)
def test_make_says_what_python_lacks(tmp_path, lacks, message) -> None:
    program = f"import sys; {lacks}; exec(sys.argv[1])"
    python = script(tmp_path / "python", f'exec {sys.executable} -c "{program}" "$2"')
    result = make("build", f"VENV={tmp_path}/venv", f"PYTHON={python}")
    assert result.returncode and message.format(python=python) in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "venv" / "bin").exists()
