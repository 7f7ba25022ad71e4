"""torch.compile around the modules: graphs, recompilation, bits, memory. Each test compiles once.

What Dynamo and AOTAutograd do is seen with the "aot_eager" backend; Inductor, which takes seconds a
graph, is asked only for what is its own.
"""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bnext

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Block(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, norm: type[nn.Module], act: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), norm(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), act(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(y), x)


class AddAct(nn.BatchNorm2d):
    """What BatchNormAct2d stands for, of torch.nn's operations."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(super().forward(x) + residual)


def blocks(training: bool = True, device="cpu") -> tuple[Block, Block]:
    ours = Block(bnext.BatchNorm2d, bnext.BatchNormAct2d)
    theirs = Block(nn.BatchNorm2d, AddAct)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(device).train(training), theirs.to(device).train(training)


def step(model: nn.Module, module: nn.Module, x: Tensor) -> tuple:
    """Output, all gradients and state after one step; `model` may be `module` compiled."""
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters()}
    return y.detach(), leaf.grad, grads, copy.deepcopy(module.state_dict())


def assert_close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Norms(nn.Module):
    """Without a convolution, which on the CPU has guards on the batch size of its own."""

    def __init__(self, norm: type[nn.Module], act: type[nn.Module]) -> None:
        super().__init__()
        self.a, self.b = norm(4), act(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * 2, x)


@MODES
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "automatic"])
def test_other_batch_sizes_do_not_compile_again(marked, training, device) -> None:
    """Marked as dynamic, one graph for all sizes; by default another at the second."""
    ours = Norms(bnext.BatchNorm2d, bnext.BatchNormAct2d).to(device).train(training)
    theirs = Norms(nn.BatchNorm2d, AddAct).to(device).train(training)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for i, n in enumerate((3, 5, 2, 8, 17)):
        x = torch.randn(n, 4, 7, 6, device=device)
        if marked:
            torch._dynamo.mark_dynamic(x, 0)
        with torch._dynamo.config.patch(error_on_recompile=i >= (1 if marked else 2)):
            y, z = compiled(x), theirs(x)
            y.pow(2).sum().backward(), z.pow(2).sum().backward()
        assert_close(y, z)
    assert_close(ours.state_dict(), theirs.state_dict())
    assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


@MODES
def test_graph_holds_our_op_in_training_and_atens_in_eval(training) -> None:
    ours, _ = blocks(training)
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        seen.extend(f"{node.target} {node.args}" for node in graph.graph.nodes)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch.compile(ours, backend=aot_autograd(fw_compiler=backend), fullgraph=True)(
        torch.randn(2, 4, 6, 6)
    )
    assert any("bnext.batch_norm_train" in name for name in seen) == training
    assert any("aten" in name and "batch_norm" in name for name in seen) == (not training)


def same_bits(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.fixture(scope="module")
def inductor_works() -> None:
    torch._dynamo.reset()
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2))
    except torch._inductor.exc.InductorError as error:
        if "compiler" in str(error).lower():
            pytest.skip(f"Inductor has no C++ compiler here: {error}")
        raise


@pytest.mark.usefixtures("inductor_works")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_trains_with_eagers_bits(mode, device) -> None:
    """Batch norms alone, between them an exact operation: every number is our op's, either way."""

    eager = Norms(bnext.BatchNorm2d, bnext.BatchNormAct2d).to(device)
    eager.b.momentum = None
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for _ in range(3):
        x = torch.randn(3, 4, 6, 5, device=device)
        same_bits(step(compiled, module, x), step(eager, eager, x))


@pytest.mark.usefixtures("inductor_works")
@MODES
def test_inductor_block(training, device) -> None:
    ours, theirs = blocks(training, device)
    compiled = torch.compile(ours, fullgraph=True)
    x = torch.randn(3, 4, 6, 6, device=device)
    assert_close(step(compiled, ours, x), step(theirs, theirs, x))
    with torch.no_grad():
        assert_close(compiled(x), theirs(x))
    assert_close(ours.state_dict(), theirs.state_dict())


