"""Checks bnext on this machine against the paper's formulas in float64: ``python -m bnext.verify``.

Runs every kernel family that this machine has (on a CPU: every instruction set, each in a process
of its own), in every dtype and layout, forward and backward, in training and eval, with and without
residual and ReLU. On a GPU also runs them in a CUDA graph, and lets torch watch for host
synchronisation. Exits with 1 if anything is wrong. A CPU of 2 cores takes half a minute for each
instruction set.
"""

import argparse
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from bnext import reference
from bnext._call import normalize
from bnext._extension import _C
from bnext.introspect import build_info, explain
from bnext.reference import Operands

MOMENTUM, EPS = 0.1, 1e-5
# (input, parameters and running statistics)
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "all bfloat16": (torch.bfloat16, torch.bfloat16),
}
_NCHW, _NHWC, _NDHWC = torch.contiguous_format, torch.channels_last, torch.channels_last_3d
Results: TypeAlias = dict[str, Tensor]
Shape: TypeAlias = tuple[tuple[int, ...], torch.memory_format]
# Rows and channels that vectors divide, and some that they do not.
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
    *itertools.product(((1, 3, 301, 300), (32, 512, 7, 7)), (_NCHW, _NHWC)),
)
# Channels larger than a GPU block's shared memory, and larger than all blocks' together.
LARGEST: tuple[Shape, ...] = (
    *LARGER,
    *itertools.product(((64, 64, 56, 56), (8, 4, 1024, 1024)), (_NCHW, _NHWC)),
)
# Of a Case. Gradients of one sign, and constant ones, show what long sums lose.
MODES = (
    *itertools.product((True, False), (False, True), (False, True), ("normal",)),
    *itertools.product((True,), (False,), (False, True), ("positive", "constant")),
)
# What is compared, and a short name for it.
RESULTS = {
    "output": "y", "grad_input": "dx", "grad_weight": "dw", "grad_bias": "db",
    "grad_residual": "dres", "running_mean": "mean", "running_var": "var",
    "num_batches_tracked": "n",
}  # fmt: skip
CAPABILITY = "BNEXT_CPU_CAPABILITY"
# The family and team that a plan is forced to use; the plan chooses where they are empty.
CUDA_CHOICES = {
    "as planned": ("", ""),
    "resident block": ("resident", "block"),
    "resident cluster": ("resident", "cluster"),
    "resident grid": ("resident", "grid"),
    "streaming": ("streaming", ""),
}


class Case(NamedTuple):
    """One kind of call."""

    shape: tuple[int, ...]
    memory_format: torch.memory_format
    dtype: str
    training: bool
    residual: bool
    relu: bool
    gradient: str  # what grad_out is like: normal, positive or constant

    def __str__(self) -> str:
        layout = str(self.memory_format).removeprefix("torch.")
        mode = "train" if self.training else "eval"
        mode += " + residual" * self.residual + " + relu" * self.relu
        mode += f", {self.gradient} gradient" * (self.gradient != "normal")
        return f"{'x'.join(map(str, self.shape))} {layout} {self.dtype} {mode}"

    def operands(self, device: torch.device) -> Operands:
        """The same values on every machine."""
        generator = torch.Generator().manual_seed(20150211)
        x_dtype, param_dtype = DTYPES[self.dtype]
        c = self.shape[1]

        def activation(spread: float = 1.0, mean: float = 0.0) -> Tensor:
            t = torch.randn(self.shape, generator=generator) * spread
            t += mean * torch.randn([c] + [1] * (t.dim() - 2), generator=generator)
            return t.to(device, x_dtype).contiguous(memory_format=self.memory_format)

        def gradient() -> Tensor:
            t = activation()
            constant = 1.3 * torch.ones_like(t)
            return {"normal": t, "positive": t.abs(), "constant": constant}[self.gradient]

        def parameter(least: float = 0.5) -> Tensor:
            return torch.rand(c, generator=generator).to(device, param_dtype) + least

        return Operands(
            activation(1.5, 2.0).requires_grad_(),
            parameter().requires_grad_(),
            parameter(-0.5).requires_grad_(),
            activation().requires_grad_() if self.residual else None,
            gradient(),
            parameter(),
            parameter(),
            torch.tensor(3, device=device),
        )


