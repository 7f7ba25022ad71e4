"""PyTorch's own samples of batch norm under what watches or traces a call.

What fake and meta tensors, `make_fx`, `torch.func`, AOTAutograd, torch.fx and TorchScript make of
`torch.nn.functional.batch_norm`, they must make of ours.
"""

import copy
import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import aot_export_module, aot_function, make_boxed_func
from torch._subclasses import CrossRefFakeMode, FakeTensorMode
from torch.func import grad, vjp, vmap
from torch.fx.experimental.normalize import NormalizeArgs
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.operator_schemas import normalize_function
from torch.testing._internal import common_utils
from torch.testing._internal.common_jit import JitCommonTestCase, check_against_reference
from torch.utils._pytree import tree_map, tree_map_only
from torch_samples import OURS, THEIRS, Call, fresh, functional_calls, leaves, outcome

import bnext

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def carrying_real_tensors(**options: bool) -> FakeTensorMode:
    """Fake tensors that hold real ones, which every operation runs on too, as in draft export."""
    with functorch_config.patch(fake_tensor_propagate_real_tensors=True):
        return FakeTensorMode(shape_env=ShapeEnv(), **options)


FAKE_MODES: dict[str, Callable[[], FakeTensorMode]] = {
    "fake": FakeTensorMode,
    "symbolic": lambda: FakeTensorMode(shape_env=ShapeEnv()),
    "carrying real ones": carrying_real_tensors,
}


def metadata(values: Any) -> list:
    return tree_map_only(Tensor, lambda t: (tuple(map(int, t.shape)), t.dtype, t.stride()), values)


def trained(function: Callable[..., Tensor], call: Call) -> tuple[Tensor, ...]:
    """Output and the gradients for everything but the running statistics."""
    args, kwargs = call
    wanted = [t.requires_grad_() for t in (args[0], *args[3:]) if isinstance(t, Tensor)]
    y = function(*args, **kwargs)
    return y.detach(), *torch.autograd.grad(y.sin().sum(), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAKE_MODES)
