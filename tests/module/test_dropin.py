"""Parity with torch.nn: constructors, state, toggles, conversions, lazy modules, buffers."""

import copy
import inspect
import io
import pickle
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import bnext

NDIMS = [1, 2, 3]
SHAPES = {1: (6, 5), 2: (3, 5, 4, 2), 3: (2, 5, 3, 2, 2)}
OPTIONS = [
    {"eps": eps, "momentum": momentum, "affine": affine, "track_running_stats": track}
    for eps, momentum, affine, track in product(
        [1e-5, 1e-2], [0.1, None, 0.0], [True, False], [True, False]
    )
]
HAS_BIAS_OPTION = "bias" in inspect.signature(nn.BatchNorm1d.__init__).parameters
if HAS_BIAS_OPTION:
    OPTIONS += [{"bias": False}, {"bias": False, "affine": False}]


def pair(
    ndim: int, device: torch.device | str = "cpu", **options: object
) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, with the same parameters away from their initial values."""
    ours = getattr(bnext, f"BatchNorm{ndim}d")(5, device=device, **options)
    theirs = getattr(nn, f"BatchNorm{ndim}d")(5, device=device, **options)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.copy_(p.copy_(torch.randn(5)))
    return ours, theirs


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def options_id(options: dict[str, object]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items())


@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
@pytest.mark.parametrize("ndim", NDIMS)
def test_every_constructor_option_behaves_as_torchs(ndim, options, device) -> None:
    ours, theirs = pair(ndim, device, **options)
    assert isinstance(ours, type(theirs))
    assert type(ours).__name__ == type(theirs).__name__
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    for training in (True, True, False, True, False):
        ours.train(training), theirs.train(training)
        x = torch.randn(SHAPES[ndim], device=device)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(a), theirs(b)
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(y)
        y.backward(grad), z.backward(grad)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
            p.grad = q.grad = None
        assert_same_state(ours, theirs)


@pytest.mark.parametrize("ndim", NDIMS)
def test_constructor_signature_is_torchs(ndim) -> None:
    for prefix in ("", "Lazy"):
        name = f"{prefix}BatchNorm{ndim}d"
        assert inspect.signature(getattr(bnext, name)) == inspect.signature(getattr(nn, name))
        assert issubclass(getattr(bnext, name), getattr(nn, name))


def test_functional_signature_is_torchs() -> None:
    ours = inspect.signature(bnext.functional.batch_norm).parameters
    theirs = inspect.signature(nn.functional.batch_norm).parameters
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("options", OPTIONS, ids=options_id)
def test_state_dict_loads_strictly_both_ways(options) -> None:
    for source_class, target_class in ((bnext, nn), (nn, bnext)):
        source = source_class.BatchNorm2d(5, **options)
        source(torch.randn(3, 5, 2, 2) + 1)
        target = target_class.BatchNorm2d(5, **options)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same_state(source, target)
        assert source.state_dict()._metadata == target.state_dict()._metadata


def test_state_dict_of_version_1_loads_without_counter() -> None:
    old = nn.BatchNorm2d(5).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    bn = bnext.BatchNorm2d(5)
    bn.load_state_dict(old)
    assert int(bn.num_batches_tracked) == 0


def all_modules() -> list[nn.Module]:
    plain = [getattr(bnext, f"BatchNorm{d}d")(5) for d in NDIMS]
    act = [getattr(bnext, f"BatchNormAct{d}d")(5, act=a) for d in NDIMS for a in ("relu", None)]
    return [*plain, *act]


@pytest.mark.parametrize("module", all_modules(), ids=lambda m: str(m))
def test_pickle_deepcopy_and_save(module) -> None:
    ndim = int(type(module).__name__[-2])
    x = torch.randn(SHAPES[ndim])
    module(x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module),
        torch.load(buffer, weights_only=False),
    ]
    expected = module.eval()(x)
    for twin in copies:
        assert type(twin) is type(module) and repr(twin) == repr(module)
        assert twin.running_mean is not module.running_mean
        assert torch.equal(twin.eval()(x), expected)


@pytest.mark.parametrize("ndim", NDIMS)
def test_act_module_has_the_state_of_the_plain_one(ndim) -> None:
    act = getattr(bnext, f"BatchNormAct{ndim}d")(5)
    plain = getattr(nn, f"BatchNorm{ndim}d")(5)
    assert isinstance(act, type(plain))
    act.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(act.state_dict(), strict=True)
    assert "relu" in act.extra_repr()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("ndim", NDIMS)
def test_act_module_is_bn_add_act(ndim, with_residual, act, training, device) -> None:
    _, theirs = pair(ndim, device)
    ours = getattr(bnext, f"BatchNormAct{ndim}d")(5, act=act, device=device)
    ours.load_state_dict(theirs.state_dict())
    ours.train(training), theirs.train(training)
    x = torch.randn(SHAPES[ndim], device=device)
    residual = torch.randn(SHAPES[ndim], device=device) if with_residual else None
    expected = theirs(x) if residual is None else theirs(x) + residual
    expected = expected.relu() if act else expected
    y = ours(x) if residual is None else ours(x, residual)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert_same_state(ours, theirs)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="softplus"):
        bnext.BatchNormAct2d(3, act="softplus")


@pytest.mark.parametrize("ndim", NDIMS)
def test_lazy_module_becomes_the_plain_one(ndim, device) -> None:
    lazy = getattr(bnext, f"LazyBatchNorm{ndim}d")(momentum=0.3, device=device)
    theirs = getattr(nn, f"LazyBatchNorm{ndim}d")(momentum=0.3, device=device)
    assert repr(lazy) == repr(theirs)
    x = torch.randn(SHAPES[ndim], device=device)
    torch.testing.assert_close(lazy(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert type(lazy) is getattr(bnext, f"BatchNorm{ndim}d")
    assert lazy.num_features == 5
    assert_same_state(lazy, theirs)


def test_lazy_module_loads_a_state_dict() -> None:
    source = nn.BatchNorm2d(5)
    source(torch.randn(3, 5, 2, 2))
    lazy = bnext.LazyBatchNorm2d()
    lazy.load_state_dict(source.state_dict())
    assert_same_state(lazy.eval(), source)
    x = torch.randn(3, 5, 2, 2)
    torch.testing.assert_close(lazy(x), source.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_module_converted_to_a_dtype(dtype, device) -> None:
    ours, theirs = (m.to(dtype) for m in pair(2, device))
    x = torch.randn(SHAPES[2], device=device).to(dtype)
    y, z = ours(x), theirs(x)
    assert y.dtype == z.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, z, rtol=tolerance, atol=4 * tolerance)
    assert {n: b.dtype for n, b in ours.named_buffers()} == {
        n: b.dtype for n, b in theirs.named_buffers()
    }
    assert int(ours.num_batches_tracked) == 1


def test_half_and_float_round_trip(device) -> None:
    bn = bnext.BatchNorm2d(5, device=device)
    x = torch.randn(SHAPES[2], device=device)
    assert bn.half()(x.half()).dtype == torch.float16
    assert bn.float()(x).dtype == torch.float32


def test_meta_device_module_materialises(device) -> None:
    bn = bnext.BatchNorm2d(5, device="meta")
    assert bn(torch.randn(SHAPES[2], device="meta")).is_meta
    bn = bn.to_empty(device=device)
    bn.reset_parameters()
    x = torch.randn(SHAPES[2], device=device)
    torch.testing.assert_close(bn(x), nn.BatchNorm2d(5, device=device)(x), rtol=1e-5, atol=1e-5)


def test_tracking_switched_off_in_training_keeps_buffers(device) -> None:
    ours, theirs = pair(2, device)
    ours.track_running_stats = theirs.track_running_stats = False
    x = torch.randn(SHAPES[2], device=device)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert_same_state(ours, theirs)
    assert int(ours.num_batches_tracked) == 0


def test_buffers_set_to_none_in_eval_use_the_batch(device) -> None:
    for module in (modules := pair(2, device)):
        module.running_mean = module.running_var = None
        module.eval()
    x = torch.randn(SHAPES[2], device=device)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(modules[0](x), modules[1](x), rtol=1e-5, atol=1e-5)


def test_counter_set_to_none_is_not_counted(device) -> None:
    for momentum in (0.1, None):
        for module in (modules := pair(2, device, momentum=momentum)):
            module.num_batches_tracked = None
        x = torch.randn(SHAPES[2], device=device)
        modules[0](x), modules[1](x)
        assert_same_state(*modules)


def test_reset_running_stats_and_parameters(device) -> None:
    ours, _ = pair(2, device)
    ours(torch.randn(SHAPES[2], device=device))
    ours.reset_parameters()
    assert_same_state(ours, nn.BatchNorm2d(5, device=device))


def test_copy_on_write_inputs_stay_lazy(device) -> None:
    case = [
        torch.randn(SHAPES[2], device=device),
        torch.rand(5, device=device),
        torch.rand(5, device=device),
    ]
    lazy = [torch._lazy_clone(t) for t in case]
    bnext.functional.batch_norm(lazy[0], None, None, lazy[1], lazy[2], True)
    mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
    lazy += [torch._lazy_clone(mean), torch._lazy_clone(var)]
    bnext.functional.batch_norm(lazy[0], lazy[3], lazy[4], lazy[1], lazy[2], False)
    assert all(torch._C._is_cow_tensor(t) for t in lazy)
    bnext.functional.batch_norm(lazy[0], lazy[3], lazy[4], training=True)
    assert not torch._C._is_cow_tensor(lazy[3]) and not torch._C._is_cow_tensor(lazy[4])
    assert torch.equal(mean, torch.zeros_like(mean)), "the clone's update reached the original"


def test_parametrized_and_pruned_weights(device) -> None:
    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    x = torch.randn(SHAPES[2], device=device)
    modules = pair(2, device)
    for module in modules:
        nn.utils.parametrize.register_parametrization(module, "weight", Double())
    others = pair(2, device)
    for module in others:
        nn.utils.prune.l1_unstructured(module, "weight", amount=2)
    for ours, theirs in (modules, others):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


def test_hooks_see_input_and_output() -> None:
    bn = bnext.BatchNorm1d(3)
    seen = []
    bn.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))
    bn.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    bn.register_full_backward_hook(lambda m, gin, gout: seen.append(gin[0].shape))
    bn(torch.randn(4, 3, requires_grad=True)).sum().backward()
    assert seen == [(4, 3)] * 3


def test_swa_and_sync_batch_norm_tools_recognise_it() -> None:
    model = nn.Sequential(nn.Linear(4, 5), bnext.BatchNorm1d(5, momentum=0.5))
    torch.optim.swa_utils.update_bn([torch.randn(8, 4) for _ in range(3)], model)
    assert int(model[1].num_batches_tracked) == 3
    assert model[1].momentum == 0.5


def test_parameters_used_twice_accumulate() -> None:
    x = torch.randn(6, 4)
    results = []
    for bn in (bnext.BatchNorm1d(4), nn.BatchNorm1d(4)):
        bn(bn(x) * 2 + 1).pow(3).sum().backward()
        results.append((bn.weight.grad, bn.bias.grad, bn.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_anomaly_mode_and_saved_tensor_hooks() -> None:
    bn = bnext.BatchNorm2d(3)
    packed = []
    with (
        torch.autograd.detect_anomaly(check_nan=True),
        torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t),
    ):
        bn(torch.randn(4, 3, 8, 8, requires_grad=True)).sum().backward()
    assert any(t.shape == (4, 3, 8, 8) for t in packed)
    assert not any(t is b for t in packed for b in bn.buffers()), "a running statistic was saved"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_version_counters_of_buffers_are_torchs(training, device) -> None:
    """Autograd notices changed buffers by them."""
    ours, theirs = pair(2, device)
    x = torch.randn(SHAPES[2], device=device)
    for module in (ours.train(training), theirs.train(training)):
        module(x)
    for (name, a), (_, b) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert (a._version > 0) == (b._version > 0), name


@pytest.mark.parametrize("name", ["introspect", "verify", "explain", "build_info", "Explanation"])
def test_what_is_imported_late_is_there_from_the_start(name) -> None:
    program = (
        f"import bnext, types; assert {name!r} in dir(bnext); value = bnext.{name}; "
        f"assert isinstance(value, types.ModuleType) == ({name!r} in ('introspect', 'verify'))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", [n for n in bnext.__all__ if "BatchNorm" in n])
def test_help_of_forward_is_our_own(name) -> None:
    text = inspect.getdoc(getattr(bnext, name).forward)
    assert text and text != inspect.getdoc(nn.Module().forward)
