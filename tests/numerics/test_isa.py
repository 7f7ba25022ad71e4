"""Every instruction set that was built and this machine has: each in its own process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnext import _C

TESTS = Path(__file__).resolve().parents[1]
NAMES = ["default", "avx2", "avx512"]


def run(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "BNEXT_CPU_CAPABILITY": isa,
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}/numerics",
    }
    return subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def cpu_has(isa: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text()
    needed = {"default": [], "avx2": ["avx2", "fma"], "avx512": ["avx512f", "avx512bw", "avx512vl"]}
    return all(f" {flag} " in flags.replace("\n", " ") for flag in needed[isa])


SUBSET = """
import os, torch
from cases import DTYPES, LAYOUTS, make
from test_backward import check_backward
from test_double_backward import check_double_backward
from test_forward import check_forward
from bnext import _C
from bnext.functional import batch_norm

assert _C.cpu_device_info(1).isa == os.environ["BNEXT_CPU_CAPABILITY"]
torch.manual_seed(0)
torch.set_num_threads(1)  # another thread would run the same kernels
SHAPES = [
    *LAYOUTS.values(),
    ((5, 7, 7, 7), torch.contiguous_format),
    ((2, 67, 13, 11), torch.channels_last),
    ((1, 1, 300, 301), torch.contiguous_format),
    ((64, 3, 49), torch.contiguous_format),
]
for shape in SHAPES:
    for dtypes in DTYPES:
        for training in (True, False):
            for relu, residual in ((False, False), (True, False), (True, True)):
                case = make(*shape, dtypes, residual=residual)
                try:
                    check_forward(case, training, relu)
                    check_backward(case, training, relu)
                    check_double_backward(case, training, relu)
                except AssertionError as error:
                    name = f"{shape} {dtypes} {training=} {relu=} {residual=}"
                    raise AssertionError(f"{name}: {error}")
for dtype in (torch.bfloat16, torch.float16):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = bits[bits.isfinite()].reshape(-1, 1)
    stats = torch.zeros(1), torch.ones(1)
    assert torch.equal(batch_norm(x, *stats, eps=1e-30), x), dtype
    third = batch_norm(x, *stats, torch.full((1,), 1 / 3), eps=1e-30)
    assert torch.equal(third, (x.float() * (1 / 3)).to(dtype)), dtype
    odd = torch.tensor([[float("inf")], [float("-inf")], [float("nan")], [-0.0]], dtype=dtype)
    y = batch_norm(odd, *stats, eps=1e-30)
    assert torch.equal(y[:2], odd[:2]) and y[2].isnan()
"""


@pytest.mark.parametrize("isa", NAMES)
def test_forward_and_backward_on_each(isa) -> None:
    if not cpu_has(isa):
        pytest.skip(f"this machine has no {isa}")
    if isa == _C.cpu_device_info(1).isa:
        pytest.skip("the rest of the suite runs on this one")
    result = run(isa, SUBSET)
    assert result.returncode == 0, result.stderr[-3000:]


def test_unknown_name_is_an_error_that_names_it() -> None:
    result = run("sse9", "from bnext import _C; _C.cpu_device_info(1)")
    assert result.returncode != 0
    assert "BNEXT_CPU_CAPABILITY" in result.stderr and "sse9" in result.stderr


def test_default_choice_is_the_best_of_the_machine() -> None:
    chosen = os.environ.get("BNEXT_CPU_CAPABILITY")
    best = [isa for isa in NAMES if cpu_has(isa)][-1]
    assert _C.cpu_device_info(1).isa == (chosen or best)
