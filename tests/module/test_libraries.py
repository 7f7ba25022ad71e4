"""convert on the batch norms of timm, torchvision and transformers.

With stand-ins for their classes, and with the libraries themselves where they are installed.
"""

import copy
import importlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_convert import identities
from torch import Tensor, nn

import bnext
import libraries
from bnext import reference

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (3, 4, 5, 6)


@pytest.fixture(params=["stand-in", "real"])
def library(request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """The classes, and a Frozen one of transformers' DETR as `DetrFrozenBatchNorm2d`."""
    if request.param == "stand-in":
        with libraries.standing_in():
            yield SimpleNamespace(**{k.__name__: k for kinds in libraries.HOMES.values()
                                     for k in kinds})  # fmt: skip
        return
    found = {}
    for home, kinds in libraries.HOMES.items():
        module = pytest.importorskip(home)
        found |= {kind.__name__: getattr(module, kind.__name__) for kind in kinds}
    yield SimpleNamespace(**found)


def randomised(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.no_grad():
        module.to(dtype)
        for name in ("weight", "running_var"):
            getattr(module, name).uniform_(0.5, 1.5)
        for name in ("bias", "running_mean"):
            getattr(module, name).normal_()
    return module


def expected(module: nn.Module, x: Tensor, grad_out: Tensor, act: str | None) -> tuple:
    """Output and the gradients for the input and the parameters, in float64."""
    frozen = isinstance(module.weight, nn.Parameter) is False
    stats = None if module.training and not frozen else (module.running_mean, module.running_var)
    parameters = [t.detach().double() for t in (module.weight, module.bias)]
    leaves = [t.requires_grad_() for t in (x.detach().double(), *([] if frozen else parameters))]
    weight, bias = parameters if frozen else leaves[1:]
    eps = getattr(module, "eps", 1e-5)
    stats = stats and tuple(t.detach() for t in stats)
    y = reference.forward(leaves[0], weight, bias, None, stats, eps, act).output
    return y, *torch.autograd.grad(y, leaves, grad_out.double())


def found(module: nn.Module, x: Tensor, grad_out: Tensor) -> tuple:
    x = x.detach().requires_grad_()
    y = module(x)
    return y, *torch.autograd.grad(y, (x, *module.parameters()), grad_out)


ACTS = {
    "relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish, "relu6": nn.ReLU6,
    "gelu": nn.GELU, None: nn.Identity,
}  # fmt: skip


def test_timm_s_own_activations_are_known(library) -> None:
    module = bnext.convert(randomised(library.BatchNormAct2d(4, act_layer=library.GELU)))
    x, grad_out = torch.randn(2, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(found(module, x, grad_out), expected(module, x, grad_out, "gelu"))
    assert bnext.conversion_report(module).fused == ("",)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", ["BatchNormAct2d", "FrozenBatchNormAct2d"])
def test_activation_is_fused_and_numbers_are_right(library, kind, act, training) -> None:
    module = randomised(getattr(library, kind)(4, eps=1e-3, act_layer=ACTS[act])).train(training)
    bnext.convert(module)
    x, grad_out = torch.randn(2, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(found(module, x, grad_out), expected(module, x, grad_out, act))
    report = bnext.conversion_report(module)
    assert report.bnext == ("",) and report.fused == (() if act is None else ("",))


def test_fused_keeps_one_tensor_for_backward(library) -> None:
    kept: list[Tensor] = []
    module = bnext.convert(randomised(library.BatchNormAct2d(4, act_layer=nn.SiLU)))
    x = torch.randn(SHAPE, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [x.data_ptr()]


@pytest.mark.parametrize("kind", ["FrozenBatchNorm2d", "DetrFrozenBatchNorm2d"])
def test_frozen_is_the_eval_kernel_and_has_the_input_s_gradient_only(library, kind) -> None:
    original = randomised(getattr(library, kind)(4))
    module = bnext.convert(copy.deepcopy(original))
    assert isinstance(module, type(original)) and not [*module.parameters()]
    x, grad_out = torch.randn(2, *SHAPE, dtype=torch.float64)
    for training in (True, False):
        module.train(training)
        torch.testing.assert_close(found(module, x, grad_out), expected(module, x, grad_out, None))
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, original.get_buffer(name)), name
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x.requires_grad_())
    assert not any(t.shape == x.shape for t in kept)


FROZEN = ["FrozenBatchNorm2d", "DetrFrozenBatchNorm2d", "FrozenBatchNormAct2d"]


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(SHAPE, dtype=torch.bfloat16), torch.randn(SHAPE, dtype=torch.float64),
        torch.randn(4, 4, 6), torch.randn(2, 1, 5, 6), torch.zeros(0, 4, 5, 6),
    ],
    ids=["bfloat16", "float64", "without a batch", "broadcast", "empty"],
)  # fmt: skip
def test_frozen_promotes_and_broadcasts_as_theirs(library, kind, x) -> None:
    original = randomised(getattr(library, kind)(4), torch.float32)
    expected = original(x)
    output = bnext.convert(copy.deepcopy(original))(x)
    assert (output.dtype, output.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("kind", FROZEN[:2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fits", "promotes"])
def test_frozen_takes_a_residual_and_an_activation_in_one_pass(library, kind, dtype) -> None:
    module = bnext.convert(randomised(getattr(library, kind)(4)))
    x = torch.randn(SHAPE, dtype=torch.float64)
    for residual in (torch.randn(SHAPE, dtype=dtype), torch.randn(1, 4, 1, 1, dtype=dtype)):
        stats = module.running_mean, module.running_var
        wanted = reference.forward(x, module.weight, module.bias, residual, stats, act="relu")
        torch.testing.assert_close(module._normalize(x, residual, "relu", 0.0), wanted.output)


@pytest.mark.parametrize("name", ["weight", "running_var"])
def test_a_frozen_buffer_that_is_trained_has_its_gradient(library, name) -> None:
    original = randomised(library.FrozenBatchNorm2d(4))
    module = bnext.convert(copy.deepcopy(original))
    x, grad_out = torch.randn(2, *SHAPE, dtype=torch.float64)
    leaves = [getattr(m, name).requires_grad_() for m in (module, original)]
    for leaf, m in zip(leaves, (module, original), strict=True):
        m(x).backward(grad_out)
        torch.testing.assert_close(leaf.grad, leaves[0].grad)


def test_a_subclass_of_what_convert_made_is_copied_as_itself(library) -> None:
    module = bnext.convert(library.BatchNormAct2d(4))
    module.__class__ = type("Subclass", (type(module),), {})
    assert type(copy.deepcopy(module)) is type(module)


def test_an_input_of_another_dimension_is_refused_as_theirs(library) -> None:
    module = bnext.convert(library.BatchNormAct2d(4))
    with pytest.raises(AssertionError, match="expected"):
        module(torch.randn(3, 4, 5))
    assert int(module.num_batches_tracked) == 0


def test_frozen_without_eps_is_theirs(library) -> None:
    module = randomised(library.FrozenBatchNorm2d(4, eps=0.0))
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(bnext.convert(copy.deepcopy(module))(x), module(x))


def stages(library: SimpleNamespace) -> nn.Sequential:
    layers = [
        library.BatchNormAct2d(4), library.BatchNormAct2d(4, act_layer=nn.SiLU),
        library.BatchNormAct2d(4, apply_act=False), library.FrozenBatchNorm2d(4),
        library.FrozenBatchNormAct2d(4), library.DetrFrozenBatchNorm2d(4),
        library.BatchNormAct2d(4, act_layer=nn.PReLU),
        library.BatchNormAct2d(4, drop_layer=nn.Dropout),
    ]  # fmt: skip
    return nn.Sequential(*map(randomised, layers), library.SyncBatchNormAct(4))


def test_only_the_class_changes_and_comes_back(library) -> None:
    model = stages(library)
    kinds, before, text = [type(m) for m in model], identities(model), repr(model)
    bnext.convert(model)
    assert [type(m) is kind for m, kind in zip(model, kinds, strict=True)] == [False] * 8 + [True]
    assert all(isinstance(m, kind) for m, kind in zip(model, kinds, strict=True))
    assert identities(model) == before and repr(model) == text
    converted = [type(m) for m in model]
    assert [type(m) for m in bnext.convert(model)] == converted
    assert [type(m) for m in bnext.revert(model)] == kinds


def test_the_report_says_what_is_fused_and_why_not(library) -> None:
    model = stages(library)
    report = bnext.conversion_report(model, fuse=True)
    assert len(report.convertible) == 8 and report.left_alone.keys() == {"8"}
    assert "normalises over processes" in report.left_alone["8"]
    assert report.fusible == ("0", "1", "4") and report.fused == ()
    bnext.convert(model)
    model[1].act.register_forward_hook(lambda *_: None)
    report = bnext.conversion_report(model, fuse=True)
    assert report.fused == ("0", "4") and len(report.bnext) == 8
    assert report.unfused["1"] == "a hook or a forward of its own is on its drop or act"
    assert report.unfused["6"] == "its act is none that the kernels have"
    assert report.unfused["7"] == "its drop is no Identity"


class Residual(nn.Module):
    """A block that normalises, adds, perhaps in place, and activates."""

    def __init__(self, bn: nn.Module, way: str = "") -> None:
        super().__init__()
        self.conv, self.bn, self.act, self.way = nn.Conv2d(4, 4, 1), bn, nn.SiLU(), way
        self.shortcut = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, shortcut = self.bn(self.conv(x)), self.shortcut(x)
        if self.way == "into":
            y += shortcut
        elif self.way == "onto":
            shortcut += y
            y = shortcut
        else:
            y = y + shortcut
        return self.act(y)


WITHOUT_ACT = {
    "BatchNormAct2d": {"apply_act": False}, "FrozenBatchNormAct2d": {"apply_act": False},
    "FrozenBatchNorm2d": {}, "DetrFrozenBatchNorm2d": {},
}  # fmt: skip


@pytest.mark.parametrize("way", ["", "into", "onto"])
@pytest.mark.parametrize("kind", WITHOUT_ACT)
def test_what_has_no_activation_is_fused_with_what_follows(library, kind, way) -> None:
    bn = randomised(getattr(library, kind)(4, **WITHOUT_ACT[kind]))
    original = Residual(bn, way).double()
    model = copy.deepcopy(original)
    assert bnext.conversion_report(model, fuse=True).fusible == ("bn",)
    bnext.convert(model, fuse=True)
    report = bnext.conversion_report(model, fuse=True)
    assert report.fused == ("bn",) and not report.unfused
    x, grad_out = torch.randn(2, *SHAPE, dtype=torch.float64)
    for training in (True, False):
        model.train(training), original.train(training)
        torch.testing.assert_close(found(model, x, grad_out), found(original, x, grad_out))
    if not [*bn.parameters()]:  # it promotes
        for m in (model, original):
            m.conv.float(), m.shortcut.float()
        outputs = [m(x.float()) for m in (model, original)]
        assert outputs[0].dtype == (torch.float32 if way == "onto" else torch.float64)
        torch.testing.assert_close(*outputs)
        model.double(), original.double()
    model.bn.act = nn.Tanh()
    if "Act" in kind:
        original.bn.act = nn.Tanh()
    torch.testing.assert_close(model(x), original(x))


def test_an_activation_without_a_kernel_keeps_what_follows_out(library) -> None:
    bn = library.BatchNormAct2d(4, act_layer=nn.PReLU)
    model = bnext.convert(nn.Sequential(nn.Conv2d(4, 4, 1), bn, nn.ReLU()), fuse=True)
    assert bnext.conversion_report(model).fused == ()


@pytest.mark.parametrize("kind", ["BatchNormAct2d", "FrozenBatchNormAct2d"])
def test_its_own_activation_comes_before_what_follows(library, kind) -> None:
    original = Residual(randomised(getattr(library, kind)(4))).double()
    model = bnext.convert(copy.deepcopy(original), fuse=True)
    assert type(model) is Residual
    report = bnext.conversion_report(model, fuse=True)
    assert report.fused == ("bn",) and not report.unfused
    x, grad_out = torch.randn(2, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(found(model, x, grad_out), found(original, x, grad_out))


@pytest.mark.parametrize("change", ["hook on act", "hook on drop", "forward of act", "global"])
def test_whoever_looks_at_the_activation_is_called(library, change) -> None:
    module = bnext.convert(randomised(library.BatchNormAct2d(4)).eval())
    x, calls = torch.randn(SHAPE, dtype=torch.float64), []
    output = module(x)

    def look(*arguments: object) -> None:
        calls.append(arguments)

    handle = None
    if change == "forward of act":
        module.act.forward = lambda x: calls.append(x) or x.relu()
    elif change == "global":
        handle = nn.modules.module.register_module_forward_hook(look)
    else:
        getattr(module, change.split()[-1]).register_forward_hook(look)
    try:
        torch.testing.assert_close(module(x), output)
    finally:
        if handle:
            handle.remove()
    assert calls


def test_another_activation_put_in_its_place_is_computed(library) -> None:
    module = bnext.convert(randomised(library.BatchNormAct2d(4)).eval())
    x, grad_out = torch.randn(2, *SHAPE, dtype=torch.float64)
    module.act = nn.Sigmoid()
    torch.testing.assert_close(found(module, x, grad_out), expected(module, x, grad_out, "sigmoid"))
    module.act, module.drop = nn.Softplus(), nn.Flatten(2)
    torch.testing.assert_close(
        module(x), nn.functional.softplus(expected(module, x, grad_out, None)[0].flatten(2))
    )


def test_copies_pickles_scripts_and_traces(library, tmp_path) -> None:
    model = bnext.convert(stages(library)[:8]).eval()
    x = torch.randn(SHAPE, dtype=torch.float64)
    output = model(x)
    torch.save(model, tmp_path / "model.pt")
    for twin in (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ):  # fmt: skip
        assert [type(m) for m in twin] == [type(m) for m in model]
        assert torch.equal(twin(x), output)
        assert "bnext" not in str([type(m) for m in bnext.revert(twin).modules()])
    for other in (
        torch.jit.script(model), torch.jit.trace(model, x), torch.fx.symbolic_trace(model),
        torch.export.export(model, (x,)).module(),
        torch.compile(model, backend="aot_eager", fullgraph=True),
    ):  # fmt: skip
        torch.testing.assert_close(other(x), output)


def test_a_pickle_is_read_by_a_process_that_has_not_converted(library, tmp_path, request) -> None:
    if "real" not in request.node.name:
        pytest.skip("the stand-ins are this process's")
    file = tmp_path / "model.pt"
    torch.save(bnext.convert(library.BatchNormAct2d(4)), file)
    code = (
        f"import torch, bnext; m = torch.load({str(file)!r}, weights_only=False)\n"
        "assert 'bnext' in type(m).__module__ and 'timm' in type(bnext.revert(m)).__module__"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_conversion_imports_nothing() -> None:
    code = (
        "import sys, torch, bnext\n"
        "bnext.convert(torch.nn.BatchNorm2d(3))\n"
        "assert not {'timm', 'torchvision', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_frozen_batch_norm_of_transformers_is_detr_s() -> None:
    transformers = pytest.importorskip("transformers")
    folder = Path(transformers.__file__).parent / "models"
    homes = [p for p in folder.glob("*/modeling_*.py") if "FrozenBatchNorm2d(nn" in p.read_text()]
    assert len(homes) > 5
    x = torch.randn(SHAPE, dtype=torch.float64)
    for path in homes:
        home = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        for name in vars(home):
            if name.endswith("FrozenBatchNorm2d"):
                module = bnext.convert(randomised(getattr(home, name)(4)))
                assert bnext.conversion_report(module).bnext == ("",), name
                grad_out = torch.randn_like(x)
                torch.testing.assert_close(
                    found(module, x, grad_out), expected(module, x, grad_out, None), msg=name
                )


def test_synchronising_keeps_the_activation_or_refuses(library) -> None:
    kept = bnext.SyncBatchNorm.convert_sync_batchnorm(library.BatchNormAct2d(4, act_layer=nn.SiLU))
    assert type(kept) is bnext.SyncBatchNorm and (kept.act, kept.act_param) == ("silu", None)
    x = torch.randn(SHAPE)
    torch.testing.assert_close(kept(x), nn.functional.silu(nn.BatchNorm2d(4)(x)))
    with pytest.raises(ValueError, match="would lose its activation"):
        bnext.SyncBatchNorm.convert_sync_batchnorm(library.BatchNormAct2d(4, act_layer=nn.Softplus))
