"""Memory layouts: an output's strides are torch's, a gradient's are the output's, values right."""

import random
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from bnext.functional import batch_norm, batch_norm_act

train = torch.ops.bnext.batch_norm_train.default


def strided(rng: random.Random) -> Tensor:
    """2-d to 5-d, at least two values per channel, with any strides that a view can have."""
    ndim = rng.randint(2, 5)
    sizes = [rng.choice([1, 1, 2, 3, 4]) for _ in range(ndim)]
    if torch.Size(sizes).numel() < 2 * sizes[1]:
        sizes[0] = 2
    kind = rng.choice(["permuted", "sliced", "expanded", "odd strides of size 1", "any"])
    if kind == "any":  # overlaps included
        strides = [rng.choice([0, 1, 1, 2, 3, 4, 6, 8, 12, 24]) for _ in sizes]
        reach = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        return torch.randn(reach + 1).as_strided(sizes, strides)
    order = rng.sample(range(ndim), ndim)
    step = 2 if kind == "sliced" else 1
    x = torch.randn([sizes[d] * step for d in order]).permute([order.index(d) for d in range(ndim)])
    x = x[(slice(None, None, step),) * ndim]
    if kind == "expanded":
        x = x[:, :1].expand(sizes)
    if kind == "odd strides of size 1":
        strides = [
            rng.choice([0, 1, 2, 3, 7, 100]) if size == 1 else stride
            for size, stride in zip(sizes, x.stride(), strict=True)
        ]
        x = x.as_strided(sizes, strides)
    return x


@pytest.mark.parametrize("seed", range(4))
def test_strides_of_the_output_are_torchs(seed) -> None:
    """And those of the gradient are the output's, so a network stays in one format."""
    rng = random.Random(seed)
    for _ in range(150):
        x = strided(rng)
        c = x.shape[1]
        for training in (True, False):
            stats = torch.zeros(c), torch.ones(c)
            where = f"{tuple(x.shape)}, strides {x.stride()}, training={training}"
            y = batch_norm(x, *stats, training=training)
            assert y.stride() == F.batch_norm(x, *stats, training=training).stride(), where
            leaf = x.detach().requires_grad_()
            y = batch_norm(leaf, *stats, training=training)
            for grad_out in (torch.randn_like(y), torch.randn(y.shape)):
                (grad,) = torch.autograd.grad(y, leaf, grad_out, retain_graph=True)
                assert grad.stride() == y.stride(), where
                if not training:
                    torch.testing.assert_close(grad, grad_out / (1 + 1e-5) ** 0.5)


@pytest.mark.parametrize("device", ["fake", "meta"])
def test_strides_without_memory_are_those_with_it(device) -> None:
    rng = random.Random(5)
    for _ in range(150):
        x = strided(rng)
        expected = train(x, None, None, None, None, None, 0.1, 1e-5, x, 1, 0.0, True)
        if device == "meta":
            other = torch.empty_strided(x.shape, x.stride(), device="meta")
            got = train(other, None, None, None, None, None, 0.1, 1e-5, other, 1, 0.0, True)
        else:
            with FakeTensorMode() as mode:
                other = mode.from_tensor(x)
                got = train(other, None, None, None, None, None, 0.1, 1e-5, other, 1, 0.0, True)
        for ours, real in zip(got, expected, strict=True):
            assert (ours.shape, ours.stride()) == (real.shape, real.stride()), x.stride()


# Dense in channels_last, which their strides do not always suggest.
CHANNELS_LAST = {
    "an image": lambda: torch.randn(5, 6, 4).permute(2, 0, 1)[None],
    "one of a batch": lambda: channels_last(3, 4, 5, 6)[1][None],
    "one of a batch, 5-d": lambda: channels_last(3, 4, 2, 5, 6)[2][None],
    "the first of a batch": lambda: channels_last(3, 4, 5, 6)[:1],
    "a row per sample": lambda: torch.randn(2, 2, 3).transpose(1, 2).unsqueeze(-1),
    "a column per sample": lambda: torch.randn(2, 2, 3).transpose(1, 2).unsqueeze(2),
    "volumes of one slice": lambda: channels_last(3, 4, 5, 6).unsqueeze(2),
    "an empty batch": lambda: channels_last(3, 4, 5, 6)[:0],
    "an empty batch, 5-d": lambda: channels_last(3, 4, 2, 5, 6)[:0],
}


def channels_last(*shape: int) -> Tensor:
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.randn(shape).contiguous(memory_format=last)


