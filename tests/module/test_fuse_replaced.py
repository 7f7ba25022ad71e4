"""Other tools put something in the place of a batch norm or ReLU that convert(fuse=True) fused.

Whatever stands there is called as the model's own forward calls it; compared with the same tool on
the same model unfused.
"""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from test_fuse import assert_close, fused, randomised, step
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.batchnorm import _BatchNorm

import bnext
from bnext.fuse import FusedForward
from models import Basic, Bottleneck, DenseNet, MobileNet, ResNet


class Summed(nn.Module):
    """Two batch norms whose sum a ReLU takes, called from one place, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))
        return F.relu(self.bn(torch.relu(self.bn(y))))


MODELS = {
    "basic": lambda: ResNet(Basic, [1, 1]),
    "bottleneck": lambda: ResNet(Bottleneck, [1, 1]),
    "mobilenet": MobileNet,
    "densenet": DenseNet,
    "summed": Summed,
}


class Frozen(nn.Module):
    """torchvision's FrozenBatchNorm2d, as timm's freeze_batch_norm_2d uses it."""

    def __init__(self, bn: _BatchNorm) -> None:
        super().__init__()
        self.eps = bn.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(bn, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class AnyDimensions(_BatchNorm):
    """Lightning's _BatchNormXd."""

    def _check_input_dim(self, input: Tensor) -> None:
        return


def with_state_of(new: _BatchNorm, bn: _BatchNorm) -> _BatchNorm:
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(new, name, getattr(bn, name))
    return new.train(bn.training)


def settings(bn: _BatchNorm) -> tuple:
    return bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats


def replace(module: nn.Module, kind: type[nn.Module], make, by=setattr) -> nn.Module:
    """What most tools do: walk over the children and put another module there."""
    for name, child in module.named_children():
        if isinstance(child, kind):
            by(module, name, make(child))
        else:
            replace(child, kind, make, by)
    return module


def norms_by(make, by=setattr):
    return lambda model: replace(model, _BatchNorm, make, by)


def relus_by(make):
    return lambda model: replace(model, nn.ReLU, make)


def in_modules(parent: nn.Module, name: str, child: nn.Module) -> None:
    parent._modules[name] = child


def lightning_and_back(model: nn.Module) -> nn.Module:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def back(bn: nn.SyncBatchNorm) -> nn.Module:
        return with_state_of(AnyDimensions(*settings(bn)).double(), bn)

    return replace(model, nn.SyncBatchNorm, back)


def each_norm(function):
    def tool(model: nn.Module) -> nn.Module:
        for module in [*model.modules()]:
            if isinstance(module, _BatchNorm):
                function(module)
        return model

    return tool


def become_torchs(bn: _BatchNorm) -> None:
    bn.__class__ = nn.BatchNorm2d


def own_forward(bn: _BatchNorm) -> None:
    bn.forward = lambda x: type(bn).forward(bn, x) * 2


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x * 2) + 1


