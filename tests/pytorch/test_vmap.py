"""torch.func.vmap over the modules and the functional form, as over torch.nn's."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

import bnext
from bnext.functional import batch_norm

BOTH = (batch_norm, nn.functional.batch_norm)


def test_a_module_in_eval() -> None:
    x = torch.randn(5, 4, 3, 8, 8)
    ours, theirs = bnext.BatchNorm2d(3).eval(), nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        ours.running_mean.normal_(), ours.running_var.uniform_(0.5, 2)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(vmap(ours)(x), vmap(theirs)(x))


@pytest.mark.parametrize("batched_weight", [True, False])
def test_training_without_running_statistics(batched_weight) -> None:
    x, w = torch.randn(5, 6, 4, 3, 3), torch.rand(5, 4) if batched_weight else torch.rand(4)
    dims = (0, 0 if batched_weight else None)
    ours, theirs = (
        vmap(lambda x, w, f=f: f(x, None, None, w, None, True), dims)(x, w) for f in BOTH
    )
    torch.testing.assert_close(ours, theirs)


def test_unbatched_running_statistics_are_torchs_error() -> None:
    x = torch.randn(5, 6, 4, 3)
    for function in BOTH:
        stats = torch.zeros(4), torch.ones(4)
        with pytest.raises(RuntimeError):
            vmap(lambda x, f=function, s=stats: f(x, *s, training=True))(x)
        assert torch.equal(stats[0], torch.zeros(4))


def test_per_sample_gradients_in_training() -> None:
    x = torch.randn(7, 6, 4, 3)
    ours, theirs = (
        vmap(grad(lambda x, f=f: f(x, None, None, training=True).pow(3).sum()))(x) for f in BOTH
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
