"""`python -m bnext.verify`: passes here, and fails when a kernel is wrong."""

import re
import subprocess
import sys

import pytest
import torch

import bnext
from bnext import verify
from bnext._extension import _C


def run(monkeypatch, damage=None, arguments=("--device", "cpu", "--small")):
    """Exit status and text of `main`, with `damage` done to the output of every batch norm.

    In this process, so with the instruction set that it has chosen.
    """
    monkeypatch.setenv(verify.CAPABILITY, _C.cpu_device_info(1).isa)
    normalize = verify.normalize
    if damage is not None:
        monkeypatch.setattr(verify, "normalize", lambda *args: damage(normalize(*args), args))
    lines: list[str] = []
    return verify.main(arguments, lines.append), "\n".join(map(str, lines))


def test_passes_as_a_command() -> None:
    command = [sys.executable, "-m", "bnext.verify", "--device", "cpu", "--small"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    cases = len(verify.SMALL) * len(verify.DTYPES) * len(verify.MODES)
    isas = verify.instruction_sets()
    assert result.stdout.count(f"all {cases} cases are right\n") == len(isas)
    assert re.findall(r"bnext on cpu \((\w+)\)", result.stdout) == isas
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_one_wrong_instruction_set_fails(monkeypatch) -> None:
    statuses = {"default": 0, "avx2": 1, "avx512": 0}
    monkeypatch.setattr(verify, "instruction_sets", lambda: [*statuses])
    monkeypatch.setattr(verify, "_in_a_process", lambda isa, *_: statuses[isa])
    assert verify.main(["--device", "cpu"], print) == 1


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there_is_one_line(device, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        verify.main(["--device", device], print)
    said = capsys.readouterr()
    assert said.err.startswith("python -m bnext.verify: argument --device: ")
    assert said.err.count("\n") == 1 and not said.out


def test_passes_on_every_device(device, monkeypatch) -> None:
    status, text = run(monkeypatch, arguments=("--device", str(device)))
    assert status == 0, text


def off_by_a_rounding(output, args):
    return output * (1 + 4 * torch.finfo(output.dtype).eps)


def one_element_missing(output, args):
    mask = torch.ones_like(output)
    mask.view(-1)[-1] = torch.nan
    return output * mask


def gradient_doubled(output, args):
    output.register_hook(lambda gradient: 2 * gradient)
    return output


def statistics_forgotten(output, args):
    args[4].fill_(0.5)
    return output


def counter_forgotten(output, args):
    args[6].fill_(3)
    return output


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (off_by_a_rounding, "output"),
        (one_element_missing, "output"),
        (gradient_doubled, "grad_input"),
        (statistics_forgotten, "running_mean"),
        (counter_forgotten, "num_batches_tracked"),
    ],
)
def test_fails_when_a_result_is_wrong(damage, what, monkeypatch) -> None:
    monkeypatch.setattr(verify, "SMALL", verify.SMALL[:1])
    status, text = run(monkeypatch, damage)
    assert status == 1
    assert re.search(rf"FAILED .* {what}: \S+ times the bound", text), text
    assert re.search(r"\d+ FAILURES$", text)


def test_fails_when_two_runs_differ(monkeypatch) -> None:
    calls = iter(range(10**9))

    def last_bit(output, args):
        return output * (1 + next(calls) % 2 * torch.finfo(output.dtype).eps)

    status, text = run(monkeypatch, last_bit)
    assert status == 1 and "not the same bits twice" in text


def test_fails_when_the_op_raises(monkeypatch) -> None:
    def broken(*args):
        raise RuntimeError("an illegal memory access\nand more")

    monkeypatch.setattr(verify, "normalize", broken)
    status, text = run(monkeypatch)
    assert status == 1 and "RuntimeError: an illegal memory access" in text


def test_a_choice_that_runs_nothing_fails(monkeypatch) -> None:
    def refused(*args):
        raise RuntimeError("BNEXT_CUDA_TEAM=grid: this does not fit")

    monkeypatch.setattr(verify, "normalize", refused)
    status, text = run(monkeypatch)
    assert status == 1 and "no case could be run" in text


@pytest.mark.parametrize(
    "case", [verify.Case(*verify.SMALL[2], "float32", *mode) for mode in verify.MODES], ids=str
)
def test_results_are_poisoned_and_operands_are_not(case, monkeypatch) -> None:
    t, exact = (case.operands(torch.device("cpu")) for _ in range(2))
    kept = []
    run = verify.run
    monkeypatch.setattr(verify, "run", lambda *args: kept.append(run(*args)) or kept[-1])
    row = verify.Row()
    verify.check(case, t, exact, False, row)
    assert row.cases == 1 and not row.failures
    assert all(a is b or torch.equal(a, b) for a, b in zip(t, exact, strict=True))
    assert len(kept) == 2
    for results in kept:
        alias = {"grad_residual"} if case.residual and not case.relu else set()
        for name in results.keys() - alias - {"num_batches_tracked"}:
            assert results[name].isnan().all(), name


def test_forcing_sets_the_environment_and_restores_it(monkeypatch) -> None:
    monkeypatch.setenv("BNEXT_CUDA_FAMILY", "streaming")
    monkeypatch.delenv("BNEXT_CUDA_TEAM", raising=False)
    with verify.forced(("resident", "grid")):
        assert verify.os.environ["BNEXT_CUDA_FAMILY"] == "resident"
        assert verify.os.environ["BNEXT_CUDA_TEAM"] == "grid"
    with verify.forced(("", "")):
        assert verify.os.environ["BNEXT_CUDA_FAMILY"] == "streaming"
    assert verify.os.environ["BNEXT_CUDA_FAMILY"] == "streaming"
    assert "BNEXT_CUDA_TEAM" not in verify.os.environ


@pytest.mark.skipif(bnext.build_info()["cuda"], reason="built with CUDA")
def test_says_that_there_are_no_cuda_kernels(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="2"):
        verify.main(["--device", "cuda"], print)
    assert "cuda: bnext was built without CUDA: " in capsys.readouterr().err
