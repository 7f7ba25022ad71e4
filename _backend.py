"""PEP 517 backend: setuptools' own, except that it builds against a torch already installed.

Build isolation hides the target environment from `sys.path`, not from disk, and any torch >= 2.11
gives the same extension (stable ABI). So torch is a build requirement only if none is found: in the
target environment, which pip tells, or in an environment on PATH (one that is activated) or in
.venv, since uv and build tell nothing. They then download megabytes, not another torch with its
CUDA libraries.
"""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)  # = TORCH_TARGET_VERSION in setup.py and `dependencies` in pyproject.toml


class Torch(NamedTuple):
    path: Path
    version: str
    cuda: bool  # whether it can have tensors on a GPU


def find_torch() -> Torch | None:
    """The first torch that is new enough, this interpreter's own first; does not import it."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    folders = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    folders += [sysconfig.get_path("platlib", vars=base)]  # venv --system-site-packages
    others = [*(Path(folder).parent for folder in os.get_exec_path()), ROOT / ".venv"]
    folders += [folder for other in others for folder in other.glob("lib/python3*/site-packages")]
    for folder in folders:
        version_file = Path(folder, "torch", "version.py")
        if not version_file.is_file():
            continue
        text = version_file.read_text()
        match = re.search(r"^__version__ = '((\d+)\.(\d+)[^']*)'", text, re.M)
        if match and (int(match[2]), int(match[3])) >= MINIMUM_TORCH:
            cuda = re.search(r"^cuda\b.*= '", text, re.M)  # '13.0', or None
            return Torch(version_file.parent, match[1], cuda is not None)
    return None


def _torch_requirement() -> list[str]:
    return [] if find_torch() else [f"torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
