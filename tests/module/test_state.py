"""What a call does to running statistics and counter: all of it, or nothing where it raises."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnext
from bnext.functional import batch_norm, batch_norm_act

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.named_buffers()}


def assert_unchanged(module: nn.Module, before: dict[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def outcome(function: Callable[[], object]) -> str | None:
    """The type and text of what `function` raises."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def assert_same(ours: object, theirs: object) -> None:
    """Equal state, or the same error."""
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
    else:
        torch.testing.assert_close(ours, theirs)


def in_inference_mode(tensor: Tensor, requires_grad: bool = False) -> Tensor:
    with torch.inference_mode():
        return tensor.detach().clone().requires_grad_(requires_grad)


# --- Tensors made in inference mode ---------------------------------------------------------------


@TRAINING
@pytest.mark.parametrize("wants", ["nothing", "input", "weight", "bias"])
@pytest.mark.parametrize("made", ["input", "weight", "bias", "running_mean", "running_var"])
def test_inference_tensors_are_refused_before_anything_is_written(made, wants, training) -> None:
    """Where torch refuses them: autograd cannot save them for backward."""
    outcomes = []
    for function in (batch_norm, nn.functional.batch_norm):
        torch.manual_seed(0)
        arguments = {
            "input": torch.randn(4, 3, 5), "running_mean": torch.zeros(3),
            "running_var": torch.ones(3), "weight": torch.ones(3), "bias": torch.zeros(3),
        }  # fmt: skip
        arguments[made] = in_inference_mode(arguments[made], made == wants)
        if wants not in ("nothing", made):
            arguments[wants].requires_grad_()
        raised = outcome(lambda a=arguments, f=function: f(**a, training=training))
        outcomes.append(raised)
        if raised:
            assert torch.equal(arguments["running_mean"], torch.zeros(3))
            assert torch.equal(arguments["running_var"], torch.ones(3))
    assert outcomes[0] == outcomes[1]


@TRAINING
@pytest.mark.parametrize("made", ["all", "buffers", "num_batches_tracked", "parameters"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_modules_made_in_inference_mode_are_torchs(mode, made, training) -> None:
    results = []
    for package in (bnext, nn):
        module = package.BatchNorm2d(3).train(training)
        for store in (module._buffers, module._parameters):
            for name, tensor in store.items():
                if made in ("all", name) or (made == "buffers") == (store is module._buffers):
                    if made == "num_batches_tracked" and name != made:
                        continue
                    with torch.inference_mode():
                        fresh = tensor.detach().clone()
                        store[name] = nn.Parameter(fresh) if tensor.requires_grad else fresh
        before = state_of(module)
        torch.manual_seed(0)
        x = torch.randn(4, 3, 5, 5)
        with mode():
            raised = outcome(lambda m=module, x=x: m(x))
        if raised and package is bnext:
            assert_unchanged(module, before)
        results.append(raised or state_of(module))
    assert_same(*results)


@TRAINING
def test_gradients_enabled_in_inference_mode_make_no_graph(training) -> None:
    module = bnext.BatchNorm2d(3).train(training)
    with torch.inference_mode(), torch.enable_grad():
        y = module(torch.randn(4, 3, 5, 5))
    assert not y.requires_grad and int(module.num_batches_tracked) == training


def test_inference_mode_and_no_grad_make_no_graph(device) -> None:
    bn = bnext.BatchNorm2d(3, device=device)
    x = torch.randn(4, 3, 8, 8, device=device)
    with torch.no_grad():
        assert bn(x).grad_fn is None
    with torch.inference_mode():
        assert bn(x).is_inference()
    assert int(bn.num_batches_tracked) == 2
    assert bn(x).grad_fn is not None


def test_a_relu_saves_its_bias_too() -> None:
    module = bnext.BatchNormAct2d(3)
    with torch.inference_mode():
        module.bias = nn.Parameter(torch.zeros(3))
    before = state_of(module)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        module(torch.randn(4, 3, 5, 5))
    assert_unchanged(module, before)


def test_a_pack_hook_that_raises_runs_after_the_op() -> None:
    """Known, and in csrc/README.md: autograd packs when forward has returned."""
    module = bnext.BatchNorm2d(3)

    def refuse(_: Tensor) -> None:
        raise NotImplementedError("no room")

    x = torch.randn(4, 3, 5, 5)
    with (
        torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t),
        pytest.raises(NotImplementedError, match="no room"),
    ):
        module(x)
    expected = bnext.BatchNorm2d(3)
    expected(x)
    assert_unchanged(module, state_of(expected))  # once, not twice


@pytest.mark.parametrize("error", [KeyError, RuntimeError, NotImplementedError, AttributeError])
@pytest.mark.parametrize("case", ["plain", "act", "float counter", "empty"])
def test_an_error_of_the_users_code_does_not_run_the_op_twice(case, error) -> None:
    module = bnext.BatchNormAct2d(3) if case == "act" else bnext.BatchNorm2d(3)
    if case == "float counter":
        module.num_batches_tracked = torch.zeros(())
    shape = (0 if case == "empty" else 4, 3, 5, 5)

    def refuse(_: Tensor) -> None:
        raise error("hook")

    with (
        torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t),
        pytest.raises(error, match="hook"),
    ):
        module(torch.randn(shape))
    assert int(module.num_batches_tracked) <= 1