def copies(events: list[object]) -> list[str]:
    return [e.name for e in events if e.name in ("aten::contiguous", "aten::clone", "aten::copy_")]


@pytest.mark.parametrize("name", CHANNELS_LAST)
def test_what_is_dense_in_channels_last_is_not_copied(name) -> None:
    x = CHANNELS_LAST[name]()
    expected = F.batch_norm(x, None, None, training=True)
    with torch.autograd.profiler.profile() as profile:
        y = batch_norm(x, None, None, training=True)
    assert y.stride() == expected.stride()
    assert not copies(profile.function_events)
    leaf = x.detach().requires_grad_()
    y = batch_norm(leaf, None, None, training=True)
    grad_out = torch.empty_strided(y.shape, y.stride()).normal_()
    with torch.autograd.profiler.profile() as profile:
        (grad,) = torch.autograd.grad(y, leaf, grad_out)
    assert not copies(profile.function_events)
    assert grad.stride() == y.stride()


def test_the_profiler_sees_a_copy() -> None:
    with torch.autograd.profiler.profile() as profile:
        batch_norm(torch.randn(4, 3, 10)[..., ::2], None, None, training=True)
    assert copies(profile.function_events)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (2, 1, 3, 4), (2, 1, 1, 4), (2, 4, 1, 1, 1)])
def test_what_is_dense_in_both_formats_gives_torchs(shape, training) -> None:
    for x in (torch.randn(shape), channels_last(*shape)):
        stats = torch.zeros(shape[1]), torch.ones(shape[1])
        y = batch_norm(x, *stats, training=training)
        assert y.stride() == F.batch_norm(x, *stats, training=training).stride()


# The same values, placed in memory by other strides.
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "pixels first": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "[N, L, C], transposed": lambda t: (
        t.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).reshape(t.shape)
    ),
    "reversed order": lambda t: t.permute(*range(t.dim())[::-1]).contiguous().permute(
        *range(t.dim())[::-1]
    ),
    "every other value": lambda t: torch.stack([t, t], -1)[..., 0],
    "some channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "some channels of channels_last": lambda t: (
        torch.cat([t, t], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, : t.shape[1]]
    ),
}  # fmt: skip
BATCHES = [(1, 3, 4, 5), (3, 4, 5, 2), (1, 6, 3, 1), (4, 5, 1, 1), (1, 3, 2, 3, 2), (2, 3, 4)]


def formula(x, weight, bias, residual, stats, relu) -> Tensor:
    dims = [0, *range(2, x.dim())]
    over = [1, -1] + [1] * (x.dim() - 2)
    mean, var = (x.mean(dims), x.var(dims, correction=0)) if stats is None else stats
    y = (x - mean.view(over)) / (var.view(over) + 1e-5).sqrt()
    y = y * weight.view(over) + bias.view(over) + residual
    return y.relu() if relu else y


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_every_pair_of_layouts_has_the_right_gradients(shape, relu, training) -> None:
    """First and second. torch's own CPU backward is wrong here where N is 1."""
    torch.manual_seed(1)
    c = shape[1]
    values = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    weight, bias = (torch.randn(c, dtype=torch.float64) for _ in range(2))
    stats = None if training else (torch.randn(c).double(), torch.rand(c).double() + 0.5)

    def derivatives(ours: bool, layouts) -> list[Tensor]:
        x, residual, dy, u = (LAYOUTS[k](t) for k, t in zip(layouts, values, strict=True))
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        dy.requires_grad_()
        if ours:
            running = (None, None) if stats is None else stats
            y = batch_norm_act(leaves[0], *running, leaves[1], leaves[2], leaves[3], training,
                               act="relu" if relu else None)  # fmt: skip
        else:
            y = formula(*leaves, stats, relu)
        first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        again = torch.autograd.grad(y, leaves, dy, create_graph=True)
        second = torch.autograd.grad(
            again[0], [leaves[0], leaves[1], dy], u, materialize_grads=True
        )
        return [y.detach(), *first, *second]

    expected = derivatives(False, ["contiguous"] * 4)
    names = ["y", "dx", "dweight", "dbias", "dresidual", "d2x", "d2weight", "d2grad_out"]
    for of_x, of_dy in product(LAYOUTS, LAYOUTS):
        got = derivatives(True, [of_x, of_dy, of_dy, of_x])
        for name, a, b in zip(names, got, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=1e-9, atol=1e-9,
                msg=lambda m, name=name, x=of_x, dy=of_dy: f"{name}, x {x}, dy {dy}: {m}",
            )  # fmt: skip
