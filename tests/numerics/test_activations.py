"""Every activation after batch norm and residual, against its definition in float64."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import bnext
from bnext import reference
from bnext.functional import batch_norm_act
from cases import LAYOUTS, SHAPES, Case, make, shape_id

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
    # Some roundings of z and of f'(z), each times what it meets.
    tolerance = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), y64, rtol=tolerance, atol=tolerance)
    for got, want in zip(grads, grads64, strict=True):
        error = (got.double() - want).abs().max()
        assert error <= tolerance * want.abs().max(), (act, float(error))


# Rows of columns that end in a part of a unit each, and a run that is two pieces.
ENDS = [((3, 2051, 1, 2), torch.channels_last), ((2, 2, 1, 20001), torch.contiguous_format)]


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("shape", [*SHAPES[11:], *ENDS], ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("act", ["relu6", "silu"])
def test_gradients_of_shapes(act, dtype, shape, residual, device) -> None:
    params = torch.float64 if dtype is torch.float64 else torch.float32
    case = make(*shape, (dtype, params, params), device, residual=residual)
    (_, grads), (_, grads64) = (f(case, True, act, None) for f in (found, expected))
    tolerance = 64 * torch.finfo(dtype).eps
    for got, want in zip(grads, grads64, strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


def special_values(dtype: torch.dtype) -> list[float]:
    """Kinks and their neighbours, signed zeros, subnormal, far out, infinite, NaN."""
    kinks = torch.tensor([0.0, 3.0, 6.0], dtype=dtype)
    beside = [torch.nextafter(kinks, torch.full_like(kinks, to)) for to in (-math.inf, math.inf)]
    tiny, large = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max ** 0.75
    far = [20.0, 88.5, 104.0, 710.0, 746.0, 1e4, large, math.inf]
    positive = [*torch.cat([kinks, *beside]).tolist(), tiny, tiny / 4, 1.0, *far]
    return [*positive, *(-x for x in positive), math.nan]


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize(("act", "param"), ACTS)
def test_special_values(act, param, dtype, residual, device) -> None:
    """As torch's operation on one element, in value and gradient, whatever its neighbours are."""

    def torchs(z: Tensor) -> Tensor:
        module = MODULES.get(act, nn.Identity())
        return (module if param is None else type(module)(param))(z)

    values = special_values(dtype)
    # On the CPU torch's vectors differ from its scalars where z is NaN, oneDNN's at infinity too.
    theirs = [torch.tensor([v], dtype=dtype, device=device, requires_grad=True) for v in values]
    want = [torchs(z) for z in theirs]
    want_grad = [
        torch.autograd.grad(y, z, torch.ones_like(z))[0] for y, z in zip(want, theirs, strict=True)
    ]
    # 7 rows end in a part of a unit; a value has a unit for itself, and shares one.
    z = torch.tensor(values, dtype=dtype, device=device)
    for shape in ((len(z), 1, 1, 1), (7, 1, 1, 67)):
        x = z.view(-1, *[1] * 3) if shape[0] > 7 else z.repeat(7 * 67 // len(z) + 1)[: 7 * 67]
        x = x.view(shape).requires_grad_()
        # (x - 0) / sqrt(3 / 4 + 1 / 4)
        stats = torch.tensor([[0], [0.75]], dtype=dtype, device=device)
        inputs = (torch.zeros_like(x), x) if residual else (x, None)
        ours = batch_norm_act(inputs[0], *stats, residual=inputs[1], act=act, act_param=param,
                              eps=0.25)  # fmt: skip
        (grad,) = torch.autograd.grad(ours, x, torch.ones_like(x))
        tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
        for got, expected in ((ours, want), (grad, want_grad)):
            expected = torch.cat(expected).repeat(got.numel() // len(z) + 1)[: got.numel()]
            torch.testing.assert_close(got.flatten(), expected, equal_nan=True, **tolerance)


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


def test_explain_has_the_kernels_take_all_of_them() -> None:
    for act in MODULES:
        for device in ("cpu", bnext.introspect.GPUS["H200"]):
            explained = str(bnext.explain((8, 4, 7, 7), act=act, residual=True, device=device))
            assert f"then {act}" in explained and "ATen's operation, after" not in explained
