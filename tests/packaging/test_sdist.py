"""The sdist holds what it takes to build, to test and to read its documents."""

import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "*.so", "*cache*", "*.egg-*")
# Markdown's links and pictures, and HTML's.
LINK = re.compile(r'\]\(([^)\s]+)\)|\b(?:href|src|srcset)="([^"\s]+)"')


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in ("ninja", "pybind11", "setuptools"):
        pytest.importorskip(name)
    copy = tmp_path_factory.mktemp("sdist") / "bnext"
    shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    (file,) = (copy / "dist").iterdir()
    return file


@pytest.fixture(scope="module")
def contents(sdist: Path) -> dict[str, bytes | None]:
    """Every path inside, without the first folder; the bytes of files."""
    with tarfile.open(sdist) as archive:
        return {
            member.name.partition("/")[2]: (
                archive.extractfile(member).read() if member.isfile() else None
            )
            for member in archive
        }


def links(name: str, text: str) -> set[str]:
    """The paths that a document links, relative to the root."""
    found = {
        (a or b).partition("#")[0]
        for a, b in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.S))
    }
    inside = [
        link for link in found if link and "://" not in link and not link.startswith("mailto:")
    ]
    return {posixpath.normpath(posixpath.join(posixpath.dirname(name), link)) for link in inside}


def test_what_the_documents_link_is_inside(contents) -> None:
    documents = {name: data for name, data in contents.items() if name.endswith(".md")}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= documents.keys()
    linked = {name: links(name, data.decode()) for name, data in documents.items()}
    assert any(link.endswith(".png") for link in linked["README.md"])
    missing = {name: found - contents.keys() for name, found in linked.items()}
    assert not {name: found for name, found in missing.items() if found}


def test_links_are_found_in_every_form() -> None:
    text = (
        '![p](a/b.png) [c](../C.md#part) [u](https://x.org) [#](#here) <img src="d.png" width="9">'
    )
    assert links("folder/README.md", text) == {"folder/a/b.png", "C.md", "folder/d.png"}


def test_what_it_takes_to_build_and_test_is_inside(contents) -> None:
    wanted = [
        ROOT / name for name in ("setup.py", "_backend.py", "pyproject.toml", "Makefile", "LICENSE")
    ]
    for folder in ("bnext", "csrc", "tests", "benchmarks"):
        wanted += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = {
        path.relative_to(ROOT).as_posix() for path in wanted if path.suffix not in (".so", ".pyc")
    }
    assert not names - contents.keys()


def test_it_is_small(sdist, contents) -> None:
    assert sdist.stat().st_size < 4e6
    assert not [name for name in contents if name.endswith((".so", ".o", ".pyc", ".whl"))]
