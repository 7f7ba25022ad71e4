"""Checks bnext on this machine against the paper's formulas in float64: ``python -m bnext.verify``.

Runs every kernel family that this machine has, in every dtype and layout, forward and backward, in
training and eval, with and without residual and ReLU; on a GPU also inside a CUDA graph and under
torch's watch for host synchronisation. Takes seconds; the exit status is 1 if anything is wrong.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bnext import reference
from bnext.functional import normalize
from bnext.introspect import build_info, explain

__all__ = ["main"]

MOMENTUM, EPS = 0.1, 1e-5
# (input, parameters and running statistics)
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "bfloat16, parameters too": (torch.bfloat16, torch.bfloat16),
}
_NCHW, _NHWC, _NDHWC = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
Shape: TypeAlias = tuple[tuple[int, ...], torch.memory_format]
# Rows that vectors divide and rows that they do not, channels likewise.
SMALL: tuple[Shape, ...] = (
    ((6, 40), _NCHW),
    ((3, 24, 8, 8), _NCHW),
    ((5, 24, 7, 7), _NCHW),
    ((3, 24, 5, 7), _NHWC),
    ((2, 5, 3, 4, 6), _NDHWC),
)
LARGER: tuple[Shape, ...] = (
    *SMALL,
    ((37, 130), _NCHW),
    ((2, 5, 3, 4, 6), _NCHW),
    ((16, 96, 28, 28), _NCHW),
    ((9, 67, 13, 11), _NHWC),
    ((1, 3, 301, 300), _NCHW),
    ((1, 3, 301, 300), _NHWC),
    ((32, 512, 7, 7), _NCHW),
    ((32, 512, 7, 7), _NHWC),
)
# Channels larger than a GPU block's shared memory, and than all blocks' together.
LARGEST: tuple[Shape, ...] = (
    *LARGER,
    ((64, 64, 56, 56), _NCHW),
    ((64, 64, 56, 56), _NHWC),
    ((8, 4, 1024, 1024), _NCHW),
    ((8, 4, 1024, 1024), _NHWC),
)


class Mode(NamedTuple):
    """What a call does."""

    training: bool
    residual: bool
    relu: bool

    def __str__(self) -> str:
        parts = ["train" if self.training else "eval"]
        return " + ".join([*parts, *["residual"] * self.residual, *["relu"] * self.relu])


MODES = [Mode(t, s, r) for t in (True, False) for s in (False, True) for r in (False, True)]


class Operands(NamedTuple):
    """The tensors of one call."""

    x: Tensor  # [N, C, *]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    residual: Tensor | None  # [N, C, *]
    grad_out: Tensor  # [N, C, *]
    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]
    num_batches_tracked: Tensor  # []

    @property
    def differentiable(self) -> list[Tensor]:
        """The tensors that get a gradient."""
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]

    def with_own_stats(self) -> "Operands":
        """A copy whose running statistics a call may change."""
        return Operands(*self[:5], *(t.clone() for t in self[5:]))

    def to(self, device: torch.device | str) -> "Operands":
        """The same values on a device, without gradients."""
        return Operands._make(None if t is None else t.detach().to(device) for t in self)


class Choice(NamedTuple):
    """The kernels that a plan is forced to use; empty: the plan's own choice."""

    family: str = ""
    team: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, self)) or "as planned"


CUDA_CHOICES = (
    Choice(),
    Choice("resident", "block"),
    Choice("resident", "cluster"),
    Choice("resident", "grid"),
    Choice("streaming"),
)


@dataclass(frozen=True)
class Case:
    """One kind of call."""

    shape: tuple[int, ...]
    memory_format: torch.memory_format
    dtype: str
    mode: Mode

    def __str__(self) -> str:
        layout = str(self.memory_format).removeprefix("torch.")
        return f"{'x'.join(map(str, self.shape))} {layout} {self.dtype} {self.mode}"

    def operands(self, device: torch.device) -> Operands:
        """The same values on every machine."""
        generator = torch.Generator().manual_seed(20150211)
        x_dtype, param_dtype = DTYPES[self.dtype]
        c = self.shape[1]

        def activation(spread: float = 1.0, mean: float = 0.0) -> Tensor:
            over = [1, c] + [1] * (len(self.shape) - 2)
            t = torch.randn(self.shape, generator=generator)
            t = t * spread + mean * torch.randn(over, generator=generator)
            return t.to(device, x_dtype).contiguous(memory_format=self.memory_format)

        def parameter() -> Tensor:
            return torch.rand(c, generator=generator).to(device, param_dtype) + 0.5

        operands = Operands(
            activation(1.5, 2.0),
            parameter(),
            parameter() - 1,
            activation() if self.mode.residual else None,
            activation(),
            parameter(),
            parameter(),
            torch.tensor(3, device=device),
        )
        for tensor in operands.differentiable:
            tensor.requires_grad_()
        return operands


