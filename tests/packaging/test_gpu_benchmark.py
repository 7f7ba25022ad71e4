"""What runs on a GPU, as far as it runs without one: the benchmarks' pipeline and on_gpu.sh."""

import csv
import os
import subprocess
from pathlib import Path

import pytest
import torch

import bnext
from benchmarks import __main__ as command
from benchmarks import cases, check, cpu_clock, dram, gpu, gpu_clock, providers, report, resnet50
from benchmarks.cpu_clock import Timing

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "on_gpu.sh"
QUICK = ["gpu", "--device", "cpu", "--quick", "--no-compile", "--budget", "0.01"]


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def timed(*milliseconds: float) -> Timing:
    return Timing([ms / 1e3 for ms in milliseconds], [])


def test_every_case_can_be_made_and_the_wanted_ones_are_there() -> None:
    full = cases.full()
    assert len(set(full)) == len(full)
    for dtype in cases.DTYPES:
        for layout in cases.LAYOUTS:
            for batch in cases.BATCHES:
                own = [c for c in full if (c.dtype, c.layout, c.variant) == (dtype, layout, "bn")]
                assert sum(c.layers for c in own if c.shape[0] == batch) == 53
    sizes = {case.size for case in full}
    assert {"125000x50", "6000000x1", "64x64x512x512"} <= sizes
    assert {len(case.shape) for case in full} == {2, 4, 5}
    for case in full:
        x = torch.empty(case.shape, device="meta").to(memory_format=case.memory_format)
        assert x.numel() * cases.DTYPES[case.dtype].itemsize == case.bytes


def test_quick_run_writes_csv_and_plots(tmp_path) -> None:
    assert command.main([*QUICK, "--filter", "7x7|125x", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "gpu.csv")
    some = cases.matching(cases.quick(), "7x7|125x")
    names = {"copy", "bnext", "eager"}
    modes = {*command.DEFAULT_MODES}
    assert len(rows) == len(some) * len(cases.DIRECTIONS) * len(modes) * len(names)
    assert {row["provider"] for row in rows} == names
    assert {row["mode"] for row in rows} == modes
    assert {row["variant"] for row in rows} == set(cases.VARIANTS)
    for row in rows:
        assert float(row["lower_quartile_ms"]) <= float(row["median_ms"])
        assert float(row["useful_gb_per_s"]) > 0 and float(row["share_of_copy"]) > 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "gpu.csv", "gpu-bandwidth.png", "gpu-speedup.png"
    }  # fmt: skip


def test_no_time_left_is_said_and_fails(tmp_path, capsys) -> None:
    assert command.main([*QUICK, "--minutes", "0", "--out", str(tmp_path)]) == 1
    assert "nothing was timed" in capsys.readouterr().out