class Custom(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - 0.5


TOOLS = {
    "freeze_batch_norm_2d": norms_by(Frozen, nn.Module.add_module),
    "convert_sync_batchnorm": norms_by(
        lambda bn: with_state_of(nn.SyncBatchNorm(*settings(bn)), bn), nn.Module.add_module
    ),
    "torch's convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "bnext's convert_sync_batchnorm": bnext.SyncBatchNorm.convert_sync_batchnorm,
    "Lightning's, and back": lightning_and_back,
    "torch's batch norm": norms_by(
        lambda bn: with_state_of(nn.BatchNorm2d(*settings(bn)), bn), in_modules
    ),
    "its own class again": norms_by(lambda bn: with_state_of(type(bn)(*settings(bn)), bn)),
    "a subclass": norms_by(lambda bn: with_state_of(Custom(*settings(bn)), bn)),
    "identity": norms_by(lambda bn: nn.Identity()),
    "group norm": norms_by(lambda bn: nn.GroupNorm(2, bn.num_features).double()),
    "Sequential": norms_by(lambda bn: nn.Sequential(bn, nn.Hardtanh())),
    "wrapper": norms_by(Wrapped),
    "checkpoint_wrapper": norms_by(checkpoint_wrapper),
    "no statistics": torch.func.replace_all_batch_norm_modules_,
    "class": each_norm(become_torchs),
    "forward": each_norm(own_forward),
    "forward hook": each_norm(lambda bn: bn.register_forward_hook(lambda m, x, y: y + 1)),
    "pre-hook": each_norm(lambda bn: bn.register_forward_pre_hook(lambda m, x: (x[0] * 2,))),
    "parametrisation": each_norm(
        lambda bn: nn.utils.parametrize.register_parametrization(bn, "weight", Doubling())
    ),
    "pruning": each_norm(lambda bn: prune.l1_unstructured(bn, "weight", 2)),
    "leaky ReLU": relus_by(lambda relu: nn.LeakyReLU()),
    "no ReLU": relus_by(lambda relu: nn.Identity()),
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", MODELS)
def test_what_another_tool_puts_there_is_called_as_in_the_unfused_model(name, tool) -> None:
    original = randomised(MODELS[name]().double())
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model)
    model, original = TOOLS[tool](model), TOOLS[tool](original)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode in (True, False):
            assert_close(step(model.train(mode), x), step(original.train(mode), x))
        with torch.no_grad():
            assert_close(model(x), original(x))
        bnext.revert(model)
        assert not any(isinstance(m, FusedForward) for m in model.modules())
        assert_close(model(x), original(x))
        assert_close(bnext.convert(model, fuse=True)(x), original(x))


def relu_calls(model: nn.Module, x: Tensor) -> int:
    with torch.profiler.profile() as profile, torch.no_grad():
        model(x)
    return sum(e.count for e in profile.key_averages() if e.key in ("aten::relu", "aten::relu_"))


@pytest.mark.parametrize("name", MODELS)
def test_fused_relus_are_not_called_and_those_of_replaced_batch_norms_are(name) -> None:
    original = MODELS[name]()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    x = torch.randn(3, 3, 8, 8)
    relus = relu_calls(original, x)
    assert relu_calls(model, x) == 0
    frozen = TOOLS["freeze_batch_norm_2d"](copy.deepcopy(model))
    assert relu_calls(frozen, x) == relus and relu_calls(model, x) == 0  # the copy is by itself
    assert fused(model) and not fused(frozen)


def recorder(seen: list):
    def hook(module: nn.Module, *values: object) -> None:
        seen.append([v.detach().clone() for v in torch.utils._pytree.tree_leaves(values)])

    return hook


@pytest.mark.parametrize("kind", ["forward", "pre-hook", "gradient"])
@pytest.mark.parametrize("which", [nn.BatchNorm2d, nn.ReLU])
@pytest.mark.parametrize("network", ["summed", "sequential"])
def test_hooks_see_what_they_see_in_the_unfused_model(network, which, kind) -> None:
    torch.manual_seed(0)
    sequential = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    original = Summed() if network == "summed" else sequential
    x, results = torch.randn(2, 3, 4, 4), []
    for model in (original, bnext.convert(copy.deepcopy(original), fuse=True)):
        seen: dict = {}
        for name, module in model.named_modules():
            if isinstance(module, which):
                hook = recorder(seen.setdefault(name, []))
                if kind == "forward":
                    module.register_forward_hook(hook)
                elif kind == "pre-hook":
                    module.register_forward_pre_hook(hook)
                else:
                    module.register_full_backward_hook(hook)
        model(x.clone().requires_grad_()).square().sum().backward()
        assert all(seen.values())
        results.append(seen)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_hooks_of_all_modules_see_the_batch_norms_and_relus() -> None:
    model, calls = bnext.convert(Summed(), fuse=True), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: calls.append(type(m)))
    try:
        model(torch.randn(2, 3, 4, 4))
    finally:
        handle.remove()
    assert calls.count(bnext.BatchNorm2d) == 4 and calls.count(nn.ReLU) == 1


