"""The command line's arguments: what is wrong with one is said in a line, before anything runs."""

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path


class BadArgumentError(ValueError):
    """What is wrong with an argument: a line that names it, what was expected and what came."""


def regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"expected a regular expression, got {text!r}: {error}"
        ) from None
    return text


def architecture(text: str) -> str:
    if not re.fullmatch(r"sm_\d+[af]?", text):
        raise argparse.ArgumentTypeError(f"expected an architecture such as sm_90, got {text!r}")
    return text


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?\d+", text) else least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"expected a whole number of at least {least}, got {text!r}"
            )
        return value

    return number


def duration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def check_writable(folder: Path) -> None:
    """Tries it now, because results are written after minutes of work; makes nothing."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        reason = f"cannot write to {existing}: {error.strerror}"
        raise BadArgumentError(f"argument --out: {reason}") from None