def run(t: Operands, case: Case) -> Results:
    """All that a call and its backward pass compute and change; the operands stay unchanged."""
    t = Operands(*t[:5], *(own.clone() for own in t[5:]))
    output = normalize(
        t.x, t.weight, t.bias, t.residual, t.running_mean, t.running_var, t.num_batches_tracked,
        case.training, MOMENTUM, EPS, "relu" if case.relu else None, 0.0,
    )  # fmt: skip
    wanted = [tensor for tensor in t[:4] if tensor is not None]
    gradients = torch.autograd.grad(output, wanted, t.grad_out)
    names = "output", "grad_input", "grad_weight", "grad_bias", "grad_residual"
    results = dict(zip(names, (output.detach(), *gradients), strict=False))
    changed = "running_mean", "running_var", "num_batches_tracked"
    return results | {name: getattr(t, name) for name in changed}


@torch.no_grad()
def check_values(case: Case, results: Results, exact: Operands) -> dict[str, float]:
    """The worst error of each result, in units of its bound."""
    on = exact.x.device
    active = results["output"].to(on) > 0 if case.relu else None
    errors = {}
    expected = reference.results(exact, case.training, MOMENTUM, EPS, active)
    for name, (value, magnitude) in expected.items():
        allowed = reference.bound(value, magnitude, results[name].dtype)
        error = (results[name].to(on).double() - value).abs().nan_to_num(torch.inf)
        if error.dim() > 1:
            error, allowed = (t.amax(reference.reduced_dims(t)) for t in (error, allowed))
        errors[name] = float(error.where(error == 0, error / allowed).max())
    tracked = int(results["num_batches_tracked"]) - int(exact.num_batches_tracked)
    errors["num_batches_tracked"] = 0.0 if tracked == case.training else torch.inf
    return errors


def poison(results: Results, t: Operands) -> None:
    """Overwrites results, so that the next call cannot find its own in the memory it reuses."""
    for tensor in results.values():
        if tensor.data_ptr() != t.grad_out.data_ptr():  # the residual's gradient may be grad_out
            tensor.fill_(torch.nan if tensor.is_floating_point() else -1)


def replayed(t: Operands, case: Case) -> Results:
    """As `run`, from a CUDA graph; capturing it also refuses whatever waits for the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(t, case)  # the graph must not contain what the first call sets up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = run(t, case)
        poison(results, t)
        graph.replay()
        results = {name: tensor.clone() for name, tensor in results.items()}
    torch.cuda.current_stream().wait_stream(stream)
    return results


@contextmanager
def forced(choice: tuple[str, str]) -> Iterator[None]:
    """Sets the environment variables that the ops read at each call."""
    names = ("BNEXT_CUDA_FAMILY", "BNEXT_CUDA_TEAM") if any(choice) else ()
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(zip(names, choice, strict=False))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)


@dataclass
class Row:
    """What was found for one choice and dtype."""

    cases: int = 0
    refused: int = 0  # cases that the forced kernels do not take
    errors: dict[str, float] = field(default_factory=dict)  # the worst, by result
    failures: list[str] = field(default_factory=list)


def check(case: Case, t: Operands, exact: Operands, with_graph: bool, row: Row) -> None:
    """Runs one case, with the kernels that the environment forces."""
    try:
        with ExitStack() as stack:
            if t.x.is_cuda:  # torch raises if it waits for the GPU
                torch.cuda.set_sync_debug_mode("error")
                stack.callback(torch.cuda.set_sync_debug_mode, "default")
            results = run(t, case)
        others = {"not the same bits twice": run(t, case)}
        if with_graph:
            others["a CUDA graph gives other bits"] = replayed(t, case)
        problems = [
            f"{name}: {what}"
            for what, other in others.items()
            for name in results
            if not torch.equal(results[name], other[name])
        ]
        for name, error in check_values(case, results, exact).items():
            row.errors[name] = max(error, row.errors.get(name, 0.0))
            if not error <= 1:
                problems.append(f"{name}: {error:.3g} times the bound")
        row.cases += 1
        row.failures += [f"{case}: {problem}" for problem in problems]
        for found in (results, *others.values()):
            poison(found, t)
    except RuntimeError as error:
        if "BNEXT_CUDA_" in str(error) and "does not fit" in str(error):
            row.refused += 1
        else:
            message = str(error).strip().partition("\n")[0]
            row.failures.append(f"{case}: {type(error).__name__}: {message}")


def check_all(
    device: torch.device, shapes: Iterable[Shape], small: bool, family: str
) -> Iterator[tuple[str, str, Row]]:
    """Every case under every choice: a dtype after the other, its choices and what was found."""
    on_gpu = device.type == "cuda"
    names = [name for name, (own, _) in CUDA_CHOICES.items() if family in ("", own)]
    choices = {name: CUDA_CHOICES[name] for name in (names if on_gpu else ["as planned"])}
    if on_gpu and torch.cuda.get_device_capability(device) < (9, 0):
        choices.pop("resident cluster", None)
    for dtype in DTYPES:
        rows = {name: Row() for name in choices}
        for shape, mode in itertools.product(shapes, MODES):
            training, residual, relu, gradient = mode
            case = Case(*shape, dtype, training, residual, relu, gradient)
            t = case.operands(device)
            exact = case.operands(torch.device("cpu")) if small else t
            for name, choice in choices.items():
                if case.training or not choice[1]:  # in eval there is no reduction to force
                    with forced(choice):
                        check(case, t, exact, on_gpu and not small, rows[name])
        for name, row in rows.items():
            if not row.cases and not row.failures:
                row.failures.append(f"{name}: no case could be run")
            yield dtype, name, row


def _in_a_process(isa: str, arguments: Sequence[str], say: Callable[[str], object]) -> int:
    """The instruction set is chosen once, when the kernels are first called."""
    command = [sys.executable, "-u", "-m", "bnext.verify", *arguments]
    environment = os.environ | {CAPABILITY: isa}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        for printed in process.stdout:
            say(printed.rstrip("\n"))
    return process.returncode


def plans(device: torch.device, shapes: Iterable[Shape]) -> str:
    """What the plan chooses for the cases when nothing is forced."""
    found = set()
    for (shape, layout), dtypes, train in itertools.product(shapes, DTYPES.values(), (True, False)):
        e = explain(shape, dtypes[0], layout, train, device)
        for p in (e.forward, e.backward):
            found.add(" ".join(f"{p.family} {getattr(p, 'team', '')} by {p.index_map}".split()))
    return ", ".join(sorted(found))


def heading() -> str:
    """Of the lines that follow."""
    return f"{'dtype':13}{'kernels':17}{'cases':>5}" + "".join(f"{n:>5}" for n in RESULTS.values())


def line(dtype: str, choice: str, row: Row) -> str:
    """The worst errors, in units of the bound."""
    cells = "".join(f"{row.errors.get(name, 0.0):5.2f}" for name in RESULTS)
    marks = f"\n{'':13}{len(row.failures)} FAILED" if row.failures else ""
    marks += f"\n{'':13}{row.refused} are not for these kernels" if row.refused else ""
    return f"{dtype:13}{choice:17}{row.cases:5}{cells}{marks}"


def device_argument(text: str) -> torch.device:
    """For argparse: a device that bnext can run on here."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:<number>, got {text!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"{text}: torch finds no GPU")
        if not build_info()["cuda"]:
            reason = build_info()["cuda_missing"]
            raise argparse.ArgumentTypeError(f"{text}: bnext was built without CUDA: {reason}")
        if (device.index or 0) >= torch.cuda.device_count():
            raise argparse.ArgumentTypeError(
                f"{text}: torch finds {torch.cuda.device_count()} GPUs"
            )
    return device


