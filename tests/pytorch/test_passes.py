"""Whatever looks for a torch.nn.BatchNorm in a model, and what it makes of ours.

Where a pass asks for the exact class, the documented way is `revert`, the pass, `convert`.
"""

import copy
import functools
import warnings

import pytest
import torch
import torch.ao.quantization as quantization
import torch.fx.experimental.optimization as fx_optimization
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import bnext


def network(norm: type[nn.Module] = bnext.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), norm(4)
    )
    with torch.no_grad():
        for i in (1, 4):
            model[i].weight.uniform_(0.5, 1.5), model[i].bias.normal_()
            model[i].running_mean.normal_(), model[i].running_var.uniform_(0.5, 2)
    return model


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def assert_close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def norms(model: nn.Module) -> list[type[nn.Module]]:
    return [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_fuse_conv_bn_eval() -> None:
    model = network().eval()
    fused = nn.utils.fuse_conv_bn_eval(model[0], model[1])
    x = images()
    assert type(fused) is nn.Conv2d
    assert_close(fused(x), model[:2](x))


def test_fuse_linear_bn_eval() -> None:
    linear, bn = nn.Linear(3, 4).eval(), bnext.BatchNorm1d(4).eval()
    bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    x = torch.randn(5, 3)
    assert_close(nn.utils.fuse_linear_bn_eval(linear, bn)(x), bn(linear(x)))


def test_fx_fuse_needs_revert() -> None:
    """torch.fx's own conv-bn fusion compares classes exactly: ours are correct there, unfused."""
    model = network().eval()
    x = images()
    expected = model(x)
    unfused = fx_optimization.fuse(copy.deepcopy(model))
    assert norms(unfused) == [bnext.BatchNorm2d] * 2
    assert_close(unfused(x), expected)
    fused = fx_optimization.fuse(bnext.revert(copy.deepcopy(model)))
    assert norms(fused) == []
    assert_close(fused(x), expected)


def test_ao_eager_fusion_needs_revert() -> None:
    groups = [["0", "1", "2"], ["3", "4"]]
    model = network().eval()
    x = images()
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((AssertionError, NotImplementedError), match="BatchNorm2d"):
            quantization.fuse_modules(copy.deepcopy(model), groups)
        fused = quantization.fuse_modules(bnext.revert(copy.deepcopy(model)), groups)
    assert norms(fused) == []
    assert_close(bnext.convert(fused)(x), expected)


def test_ao_quantisation_aware_training_after_revert() -> None:
    """The fused training modules hold torch's batch norms; what was not fused can be converted."""
    model = nn.Sequential(network(), bnext.BatchNorm2d(4)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = quantization.fuse_modules_qat(bnext.revert(model), [["0.0", "0.1", "0.2"]])
    bnext.convert(fused)
    assert type(fused[1]) is bnext.BatchNorm2d
    before = fused[1].running_mean.clone()
    fused(images()).sum().backward()
    assert not torch.equal(fused[1].running_mean, before)


@pytest.mark.parametrize("freezing", [False, True])
def test_inductor_in_eval_folds_or_fuses_it(freezing) -> None:
    from torch._inductor.utils import run_and_get_code

    model = network().eval()
    x = images()
    expected = model(x)
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=freezing), torch.no_grad():
        try:
            y, code = run_and_get_code(torch.compile(model, fullgraph=True), x)
        except torch._inductor.exc.InductorError as error:
            if "compiler" in str(error).lower():
                pytest.skip(f"Inductor has no C++ compiler here: {error}")
            raise
    assert_close(y, expected)
    assert not any("bnext" in text for text in code)
    if freezing:
        # Folded: no reciprocal square root of a variance is left to compute.
        assert not any("sqrt" in text for text in code)


def test_torch_convert_sync_batchnorm() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert norms(model) == [nn.SyncBatchNorm] * 2
    x = images()
    assert_close(model.eval()(x), network().eval()(x))
    ours = bnext.SyncBatchNorm.convert_sync_batchnorm(network())
    assert norms(ours) == [bnext.SyncBatchNorm] * 2
    assert_close(ours.train()(x), network(nn.BatchNorm2d).train()(x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_swa_update_bn(momentum) -> None:
    data = [images(4) for _ in range(3)]
    states = []
    for norm in (bnext.BatchNorm2d, nn.BatchNorm2d):
        averaged = AveragedModel(network(norm))
        for module in averaged.modules():
            if isinstance(module, norm):
                module.momentum = momentum
        averaged.update_parameters(network(norm))
        update_bn(data, averaged)
        assert averaged.module[1].momentum == momentum
        states.append(averaged.state_dict())
    assert_close(*states)
    assert int(states[0]["module.1.num_batches_tracked"]) == 3


def test_moving_average_of_the_buffers_too() -> None:
    states = []
    for norm in (bnext.BatchNorm2d, nn.BatchNorm2d):
        model = network(norm)
        ema = AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        torch.manual_seed(1)
        for _ in range(3):
            model(images())
            ema.update_parameters(model)
        states.append(ema.state_dict())
    assert_close(*states)


class Backbone(nn.Module):
    """The norm_layer argument as torchvision's and timm's models take it: a class or a partial."""

    def __init__(self, norm_layer) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 4, 3), norm_layer(4)
        for module in self.modules():
            # torchvision's initialisation
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.constant_(module.weight, 0.5)
                nn.init.constant_(module.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv(x))


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3, "momentum": 0.01}], ids=["", "partial"])
def test_norm_layer_arguments(options) -> None:
    results = []
    for kind in (bnext.BatchNorm2d, nn.BatchNorm2d):
        torch.manual_seed(0)
        model = Backbone(functools.partial(kind, **options) if options else kind)
        assert float(model.bn1.weight[0]) == 0.5
        results.append((model(torch.ones(2, 3, 8, 8)), model.state_dict()))
    assert_close(*results)


