"""What convert(model, fuse=True) finds: each activation in each form, and what stands between.

Results are those of the model with torch.nn's batch norms, in float64, and the fused forward runs
one op of bnext's and none of the activation's or the addition's.
"""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_fuse import assert_close, assert_same_model, fused, randomised, step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnext
from bnext._waiting import Waiting, add, add_into, add_onto, result


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, *inputs: object) -> list[str]:
    """What runs in eval, besides convolutions and views."""
    recorder = Recorder()
    with torch.no_grad(), recorder:
        model.eval()(*inputs)
    ignored = ("conv", "view", "detach", "alias", "as_strided")
    return [c for c in recorder.calls if not any(i in c for i in ignored)]


def check(original: nn.Module, names: list[str], *inputs: object) -> nn.Module:
    """Fuse a copy; it has to compute what the original does, and in one op for each name."""
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == names
    assert_same_model(copy.deepcopy(model), copy.deepcopy(original))
    inputs = inputs or (torch.randn(3, 3, 8, 8),)
    ops = operations(model, *inputs)
    assert ops == ["bnext::batch_norm_inference"] * len(ops) and len(ops) >= len(names)
    return model


class Net(nn.Module):
    """A batch norm and what follows it, given as a function of the module, bn(x) and x."""

    def __init__(self, then: Callable, **modules: nn.Module) -> None:
        super().__init__()
        self.bn, self.then = nn.BatchNorm2d(3), then
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.bn(x), x)


MODULES = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(0.0, 6.0), nn.LeakyReLU(0.1),
    nn.SiLU(inplace=True), nn.Hardswish(), nn.GELU(), nn.GELU("tanh"), nn.ELU(0.7), nn.Tanh(),
    nn.Sigmoid(),
]  # fmt: skip
FUNCTIONS = {
    "F.relu": lambda n, y, x: F.relu(y), "F.relu inplace": lambda n, y, x: F.relu(y, inplace=True),
    "F.relu_": lambda n, y, x: F.relu_(y), "torch.relu": lambda n, y, x: torch.relu(y),
    "torch.relu_": lambda n, y, x: torch.relu_(y), "relu": lambda n, y, x: y.relu(),
    "relu_": lambda n, y, x: y.relu_(), "F.relu6": lambda n, y, x: F.relu6(y, True),
    "F.hardtanh": lambda n, y, x: F.hardtanh(y, 0, 6),
    "F.leaky_relu": lambda n, y, x: F.leaky_relu(y, 0.3),
    "F.leaky_relu default": lambda n, y, x: F.leaky_relu(y),
    "F.leaky_relu_": lambda n, y, x: F.leaky_relu_(y, negative_slope=0.3),
    "F.silu": lambda n, y, x: F.silu(y), "F.hardswish": lambda n, y, x: F.hardswish(y),
    "F.gelu": lambda n, y, x: F.gelu(y),
    "F.gelu tanh": lambda n, y, x: F.gelu(y, approximate="tanh"),
    "F.elu": lambda n, y, x: F.elu(y, 0.5, True), "F.elu_": lambda n, y, x: F.elu_(y, alpha=0.5),
    "torch.tanh": lambda n, y, x: torch.tanh(y), "F.tanh": lambda n, y, x: F.tanh(y),
    "tanh": lambda n, y, x: y.tanh(), "tanh_": lambda n, y, x: y.tanh_(),
    "torch.sigmoid": lambda n, y, x: torch.sigmoid(y), "F.sigmoid": lambda n, y, x: F.sigmoid(y),
    "sigmoid": lambda n, y, x: y.sigmoid(), "sigmoid_": lambda n, y, x: y.sigmoid_(),
}  # fmt: skip


@pytest.mark.parametrize("residual", [False, True], ids=["", "add"])
@pytest.mark.parametrize("act", MODULES, ids=str)
def test_activation_modules(act, residual) -> None:
    if residual:
        check(Net(lambda n, y, x: n.act(y + x), act=act), ["bn"])
    else:
        check(Net(lambda n, y, x: n.act(y), act=act), ["bn"])
        check(nn.Sequential(nn.BatchNorm2d(3), act), ["0"])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_activation_functions_and_methods(function) -> None:
    then = FUNCTIONS[function]
    model = check(Net(then), ["bn"])
    check(Net(lambda n, y, x: then(n, x + y, x)), ["bn"])
    # What takes the batch norm's place is followed by that function.
    model.bn = nn.Identity()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model(x.clone()), then(None, x.clone(), x))


