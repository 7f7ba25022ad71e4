"""PyTorch's machinery around the modules: each transform against torch.nn under the same one."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import bnext
from bnext.functional import batch_norm, batch_norm_act


class Net(nn.Module):
    """conv, batch norm, relu, and a batch norm with a residual: what a ResNet is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return torch.relu(self.bn2(x) + x).mean((2, 3))


class OurNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = bnext.BatchNorm2d(4)
        self.bn2 = bnext.BatchNormAct2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.bn2(x, x).mean((2, 3))


def nets() -> tuple[Net, OurNet]:
    theirs, ours = Net(), OurNet()
    with torch.no_grad():
        for bn in (theirs.bn, theirs.bn2):
            bn.weight.uniform_(0.5, 1.5), bn.bias.normal_()
            bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def images(n: int = 4, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size)


def assert_close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def train_step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
def test_compile_trains_without_graph_breaks(dynamic) -> None:
    theirs, ours = nets()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for x in (images(), images(), images(6, 11)):
        y, grads = train_step(compiled, x)
        z, expected = train_step(theirs, x)
        assert_close(y, z)
        assert_close({k.removeprefix("_orig_mod."): v for k, v in grads.items()}, expected)
        assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    x = images()
    assert_close(compiled.eval()(x), theirs.eval()(x))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_training_forward_is_eagers_bit_for_bit() -> None:
    bn = bnext.BatchNormAct2d(4)
    twin = copy.deepcopy(bn)
    x = torch.randn(3, 4, 5, 6)
    y = torch.compile(bn, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, twin(x))
    assert torch.equal(bn.running_var, twin.running_var)
    assert int(bn.num_batches_tracked) == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_inductor_compiles_a_training_step() -> None:
    theirs, ours = nets()
    x = images()
    try:
        y, grads = train_step(torch.compile(ours, fullgraph=True), x)
    except torch._inductor.exc.InductorError as error:
        if "compiler" in str(error).lower() and "not found" in str(error).lower():
            pytest.skip(f"inductor has no C++ compiler here: {error}")
        raise
    z, expected = train_step(theirs, x)
    assert_close(y, z)
    assert_close({k.removeprefix("_orig_mod."): v for k, v in grads.items()}, expected)


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compile_with_momentum_none_counts_the_batches() -> None:
    ours, theirs = bnext.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = images()
        compiled(x), theirs(x)
    assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_in_eval_is_aten_and_mutates_nothing(strict) -> None:
    theirs, ours = (m.eval() for m in nets())
    x = images()
    program = torch.export.export(ours, (x,), strict=strict)
    assert not any("bnext" in str(node.target) for node in program.graph.nodes)
    program = program.run_decompositions()
    assert not program.graph_signature.buffers_to_mutate
    assert_close(program.module()(x), theirs(x))


def test_export_in_training_updates_the_statistics() -> None:
    theirs, ours = nets()
    x = images()
    module = torch.export.export(ours, (x,)).module()
    assert_close(module(x), theirs(x))
    state = module.state_dict()
    assert_close({k: state[k] for k in theirs.state_dict()}, theirs.state_dict())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes(use_reentrant) -> None:
    theirs, ours = nets()
    x = images()
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, leaf, use_reentrant=use_reentrant)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        results.append((leaf.grad, grads, model.state_dict()))
    assert_close(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_func_grad_of_a_functional_call(training) -> None:
    x = images()
    results = []
    for model in nets():
        model.train(training)
        # As arguments: a buffer that a transform captures may not be changed in place.
        buffers = {k: v.clone() for k, v in model.named_buffers()}

        def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], m=model) -> Tensor:
            return functional_call(m, (parameters, buffers), (x,)).square().sum()

        gradients = grad(loss)({k: v.detach() for k, v in model.named_parameters()}, buffers)
        results.append((gradients, buffers))
    assert_close(*results)


def test_func_second_derivative() -> None:
    x, v = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    results = []
    for function in (batch_norm, nn.functional.batch_norm):

        def loss(x: Tensor, f=function) -> Tensor:
            return f(x, None, None, training=True).pow(3).sum()

        results.append(grad(lambda x, g=loss: (grad(g)(x) * v).sum())(x))
    assert_close(*results)


def test_vmap_in_eval() -> None:
    theirs, ours = (m.eval() for m in nets())
    x = torch.randn(5, 4, 3, 8, 8)
    with torch.no_grad():
        assert_close(vmap(ours)(x), vmap(theirs)(x))


@pytest.mark.parametrize("batched_weight", [True, False])
def test_vmap_in_training_without_running_statistics(batched_weight) -> None:
    x, w = torch.randn(5, 6, 4, 3, 3), torch.rand(5, 4) if batched_weight else torch.rand(4)
    dims = (0, 0 if batched_weight else None)
    ours, theirs = (
        vmap(lambda x, w, f=f: f(x, None, None, w, None, True), dims)(x, w)
        for f in (batch_norm, nn.functional.batch_norm)
    )
    assert_close(ours, theirs)


