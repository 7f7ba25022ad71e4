"""Checks the first call of each provider, on the operands that are timed later."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.providers import EPS, MOMENTUM, Subject, chosen
from bnext import reference
from tests import criterion


class Verdict(NamedTuple):
    error: float  # the largest error, relative to the largest value
    failures: list[str]  # results beyond the bound


def check(case: Case, subjects: Mapping[str, Subject]) -> dict[str, Verdict]:
    """Compare each provider with the float64 reference.

    The bound is the test suite's: twice torch's error plus what `reference.bound` allows.
    """
    results = {name: _results(subject) for name, subject in subjects.items()}
    errors, failures = dict.fromkeys(subjects, 0.0), {name: list[str]() for name in subjects}
    # Channels do not depend on each other: of large tensors some stand for all.
    channels = slice(None, None, math.ceil(torch.Size(case.shape).numel() / 2**21))
    torchs = [_of(t, channels) for t in results["eager"]]
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    for name, subject in subjects.items():
        own = [_of(t, channels) for t in results[name]]
        if case.kind.act == "relu" or not expected:  # its gradient depends on the output's signs
            expected = _expected(subject, channels, own[0])
        for (what, (value, magnitude)), actual, other in zip(
            expected.items(), own, torchs, strict=True
        ):
            scale = value.abs().max().clamp(min=1e-30)
            error = float((actual.double() - value).abs().max() / scale)
            errors[name] = max(error, errors[name])
            label = f"{case} {name} {what}"
            try:
                criterion.assert_as_good_as_torch(actual, other, value, magnitude, label)
            except AssertionError as failure:
                failures[name].append(str(failure))
    return {name: Verdict(errors[name], failures[name]) for name in subjects}


def _results(subject: Subject) -> tuple[Tensor, ...]:
    """In the order of `reference.results`."""
    with chosen(subject.provider):
        output = subject.forward()
        gradients = subject.backward(output, retain_graph=False)
    results = output, *gradients, subject.norm.running_mean, subject.norm.running_var
    return tuple((t.to_dense() if t.is_mkldnn else t).detach() for t in results)


def _of(t: Tensor, channels: slice) -> Tensor:
    return t.detach()[channels] if t.dim() == 1 else t.detach()[:, channels]


def _expected(s: Subject, channels: slice, output: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    kind = s.case.kind
    x, residual, grad_out = (None if t is None else _of(t, channels) for t in s.operands)
    weight, bias = _of(s.norm.weight, channels), _of(s.norm.bias, channels)
    active = output > 0 if kind.act == "relu" else None
    stats = torch.zeros_like(weight), torch.ones_like(weight), torch.tensor(0)
    t = reference.Operands(x, weight, bias, residual, grad_out, *stats)
    expected = reference.results(t, kind.training, MOMENTUM, EPS, active)
    if kind.act in (None, "relu"):
        return expected
    pre = expected["output"][0].requires_grad_()
    act = reference.ACTIVATIONS[kind.act](pre, 0.0)
    (grad_pre,) = torch.autograd.grad(act, pre, grad_out.double())
    t = t._replace(grad_out=grad_pre)
    values = reference.results(t, kind.training, MOMENTUM, EPS, None)
    values["output"] = act.detach(), expected["output"][1]
    # Where the derivative vanishes its error does not.
    return {name: (values[name][0], magnitude) for name, (_, magnitude) in expected.items()}
