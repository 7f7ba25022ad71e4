"""convert(model, fuse=True) and its report trace a model's forward, which shows nowhere.

A forward that changes more than its output is left alone, by name.
"""

import collections
import contextlib
import copy
import io
import random
import types
import warnings
import weakref

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import bnext

COUNTS: dict[str, int] = {}
CALLS = 0
SETTINGS = types.ModuleType("settings")
SETTINGS.deep = types.ModuleType("settings.deep")
SETTINGS.deep.seen = []


class Meter:
    def __init__(self) -> None:
        self.values: list = []
        self.count = 0

    def update(self, value: object) -> None:
        self.values.append(value)
        self.count += 1


class Slotted:
    __slots__ = ("__last", "count")

    def __init__(self) -> None:
        self.count = 0

    def keep(self, value: object) -> None:
        self.__last = value


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cache: dict = {}
        self.seen = 0

    def note(self, value: object) -> None:
        self.seen += 1

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def noted(value: object, into: list = []) -> None:  # noqa: B006
    into.append(value)


def make_counting() -> tuple:
    total, seen = 0, []

    def count(x: object) -> None:
        nonlocal total
        total += 1

    return count, seen.append, lambda: (total, len(seen)), lambda x: seen.append(x)


COUNT, _, COUNTED, KEEP = make_counting()


class Net(nn.Module):
    shared: list = []  # noqa: RUF012
    made = 0

    def __init__(self, effect) -> None:
        super().__init__()
        self.bn, self.inner = nn.BatchNorm2d(3), Inner()
        self.layers = nn.ModuleList([Inner()])
        self.cache: dict = {"": {"deep": [set()]}}
        self.list: list = [1, 2]
        self.set: set = set()
        self.deque = collections.deque([1, 2], maxlen=2)
        self.ordered = collections.OrderedDict(a=1, b=2)
        self.default = collections.defaultdict(list)
        self.counter = collections.Counter("ab")
        self.bytes = bytearray(b"ab")
        self.array = numpy.zeros(2)
        self.meter, self.slotted = Meter(), Slotted()
        self.space = types.SimpleNamespace(count=0)
        self.random = random.Random(0)
        self.plain = torch.zeros(3)
        self.hidden = [Inner()]
        self.register_buffer("steps", torch.zeros(3))
        self.effect = effect

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x).relu()
        self.effect(self, y)
        return y


def global_count(net: Net, y: Tensor) -> None:
    global CALLS
    CALLS += 1


def rebind_class(net: Net, y: Tensor) -> None:
    type(net).made += 1


def raise_after_change(net: Net, y: Tensor) -> None:
    net.cache["y"] = y
    if y.sum() > 0:
        net.cache["positive"] = y


def swallow(net: Net, y: Tensor) -> None:
    with contextlib.suppress(Exception):
        net.plain.add_(1)


EFFECTS = {  # and what the reason names
    "dict": (lambda n, y: n.cache.__setitem__("y", y), "the module's cache"),
    "dict setdefault": (lambda n, y: n.cache.setdefault("y", y), "the module's cache"),
    "nested": (lambda n, y: n.cache[""]["deep"][0].add(y), "the module's cache"),
    "list": (lambda n, y: n.list.append(y), "the module's list"),
    "list item": (lambda n, y: n.list.__setitem__(0, y), "the module's list"),
    "set": (lambda n, y: n.set.add(y), "the module's set"),
    "deque": (lambda n, y: n.deque.append(y), "the module's deque"),
    "order": (lambda n, y: n.ordered.move_to_end("a"), "the module's ordered"),
    "defaultdict": (lambda n, y: n.default["y"].append(y), "the module's default"),
    "Counter": (lambda n, y: n.counter.update("a"), "the module's counter"),
    "bytearray": (lambda n, y: n.bytes.append(1), "the module's bytes"),
    "array": (lambda n, y: n.array.__iadd__(1), "the module's array"),
    "attribute": (lambda n, y: setattr(n, "last", y), "the module's last"),
    "deleted": (lambda n, y: delattr(n, "list"), "the module's list"),
    "child's dict": (lambda n, y: n.inner.cache.update(y=y), "the module's inner.cache"),
    "child's attribute": (lambda n, y: n.inner.note(y), "the module's inner.seen"),
    "grandchild's": (lambda n, y: n.layers[0].cache.update(y=y), "the module's layers.0.cache"),
    "in a list": (lambda n, y: n.hidden[0].note(y), "the module's hidden"),
    "object": (lambda n, y: n.meter.update(y), "the module's meter"),
    "slots": (lambda n, y: n.slotted.keep(y), "the module's slotted"),
    "slot": (lambda n, y: setattr(n.slotted, "count", 1), "the module's slotted"),
    "namespace": (lambda n, y: setattr(n.space, "count", 1), "the module's space"),
    "class list": (lambda n, y: n.shared.append(y), "Net.shared"),
    "class attribute": (rebind_class, "Net.made"),
    "global": (global_count, "the global CALLS"),
    "global dict": (lambda n, y: COUNTS.update(y=1), "the global COUNTS"),
    "other module's": (lambda n, y: SETTINGS.deep.seen.append(y), "global SETTINGS.deep.seen"),
    "other module's variable": (lambda n, y: setattr(SETTINGS, "calls", y), "global SETTINGS"),
    "default": (lambda n, y: noted(y), "default of noted"),
    "nonlocal": (lambda n, y: COUNT(y), "nonlocal total"),
    "closure": (lambda n, y: KEEP(y), "nonlocal seen"),
    "buffer": (lambda n, y: n.register_buffer("more", torch.zeros(1)), "the module's"),
    "buffer assigned": (lambda n, y: setattr(n, "steps", n.steps + 1), "the module's steps"),
    "hook": (lambda n, y: n.inner.register_forward_hook(print), "_forward_hooks"),
    "child mode": (lambda n, y: n.inner.eval(), "training mode"),
    "tensor": (lambda n, y: n.plain.add_(1), "changes a tensor"),
    "tensor, error swallowed": (swallow, "changes a tensor"),
    "torch's random numbers": (lambda n, y: torch.rand(2), "random numbers"),
    "torch's seed": (lambda n, y: torch.manual_seed(3), "random numbers"),
    "Python's random numbers": (lambda n, y: random.random(), "random numbers"),
    "NumPy's random numbers": (lambda n, y: numpy.random.rand(), "random numbers"),
    "its own random numbers": (lambda n, y: n.random.random(), "the module's random"),
    "untraceable after a change": (raise_after_change, "the module's cache"),
}