# --- Counters -------------------------------------------------------------------------------------

COUNTERS: dict[str, Callable[[], Tensor]] = {
    "float32": lambda: torch.tensor(5.0),
    "float16": lambda: torch.tensor(5.0, dtype=torch.float16),
    "int32": lambda: torch.tensor(5, dtype=torch.int32),
    "uint8": lambda: torch.tensor(5, dtype=torch.uint8),
    "complex64": lambda: torch.tensor(5, dtype=torch.complex64),
    "one": lambda: torch.tensor([5]),
    "one float": lambda: torch.tensor([5.0]),
    "one by one": lambda: torch.tensor([[5]]),
    "two": lambda: torch.tensor([5, 6]),
    "bool": lambda: torch.tensor(True),
    "strided": lambda: torch.arange(10).as_strided((), (), 5),
    "expanded": lambda: torch.tensor(5).expand(2),
    "double that requires grad": lambda: torch.tensor(5.0, requires_grad=True),
}


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("act", [False, True], ids=["", "act"])
@pytest.mark.parametrize("name", COUNTERS)
def test_a_counter_is_what_torch_can_add_to(name, act, momentum, grad) -> None:
    """And where torch cannot, the same error, before anything is written."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    results = []
    for kind in (bnext.BatchNormAct2d if act else bnext.BatchNorm2d, nn.BatchNorm2d):
        module = kind(3, momentum=momentum)
        module._buffers["num_batches_tracked"] = COUNTERS[name]()
        before = state_of(module)

        def call(m=module):
            with torch.set_grad_enabled(grad):
                return m(x)

        raised = outcome(call)
        if raised and kind is not nn.BatchNorm2d:
            assert_unchanged(module, before)
        results.append(raised or state_of(module))
    assert_same(*results)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.type(torch.float64),
        lambda m: m.load_state_dict(
            {k: v.double() for k, v in m.state_dict().items()}, assign=True
        ),
        lambda m: m.half().float(),
        lambda m: m.double(),
    ],
    ids=["type", "assign", "half", "double"],
)
def test_counters_that_torchs_own_methods_make(change, momentum) -> None:
    results = []
    for package in (bnext, nn):
        module = package.BatchNorm2d(3, momentum=momentum)
        change(module)
        torch.manual_seed(0)
        for _ in range(3):
            y = module(torch.randn(4, 3, 5, 5).to(module.weight.dtype))
        results.append((y.detach(), state_of(module)))
    torch.testing.assert_close(*results)


def test_swapped_parameters_and_buffers() -> None:
    previous = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        results = []
        for package in (bnext, nn):
            module = package.BatchNorm2d(3).to(torch.float64)
            torch.manual_seed(0)
            module(torch.randn(4, 3, 5, 5, dtype=torch.float64))
            results.append(state_of(module))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(previous)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["float32", "int32", "one"])
def test_a_compiled_call_takes_them_too(name) -> None:
    compiled = torch.compile(lambda m, x: m(x), backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    results = []
    for package in (bnext, nn):
        module = package.BatchNorm2d(3)
        module.num_batches_tracked = COUNTERS[name]()
        compiled(module, x)
        results.append(state_of(module))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("missing", ["deleted", "old pickle", "none", "from the constructor"])
@pytest.mark.parametrize("mode", ["eval", "training without tracking"])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "BatchNormAct2d", "SyncBatchNorm"])
def test_a_counter_that_is_not_needed_is_not_read(kind, mode, missing, grad) -> None:
    module = getattr(bnext, kind)(3, track_running_stats=missing != "from the constructor")
    if missing == "deleted":
        del module.num_batches_tracked
    elif missing == "none":
        module.num_batches_tracked = None
    elif missing == "old pickle":
        module._buffers.pop("num_batches_tracked")
        module = copy.deepcopy(module)
    if mode == "eval":
        module.eval()
    else:
        module.track_running_stats = False
    before = state_of(module)
    x = torch.randn(4, 3, 5, 5)
    with torch.set_grad_enabled(grad):
        y = module(x)
    assert_unchanged(module, before)
    batch = mode != "eval" or missing == "from the constructor"
    stats = (None, None) if batch else (before["running_mean"], before["running_var"])
    expected = nn.functional.batch_norm(x, *stats, training=batch)
    if kind == "BatchNormAct2d":
        expected = expected.relu()
    torch.testing.assert_close(y.detach(), expected)


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
def test_statistics_that_are_not_needed_are_not_read(grad) -> None:
    module = bnext.BatchNorm2d(3)
    del module.running_mean, module.running_var, module.num_batches_tracked
    module.track_running_stats = False
    with torch.set_grad_enabled(grad):
        module(torch.randn(4, 3, 5, 5))


def test_a_counter_that_is_needed_and_missing_is_an_attribute_error() -> None:
    for package in (bnext, nn):
        module = package.BatchNorm2d(3)
        del module.num_batches_tracked
        with pytest.raises(AttributeError, match="num_batches_tracked"):
            module(torch.randn(4, 3, 5, 5))
        assert torch.equal(module.running_mean, torch.zeros(3))


# --- Buffers with the negative bit ----------------------------------------------------------------


@TRAINING
@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("name", ["input", "weight", "bias", "running_mean", "running_var"])
def test_lazily_negated_tensors(name, grad, training) -> None:
    """Also where torch updates a copy of a negated running statistic and drops it."""
    torch.manual_seed(0)
    values = {
        "input": torch.randn(4, 3, 5), "running_mean": torch.randn(3),
        "running_var": torch.rand(3) + 0.5, "weight": torch.rand(3), "bias": torch.randn(3),
    }  # fmt: skip
    negated = {k: v.clone() for k, v in values.items()}
    negated[name] = torch.complex(torch.zeros_like(values[name]), -values[name]).conj().imag
    assert negated[name].is_neg() and torch.equal(negated[name], values[name])
    for arguments in (values, negated):
        if grad and name != "bias":
            arguments["bias"].requires_grad_()
    results = [batch_norm(**arguments, training=training) for arguments in (negated, values)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    for buffer in ("running_mean", "running_var"):
        assert torch.equal(negated[buffer], values[buffer])


def test_a_negated_statistic_and_a_counter_count_once() -> None:
    module = bnext.BatchNorm2d(3)
    module.running_mean = torch.complex(torch.zeros(3), -torch.zeros(3)).conj().imag
    module(torch.randn(4, 3, 5, 5))
    assert int(module.num_batches_tracked) == 1 and module.running_mean.abs().sum() > 0


# --- Residuals ------------------------------------------------------------------------------------

RESIDUALS: dict[str, Callable[[], object]] = {
    "another size": lambda: torch.randn(4, 3, 6),
    "more rows": lambda: torch.randn(5, 3, 5),
    "meta": lambda: torch.randn(4, 3, 5, device="meta"),
    "meta, broadcast": lambda: torch.randn(1, 3, 1, device="meta"),
    "text": lambda: "residual",
    "sparse of another size": lambda: torch.randn(4, 3, 6).to_sparse(),
    "mkldnn": lambda: torch.randn(4, 3, 5).to_mkldnn(),
}


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("kind", ["BatchNormAct1d", "SyncBatchNorm"])
@pytest.mark.parametrize("name", RESIDUALS)
def test_a_residual_that_cannot_be_added_changes_nothing(name, kind, grad) -> None:
    module = getattr(bnext, kind)(3)
    before = state_of(module)
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, AttributeError, TypeError)):
        module(torch.randn(4, 3, 5), RESIDUALS[name]())
    assert_unchanged(module, before)


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
def test_a_sparse_residual_is_added_as_plus_does(grad) -> None:
    torch.manual_seed(0)
    module, twin = bnext.BatchNormAct1d(3), nn.BatchNorm1d(3)
    x, residual = torch.randn(4, 3, 5), torch.randn(4, 3, 5).relu().to_sparse()
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(module(x, residual), (twin(x) + residual).relu())
    torch.testing.assert_close(state_of(module), state_of(twin))


def test_an_mkldnn_input_with_a_dense_residual_changes_nothing() -> None:
    stats = torch.zeros(3), torch.ones(3)
    x = torch.randn(4, 3, 5, 5).to_mkldnn()
    with pytest.raises(RuntimeError):
        batch_norm_act(x, *stats, torch.ones(3), torch.zeros(3), torch.randn(4, 3, 5, 5), True)
    assert torch.equal(stats[0], torch.zeros(3)) and torch.equal(stats[1], torch.ones(3))


def test_a_residual_that_can_be_added_moves_the_state() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5)
    twin = nn.BatchNorm1d(3)
    module = bnext.BatchNormAct1d(3)
    torch.testing.assert_close(module(x, torch.ones(3, 1)), (twin(x) + torch.ones(3, 1)).relu())
    torch.testing.assert_close(state_of(module), state_of(twin))
