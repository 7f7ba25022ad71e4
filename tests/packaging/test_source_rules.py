"""The rules of the tree: who may include what, sizes of files, names of folders."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CXX = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
EMULATOR = sorted(p for p in (ROOT / "tests").rglob("*") if p.suffix in {".h", ".cpp"})
PYTHON = [
    p for folder in ("bnext", "tests", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))
]
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)

TOP_LEVEL = {
    "setup.py", "pyproject.toml", "_backend.py", "README.md", "LICENSE", "CHANGELOG.md",
    "CONTRIBUTING.md", "CITATION.cff", "MANIFEST.in", "Makefile", ".ci", ".clang-format", ".github",
    ".gitignore", ".pre-commit-config.yaml", "csrc", "bnext", "tests", "benchmarks",
}  # fmt: skip


def includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def all_includes(path: Path, seen: set[Path] | None = None) -> dict[str, Path]:
    """What a file includes, through our own headers too: include -> the file that has it."""
    seen = set() if seen is None else seen
    seen.add(path)
    found: dict[str, Path] = {}
    for name in includes(path):
        found.setdefault(name, path)
        for local in (path.parent / name, CSRC / name):
            if local.is_file() and local.resolve() not in seen:
                found.update(all_includes(local.resolve(), seen))
                break
    return found


def torch_free() -> list[Path]:
    names = ("bindings.cpp", "problem.h", "moments.h", "formulas.h", "activation.h")
    names += ("cpu/schedule.h", "cpu/probe.h", "cpu/unit.h", "cpu/walk.h", "cpu/gradient.h")
    names += ("cpu/body.h", "cpu/rows.h", "cpu/columns.h", "cpu/coefficients.h", "cpu/row_mask.h")
    names += ("cuda/launch.h", "cuda/device_info.h", "cuda/cut.h")
    files = [CSRC / name for name in names] + sorted(CSRC.rglob("plan.*"))
    files += [p for p in CXX if p.parent.name == "cpu" and re.search("kernels|^vec", p.stem)]
    return files + [p for p in CXX if p.suffix in {".cu", ".cuh"}]


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tracked() -> list[str]:
    command = ["git", "ls-files"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"not a git checkout: {result.stderr.strip()}")
    return result.stdout.splitlines()


def test_the_rules_have_files_to_look_at() -> None:
    assert len(CXX) >= 10 and len(PYTHON) >= 10 and all(p.is_file() for p in torch_free())


@pytest.mark.parametrize("path", torch_free(), ids=ids)
def test_kernels_plan_and_bindings_never_see_torch(path) -> None:
    seen = {
        name: ids(p)
        for name, p in all_includes(path).items()
        if name.startswith(("torch/", "Python.h"))
    }
    assert not seen


@pytest.mark.parametrize("path", CXX, ids=ids)
def test_only_the_stable_abi_is_included(path) -> None:
    for name in includes(path):
        assert not name.startswith(("ATen/", "c10/", "caffe2/")), name
        assert name not in ("torch/extension.h", "torch/torch.h", "torch/all.h"), name
        if name.startswith("torch/"):
            assert name.startswith(
                ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
            ), name


@pytest.mark.parametrize("path", CXX, ids=ids)
def test_cuda_is_seen_by_cuda_files_only(path) -> None:
    if path.parent.name != "cuda":
        found = [n for n in includes(path) if n.startswith("cuda") or n.endswith(".cuh")]
        assert set(found) <= {"cuda/device_info.h", "cuda/plan.h"}, "which include no CUDA"


@pytest.mark.parametrize("path", CXX + EMULATOR + PYTHON, ids=ids)
def test_no_file_is_long(path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_top_level_holds_only_what_a_user_expects() -> None:
    assert {name.split("/")[0] for name in tracked()} <= TOP_LEVEL


def test_no_build_output_is_tracked() -> None:
    assert not [n for n in tracked() if n.endswith((".so", ".o", ".pyc", ".whl")) or "build/" in n]


def test_names_say_what_is_inside() -> None:
    vague = re.compile(r"(^|_)(utils?|helpers?|common|misc)(_|$)")
    assert not [n for n in tracked() if any(vague.search(part) for part in re.split(r"[/.]", n))]


@pytest.mark.parametrize("path", [p for p in PYTHON if p.parent.name == "bnext"], ids=ids)
def test_the_library_prints_nothing(path) -> None:
    tree = ast.parse(path.read_text())
    main = [
        node for node in tree.body
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    ] if path.name in ("introspect.py", "verify.py", "__main__.py") else []  # fmt: skip
    allowed = {id(n) for block in main for n in ast.walk(block)}
    calls = [
        node.lineno for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
        and id(node) not in allowed
    ]  # fmt: skip
    assert not calls


@pytest.mark.parametrize("path", CXX, ids=ids)
def test_the_kernels_print_nothing(path) -> None:
    found = re.findall(r"\bstd::c(?:out|err)\b|\bf?printf\s*\(", path.read_text())
    assert not found


def test_thresholds_live_in_the_plan() -> None:
    """Cache sizes are asked for by the plan (and by what reports them), not by kernels."""
    for path in CXX:
        reports = ("bindings.cpp", "cpu_info.cpp", "device_info.cu")
        if path.stem != "plan" and path.name not in reports:
            assert not re.search(r"\bl[123]_bytes\b", path.read_text()), ids(path)
