"""Autograd and torch.func around the modules, each beside torch.nn's under the same transform.

First and second derivatives in numbers are test_gradcheck's and test_double_backward's.
"""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import bnext
from bnext.functional import batch_norm

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Net(nn.Module):
    """A block whose last batch norm adds a residual: ours does all of it in one op."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        self.bn = nn.BatchNorm1d(4)
        self.last = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.fc(x)).tanh()
        return torch.relu(self.last(x * 2) + x)


class OurNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = bnext.BatchNorm1d(4)
        self.last = bnext.BatchNormAct1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.fc(x)).tanh()
        return self.last(x * 2, x)


def nets(training: bool = True, device="cpu", dtype=torch.float64) -> tuple[Net, Net]:
    theirs, ours = Net(), OurNet()
    with torch.no_grad():
        for bn in (theirs.bn, theirs.last):
            bn.weight.uniform_(0.5, 1.5), bn.bias.normal_()
            bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device, dtype).train(training), theirs.to(device, dtype).train(training)


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and buffers as arguments, since no transform lets captured ones be changed."""
    return (
        {k: v.detach() for k, v in model.named_parameters()},
        {k: v.clone() for k, v in model.named_buffers()},
    )


def data(device="cpu", dtype=torch.float64) -> Tensor:
    return torch.randn(6, 5, device=device, dtype=dtype)


def both(function, training: bool, device) -> None:
    """function(call, parameters, x) with ours and with torch's, under the same transform."""
    x = data(device)
    results = []
    for model in nets(training, device):
        parameters, buffers = state(model)

        def call(parameters, x, m=model, buffers=buffers) -> Tensor:
            fresh = {k: v.clone() for k, v in buffers.items()}
            y = functional_call(m, (parameters, fresh), (x,))
            return y + fresh["bn.running_mean"].detach() * 0.5  # it was updated, or this shows it

        torch.manual_seed(5)
        results.append(function(call, parameters, x))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


@MODES
def test_functional_call_changes_the_buffers_it_is_given(training, device) -> None:
    results = []
    x = data(device)
    for model in nets(training, device):
        before = copy.deepcopy(model.state_dict())
        given = state(model)
        y = functional_call(model, given, (x,))
        results.append((y, given[1]))
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(*results)


@MODES
def test_jvp_by_input_and_parameters(training, device) -> None:
    def function(call, p, x):
        tangents = {k: torch.randn_like(v) for k, v in p.items()}
        return jvp(lambda p, x: call(p, x), (p, x), (tangents, torch.randn_like(x)))

    both(function, training, device)


@MODES
def test_forward_ad_of_the_module(training, device) -> None:
    results = []
    x, tangent = data(device), data(device)
    for model in nets(training, device):
        with torch.autograd.forward_ad.dual_level():
            y = model(torch.autograd.forward_ad.make_dual(x, tangent))
            results.append((*torch.autograd.forward_ad.unpack_dual(y), model.state_dict()))
    assert results[0][1] is not None
    torch.testing.assert_close(*results)


@MODES
def test_vjp(training, device) -> None:
    def function(call, p, x):
        y, pull = vjp(lambda p, x: call(p, x), p, x)
        return y, pull(torch.cos(y))

    both(function, training, device)


@MODES
def test_grad_and_value(training, device) -> None:
    both(
        lambda call, p, x: torch.func.grad_and_value(lambda p: call(p, x).square().sum())(p),
        training, device,
    )  # fmt: skip


@MODES
@pytest.mark.parametrize("jacobian", [jacrev, jacfwd], ids=["rev", "fwd"])
def test_jacobians(jacobian, training, device) -> None:
    both(lambda call, p, x: jacobian(lambda x: call(p, x))(x), training, device)


@MODES
def test_hessian(training, device) -> None:
    both(lambda call, p, x: hessian(lambda x: call(p, x).pow(3).sum())(x), training, device)


@MODES
def test_gradient_of_a_gradient(training, device) -> None:
    def function(call, p, x):
        def penalty(p):
            return grad(lambda x: call(p, x).pow(3).sum())(x).square().sum()

        return grad(penalty)(p)

    both(function, training, device)