Results: TypeAlias = dict[str, Tensor]


def forward(t: Operands, mode: Mode) -> Tensor:
    """The output of bnext's op."""
    return normalize(
        t.x, t.weight, t.bias, t.residual, t.running_mean, t.running_var, t.num_batches_tracked,
        mode.training, MOMENTUM, EPS, mode.relu,
    )  # fmt: skip


def run(t: Operands, mode: Mode) -> Results:
    """Everything a call computes and changes, by name."""
    t = t.with_own_stats()
    output = forward(t, mode)
    gradients = torch.autograd.grad(output, t.differentiable, t.grad_out)
    return named(t, output, gradients)


def named(t: Operands, output: Tensor, gradients: Sequence[Tensor]) -> Results:
    """Results by name; the operands of the call hold what it changed."""
    names = "output", "grad_input", "grad_weight", "grad_bias", "grad_residual"
    results = dict(zip(names, (output.detach(), *gradients), strict=False))
    changed = "running_mean", "running_var", "num_batches_tracked"
    return results | {name: getattr(t, name) for name in changed}


def check_values(t: Operands, mode: Mode, results: Results, exact: Operands) -> dict[str, float]:
    """The worst error of each result, in units of its bound."""
    on = exact.x.device
    active = results["output"].to(on) > 0 if mode.relu else None
    expected = reference.results(*exact[:7], mode.training, MOMENTUM, EPS, active)
    errors = {name: worst(results[name].to(on), *expected[name]) for name in expected}
    tracked = int(results["num_batches_tracked"]) - int(t.num_batches_tracked)
    errors["num_batches_tracked"] = 0.0 if tracked == mode.training else torch.inf
    return errors


def worst(actual: Tensor, value: Tensor, magnitude: Tensor) -> float:
    """The largest error of any channel over its largest bound; not a number is infinitely wrong."""
    allowed = reference.bound(value, magnitude, actual.dtype)
    errors = (actual.double() - value).abs().nan_to_num(torch.inf)
    if errors.dim() > 1:
        dims = reference.reduced_dims(errors)
        errors, allowed = errors.amax(dims), allowed.amax(dims)
    return float(errors.where(errors == 0, errors / allowed).max())


def differing(a: Results, b: Results) -> list[str]:
    """Names of the results whose bits differ."""
    return [name for name in a if not torch.equal(a[name], b[name])]


