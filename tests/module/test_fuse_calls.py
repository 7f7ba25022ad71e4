"""convert(model, fuse=True) and the ways to call a forward: each gets the code that is for it.

Optional arguments, inputs of several types, functions of the user's that torch.fx cannot trace, and
what is done to values that none of this may hide.
"""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_fuse import Sample, assert_close, fused, randomised
from test_fuse_patterns import operations
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnext

OP = ["bnext::batch_norm_inference"]


class Optional(Sample):
    def forward(self, x: Tensor, shift: Tensor | None = None, scale: float = 2.0) -> Tensor:
        y = self.bn(x) if shift is None else self.bn(x) + shift
        return self.relu(y) if scale == 2.0 else self.relu(y) * scale


class KeywordOnly(Sample):
    def forward(self, x: Tensor, z: Tensor, *, act: str = "relu") -> Tensor:
        return getattr(torch, act)(self.bn(x) + z)


class Anything(Sample):
    def forward(self, x: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        y = self.bn(x).relu()
        return y + sum(args) + sum(kwargs.values()) if args or kwargs else y


def same(model: nn.Module, original: nn.Module, *args: object, **kwargs: object) -> None:
    with torch.no_grad():
        for training in (True, False):
            assert_close(
                model.train(training)(*args, **kwargs), original.train(training)(*args, **kwargs)
            )
    assert_close(model.state_dict(), original.state_dict())


def pair(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    original = randomised(kind()).double()
    return bnext.convert(copy.deepcopy(original), fuse=True), original


X, Z = torch.randn(2, 3, 3, 5, 5, dtype=torch.float64)
CALLS = {
    Optional: [((X,), {}), ((), {"x": X}), ((X, None), {}), ((X,), {"scale": 2.0}), ((X, Z), {}),
               ((X,), {"shift": Z}), ((X,), {"scale": 3.0}), ((X, None, 3.0), {})],
    KeywordOnly: [((X, Z), {}), ((X,), {"z": Z}), ((), {"z": Z, "x": X, "act": "relu"}),
                  ((X, Z), {"act": "sigmoid"})],
    Anything: [((X,), {}), ((X, Z), {}), ((X,), {"z": Z}), ((X, Z, Z), {"z": X})],
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLS, ids=lambda k: k.__name__)
def test_optional_arguments_at_their_defaults(kind) -> None:
    model, original = pair(kind)
    assert fused(model) == ["bn"]
    for args, kwargs in CALLS[kind]:
        same(model, original, *args, **kwargs)
    args, _ = CALLS[kind][0]
    assert operations(model, *args) == OP
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert operations(twin, *args) == OP
    with pytest.raises(TypeError, match="argument"):
        model()


def test_optional_arguments_under_other_tools() -> None:
    model, original = pair(Optional)
    model.eval(), original.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(model, (X,)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted, traced = torch.jit.script(model), torch.jit.trace(model, X)
    for twin in (compiled, exported, scripted, traced):
        assert_close(twin(X), original(X))
    assert_close(compiled(X, Z), original(X, Z))
    assert_close(scripted(X, Z, 3.0), original(X, Z, 3.0))
    assert bnext.revert(model)(X, Z).equal(original(X, Z))


class Required(Sample):
    def forward(self, x: Tensor, *, z: Tensor) -> Tensor:
        return (self.bn(x) + z).relu()


class PositionalOnly(Sample):
    def forward(self, x: Tensor, /) -> Tensor:
        return self.bn(x).relu()


class Forwarding(Sample):
    def forward(self, *args: Tensor) -> Tensor:
        return self.bn(*args).relu()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Required, "keyword-only"), (PositionalOnly, "positional-only"), (Forwarding, "any argument")],
)
def test_signatures_that_are_left(kind, reason) -> None:
    model, original = pair(kind)
    assert type(model) is kind
    assert reason in bnext.conversion_report(model, fuse=True).unfused["bn"]
    same(model, original, X, **({"z": Z} if kind is Required else {}))


class DenseLayer(Sample):
    """torchvision's: a tensor or a list of them."""

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        features = [input] if isinstance(input, Tensor) else input
        return self.features(features)

    def features(self, inputs: list[Tensor]) -> Tensor:
        return self.relu(self.bn(torch.cat(inputs, 1)))