@pytest.mark.parametrize("variant", cases.VARIANTS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_wrong_kernel_is_found(variant, layout, monkeypatch) -> None:
    case = cases.Case((3, 8, 5, 5), "float32", layout, variant)
    operands = case.operands(torch.device("cpu"))

    def failures() -> dict[str, list[str]]:
        subjects = {p: providers.Subject.of(p, case, operands) for p in ("bnext", "eager")}
        return {p: v.failures for p, v in check.check(case, subjects).items()}

    assert failures() == {"bnext": [], "eager": []}
    forward = providers.Subject.forward

    def wrong(subject):
        output = forward(subject)
        return output * 1.001 if subject.provider == "bnext" else output

    monkeypatch.setattr(providers.Subject, "forward", wrong)
    found = failures()
    assert found["bnext"] and not found["eager"]


def test_bnext_wrong_is_exit_status_1(tmp_path, monkeypatch) -> None:
    wrong = {"bnext": check.Verdict(1.0, ["x bnext output: error"]), "eager": check.Verdict(0, [])}
    monkeypatch.setattr(gpu, "check", lambda case, subjects: wrong)
    assert command.main([*QUICK, "--filter", "125x", "--out", str(tmp_path)]) == 1


def test_an_error_in_one_case_does_not_lose_the_others(tmp_path, monkeypatch) -> None:
    working = gpu.check

    def broken(case, subjects):
        if len(case.shape) == 2:
            raise RuntimeError("broken")
        return working(case, subjects)

    monkeypatch.setattr(gpu, "check", broken)
    assert command.main([*QUICK, "--filter", "7x7.* bn$|125x", "--out", str(tmp_path)]) == 1
    assert {row["shape"] for row in read(tmp_path / "gpu.csv")} == {"4x512x7x7"}


def test_statistics() -> None:
    case = cases.Case((4, 8, 10, 10), "float32", "nchw", "bn", layers=3)
    key = report.Key(case, "backward", "cold graph")
    peers = {"copy": timed(1, 1, 1), "bnext": timed(2, 2, 9), "eager": timed(6, 6, 6)}
    peers["compile"] = timed(4, 4, 4)
    assert report.ceiling_ms(key, peers) == pytest.approx(1.5)
    assert report.speedups({key: peers}, report.best_peer_ms) == [pytest.approx(2)]
    assert report.speedups({key: peers}, report.eager_ms) == [pytest.approx(3)]
    other = report.Key(cases.Case((2, 8), "float32", "nchw", "bn"), "backward", "cold graph")
    assert report.network_speedup({other: peers}, report.eager_ms) is None
    slower = {**peers, "bnext": timed(4, 4, 4)}
    once = report.Key(cases.Case((4, 8, 5, 5), "float32", "nchw", "bn", 1), *key[1:])
    # 3 layers of 2 against 6 ms, one of 4 against 6.
    network = report.network_speedup({key: peers, once: slower}, report.eager_ms)
    assert network == pytest.approx((3 * 6 + 6) / (3 * 2 + 4))
    costs = {(case, "backward", "bnext"): report.Cost(2**20, ["a", "cudnn::b"])}
    rows = {row["provider"]: row for row in report.gpu_rows({key: peers}, costs)}
    assert rows["bnext"]["share_of_copy"] == "0.75" and rows["copy"]["share_of_copy"] == "1"
    assert rows["bnext"]["launches"] == 2 and rows["bnext"]["uses_cudnn"] is True
    assert rows["bnext"]["peak_mib"] == "1.0" and rows["eager"]["launches"] == ""
    assert float(rows["bnext"]["useful_gb_per_s"]) == pytest.approx(3 * case.bytes / 2e-3 / 1e9)


def test_rounds_and_parts() -> None:
    assert cpu_clock.rounds_within(1.0, 0.1) == 10
    assert cpu_clock.rounds_within(0.0, 1.0) == cpu_clock.LEAST_ROUNDS
    assert cpu_clock.rounds_within(1.0, 0.0) == cpu_clock.MOST_ROUNDS
    assert list(gpu_clock.parts(["a", "| 1", "b", "c", "| 2", "| 3", "d"], "|")) == [
        ["b", "c"], [], ["d"],
    ]  # fmt: skip
    assert list(gpu_clock.parts(["a"], "|")) == []


def test_gpu_clock(device) -> None:
    if device.type == "cpu":
        assert cpu_clock.CpuClock().time(list, gpu_clock.MODES["warm eager"], 0.0).ms >= 0
        return
    on_gpu = gpu_clock.CudaClock(device)
    with on_gpu.stream_in_use():
        x = torch.ones(2**20, device=device)
        for mode in gpu_clock.MODES.values():
            assert 1e-4 < on_gpu.time(x.clone, mode, 1e-3).ms < 10
        assert on_gpu.peak_bytes(x.clone) == x.numel() * 4
        launches = on_gpu.launches({"one": x.relu, "two": lambda: (x + 1).relu()})
        assert [len(kernels) for kernels in launches.values()] == [1, 2]


def test_dram_counts() -> None:
    line = '"{}","1","python","host","{}","1","7","(1)","(1)","0","9.0","","{}","byte","{}"\n'
    header = (
        '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream",'
        '"Block Size","Grid Size","Device","CC","Section Name","Metric Name","Metric Unit",'
        '"Metric Value"\n'
    )
    text, number = ["==PROF== Connected\n", header], 0
    for case, _ in dram.PLAN:
        e = case.bytes
        sequence = ("spin_kernel(long)", 0, 0), ("bnext, one", 2 * e, e), ("bnext", 0, 0)
        for name, read_bytes, written in (*sequence, sequence[0], ("reduce", 7 * e, e // 4)):
            for metric, value in zip(dram.METRICS, (read_bytes, written), strict=True):
                text.append(line.format(number, name, metric, f"{value:,}"))
            number += 1
    rows = dram.rows(dram.calls(dram.kernels(text)))
    assert len(rows) == len(dram.PLAN)
    assert {row["tensors_moved"] for row in rows} == {"3.250"}
    assert {row["kernels"] for row in rows} == {2}


def test_resnet50_is_the_network_of_the_shapes() -> None:
    with torch.device("meta"):
        net = resnet50.ResNet50()
    assert sum(p.numel() for p in net.parameters()) == 25_557_032
    seen: list[tuple[int, int]] = []
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda m, args, y: seen.append((y.shape[1], y.shape[2])))
    net(torch.empty(2, 3, 224, 224, device="meta"))
    assert {s: seen.count(s) for s in seen} == {
        (s.channels, s.size): s.layers for s in cases.RESNET50
    }


def test_resnet50s_are_the_same_network_with_the_norms_they_name() -> None:
    nets = [resnet50.model(name) for name in resnet50.NORMS]
    for ours in nets[1:]:
        for a, b in zip(nets[0].parameters(), ours.parameters(), strict=True):
            assert torch.equal(a, b)
        kinds = [type(m) for m in ours.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert len(kinds) == 53 and all(kind.__module__ == "bnext.modules" for kind in kinds)
    assert len(bnext.conversion_report(nets[2]).fused) == 49


def test_resnet50_smoke_run(tmp_path, monkeypatch) -> None:
    for name in [*resnet50.PRECISIONS]:
        if "AMP" in name:  # slow on many CPUs
            monkeypatch.delitem(resnet50.PRECISIONS, name)
    settings = resnet50.Settings(torch.device("cpu"), batch=4, size=64, steps=1, budget_s=0)
    assert resnet50.run(tmp_path, report.provenance(), settings, minutes=5, with_compile=False) == 0
    rows = read(tmp_path / "resnet50.csv")
    assert len(rows) == len(resnet50.PRECISIONS) * len(resnet50.NORMS)
    assert all(float(row["images_per_s"]) > 0 for row in rows)


def on_gpu(out: Path, *parts: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, out, *parts], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_on_gpu_dry_run_prints_every_part(tmp_path) -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    result = on_gpu(tmp_path / "out", BNEXT_DRY_RUN="1", PYTHON="nowhere/python")
    assert result.returncode == 0, result.stderr
    for command_line in (
        "setup.py build_ext --inplace", "FAIL_WITHOUT_CUDA=1 nowhere/python -m pytest",
        "bnext.verify --device cuda --small", "--ignore tests/native", "benchmarks gpu",
        "benchmarks resnet50", "benchmarks dram",
        *(f"--tool {tool}" for tool in ("memcheck", "racecheck", "synccheck", "initcheck")),
    ):  # fmt: skip
        assert command_line in result.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"summary.txt", "logs", "done"}


def test_on_gpu_refuses_what_it_does_not_know(tmp_path) -> None:
    for arguments in ((tmp_path, "tests"), ("--all",)):
        result = on_gpu(*arguments, BNEXT_DRY_RUN="1")
        assert result.returncode == 2 and "on_gpu.sh OUT" in result.stdout


def test_on_gpu_goes_on_after_a_failure_and_reports_it(tmp_path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *bnext.verify*) exit 3 ;; esac\n')
    python.chmod(0o755)
    result = on_gpu(tmp_path / "out", "verify", "bench", PYTHON=str(python))
    assert result.returncode == 1
    lines = result.stdout.partition("=== summary\n")[2].splitlines()
    assert [line.partition(" after")[0] for line in lines] == [
        "build: exit status 0", "verify: exit status 3", "bench: exit status 0",
    ]  # fmt: skip
    again = on_gpu(tmp_path / "out", "verify", "bench", PYTHON=str(python))
    assert again.returncode == 1
    assert "=== verify" in again.stdout and "=== bench" not in again.stdout, "that is done"
    assert on_gpu(tmp_path / "out", "bench", PYTHON=str(python)).returncode == 0


def test_on_gpu_stops_when_the_build_fails(tmp_path) -> None:
    result = on_gpu(tmp_path / "out", "bench", PYTHON="false")
    assert result.returncode == 1 and "=== bench" not in result.stdout
