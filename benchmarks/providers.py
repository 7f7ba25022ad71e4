"""The implementations to compare: bnext, torch.nn in four ways, and a copy as the bound."""

import contextlib
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnext
from benchmarks.cases import Case, Operands
from benchmarks.cpu_clock import Call

MOMENTUM, EPS = 0.1, 1e-5


class NormAct(nn.Module):
    """act(norm(x) + residual), in place after the norm as in torchvision's ResNet."""

    def __init__(self, norm: nn.Module, act: str | None = None) -> None:
        super().__init__()
        self.norm, self.act = norm, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x)
        if residual is not None:
            y += residual
        return getattr(F, self.act)(y, inplace=True) if self.act else y


@dataclass
class Subject:
    """One provider's module on the operands of a case."""

    provider: str
    case: Case
    operands: Operands
    module: nn.Module

    @classmethod
    def of(cls, provider: str, case: Case, operands: Operands) -> "Subject":
        """A provider's module in `case`; its parameters are float32, as under AMP."""
        kind, dims = case.kind, max(len(case.shape) - 2, 1)
        library = bnext if provider == "bnext" else nn
        fused = provider == "bnext" and (kind.act is not None or kind.residual)
        name = f"BatchNorm{'Act' if fused else ''}{dims}d"
        act = {"act": kind.act} if fused else {}
        norm = getattr(library, name)(case.shape[1], eps=EPS, momentum=MOMENTUM, **act)
        norm = norm.to(operands.x.device)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            norm.weight.copy_(torch.rand(case.shape[1], generator=generator))
            norm.bias.copy_(torch.randn(case.shape[1], generator=generator))
        module = norm if fused else NormAct(norm, kind.act)
        if provider == "onednn":
            x, grad_out = (t.detach().to_mkldnn() for t in (operands.x, operands.grad_out))
            operands = Operands(x.requires_grad_(), None, grad_out)
        return cls(provider, case, operands, module.train(kind.training))

    @property
    def norm(self) -> nn.Module:
        return self.module.norm if isinstance(self.module, NormAct) else self.module

    def forward(self) -> Tensor:
        """A forward pass as in a training step, where gradients follow."""
        function = _compiled(self.case) if self.provider == "compile" else _apply
        return function(self.module, self.operands.x, self.operands.residual)

    def backward(self, output: Tensor, retain_graph: bool = True) -> tuple[Tensor, ...]:
        """The gradients alone, by the same autograd call for every provider."""
        x, residual, grad_out = self.operands
        wanted = (x, self.norm.weight, self.norm.bias, *(() if residual is None else (residual,)))
        return torch.autograd.grad(output, wanted, grad_out, retain_graph=retain_graph)

    def call(self, direction: str) -> Call:
        """The call to time."""
        if direction == "forward":
            return self.forward
        if direction == "backward":
            output = self.forward()
            return lambda: self.backward(output)
        return lambda: self.backward(self.forward(), retain_graph=False)


def _apply(module: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return module(x) if residual is None else module(x, residual)


@functools.cache
def _compiled(case: Case) -> Callable[..., Tensor]:
    # Dynamo keeps what it compiled with the code object and tries it in turn. With its own code
    # object a case does not pay for the guards of others.
    code = _apply.__code__.replace(co_name=f"batch_norm {case}")
    return torch.compile(types.FunctionType(code, globals()), dynamic=False, fullgraph=True)


def why_not_compiled(device: str = "cpu") -> str | None:
    """Why torch.compile cannot take part, or None; also sets it up for retained graphs."""
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False  # backward is timed repeatedly on one graph
    try:
        torch.compile(lambda t: t + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:  # Inductor may lack a compiler, headers or OpenMP
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


@functools.cache
def takes_onednn(dtype: torch.dtype) -> bool:
    """Whether torch has a batch norm of that dtype in oneDNN's layout on this processor."""
    try:
        nn.BatchNorm2d(1)(torch.zeros(2, 1, 2, 2, dtype=dtype).to_mkldnn())
    except RuntimeError:  # bfloat16 needs AVX-512, float16 has none
        return False
    return True


def subjects(case: Case, device: torch.device, *peers: str) -> dict[str, Subject]:
    """The modules of bnext and of its peers on the same operands.

    Peers are "eager", which is torch's default and may choose cuDNN, "aten", "compile", and
    "onednn", torch's batch norm of tensors in oneDNN's own layout.
    """
    operands = case.operands(device)
    return {name: Subject.of(name, case, operands) for name in ("bnext", "eager", *peers)}


def call(subjects: Mapping[str, Subject], provider: str, direction: str) -> Call:
    """The call to time; the copy moves one activation into a new tensor, as the others do."""
    if provider == "copy":
        return subjects["bnext"].operands.x.detach().clone
    return subjects[provider].call(direction)


def chosen(provider: str) -> contextlib.AbstractContextManager[None]:
    """Turns cuDNN off for calls of `aten`; torch looks at this setting in each forward pass."""
    now = torch.backends.cudnn
    return now.flags(now.enabled and provider != "aten", now.benchmark, allow_tf32=now.allow_tf32)
