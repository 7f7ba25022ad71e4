"""What the build promises about the shared object, and how it finds the torch to build against."""

import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

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
    import torch

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
