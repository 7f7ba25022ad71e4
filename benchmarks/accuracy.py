"""Errors against float64: bnext and torch, for data near zero and for data far from it."""

from collections.abc import Callable, Collection, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

import bnext
from benchmarks import cases, report, summary
from benchmarks.providers import EPS
from bnext import reference

SHAPE = 32, 64, 28, 28
# The mean over the standard deviation: after a convolution; of images, sensors and logits. In
# bfloat16 data of a mean of 10,000 would be constant.
MEANS = {"float32": (0, 100, 10_000), "float64": (0, 10_000), "bfloat16": (0, 100)}
RESULTS = {
    "output": "y", "running_mean": "mean", "running_var": "variance",
    "grad_input": "dx", "grad_weight": "dweight", "grad_bias": "dbias",
}  # fmt: skip
PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "torch": F.batch_norm, "bnext": bnext.functional.batch_norm
}  # fmt: skip


class Row(NamedTuple):
    dtype: str
    layout: str
    mean: int
    provider: str
    errors: dict[str, float]  # the largest, over the largest value, by result


def operands(
    dtype: torch.dtype, layout: str, mean: float, device: torch.device
) -> reference.Operands:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    channels = SHAPE[1]
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    parameters = torch.promote_types(dtype, torch.float32)
    x, grad_out = (
        t.to(device, dtype).contiguous(memory_format=memory_format)
        for t in (normal(*SHAPE) + mean, normal(*SHAPE))
    )
    weight, bias = (t.to(device, parameters) for t in (normal(channels).exp(), normal(channels)))
    zeros = torch.zeros_like(weight)
    return reference.Operands(
        x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), None, grad_out,
        zeros, torch.ones_like(weight), torch.tensor(0),
    )  # fmt: skip


def errors(batch_norm: Callable[..., Tensor], t: reference.Operands) -> dict[str, float]:
    """With a momentum of 1 the running statistics are the batch's."""
    mean, var = t.running_mean.clone(), t.running_var.clone()
    y = batch_norm(t.x, mean, var, t.weight, t.bias, True, 1.0, EPS)
    gradients = torch.autograd.grad(y, (t.x, t.weight, t.bias), t.grad_out)
    names = "output", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var"
    own = dict(zip(names, (y.detach(), *gradients, mean, var), strict=True))
    detached = reference.Operands(*(None if each is None else each.detach() for each in t))
    exact = reference.results(detached, True, 1.0, EPS, None)
    scales = {name: float(value.abs().max()) for name, (value, _) in exact.items()}
    spread = float(exact["running_var"][0].max().sqrt())
    scales["running_mean"] = max(scales["running_mean"], spread)
    return {
        name: float((own[name].double() - value).abs().max()) / scales[name]
        for name, (value, _) in exact.items()
    }


def wrong_gradient() -> dict[str, float]:
    """A call whose gradient torch 2.13 gets wrong on the CPU, and each one's error of dx.

    The input and the incoming gradient are dense in different memory formats, and N is 1.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 4, 5, generator=generator).requires_grad_()
    dy = torch.randn(1, 20, 3, generator=generator).transpose(1, 2).view(1, 3, 4, 5)
    exact = reference.backward(dy, x.detach(), None, None, EPS, None).input
    found = {}
    for name, batch_norm in PROVIDERS.items():
        (dx,) = torch.autograd.grad(batch_norm(x, None, None, training=True), x, dy)
        found[name] = float((dx.double() - exact).abs().max() / exact.abs().max())
    return found


def rows(device: torch.device) -> Iterator[Row]:
    kinds = [(dtype, mean) for dtype, means in MEANS.items() for mean in means]
    for (dtype, mean), layout in product(kinds, cases.LAYOUTS):
        t = operands(getattr(torch, dtype), layout, mean, device)
        for provider, batch_norm in PROVIDERS.items():
            yield Row(dtype, layout, mean, provider, errors(batch_norm, t))


def table(
    found: list[dict[str, str]],
    dtypes: Collection[str] = tuple(MEANS),
    results: Collection[str] = tuple(RESULTS.values()),
) -> str:
    """In Markdown: torch's error and bnext's, the larger of the two layouts."""
    lines = [["errors of torch, of bnext", *results]]
    kinds = ((row["dtype"], row["mean_over_std"]) for row in found if row["dtype"] in dtypes)
    for dtype, mean in dict.fromkeys(kinds):
        some = [row for row in found if (row["dtype"], row["mean_over_std"]) == (dtype, mean)]
        cells = [
            ", ".join(
                f"{max(float(row[name]) for row in some if row['provider'] == provider):.0e}"
                for provider in PROVIDERS
            )
            for name in results
        ]
        lines.append([f"{dtype}, mean {mean} std", *cells])
    return summary.markdown(lines)


def run(out: Path, facts: dict[str, str], device: torch.device) -> int:
    console = Console()
    if device.type == "cuda":
        facts = facts | report.gpu_facts(device)
    wrong = wrong_gradient()
    words = ", ".join(f"{name} {error:.0e}" for name, error in wrong.items())
    facts = facts | {
        "shape": "x".join(map(str, SHAPE)),
        "error": "the largest against float64, over the largest value (of means: or over the "
        "standard deviation, if that is larger)",
        "N = 1, dy in another memory format": f"error of dx on the CPU: {words}",
    }
    found = [
        {"dtype": r.dtype, "layout": r.layout, "mean_over_std": str(r.mean), "provider": r.provider}
        | {short: f"{r.errors[name]:.2e}" for name, short in RESULTS.items()}
        for r in rows(device)
    ]
    report.write_csv(out / "accuracy.csv", facts, found)
    console.print(report.facts_table(facts))
    print(table(found))
    console.print(f"Written to {out}/accuracy.csv", highlight=False)
    return 0
