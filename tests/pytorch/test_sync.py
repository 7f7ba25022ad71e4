"""SyncBatchNorm in 2, 3 and 4 gloo processes; what runs in them is in sync_checks.py.

Each number of processes is started once, and all functions of FUNCTIONS run there in turn.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from pytorch.sync_checks import FUNCTIONS

TESTS = Path(__file__).resolve().parents[1]
CHECKS = Path(__file__).with_name("sync_checks.py")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def outputs_of(what: str, ranks: int) -> list[str]:
    """What each of so many processes wrote; where the last one is lost, the others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, CHECKS, what, str(rank), str(ranks), port], cwd=TESTS,
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        heard = processes if what == "all" else processes[:-1]
        return [process.communicate(timeout=300)[0] for process in heard]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module", params=[2, 3, 4])
def processes(request) -> list[str]:
    return outputs_of("all", request.param)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_in_processes(processes, function) -> None:
    for output in processes:
        assert f"done {function.__name__}\n" in output, output[-3000:]


@pytest.mark.parametrize(
    ("ranks", "how"), [(2, "ends"), (2, "hangs"), (3, "ends"), (3, "is in eval mode")]
)
def test_a_process_is_lost(ranks, how) -> None:
    for output in outputs_of(how, ranks):
        assert "done loses_a_rank\n" in output, output[-3000:]


def test_the_readmes_example_learns_digits(tmp_path) -> None:
    readme = (TESTS.parent / "README.md").read_text()
    (code,) = re.findall(
        r"```python\n(import torch\nimport torch\.distributed.*?)```", readme, re.S
    )
    (tmp_path / "digits.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "digits.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = re.search(r"([\d.]+)% of the test images are right", run.stdout)
    assert found and float(found[1]) > 90, run.stdout


def test_the_benchmark_runs_in_two_processes(tmp_path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "benchmarks", "sync", "--quick", "--out", tmp_path],
        cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "bnext.SyncBatchNorm: 22 collectives" in run.stdout, run.stdout
    assert "1024 ranks" in run.stdout
    rows = (tmp_path / "sync.csv").read_text()
    assert "nn.BatchNorm2d + all_reduce" in rows and "predicted exchanges" in rows


def test_the_benchmark_says_how_to_start_it(capsys) -> None:
    from benchmarks.__main__ import main as benchmarks

    assert benchmarks(["sync"]) == 2
    assert "torchrun" in capsys.readouterr().err