def freeze_batch_norm_2d(module: nn.Module) -> nn.Module:
    """timm's: batch norms become modules with fixed statistics and parameters."""
    if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
        return FrozenBatchNorm2d(module)
    for name, child in module.named_children():
        setattr(module, name, freeze_batch_norm_2d(child))
    return module


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(bn, name).detach().clone())
        self.eps = bn.eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def test_freeze_helpers_that_replace_the_module() -> None:
    model = network().eval()
    x = images()
    expected = model(x)
    frozen = freeze_batch_norm_2d(model)
    assert norms(frozen) == []
    assert_close(frozen(x), expected)


def test_freeze_helpers_that_switch_to_eval() -> None:
    """As detection code bases do: eval() and requires_grad_(False) in a model that trains."""
    results = []
    for norm in (bnext.BatchNorm2d, nn.BatchNorm2d):
        model = network(norm).train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
                module.requires_grad_(False)
        torch.manual_seed(2)
        x = images().requires_grad_()
        model(x).square().sum().backward()
        assert model[1].weight.grad is None
        results.append((x.grad, model[0].weight.grad, model.state_dict()))
    assert_close(*results)


def test_feature_extraction_by_hooks_and_by_slices() -> None:
    model, theirs = network().eval(), network(nn.BatchNorm2d).eval()
    seen = []
    model[1].register_forward_hook(lambda m, args, y: seen.append(y))
    x = images()
    model(x)
    assert_close(seen[0], theirs[:2](x))
    assert_close(model[:2](x), theirs[:2](x))


def test_pruning_and_spectral_norm_of_the_convolution_before_it() -> None:
    results = []
    for norm in (bnext.BatchNorm2d, nn.BatchNorm2d):
        model = network(norm).eval()
        nn.utils.prune.random_unstructured(model[1], "weight", amount=0)
        torch.manual_seed(3)
        nn.utils.parametrizations.spectral_norm(model[0])
        results.append(model(torch.ones(2, 3, 8, 8)))
    assert_close(*results)


def test_skip_init_and_parameter_groups_by_class() -> None:
    """Optimizers that decay no batch norm find ours among torch's."""
    model = nn.Sequential(nn.Linear(3, 4), nn.utils.skip_init(bnext.BatchNorm1d, 4))
    no_decay = [
        p
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._NormBase)
        for p in m.parameters(recurse=False)
    ]
    assert [id(p) for p in no_decay] == [id(p) for p in model[1].parameters()]