def state(net: Net) -> object:
    """Everything that the effects change, comparable."""

    def of(value: object) -> object:
        if isinstance(value, dict):
            return [type(value).__name__, *((k, of(v)) for k, v in value.items())]
        if isinstance(value, list | tuple | set | collections.deque):
            return [type(value).__name__, *map(of, value)]
        if isinstance(value, Tensor | numpy.ndarray):
            return id(value), value.tolist(), getattr(value, "_version", None)
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, Slotted):
            return value.count, hasattr(value, "_Slotted__last")
        if isinstance(value, nn.Module | Meter | types.SimpleNamespace):
            return id(value), of(vars(value))
        return value

    return (
        of(net), of(Net.shared), Net.made, CALLS, of(COUNTS), of(noted.__defaults__), COUNTED(),
        of(SETTINGS.deep.seen), hasattr(SETTINGS, "calls"),
        random.getstate(), torch.get_rng_state().tolist(), str(numpy.random.get_state()),
    )  # fmt: skip


@pytest.mark.parametrize("name", EFFECTS)
def test_tracing_changes_nothing_and_what_changes_something_is_left_alone(name) -> None:
    effect, reason = EFFECTS[name]
    net = bnext.convert(Net(effect))
    before = state(net)
    report = bnext.conversion_report(net, fuse=True)
    assert reason in report.unfused["bn"] and "forward of the model" in report.unfused["bn"]
    assert state(net) == before
    bnext.convert(net, fuse=True)
    assert state(net) == before and type(net) is Net and report.fused == ()


