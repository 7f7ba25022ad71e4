"""The emulator itself: correct kernels pass, and every defect put into them on purpose is found."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from native import emulated

# kernel -> rows, row length; as numbered in selftest.cpp
KERNELS = {"block": (7, 200), "cluster": (3, 256), "grid": (5, 256), "copies": (5, 256)}
SEEDS = range(1, 7)
# (kernel, defect as numbered in selftest.cpp, a part of the message)
DEFECTS = {
    "no barrier": ("block", 1, "wrote with no barrier between|never written"),
    "no barrier before reuse": ("block", 2, "read with no barrier between"),
    "divergent barrier": ("block", 3, "divergent"),
    "early exit": ("block", 4, "exits while|have exited"),
    "partial shuffle": ("block", 5, "divergent"),
    "no bounds check": ("block", 6, "outside of every buffer|beyond the end of in"),
    "shared memory overflow": ("block", 7, "outside of every buffer|beyond the end of shared"),
    "uninitialised": ("block", 8, "never written"),
    "no cluster barrier": ("cluster", 9, "before a barrier of the cluster|which has exited"),
    "no last cluster barrier": ("cluster", 10, "has exited|exits with no barrier of the cluster"),
    "no such rank": ("cluster", 11, "no such block of its cluster"),
    "no grid barrier": ("grid", 12, "no barrier between|never written"),
    "no wait": ("copies", 13, "before the copy to it was waited for"),
    "waits for too few": ("copies", 14, "before the copy to it was waited for"),
    "no commit": ("copies", 15, "before the copy to it was waited for"),
    "another thread's copy": ("copies", 16, "never written|waited for|no barrier between"),
    "misaligned copy": ("copies", 17, "not aligned"),
    "slot reused too early": ("copies", 18, "waited for"),
    "not cooperative": ("grid", 19, "not cooperative"),
    "too many threads": ("block", 20, "launch refused: threads"),
    "too much shared memory": ("block", 21, "launch refused: more shared memory"),
    "cluster does not divide": ("block", 22, "launch refused: the cluster size does not divide"),
    "grid too large": ("block", 23, "launch refused: more blocks than fit"),
}
# What shows without the checks of single accesses: in results, or as an error.
SEEN_BY_RESULTS = [d for d in DEFECTS if d not in ("no bounds check", "shared memory overflow")]
SEEN_BY_RESULTS.remove("no barrier before reuse")  # needs luck


@pytest.fixture(scope="module", params=["plain", "checked"])
def emulator(request):
    return emulated.selftest(request.param)


@pytest.fixture(scope="module")
def checked():
    return emulated.selftest("checked")


@pytest.fixture(scope="module")
def plain():
    return emulated.selftest("plain")


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def right(emulator, kernel: str, defect: int, seed: int) -> bool:
    rows, n = KERNELS[kernel]
    x = np.random.default_rng(seed).standard_normal((rows, n)).astype(np.float32)
    out = np.zeros(rows, np.float32)
    emulator.seed(seed)
    ok = emulator.library.bnext_selftest(
        list(KERNELS).index(kernel), defect, rows, n, pointer(x), pointer(out)
    )
    return bool(ok) and np.allclose(out, x.sum(1), atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_correct_kernel_passes(emulator, kernel) -> None:
    for seed in SEEDS:
        assert right(emulator, kernel, 0, seed), emulator.error()


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_found_with_any_seed(checked, defect) -> None:
    kernel, number, message = DEFECTS[defect]
    for seed in SEEDS:
        assert not right(checked, kernel, number, seed)
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(checked.error())


@pytest.mark.parametrize("defect", SEEN_BY_RESULTS)
def test_defects_show_in_results_with_some_seeds(plain, defect) -> None:
    kernel, number, _ = DEFECTS[defect]
    assert not all(right(plain, kernel, number, seed) for seed in range(1, 21))


def test_an_access_is_reported_with_its_line_and_thread(checked) -> None:
    assert not right(checked, "block", 6, 1)
    assert "thread 8 of block 0 reads 4 bytes" in checked.error()
    assert "(selftest.cpp:" in checked.error()


def test_statistics_count_what_ran(checked) -> None:
    checked.statistics()
    assert right(checked, "copies", 0, 1)
    rows, n = KERNELS["copies"]
    s = checked.statistics()
    assert (s.launches, s.copies, s.barriers) == (1, rows * n // 4, 2 * rows)
    assert s.shuffles == rows * 5 * n // 4 // 32
    assert (s.bytes_read, s.bytes_written) == (4 * rows * n, 4 * rows)


def test_seeds_draw_different_orders(plain) -> None:
    messages = set()
    for seed in range(1, 11):
        right(plain, "block", 3, seed)  # whoever comes first to a divergent barrier
        messages.add(plain.error())
    assert len(messages) > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_of_16_bits_are_those_of_torch(plain, dtype) -> None:
    is_bfloat16 = int(dtype == torch.bfloat16)
    all_bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2**16, dtype=torch.float32)
    plain.library.bnext_to_float(
        is_bfloat16, ctypes.c_int64(2**16), ctypes.c_void_p(all_bits.data_ptr()),
        ctypes.c_void_p(wide.data_ptr()),
    )  # fmt: skip
    expected = all_bits.view(dtype).float()
    torch.testing.assert_close(wide, expected, rtol=0, atol=0, equal_nan=True)
    # Every value, every tie between two, and their neighbours.
    values = expected[expected.isfinite()].sort().values
    ties = ((values[1:].double() + values[:-1].double()) / 2).float()
    near = [torch.nextafter(ties, torch.tensor(s * torch.inf)) for s in (-1, 1)]
    extremes = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 65519.996, 65520.0])
    given = torch.cat([values, ties, *near, extremes])
    narrow = torch.empty(given.numel(), dtype=torch.int16)
    plain.library.bnext_from_float(
        is_bfloat16, ctypes.c_int64(given.numel()), ctypes.c_void_p(given.data_ptr()),
        ctypes.c_void_p(narrow.data_ptr()),
    )  # fmt: skip
    torch.testing.assert_close(narrow.view(dtype), given.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("defect", "message"), [(0, ""), (24, "out of bounds"), (25, "shift exponent")]
)
def test_sanitizers_see_what_is_within_a_thread(defect, message) -> None:
    env = dict(os.environ, PYTHON=sys.executable, BNEXT_DEFECT=str(defect))
    test = "tests/native/test_native_emulation.py"
    command = [emulated.HERE / "sanitize.sh", test, "-k", "one_defect"]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    output = result.stdout + result.stderr
    assert message in output
    assert (result.returncode == 0) == (defect == 0), output


if "BNEXT_DEFECT" in os.environ:  # the process that the test above starts

    def test_one_defect() -> None:
        emulator = emulated.selftest(os.environ["BNEXT_EMULATION"])
        assert right(emulator, "block", int(os.environ["BNEXT_DEFECT"]), 1)
