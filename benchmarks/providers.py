"""What is compared: each provider is a function with F.batch_norm's signature, or a copy."""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import bnext
from benchmarks.shapes import Shape
from benchmarks.timing import Call
from bnext import reference
from tests import criterion

BatchNorm = Callable[..., Tensor]

MOMENTUM, EPS = 0.1, 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# Activation-sized tensors that must cross the memory bus: x, y and x, dy, dx.
FLOOR_TENSORS = {"forward": 2, "backward": 3}


class Operands(NamedTuple):
    x: Tensor  # [N, C, H, W]
    grad_out: Tensor  # [N, C, H, W]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]

    def with_own_stats(self) -> "Operands":
        """For one provider: another's forward would invalidate the graph that saved them."""
        return self._replace(
            running_mean=self.running_mean.clone(), running_var=self.running_var.clone()
        )


@dataclass(frozen=True)
class Case:
    shape: Shape
    batch: int
    dtype: str
    layout: str

    def __str__(self) -> str:
        return f"{self.batch}x{self.shape} {self.dtype} {self.layout}"

    @property
    def bytes(self) -> int:
        """Of one activation tensor."""
        return self.batch * self.shape.channels * self.shape.size**2 * DTYPES[self.dtype].itemsize

    def operands(self) -> Operands:
        """The same values at every call; parameters and statistics in float32, as under AMP."""
        generator = torch.Generator().manual_seed(0)
        channels, size, _ = self.shape

        def activation() -> Tensor:
            t = torch.randn(self.batch, channels, size, size, generator=generator)
            return t.to(DTYPES[self.dtype], memory_format=LAYOUTS[self.layout])

        return Operands(
            activation().requires_grad_(),
            activation(),
            torch.rand(channels, generator=generator).requires_grad_(),
            torch.randn(channels, generator=generator).requires_grad_(),
            torch.zeros(channels),
            torch.ones(channels),
        )


def _batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


@functools.cache
def compiled(case: Case) -> BatchNorm:
    # Dynamo keeps what it compiled with the code object and tries one after the other: with a code
    # object of its own a case does not pay for the others' guards.
    code = _batch_norm.__code__.replace(co_name=f"batch_norm_{case.shape}")
    function = types.FunctionType(code, globals())
    return torch.compile(function, dynamic=False, fullgraph=True)


def why_not_compiled(device: str = "cpu") -> str | None:
    """Why torch.compile cannot take part, or None; also sets it up for retained graphs."""
    import torch._functorch.config as functorch_config

    # Backward is timed by itself, again and again on one graph.
    functorch_config.donated_buffer = False
    try:
        torch.compile(lambda t: t + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # whatever Inductor lacks: a compiler, headers, OpenMP
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def batch_norms(case: Case, with_compile: bool) -> dict[str, BatchNorm]:
    norms: dict[str, BatchNorm] = {"bnext": bnext.functional.batch_norm, "eager": F.batch_norm}
    if with_compile:
        norms["compile"] = compiled(case)
    return norms


def forward(norm: BatchNorm, t: Operands) -> Tensor:
    """As a training step pays it: gradients will be asked for."""
    return norm(t.x, t.running_mean, t.running_var, t.weight, t.bias, True, MOMENTUM, EPS)


def backward(output: Tensor, t: Operands) -> tuple[Tensor, ...]:
    """The gradients alone, through the same autograd call for everybody."""
    return torch.autograd.grad(output, (t.x, t.weight, t.bias), t.grad_out, retain_graph=True)


def calls(norms: dict[str, BatchNorm], t: Operands, direction: str) -> dict[str, Call]:
    """What is timed. The copy moves one activation, 2E, into a new tensor as the others do."""
    timed: dict[str, Call] = {"copy": t.x.detach().clone}
    for name, norm in norms.items():
        own = t.with_own_stats()
        if direction == "forward":
            timed[name] = functools.partial(forward, norm, own)
        else:
            timed[name] = functools.partial(backward, forward(norm, own), own)
    return timed


class Verdict(NamedTuple):
    error: float  # the largest, relative to the largest value
    failures: list[str]  # what is beyond the bound


def check(case: Case, norms: dict[str, BatchNorm]) -> dict[str, Verdict]:
    """Each provider against the float64 reference.

    The bound is the test suite's: twice eager's error, plus the roundings nobody can avoid.
    """
    t = case.operands()
    y = reference.forward(t.x.detach(), t.weight.detach(), t.bias.detach(), eps=EPS)
    d = reference.backward(t.grad_out, t.x.detach(), t.weight.detach(), eps=EPS)
    mean, var = reference.updated_running_stats(
        t.x.detach(), t.running_mean, t.running_var, MOMENTUM
    )
    mean_magnitude = MOMENTUM * t.x.detach().double().abs().mean((0, 2, 3))
    expected = {
        "output": (y.output, y.magnitude),
        "grad_input": (d.input, d.input_magnitude),
        "grad_weight": (d.weight, d.weight_magnitude),
        "grad_bias": (d.bias, d.bias_magnitude),
        "running_mean": (mean, mean_magnitude),
        "running_var": (var, var),
    }

    def results(norm: BatchNorm) -> dict[str, Tensor]:
        own = t.with_own_stats()
        output = forward(norm, own)
        tensors = output.detach(), *backward(output, own), own.running_mean, own.running_var
        return dict(zip(expected, tensors, strict=True))

    eager = results(norms["eager"])
    verdicts: dict[str, Verdict] = {}
    for name, norm in norms.items():
        errors, failures = [], []
        for what, actual in results(norm).items():
            value, magnitude = expected[what]
            errors.append(float((actual.double() - value).abs().max() / value.abs().max()))
            label = f"{case} {name} {what}"
            failures += _too_far(actual, eager[what], value, magnitude, label)
        verdicts[name] = Verdict(max(errors), failures)
    return verdicts


def _too_far(
    actual: Tensor, eager: Tensor, value: Tensor, magnitude: Tensor, what: str
) -> list[str]:
    try:
        criterion.assert_as_good_as_torch(actual, eager, value, magnitude, what)
    except AssertionError as error:
        return [str(error)]
    return []
