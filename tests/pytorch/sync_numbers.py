"""The numbers of a SyncBatchNorm in several processes, against the whole batch's in float64."""

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import bnext
import criterion
from bnext import reference
from bnext._activation import ACTIVATIONS, parameter
from bnext._exchange import all_gather_single, room
from cases import DTYPES, LAYOUTS, Case, make


def sizes_of(n: int, ranks: int) -> list[int]:
    """Uneven shares of a batch, the first process's empty."""
    shares = [0] + [n // (ranks - 1)] * (ranks - 1)
    shares[-1] += n - sum(shares)
    return shares


def part(t: Tensor | None, sizes: list[int]) -> Tensor | None:
    return None if t is None else t.split(sizes)[dist.get_rank()]


def gathered(t: Tensor) -> list[Tensor]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, t)
    return found


def module_of(case: Case, **options: Any) -> bnext.SyncBatchNorm:
    bn = bnext.SyncBatchNorm(case.x.shape[1], **options)
    state = {"weight": case.weight, "bias": case.bias, "running_mean": case.running_mean,
             "running_var": case.running_var}  # fmt: skip
    for name, value in state.items():
        if getattr(bn, name) is not None:
            getattr(bn, name).data = value.clone()
    return bn


def check(case: Case, sizes: list[int], act: str | None = None, bn: Any = None) -> None:
    """One training step of this process's part."""
    bn = bn or module_of(case, act=act)
    param = parameter(act, None)
    before = bn.running_mean.clone(), bn.running_var.clone()
    x = part(case.x, sizes).detach().clone().requires_grad_()
    residual = part(case.residual, sizes)
    residual = None if residual is None else residual.detach().clone().requires_grad_()
    y = bn(x, residual)
    y.backward(part(case.grad_out, sizes))
    expected = reference.forward(
        case.x, case.weight, case.bias, case.residual, act=act, act_param=param
    )
    allowance = 1 if act in (None, "relu") else 8
    criterion.assert_as_good_as_torch(
        y.detach(), None, part(expected.output, sizes),
        allowance * part(expected.magnitude, sizes), "output",
    )  # fmt: skip
    outputs = torch.cat(gathered(y.detach()))
    z = expected.pre.detach().requires_grad_()
    slope = torch.autograd.grad(reference.ACTIVATIONS[act](z, param).sum(), z)[0]
    if act == "relu":
        slope = (outputs > 0).double()
    dy = slope * case.grad_out.double()
    wanted = reference.backward(dy, case.x, case.weight)
    flat = reference.backward(case.grad_out, case.x, case.weight)
    factor = allowance * (2 if case.x.dtype is torch.float64 else 1)
    magnitude = torch.maximum(wanted.input_magnitude, flat.input_magnitude)
    criterion.assert_as_good_as_torch(
        x.grad, None, part(wanted.input, sizes), factor * part(magnitude, sizes), "input"
    )
    for name in ("weight", "bias"):  # this process's, as with torch.nn's: DDP averages them
        grads = torch.stack(gathered(getattr(bn, name).grad)).double()
        magnitude = torch.maximum(
            getattr(wanted, f"{name}_magnitude"), getattr(flat, f"{name}_magnitude")
        )
        allowed = torch.finfo(case.weight.dtype).eps * grads.abs().sum(0)  # each is rounded
        allowed += 16 * factor * magnitude * (2.0**-53 if x.dtype is torch.float64 else 2.0**-24)
        assert bool(((grads.sum(0) - getattr(wanted, name)).abs() <= allowed).all()), name
    if residual is not None:
        eps = 16 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(residual.grad, part(dy, sizes).to(x.dtype), rtol=eps, atol=eps)
    new = reference.updated_running_stats(case.x, *before, bn.momentum)
    for got, want in zip((bn.running_mean, bn.running_var), new, strict=True):
        eps = 4 * torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, want.to(got.dtype), rtol=eps, atol=eps)
        assert all(torch.equal(got, other) for other in gathered(got)), "processes differ"
    assert bn.num_batches_tracked == 1


def is_one_process_on_the_whole_batch() -> None:
    ranks = dist.get_world_size()
    for dtypes, (shape, layout) in product(DTYPES, LAYOUTS.values()):
        case = make((5, *shape[1:]), layout, dtypes)
        for sizes in (sizes_of(5, ranks), sizes_of(5, ranks)[::-1]):
            check(case, sizes)


def takes_every_activation_and_a_residual() -> None:
    for act, layout, added in product(ACTIVATIONS, ("nchw", "nhwc"), (False, True)):
        shape, memory_format = LAYOUTS[layout]
        case = make((4, *shape[1:]), memory_format, DTYPES[0], residual=added)
        check(case, sizes_of(4, dist.get_world_size()), act)


def has_more_channels_than_a_message_holds() -> None:
    channels = room(dist.get_world_size()) + 5
    for dtypes in (DTYPES[0], DTYPES[1]):
        case = make((4, channels, 2), dtypes=dtypes)
        check(case, sizes_of(4, dist.get_world_size()))


def synchronises_subgroups() -> None:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(members) for members in ([0, 1], [*range(2, ranks)]) if members]
    mine, first = (groups[0], 0) if rank < 2 else (groups[1], 2)
    members = dist.get_world_size(mine)
    case = make((3 * members, 4, 5))
    x = case.x.split(3)[rank - first].clone().requires_grad_()
    bn = module_of(case, process_group=mine)
    y = bn(x)
    y.backward(case.grad_out.split(3)[rank - first])
    expected = reference.forward(case.x, case.weight, case.bias)
    wanted = reference.backward(case.grad_out, case.x, case.weight)
    torch.testing.assert_close(
        y.double(), expected.output.split(3)[rank - first], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        x.grad.double(), wanted.input.split(3)[rank - first], rtol=1e-5, atol=1e-5
    )
    if ranks > 2:
        other = groups[1] if rank < 2 else groups[0]
        with pytest.raises(RuntimeError, match="expected one that this process"):
            module_of(case, process_group=other)(case.x)


class Gather(torch.autograd.Function):
    """All processes' parts of an equal size; the gradient of all is the same everywhere."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        all_of_it = own.new_empty(dist.get_world_size() * own.shape[0], *own.shape[1:])
        all_gather_single(all_of_it, own.contiguous())
        return all_of_it

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Split.apply(grad)


class Split(torch.autograd.Function):
    """This process's part."""

    @staticmethod
    def forward(ctx: Any, all_of_it: Tensor) -> Tensor:
        return all_of_it.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Gather.apply(grad)


class Share(torch.autograd.Function):
    """A parameter that all processes have."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Total.apply(grad)


class Total(torch.autograd.Function):
    """The sum over processes."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Share.apply(grad)


def passes_gradcheck_through_the_collectives() -> None:
    ranks = dist.get_world_size()
    x, residual = torch.randn(2, 2 * ranks, 2, dtype=torch.float64)
    weight, bias = torch.rand(2, 2, dtype=torch.float64) + 0.5
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual)]
    for act, added in ((None, False), ("silu", True), ("leaky_relu", True)):
        bn = bnext.SyncBatchNorm(2, act=act, dtype=torch.float64)

        def f(x, weight, bias, residual, bn=bn, added=added):
            del bn._parameters["weight"], bn._parameters["bias"]
            bn._parameters.update(weight=Share.apply(weight), bias=Share.apply(bias))
            return Gather.apply(bn(Split.apply(x), Split.apply(residual) if added else None))

        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs, atol=1e-4)
