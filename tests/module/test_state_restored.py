"""Calls that raise where the state cannot simply be given its values back."""

from contextlib import nullcontext

import pytest
import torch
from test_state import assert_unchanged, state_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import bnext


@pytest.mark.parametrize("shape", [(4, 3, 6), (4, 3, 1, 5)], ids=str)
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_a_residual_that_a_transform_cannot_add_changes_nothing(transform, shape) -> None:
    residual = torch.randn(shape)
    module = bnext.BatchNormAct1d(3)
    x = torch.randn(4, 3, 5)
    before = state_of(module)
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        if transform == "grad":
            torch.func.grad(lambda x: module(x, residual[:, :, :6]).sum())(x)
        else:
            torch.func.vmap(lambda x: module(x, residual))(x[None])
    assert_unchanged(module, before)


@pytest.mark.parametrize("act", ["relu", "elu", "hardswish"])
@pytest.mark.parametrize("kind", [bnext.BatchNormAct1d, bnext.SyncBatchNorm])
def test_an_activation_that_refuses_the_sum_changes_nothing(kind, act) -> None:
    """The sum with a complex residual is complex."""
    module = kind(3, act=act)
    before = state_of(module)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)complex"):
        module(torch.randn(4, 3, 5), torch.randn(4, 3, 5, dtype=torch.complex64))
    assert_unchanged(module, before)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", ""])
@pytest.mark.parametrize("act", ["relu6", "leaky_relu", "silu", "hardswish", "gelu_tanh", "elu"])
def test_an_activation_without_kernels_for_the_layout_changes_nothing(act, grad) -> None:
    module = bnext.BatchNormAct2d(3, act=act)
    before = state_of(module)
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, NotImplementedError)):
        module(torch.randn(4, 3, 5, 5).to_mkldnn())
    assert_unchanged(module, before)


@pytest.mark.parametrize("counter", [torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize("where", ["fake", "sparse", "nested", "mkldnn", "quantized"])
def test_an_error_is_not_hidden_by_the_state_that_it_leaves(where, counter) -> None:
    """State that has no values to compare."""
    mode = FakeTensorMode() if where == "fake" else nullcontext()
    with mode:
        results = []
        for kind in (bnext.BatchNorm2d, nn.BatchNorm2d):
            module = kind(3)
            module.num_batches_tracked = torch.zeros((), dtype=counter)
            if where != "fake":
                module.running_mean = {
                    "sparse": Tensor.to_sparse, "mkldnn": Tensor.to_mkldnn,
                    "nested": lambda t: torch.nested.nested_tensor([t]),
                    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
                }[where](torch.zeros(3))  # fmt: skip
            with pytest.raises(RuntimeError) as error:
                module(torch.randn(4, 4 if where in ("fake", "sparse") else 3, 5, 5))
            results.append((error.type, str(error.value)))
    (ours, got), (theirs, expected) = results
    assert ours is theirs and expected.splitlines()[0] in got
