"""convert and revert: the class changes, everything else stays the same object."""

import copy

import pytest
import torch
from torch import nn

import bnext


class Custom(nn.BatchNorm2d):
    pass


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.tower = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU())
        self.norm1d = nn.BatchNorm1d(4, momentum=None)
        self.norm3d = nn.BatchNorm3d(4)
        self.lazy = nn.LazyBatchNorm2d()
        self.group = nn.GroupNorm(2, 4)
        self.custom = Custom(4)
        self.sync = nn.SyncBatchNorm(4)
        self.shared = self.bn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm1d(self.tower(self.bn(self.conv(x))).mean((2, 3)))


KINDS = {
    "bn": "BatchNorm2d", "tower.1": "BatchNorm2d", "norm1d": "BatchNorm1d",
    "norm3d": "BatchNorm3d", "lazy": "LazyBatchNorm2d", "sync": "SyncBatchNorm",
}  # fmt: skip


def identities(model: nn.Module) -> dict[str, int]:
    named = [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]
    return {name: id(value) for name, value in named}


def test_exactly_torchs_classes_are_swapped_in_place_and_back() -> None:
    model = Net()
    before = identities(model)
    assert bnext.convert(model) is model
    for name, kind in KINDS.items():
        assert type(model.get_submodule(name)) is getattr(bnext, kind), name
    for name in ("group", "custom", "conv"):
        assert not type(model.get_submodule(name)).__module__.startswith("bnext"), name
    assert identities(model) == before
    assert bnext.revert(model) is model
    for name, kind in KINDS.items():
        assert type(model.get_submodule(name)) is getattr(nn, kind), name
    assert identities(model) == before


def test_converting_twice_changes_nothing_more() -> None:
    model = bnext.convert(Net())
    types = {name: type(m) for name, m in model.named_modules()}
    bnext.convert(model)
    assert {name: type(m) for name, m in model.named_modules()} == types


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_a_bare_batch_norm_is_converted_itself(name) -> None:
    bn = getattr(nn, name)(3)
    assert bnext.convert(bn) is bn and type(bn) is getattr(bnext, name)


