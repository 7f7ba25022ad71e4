"""gradcheck and gradgradcheck in float64: modes x layouts x affine x activation x residual.

Both compare with finite differences of the function itself, so the inputs are drawn until no
pre-activation is near ReLU's kink.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

import bnext
from bnext import reference
from bnext.functional import batch_norm, batch_norm_act
from cases import AFFINE, DTYPES, LAYOUTS, Case, make

SMALL = {
    "nc": ((4, 2), torch.contiguous_format),
    "ncl": ((2, 2, 3), torch.contiguous_format),
    "nchw": ((2, 2, 2, 3), torch.contiguous_format),
    "nhwc": ((2, 2, 2, 3), torch.channels_last),
    "ncdhw": ((2, 2, 2, 1, 2), torch.contiguous_format),
    "ndhwc": ((2, 2, 2, 1, 2), torch.channels_last_3d),
}
assert SMALL.keys() == LAYOUTS.keys()


def draw(layout: str, affine: str, residual: bool, training: bool, device: torch.device) -> Case:
    while True:
        case = make(*SMALL[layout], DTYPES[1], device, AFFINE[affine], residual)
        stats = None if training else case.stats
        pre = reference.forward(case.x, case.weight, case.bias, case.residual, stats).pre
        if bool((pre.abs() > 1e-3).all()):
            return case


def check(case: Case, training: bool, relu: bool, wanted: tuple[bool, ...] = (True,) * 4) -> None:
    tensors = [case.x, case.weight, case.bias, case.residual]
    inputs = [
        t.detach().requires_grad_()
        for t, want in zip(tensors, wanted, strict=True)
        if t is not None and want
    ]

    def function(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        x, weight, bias, residual = (
            next(given) if t is not None and want else t
            for t, want in zip(tensors, wanted, strict=True)
        )
        return batch_norm_act(
            x, case.running_mean.clone(), case.running_var.clone(), weight, bias, residual,
            training, act="relu" if relu else None,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    # gradgradcheck only asks the derivative that is differentiated again to fit itself.
    plain = torch.autograd.grad(function(*inputs), inputs, case.grad_out)
    differentiable = torch.autograd.grad(
        function(*inputs), inputs, case.grad_out, create_graph=True
    )
    torch.testing.assert_close(differentiable, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("layout", SMALL)
def test_first_and_second_derivatives(layout, affine, relu, residual, training, device) -> None:
    check(draw(layout, affine, residual, training, device), training, relu)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize(
    "wanted",
    [w for w in product([False, True], repeat=4) if any(w) and not all(w)],
    ids=lambda w: "+".join(n for n, on in zip(("x", "w", "b", "r"), w, strict=True) if on),
)
def test_every_subset_of_inputs(wanted, relu, training, device) -> None:
    check(draw("nchw", "affine", True, training, device), training, relu, wanted)


def test_third_derivative(device) -> None:
    case = draw("ncl", "affine", False, True, device)
    x, weight = case.x.detach().requires_grad_(), case.weight.detach().requires_grad_()

    def gradient_penalty(x: Tensor, weight: Tensor) -> Tensor:
        y = batch_norm(x, None, None, weight, case.bias, True)
        (grad,) = torch.autograd.grad((y.tanh() * case.grad_out).sum(), x, create_graph=True)
        return grad

    assert torch.autograd.gradgradcheck(gradient_penalty, (x, weight))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_double_backward_of_the_residual_branch(training, device) -> None:
    """A gradient penalty on the residual alone: the ReLU's mask is all that is between."""
    case = draw("nchw", "affine", True, training, device)
    residual = case.residual.detach().requires_grad_()
    y = batch_norm_act(case.x, *case.stats, case.weight, case.bias, residual, training)
    (grad,) = torch.autograd.grad(y.square().sum(), residual, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), residual)
    torch.testing.assert_close(grad, 2 * y)
    torch.testing.assert_close(second, 2 * (y > 0).to(y.dtype))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_double_backward_in_float32_matches_torch(training, device) -> None:
    grads = []
    case = make((4, 3, 5, 6), device=device)
    direction = torch.randn_like(case.x)
    for function in (batch_norm, torch.nn.functional.batch_norm):
        x, w, b = (t.detach().requires_grad_() for t in (case.x, case.weight, case.bias))
        mean, var = case.running_mean.clone(), case.running_var.clone()
        y = function(x, mean, var, w, b, training)
        first = torch.autograd.grad((y.tanh() * case.grad_out).sum(), (x, w, b), create_graph=True)
        loss = (first[0] * direction).sum() + first[1].square().sum() + first[2].sum()
        grads.append(torch.autograd.grad(loss, (x, w, b)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("wanted", ["", "bias", "weight", "weight bias"])
def test_frozen_statistics_keep_the_input_only_for_the_weight(wanted, layout, device) -> None:
    module = bnext.BatchNorm2d(4, device=device).double().eval().requires_grad_(False)
    parameters = [getattr(module, name).requires_grad_() for name in wanted.split()]
    module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64, device=device)
    x = x.contiguous(memory_format=layout).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    assert any(t.shape == x.shape for t in kept) is ("weight" in wanted)
    grad_out = torch.randn(3, 4, 6, 5, dtype=torch.float64, device=device).transpose(2, 3)
    grads = torch.autograd.grad(y, [x, *parameters], grad_out)
    stats = module.running_mean, module.running_var
    expected = reference.backward(grad_out, x.detach(), module.weight.detach(), stats)
    names = "input", *wanted.split()
    torch.testing.assert_close([*grads], [getattr(expected, name) for name in names])
    assert torch.autograd.gradcheck(module, x) and torch.autograd.gradgradcheck(module, x)
