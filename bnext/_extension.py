"""Loads the compiled part, bnext._C, or says what to do if there is none.

`pip install .` leaves nothing in the checkout, but Python started there finds the checkout's bnext
first. That one may use the compiled part of the installed bnext if their Python files are the same.
"""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

import torch

import bnext

__all__ = ["_C"]


def _compiled_folder() -> Path | None:
    """Where bnext._C is: here, or in an installed bnext that this one hides."""
    spec = find_spec("bnext._C")  # also finds that of an editable install
    if spec and spec.origin:
        return Path(spec.origin).parent
    for folder in sys.path:
        other = Path(folder, "bnext").absolute()
        if any(Path(other, "_C" + suffix).is_file() for suffix in EXTENSION_SUFFIXES):
            return other
    return None


def _sources(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.py")}


_here = Path(__file__).parent
try:
    _folder = _compiled_folder()
    if _folder and _folder != _here:
        if _sources(_folder) != _sources(_here):
            raise ImportError(
                f"{_here} was not built, and hides the bnext in {_folder}, which was built from "
                "other sources; start Python in another folder, or install this one"
            )
        bnext.__path__.append(str(_folder))
    import bnext._C as _C
except ImportError as error:
    raise ImportError(
        f"bnext's compiled part (bnext._C) cannot be loaded: {error}. It is built when bnext is "
        "installed: run `pip install .` (`pip install -e .` to develop) in a checkout of bnext, "
        f"with this Python and torch >= 2.11 in its environment (found torch {torch.__version__})."
    ) from error
