"""Checks the first call of each provider, on the operands that are timed later."""

from collections.abc import Iterator, Mapping
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
    for channels in _slices(case):
        torchs = [_of(t, channels) for t in results["eager"]]
        expected: dict[str, tuple[Tensor, Tensor]] = {}
        for name, subject in subjects.items():
            own = [_of(t, channels) for t in results[name]]
            if case.kind.relu or not expected:  # a ReLU's gradient depends on the output's signs
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
    return output.detach(), *gradients, subject.norm.running_mean, subject.norm.running_var


def _slices(case: Case) -> Iterator[slice]:
    """Ranges of channels so small that a dozen float64 tensors of one fit a GPU."""
    per_channel = torch.Size(case.shape).numel() // case.shape[1]
    step = max(1, 2**26 // per_channel)
    for start in range(0, case.shape[1], step):
        yield slice(start, start + step)


def _of(t: Tensor, channels: slice) -> Tensor:
    return t.detach()[channels] if t.dim() == 1 else t.detach()[:, channels]


def _expected(s: Subject, channels: slice, output: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    x, residual, grad_out = (None if t is None else _of(t, channels) for t in s.operands)
    weight, bias = _of(s.norm.weight, channels), _of(s.norm.bias, channels)
    active = output > 0 if s.case.kind.relu else None
    stats = torch.zeros_like(weight), torch.ones_like(weight), torch.tensor(0)
    t = reference.Operands(x, weight, bias, residual, grad_out, *stats)
    return reference.results(t, s.case.kind.training, MOMENTUM, EPS, active)
