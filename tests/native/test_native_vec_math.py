"""The functions of csrc/cpu/vec_math.h against torch's of float64, on every instruction set."""

import ctypes
import functools
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import setup
from native.emulated import HERE, ROOT

REFERENCE = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "sigmoid": torch.special.expit,
    "tanh": torch.tanh,
    "erf": torch.erf,
}
FLAGS = {"default": [], "avx2": ["avx2", "fma", "f16c"],
         "avx512": ["avx512f", "avx512bw", "avx512vl", "avx512dq"]}  # fmt: skip
VECTOR_FLOAT, VECTOR_DOUBLE, FLOAT, DOUBLE = range(4)
FINITE_MAX = torch.finfo(torch.float32).max


@pytest.fixture(scope="module", params=setup.CPU_ISAS)
def library(request) -> ctypes.CDLL:
    isa = request.param
    words = Path("/proc/cpuinfo").read_text().split()
    if not set(FLAGS[isa]) <= set(words):
        pytest.skip(f"this machine has no {isa}")
    path = ROOT / "build" / "native" / f"vec_math-{isa}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        *setup.cxx(), "-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-Wall",
        "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-psabi",
        f"-DBNEXT_ISA_NAMESPACE=isa_{isa}", *setup.CPU_ISAS[isa].split(), HERE / "vec_math.cpp",
        "-o", path,
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}  # as emulated.py
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-8000:]
    return ctypes.CDLL(str(path))


def call(library: ctypes.CDLL, name: str, x: Tensor, kind: int) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, -len(x) % 16))
    y = torch.empty_like(padded)
    pointers = ctypes.c_void_p(padded.data_ptr()), ctypes.c_void_p(y.data_ptr())
    getattr(library, f"bnext_{name}")(*pointers, ctypes.c_int64(len(y)), ctypes.c_int(kind))
    return y[: len(x)]


def neighbours(of: Tensor, distance: int) -> Tensor:
    """Every float up to `distance` floats away, and their negatives."""
    bits = of.float().abs().view(torch.int32)
    near = (bits[:, None] + torch.arange(-distance, distance + 1, dtype=torch.int32)).flatten()
    x = near.view(torch.float32)
    return torch.cat([x, -x])


def every_exponent(mantissas: int) -> Tensor:
    exponents = torch.arange(255, dtype=torch.int32)[:, None] << 23  # 0: subnormal
    bits = (exponents | torch.randint(2**23, (255, mantissas), dtype=torch.int32)).flatten()
    x = bits.view(torch.float32)
    return torch.cat([x, -x])


@functools.cache
def inputs() -> Tensor:
    ln2 = math.log(2)
    rounding = (torch.arange(151) + 0.5) * ln2  # of x / ln 2, to the next integer
    tanh_rounding = 0.21 + (torch.arange(15) + 0.5) * ln2
    clamped = torch.tensor([4.0, 10, 18, 70, 89, 104])
    overflow = torch.tensor([128 * ln2, 126 * ln2, 149 * ln2, 150 * ln2])  # or underflow
    others = torch.tensor([1.16, 3.92, 9.01, 16.64, 17.33])  # erf's polynomials; saturation
    middle = torch.arange(0x3E800000, 0x40000000, 31, dtype=torch.int32)  # from 1/4 to 2
    middle = middle.view(torch.float32)
    special = torch.tensor([0.0, math.inf, math.nan, 2.0**-149, 2.0**-126, FINITE_MAX])
    return torch.cat([
        special, -special,
        every_exponent(2500),
        neighbours(rounding, 500), neighbours(tanh_rounding, 5000),
        neighbours(torch.cat([clamped, overflow, others]), 5000),
        torch.linspace(-20, 20, 500_000), middle, -middle,
    ])  # fmt: skip


def ulps(y: Tensor, want: Tensor) -> Tensor:
    """|y - want| in units of float32's last place at `want`; infinity counts as 2^128."""
    exponent = torch.frexp(want.clamp(-FINITE_MAX, FINITE_MAX)).exponent.double()
    ulp = torch.exp2((exponent - 24).clamp(min=-149))
    limit = 2.0**128
    return (y.double().clamp(-limit, limit) - want.clamp(-limit, limit)).abs() / ulp


@functools.cache
def expected(name: str) -> Tensor:
    return REFERENCE[name](inputs().double())


@pytest.mark.parametrize("name", REFERENCE)
def test_floats_for_every_exponent(library, name) -> None:
    # glibc's tanhf is 2.2 off.
    for kind, max_ulp, step in ((VECTOR_FLOAT, 2, 1), (FLOAT, 3, 31)):
        x, want = inputs()[::step], expected(name)[::step]
        y = call(library, name, x, kind)
        nan = x.isnan()
        assert torch.equal(y.isnan(), nan)
        error = ulps(y, want).masked_fill_(nan, 0)
        at = int(error.argmax())
        assert error[at] <= max_ulp, f"{error[at]:.3f} ulp at {x[at]:.9g} ({kind=})"
        negative = x.signbit() if name in ("expm1", "tanh", "erf") else torch.tensor(False)
        assert not ((y.signbit() != negative) & ~nan).any()


@pytest.mark.parametrize("name", REFERENCE)
def test_doubles_are_the_librarys(library, name) -> None:
    x = inputs()[::97].double() * (1 + 2.0**-40)
    x = torch.cat([x, torch.tensor([-746.0, -745, -744, -709, 709, 710, 746])])
    for kind in (VECTOR_DOUBLE, DOUBLE):
        y = call(library, name, x, kind)
        torch.testing.assert_close(y, REFERENCE[name](x), rtol=1e-15, atol=1e-307, equal_nan=True)
