"""What is measured on a GPU: cases, providers, and whether each provider is right."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import bnext
from benchmarks.norm_act import NormAct
from benchmarks.shapes import RESNET50
from benchmarks.timing import Call
from bnext import reference
from tests import criterion

MOMENTUM, EPS = 0.1, 1e-5
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
LAYOUTS = ("nchw", "channels_last")
DIRECTIONS = ("forward", "backward", "both")
BATCHES = (32, 64, 128, 256)
# "eager" is torch as it comes: cuDNN where torch chooses it.
PROVIDERS = ("copy", "bnext", "eager", "aten", "compile")


class Variant(NamedTuple):
    training: bool
    residual: bool
    relu: bool

    def floor(self, direction: str) -> int:
        """Activation-sized tensors that must cross the memory bus."""
        forward, backward = (3, 4) if self.residual else (2, 3)
        return {"forward": forward, "backward": backward}.get(direction, forward + backward)


VARIANTS = {
    "bn": Variant(True, False, False),
    "bn_relu": Variant(True, False, True),
    "bn_add_relu": Variant(True, True, True),
    "frozen": Variant(False, False, False),
}


class Operands(NamedTuple):
    x: Tensor  # [N, C, *]
    residual: Tensor | None  # [N, C, *]
    grad_out: Tensor  # [N, C, *]


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dtype: str
    layout: str
    variant: str
    layers: int = 0  # how many of ResNet-50's 53 batch norms have this shape

    def __str__(self) -> str:
        return f"{self.size} {self.dtype} {self.layout} {self.variant}"

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def bytes(self) -> int:
        """Of one activation tensor."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    @property
    def kind(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def memory_format(self) -> torch.memory_format:
        if self.layout == "nchw":
            return torch.contiguous_format
        return torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d

    def operands(self, device: torch.device) -> Operands:
        """The same values at every call on a device."""
        generator = torch.Generator(device).manual_seed(0)

        def activation() -> Tensor:
            t = torch.empty(
                self.shape,
                dtype=DTYPES[self.dtype],
                device=device,
                memory_format=self.memory_format,
            )
            return t.normal_(generator=generator)

        x = activation().requires_grad_()
        residual = activation().requires_grad_() if self.kind.residual else None
        return Operands(x, residual, activation())


def resnet50(
    batches: tuple[int, ...], dtypes: tuple[str, ...], variants: tuple[str, ...]
) -> list[Case]:
    return [
        Case((batch, s.channels, s.size, s.size), dtype, layout, variant, s.layers)
        for variant in variants
        for dtype in dtypes
        for layout in LAYOUTS
        for batch in batches
        for s in RESNET50
    ]


def full() -> list[Case]:
    """The most wanted first: the time may not suffice for all."""
    others = [
        Case((125_000, 50), "float32", "nchw", "bn"),
        Case((6_000_000, 1), "float32", "nchw", "bn"),
        Case((64, 64, 512, 512), "float32", "nchw", "bn"),
        *(Case((8, 64, 16, 56, 56), "bfloat16", layout, "bn") for layout in LAYOUTS),
    ]
    return [
        *resnet50(BATCHES, ("bfloat16",), ("bn",)),
        *others,
        *resnet50((32, 256), ("bfloat16",), ("bn_relu", "bn_add_relu")),
        *resnet50((64,), ("bfloat16",), ("frozen",)),
        *resnet50(BATCHES, ("float32", "float16"), ("bn",)),
    ]


def quick() -> list[Case]:
    shapes = ((4, 64, 56, 56), (4, 512, 7, 7))
    cases = [Case(s, "bfloat16", ly, v, 1) for s in shapes for ly in LAYOUTS for v in VARIANTS]
    return [*cases, Case((125, 50), "float32", "nchw", "bn")]


@dataclass
class Subject:
    """One provider's module on the operands of a case."""

    provider: str
    case: Case
    operands: Operands
    module: nn.Module

    @classmethod
    def of(cls, provider: str, case: Case, operands: Operands) -> "Subject":
        """Parameters are float32, as under AMP."""
        kind, dims = case.kind, max(len(case.shape) - 2, 1)
        library = bnext if provider == "bnext" else nn
        fused = provider == "bnext" and (kind.relu or kind.residual)
        name = f"BatchNorm{'Act' if fused else ''}{dims}d"
        norm = getattr(library, name)(case.shape[1], eps=EPS, momentum=MOMENTUM)
        norm = norm.to(operands.x.device)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            norm.weight.copy_(torch.rand(case.shape[1], generator=generator))
            norm.bias.copy_(torch.randn(case.shape[1], generator=generator))
        module = norm if fused else NormAct(norm, kind.relu)
        module.train(kind.training)
        if provider == "compile":
            module.compile(dynamic=False, fullgraph=True)
        return cls(provider, case, operands, module)

    @property
    def norm(self) -> nn.Module:
        return self.module.norm if isinstance(self.module, NormAct) else self.module

    def forward(self) -> Tensor:
        if self.operands.residual is None:
            return self.module(self.operands.x)
        return self.module(self.operands.x, self.operands.residual)

    def backward(self, output: Tensor, retain_graph: bool = True) -> tuple[Tensor, ...]:
        x, residual, grad_out = self.operands
        wanted = (x, self.norm.weight, self.norm.bias, *(() if residual is None else (residual,)))
        return torch.autograd.grad(output, wanted, grad_out, retain_graph=retain_graph)

    def call(self, direction: str) -> Call:
        """What is timed."""
        if direction == "forward":
            return self.forward
        if direction == "backward":
            output = self.forward()
            return lambda: self.backward(output)
        return lambda: self.backward(self.forward(), retain_graph=False)


def chosen(provider: str) -> contextlib.AbstractContextManager[None]:
    """Calls of `aten` are made without cuDNN; torch looks at each forward pass."""
    now = torch.backends.cudnn
    return now.flags(now.enabled and provider != "aten", now.benchmark, allow_tf32=now.allow_tf32)


class Verdict(NamedTuple):
    error: float  # the largest, relative to the channel's largest value
    failures: list[str]  # what is beyond the bound


def check(case: Case, subjects: dict[str, Subject]) -> dict[str, Verdict]:
    """Each provider, at its first call, against the float64 reference.

    The bound is the test suite's: twice torch's error, plus the roundings nobody can avoid.
    """
    results: dict[str, tuple[Tensor, ...]] = {}
    for provider, subject in subjects.items():
        with chosen(provider):
            output = subject.forward()
            gradients = subject.backward(output, retain_graph=False)
        changed = subject.norm.running_mean, subject.norm.running_var
        results[provider] = output.detach(), *gradients, *changed
    verdicts = {}
    for provider in subjects:
        error, failures = 0.0, []
        for channels in _slices(case):
            own = [_of(t, channels) for t in results[provider]]
            torchs = [_of(t, channels) for t in results["eager"]]
            expected = _expected(subjects[provider], channels, own[0])
            names = list(expected)
            for name, actual, other in zip(names, own, torchs, strict=True):
                value, magnitude = expected[name]
                scale = value.abs().max().clamp(min=1e-30)
                error = max(error, float((actual.double() - value).abs().max() / scale))
                failures += _too_far(actual, other, value, magnitude, f"{case} {provider} {name}")
        verdicts[provider] = Verdict(error, failures)
    return verdicts


def _slices(case: Case) -> Iterator[slice]:
    """Runs of channels whose float64 tensors fit a GPU a dozen times."""
    per_channel = torch.Size(case.shape).numel() // case.shape[1]
    step = max(1, 2**26 // per_channel)
    for start in range(0, case.shape[1], step):
        yield slice(start, start + step)


def _of(t: Tensor, channels: slice) -> Tensor:
    return t[channels] if t.dim() == 1 else t[:, channels]


def _expected(s: Subject, channels: slice, output: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Values and magnitudes, in the order of `check`'s results."""
    kind = s.case.kind
    x = _of(s.operands.x.detach(), channels)
    weight, bias = s.norm.weight.detach()[channels], s.norm.bias.detach()[channels]
    residual = s.operands.residual
    residual = None if residual is None else _of(residual.detach(), channels)
    zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)
    stats = None if kind.training else (zeros, ones)
    y = reference.forward(x, weight, bias, residual, stats, EPS, kind.relu)
    active = output > 0 if kind.relu else None
    d = reference.backward(_of(s.operands.grad_out, channels), x, weight, stats, EPS, active)
    expected = {
        "output": (y.output, y.magnitude),
        "grad_input": (d.input, d.input_magnitude),
        "grad_weight": (d.weight, d.weight_magnitude),
        "grad_bias": (d.bias, d.bias_magnitude),
    }
    if residual is not None:
        expected["grad_residual"] = d.residual, d.residual.abs()
    mean, var, mean_magnitude = zeros.double(), ones.double(), zeros.double()
    if kind.training:
        mean, var = reference.updated_running_stats(x, zeros, ones, MOMENTUM)
        mean_magnitude = MOMENTUM * x.double().abs().mean(reference.reduced_dims(x))
    return expected | {"running_mean": (mean, mean_magnitude), "running_var": (var, var)}


def _too_far(actual: Tensor, torchs: Tensor, value: Tensor, size: Tensor, what: str) -> list[str]:
    try:
        criterion.assert_as_good_as_torch(actual, torchs, value, size, what)
    except AssertionError as error:
        return [str(error)]
    return []