def test_fake_tensors(kind, dtype, device) -> None:
    """torch's test_fake and test_fake_crossref_backward_no_amp, whose reference is real tensors."""
    loose = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {}
    for call in functional_calls(device, dtype):
        expected = trained(THEIRS, fresh(call))
        mode = FAKE_MODES[kind]()
        fake = tree_map_only(Tensor, mode.from_tensor, fresh(call))
        with mode:
            got = trained(OURS, fake)
        assert metadata(got) == metadata(expected)
        if mode.propagate_real_tensors:
            torch.testing.assert_close(got[0].real_tensor, expected[0], **loose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_meta_tensors(dtype) -> None:
    """torch's test_meta_outplace."""
    for call in functional_calls("cpu", dtype):
        expected = trained(THEIRS, fresh(call))
        got = trained(OURS, tree_map_only(Tensor, lambda t: t.to("meta"), call))
        assert all(t.is_meta for t in got)
        assert metadata(got) == metadata(expected)


@pytest.mark.parametrize("carrying", [True, False])
def test_fake_tensors_beside_real_ones(carrying, device) -> None:
    """torch's test_fake_crossref, where a mode repeats every operation with fake tensors, and its
    test_fake_tensor_batch_norm, where those carry real ones.
    """
    for call in functional_calls(device, torch.float32):
        ours, theirs = fresh(call), fresh(call)
        with (
            functorch_config.patch(fake_tensor_propagate_real_tensors=carrying),
            CrossRefFakeMode(),
        ):
            got = trained(OURS, ours)
        expected = trained(THEIRS, theirs)
        torch.testing.assert_close((got[0], ours), (expected[0], theirs))
        assert metadata(got) == metadata(expected)


@MODES
@pytest.mark.parametrize("fake", ["input", "parameters", "statistics", "all but input"])
@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("kind", [FakeTensorMode, carrying_real_tensors])
def test_real_and_fake_tensors_mixed(kind, within, allowed, fake, training, device) -> None:
    x, c = torch.randn(4, 3, 5, device=device), torch.ones(3, device=device)
    chosen = {
        "input": [0], "parameters": [3, 4], "statistics": [1, 2], "all but input": [1, 2, 3, 4]
    }[fake]  # fmt: skip
    results = []
    for function in (OURS, THEIRS):
        mode = kind(allow_non_fake_inputs=allowed)
        args = [x, *(c.clone() for _ in range(4))]
        args = [mode.from_tensor(t) if i in chosen else t for i, t in enumerate(args)]

        def call(function=function, args=args):
            y = function(*args, training=training)
            return type(y), metadata(y)

        if within:
            with mode:
                results.append(outcome(call))
        else:
            results.append(outcome(call))
    assert results[0] == results[1]


@MODES
@pytest.mark.parametrize("residual", [True, False])
def test_modules_with_fake_tensors_that_carry_real_ones(residual, training, device) -> None:
    """torch's test_fake_tensor_batch_norm with propagate_real_tensors."""
    bn = bnext.BatchNormAct2d(3).to(device).train(training)
    twin = nn.BatchNorm2d(3).to(device).train(training)
    x, r = torch.randn(2, 2, 3, 4, 4, device=device)
    mode = carrying_real_tensors()
    state = {k: mode.from_tensor(t.detach().clone()) for k, t in bn.state_dict().items()}
    inputs = tuple(map(mode.from_tensor, (x, r) if residual else (x,)))
    with mode:
        y = torch.func.functional_call(bn, state, inputs)
    torch.testing.assert_close(y.real_tensor, torch.relu(twin(x) + r if residual else twin(x)))
    # As without a mode. nn.BatchNorm's move twice: the mode runs its operations at two levels.
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(state[name].real_tensor, buffer)


@pytest.mark.parametrize("pre_dispatch", [True, False])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(tracing_mode, pre_dispatch, device) -> None:
    """torch's test_make_fx_exhaustive: what is traced computes on other values what torch does."""
    for call in functional_calls(device):
        args, kwargs = call

        def forward(*tensors, function=OURS, args=args, kwargs=kwargs):
            given = iter(tensors)
            return function(*(next(given) if t is not None else None for t in args), **kwargs)

        traced = make_fx(forward, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(
            *fresh(leaves(call))
        )
        others = [torch.rand_like(t) + 0.5 for t in leaves(call)]
        ours, theirs = fresh(others), fresh(others)
        y, z = traced(*ours), forward(*theirs, function=THEIRS)
        torch.testing.assert_close((y, ours), (z, theirs))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_of_a_training_step(tracing_mode, device) -> None:
    for call in functional_calls(device):

        def step(call):
            return trained(OURS, call)

        traced = make_fx(step, tracing_mode=tracing_mode)(fresh(call))
        torch.testing.assert_close(traced(fresh(call)), trained(THEIRS, fresh(call)))


def _grad(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return grad(lambda x: f(x).sin().sum())(x)


def _vjp(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    y, pull = vjp(f, x)
    return y, pull(torch.cos(y))


def _vjpvjp(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    (y, dx), pull = vjp(lambda x: (f(x), vjp(f, x)[1](torch.cos(x.detach()))[0]), x)
    return y, dx, pull((torch.sin(y), torch.cos(dx)))


def _vmapvjp(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    y, pull = vjp(f, x)
    return vmap(pull)(torch.stack([torch.cos(y), torch.sin(y)]))


def _vmapvjp_inside(f: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return vmap(lambda dy: vjp(f, x)[1](dy))(torch.stack([torch.cos(x), torch.sin(x)]))


@pytest.mark.parametrize(
    "transform", [_grad, _vjp, _vjpvjp, _vmapvjp, _vmapvjp_inside], ids=lambda f: f.__name__[1:]
)
def test_func_transforms(transform, device) -> None:
    """torch's test_grad, test_vjp, test_vjpvjp, test_vmapvjp; on (0,) as well."""
    for args, kwargs in functional_calls(device):
        results = []
        for function in (OURS, THEIRS):
            rest, options = fresh(args[1:]), fresh(kwargs)

            def f(x, function=function, rest=rest, options=options):
                return function(x, *rest, **options)

            results.append((transform(f, args[0]), rest))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("dynamic", [True, False])
def test_aot_function(dynamic, device) -> None:
    """torch's test_aot_autograd_exhaustive."""
    for call in functional_calls(device):

        def forward(args, function=OURS, kwargs=call[1]):
            return function(*args, **kwargs)

        def nothing(graph: fx.GraphModule, _inputs: list) -> Callable[..., Any]:
            return make_boxed_func(graph.forward)

        compiled = aot_function(forward, fw_compiler=nothing, bw_compiler=nothing, dynamic=dynamic)
        ours, theirs = fresh(call), fresh(call)
        got = trained(lambda *args, **_: compiled(list(args)), ours)  # noqa: B023
        torch.testing.assert_close((got, ours), (trained(THEIRS, theirs), theirs))


class ConvBatchNorm(nn.Module):
    def __init__(self, package: Any) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 3, 3, padding=1), package.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.bn(self.conv(x)).sum(),)


@MODES
@pytest.mark.parametrize("way", ["pre-dispatch", "post-dispatch", "joint"])
def test_aot_export(way, training) -> None:
    """torch's test_aot_export_predispatch_conv_and_bn: the operations are torch's."""
    options: dict[str, Any] = {"trace_joint": way == "joint", "pre_dispatch": way == "pre-dispatch"}
    if way == "joint":
        options["output_loss_index"] = 0
    theirs, ours = ConvBatchNorm(nn), ConvBatchNorm(bnext)
    ours.load_state_dict(theirs.state_dict())
    graphs = []
    for model in (ours, theirs):
        graph, _ = aot_export_module(model.train(training), [torch.randn(2, 1, 4, 4)], **options)
        graphs.append(sorted((n.op, str(n.target)) for n in graph.graph.nodes))
    assert graphs[0] == graphs[1]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), bnext.BatchNorm2d(4)
        self.act = bnext.BatchNormAct2d(4)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        x = bnext.functional.batch_norm(x, None, None, weight, training=True)
        x = bnext.functional.batch_norm_act(x, None, None, weight, training=True, residual=x)
        return self.act(x, residual=x)


@pytest.mark.parametrize("transformer", [fx.Transformer, NormalizeArgs])
def test_fx_transformers(transformer) -> None:
    block = Block()
    twin = copy.deepcopy(block)
    x, weight = torch.randn(2, 3, 5, 5), torch.rand(4)
    traced = transformer(fx.symbolic_trace(block)).transform()
    torch.testing.assert_close(traced(x, weight), twin(x, weight))
    torch.testing.assert_close(traced.state_dict(), twin.state_dict())
    called = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert called == [OURS, bnext.functional.batch_norm_act]


def test_fx_normalized_arguments(device) -> None:
    """torch's test_normalize_operator_exhaustive: the arguments are found by name, then run."""
    for call in functional_calls(device):
        args, kwargs = call
        types = tree_map(type, (tuple(args), kwargs))
        normalized = normalize_function(OURS, tuple(args), kwargs, *types)
        theirs = normalize_function(THEIRS, tuple(args), kwargs, *types)
        assert normalized.kwargs.keys() == theirs.kwargs.keys()

        class Model(nn.Module):
            def forward(self, x):
                return OURS(x, *args[1:], **kwargs)  # noqa: B023

        traced = fx.symbolic_trace(Model())
        (node,) = (n for n in traced.graph.nodes if n.op == "call_function")
        assert node.target is OURS
        node.args, node.kwargs = node.normalized_arguments(traced, *types)
        traced.recompile()
        torch.testing.assert_close(traced(args[0]), THEIRS(*fresh(args), **fresh(kwargs)))


@pytest.mark.parametrize("way", ["script", "trace"])
def test_jit_consistency(way, monkeypatch) -> None:
    """torch's test_variant_consistency_jit: values, first and second derivatives."""
    executor = common_utils.cppProfilingFlagsToProfilingMode()
    monkeypatch.setattr(common_utils, "GRAPH_EXECUTOR", executor)  # as its main program does
    case = JitCommonTestCase()
    for args, kwargs in functional_calls("cpu"):
        args = [t.requires_grad_() if i in (0, 3, 4) and t is not None else t
                for i, t in enumerate(fresh(args))]  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if way == "script":
                function = torch.jit.script(OURS)
            else:
                tensors = [t for t in args if t is not None]

                def call(*tensors, args=args, kwargs=kwargs):
                    given = iter(tensors)
                    return OURS(*(next(given) if t is not None else None for t in args), **kwargs)

                traced = torch.jit.trace(call, fresh(tensors))

                def function(*args, traced=traced, **_):
                    return traced(*(t for t in args if t is not None))

            check_against_reference(
                case, function, THEIRS, operator.pos, args, kwargs, check_types=False
            )
