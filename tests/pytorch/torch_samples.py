"""PyTorch's own samples of batch norm, which ship in its wheel.

`module_db` has constructor and forward arguments of the modules, `op_db` calls of the function.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import bnext

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

NAMES = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
MODULES = {i.module_cls.__name__: i for i in module_db if i.module_cls.__name__ in NAMES}
(FUNCTIONAL,) = (
    op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name
)
OURS, THEIRS = bnext.functional.batch_norm, nn.functional.batch_norm
# A call of the functional form: positional arguments and the rest by keyword.
Call = tuple[list[Any], dict[str, Any]]


def module_samples(name: str, training: bool, device, dtype=torch.float64) -> list:
    info = MODULES[name]
    return list(info.module_inputs_func(info, str(device), dtype, True, training))


def build(kind: type, sample, training: bool, device, dtype=torch.float64) -> nn.Module:
    arguments = sample.constructor_input
    torch.manual_seed(0)
    module = kind(*arguments.args, **arguments.kwargs).to(device, dtype).train(training)
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(-1, 1)
    return module


def functional_calls(device, dtype=torch.float64) -> list[Call]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(FUNCTIONAL.sample_inputs(device, dtype, requires_grad=False))
    calls: list[Call] = [([s.input, *s.args], s.kwargs) for s in found]
    assert len(calls) >= 5
    assert any(args[0].shape == (0,) for args, _ in calls)

    empty = torch.empty(0, device=device, dtype=dtype)
    calls += [([empty, None, None], {"training": training}) for training in (True, False)]
    return calls


def fresh(value: Any) -> Any:
    """The same with a copy of every tensor in it."""
    return tree_map_only(Tensor, lambda t: t.detach().clone(), value)


def leaves(call: Call) -> list[Tensor]:
    return [t for t in tree_leaves(call) if isinstance(t, Tensor)]


def run(function: Callable[..., Tensor], call: Call) -> tuple[Any, ...]:
    """Output, the gradient for the input, and the arguments as the call left them."""
    args, kwargs = fresh(call)
    args[0].requires_grad_()
    y = function(*args, **kwargs)
    (grad,) = torch.autograd.grad(y.sin().sum(), args[0])
    return y.detach(), grad, args[1:], kwargs


def outcome(function: Callable[[], Any]) -> Any:
    """What a call gives, or the kind of error that it raises."""
    try:
        return function()
    except Exception as error:
        return type(error)
