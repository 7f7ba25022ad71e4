"""The gradient of the gradient: the fused op against the float64 reference, and gradient penalties.

That it fits the first backward is test_gradcheck's; here are dtypes, layouts, threads and use.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

import bnext
import criterion
from bnext import reference
from bnext.functional import batch_norm_act
from cases import DTYPES, SHAPES, Case, dtype_id, make, shape_id

Grads = tuple[Tensor | None, ...]


def run(case: Case, training: bool, relu: bool) -> tuple[Grads, Grads, Tensor | None]:
    """What the first backward is differentiated by, our second derivatives, where ReLU passed."""
    leaves = [t.detach().requires_grad_() for t in (case.x, case.weight, case.grad_out)]
    x, weight, grad_out = leaves
    inputs = [x, weight, case.bias.detach().requires_grad_()]
    if case.residual is not None:
        inputs.append(case.residual.detach().requires_grad_())
    y = batch_norm_act(
        x, case.running_mean.clone(), case.running_var.clone(), weight, inputs[2],
        inputs[3] if case.residual is not None else None, training, act="relu" if relu else None,
    )  # fmt: skip
    first = torch.autograd.grad(y, inputs, grad_out, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    by = tuple(torch.randn(g.shape, generator=generator).to(g) for g in first)
    ours = torch.autograd.grad(first, leaves, by, allow_unused=True)
    return by, ours, y.detach() > 0 if relu else None


def check_double_backward(case: Case, training: bool, relu: bool) -> None:
    by, ours, active = run(case, training, relu)
    criterion.assert_second_derivatives(case, training, active, by, ours)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu, residual", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_is_the_references(shape, dtypes, relu, residual, training, device) -> None:
    case = make(*shape, dtypes, device, residual=residual)
    check_double_backward(case, training, relu)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu, residual", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("mean", [1e3, 1e5, 1e6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_mean_costs_no_accuracy(layout, mean, relu, residual, training, device) -> None:
    case = make((4, 3, 9, 11), layout, device=device, residual=residual)
    case.x = (case.x + mean).detach()
    case.running_mean = case.running_mean + mean
    check_double_backward(case, training, relu)


@pytest.mark.parametrize(
    "shape",
    [
        ((16, 130, 14, 14), torch.contiguous_format),
        ((16, 130, 14, 14), torch.channels_last),
        ((1, 1, 300, 301), torch.contiguous_format),
    ],
    ids=shape_id,
)
def test_same_bits_for_any_number_of_threads(shape) -> None:
    case = make(*shape, DTYPES[1], residual=True)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(case, True, True)[1])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layouts_and_strides_may_differ_between_arguments(device) -> None:
    case = make((3, 4, 5, 6), device=device)
    expected = run(case, True, False)[1]
    case.grad_out = case.grad_out.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(run(case, True, False)[1], expected)


def count(op: str, function) -> int:
    with torch.profiler.profile() as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key == op)


class Critic(nn.Module):
    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), norm(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 8, 3, 2), norm(8),
            nn.Softplus(), nn.Conv2d(8, 1, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((1, 2, 3))


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """Gulrajani et al. 2017, equation 3."""
    between = (share * real + (1 - share) * fake).requires_grad_()
    (grad,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return ((grad.flatten(1).norm(2, dim=1) - 1) ** 2).mean()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_wgan_gp_step_is_torchs(dtype, training, device) -> None:
    ours, theirs = Critic(bnext.BatchNorm2d), Critic(nn.BatchNorm2d)
    ours.load_state_dict(theirs.state_dict())
    real, fake = torch.randn(2, 6, 3, 12, 12, dtype=dtype, device=device)
    share = torch.rand(6, 1, 1, 1, dtype=dtype, device=device)
    results = []
    for critic in (ours.to(device, dtype), theirs.to(device, dtype)):
        critic.train(training)
        loss = critic(fake).mean() - critic(real).mean()
        loss = loss + 10 * gradient_penalty(critic, real, fake, share)
        loss.backward()
        grads = {name: p.grad for name, p in critic.named_parameters()}
        results.append((loss, grads, dict(critic.named_buffers())))
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    )
    torch.testing.assert_close(*results, **tolerance)


def test_is_one_op_per_batch_norm() -> None:
    critic = Critic(bnext.BatchNorm2d)
    real, fake, share = torch.randn(4, 3, 10, 10), torch.randn(4, 3, 10, 10), torch.rand(4, 1, 1, 1)

    def step() -> None:
        gradient_penalty(critic, real, fake, share).backward()

    assert count("bnext::batch_norm_double_backward", step) == 2
    assert count("aten::var_mean", step) == 0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_only_what_is_needed_is_computed(training) -> None:
    """The flags of the op: nothing for a frozen weight, nor for an input without a gradient."""
    case = make((3, 4, 5, 6))
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.bnext.batch_norm_double_backward.default:
                seen.append(args[-3:])
            return func(*args, **(kwargs or {}))

    x, weight = case.x.requires_grad_(), case.weight.requires_grad_(False)
    y = batch_norm_act(x, *case.stats, weight, None, None, training, act=None)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with Spy():
        torch.autograd.grad(first.square().sum(), x)
    # grad_out, input, weight; with frozen statistics dx does not depend on x.
    assert seen == [(True, training, False)]


def test_same_twice_with_retained_graph() -> None:
    case = make((3, 4, 5, 6), dtypes=DTYPES[1])
    x = case.x.requires_grad_()
    y = batch_norm_act(x, None, None, case.weight, case.bias, training=True)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    once = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
    again = torch.autograd.grad(first.square().sum(), x)
    assert torch.equal(*once, *again)


def test_an_input_changed_in_place_is_noticed() -> None:
    case = make((3, 4, 5, 6))
    leaf = case.x.requires_grad_()
    x = leaf * 1
    y = batch_norm_act(x, None, None, case.weight, case.bias, training=True)
    (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.square().sum().backward()


def test_r1_regularisation_trains_as_with_torch(device) -> None:
    """The whole of R1 regularisation (Mescheder et al. 2018): an optimizer step that is torch's."""
    theirs = Critic(nn.BatchNorm2d).to(device)
    ours = bnext.convert(copy.deepcopy(theirs))
    x = torch.randn(5, 3, 12, 12, device=device)
    for critic in (ours, theirs):
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(critic(leaf).sum(), leaf, create_graph=True)
            grad.square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-5)


def test_third_derivative_through_other_operations(device) -> None:
    """Against the formula itself: ATen's own third derivative lacks terms (torch 2.13)."""
    case = make((4, 3, 5), dtypes=DTYPES[1], device=device)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return batch_norm_act(x, None, None, weight, case.bias, training=True, act=None)

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return reference.forward(x, weight, case.bias).output

    results = []
    for function in (ours, formula):
        x, weight = (t.detach().clone().requires_grad_() for t in (case.x, case.weight))
        # The incoming gradient is a function of the input too: what it owes counts once.
        loss = function(x * 1.5, weight).tanh().sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(second.square().sum(), (x, weight)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
