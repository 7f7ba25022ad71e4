"""convert(model, fuse=True) where a batch norm is at the end of a child and its caller goes on.

Whatever the child becomes later is called.
"""

import copy
import operator
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_fuse import assert_close, assert_same_model, fused, randomised, step
from test_fuse_patterns import check
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import bnext


class ConvNorm(nn.Module):
    """As transformers, PyG and others wrap a batch norm: the activation may be missing."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Block(nn.Module):
    def __init__(self, layer: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.layer, self.shortcut, self.act = layer, shortcut, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.layer(x)
        residual = self.shortcut(residual)
        x += residual
        return self.act(x)


class Wrapped(nn.Module):
    """A batch norm alone, as PyG's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Inverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(ConvNorm(nn.ReLU6()), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Doubling(ConvNorm):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class DoublingSequence(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


DOUBLING = {
    "custom": lambda: Block(Doubling(), nn.Identity()),
    "Sequential": lambda: nn.Sequential(
        DoublingSequence(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.ReLU(),
        nn.BatchNorm2d(3), nn.ReLU(),
    ),
}  # fmt: skip


TAILS = {
    "Sequential": lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
                                        nn.ReLU()),
    "wrapper": lambda: nn.Sequential(Wrapped(), nn.SiLU()),
    "custom in Sequential": lambda: nn.Sequential(ConvNorm(), nn.Identity(), nn.LeakyReLU(0.2)),
    "HF": lambda: Block(nn.Sequential(ConvNorm(nn.ReLU()), ConvNorm()), ConvNorm()),
    "HF, identity": lambda: Block(nn.Sequential(ConvNorm(nn.ReLU()), ConvNorm()), nn.Identity()),
    "nested": lambda: Block(nn.Sequential(nn.Sequential(Wrapped())), nn.Identity()),
    "inverted": lambda: nn.Sequential(Inverted(), nn.Tanh()),
}  # fmt: skip
NAMES = {
    "Sequential": ["0.1"], "wrapper": ["0.module"], "custom in Sequential": ["0.norm"],
    "HF": ["layer.0.norm", "layer.1.norm"], "HF, identity": ["layer.0.norm", "layer.1.norm"],
    "nested": ["layer.0.0.module"], "inverted": ["0.conv.0.norm", "0.conv.2"],
}  # fmt: skip