def test_per_sample_gradients_in_eval(device) -> None:
    def function(call, p, x):
        def loss(p, sample):
            return call(p, sample.unsqueeze(0)).square().sum()

        return vmap(grad(loss), (None, 0))(p, x)

    both(function, False, device)


@MODES
def test_ensemble_of_stacked_modules(training, device) -> None:
    """vmap over weights and over running statistics, which are updated in place where they are."""
    results = []
    x = data(device)
    for kind in (0, 1):
        torch.manual_seed(3)
        models = [nets(training, device)[kind] for _ in range(3)]
        parameters, buffers = stack_module_state(models)
        parameters = {k: v.detach() for k, v in parameters.items()}

        def member(p, b, x, m=models[0]):
            return functional_call(m, (p, b), (x,))

        y = vmap(member, (0, 0, None))(parameters, buffers, x)
        gradients = vmap(grad(lambda p, b, x, f=member: f(p, b, x).sum()), (0, 0, None))(
            parameters, {k: v.clone() for k, v in buffers.items()}, x
        )
        results.append((y, gradients, buffers))
        expected = torch.stack([model(x) for model in models])
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*results)
    if training:
        assert results[0][2]["bn.num_batches_tracked"].tolist() == [1, 1, 1]


@MODES
def test_replace_all_batch_norm_modules(training, device) -> None:
    """The cure that torch.func's documentation gives for vmap in training."""
    results = []
    x = torch.randn(3, 6, 5, dtype=torch.float64, device=device)
    for model in nets(training, device):
        torch.func.replace_all_batch_norm_modules_(model)
        assert model.bn.running_mean is None
        results.append(vmap(model)(x))
    torch.testing.assert_close(*results)


@MODES
def test_batched_gradients(training, device) -> None:
    """torch.autograd's own vectorisation: a vmap over the backward pass alone."""
    results = []
    x = data(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # among them: no batching rule, a slow loop instead
        for model in nets(training, device):
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            rows = torch.eye(y.numel(), dtype=y.dtype, device=device).view(-1, *y.shape)
            results.append(torch.autograd.grad(y, leaf, rows, is_grads_batched=True))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "residual"])
@MODES
def test_only_needed_gradients_are_computed(training, wanted) -> None:
    seen = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.bnext.batch_norm_backward.default:
                left_out = (a.default_value for a in func._schema.arguments[len(args) :])
                seen.append((*args, *left_out)[-4:])
            return func(*args, **(kwargs or {}))

    tensors = {
        "input": torch.randn(3, 4, 5), "weight": torch.rand(4), "bias": torch.rand(4),
        "residual": torch.randn(3, 4, 5),
    }  # fmt: skip
    tensors[wanted].requires_grad_()
    y = bnext.functional.batch_norm_act(
        running_mean=torch.zeros(4), running_var=torch.ones(4), training=training, **tensors
    )
    with Spy():
        torch.autograd.grad(y.sum(), tensors[wanted])
    assert seen == [tuple(name == wanted for name in tensors)]


@MODES
@pytest.mark.parametrize("changed", ["input", "weight", "bias", "running_mean", "output"])
def test_in_place_changes_are_noticed_as_torchs(changed, training, device) -> None:
    """By version counters: an error wherever torch.nn's raises one for good reason."""
    raised = []
    for kind in (bnext.BatchNorm2d, nn.BatchNorm2d):
        bn = kind(3, device=device).train(training)
        x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True) * 1
        y = bn(x)
        loss = y.sum()  # does not need the output
        tensors = {
            "input": x,
            "output": y,
            **dict(bn.named_parameters()),
            **dict(bn.named_buffers()),
        }
        with torch.no_grad():
            tensors[changed].add_(1)
        try:
            loss.backward()
            raised.append(False)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            raised.append(True)
    needed = changed in ("input", "weight") or (changed == "running_mean" and not training)
    # torch.nn's saves the running statistics in training too, and does not use them.
    assert raised == [needed, needed or changed == "running_mean"]


