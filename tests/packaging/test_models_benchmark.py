"""`python -m benchmarks models`, on small models in the place of other libraries'."""

import csv
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bnext
from benchmarks import models
from benchmarks.__main__ import main

LIBRARIES = dict(models.LIBRARIES)
SHAPE = (4, 3, 6, 6)
MAP = 4 * 5 * 6 * 6 * 4  # bytes of five channels in float32


class Net(nn.Module):
    """Three batch norms: one before a ReLU, one before nothing, one that is not converted."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.relu = nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU()
        self.bn2, self.other = nn.BatchNorm2d(5), type("OtherBatchNorm", (nn.BatchNorm2d,), {})(5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.relu(self.bn1(self.conv(x)))
        return {"out": self.other(self.bn2(x).exp()), "index": x.argmax(1)}


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU())


def made(name: str) -> models.Made:
    if name == "broken":
        raise RuntimeError("no such [model]")
    return {"net": Net, "plain": Plain}[name](), SHAPE


@pytest.fixture(autouse=True)
def _library(monkeypatch) -> None:
    monkeypatch.setattr(models, "LIBRARIES", {"torch": (made, "net broken plain")})


def run(folder: Path, *arguments: str) -> tuple[int, list[dict[str, str]], list[str]]:
    code = main(["models", "--budget", "0", "--out", str(folder), *arguments])
    with (folder / "models.csv").open() as file:
        facts, lines = [], []
        for line in file:
            (facts if line.startswith("#") else lines).append(line)
    return code, [*csv.DictReader(lines)], facts


def test_counts_bytes_and_reasons(tmp_path, capsys) -> None:
    code, (row,), facts = run(tmp_path, "--filter", "torch net")
    assert code == 0 and f"# torch: {torch.__version__}\n" in facts
    assert (row["batch_norms"], row["converted"], row["fused"]) == ("3", "2", "1")
    assert (int(row["bytes"]), int(row["fused_bytes"])) == (3 * MAP, MAP)
    assert float(row["eval_error"]) < 1e-5 and float(row["train_error"]) < 1e-12
    assert row["reasons"].count("1x ") == 2 and "a subclass" in row["reasons"]
    assert float(row["eager_ms"]) > 0 and float(row["time_over_eager"]) > 0
    printed = capsys.readouterr().out
    assert "torch net" in printed and "3 batch norms: 2 converted, 1 fused" in printed
    assert "a subclass" in " ".join(printed.split())


def test_bytes_kept_for_backward(tmp_path) -> None:
    _, (row,), _ = run(tmp_path, "--filter", "plain")
    # The convolution's input, the batch norm's, and the ReLU's output, which the loss keeps too.
    large = 4 * 3 * 6 * 6 * 4 + 2 * MAP
    assert int(row["eager_saved_bytes"]) == large + 2 * 5 * 4  # mean and invstd
    assert large < int(row["bnext_saved_bytes"]) <= large + 5 * 40
    silu, x = nn.SiLU(), torch.randn(SHAPE, requires_grad=True)
    assert models._saved_bytes(silu, x) == 2 * x.nbytes  # its input and output
    assert models._saved_bytes(nn.Linear(6, 6), x) == 2 * x.nbytes  # without the weight


def test_a_model_that_fails_is_a_row_and_ends_nothing(tmp_path, capsys) -> None:
    code, rows, _ = run(tmp_path)
    assert code == 1 and [row["model"] for row in rows] == ["net", "broken", "plain"]
    assert "RuntimeError: no such [model] (test_models_benchmark.py:" in rows[1]["failure"]
    assert not rows[0]["failure"] and not rows[2]["failure"]
    assert "no such [model]" in capsys.readouterr().out


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_wrong_conversion_is_found(training, tmp_path, capsys, monkeypatch) -> None:
    forward = bnext.BatchNorm2d._normalize

    def wrong(self: nn.Module, *arguments: object) -> Tensor:
        return forward(self, *arguments) * (1.0001 if self.training is training else 1)

    monkeypatch.setattr(bnext.BatchNorm2d, "_normalize", wrong)
    code, _, _ = run(tmp_path, "--filter", "plain")
    assert code == 1 and "wrong" in capsys.readouterr().out


def test_nan_is_wrong() -> None:
    nan = [torch.zeros(2), torch.tensor([1.0, float("nan")])]
    assert models.Row("", "", eval_error=models._difference(nan, [torch.ones(2)] * 2)).is_wrong
    assert not models.Row("", "", eval_error=1e-6, train_error=1e-12).is_wrong
    assert models.Row("", "", train_error=1e-7).is_wrong
    assert not models.Row("", "", train_error=1e-7, eager_train_error=1e-7).is_wrong
    assert models.Row("", "", train_error=0.1, eager_train_error=0.1).is_wrong


def test_what_cancels_is_no_difference_and_eager_s_own_is_measured(monkeypatch) -> None:
    noise = torch.tensor([1e-18])
    assert models._difference([noise], [2 * noise]) < 1e-11
    assert models.measure("torch", "plain", 0.0).eager_train_error == 0
    monkeypatch.setattr(models, "TRAIN_TOLERANCE", -1.0)
    assert 0 < models.measure("torch", "plain", 0.0).eager_train_error < 1e-12


def test_quick_takes_one_of_each_installed_library(monkeypatch) -> None:
    libraries = {"torch": (made, "a b"), "pytest": (made, "c d"), "not-there": (made, "e")}
    monkeypatch.setattr(models, "LIBRARIES", libraries)
    assert [*models.names("", quick=True)] == [("torch", "a"), ("pytest", "c")]
    assert [*models.names("h b|pytest", quick=False)] == [
        ("torch", "b"), ("pytest", "c"), ("pytest", "d")
    ]  # fmt: skip


def test_without_a_library_it_says_what_to_install(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(models, "LIBRARIES", {"not-there": (made, "net")})
    assert main(["models", "--out", str(tmp_path)]) == 2
    assert "none of not-there is installed: pip install" in capsys.readouterr().err


def test_every_model_is_named_once() -> None:
    named = [f"{library} {m}" for library, (_, some) in LIBRARIES.items() for m in some.split()]
    assert len(set(named)) == len(named) > 80
