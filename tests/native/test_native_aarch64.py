"""The CPU kernels as setup.py compiles them for aarch64, under qemu, against the float64 reference.

On Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user
"""

import ctypes
import functools
import math
import os
import re
import shutil
import subprocess
import sys
from ctypes import c_bool, c_double, c_int, c_int64, c_uint8
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import criterion
from bnext import reference
from bnext._activation import ACTIVATIONS, parameter
from cases import DTYPES, SHAPES, Case, dtype_id, make, shape_id
from native import calls, emulated

TOOLS = CXX, QEMU, OBJDUMP = "aarch64-linux-gnu-g++", "qemu-aarch64", "aarch64-linux-gnu-objdump"
MISSING = [tool for tool in TOOLS if not shutil.which(tool)]
pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"no {' and no '.join(MISSING)}: apt-get install g++-aarch64-linux-gnu qemu-user",
)
MANIFEST = """
import platform
platform.machine = lambda: "aarch64"
import setup
print(setup.ninja_manifest("0", setup.find_torch(), setup.Cuda()))
"""


@functools.cache
def build() -> Path:
    """The folder of the objects that setup.py compiles, and of cpu_case.cpp linked with them.

    All but the bindings, which need the headers of an aarch64 Python.
    """
    folder = emulated.ROOT / "build" / "native" / "aarch64"
    folder.mkdir(parents=True, exist_ok=True)
    env = {k: v for k, v in os.environ.items() if k not in ("CFLAGS", "LDFLAGS", "BNEXT_SANITIZE")}
    text = subprocess.run(
        [sys.executable, "-c", MANIFEST], cwd=emulated.ROOT, stdout=subprocess.PIPE, text=True,
        check=True, env={**env, "CXX": CXX, "CXXFLAGS": "-Werror"},
    ).stdout  # fmt: skip
    objects = {*re.findall(r"^build (?!bindings)(\S+\.o):", text, re.M)}
    linked = sorted(name for name in objects if "ops" not in name)  # ops need libtorch
    text += f"build case.o: cxx {emulated.HERE / 'cpu_case.cpp'}\n  flags =\n"
    text += f"rule program\n  command = {CXX} -static $in -o $out\n"
    text += f"build case: program case.o {' '.join(linked)}\n"
    emulated.run_ninja(folder / "build.ninja", text, *objects, "case")
    return folder


class CpuInfo(ctypes.Structure):
    _fields_ = [
        ("isa", c_uint8), ("threads", c_int), ("l1_bytes", c_int64), ("l2_bytes", c_int64),
        ("l3_bytes", c_int64),
    ]  # fmt: skip


class Header(ctypes.Structure):
    """Mirrors cpu_case.cpp."""

    _fields_ = [
        ("problem", calls.Problem), ("cpu", CpuInfo), ("params", c_uint8), ("training", c_bool),
        ("act_param", c_double),
    ]  # fmt: skip


# Its caches keep everything, or nothing.
RESIDENT, STREAMING = CpuInfo(0, 1, 1 << 16, 1 << 20, 1 << 26), CpuInfo(0, 3, 0, 0, 0)


@dataclass
class Results:
    """In the order of cpu_case.cpp."""

    output: Tensor  # [N, C, *]
    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]
    grad_input: Tensor  # [N, C, *]
    grad_weight: Tensor  # [C]
    grad_bias: Tensor  # [C]
    grad_residual: Tensor | None  # [N, C, *]
    second_input: Tensor  # [N, C, *]
    second_weight: Tensor  # [C]
    second_grad_out: Tensor  # [N, C, *]


def as_in_memory(t: Tensor) -> Tensor:
    return t.movedim(1, -1) if calls.is_channels_last(t) else t


def run(
    case: Case, training: bool, act: str | None, by: tuple[Tensor, ...], cpu: CpuInfo = RESIDENT
) -> Results:
    """Forward, backward, and the derivatives of the backward's results times `by`."""
    x, weight, residual = case.x, case.weight, case.residual
    p = calls.problem(x, "train_forward", act=act, residual=residual is not None)
    dtype = calls.DTYPES.index(weight.dtype)
    header = Header(p, cpu, dtype, training, parameter(act, None))
    inputs = (x, weight, case.bias, residual, *case.stats, case.grad_out, *by)
    data = b"".join(
        as_in_memory(t).contiguous().view(torch.uint8).numpy().tobytes()
        for t in inputs
        if t is not None
    )
    result = subprocess.run(
        [QEMU, build() / "case"], input=bytes(header) + data, capture_output=True
    )
    assert result.returncode == 0, result.stderr.decode()
    received = bytearray(result.stdout)

    def take(like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        size = like.numel() * like.element_size()
        values = torch.frombuffer(received[:size], dtype=like.dtype)
        del received[:size]
        values = values.reshape(as_in_memory(like).shape)
        return values.movedim(-1, 1) if calls.is_channels_last(like) else values

    results = Results(*map(take, (x, weight, weight, x, weight, weight, residual, x, weight, x)))
    assert not received
    return results


def random_by(case: Case) -> tuple[Tensor, ...]:
    like = (case.x, case.weight, case.bias, case.residual)
    return tuple(torch.randn_like(t) for t in like if t is not None)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu, residual", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtypes", [*DTYPES[:3], DTYPES[-1]], ids=dtype_id)