@pytest.mark.parametrize(
    "mode",
    [torch.device("meta"), FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu")],
    ids=lambda mode: type(mode).__name__,
)
def test_under_a_mode_of_torchs(mode) -> None:
    with mode:
        seeding = bnext.convert(Net(lambda n, y: torch.manual_seed(3)))
        before = torch.get_rng_state().tolist()
        assert "random" in bnext.conversion_report(seeding, fuse=True).unfused["bn"]
        assert torch.get_rng_state().tolist() == before
        net = bnext.convert(Net(lambda n, y: None), fuse=True)
        assert bnext.conversion_report(net).fused == ("bn",)


def test_an_effect_that_the_graph_holds_is_fused_and_happens_at_every_call() -> None:
    net = Net(lambda n, y: n.steps.add_(1))
    assert bnext.conversion_report(net, fuse=True).fusible == ("bn",)
    bnext.convert(net, fuse=True)
    assert net.steps.tolist() == [0, 0, 0] and net.steps._version == 0
    for calls in (1, 2):
        net(torch.randn(2, 3, 4, 4))
        assert net.steps.tolist() == [calls] * 3


class CachedBias(nn.Module):
    """The attention of LeViT and EfficientViT: biases by index, kept per device in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.weight = nn.BatchNorm2d(3), nn.Parameter(torch.randn(3, 6))
        self.register_buffer("index", torch.arange(16).reshape(4, 4) % 6, persistent=False)
        self.attention_bias_cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode and self.attention_bias_cache:
            self.attention_bias_cache = {}
        return self

    def get_biases(self, device: torch.device) -> Tensor:
        if torch.jit.is_tracing() or self.training:
            return self.weight[:, self.index]
        key = str(device)
        if key not in self.attention_bias_cache:
            self.attention_bias_cache[key] = self.weight[:, self.index]
        return self.attention_bias_cache[key]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(x) + self.get_biases(x.device))


def test_attention_bias_cache() -> None:
    original = nn.Sequential(CachedBias(), nn.BatchNorm2d(3), nn.ReLU()).eval()
    model = copy.deepcopy(original)
    assert "attention_bias_cache" in bnext.conversion_report(model, fuse=True).unfused["0.bn"]
    bnext.convert(model, fuse=True)
    assert bnext.conversion_report(model).fused == ("1",)
    assert model[0].attention_bias_cache == {}
    torch.save(model, io.BytesIO())
    x = torch.randn(2, 3, 4, 4)
    for training in (False, True, False):
        torch.testing.assert_close(model.train(training)(x), original.train(training)(x))
        assert len(model[0].attention_bias_cache) == (not training)
    with torch.no_grad():  # a cache that the traced code would have frozen
        model.train()[0].weight.add_(1), original.train()[0].weight.add_(1)
    torch.testing.assert_close(model.eval()(x), original.eval()(x))


def no_grad_inside(net: Net, y: Tensor) -> Tensor:
    with torch.no_grad():
        return net.bn(y).relu()


def autocast_inside(net: Net, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net.bn(F.conv2d(y, net.weight)).relu()


class Modal(Net):
    def __init__(self, effect) -> None:
        super().__init__(effect)
        self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.effect(self, x)


@pytest.mark.parametrize("effect", [no_grad_inside, autocast_inside])
def test_a_forward_that_switches_modes_keeps_them(effect) -> None:
    """The graph would not: torch.fx records operations only."""
    net = Modal(effect)
    original = copy.deepcopy(net)
    bnext.convert(net, fuse=True)
    assert "on or off" in bnext.conversion_report(net, fuse=True).unfused["bn"]
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y, expected = net(x), original(x)
    assert y.requires_grad == expected.requires_grad and y.dtype == expected.dtype


class ReadsBuffer(nn.Module):
    """What a buffer holds may change after conversion."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x + self.shift.reshape(3, 1, 1)).relu()


class BranchesOnBuffer(ReadsBuffer):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).relu() if self.shift.sum() == 0 else self.bn(x)


@pytest.mark.parametrize("kind", [ReadsBuffer, BranchesOnBuffer])
def test_buffers_are_read_at_every_call(kind) -> None:
    original = kind().eval()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    x = torch.randn(2, 3, 4, 4)
    for value in (0, 3):
        model.shift.fill_(value), original.shift.fill_(value)
        torch.testing.assert_close(model(x), original(x))
    assert bool(bnext.conversion_report(model).fused) == (kind is ReadsBuffer)


class Unreadable:
    @property
    def __dict__(self) -> dict:
        raise ValueError("not to be looked at")


def test_what_cannot_be_looked_at_is_a_reason() -> None:
    net = bnext.convert(Net(lambda n, y: None))
    net.object = Unreadable()
    assert "not to be looked at" in bnext.conversion_report(net, fuse=True).unfused["bn"]


def test_objects_without_a_state_of_their_own() -> None:
    net = bnext.convert(Net(lambda n, y: None))
    net.objects = [random.SystemRandom(), weakref.proxy(Meter()), object(), iter([1]), numpy]
    assert bnext.conversion_report(net, fuse=True).fusible == ("bn",)


def test_a_model_with_a_scripted_child() -> None:
    net = Net(lambda n, y: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        net.scripted = torch.jit.script(nn.Linear(3, 3).eval())
    original_mode = [m.training for m in net.modules()]
    assert bnext.conversion_report(bnext.convert(net, fuse=True)).fused == ("bn",)
    assert [m.training for m in net.modules()] == original_mode


class ReadsChildsMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.bn(x).relu(), self.drop.p, self.drop.training)


def test_a_childs_mode_is_not_frozen() -> None:
    model = bnext.convert(ReadsChildsMode().eval(), fuse=True)
    assert "training and eval" in bnext.conversion_report(model, fuse=True).unfused["bn"]
    assert [m.training for m in model.modules()] == [False] * 3
    model.drop.train()
    assert (model(torch.randn(2, 3, 8, 8)) == 0).float().mean() > 0.6


def test_no_proxy_survives_anywhere() -> None:
    import gc

    def proxies() -> list[fx.Proxy]:
        gc.collect()
        return [o for o in gc.get_objects() if issubclass(type(o), fx.Proxy)]

    others = proxies()  # of other tests
    net = Net(lambda n, y: (n.cache.update(y=y), n.meter.update(y), noted(y)))
    bnext.convert(net, fuse=True)
    assert not [p for p in proxies() if all(p is not other for other in others)]