def last(inputs: Tensor | list[Tensor]) -> Tensor:
    return inputs[-1] if isinstance(inputs, (list, tuple)) else inputs


class AsksInAFunction(Sample):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        return self.bn(last(x)).relu()


class Inherited(list):
    pass


@pytest.mark.parametrize("kind", [DenseLayer, AsksInAFunction])
def test_a_forward_that_asks_whether_its_input_is_a_tensor(kind) -> None:
    model, original = pair(kind)
    assert fused(model) == ["bn"]
    assert "isinstance" not in globals()
    parts = [X] if kind is AsksInAFunction else [X[:, :1], X[:, 1:]]
    others = (parts, tuple(parts), Inherited(parts), nn.Parameter(X))
    for x in (X, *others):
        same(model, original, x)
    assert operations(model, X)[-1:] == OP and operations(model, parts)[-1:] == OP
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(twin, copy.deepcopy(original), parts)
    torch._dynamo.reset()
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    original.eval()
    for x in (X, parts):
        assert_close(compiled(x), original(x))
    bnext.revert(model)
    assert type(model) is kind


class AsksForAParameter(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y if isinstance(x, nn.Parameter) else y.relu()


class AsksForADtype(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y.relu() if isinstance(x, torch.DoubleTensor) else y


class AsksForAnIntermediate(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y[0] if isinstance(y, tuple) else y.relu()


class AsksTorch(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        return y.relu() if torch.is_tensor(x) else y


class AsksAndCatches(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        try:
            return y.relu() if torch.is_tensor(x) else y
        except Exception:
            return y.relu()


class BranchesAndCatches(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        try:
            positive = bool(x.sum() > -1e9)
        except Exception:
            positive = False
        return y.relu() if positive else y


class IteratesAndCatches(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        with contextlib.suppress(Exception):
            return torch.stack([part.relu() for part in y])
        return y.relu()


class KeepsAndCatches(Sample):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x)
        with contextlib.suppress(Exception):
            self.last = y
        return y.relu()


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return dy


class OwnGradient(Sample):
    def forward(self, x: Tensor) -> Tensor:
        return Straight.apply(self.bn(x).tanh())


class Checkpointed(Sample):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.relu(self.bn(x)), x, use_reentrant=False)


class Dropped(Sample):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.dropout(self.bn(x), 0.5, self.training))


LEFT = {
    AsksForAParameter: "more than the type", AsksForADtype: "more than the type",
    AsksForAnIntermediate: "type of a value that is no input", AsksTorch: "type of a value",
    AsksAndCatches: "type of a value", KeepsAndCatches: "the module's last",
    BranchesAndCatches: "branches on", IteratesAndCatches: "iterates over",
    OwnGradient: "type of a value", Dropped: "training and eval",
    Checkpointed: "torch.utils.checkpoint",
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT, ids=lambda k: k.__name__)
def test_what_may_not_be_traced_is_left_with_the_reason(kind) -> None:
    original = randomised(kind()).double()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert type(model) is kind and "last" not in vars(model)
    assert LEFT[kind] in bnext.conversion_report(model, fuse=True).unfused["bn"]
    for x in (X, nn.Parameter(X)):
        results = []
        for m in (model, original):
            torch.manual_seed(0)
            y = m(x.detach().clone().requires_grad_() if x is X else x)
            y.square().sum().backward()
            results.append([y.detach(), m.bn.weight.grad])
        assert_close(*results)


def padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """As transformers' apply_tf_padding, which computes with sizes as numbers."""
    return F.pad(x, (0, int(x.shape[-1]) % 2, 0, int(x.shape[-2]) % 2))


def doubled_in_place(x: Tensor) -> Tensor:
    return x.mul_(2) if int(x.shape[0]) else x


class Padded(Sample):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(padded(x, self.conv))))


class PaddedInBetween(Sample):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn(x)
        return self.relu(y + doubled_in_place(x))


def test_a_function_that_cannot_be_traced_is_called_as_it_is() -> None:
    model, original = pair(Padded)
    assert fused(model) == ["bn"]
    for size in (5, 6):
        same(model, original, torch.randn(2, 3, size, size, dtype=torch.float64))
    twin = pickle.loads(pickle.dumps(model))
    same(twin, original, X)
    model, original = pair(PaddedInBetween)
    assert fused(model) == []
    same(model, original, X)
