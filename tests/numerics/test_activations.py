"""Every activation after batch norm and residual, against its definition in float64."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import bnext
from bnext import reference
from bnext.functional import batch_norm_act
from cases import LAYOUTS, Case, make

# name, parameter
ACTS = [
    (act, param)
    for act in reference.ACTIVATIONS
    for param in ([None, 0.3] if act in ("leaky_relu", "elu") else [None])
]
DEFAULTS = {"leaky_relu": 0.01, "elu": 1.0}
MODULES = {
    "relu": nn.ReLU(), "relu6": nn.ReLU6(), "leaky_relu": nn.LeakyReLU(), "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "elu": nn.ELU(),
    "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(),
}  # fmt: skip


def leaves(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    tensors = (case.x, case.weight, case.bias, case.residual)
    return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors if t is not None]


def expected(
    case: Case, training: bool, act: str | None, param: float | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients, differentiated in float64."""
    inputs = leaves(case, torch.float64)
    stats = None if training else case.stats
    param = DEFAULTS.get(act, 0.0) if param is None else param
    residual = inputs[3] if len(inputs) == 4 else None
    y = reference.forward(*inputs[:3], residual, stats, act=act, act_param=param).output
    return y.detach(), torch.autograd.grad(y, inputs, case.grad_out.double())


def found(
    case: Case, training: bool, act: str | None, param: float | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = leaves(case)
    residual = inputs[3] if len(inputs) == 4 else None
    stats = [s.clone() for s in case.stats]
    y = batch_norm_act(inputs[0], *stats, *inputs[1:3], residual, training, act=act,
                       act_param=param)  # fmt: skip
    return y.detach(), torch.autograd.grad(y, inputs, case.grad_out)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc", "ndhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("act", "param"), ACTS)
def test_values_and_gradients(act, param, dtype, layout, residual, training, device) -> None:
    params = torch.float64 if dtype is torch.float64 else torch.float32
    case = make(*LAYOUTS[layout], (dtype, params, params), device, residual=residual)
    (y, grads), (y64, grads64) = (f(case, training, act, param) for f in (found, expected))
    # Some roundings of z and of f'(z), each times what it meets; in bfloat16 z itself is rounded
    # where torch's operation follows the kernel, on GPUs.
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), y64, rtol=tolerance, atol=tolerance)
    for got, want in zip(grads, grads64, strict=True):
        error = (got.double() - want).abs().max()
        assert error <= tolerance * want.abs().max(), (act, float(error))


@pytest.mark.parametrize(("act", "param"), ACTS)
def test_special_values(act, param, device) -> None:
    """At the kinks, infinite, NaN and far out: as torch's operation, in value and gradient."""
    inf, nan = math.inf, math.nan
    values = [0.0, -0.0, 1e-40, 3.0, -3.0, 6.0, 100.0, -100.0, 1e30, -1e30, inf, -inf, nan]
    z = torch.tensor(values, device=device).view(-1, 1).requires_grad_()
    stats = torch.zeros(1, device=device), torch.ones(1, device=device)
    theirs = z if act is None else MODULES[act](z)
    if param is not None:
        theirs = type(MODULES[act])(param)(z)
    ours = batch_norm_act(torch.zeros_like(z), *stats, residual=z, act=act, act_param=param)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    grads = [torch.autograd.grad(y, z, torch.ones_like(z))[0] for y in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", MODULES)
def test_the_module_is_torchs_two(act, training, device) -> None:
    """Values and gradients of it, its copy and its script; printing it says which it is."""
    x, shortcut = torch.randn(2, 4, 3, 5, 5, device=device)
    theirs = nn.BatchNorm2d(3, device=device).train(training)
    ours = bnext.BatchNormAct2d(3, device=device, act=act).train(training)
    ours.load_state_dict(theirs.state_dict())
    assert f"act={act!r}" in repr(ours)
    for run in (ours, copy.deepcopy(ours), torch.jit.script(copy.deepcopy(ours))):
        for added in (None, shortcut):
            leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
            z = theirs(other)
            want = MODULES[act](z if added is None else z + added)
            got = run(leaf) if added is None else run(leaf, added)
            torch.testing.assert_close(got, want)
            got.square().sum().backward()
            want.square().sum().backward()
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-5)
        theirs.reset_running_stats()
        ours.reset_running_stats()


def test_a_script_refuses_an_unknown_activation() -> None:
    m = bnext.BatchNormAct2d(3, act="elu", act_param=1)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(torch.jit.script(m)(x), nn.ELU(1)(nn.BatchNorm2d(3)(x)))
    m.act = "swish"
    with pytest.raises(torch.jit.Error, match="there is no activation named swish"):
        torch.jit.script(m)(x)


@pytest.mark.parametrize("act", MODULES)
def test_compiled_traced_and_transformed(act, device) -> None:
    m = bnext.BatchNormAct2d(3, device=device, act=act)
    x = torch.randn(4, 3, 5, 5, device=device)
    expected = m(x)
    torch._dynamo.reset()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(m)(x), expected)
    grad = torch.func.grad(lambda x: m(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    m(leaf).square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", MODULES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivatives(act, training, device) -> None:
    bn = bnext.BatchNormAct2d(2, device=device, dtype=torch.float64, act=act).train(training)
    inputs = [torch.randn(3, 2, 2, 2, device=device, dtype=torch.float64) for _ in range(2)]
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradgradcheck(bn, inputs, atol=1e-4)


def test_explain_says_which_are_not_in_the_kernel() -> None:
    for act in MODULES:
        for device in ("cpu", bnext.introspect.GPUS["H200"]):
            explained = str(bnext.explain((8, 4, 7, 7), act=act, residual=True, device=device))
            assert f"then {act}" in explained
            composed = device != "cpu" and act != "relu"
            assert (f"{act} is ATen's operation" in explained) == composed
