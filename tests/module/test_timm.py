"""timm's own helpers on models that were converted, with timm itself."""

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn

import bnext


def network(name: str = "densenet121", **arguments: object) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model of timm's, another that is converted, and an input for them."""
    timm = pytest.importorskip("timm")
    original = timm.create_model(name, **arguments).double()
    original(torch.randn(2, 3, 64, 64, dtype=torch.float64))
    model = bnext.convert(copy.deepcopy(original))
    assert not bnext.conversion_report(model).convertible
    return original.eval(), model.eval(), torch.randn(2, 3, 64, 64, dtype=torch.float64)


def test_timm_freezes_thaws_and_synchronises_what_was_converted() -> None:
    original, model, x = network()
    layers = importlib.import_module("timm.layers")
    output = original(x)
    for change in (
        layers.freeze_batch_norm_2d, bnext.convert, layers.unfreeze_batch_norm_2d, bnext.convert,
    ):  # fmt: skip
        model = change(model).eval()
        torch.testing.assert_close(model(x), output)
    kinds = {type(m).__name__ for m in layers.convert_sync_batchnorm(model).modules()}
    assert "SyncBatchNormAct" in kinds and "BatchNormAct2d" not in kinds
    torch.testing.assert_close(model(x), output)


def test_timm_averages_and_extracts_what_was_converted() -> None:
    original, model, x = network()
    utils = importlib.import_module("timm.utils")
    layers = importlib.import_module("timm.layers")
    average = utils.ModelEmaV3(model, decay=0.5)
    average.update(model)
    torch.testing.assert_close(average.module(x), original(x))
    node = "features.denseblock1.denselayer1.norm2"
    for result, wanted in zip(
        *(layers.create_feature_extractor(m, [node])(x).values() for m in (model, original)),
        strict=True,
    ):
        torch.testing.assert_close(result, wanted)
    original, model, x = network("regnety_004", features_only=True)
    torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("name", ["repvit_m1", "mobileone_s0"])
def test_timm_reparameterises_what_was_converted(name) -> None:
    original, model, x = network(name)
    utils = importlib.import_module("timm.utils")
    torch.testing.assert_close(model(x), original(x))
    # Some of what it makes is float32.
    model, original = (utils.reparameterize_model(m).double() for m in (model, original))
    torch.testing.assert_close(model(x), original(x))


def test_timm_puts_its_own_class_in_the_place_of_ours() -> None:
    """As COMPATIBILITY.md says: where a model builds a norm with an activation."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("regnety_004", norm_layer=bnext.BatchNorm2d)
    norms = {type(m).__module__ for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {"timm.layers.norm_act"}
    assert not bnext.conversion_report(bnext.convert(model)).convertible
