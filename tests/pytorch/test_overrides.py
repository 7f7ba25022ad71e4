"""Who watches or replaces calls: torch.fx's proxies, `__torch_function__`, modes."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.normalize import NormalizeArgs
from torch.fx.passes.shape_prop import ShapeProp
from torch.overrides import TorchFunctionMode

import bnext
from bnext.functional import batch_norm, batch_norm_act

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Functional(nn.Module):
    """The functional form, as a user's module calls it."""

    def __init__(self, keywords: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.keywords = keywords

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        stats = (self.bn.running_mean, self.bn.running_var)
        if self.keywords:
            y = batch_norm(x, *stats, weight=self.bn.weight, bias=self.bn.bias,
                           training=self.training)  # fmt: skip
        else:
            y = batch_norm(x, *stats, self.bn.weight, self.bn.bias, self.training, 0.1, 1e-5)
        return batch_norm_act(y, None, None, residual=residual, training=True)


@TRAINING
@pytest.mark.parametrize("keywords", [False, True], ids=["positions", "keywords"])
def test_fx_keeps_the_functional_form_whole(keywords, training) -> None:
    model = Functional(keywords).train(training)
    traced = fx.symbolic_trace(copy.deepcopy(model))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert calls == [batch_norm, batch_norm_act]
    x, residual = torch.randn(2, 2, 3, 4, 4)
    ShapeProp(traced).propagate(x, residual)
    normalized = NormalizeArgs(copy.deepcopy(traced)).transform()
    expected = model(x, residual)
    for twin in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), normalized):
        twin.bn.running_mean.zero_(), twin.bn.running_var.fill_(1)
        assert torch.equal(twin(x, residual), expected)
        assert torch.equal(twin.bn.running_var, model.bn.running_var)


@pytest.mark.parametrize("place", range(6))
def test_a_proxy_anywhere_makes_a_node(place) -> None:
    values = [torch.randn(2, 3), torch.zeros(3), torch.ones(3), torch.ones(3), torch.zeros(3)]
    values.append(torch.randn(2, 3))

    class Model(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return batch_norm_act(*values[:place], t, *values[place + 1 :])

    traced = fx.symbolic_trace(Model())
    expected = batch_norm_act(*values)
    assert torch.equal(traced(values[place]), expected)


@TRAINING
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "kind", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct2d", "SyncBatchNorm"]
)
def test_a_batch_norm_itself_can_be_traced(kind, momentum, training) -> None:
    """Its counter and statistics move as the module's."""
    module = getattr(bnext, kind)(3, momentum=momentum).train(training)
    arguments = {"residual": None} if hasattr(module, "act") else None
    traced = fx.symbolic_trace(copy.deepcopy(module), concrete_args=arguments)
    for _ in range(2):
        x = torch.randn(4, 3, *[5] * (3 if kind == "BatchNorm3d" else 2))
        x = x.flatten(2) if kind == "BatchNorm1d" else x
        assert torch.equal(traced(x), module(x))
    expected = dict(module.named_buffers())
    assert all(torch.equal(v, expected[k]) for k, v in traced.named_buffers())


def test_a_sync_batch_norm_in_a_model_is_a_leaf() -> None:
    traced = fx.symbolic_trace(nn.Sequential(bnext.SyncBatchNorm(3)))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]


class Watched(Tensor):
    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Doubled(Tensor):
    """As far as a batch norm knows, twice what it is."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (nn.functional.batch_norm, torch.batch_norm):
            args = [a.as_subclass(Tensor) * 2 if isinstance(a, Doubled) else a for a in args]
            kwargs = {
                k: v.as_subclass(Tensor) * 2 if isinstance(v, Doubled) else v
                for k, v in (kwargs or {}).items()
            }
            return func(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs or {})


@TRAINING
@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("override", [Watched, Doubled])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_torch_function_of_parameters_and_buffers(name, override, grad, training) -> None:
    results = []
    for package in (bnext, nn):
        module = package.BatchNorm2d(3).train(training)
        store = module._parameters if name in module._parameters else module._buffers
        value = torch.tensor([0.5, 1, 2])
        store[name] = value.as_subclass(override).requires_grad_(store is module._parameters)
        Watched.seen.clear()
        torch.manual_seed(0)
        with torch.set_grad_enabled(grad):
            y = module(torch.randn(4, 3, 5, 5))
        seen = [function for function in Watched.seen if "norm" in function]
        results.append((type(y), seen, y.detach().as_subclass(Tensor)))
    torch.testing.assert_close(results[0][2], results[1][2])
    assert results[0][:2] == results[1][:2]


@pytest.mark.parametrize("place", range(6))
def test_torch_function_of_the_functional_forms_arguments(place) -> None:
    values = [torch.randn(2, 3), torch.zeros(3), torch.ones(3), torch.ones(3), torch.zeros(3)]
    values.append(torch.randn(2, 3))
    expected = batch_norm_act(*values)
    values[place] = values[place].as_subclass(Watched)
    Watched.seen.clear()
    y = batch_norm_act(*values)
    assert Watched.seen and type(y) is Watched
    torch.testing.assert_close(y.as_subclass(Tensor), expected)


@TRAINING
def test_modes_and_the_default_device_leave_the_op_in_place(training) -> None:
    class Mode(TorchFunctionMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    module = bnext.BatchNorm2d(3).train(training)
    x = torch.randn(4, 3, 5, 5)
    with Mode() as mode:
        for grad in (False, True):
            mode.seen.clear()
            with torch.set_grad_enabled(grad):
                module(x)
            name = "bnext.batch_norm_train" if training else "bnext.batch_norm_inference"
            assert any(name in function for function in mode.seen)
    previous = torch.get_default_device()
    torch.set_default_device("cpu")
    try:
        outputs = module(x), batch_norm_act(x, None, None, module.weight, training=True)
        assert all("BatchNormFunction" in type(y.grad_fn).__name__ for y in outputs)
    finally:
        torch.set_default_device(None if previous.type == "cpu" else previous)


@TRAINING
def test_a_tensor_subclass_as_input_stays_one(training) -> None:
    class Labelled(Tensor):
        pass

    y = bnext.BatchNorm1d(3).train(training)(torch.randn(4, 3).as_subclass(Labelled))
    assert type(y) is Labelled
