"""convert(model, fuse=True): what is fused in the usual architectures, and what is not.

Numbers, names and objects stay.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import bnext
from bnext.fuse import FusedForward
from models import Basic, Bottleneck, DenseNet, MobileNet, ResNet

MODELS = {  # and how many of their batch norms are fused, of how many
    "resnet18": (lambda: ResNet(Basic, [2, 2, 2, 2]), 17, 20),
    "resnet50": (lambda: ResNet(Bottleneck, [3, 4, 6, 3]), 49, 53),
    "mobilenet": (MobileNet, 7, 7),
    "densenet": (DenseNet, 8, 8),
}


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5), module.bias.normal_(std=0.3)
                module.running_mean.normal_(std=0.3), module.running_var.uniform_(0.5, 2)
    return model


def step(model: nn.Module, x: Tensor) -> tuple:
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    y = model(leaf)
    y.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), leaf.grad, grads, copy.deepcopy(model.state_dict())


def assert_close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def assert_same_model(model: nn.Module, original: nn.Module, device="cpu") -> None:
    """In float64: training step, state and eval, with an input that neither has seen."""
    model, original = model.double().to(device), original.double().to(device)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, device=device)
    assert_close(step(model.train(), x), step(original.train(), x))
    assert_close(step(model.eval(), x), step(original.eval(), x))
    with torch.no_grad():
        assert_close(model(x), original(x))


def fused(model: nn.Module) -> list[str]:
    return [*bnext.conversion_report(model).fused]


@pytest.mark.parametrize("name", MODELS)
def test_fuses_and_keeps_names_objects_and_numbers(name, device) -> None:
    build, expected, total = MODELS[name]
    original = randomised(build())
    model = copy.deepcopy(original)
    modules, tensors = dict(model.named_modules()), list(model.state_dict(keep_vars=True).items())
    assert bnext.convert(model, fuse=True) is model
    assert len(fused(model)) == expected
    assert all(m is modules[n] for n, m in model.named_modules())
    assert len(dict(model.named_modules())) == len(modules)
    for (key, tensor), (other, same) in zip(
        tensors, model.state_dict(keep_vars=True).items(), strict=True
    ):
        assert key == other and tensor is same
    report = bnext.conversion_report(model, fuse=True)
    assert len(report.fused) == expected and not report.fusible
    assert len(report.unfused) == total - expected
    assert_same_model(model, original, device)


@pytest.mark.parametrize("name", MODELS)
def test_revert_takes_it_apart_again(name) -> None:
    build, expected, _ = MODELS[name]
    original = build()
    model = bnext.revert(bnext.convert(copy.deepcopy(original), fuse=True))
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert repr(model) == repr(original)
    assert vars(model).keys() == vars(original).keys()
    assert len(fused(bnext.convert(model, fuse=True))) == expected
    assert_same_model(bnext.revert(model), original)


@pytest.mark.parametrize("name", MODELS)
def test_fused_model_is_copied_pickled_traced_scripted_and_compiled(name, tmp_path) -> None:
    original = randomised(MODELS[name][0]()).eval()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    torch.save(model, tmp_path / "model.pt")
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for twin in twins:
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert_same_model(twin, copy.deepcopy(original))
        assert len(fused(bnext.revert(twin))) == 0
    x = torch.randn(3, 3, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted, traced = torch.jit.script(model), torch.jit.trace(model, x)
    for result in (compiled(x), torch.fx.symbolic_trace(model)(x), scripted(x), traced(x)):
        torch.testing.assert_close(result, original(x), rtol=1e-4, atol=1e-5)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), original(x), rtol=1e-4, atol=1e-5)


def test_blocks_stay_instances_of_their_class_and_alike_ones_share_one() -> None:
    model = bnext.convert(ResNet(Basic, [3]), fuse=True)
    blocks = list(model.layers[0])
    assert all(isinstance(b, Basic) and type(b).__name__ == "Basic" for b in blocks)
    assert type(blocks[0]) is type(blocks[1]) is type(blocks[2])
    assert all(isinstance(b, FusedForward) for b in blocks)


def test_a_sequential_can_still_be_sliced_and_appended_to() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    original = copy.deepcopy(layers)
    bnext.convert(layers, fuse=True)
    assert isinstance(layers, nn.Sequential) and fused(layers) == fused(layers[:3]) == ["1"]
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(layers[:3](x), original[:3](x))
    layers.append(nn.Flatten()), original.append(nn.Flatten())
    torch.testing.assert_close(layers(x), original(x))


class Sample(nn.Module):
    """One batch norm `bn`, and what the tests below do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        self.calls = 0