@pytest.mark.parametrize("name", MODELS)
def test_conv_bn_folding_in_eval(name) -> None:
    original = randomised(MODELS[name]().double()).eval()
    model = bnext.convert(copy.deepcopy(original), fuse=True)

    def fold(model: nn.Module) -> nn.Module:
        for parent in model.modules():
            children = [*parent.named_children()]
            for (a, conv), (b, bn) in itertools.pairwise(children):
                if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d):
                    setattr(parent, a, nn.utils.fuse_conv_bn_eval(conv, bn))
                    setattr(parent, b, nn.Identity())
        return model

    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert_close(fold(model)(x), fold(original)(x))


def test_a_model_put_together_anew_from_the_children_of_a_fused_one() -> None:
    original = randomised(MobileNet().double()).eval()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = original(x)
    freeze = TOOLS["freeze_batch_norm_2d"]
    stem, *blocks = model.children()
    for layers in ([stem, *blocks], [*stem, *blocks]):
        rebuilt = nn.Sequential(*layers)
        assert_close(rebuilt(x), expected)
        assert_close(freeze(rebuilt)(x), expected)
        assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["basic", "mobilenet"])
def test_replaced_after_compilation(name) -> None:
    original = randomised(MODELS[name]()).eval()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    x = torch.randn(3, 3, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = original(x)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    for tool in ("class", "freeze_batch_norm_2d"):
        TOOLS[tool](model)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_fx_scripts_and_traces_of_a_model_whose_batch_norms_were_replaced(name) -> None:
    original = randomised(MODELS[name]().double()).eval()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    graph = torch.fx.symbolic_trace(model)  # holds the modules unfused: tools know these
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not any("bnext" in call or "_waiting" in call for call in calls)
    assert_close(TOOLS["freeze_batch_norm_2d"](copy.deepcopy(graph))(x), original(x))
    bnext.convert(graph, fuse=True)  # leaves what torch.fx would write anew
    assert not fused(graph)
    assert_close(copy.deepcopy(graph)(x), original(x))
    TOOLS["freeze_batch_norm_2d"](model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins.append(torch.load(buffer, weights_only=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        twins += [torch.jit.script(model), torch.jit.trace(model, x)]
    for twin in (*twins, torch.fx.symbolic_trace(model)):
        assert_close(twin(x), original(x))


def test_a_graph_module_is_left_and_reported() -> None:
    graph = torch.fx.symbolic_trace(Summed())
    unfused = bnext.conversion_report(graph, fuse=True).unfused
    assert all("before it is traced" in reason for reason in unfused.values())


def test_a_subclass_of_a_fused_class_is_another_tools_and_stays() -> None:
    """As FSDP2 makes one of each module that it shards."""
    model = bnext.convert(Basic(3, 3, 1), fuse=True)
    kind = type("FSDPBasic", (type(model),), {})
    model.__class__ = kind
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    assert type(bnext.convert(model, fuse=True)) is kind and fused(model) == ["bn1", "bn2"]
    torch.testing.assert_close(model(x), expected)
    assert type(bnext.revert(model)) is kind
    torch.testing.assert_close(model(x), expected)


class Stateful(Basic):
    def __getstate__(self) -> dict:
        return {k: v for k, v in vars(self).items() if k != "stream"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.stream = "new"


def test_a_modules_own_state_methods_are_used() -> None:
    model = Stateful(3, 3, 1)
    model.stream = (i for i in ())  # cannot be pickled
    bnext.convert(model, fuse=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin, FusedForward) and twin.stream == "new"


def test_the_real_tools() -> None:
    timm = pytest.importorskip("timm")
    layer_sync = pytest.importorskip("pytorch_lightning.plugins.layer_sync")
    sync = layer_sync.TorchSyncBatchNorm()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for build in MODELS.values():
        original = randomised(build().double()).eval()
        for tool in (
            timm.layers.freeze_batch_norm_2d, timm.layers.convert_sync_batchnorm,
            sync.apply, lambda m: sync.revert(sync.apply(m)),
        ):  # fmt: skip
            model = tool(bnext.convert(copy.deepcopy(original), fuse=True))
            assert_close(model.eval().double()(x), original(x))
