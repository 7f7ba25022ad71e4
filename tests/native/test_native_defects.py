"""Kernels with one barrier, wait, commit or bounds check removed: each removal is found.

All removals are compiled into one library and chosen by a number at run time. A removal that
nothing finds would be a barrier that is not needed, or a case that is missing here.
"""

import re
from collections.abc import Iterator

import pytest
import torch

import masks
from cases import DTYPES, make
from native import calls, emulated
from native.calls import BLOCK, CLUSTER, GRID, RESIDENT, SMALL, STREAMING
from native.checks import Setting

NCHW, NHWC = torch.contiguous_format, torch.channels_last
STATEMENT = re.compile(
    r"\b(?:sync_(?:block|cluster|grid)|(?:arrive|wait)_cluster|commit_copies"
    r"|wait_for_copies<[^>]*>)\(\);|\bany_of_block\(any\)"
)
CONDITION = re.compile(
    r"(?:!?items\.(?:valid\((?:k|(?:last|total) - 1)\)|owns\(\))|!valid\[i\])(?=[;) ])"
    r"|\bchannel < channels(?= |\))"
)
FILES = sorted(p for p in emulated.CSRC.glob("cuda/*.cuh") if p.name != "device.cuh")


def sites() -> list[tuple[str, int, str]]:
    """(file, line, what is removed), in the order of their numbers."""
    found = []
    for file in FILES:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            code = line.split("//")[0]
            found += [(file.name, number, m[0]) for m in re.finditer(
                f"{STATEMENT.pattern}|{CONDITION.pattern}", code)]  # fmt: skip
    return found


SITES = sites()


def with_switches(name: str, text: str) -> str:
    """Every site of a file behind its number."""
    lines = text.splitlines()
    for number, (file, line, what) in enumerate(SITES):
        if file != name:
            continue
        chosen = f"emulation::defect == {number}"
        if what.endswith(";"):
            changed = f"if (!({chosen})) {what}"
            # Behind an `if` of its own the new one would take the next `else`.
            lines[line - 1] = lines[line - 1].replace(what, f"{{ {changed} }}")
        elif what.startswith("any_of_block"):
            lines[line - 1] = lines[line - 1].replace(what, f"({chosen} ? any : {what})")
        elif what.startswith("!"):
            lines[line - 1] = lines[line - 1].replace(what, f"!({chosen}) && {what}")
        else:
            lines[line - 1] = lines[line - 1].replace(what, f"({chosen} || {what})")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def emulator() -> emulated.Emulator:
    return emulated.kernels_with_defects("checked", with_switches)


def outcomes(e: emulated.Emulator) -> Iterator[str | int]:
    """What comes of calls of every kind, in turn."""
    settings = [
        Setting(team=BLOCK), Setting(team=CLUSTER), Setting(team=GRID, team_blocks=3, teams=2),
        Setting(team=GRID, team_blocks=2, teams=1), Setting(family=STREAMING, info=SMALL),
        Setting(family=-1, info=SMALL),
    ]  # fmt: skip
    # The second: whole tiles in a group of four of which the last has three.
    layouts = [
        ((9, 7, 17, 4), NCHW), ((16, 7, 16, 4), NCHW), ((9, 67, 5, 2), NHWC),
        ((9, 21, 7, 4), NCHW),
    ]  # fmt: skip
    for setting in settings:
        for layout in layouts:
            case = make(*layout, DTYPES[0], residual=True)
            case.x[:, 1] *= 1e30  # sums of its products are summed again, in double
            case.grad_out[:, 1] *= 1e20
            frozen = setting.family == -1
            stage = "eval" if frozen else "train"
            stats = calls.save_stats(case.running_mean, case.running_var)
            mask = masks.pack(case.grad_out > 0, case.x, cuda=True)
            if setting.family == STREAMING:
                p = calls.problem(case.x, "train_forward", need_input=False)
                plan = calls.with_team(setting.plan(e, p), p, 3)
                yield attempt(calls.forward, e, plan, p, case.x, moments=torch.empty_like(stats))
            for act, masked in (("relu", True), ("relu", False), ("silu", False)):
                fields = {"act": act, "residual": masked}
                p = calls.problem(case.x, f"{stage}_forward", **fields)
                yield attempt(calls.forward, e, setting.plan(e, p), p, case.x, bias=case.bias,
                              residual=case.residual if masked else None,
                              frozen=case.stats if frozen else None)  # fmt: skip
                p = calls.problem(case.x, f"{stage}_backward", **fields)
                yield attempt(calls.backward, e, setting.plan(e, p), p, case.grad_out, case.x,
                              mask=mask if masked else None,
                              save_stats=None if frozen else stats,
                              frozen=case.stats if frozen else None)  # fmt: skip
                if setting.family != RESIDENT and act == "relu":
                    p = calls.problem(case.x, "double_backward", act=act, has_mask=masked)
                    by = (case.residual, case.weight, case.bias, case.residual)
                    yield attempt(calls.double_backward, e, calls.plan(e, p, SMALL), p, by,
                                  case.grad_out, case.x, weight=case.weight, bias=case.bias,
                                  mask=mask if masked else None,
                                  save_stats=None if frozen else stats,
                                  frozen=case.stats if frozen else None)  # fmt: skip


def attempt(call, e: emulated.Emulator, *args, **kwargs) -> str | int:
    """The error, or the bytes of tensors that were read."""
    e.statistics()
    try:
        call(e, *args, **kwargs)
    except calls.EmulatorError as error:
        return str(error)
    return e.statistics().bytes_read


def test_there_is_something_to_remove() -> None:
    found = {what for *_, what in SITES}
    for what in ("sync_block", "sync_cluster", "arrive_cluster", "wait_cluster", "sync_grid"):
        assert f"{what}();" in found
    assert {"commit_copies();", "any_of_block(any)", "!items.valid(k)"} <= found


@pytest.fixture(scope="module")
def right(emulator) -> list[str | int]:
    emulator.library.bnext_set_defect(-1)
    return list(outcomes(emulator))


def test_nothing_is_found_where_nothing_is_removed(right) -> None:
    assert not [outcome for outcome in right if isinstance(outcome, str)]


@pytest.mark.parametrize("number", range(len(SITES)), ids=lambda i: "-".join(map(str, SITES[i])))
def test_every_removal_is_found(emulator, right, number) -> None:
    emulator.library.bnext_set_defect(number)
    assert any(got != wanted for got, wanted in zip(outcomes(emulator), right, strict=True))