def test_untraceable_model_keeps_its_fusible_blocks() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.bn = Basic(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block(x)
            return self.bn(x).relu() if float(x.sum()) > 0 else x

    original = Outer()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == ["block.bn1", "block.bn2"]
    assert "cannot be traced" in bnext.conversion_report(model, fuse=True).unfused["bn"]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x), original(x))


class CalledTwice(Sample):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.relu(self.bn(x)))) + self.bn(x)


def shared() -> nn.Module:
    relu, bn = nn.ReLU(), nn.BatchNorm2d(3)
    return nn.Sequential(
        nn.Sequential(nn.BatchNorm2d(3), relu), nn.Sequential(bn, nn.ReLU()),
        nn.Sequential(bn, relu), nn.Sequential(bn, nn.Sigmoid()),
    )  # fmt: skip


@pytest.mark.parametrize(("build", "names"), [(CalledTwice, ["bn"]), (shared, ["0.0", "1.0"])])
def test_modules_called_from_several_places_are_fused_in_each(build, names) -> None:
    original = build()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == names
    assert_same_model(model, original)


def test_residual_that_is_broadcast_or_promoted_is_added_as_before() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return torch.relu(self.bn(x) + z)

    original = Gate()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == ["bn"]
    x = torch.randn(2, 3, 4, 4)
    others = torch.randn(2, 3, 1, 1), torch.randn(2, 3, 4, 4).double(), torch.randn(1, 1, 4, 4)
    for z in (*others, 0.5):
        y, expected = model(x, z), original(x, z)
        torch.testing.assert_close(y, expected)
    y, expected = model(x[:, :, :1, :1], x), original(x[:, :, :1, :1], x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(model.state_dict(), original.state_dict())


def test_adding_in_place_keeps_the_dtype() -> None:
    class Block(Sample):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            y = self.bn(x)
            y += z
            return self.relu(y)

    original = Block()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == ["bn"]
    x = torch.randn(2, 3, 4, 4)
    for z in (x, x[:, :, :1, :1], x.double(), x.bfloat16()):
        y, expected = model(x, z), original(x, z)
        torch.testing.assert_close(y, expected)


def test_converting_again_changes_nothing() -> None:
    model = bnext.convert(ResNet(Basic, [1]), fuse=True)
    kinds = [type(m) for m in model.modules()]
    assert [type(m) for m in bnext.convert(model, fuse=True).modules()] == kinds
    model.layers.append(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
    assert bnext.conversion_report(model, fuse=True).fusible == ("layers.1.0",)
    bnext.convert(model, fuse=True)
    assert "layers.1.0" in fused(model)
    assert type(model.layers[0][0]) in kinds


def test_hooks_and_the_optimizer_go_on_working() -> None:
    model = ResNet(Basic, [1])
    calls = []
    model.layers[0][0].register_forward_hook(lambda *_: calls.append("block"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bnext.convert(model, fuse=True)
    before = model.layers[0][0].bn2.weight.detach().clone()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert calls == ["block"]
    assert not torch.equal(before, model.layers[0][0].bn2.weight)


def test_act_modules_of_the_models_own_survive_fuse_and_revert() -> None:
    model = nn.Sequential(bnext.BatchNormAct2d(3), nn.BatchNorm2d(3), nn.ReLU())
    kinds = [type(m) for m in model.modules()]
    bnext.convert(model, fuse=True)
    assert fused(model) == ["1"]
    bnext.revert(model)
    assert fused(model) == [] and [type(m) for m in model.modules()] == kinds
