"""The benchmarks' command line: wrong arguments, interruptions, and what is made of the figures."""

import csv
import sys
from pathlib import Path

import pytest
import torch

import benchmarks
import bnext
from benchmarks import __main__ as command
from benchmarks import accuracy, cpu_clock, models, report, sass, summary
from benchmarks.cases import Case
from benchmarks.cpu_clock import Timing

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NO_GPU = not (bnext.build_info()["cuda"] and torch.cuda.is_available())
needs_no_gpu = pytest.mark.skipif(not NO_GPU, reason="there is a GPU")


def timed(*milliseconds: float) -> Timing:
    return Timing([ms / 1e3 for ms in milliseconds], [0 for _ in milliseconds])


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def status(arguments: list[str]) -> int:
    try:
        return command.main(arguments)
    except SystemExit as left:  # by argparse
        assert isinstance(left.code, int)
        return left.code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("kernels --filter nothing", "'nothing' matches none of 192 cases, such as 32x64x112x112"),
        ("--filter (", "expected a regular expression, got '(': missing )"),
        ("gpu --device cpu --filter nothing", "'nothing' matches none of"),
        ("models --filter ^nothing", "pip install" if models.installed() == [] else "no model of"),
        ("models --filter [", "expected a regular expression, got '['"),
        ("train --epochs -1", "--epochs: expected a whole number of at least 1, got '-1'"),
        ("train --epochs 1.5", "--epochs: expected a whole number of at least 1, got '1.5'"),
        ("kernels --threads -3", "--threads: expected a whole number of at least 1, got '-3'"),
        ("kernels --batch 0", "--batch: expected a whole number of at least 1, got '0'"),
        ("kernels --budget -1", "--budget: expected a number of at least 0, got '-1'"),
        ("kernels --budget nan", "--budget: expected a number of at least 0, got 'nan'"),
        ("gpu --device cpu --minutes soon", "--minutes: expected a number of at least 0"),
        ("resnet50 --device cpu --size 0", "--size: expected a whole number of at least 1"),
        ("sync --batch 0", "--batch: expected a whole number of at least 1, got '0'"),
        ("sync", "start it as torchrun"),
        ("claims --seeds 1", "--seeds: expected a whole number of at least 2, got '1'"),
        ("claims --data nowhere", "--data: nowhere: expected the files of MNIST"),
        ("claims --only all", "invalid choice: 'all'"),
        ("gpu --device nonsense", "expected cpu, cuda or cuda:<number>, got 'nonsense'"),
        ("accuracy --device meta", "expected cpu, cuda or cuda:<number>, got 'meta'"),
        ("summary nowhere.csv", "expected a kernels.csv, got nowhere.csv"),
        ("summary README.md", "expected a kernels.csv, got README.md"),
        ("summary benchmarks/results/sass/sass.csv", "expected a kernels.csv, got benchmarks/"),
        ("kernel", "invalid choice: 'kernel'"),
        ("sass --filter (", "expected a regular expression"),
        ("sass --arch nonsense", "--arch: expected an architecture such as sm_90, got 'nonsense'"),
        pytest.param("gpu", "--device: cuda: torch finds no GPU", marks=needs_no_gpu),
        pytest.param("resnet50", "--device: cuda: torch finds no GPU", marks=needs_no_gpu),
        pytest.param("demo --device cuda:1", "cuda:1: torch finds no GPU", marks=needs_no_gpu),
        pytest.param("dram", "torch finds no GPU", marks=needs_no_gpu),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments, words, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    command_name, *rest = arguments.split()
    assert status([command_name, *rest, "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(report, "provenance", lambda quick: pytest.fail("went on"))
    (tmp_path / "file").touch()
    assert status(["kernels", "--out", str(tmp_path / "file" / "inside")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"--out: cannot write to {tmp_path / 'file'}: Not a directory" in said


def test_dram_without_its_profiler_is_one_line(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status(["dram", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "ncu (Nsight Compute) is not on PATH\n" in capsys.readouterr().err


def test_a_filter_of_counts_that_matches_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sass, "objects", list)
    monkeypatch.setattr(sass, "compile_kernels", lambda wanted: tmp_path)
    assert status(["sass", "--filter", "nothing", "--out", str(tmp_path / "out")]) == 2
    assert "--filter: 'nothing' matches no kernel\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "file"),
    [
        ("kernels --quick --no-compile --filter 7x7.*float32.*bn$", "kernels.csv"),
        ("train --quick", "train.csv"),
        ("gpu --quick --no-compile --device cpu --filter 125x --budget 0", "gpu.csv"),
    ],
)
def test_without_matplotlib_nothing_measured_is_lost(
    arguments, file, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.plots", raising=False)
    monkeypatch.delattr(benchmarks, "plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert status([*arguments.split(), "--out", str(tmp_path)]) == 0
    assert "No plots: " in capsys.readouterr().out
    assert read(tmp_path / file) and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("name", ["kernels", "overhead", "train", "gpu"])
def test_an_interruption_keeps_what_was_measured(name, tmp_path, monkeypatch, capsys) -> None:
    left = iter(range({"gpu": 50}.get(name, 3)))

    def interrupted(function):
        def call(*args, **kwargs):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    from benchmarks import train

    monkeypatch.setattr(cpu_clock, "alternate", interrupted(cpu_clock.alternate))
    monkeypatch.setattr(cpu_clock.CpuClock, "time", interrupted(cpu_clock.CpuClock.time))
    monkeypatch.setattr(train.Run, "epoch", interrupted(train.Run.epoch))
    more = {"kernels": ["--no-compile"], "gpu": ["--no-compile", "--device", "cpu"]}
    threads = torch.get_num_threads()
    try:
        assert status([name, "--quick", "--out", str(tmp_path), *more.get(name, [])]) == 130
    finally:
        torch.set_num_threads(threads)
    assert f"What was measured is in {tmp_path}" in capsys.readouterr().err
    assert read(tmp_path / f"{name}.csv")


def measured(path: Path) -> summary.Times:
    """A kernels.csv with a fast forward and a slow backward, and what it is read as."""
    timings: report.Timings = {}
    for variant, times in ("bn", (6, 4)), ("bn_add_relu", (1, 7)):
        case = Case((4, 8, 5, 5), "float32", "nchw", variant)
        for direction, eager in zip(("forward", "backward"), times, strict=True):
            for allocator, ours in ("fresh", 2), ("warm", 1):
                timings[report.Key(case, direction, allocator)] = {
                    "copy": timed(1, 1), "bnext": timed(ours, ours), "eager": timed(eager, eager)
                }  # fmt: skip
    facts = {"cpu": "a CPU", "isa": "avx2, torch AVX2", "threads": "2"}
    report.write_csv(path, facts, report.cpu_rows(timings))
    times = summary.times(summary.read(path)[1])
    assert times == report.times(timings)
    return times


def test_the_summary_is_of_the_file(tmp_path, capsys) -> None:
    file = tmp_path / "kernels.csv"
    times = measured(file)
    assert command.main(["summary", str(file), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    headline = "on a CPU (avx2, torch AVX2), 2 threads: batch norm forward 3.00, batch norm "
    assert headline + "backward 2.00, BN + add + ReLU 2.00 (fused" in said
    assert "| forward, float32, NCHW | 3.00 (3.00) | 6.00 (6.00) | 1.00 (1.00) |" in said
    assert "| backward, float32, NCHW | 2.00 (2.00) | 4.00 (4.00) | 1.50 (1.50) |" in said
    assert "| float32, NCHW |  |  | 2.00 (2.00) |" in said
    assert (tmp_path / "speedup.png").stat().st_size > 1000
    assert summary.speedups(times, "eager", variant="bn", direction="both") == [10 / 4, 10 / 2]


def test_the_demo_says_five_things(tmp_path, capsys) -> None:
    threads = torch.get_num_threads()
    try:
        assert command.main(["demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = read(tmp_path / "demo.csv")
    names = ["forward", "backward", "BN + add + ReLU", "ResNet-50", "a call"]
    assert [row["what"] for row in rows] == names
    assert all(0 < float(row["worst"]) <= float(row["best"]) for row in rows)
    said = capsys.readouterr().out
    assert "its figures mean nothing" in said and (tmp_path / "demo.png").is_file()
    lines = said[said.index("Times as fast") :].splitlines()
    assert [line[2:17].strip() for line in lines[1:6]] == names
    assert max(map(len, lines[:6])) <= 80


def test_nothing_is_timed_where_bnext_is_wrong(tmp_path, monkeypatch) -> None:
    from benchmarks import check, kernels

    wrong = {"bnext": check.Verdict(1.0, ["wrong"]), "eager": check.Verdict(0.0, [])}
    monkeypatch.setattr(kernels, "check", lambda case, subjects: wrong)
    monkeypatch.setattr(kernels, "measure", lambda *args: pytest.fail("timed"))
    assert command.main(["demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "demo.csv").exists()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("mean", [0, 100, 10_000])
def test_accuracy_sees_an_error_of_one_result(layout, mean, monkeypatch) -> None:
    monkeypatch.setattr(accuracy, "SHAPE", (4, 3, 5, 5))
    t = accuracy.operands(torch.float32, layout, mean, torch.device("cpu"))
    right = accuracy.errors(bnext.functional.batch_norm, t)
    assert set(right) == set(accuracy.RESULTS) and max(right.values()) < 5e-7

    def wrong(x, running_mean, *args):
        y = bnext.functional.batch_norm(x, running_mean, *args)
        running_mean += 0.01 * (1 + mean)
        return y * 1.5

    found = accuracy.errors(wrong, t)
    assert found["output"] == pytest.approx(0.5, rel=1e-3)
    assert found["grad_input"] == pytest.approx(0.5, rel=1e-3)
    assert found["running_mean"] > 5e-3 and found["running_var"] == right["running_var"]


def test_accuracy_writes_both_and_the_table_takes_the_worse_layout(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(accuracy, "SHAPE", (4, 3, 5, 5))
    arguments = ["accuracy", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    rows = read(tmp_path / "accuracy.csv")
    assert len(rows) == 2 * 2 * sum(map(len, accuracy.MEANS.values()))
    table = accuracy.table(rows)
    assert table in capsys.readouterr().out
    some = [r for r in rows if (r["dtype"], r["mean_over_std"]) == ("float32", "100")]
    worst = [max(float(r["dx"]) for r in some if r["provider"] == p) for p in ("torch", "bnext")]
    assert f"{worst[0]:.0e}, {worst[1]:.0e}" in table


def test_torch_s_wrong_gradient_is_not_ours() -> None:
    assert accuracy.wrong_gradient()["bnext"] < 1e-6