@contextmanager
def sync_is_an_error(device: torch.device) -> Iterator[None]:
    """Makes torch raise where it waits for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def poison(tensors: Iterable[Tensor], t: Operands) -> None:
    """So that the next call, in the same memory, does not find there what it should write."""
    for tensor in tensors:
        if tensor.data_ptr() != t.grad_out.data_ptr():  # which is a residual's gradient as it is
            tensor.detach().fill_(torch.nan if tensor.is_floating_point() else -1)


def replayed(t: Operands, mode: Mode) -> Results:
    """As `run`, from a CUDA graph; capturing also refuses whatever waits for the GPU."""
    start, t = t, t.with_own_stats()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(t, mode)  # what the first call sets up is not for the graph
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = forward(t, mode)
            gradients = torch.autograd.grad(output, t.differentiable, t.grad_out)
        poison((output, *gradients), t)
        for own, its in zip(t[5:], start[5:], strict=True):
            own.copy_(its)
        graph.replay()
        results = {name: tensor.clone() for name, tensor in named(t, output, gradients).items()}
    torch.cuda.current_stream().wait_stream(stream)
    return results


@contextmanager
def forced(choice: Choice) -> Iterator[None]:
    """Sets the environment variables that the ops read at each call."""
    names = ("BNEXT_CUDA_FAMILY", "BNEXT_CUDA_TEAM") if any(choice) else ()
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(zip(names, choice, strict=False))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@dataclass
class Row:
    """What was found of one choice and dtype."""

    cases: int = 0
    refused: int = 0  # cases that the forced kernels do not take
    errors: dict[str, float] = field(default_factory=dict)  # the worst, by result
    failures: list[str] = field(default_factory=list)

    def add(self, case: Case, errors: dict[str, float], others: list[str]) -> None:
        """Count a case that ran."""
        self.cases += 1
        for name, error in errors.items():
            self.errors[name] = max(error, self.errors.get(name, 0.0))
            if not error <= 1:
                others.append(f"{name}: {error:.3g} times the bound")
        self.failures += [f"{case}: {what}" for what in others]


def check(case: Case, t: Operands, exact: Operands, with_graph: bool, row: Row) -> None:
    """One case, as the environment has the plan made."""
    try:
        with sync_is_an_error(t.x.device):
            results = run(t, case.mode)
        again = run(t, case.mode)
        problems = [f"{name}: not the same bits twice" for name in differing(results, again)]
        if with_graph:
            graphs = differing(results, replayed(t, case.mode))
            problems += [f"{name}: a CUDA graph gives other bits" for name in graphs]
        row.add(case, check_values(t, case.mode, results, exact), problems)
        poison((*results.values(), *again.values()), t)
    except RuntimeError as error:
        if "BNEXT_CUDA_" in str(error) and "does not fit" in str(error):
            row.refused += 1
        else:
            message = str(error).strip().partition("\n")[0]
            row.failures.append(f"{case}: {type(error).__name__}: {message}")


def check_all(device: torch.device, small: bool, family: str) -> dict[tuple[Choice, str], Row]:
    """Every case under every choice."""
    on_gpu = device.type == "cuda"
    choices = [c for c in CUDA_CHOICES if family in ("", c.family)] if on_gpu else [Choice()]
    if on_gpu and torch.cuda.get_device_capability(device) < (9, 0):
        choices = [choice for choice in choices if choice.team != "cluster"]
    rows = {(choice, dtype): Row() for choice in choices for dtype in DTYPES}
    for shape, memory_format in shapes_for(device, small):
        for dtype in DTYPES:
            for mode in MODES:
                case = Case(shape, memory_format, dtype, mode)
                t = case.operands(device)
                exact = t.to("cpu" if small else device)
                for choice in choices:
                    if choice.team and not mode.training:
                        continue  # there is nothing to reduce before the result
                    with forced(choice):
                        check(case, t, exact, on_gpu and not small, rows[choice, dtype])
    for (choice, _), row in rows.items():
        if not row.cases and not row.failures:
            row.failures.append(f"{choice}: no case could be run")
    return rows


def plans(device: torch.device, small: bool) -> str:
    """What the plan chooses for the cases when nothing is forced."""
    found = set()
    for shape, memory_format in shapes_for(device, small):
        for x_dtype, _ in DTYPES.values():
            for training in (True, False):
                e = explain(shape, x_dtype, memory_format, training, device)
                found |= {
                    " ".join([p.family, getattr(p, "team", ""), "by", p.index_map])
                    for p in (e.forward, e.backward)
                }
    return ", ".join(sorted(" ".join(name.split()) for name in found))


def shapes_for(device: torch.device, small: bool) -> tuple[Shape, ...]:
    """The shapes of the cases."""
    return SMALL if small else LARGEST if device.type == "cuda" else LARGER


def table(rows: dict[tuple[Choice, str], Row]) -> Iterator[str]:
    """Lines of text: the worst errors, in units of the bound."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row.errors))
    short = [name.replace("running_", "run_").replace("num_batches_", "") for name in names]
    yield f"{'kernels':18}{'dtype':25}{'cases':>6}" + "".join(f"{n:>14}" for n in short)
    for (choice, dtype), row in rows.items():
        cells = "".join(f"{row.errors.get(name, 0.0):14.3f}" for name in names)
        marks = f"  {len(row.failures)} FAILED" if row.failures else ""
        marks += f"  ({row.refused} not for these kernels)" if row.refused else ""
        yield f"{choice!s:18}{dtype:25}{row.cases:6}{cells}{marks}"


def main(arguments: Sequence[str], say: Callable[[str], object]) -> int:
    """Check, say what was found line by line, and return the exit status."""
    parser = argparse.ArgumentParser("python -m bnext.verify", description=__doc__)
    default = "cuda" if build_info()["cuda"] and torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cpu, cuda, cuda:1, ... (%(default)s)")
    parser.add_argument(
        "--small", action="store_true", help="a few tiny cases, for compute-sanitizer"
    )
    families = sorted({choice.family for choice in CUDA_CHOICES} - {""})
    parser.add_argument("--family", default="", choices=families, help="only this one, on a GPU")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not build_info()["cuda"]:
        say(f"bnext was built without CUDA: {build_info()['cuda_missing']}")
        return 1
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    say(f"bnext on {device} ({name}), torch {torch.__version__}")
    say(f"planned: {plans(device, options.small)}")
    say("largest error against float64, in units of what roundings may add up to (1 is the bound)")
    rows = check_all(device, options.small, options.family)
    for line in table(rows):
        say(line)
    failures = [failure for row in rows.values() for failure in row.failures]
    for failure in failures[:20]:
        say(f"FAILED {failure}")
    cases = sum(row.cases for row in rows.values())
    say(f"{len(failures)} FAILURES" if failures else f"all {cases} cases are right")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], print))
