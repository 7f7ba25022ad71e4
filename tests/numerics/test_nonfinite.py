"""Infinities and NaNs: which results they reach, and what those become."""

import math

import pytest
import torch

from bnext import reference
from bnext.functional import batch_norm, batch_norm_act
from cases import make

FORMATS = [torch.contiguous_format, torch.channels_last]
FORMAT_IDS = ["nchw", "nhwc"]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("memory_format", FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (2, 19, 17, 9), (9, 40, 1, 1)])
def test_inf_and_nan_stay_inside_their_channel(shape, memory_format, bad, device) -> None:
    case = make(shape, memory_format, device=device)
    clean = case.x.clone()
    case.x[1, 2, 0, 0] = bad
    others = [c for c in range(shape[1]) if c != 2]
    results = []
    for x in (clean, case.x):
        leaf = x.detach().requires_grad_()
        weight = case.weight.detach().requires_grad_()
        mean, var = case.running_mean.clone(), case.running_var.clone()
        y = batch_norm(leaf, mean, var, weight, case.bias, True)
        dx, dweight = torch.autograd.grad(y, (leaf, weight), case.grad_out)
        results.append([y.detach(), dx, dweight[None], mean[None], var[None]])
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(actual[:, others], expected[:, others])
        assert not actual[:, 2].isfinite().all()
    assert results[1][0][:, 2].isnan().all(), "the channel's output is NaN, as PyTorch's"


# (shape, memory format)
INF_SHAPES = {
    "6x5": ((6, 5), torch.contiguous_format),
    "600x5": ((600, 5), torch.contiguous_format),
    "4x3x7": ((4, 3, 7), torch.contiguous_format),
    "2x3x31": ((2, 3, 31), torch.contiguous_format),
    "4x3x5x5": ((4, 3, 5, 5), torch.contiguous_format),
    "4x3x5x5-cl": ((4, 3, 5, 5), torch.channels_last),
    "2x1x300": ((2, 1, 300), torch.contiguous_format),
    "9x3x40x40": ((9, 3, 40, 40), torch.contiguous_format),
    "9x3x40x40-cl": ((9, 3, 40, 40), torch.channels_last),
    "2x130x9x9-cl": ((2, 130, 9, 9), torch.channels_last),
}
INF_PLACES = ["first", "second", "middle", "last"]


@pytest.mark.parametrize("bad", [(math.inf,), (-math.inf,), (math.inf, -math.inf)], ids=str)
@pytest.mark.parametrize("place", INF_PLACES)
@pytest.mark.parametrize("name", INF_SHAPES)
def test_running_mean_of_an_infinity(name, place, bad) -> None:
    """The formula's: inf, -inf, or NaN of both, wherever they are."""
    shape, memory_format = INF_SHAPES[name]
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    channel = shape[1] // 2
    results = []
    for values in ((), bad):
        column = x[:, channel].flatten()
        end = len(column) - len(values)
        at = {"first": 0, "second": 1, "middle": len(column) // 2, "last": end}[place]
        column[at : at + len(values)] = torch.tensor(values)
        x[:, channel] = column.view(x[:, channel].shape)
        leaf = x.clone().requires_grad_()
        mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
        y = batch_norm(leaf, mean, var, training=True)
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        results.append((y.detach(), dx, mean[None], var[None]))
    others = torch.arange(shape[1]) != channel
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[:, others], dirty[:, others])
    y, _, mean, var = results[1]
    assert y[:, channel].isnan().all() and var[0, channel].isnan()
    torch.testing.assert_close(mean[0, channel], torch.tensor(bad).sum(), equal_nan=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nan_passes_the_relu(training, device) -> None:
    case = make((4, 3, 5), device=device, residual=True)
    case.x[0, 1, 0] = math.nan
    for residual in (None, case.residual):
        leaf = case.x.detach().requires_grad_()
        y = batch_norm_act(leaf, *case.stats, case.weight, case.bias, residual, training)
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        assert y[0, 1, 0].isnan() and not y[:, [0, 2]].isnan().any()
        if not training:
            # threshold_backward lets the gradient of a NaN pass.
            assert dx[0, 1, 0] != 0 and dx.isfinite().all()
            assert int(y.isnan().sum()) == 1


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_eval_gradient_does_not_depend_on_the_input(bad, device) -> None:
    """With frozen statistics dx is dy times a number: 0 * inf must not enter it."""
    for memory_format in FORMATS:
        case = make((4, 3, 5, 5), memory_format, device=device)
        clean = case.x.clone()
        case.x[1, 2, 3, 4] = bad
        grads = []
        for x in (clean, case.x):
            leaf = x.detach().requires_grad_()
            weight = case.weight.detach().requires_grad_()
            for inputs in ((leaf,), (leaf, weight)):
                y = batch_norm(leaf, *case.stats, weight, case.bias)
                grads.append(torch.autograd.grad(y, inputs, case.grad_out)[0])
        assert all(torch.equal(g, grads[0]) for g in grads)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_eval_keeps_inf_and_nan_to_their_element(bad, device) -> None:
    case = make((4, 3, 5, 5), device=device)
    clean = batch_norm(case.x, *case.stats, case.weight, case.bias)
    case.x[1, 2, 3, 4] = bad
    y = batch_norm(case.x, *case.stats, case.weight, case.bias)
    expected = reference.forward(case.x, case.weight, case.bias, stats=case.stats).output
    changed = torch.zeros_like(y, dtype=torch.bool)
    changed[1, 2, 3, 4] = True
    assert torch.equal(y[~changed], clean[~changed])
    torch.testing.assert_close(y[changed].double(), expected[changed], equal_nan=True)