def test_two_forwards_before_one_backward(device) -> None:
    """The running statistics move in between; nothing of the first call's depends on them."""
    results = []
    for model in nets(True, device):
        torch.manual_seed(1)
        a, b = data(device).requires_grad_(), data(device).requires_grad_()
        loss = model(a).sum() + model(b).pow(2).sum()
        results.append((torch.autograd.grad(loss, [a, b, *model.parameters()]), model.state_dict()))
    torch.testing.assert_close(*results)


@MODES
def test_backward_twice_is_torchs_error(training) -> None:
    ours, _ = nets(training)
    loss = ours(data()).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@MODES
def test_saved_tensors_hooks_may_move_what_is_saved(training, device) -> None:
    results = []
    x = data(device)
    for model in nets(training, device):
        with torch.autograd.graph.save_on_cpu():
            y = model(x)
        results.append(torch.autograd.grad(y.sum(), [*model.parameters()]))
    torch.testing.assert_close(*results)


def test_saved_tensors_may_be_packed_with_loss(device) -> None:
    """Hooks that return other tensors: backward takes what it is handed."""

    def run(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.cpu().numpy().copy(), lambda a: torch.from_numpy(a).to(device)
        ):
            y = model(x)
        return torch.autograd.grad(y.sum(), [*model.parameters()])

    x = data(device)
    torch.testing.assert_close(*(run(model, x) for model in nets(True, device)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@MODES
def test_checkpoint(training, use_reentrant, device) -> None:
    """Forward runs twice, so in training the running statistics move twice, as torch.nn's do."""
    results = []
    x = data(device)
    for model in nets(training, device):
        leaf = x.clone().requires_grad_()
        checkpoint(model, leaf, use_reentrant=use_reentrant).square().sum().backward()
        results.append(
            (leaf.grad, {k: p.grad for k, p in model.named_parameters()}, model.state_dict())
        )
        assert int(model.bn.num_batches_tracked) == 2 * training
    torch.testing.assert_close(*results)


def test_selective_checkpoint_can_keep_our_op(device) -> None:
    """The way to update the statistics once: save the op's result instead of running it again."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        keep = op is torch.ops.bnext.batch_norm_train.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    results = []
    x = data(device)
    ours, theirs = nets(True, device)
    for model, kwargs in (
        (ours, {"context_fn": lambda: create_selective_checkpoint_contexts(policy)}),
        (theirs, None),
    ):
        leaf = x.clone().requires_grad_()
        y = (
            model(leaf)
            if kwargs is None
            else checkpoint(model, leaf, use_reentrant=False, **kwargs)
        )
        y.square().sum().backward()
        results.append((leaf.grad, {k: p.grad for k, p in model.named_parameters()}))
    torch.testing.assert_close(*results)


def test_checkpoint_sequential(device) -> None:
    results = []
    x = data(device)
    for kind in (bnext, nn):
        torch.manual_seed(0)
        model = nn.Sequential(*(kind.BatchNorm1d(5) for _ in range(4))).to(device, torch.float64)
        leaf = x.clone().requires_grad_()
        checkpoint_sequential(model, 2, leaf, use_reentrant=False).pow(3).sum().backward()
        results.append((leaf.grad, model.state_dict()))
    torch.testing.assert_close(*results)


def test_gradients_that_are_undefined_stay_so(device) -> None:
    """A detached branch: nothing flows, and nothing is invented."""
    bn = bnext.BatchNorm1d(5, device=device)
    x = torch.randn(6, 5, device=device, requires_grad=True)
    y = bn(x)
    assert torch.autograd.grad(y.detach().sum() + x.sum(), bn.weight, allow_unused=True) == (None,)


def test_running_statistics_with_gradients_are_refused() -> None:
    x = torch.randn(6, 5)
    stats = torch.zeros(5, requires_grad=True), torch.ones(5)
    with pytest.raises(RuntimeError, match="running_mean"):
        batch_norm(x, *stats)
