"""What COMPATIBILITY.md says of tools that know layers by class or hook them, with real tools."""

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import bnext

WAYS = {
    "nn": lambda model: model,
    "convert": bnext.convert,
    "fuse": lambda model: bnext.convert(model, fuse=True),
}
CONVERTED = pytest.mark.parametrize("way", ["convert", "fuse"])


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def network(way: str, **arguments: object) -> nn.Sequential:
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(4, **arguments)
    if bn.affine:
        bn.weight.data.uniform_(0.5, 1.5), bn.bias.data.normal_()
    layers = nn.Conv2d(3, 4, 3), bn, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    return WAYS[way](nn.Sequential(*layers))


def images() -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def private(model: nn.Module) -> nn.Module:
    """The model as Opacus makes it private, after a step."""
    opacus = pytest.importorskip("opacus")
    data = torch.utils.data.TensorDataset(images(), torch.zeros(6, dtype=torch.long))
    model, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0,
        data_loader=torch.utils.data.DataLoader(data, batch_size=6), max_grad_norm=1.0,
    )  # fmt: skip
    for x, label in loader:
        nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    return model


@CONVERTED
def test_opacus_passes_what_it_should_not_until_it_is_told(way) -> None:
    validators = pytest.importorskip("opacus.validators")
    from opacus.validators import batch_norm
    from opacus.validators.utils import register_module_fixer, register_module_validator

    validator = validators.ModuleValidator
    assert not validator.is_valid(network("nn"))
    model = network(way)
    assert validator.is_valid(model) and type(validator.fix(model)[1]) is bnext.BatchNorm2d
    with pytest.raises(NotImplementedError, match="buffers"):
        private(model)
    untracked = partial(network, way, track_running_stats=False)
    private(untracked())
    ours = [
        bnext.BatchNorm1d, bnext.BatchNorm2d, bnext.BatchNorm3d,
        bnext.BatchNormAct1d, bnext.BatchNormAct2d, bnext.BatchNormAct3d,
    ]  # fmt: skip
    register_module_validator(ours)(batch_norm.validate)
    register_module_fixer(ours)(batch_norm.fix)
    try:
        assert not validator.is_valid(model) and type(validator.fix(model)[1]) is nn.GroupNorm
        for kind in ours:
            assert not validator.is_valid(kind(3)), kind
        with pytest.raises(validators.errors.UnsupportedModuleError):
            private(untracked())
    finally:
        for kind in ours:
            del validator.VALIDATORS[kind], validator.FIXERS[kind]


def test_converting_what_opacus_wrapped_warns() -> None:
    opacus = pytest.importorskip("opacus")
    bn = nn.BatchNorm2d(4).requires_grad_(False)
    model = opacus.GradSampleModule(nn.Sequential(nn.Conv2d(3, 4, 3), bn))
    with pytest.warns(UserWarning, match="Opacus has wrapped this model"):
        bnext.convert(model)


METHODS = ["DeepLift", "GuidedBackprop", "Deconvolution", "Saliency", "IntegratedGradients"]


@pytest.mark.parametrize("method", METHODS)
def test_captum_s_attributions_are_the_same_but_for_batch_norm_act(method) -> None:
    attribution = getattr(pytest.importorskip("captum.attr"), method)
    models = {way: network(way).eval() for way in WAYS}
    assert bnext.conversion_report(models["fuse"]).fused == ("1",)
    own = network("nn").eval()
    act = bnext.BatchNormAct2d(4).eval()
    act.load_state_dict(own[1].state_dict())
    models["act"] = nn.Sequential(own[0], act, *own[3:])
    found = {way: attribution(m).attribute(images(), target=1) for way, m in models.items()}
    for way in ("convert", "fuse"):
        torch.testing.assert_close(found[way], found["nn"], rtol=1e-4, atol=1e-6)
    right = torch.allclose(found["act"], found["nn"], rtol=1e-4, atol=1e-6)
    assert right is (method in ("Saliency", "IntegratedGradients"))