@pytest.mark.parametrize(
    "function",
    [
        lambda n, y, x: F.hardtanh(y), lambda n, y, x: F.hardtanh(y, 1.0, 2.0),
        lambda n, y, x: F.hardtanh(y, 6, 0), lambda n, y, x: F.silu(x, y),
        lambda n, y, x: F.leaky_relu(y, -0.5, True), lambda n, y, x: F.gelu(input=y),
        lambda n, y, x: torch.tanh(y, out=torch.empty(0)),
    ],
)  # fmt: skip
def test_functions_with_other_arguments_are_left(function) -> None:
    assert fused(bnext.convert(Net(function), fuse=True)) == []


ADDITIONS = {
    "+": lambda n, y, x: y + x, "other way": lambda n, y, x: x + y,
    "add": lambda n, y, x: torch.add(x, y), "method": lambda n, y, x: y.add(x),
    "+=": lambda n, y, x: n.into(y, x), "add_": lambda n, y, x: y.add_(x),
    "onto another": lambda n, y, x: n.into(torch.cat([x, x], 1)[:, :3], y),
}  # fmt: skip


class Adding(Net):
    def into(self, a: Tensor, b: Tensor) -> Tensor:
        a += b
        return a


@pytest.mark.parametrize("way", ADDITIONS)
def test_additions_without_activation(way) -> None:
    model = bnext.convert(original := Adding(ADDITIONS[way]), fuse=True)
    assert fused(model) == ["bn"]
    if way != "onto another":
        check(original, ["bn"])
    original = randomised(Adding(ADDITIONS[way]))
    assert_same_model(bnext.convert(copy.deepcopy(original), fuse=True), original)


def test_adding_in_place_still_keeps_shape_and_dtype_of_the_target() -> None:
    class Onto(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            z = torch.mul(z, 1)
            z += self.bn(x)
            return z

    original = Onto()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == ["bn"]
    x = torch.randn(2, 3, 4, 4)
    for z in (x, x.double(), torch.randn(5, 2, 3, 4, 4)):
        y, expected = model(x, z), original(x, z)
        torch.testing.assert_close(y, expected)
    for z in (x[:, :, :1], x.long()):  # what cannot be cast or broadcast raises
        for m in (model, original):
            with pytest.raises(RuntimeError):
                m(x, z)


@pytest.mark.parametrize("way", [add, add_into, add_onto])
def test_a_second_addition_is_one_of_its_own(way) -> None:
    """As where the child that a fused forward calls has been replaced by one that adds too."""
    bn, (x, y, z) = nn.BatchNorm2d(3), torch.randn(3, 2, 3, 4, 4)
    waiting = Waiting(bnext.convert(copy.deepcopy(bn)), x, y)
    torch.testing.assert_close(result(way(waiting, z.clone())), bn(x) + y + z)


@pytest.mark.parametrize(
    "between",
    [
        nn.Identity,
        lambda: nn.Dropout(0.0),
        lambda: nn.Dropout2d(0.5),
        lambda: nn.Dropout(0.5, True),
    ],
    ids=["identity", "p=0", "dropout2d", "in place"],
)
@pytest.mark.parametrize("after_addition", [False, True])
def test_identity_and_inactive_dropout_between(between, after_addition) -> None:
    def then(n: nn.Module, y: Tensor, x: Tensor) -> Tensor:
        return n.act(n.between(y + x) if after_addition else n.between(y) + x)

    original = Net(then, between=between(), act=nn.SiLU())
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert fused(model) == ["bn"]
    model, original = model.double(), original.double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for training in (True, False):  # it is decided at the call
        results = []
        for m in (model.train(training), original.train(training)):
            torch.manual_seed(0)
            results.append(step(m, x))
        assert_close(*results)
    assert operations(model, x) == ["bnext::batch_norm_inference"]
    model.between.register_forward_hook(lambda m, x, y: y + 1)
    original.between.register_forward_hook(lambda m, x, y: y + 1)
    assert_close(model(x), original(x))


def test_in_a_sequential_too() -> None:
    layers = nn.BatchNorm2d(3), nn.Identity(), nn.Dropout(0.0), nn.Hardswish(), nn.Flatten()
    check(nn.Sequential(*layers), ["0"])
    relu = nn.ReLU()  # one module in two places
    check(nn.Sequential(nn.BatchNorm2d(3), relu, nn.BatchNorm2d(3), relu), ["0", "2"])