@pytest.mark.parametrize("name", TAILS)
def test_a_batch_norm_at_the_end_of_a_child(name) -> None:
    original = randomised(TAILS[name]())
    model = check(original, NAMES[name])
    x = torch.randn(3, 3, 8, 8)
    want = original.eval()(x)
    model.eval()
    torch._dynamo.reset()
    twins = [
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.fx.symbolic_trace(model),
        torch.compile(model, backend="aot_eager", fullgraph=True),
        torch.export.export(model, (x,)).module(),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twins += [torch.jit.script(model), torch.jit.trace(model, x)]
    for twin in twins:
        torch.testing.assert_close(twin(x), want, rtol=1e-4, atol=1e-5)
    bnext.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def child_of(model: nn.Module) -> nn.Module:
    return model.layer


def doubling_subclass(module: nn.Module) -> None:
    kind = type(module)
    contents = {"forward": lambda self, x: kind.forward(self, x) * 2}
    module.__class__ = type(f"Doubled{kind.__name__}", (kind,), contents)


CHANGES = {
    "another tool's class": lambda m: doubling_subclass(m.layer[1]),
    "another tool's Sequential": lambda m: doubling_subclass(m.layer),
    "hook": lambda m: child_of(m).register_forward_hook(lambda m, x, y: y + 1),
    "pre-hook": lambda m: child_of(m).register_forward_pre_hook(lambda m, x: (x[0] * 2,)),
    "hook of the last": lambda m: child_of(m)[1].register_forward_hook(lambda m, x, y: y * 2),
    "hook of the batch norm": lambda m: child_of(m)[1].norm.register_forward_hook(
        lambda m, x, y: y * 2
    ),
    "forward": lambda m: setattr(m.layer, "forward", lambda x: x * 3),
    "replaced": lambda m: setattr(m, "layer", nn.Conv2d(3, 3, 1).double()),
    "longer": lambda m: m.layer.append(nn.AvgPool2d(3, 1, 1)),
    "shorter": lambda m: m.layer.pop(0),
    "batch norm replaced": lambda m: setattr(m.layer[1], "norm", nn.InstanceNorm2d(3)),
    "activation": lambda m: setattr(m.layer[1], "act", nn.Softplus()),
    "compiled": lambda m: setattr(m.layer, "_compiled_call_impl", lambda x: x * 5),
    "checkpoint_wrapper": lambda m: setattr(m, "layer", checkpoint_wrapper(m.layer)),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_child_becomes_later_is_called(change) -> None:
    torch.manual_seed(0)
    original = randomised(TAILS["HF"]()).double()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    for m in (model, original):
        torch.manual_seed(0)
        CHANGES[change](m)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for training in (True, False):
        assert_close(step(model.train(training), x), step(original.train(training), x))


@pytest.mark.parametrize("kind", DOUBLING)
def test_a_child_with_a_call_of_its_own_is_called(kind) -> None:
    original = randomised(DOUBLING[kind]())
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == ([] if kind == "custom" else ["2"])
    assert_same_model(model, original)


def test_hooks_of_the_child_see_its_output() -> None:
    original = randomised(TAILS["HF"]())
    model, seen = bnext.convert(copy.deepcopy(original), fuse=True), []
    for m in (model, original):
        m.layer.register_forward_hook(lambda m, x, y: seen.append(y.clone()))
        m(torch.ones(2, 3, 4, 4))
    torch.testing.assert_close(*seen)


class ChangesInBetween(nn.Module):
    """Its child still reads the input when something else changes it."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child, self.act = child, nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.child(x)
        return self.act(y + self.act(x))


@pytest.mark.parametrize(
    ("child", "names"),
    [(Wrapped, []), (Inverted, ["child.conv.0.norm", "child.conv.2"]), (ConvNorm, ["child.norm"]),
     (lambda: nn.Sequential(nn.Identity(), nn.BatchNorm2d(3)), []),
     (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), ["child.1"])],
)  # fmt: skip
def test_a_child_that_still_reads_its_input_when_that_is_changed(child, names) -> None:
    original = randomised(ChangesInBetween(child()))
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == names
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    model, original = model.double(), original.double()
    with torch.no_grad():
        for training in (True, False):
            assert_close(model.train(training)(x), original.train(training)(x))


class Shifted(ConvNorm):
    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return self.norm(y if shift is None else y + shift)


class Caller(nn.Module):
    def __init__(self, call) -> None:
        super().__init__()
        self.child, self.act, self.call = Shifted(), nn.ReLU(), call

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.call(self.child, x))


@pytest.mark.parametrize(
    ("call", "names"),
    [(lambda child, x: child(x), ["child.norm"]), (lambda child, x: child(x, x), []),
     (lambda child, x: child(x, shift=x), []), (lambda child, x: child(x=x), [])],
)  # fmt: skip
def test_a_child_is_called_with_what_it_is_given(call, names) -> None:
    original = randomised(Caller(call))
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == names
    assert_same_model(model, original)
    if not names:
        reason = bnext.conversion_report(model, fuse=True).unfused["child.norm"]
        assert "one positional argument" in reason


class AddsAndThenChanges(ConvNorm):
    """What it returns is a sum that cannot wait for the caller."""

    def forward(self, x: Tensor) -> Tensor:
        other = x * 1
        y = self.norm(self.conv(x)) + other
        other.add_(1)
        return y


def test_a_child_whose_sum_cannot_wait_adds_itself() -> None:
    original = randomised(nn.Sequential(AddsAndThenChanges(), nn.ReLU()))
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == ["0.norm"] and type(model) is nn.Sequential
    assert_same_model(model, original)


class Branch(nn.Module):
    def __init__(self, then) -> None:
        super().__init__()
        self.conv, self.then = nn.Conv2d(3, 3, 1), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.conv, x)


class Branching(nn.Module):
    """A batch norm waits while a branch takes its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.bn, self.branch = nn.BatchNorm2d(3), branch

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        return torch.relu(self.bn(x) + self.branch(x))


BRANCHES = {  # and whether they leave their input as it is
    "its own": (lambda: Branch(lambda conv, x: conv(x).relu_()), True),
    "Sequential's own": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(True)), True),
    "nested": (lambda: nn.Sequential(Branch(lambda conv, x: conv(x)), nn.ReLU(True)), True),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(True)), True),
    "input": (lambda: Branch(lambda conv, x: conv(x.relu_())), False),
    "flag": (lambda: Branch(lambda conv, x: conv(F.relu(x, True))), False),
    "keyword": (lambda: Branch(lambda conv, x: conv(F.relu(x, inplace=True))), False),
    "operator": (lambda: Branch(lambda conv, x: conv(operator.iadd(x, 1))), False),
    "out": (lambda: Branch(lambda conv, x: conv(torch.add(x, 1, out=x))), False),
    "view": (lambda: Branch(lambda conv, x: conv(x[:1].relu_().expand(3, 3, 8, 8))), False),
    "untraceable": (
        lambda: Branch(lambda conv, x: conv(x.relu_()) if x.sum() < 9e9 else conv(x)), False
    ),
    "first of a Sequential": (lambda: nn.Sequential(nn.ReLU(True), nn.Conv2d(3, 3, 1)), False),
    "alias": (
        lambda: nn.Sequential(Branch(lambda conv, x: x.view_as(x)), nn.ReLU(True)), False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_that_may_change_what_a_batch_norm_reads(name) -> None:
    build, harmless = BRANCHES[name]
    original = randomised(Branching(build())).double()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert ("bn" in fused(model)) == harmless
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for training in (True, False):
            assert_close(model.train(training)(x), original.train(training)(x))


@pytest.mark.parametrize("hooked", [False, True])
def test_a_hook_on_a_branch_may_change_its_input(hooked) -> None:
    original = randomised(Branching(nn.Conv2d(3, 3, 1))).double()
    if hooked:
        original.branch.register_forward_pre_hook(lambda m, x: x[0].relu_() and None)
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == ([] if hooked else ["bn"])


class Onto(nn.Module):
    """Adds a batch norm's output in place to what a module returned."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.bn, self.branch = nn.BatchNorm2d(3), branch

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.branch(x)
        y += self.bn(x)
        return y + x


@pytest.mark.parametrize(
    ("then", "copies"),
    [(lambda conv, x: conv(x)[:, :3], True), (lambda conv, x: x * conv(x), True),
     (lambda conv, x: x[:, :3], False), (lambda conv, x: x.contiguous(), False)],
)  # fmt: skip
def test_what_is_added_in_place_to_a_childs_output(then, copies) -> None:
    original = randomised(Onto(Branch(then)))
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == (["bn"] if copies else [])
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_close(model.double()(x), original.double()(x))