def test_captum_s_lrp_has_no_rule_for_ours() -> None:
    attr = pytest.importorskip("captum.attr")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    attr.LRP(model).attribute(images(), target=(0, 0, 0))
    with pytest.raises(TypeError, match="no rule"):
        attr.LRP(bnext.convert(model)).attribute(images(), target=(0, 0, 0))
    attr.LRP(bnext.revert(model)).attribute(images(), target=(0, 0, 0))


@CONVERTED
def test_thop_and_ptflops_count_ours_once_they_are_told(way) -> None:
    thop, ptflops = pytest.importorskip("thop"), pytest.importorskip("ptflops")
    from ptflops.pytorch_ops import bn_flops_counter_hook

    def counted(way: str, backend: str = "pytorch", **arguments: object) -> tuple:
        return ptflops.get_model_complexity_info(
            network(way).eval(), (3, 8, 8), as_strings=False, print_per_layer_stat=False,
            backend=backend, **arguments,
        )  # fmt: skip

    assert counted(way) != counted("nn")
    assert counted(way, "aten") == counted("nn", "aten")
    hooks = {bnext.BatchNorm2d: bn_flops_counter_hook}
    assert counted(way, custom_modules_hooks=hooks) == counted("nn")
    ops = {bnext.BatchNorm2d: thop.vision.basic_hooks.count_normalization}
    expected = thop.profile(network("nn").eval(), (images(),), verbose=False)
    arguments = {"inputs": (images(),), "custom_ops": ops, "verbose": False}
    assert thop.profile(network(way).eval(), **arguments) == expected


@CONVERTED
def test_backpack_knows_ours_only_reverted(way) -> None:
    backpack = pytest.importorskip("backpack")
    from backpack.extensions import BatchGrad, DiagGGNExact

    def gradients(model: nn.Module, extension: object, name: str) -> list[bool]:
        model, loss = backpack.extend(model.eval()), backpack.extend(nn.CrossEntropyLoss())
        with backpack.backpack(extension):
            loss(model(images()), torch.zeros(6, dtype=torch.long)).backward()
        return [hasattr(p, name) for p in model.parameters()]

    batch_norms = [True, True, False, False, True, True]
    assert gradients(network(way), BatchGrad(), "grad_batch") == batch_norms
    with pytest.raises(NotImplementedError, match=r"bnext.modules.BatchNorm2d"):
        gradients(network(way), DiagGGNExact(), "diag_ggn_exact")
    for extension, name in ((BatchGrad(), "grad_batch"), (DiagGGNExact(), "diag_ggn_exact")):
        assert all(gradients(bnext.revert(network(way)), extension, name))


@CONVERTED
def test_feature_extractors_find_the_same(way) -> None:
    models = pytest.importorskip("torchvision.models")
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.feature_extraction import create_feature_extractor

    x, nodes = images().double(), ["layer1.0.bn1", "layer1.0.relu", "layer2"]
    pair = [models.resnet18().double().eval() for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    WAYS[way](pair[1])
    for extract in (
        lambda m: create_feature_extractor(m, nodes),
        lambda m: IntermediateLayerGetter(m, {"relu": "relu", "layer3": "layer3"}),
    ):
        expected, found = (extract(m)(x) for m in pair)
        assert expected.keys() == found.keys()
        torch.testing.assert_close([*found.values()], [*expected.values()])


def test_torchvision_takes_norm_layer_as_it_is() -> None:
    build = pytest.importorskip("torchvision.models").mobilenet_v3_large

    def settings(model: nn.Module) -> set[tuple[float, float]]:
        norms = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        return {(m.eps, m.momentum) for m in norms}

    bound = partial(bnext.BatchNorm2d, eps=0.001, momentum=0.01)
    assert settings(build(norm_layer=bnext.BatchNorm2d)) == {(1e-5, 0.1)}
    for model in (build(), bnext.convert(build()), build(norm_layer=bound)):
        assert settings(model) == {(0.001, 0.01)}