def allocated(function) -> int:
    """Bytes that a call allocates, whether or not it frees them again."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())


@pytest.mark.usefixtures("inductor_works")
def test_compiled_training_forward_allocates_the_output_alone() -> None:
    """The buffers change in place; nothing of the activation's size is copied for their sake."""
    bn = bnext.BatchNormAct2d(8)
    x = torch.randn(4, 8, 64, 64)
    compiled = torch.compile(bn, fullgraph=True)
    compiled(x)
    before = [b.data_ptr() for b in bn.buffers()]
    size = x.numel() * 4
    total = allocated(lambda: compiled(x))
    assert size <= total < 1.1 * size, f"{total} bytes for an output of {size}"
    assert [b.data_ptr() for b in bn.buffers()] == before
    assert int(bn.num_batches_tracked) == 2


def test_peak_memory_of_a_compiled_step_on_cuda() -> None:
    if not torch.cuda.is_available() or not bnext.build_info()["cuda"]:
        pytest.skip("needs a CUDA device and CUDA kernels in bnext._C")
    bn = bnext.BatchNormAct2d(8, device="cuda")
    x = torch.randn(16, 8, 64, 64, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)
    compiled = torch.compile(bn, fullgraph=True)
    compiled(x).backward(grad)
    x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compiled(x).backward(grad)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2.1 * x.numel() * 4, "more than the output and the gradient"


@MODES
def test_compiled_autograd(training, device) -> None:
    """The backward of an eager forward, captured and compiled as one graph."""
    ours, theirs = blocks(training, device)
    x = torch.randn(3, 4, 6, 6, device=device)
    counter = CompileCounterWithBackend("aot_eager")
    compiler = torch.compile(backend=counter, fullgraph=True)
    leaf = x.clone().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(compiler):
        ours(leaf).square().sum().backward()
    assert counter.frame_count == 1
    other = x.clone().requires_grad_()
    theirs(other).square().sum().backward()
    assert_close(leaf.grad, other.grad)
    assert_close(
        {k: p.grad for k, p in ours.named_parameters()},
        {k: p.grad for k, p in theirs.named_parameters()},
    )


def test_switching_between_training_and_eval_compiles_each_once() -> None:
    ours, theirs = blocks()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 6, 6)
    for i, training in enumerate((True, False, True, False)):
        ours.train(training), theirs.train(training)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=i >= 2):
            assert_close(compiled(x), theirs(x))


@MODES
def test_without_running_statistics_or_parameters(training) -> None:
    options = {"affine": False, "track_running_stats": False}
    ours, theirs = bnext.BatchNorm2d(4, **options), nn.BatchNorm2d(4, **options)
    compiled = torch.compile(ours.train(training), backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 6, 6)
    assert_close(compiled(x), theirs.train(training)(x))


def test_momentum_none_counts_the_batches() -> None:
    ours, theirs = bnext.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        compiled(x), theirs(x)
    assert_close(ours.state_dict(), theirs.state_dict())


def test_frozen_statistics_in_a_training_step(device) -> None:
    """bn.eval() inside a network that trains, as detection models do."""
    ours, theirs = blocks(True, device)
    for model in (ours, theirs):
        model.bn1.eval()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 6, 6, device=device)
    assert_close(step(compiled, ours, x), step(theirs, theirs, x))
    assert int(ours.bn1.num_batches_tracked) == 0


def test_autocast_inside_the_compiled_region(device) -> None:
    ours, theirs = blocks(True, device)

    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return model(x)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 6, 6, device=device, dtype=torch.bfloat16)
    y, z = compiled(ours, x), run(theirs, x)
    assert y.dtype == z.dtype
    torch.testing.assert_close(y, z, rtol=0.05, atol=0.05)


def test_errors_are_the_same_under_compile() -> None:
    compiled = torch.compile(bnext.BatchNorm2d(4), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"more than 1 value per channel"):
        compiled(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize(
    "number", [np.float64(0.25), np.float32(0.25), torch.tensor(0.25)], ids=repr
)
@pytest.mark.parametrize("name", ["momentum", "eps"])
def test_numbers_that_dynamo_makes_tensors_of(name, number) -> None:
    x, results = torch.randn(4, 3, 5), []
    for package in (bnext, torch.nn):
        torch._dynamo.reset()
        module = package.BatchNorm1d(3)
        setattr(module, name, number)
        y = torch.compile(module, backend="aot_eager")(x)
        results.append((y, *module.buffers()))
    torch.testing.assert_close(*results)
