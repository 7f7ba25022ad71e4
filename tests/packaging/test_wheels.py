"""What the release tool refuses before it builds. CI runs the tool itself."""

import sys
import tarfile
from pathlib import Path

import pytest
import wheels


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the tool with an sdist of version 1.2.3 until it makes an environment."""
    (tmp_path / "bnext-1.2.3").mkdir()
    sdist = tmp_path / "bnext-1.2.3.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(tmp_path / "bnext-1.2.3", "bnext-1.2.3")

    def stop(python: str, folder: Path) -> None:
        raise InterruptedError(python)

    monkeypatch.setattr(wheels, "build_sdist", lambda folder: sdist)
    monkeypatch.setattr(wheels, "Environment", stop)
    monkeypatch.setenv("PATH", "/nowhere")

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["wheels.py", *arguments])
        wheels.main()

    return call


@pytest.mark.parametrize("tag", ["v1.2.4", "1.2.3", "v1.2.3rc1"])
def test_the_tag_must_be_the_version(run, tag) -> None:
    with pytest.raises(SystemExit, match=f"the tag {tag} is not the version of bnext-1.2.3"):
        run("--release", tag, sys.executable)


@pytest.mark.parametrize("arguments", [[], ["--release", "v1.2.3"]])
def test_a_wheel_is_built_for_the_python_named(run, arguments) -> None:
    with pytest.raises(InterruptedError, match=sys.executable):
        run(*arguments, sys.executable)


def test_what_is_no_python_is_named(run) -> None:
    with pytest.raises(SystemExit, match="/nowhere/python: no such Python"):
        run(sys.executable, "/nowhere/python")


def test_an_environment_of_another_version_has_no_wheel(run, tmp_path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho cpython-39\n")
    other.chmod(0o755)
    with pytest.raises(SystemExit, match=f"no wheel will be built for the version of {other}"):
        run(sys.executable, "--under", str(other))