def test_settings_state_and_frozen_parameters_stay() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(4, eps=1e-2, momentum=None),
        nn.BatchNorm2d(4, dtype=torch.float64).eval(),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    )
    model[0].weight.requires_grad_(False)
    model[0](torch.randn(2, 4, 3, 3))
    twin = copy.deepcopy(model)
    bnext.convert(model)
    assert repr(model) == repr(twin)
    assert [m.training for m in model] == [True, False, True]
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad
    for (name, a), (_, b) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_hooks_and_the_optimizer_go_on_working() -> None:
    model = Net()
    calls = []
    model.bn.register_forward_hook(lambda *_: calls.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bnext.convert(model)
    weight = model.bn.weight.detach().clone()
    model(torch.randn(4, 3, 6, 6)).square().sum().backward()
    optimizer.step()
    assert calls == ["hook"]
    assert not torch.equal(model.bn.weight, weight)


def test_converted_network_trains_like_the_original() -> None:
    original = Net()
    del original.lazy  # cannot be copied before its first input
    model = bnext.convert(copy.deepcopy(original))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (original, model)]
    target = torch.randn(4, 4)
    for _ in range(5):
        x = torch.randn(4, 3, 6, 6)
        losses = []
        for m, optimizer in zip((original, model), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (m(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    x = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(original.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)


def test_lazy_module_converted_before_its_first_input() -> None:
    lazy = bnext.convert(nn.LazyBatchNorm2d())
    lazy(torch.randn(2, 7, 3, 3))
    assert type(lazy) is bnext.BatchNorm2d and lazy.num_features == 7


def test_act_modules_and_our_subclasses_are_not_reverted() -> None:
    class Mine(bnext.BatchNorm2d):
        pass

    active = bnext.SyncBatchNorm(3, act="silu")
    model = nn.Sequential(bnext.BatchNormAct2d(3), Mine(3), bnext.BatchNorm2d(3), active)
    bnext.revert(model)
    kinds = [bnext.BatchNormAct2d, Mine, nn.BatchNorm2d, bnext.SyncBatchNorm]
    assert [type(m) for m in model] == kinds
    report = bnext.conversion_report(model, fuse=True)
    assert "activation to revert to" in report.left_alone["3"] and "3" not in report.fused


def test_a_synchronised_one_is_fused_with_what_follows() -> None:
    model = nn.Sequential(
        nn.SyncBatchNorm(3), nn.SiLU(), bnext.SyncBatchNorm(3, act="relu"), nn.Tanh()
    )
    expected = copy.deepcopy(model)
    bnext.convert(model, fuse=True)
    report = bnext.conversion_report(model, fuse=True)
    assert report.fused == ("0",) and report.bnext == ("0",)
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-4, atol=1e-5)
    bnext.revert(model)
    assert type(model[0]) is nn.SyncBatchNorm and type(model) is nn.Sequential


def test_report_names_what_was_left_alone_and_why() -> None:
    model = Net()
    report = bnext.conversion_report(model)
    assert set(report.convertible) == set(KINDS)
    assert report.bnext == ()
    assert set(report.left_alone) == {"group", "custom"}
    report = bnext.conversion_report(bnext.convert(model))
    assert report.convertible == () and set(report.bnext) == set(KINDS)
    for name, why in report.left_alone.items():
        assert name in str(report) and why in str(report)


def test_parametrised_module_is_left_alone_and_reported() -> None:
    bn = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(bn, "weight", nn.Identity())
    model = nn.Sequential(bn)
    kind = type(bn)
    bnext.convert(model)
    assert type(bn) is kind
    assert "0" in bnext.conversion_report(model).left_alone


def test_a_model_pickled_after_conversion_loads_converted(tmp_path) -> None:
    model = bnext.convert(nn.Sequential(nn.BatchNorm2d(3)))
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(loaded[0]) is bnext.BatchNorm2d
    torch.save(bnext.revert(model), tmp_path / "model.pt")
    assert b"bnext" not in (tmp_path / "model.pt").read_bytes()


class Biased(nn.Module):
    """Convolutions with a bias; of some, only a batch norm reads the output."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 1, bias=False), bnext.BatchNormAct2d(4),
            nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 1),
        )  # fmt: skip
        shared = nn.Conv2d(4, 4, 1)
        self.shared = nn.Sequential(shared, nn.BatchNorm2d(4), shared, nn.ReLU())
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.again, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.group, self.norm = nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(self.shared(self.tower(x)))).relu()
        y = self.twice(x)
        x = (self.bn2(y) + y).relu()
        x = self.again(self.bn3(self.again(x)))
        return self.norm(self.group(x))


@pytest.mark.parametrize("change", [lambda m: m, lambda m: bnext.convert(m, fuse=True)])
def test_redundant_biases_are_those_that_only_a_batch_norm_reads(change) -> None:
    model = change(Biased())
    assert bnext.conversion_report(model).redundant_biases == ("tower.0",)
    report = bnext.conversion_report(model, fuse=True)
    assert sorted(report.redundant_biases) == ["conv", "tower.0"]
    assert "redundant: the bias of conv" in str(report)
    model(torch.randn(8, 3, 5, 5)).square().sum().backward()
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    gradients = {name: m.bias.grad for name, m in convs.items() if m.bias is not None}
    assert {n for n, g in gradients.items() if g.norm() < 1e-4} == {*report.redundant_biases}


class Activated(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class Adds(bnext.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x


class Calls(nn.Module):
    """A forward given as a function of (a convolution, a batch norm, the input)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.bn, self.function = nn.Conv2d(3, 3, 1), bnext.BatchNormAct2d(3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.conv, self.bn, x)


def sequence(
    conv: nn.Module | None = None, bn: nn.Module | None = None, change=lambda conv, bn: None
) -> nn.Sequential:
    model = nn.Sequential(conv or nn.Conv2d(3, 3, 1), bn or nn.BatchNorm2d(3), nn.Sigmoid())
    change(*model[:2])
    return model


def own_forward(model: nn.Sequential) -> nn.Sequential:
    model.forward = lambda x: model[1](model[0](x).relu()).sigmoid()
    return model


# name -> (model, whether only a batch norm reads the bias)
BIASES = {
    "plain": (sequence, True),
    "synchronised": (lambda: sequence(bn=bnext.SyncBatchNorm(3)), True),
    "convolution's own forward": (lambda: sequence(Activated(3, 3, 1)), False),
    "batch norm's own forward": (lambda: sequence(bn=Adds(3)), False),
    "hook on the convolution": (
        lambda: sequence(change=lambda conv, _: conv.register_forward_hook(
            lambda module, args, output: output.relu())), False),
    "hook before the batch norm": (
        lambda: sequence(change=lambda _, bn: bn.register_forward_pre_hook(
            lambda module, args: (args[0].relu(),))), False),
    "hook after the batch norm": (
        lambda: sequence(change=lambda _, bn: bn.register_forward_hook(
            lambda module, args, output: output + args[0])), False),
    "sequence's own forward": (lambda: own_forward(sequence()), False),
    "called": (lambda: Calls(lambda conv, bn, x: bn(conv(x), x).sigmoid()), True),
    "called by name": (lambda: Calls(lambda conv, bn, x: bn(input=conv(x)).sigmoid()), True),
    "residual": (lambda: Calls(lambda conv, bn, x: bn(x, conv(x))), False),
    "residual by name": (lambda: Calls(lambda conv, bn, x: bn(x, residual=conv(x))), False),
    "bias itself": (lambda: Calls(lambda conv, bn, x: bn(conv(x)) + conv.bias.sum()), False),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_is_redundant_where_its_gradient_is_zero(name) -> None:
    make, redundant = BIASES[name]
    model = make()
    report = bnext.conversion_report(model, fuse=True)
    assert len(report.redundant_biases) == redundant
    model(torch.randn(8, 3, 5, 5)).square().sum().backward()
    bias = next(m.bias for m in model.modules() if isinstance(m, nn.Conv2d))
    assert (bias.grad.norm() < 1e-4) == redundant


@pytest.mark.parametrize("fuse", [False, True])
def test_a_script_has_a_report(fuse) -> None:
    model = torch.jit.script(sequence())
    assert bnext.conversion_report(model, fuse=fuse) == bnext.conversion_report(nn.Identity())
