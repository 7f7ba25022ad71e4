"""Models that leave Python: torch.export, AOTInductor, ONNX, TorchScript.

Each format is made once, of one network with a convolution, a batch norm and a fused residual.
"""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import bnext


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = bnext.BatchNorm2d(4)
        self.act = bnext.BatchNormAct2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.act(x * 2, x)


class Theirs(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return torch.relu(self.act(x * 2) + x)


def nets(training: bool) -> tuple[Net, Theirs]:
    theirs, ours = Theirs(), Net()
    with torch.no_grad():
        for bn in (theirs.bn, theirs.act):
            bn.weight.uniform_(0.5, 1.5), bn.bias.normal_()
            bn.running_mean.normal_(), bn.running_var.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    return ours.train(training), theirs.train(training)


def data(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 6, 6)


def assert_close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@MODES
def test_exported_program_is_saved_and_loaded(training, tmp_path) -> None:
    """With a dynamic batch size; in training the buffers are changed."""
    ours, theirs = nets(training)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ours, (data(),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for n in (2, 5):
        x = data(n)
        assert_close(loaded(x), theirs(x))
    state = loaded.state_dict()
    assert_close({k: state[k] for k in theirs.state_dict()}, theirs.state_dict())


@pytest.mark.parametrize("strict", [True, False], ids=["strict", ""])
def test_a_training_program_holds_atens_batch_norm(strict) -> None:
    """For passes such as torchao's move_exported_model_to_eval, which look for that op."""
    ours, theirs = nets(True)
    program = torch.export.export(copy.deepcopy(ours), (data(),), strict=strict)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert calls.count("aten.batch_norm.default") == 2
    assert not any("bnext" in call for call in calls)
    module = program.module()
    for node in module.graph.nodes:  # what such a pass does
        if node.target == torch.ops.aten.batch_norm.default:
            node.args = (*node.args[:5], False, *node.args[6:])
    module.recompile()
    x = data()
    assert_close(module(x), theirs.eval()(x))


def test_onnx_of_a_training_model() -> None:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    for model in nets(True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, (data(),), dynamo=True, verbose=False)
        assert all(node.domain == "" for node in program.model.graph)


def test_core_aten_decomposition_of_an_eval_model_holds_no_op_of_ours() -> None:
    ours, theirs = nets(False)
    program = torch.export.export(ours, (data(),)).run_decompositions()
    assert not any("bnext" in str(node.target) for node in program.graph.nodes)
    assert not program.graph_signature.buffers_to_mutate
    x = data()
    assert_close(program.module()(x), theirs(x))


@MODES
def test_aot_inductor_package_runs_from_its_file(training, tmp_path) -> None:
    ours, theirs = nets(training)
    x = data()
    program = torch.export.export(copy.deepcopy(ours), (x,))
    path = str(tmp_path / "model.pt2")
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    except torch._inductor.exc.InductorError as error:
        if "compiler" in str(error).lower():
            pytest.skip(f"Inductor has no C++ compiler here: {error}")
        raise
    runner = torch._inductor.aoti_load_package(path)
    for _ in range(2):
        assert_close(runner(x), theirs(x))


def test_onnx_is_the_standard_operator_and_runs(tmp_path) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnx
    import onnxruntime

    ours, theirs = nets(False)
    x = data()
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            ours, (x,), path, dynamo=True, dynamic_shapes=({0: "batch"},), optimize=False,
            input_names=["x"], verbose=False,
        )  # fmt: skip
    graph = onnx.load(path).graph
    operators = [(node.domain, node.op_type) for node in graph.node]
    assert operators.count(("", "BatchNormalization")) == 2
    assert all(domain == "" for domain, _ in operators)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (2, 7):
        x = data(n)
        (y,) = session.run(None, {"x": x.numpy()})
        assert_close(torch.from_numpy(y), theirs(x))


@MODES
def test_torchscript_is_saved_and_loaded(training, tmp_path) -> None:
    ours, theirs = nets(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(ours).save(tmp_path / "model.pt")
        loaded = torch.jit.load(tmp_path / "model.pt")
        for _ in range(2):
            x = data()
            assert_close(loaded(x), theirs(x))
        assert_close(dict(loaded.named_buffers()), dict(theirs.named_buffers()))
        if not training:
            frozen = torch.jit.optimize_for_inference(loaded)
            assert_close(frozen(x), theirs(x))
            left = str(frozen.graph).count("aten::batch_norm")
            assert left == 1, "that after the convolution is not folded into it"


def test_trace_of_a_training_model_updates_the_statistics() -> None:
    ours, theirs = nets(True)
    x = data()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(copy.deepcopy(ours), x, check_trace=False)
        # Tracing runs the model once; start both from the same statistics.
        traced.load_state_dict(theirs.state_dict())
        assert_close(traced(x), theirs(x))
    assert_close(dict(traced.named_buffers()), dict(theirs.named_buffers()))


def test_trace_in_eval_takes_other_sizes() -> None:
    ours, theirs = nets(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(ours, data())
    x = data(5)
    assert_close(traced(x), theirs(x))


def test_fx_trace_of_a_model_in_a_model_keeps_ours_whole() -> None:
    ours, theirs = nets(False)
    traced = torch.fx.symbolic_trace(nn.Sequential(ours, nn.Flatten()))
    calls = [node for node in traced.graph.nodes if node.op == "call_module"]
    kinds = [type(traced.get_submodule(node.target)) for node in calls]
    assert kinds == [nn.Conv2d, bnext.BatchNorm2d, bnext.BatchNormAct2d, nn.Flatten]
    x = data()
    assert_close(traced(x), theirs(x).flatten(1))
    twin = copy.deepcopy(traced.train())
    assert_close(twin(x), nn.Sequential(theirs.train(), nn.Flatten())(x))