def instruction_sets() -> list[str]:
    """Those of this CPU that the kernels are compiled for; one alone if it is chosen already."""
    best = _C.cpu_device_info(1).isa
    every = ["default", "avx2", "avx512"]
    return [best] if os.environ.get(CAPABILITY) else every[: every.index(best) + 1]


class Parser(argparse.ArgumentParser):
    """One line instead of the usage as well."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str], say: Callable[[str], object]) -> int:
    """Checks, says what was found line by line, and returns the exit status."""
    parser = Parser("python -m bnext.verify", description=__doc__)
    default = "cuda" if build_info()["cuda"] and torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device_argument, default=default, help="cpu, cuda, cuda:1 (%(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="tiny cases, for compute-sanitizer")
    families = sorted({family for family, _ in CUDA_CHOICES.values()} - {""})
    parser.add_argument("--family", default="", choices=families, help="only this one, on a GPU")
    options = parser.parse_args(arguments)
    device = options.device
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        name = torch.cuda.get_device_name(device)
    elif len(isas := instruction_sets()) > 1:
        return max([_in_a_process(isa, arguments, say) for isa in isas])
    else:
        name = isas[0]
    shapes = SMALL if options.small else LARGEST if device.type == "cuda" else LARGER
    say(f"bnext on {device} ({name}), torch {torch.__version__}")
    say(textwrap.fill(f"planned: {plans(device, shapes)}", 80))
    say("largest errors against float64; 1 is what roundings may add up to")
    say(heading())
    failures, cases = [], 0
    for dtype, choice, row in check_all(device, shapes, options.small, options.family):
        say(line(dtype, choice, row))
        failures += row.failures
        cases += row.cases
    for failure in failures[:20]:
        say(f"FAILED {failure}")
    say(f"{len(failures)} FAILURES" if failures else f"all {cases} cases are right")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], print))
