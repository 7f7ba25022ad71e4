"""What the build promises about the shared object, and how it finds the torch to build against."""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import _backend
import bnext
import bnext._C

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


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BNEXT_CUDA": "1", "CUDA_HOME": "/nowhere"}, "BNEXT_CUDA=1, but no nvcc in /nowhere/bin"),
        ({"BNEXT_CUDA": "yes"}, "BNEXT_CUDA must be auto, 0 or 1, not 'yes'"),
    ],
)
def test_what_the_build_refuses(variables, message) -> None:
    for module in ("ninja", "pybind11", "setuptools"):
        pytest.importorskip(module)
    root = Path(_backend.__file__).parent
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    result = subprocess.run(
        command, cwd=root, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert result.returncode == 1 and message in result.stderr


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


def test_the_build_passes_over_a_torch_that_is_too_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for number in ("2.9.1", "3.0.0"):
        folder = tmp_path / number / "torch"
        folder.mkdir(parents=True)
        (folder / "version.py").write_text(f"__version__ = '{number}+cpu'\ncuda = None\n")
        folders.append(str(folder.parent))
    monkeypatch.setattr(sys, "path", folders)
    found = _backend.find_torch()
    assert found == _backend.Torch(tmp_path / "3.0.0" / "torch", "3.0.0+cpu")
