"""import bnext: starts nothing, runs nothing, and says what to do where it cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnext
import bnext._C

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_import_starts_no_threads_and_prints_nothing() -> None:
    result = run(
        "import os, sys, torch\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "import bnext\n"
        "sys.exit(len(os.listdir('/proc/self/task')) - before)"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_import_changes_no_setting() -> None:
    result = run(
        "import os, torch\n"
        "def settings():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(),\n"
        "            torch.is_grad_enabled(), dict(os.environ), torch.get_rng_state().tolist(),\n"
        "            torch.cuda.is_initialized())\n"
        "before = settings()\n"
        "import bnext\n"
        "assert settings() == before"
    )
    assert result.returncode == 0, result.stderr


def test_import_runs_no_operation() -> None:
    result = run(
        "import torch\n"
        "from torch.utils._python_dispatch import TorchDispatchMode\n"
        "class Refuse(TorchDispatchMode):\n"
        "    def __torch_dispatch__(self, func, types, args=(), kwargs=None):\n"
        "        raise AssertionError(f'{func} was called')\n"
        "with Refuse():\n"
        "    import bnext"
    )
    assert result.returncode == 0, result.stderr


def test_import_brings_no_optional_package() -> None:
    result = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import bnext\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "wrong = new & {'pytest', 'hypothesis', 'matplotlib', 'rich', 'sklearn', 'torchvision',\n"
        "               'setuptools', 'ninja', 'pybind11', 'keras'}\n"
        "assert not wrong, wrong"
    )
    assert result.returncode == 0, result.stderr


HIDE = (
    "import sys, torch\n"
    "class Hide:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name == 'bnext._C':\n"
    "            raise ImportError({message!r})\n"
    "sys.meta_path.insert(0, Hide())\n"
    "import bnext\n"
)


@pytest.mark.parametrize("message", ["No module named 'bnext._C'", "undefined symbol: torch_oops"])
def test_missing_or_broken_extension_says_what_to_do(message) -> None:
    result = run(HIDE.format(message=message))
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert message in last, "the cause is named"
    assert "pip install" in last, "the way out is named"
    assert "The above exception was the direct cause" in result.stderr, "the cause is chained"


def test_no_part_of_the_package_works_without_the_extension() -> None:
    """No silent fallback: each submodule refuses too."""
    code = HIDE.format(message="gone").rsplit("import bnext\n", 1)[0]
    for module in ("bnext.functional", "bnext.modules", "bnext.convert", "bnext.introspect"):
        result = run(code + f"import {module}\n")
        assert result.returncode == 1 and "gone" in result.stderr, module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that was not built; what `pip install .` made of it is in ../installed."""
    ignore = shutil.ignore_patterns("*.so", "*.pyi", "__pycache__")
    for name in ("checkout", "installed"):
        shutil.copytree(ROOT / "bnext", tmp_path / name / "bnext", ignore=ignore)
    shutil.copy(bnext._C.__file__, tmp_path / "installed" / "bnext")
    return tmp_path / "checkout"


def run_in(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """-S: without the finder of an editable install, which would find this checkout's."""
    folders = [checkout.parent / "installed", Path(torch.__file__).parent.parent]
    return subprocess.run(
        [sys.executable, "-S", *arguments], cwd=checkout, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}, check=False,
    )  # fmt: skip


def test_a_checkout_runs_with_what_was_installed_from_it(checkout) -> None:
    code = "import bnext; from bnext import _C; print(bnext.__file__, _C.__file__)"
    result = run_in(checkout, "-c", code)
    assert result.returncode == 0, result.stderr
    python, compiled = map(Path, result.stdout.split())
    assert python.is_relative_to(checkout)
    assert compiled.is_relative_to(checkout.parent / "installed")
    assert run_in(checkout, "-m", "bnext.introspect").returncode == 0


@pytest.mark.parametrize("change", ["other text", "one file more", "one file less"])
def test_a_checkout_never_runs_with_what_was_built_from_other_sources(checkout, change) -> None:
    file = checkout / "bnext" / ("new.py" if change == "one file more" else "introspect.py")
    file.unlink() if change == "one file less" else file.write_text("# changed\n")
    result = run_in(checkout, "-c", "import bnext")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "circular" not in result.stderr
    for part in (checkout / "bnext", checkout.parent / "installed" / "bnext"):
        assert str(part) in last
    assert "in another folder" in last and "pip install -e ." in last


EDITABLE = (
    "import sys\n"
    "from importlib.util import spec_from_file_location\n"
    "class Finder:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        return spec_from_file_location(name, {file!r}) if name == 'bnext._C' else None\n"
    "sys.meta_path.append(Finder())\n"
    "import bnext\n"
)


def test_a_checkout_takes_an_editable_install_s_only_if_its_sources_are_the_same(checkout) -> None:
    code = EDITABLE.format(file=str(next((checkout.parent / "installed").glob("bnext/_C.*"))))
    assert run_in(checkout, "-c", code).returncode == 0
    (checkout / "bnext" / "introspect.py").write_text("# changed\n")
    result = run_in(checkout, "-c", code)
    assert result.returncode == 1 and "built from other sources" in result.stderr


def test_a_checkout_that_was_never_installed_says_what_to_do(checkout) -> None:
    shutil.rmtree(checkout.parent / "installed")
    result = run_in(checkout, "-m", "bnext.verify")
    assert result.returncode == 1 and "circular" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "No module named 'bnext._C'" in last and "pip install ." in last


def test_a_built_checkout_prefers_its_own(checkout) -> None:
    shutil.copy(bnext._C.__file__, checkout / "bnext")
    (checkout / "bnext" / "introspect.py").write_text("# changed\n")
    result = run_in(checkout, "-c", "from bnext import _C; print(_C.__file__)")
    assert result.returncode == 0 and Path(result.stdout).is_relative_to(checkout)


def test_introspect_runs_as_a_program() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bnext.introspect"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "version" in result.stdout and "floor" in result.stdout


def test_every_public_name_is_there_and_documented() -> None:
    for name in bnext.__all__:
        assert getattr(bnext, name).__doc__, name
    assert {"BatchNorm2d", "BatchNormAct2d", "LazyBatchNorm2d", "convert", "revert", "explain",
            "build_info", "functional"} <= set(bnext.__all__)  # fmt: skip
