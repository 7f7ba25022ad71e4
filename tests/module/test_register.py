"""register: other libraries' batch norms, and the pairs of classes that it refuses."""

import copy
import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import bnext
import libraries
from bnext import _registry, reference


class Theirs(nn.Module):
    """A batch norm that knows nothing of torch.nn's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean((0, 2, 3), True), x.var((0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (var + 1e-3).sqrt() * self.scale.view(1, -1, 1, 1)


class Ours(Theirs):
    def forward(self, x: Tensor) -> Tensor:
        return bnext.functional.batch_norm(x, None, None, self.scale, training=True, eps=1e-3)


class Derived(Theirs):
    pass


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = dict(_registry.OURS), dict(_registry.THEIRS)
    yield
    for table, content in zip((_registry.OURS, _registry.THEIRS), before, strict=True):
        table.clear(), table.update(content)


def test_registered_modules_are_converted_reported_and_reverted() -> None:
    model = nn.Sequential(Theirs(3), nn.ReLU(), Derived(3), nn.BatchNorm2d(3))
    bnext.register(Theirs, Ours)
    scale = model[0].scale
    assert bnext.conversion_report(model).convertible == ("0", "3")
    bnext.convert(model)
    assert [type(m) for m in model] == [Ours, nn.ReLU, Derived, bnext.BatchNorm2d]
    assert model[0].scale is scale
    assert bnext.conversion_report(model).bnext == ("0", "3")
    assert (
        bnext.conversion_report(model, fuse=True).unfused["0"] == "fusing does not know its class"
    )
    twin = copy.deepcopy(bnext.convert(model))
    assert [type(m) for m in twin] == [type(m) for m in model]
    assert [type(m) for m in bnext.revert(model)] == [Theirs, nn.ReLU, Derived, nn.BatchNorm2d]


def test_what_is_registered_computes_the_same() -> None:
    bnext.register(Theirs, Ours)
    module = bnext.convert(Theirs(3).double())
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    y, grad_out = module(x), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    scale = module.scale.detach()
    torch.testing.assert_close(y, reference.forward(x, scale, eps=1e-3).output)
    grads = torch.autograd.grad(y, (x, module.scale), grad_out)
    expected = reference.backward(grad_out, x.detach(), scale, eps=1e-3)
    torch.testing.assert_close(grads, (expected.input, expected.weight))


def test_registering_the_same_again_changes_nothing() -> None:
    bnext.register(Theirs, Ours)
    tables = dict(_registry.OURS), dict(_registry.THEIRS)
    bnext.register(Theirs, Ours)
    assert tables == (_registry.OURS, _registry.THEIRS)


class WithInit(Theirs):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.more = 1


class WithSlots(Theirs):
    __slots__ = ("more",)


class Other(Theirs):
    pass


class Further(Ours):
    pass


REFUSED = {
    "no class": (Theirs(3), Ours, TypeError, "theirs must be a subclass of torch.nn.Module, but "),
    "no module": (Theirs, int, TypeError, "ours must be a subclass of torch.nn.Module, but got"),
    "no subclass": (Theirs, nn.ReLU, TypeError, "ours must be a subclass of test_register.Theirs"),
    "itself": (Theirs, Theirs, TypeError, "ours must be a subclass of test_register.Theirs, so"),
    "its own init": (Theirs, WithInit, TypeError, "test_register.WithInit has one"),
    "another layout": (Theirs, WithSlots, TypeError, "without __slots__ of its own, but"),
    "ours taken": (nn.modules.batchnorm._BatchNorm, bnext.BatchNorm2d, ValueError,
                   "ours: bnext.modules.BatchNorm2d already stands for torch.nn."),
    "theirs is ours": (bnext.BatchNorm2d, type("C", (bnext.BatchNorm2d,), {}), ValueError,
                       "theirs: bnext.modules.BatchNorm2d stands for torch.nn."),
    "ours is theirs": (nn.modules.batchnorm._BatchNorm, nn.BatchNorm2d, ValueError,
                       "ours: torch.nn.modules.batchnorm.BatchNorm2d becomes bnext."),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_pair_that_could_not_be_swapped_is_refused_and_said_why(name) -> None:
    theirs, ours, error, words = REFUSED[name]
    tables = dict(_registry.OURS), dict(_registry.THEIRS)
    with pytest.raises(error, match=re.escape(words)):
        bnext.register(theirs, ours)
    assert tables == (_registry.OURS, _registry.THEIRS)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, libraries.BatchNormAct2d])
def test_a_later_registration_replaces_and_both_revert(kind) -> None:
    earlier, later = bnext.convert(kind(3)), type("Later", (kind,), {})
    bnext.register(kind, later)
    model = bnext.convert(nn.Sequential(earlier, kind(3)))
    assert type(model[1]) is later is not type(earlier)
    assert [type(m) for m in bnext.revert(model)] == [kind, kind]


class Wrapped(nn.Module):
    """As Opacus' GradSampleModule, by the name of its class' module."""

    __module__ = "opacus.grad_sample.grad_sample_module"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module


def test_converting_what_opacus_wrapped_warns() -> None:
    with pytest.warns(UserWarning, match="Opacus has wrapped this model") as caught:
        bnext.convert(Wrapped(nn.BatchNorm2d(3)))
    assert caught[0].filename == __file__
    hooked = nn.Sequential(nn.BatchNorm2d(3))
    hooked.autograd_grad_sample_hooks = []
    with pytest.warns(UserWarning, match="Opacus"):
        bnext.convert(hooked)


def test_without_batch_norms_there_is_nothing_to_warn_of(recwarn) -> None:
    bnext.convert(Wrapped(nn.GroupNorm(1, 3)))
    bnext.convert(nn.BatchNorm2d(3))
    assert not recwarn.list