@pytest.mark.parametrize("shape", [*SHAPES[2:4], *SHAPES[7:]], ids=shape_id)
def test_is_the_references(shape, dtypes, relu, residual, training) -> None:
    case = make(*shape, dtypes, residual=residual)
    by = random_by(case)
    ours = run(case, training, "relu" if relu else None, by)
    active = ours.output > 0 if relu else None
    operands = reference.Operands(
        case.x, case.weight, case.bias, case.residual, case.grad_out, *case.stats, torch.tensor(0)
    )
    for name, expected in reference.results(operands, training, 0.1, 1e-5, active).items():
        criterion.assert_as_good_as_torch(getattr(ours, name), None, *expected, name)
    second = (ours.second_input, ours.second_weight, ours.second_grad_out)
    criterion.assert_second_derivatives(case, training, active, by, second)


@pytest.mark.parametrize("shape", SHAPES[12:14], ids=shape_id)
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=dtype_id)
@pytest.mark.parametrize("act", [a for a in ACTIVATIONS if a not in (None, "relu")])
def test_every_activation(act, dtypes, shape) -> None:
    case = make(*shape, dtypes)
    ours = run(case, True, act, random_by(case))
    leaves = [t.double().requires_grad_() for t in (case.x, case.weight, case.bias)]
    y = reference.forward(*leaves, act=act, act_param=parameter(act, None)).output
    found = ours.output, ours.grad_input, ours.grad_weight, ours.grad_bias
    wanted = y.detach(), *torch.autograd.grad(y, leaves, case.grad_out.double())
    for got, want in zip(found, wanted, strict=True):
        allowed = 64 * torch.finfo(case.x.dtype).eps * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed


@pytest.mark.parametrize("dtypes", DTYPES[::2], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES[-6:], ids=shape_id)
def test_same_bits_for_any_caches_and_threads(shape, dtypes) -> None:
    case = make(*shape, dtypes, residual=True)
    by = random_by(case)
    one, other = (run(case, True, "relu", by, cpu) for cpu in (RESIDENT, STREAMING))
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(other, name)), name


# Each kind of value in each lane.
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7, -3e-8, 7e4, 1e39, 0.1, 65519.9]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_of_every_kind_of_value(dtype, layout) -> None:
    values = torch.tensor(SPECIAL).repeat(16 * 4 * 13)
    x = values.reshape(4, 13, 16, 11).to(dtype).contiguous(memory_format=layout)
    case = make(x.shape, layout, (dtype, torch.float32, torch.float32))
    case.x, case.running_mean, case.running_var = x, torch.zeros(13), torch.ones(13)
    case.weight, case.bias = torch.linspace(0.5, 1.5, 13), torch.zeros(13)
    # The NaNs that rounding by an addition would turn into zeros.
    case.weight[[2, 7]] = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    got = run(case, False, None, random_by(case)).output
    scale = (case.weight.double() * (1 / math.sqrt(1 + 1e-5))).float().reshape(-1, 1, 1)
    torch.testing.assert_close(got, (x.float() * scale).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_kernels_use_vectors_of_128_bits_and_the_processors_conversions() -> None:
    for path in build().glob("cpu/*kernels*.o"):
        code = subprocess.run([OBJDUMP, "-dr", path], capture_output=True, text=True).stdout
        for instruction in ("fmla", "fadd", "fmul"):
            assert re.search(rf"\t{instruction}\tv\d+\.4s", code), (path.name, instruction)
            assert re.search(rf"\t{instruction}\tv\d+\.2d", code), (path.name, instruction)
        for pair in ("fcvtl\tv.*4s, v.*4h", "fcvtn\tv.*4h, v.*4s", "fcvtl\tv.*2d, v.*2s"):
            assert re.search(pair, code), (path.name, pair)
        assert not re.search(r"__(extendhf|trunc\w+hf)", code), path.name