def test_vmap_updates_batched_running_statistics() -> None:
    x = torch.randn(5, 6, 4, 3)
    results = []
    for function in (batch_norm, nn.functional.batch_norm):
        mean, var = torch.zeros(5, 4), torch.ones(5, 4)
        y = vmap(lambda x, m, v, f=function: f(x, m, v, training=True))(x, mean, var)
        results.append((y, mean, var))
    assert_close(*results)


def test_vmap_with_unbatched_running_statistics_is_torchs_error() -> None:
    x = torch.randn(5, 6, 4, 3)
    for function in (batch_norm, nn.functional.batch_norm):
        stats = torch.zeros(4), torch.ones(4)
        with pytest.raises(RuntimeError):
            vmap(lambda x, f=function, s=stats: f(x, *s, training=True))(x)
        assert torch.equal(stats[0], torch.zeros(4))


def test_per_sample_gradients() -> None:
    x = torch.randn(7, 6, 4, 3)
    ours, theirs = (
        vmap(grad(lambda x, f=f: f(x, None, None, training=True).pow(3).sum()))(x)
        for f in (batch_norm, nn.functional.batch_norm)
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_mode_derivative(training) -> None:
    x, tangent = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    stats = torch.randn(4), torch.rand(4) + 0.5

    def function(f, x: Tensor) -> Tensor:
        return f(x, stats[0].clone(), stats[1].clone(), training=training)

    ours, theirs = (
        jvp(lambda x, f=f: function(f, x), (x,), (tangent,))
        for f in (batch_norm, nn.functional.batch_norm)
    )
    assert_close(ours, theirs)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        y = function(batch_norm, dual)
        assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, theirs[1])


def test_jacobians_agree_forward_and_reverse() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return batch_norm(x, None, None, training=True)

    torch.testing.assert_close(torch.func.jacrev(function)(x), torch.func.jacfwd(function)(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_jit_script(training) -> None:
    theirs, ours = (m.train(training) for m in nets())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(ours)
    x = images()
    assert_close(scripted(x), theirs(x))
    assert_close(dict(scripted.named_buffers()), dict(theirs.named_buffers()))


def test_jit_trace_in_eval() -> None:
    theirs, ours = (m.eval() for m in nets())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(ours, images())
    x = images(2, 9)
    assert_close(traced(x), theirs(x))


def test_fx_keeps_the_modules_whole() -> None:
    _, ours = nets()
    traced = torch.fx.symbolic_trace(ours)
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["conv", "bn", "bn2"]
    x = images()
    assert_close(traced.eval()(x), ours.eval()(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_bfloat16(training, device) -> None:
    theirs, ours = (m.train(training).to(device) for m in nets())
    dtypes, results = [], []
    ours.bn.register_forward_hook(lambda m, args, out: dtypes.append((args[0].dtype, out.dtype)))
    x = images().to(device)
    for model in (theirs, ours):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        results.append((y.detach().float(), {n: p.grad for n, p in model.named_parameters()}))
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.05, atol=0.05)
    for name, gradient in results[0][1].items():
        assert results[1][1][name].dtype == gradient.dtype == torch.float32
        torch.testing.assert_close(results[1][1][name], gradient, rtol=0.1, atol=0.15)


def test_parameters_used_twice_accumulate() -> None:
    results = []
    for bn in (bnext.BatchNorm1d(4), nn.BatchNorm1d(4)):
        torch.manual_seed(1)
        x = torch.randn(6, 4)
        bn(bn(x) * 2 + 1).pow(3).sum().backward()
        results.append((bn.weight.grad, bn.bias.grad, bn.state_dict()))
    assert_close(*results)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_tensor_subclass_takes_part(training) -> None:
    class Labelled(torch.Tensor):
        pass

    bn = bnext.BatchNorm1d(3).train(training)
    y = bn(torch.randn(4, 3).as_subclass(Labelled))
    assert type(y) is Labelled


def test_inference_mode_and_no_grad_make_no_graph(device) -> None:
    bn = bnext.BatchNorm2d(3, device=device)
    x = images().to(device)
    with torch.no_grad():
        assert bn(x).grad_fn is None
    with torch.inference_mode():
        assert bn(x).is_inference()
    assert int(bn.num_batches_tracked) == 2
    assert bn(x).grad_fn is not None


def test_meta_tensors_give_shapes() -> None:
    x = torch.randn(3, 4, 5, 6, device="meta").to(memory_format=torch.channels_last)
    y = batch_norm_act(x, None, None, residual=x, training=True)
    assert y.is_meta and y.shape == x.shape and y.stride() == x.stride()


def test_profiler_shows_the_op_by_name() -> None:
    bn = bnext.BatchNorm2d(3)
    x = images()
    with torch.profiler.profile() as profile:
        bn(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"bnext::batch_norm_train", "bnext::batch_norm_backward"} <= names


def test_anomaly_mode_and_saved_tensor_hooks() -> None:
    bn = bnext.BatchNorm2d(3)
    packed = []
    with (
        torch.autograd.detect_anomaly(check_nan=True),
        torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t),
    ):
        bn(images().requires_grad_()).sum().backward()
    assert any(t.shape == (4, 3, 8, 8) for t in packed)
    assert not any(t is b for t in packed for b in bn.buffers()), "a running statistic was saved"
