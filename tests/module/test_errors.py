"""Every refusal: torch.nn's type, a message that names what is wrong, nothing written before."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnext
from bnext.functional import batch_norm, batch_norm_act

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def arguments(**changed: object) -> dict[str, object]:
    return {
        "input": torch.randn(4, 3, 5), "running_mean": torch.zeros(3), "running_var": torch.ones(3),
        "weight": torch.ones(3), "bias": torch.zeros(3), "training": True, **changed,
    }  # fmt: skip


# name -> (changed arguments, words of the message)
CASES: dict[str, tuple[dict[str, object], list[str]]] = {
    "one value per channel": ({"input": torch.randn(1, 3)}, ["1 value per channel", "[1, 3]"]),
    "one value per channel, 4-D": ({"input": torch.randn(1, 3, 1, 1)}, ["1 value per channel"]),
    "weight too long": ({"weight": torch.ones(4)}, ["weight", "3", "4"]),
    "weight too short": ({"weight": torch.ones(2)}, ["weight", "3", "2"]),
    "bias too long": ({"bias": torch.ones(4)}, ["bias", "3", "4"]),
    "running_mean too long": ({"running_mean": torch.zeros(4)}, ["running_mean", "3", "4"]),
    "running_var too short": ({"running_var": torch.ones(2)}, ["running_var", "3", "2"]),
    "weight dtype": ({"weight": torch.ones(3, dtype=f64), "bias": None}, ["weight"]),
    "bfloat16 weight of a float32 input": (
        {"weight": torch.ones(3, dtype=bf16), "bias": torch.ones(3, dtype=bf16)}, ["weight"],
    ),
    "statistics' dtype": ({"running_mean": torch.zeros(3, dtype=f64),
                           "running_var": torch.ones(3, dtype=f64)}, ["running_mean"]),
    "integer input": ({"input": torch.ones(4, 3, 5, dtype=torch.int64)}, ["input"]),
    "complex input": ({"input": torch.ones(4, 3, 5, dtype=torch.complex64)}, ["input"]),
    "missing running_mean in eval": ({"running_mean": None, "training": False}, ["running_mean"]),
    "missing running_var in eval": ({"running_var": None, "training": False}, ["running_var"]),
    "no statistics in eval": (
        {"running_mean": None, "running_var": None, "training": False}, ["running_mean"],
    ),
    "0-D input": ({"input": torch.randn(())}, []),
    "1-D input": ({"input": torch.randn(3)}, []),
}  # fmt: skip


def outcome(function: Callable[..., Tensor], kwargs: dict[str, object]) -> BaseException | None:
    try:
        function(**kwargs)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("name", CASES)
def test_functional_error_has_torchs_type_and_our_words(name, requires_grad) -> None:
    changed, words = CASES[name]
    kwargs = arguments(**changed)
    theirs = outcome(
        F.batch_norm, {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    )
    if requires_grad and kwargs["input"].is_floating_point():
        kwargs["input"] = kwargs["input"].clone().requires_grad_()
    stats = [kwargs["running_mean"], kwargs["running_var"]]
    before = [None if t is None else t.clone() for t in stats]
    ours = outcome(batch_norm, kwargs)
    assert ours is not None and theirs is not None, (ours, theirs)
    # torch's NotImplementedError for a dtype is a RuntimeError that says less.
    kind = RuntimeError if isinstance(theirs, NotImplementedError) else type(theirs)
    assert isinstance(ours, kind), (ours, theirs)
    for word in words:
        assert word in str(ours), str(ours)
    for t, old in zip(stats, before, strict=True):
        assert t is None or torch.equal(t, old), "a failed call changed the running statistics"


@pytest.mark.parametrize("eps", [0.0, -1e-5, -1.0])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_eps_is_refused_where_the_installed_torch_refuses_it(training, eps) -> None:
    theirs = outcome(F.batch_norm, arguments(training=training, eps=eps))
    kwargs = arguments(training=training, eps=eps)
    ours = outcome(batch_norm, kwargs)
    assert type(ours) is type(theirs), (ours, theirs)
    if ours is not None:
        assert "eps" in str(ours) and str(eps) in str(ours)
        assert torch.equal(kwargs["running_mean"], torch.zeros(3))


MODULE_INPUTS = {
    1: [(4,), (4, 3, 5, 5), (1, 3), (4, 2), (1, 3, 1), (4, 4, 5)],
    2: [(4, 3), (4, 3, 5), (4, 3, 5, 5, 5), (1, 3, 1, 1), (4, 2, 5, 5)],
    3: [(4, 3), (4, 3, 5, 5), (1, 3, 1, 1, 1), (4, 2, 5, 5, 5)],
}


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("ndim", "shape"), [(d, s) for d in MODULE_INPUTS for s in MODULE_INPUTS[d]]
)
def test_module_error_is_torchs_and_the_state_stays(ndim, shape, training, grad, device) -> None:
    """The counter too, which torch.nn increments before it checks."""
    theirs = getattr(nn, f"BatchNorm{ndim}d")(3, device=device).train(training)
    ours = getattr(bnext, f"BatchNorm{ndim}d")(3, device=device).train(training)
    act = getattr(bnext, f"BatchNormAct{ndim}d")(3, device=device).train(training)
    x = torch.randn(shape, device=device)
    expected = outcome(theirs, {"input": x})
    for module in (ours, act):
        before = {k: v.clone() for k, v in module.state_dict().items()}
        with torch.set_grad_enabled(grad):
            error = outcome(module, {"input": x})
        assert type(error) is type(expected), (error, expected)
        if error is not None:
            assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_dimension_error_says_expected_and_got() -> None:
    for module, shape, expected in (
        (bnext.BatchNorm1d(3), (4, 3, 2, 2), "2D or 3D"),
        (bnext.BatchNorm2d(3), (4, 3, 2), "4D"),
        (bnext.BatchNorm3d(3), (4, 3, 2), "5D"),
    ):
        with pytest.raises(ValueError, match=rf"(?s){expected}.*{len(shape)}D"):
            module(torch.randn(shape))


def test_wrong_channel_count_names_both_numbers() -> None:
    for affine, track in ((True, True), (True, False), (False, True)):
        bn = bnext.BatchNorm2d(3, affine=affine, track_running_stats=track)
        with pytest.raises(RuntimeError, match=r"(?s)7.*3|3.*7"):
            bn(torch.randn(2, 7, 4, 4))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "residual",
    [torch.randn(4, 3, 6), torch.randn(4, 3), torch.randn(4, 3, 5).double(), torch.randn(1, 3, 5)],
    ids=["size", "dims", "dtype", "broadcastable"],
)
def test_residual_must_match_the_input(residual, training) -> None:
    kwargs = arguments(residual=residual, training=training)
    with pytest.raises(RuntimeError, match="residual"):
        batch_norm_act(**kwargs)
    assert torch.equal(kwargs["running_mean"], torch.zeros(3))
    assert torch.equal(kwargs["running_var"], torch.ones(3))


def test_unknown_activation_is_a_value_error() -> None:
    x = torch.randn(4, 3)
    for make in (
        lambda **act: batch_norm_act(x, None, None, training=True, **act),
        lambda **act: bnext.BatchNormAct1d(3, **act),
        lambda **act: bnext.SyncBatchNorm(3, **act),
    ):
        for act in ("softplus", ["relu"], nn.Softplus(), nn.Hardtanh, F.relu):  # a list has no hash
            with pytest.raises(
                ValueError, match=r"act must be one of 'relu', .* but got "
            ) as error:
                make(act=act)
            assert repr(act) in str(error.value)
        with pytest.raises(ValueError, match="act_param must be None where act is 'relu', but got"):
            make(act="relu", act_param=0.1)
        with pytest.raises(ValueError, match=r"act_param must be None where act is LeakyReLU\("):
            make(act=nn.LeakyReLU(0.1), act_param=0.1)
        for param in ("0.1", torch.tensor(0.1), [0.1], 1j):
            with pytest.raises(TypeError, match="act_param must be a float or None, but got"):
                make(act="elu", act_param=param)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_one_running_statistic_alone_in_training(which, requires_grad) -> None:
    """Not torch's to define (it crashed on it): either refused or the given one is right."""
    kwargs = arguments(**{which: None})
    other = "running_var" if which == "running_mean" else "running_mean"
    empty = outcome(batch_norm, {**kwargs, "input": torch.randn(0, 3, requires_grad=requires_grad)})
    assert empty is None
    theirs = outcome(F.batch_norm, arguments(**{which: None}))
    before = kwargs[other].clone()
    kwargs["input"].requires_grad_(requires_grad)
    ours = outcome(batch_norm, kwargs)
    assert type(ours) is type(theirs), (ours, theirs)
    if ours is not None:
        assert torch.equal(kwargs[other], before)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("input_grad", [True, False], ids=["input", ""])
@pytest.mark.parametrize(
    "names", [["running_mean"], ["running_var"], ["running_mean", "running_var"]]
)
def test_running_statistics_that_require_grad(names, input_grad, training) -> None:
    outcomes = []
    for function in (batch_norm, F.batch_norm):
        kwargs = arguments(training=training)
        kwargs["input"].requires_grad_(input_grad)
        for name in names:
            kwargs[name].requires_grad_()
        outcomes.append(outcome(function, kwargs))
        assert torch.equal(kwargs["running_mean"], torch.zeros(3))
        with torch.no_grad():
            assert outcome(function, kwargs) is None
    assert type(outcomes[0]) is type(outcomes[1]) is RuntimeError
    assert str(outcomes[0]) == str(outcomes[1])


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("how", ["compile", "func.grad"])
def test_running_statistics_that_require_grad_where_traced(how, name) -> None:
    torch._dynamo.reset()
    x, words = torch.randn(4, 3, 5), f"not differentiable with respect to argument '{name}'"
    module = bnext.BatchNorm1d(3)
    statistic = getattr(module, name)
    before = statistic.clone()
    with pytest.raises(RuntimeError, match=words):
        if how == "compile":
            statistic.requires_grad_()
            torch.compile(module, backend="aot_eager")(x)
        else:
            torch.func.grad(lambda t: torch.func.functional_call(module, {name: t}, x).sum())(
                statistic
            )
    assert torch.equal(statistic, before) and int(module.num_batches_tracked) == 0


NUMBERS = {
    "float": 0.25, "int": 1, "bool": True, "nan": float("nan"), "inf": float("inf"),
    "numpy float32": np.float32(0.25), "numpy float64": np.float64(0.25),
    "scalar tensor": torch.tensor(0.25), "integer tensor": torch.tensor(1),
    "one-element tensor": torch.tensor([0.25]), "parameter": nn.Parameter(torch.tensor(0.25)),
    "one-element parameter": nn.Parameter(torch.tensor([0.25])), "array": np.array([0.25]),
    "0-d array": np.array(0.25), "huge": 10**400, "text": "0.25",
    "complex": 1j, "None": None, "list": [0.25],
}  # fmt: skip


@pytest.mark.parametrize("grad", [True, False], ids=["", "no_grad"])
@pytest.mark.parametrize("form", ["function", "module", "act"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["momentum", "eps"])
@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_are_taken_and_refused_as_torch_does(number, name, training, form, grad) -> None:
    x, value = torch.randn(4, 3, 5), NUMBERS[number]
    results = []
    for package in (bnext, nn):
        mean, var = torch.zeros(3), torch.ones(3)
        if form == "function":
            function = batch_norm if package is bnext else F.batch_norm
            weight = torch.ones(3, requires_grad=grad)
            kwargs = {name: value, "weight": weight, "training": training}
            error = outcome(lambda f=function, k=kwargs, m=mean, v=var: f(x, m, v, **k), {})
        else:
            act = form == "act" and package is bnext
            module = (bnext.BatchNormAct1d if act else package.BatchNorm1d)(3).train(training)
            setattr(module, name, value)
            mean, var = module.running_mean, module.running_var
            with torch.set_grad_enabled(grad):
                error = outcome(module, {"input": x})
            if error is not None and package is bnext:
                assert int(module.num_batches_tracked) == 0
        results.append((error, mean.clone(), var.clone()))
    (ours, *state), (theirs, *expected) = results
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(theirs, TypeError) and "argument" in str(theirs):
        assert str(ours) == str(theirs)
    torch.testing.assert_close(state, expected, equal_nan=True)


@pytest.mark.parametrize("training", [None, 1, "yes", 0.0])
def test_training_is_a_bool(training) -> None:
    kwargs = arguments(training=training)
    ours, theirs = (outcome(function, kwargs) for function in (batch_norm, F.batch_norm))
    assert type(ours) is TypeError and str(ours) == str(theirs)
    assert torch.equal(kwargs["running_mean"], torch.zeros(3))


@pytest.mark.parametrize("value", [None, 1.0, [1.0, 2.0, 3.0], np.ones(3, np.float32), "x"])
@pytest.mark.parametrize("name", ["input", "weight", "bias", "running_mean", "running_var"])
def test_tensors_are_tensors(name, value) -> None:
    kwargs = arguments(**{name: value})
    if name.startswith("running") and value is None:
        pytest.skip("one running statistic alone has a test of its own")
    theirs, ours = (outcome(function, kwargs) for function in (F.batch_norm, batch_norm))
    assert type(ours) is type(theirs) and str(ours) == str(theirs)


@pytest.mark.parametrize("value", [1.0, [1.0], np.ones((4, 3, 5), np.float32), "x"])
@pytest.mark.parametrize("kind", [bnext.BatchNormAct1d, bnext.SyncBatchNorm, batch_norm_act])
def test_a_residual_is_a_tensor(kind, value) -> None:
    kwargs = arguments(residual=value)
    call = batch_norm_act if kind is batch_norm_act else kind(3)
    given = kwargs if kind is batch_norm_act else {k: kwargs[k] for k in ("input", "residual")}
    with pytest.raises(TypeError, match=f"residual: expected a tensor .*{type(value).__name__}"):
        call(**given)
    assert torch.equal(kwargs["running_mean"], torch.zeros(3))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", ""])
@pytest.mark.parametrize("without", ["nothing", "statistics", "running_mean", "affine"])
@pytest.mark.parametrize("sizes", [3, 5, 0], ids="C={}".format)
@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 2, 2), (2, 0), (0,), (0, 0)]
)
def test_an_empty_input_is_as_torch_has_it(shape, sizes, without, grad, training) -> None:
    """Whatever else the arguments are: nothing is read."""
    results = []
    for function in (batch_norm, F.batch_norm):
        kwargs = {
            "input": torch.randn(shape, requires_grad=grad), "training": training,
            "running_mean": torch.zeros(sizes), "running_var": torch.ones(sizes),
            "weight": torch.ones(sizes), "bias": torch.zeros(sizes),
        }  # fmt: skip
        for name in {
            "statistics": ["running_mean", "running_var"],
            "affine": ["weight", "bias"],
        }.get(without, [without]):
            kwargs[name] = None
        kwargs.pop("nothing", None)
        try:
            y = function(**kwargs)
        except Exception as error:
            results.append(type(error))
            continue
        if grad:
            y.sum().backward()
            assert kwargs["input"].grad.shape == shape
        results.append((y.shape, y.dtype, y.requires_grad, kwargs["running_mean"]))
    if results[1] is IndexError and results[0] is not IndexError:
        assert results[0][0] == shape  # torch asks for weight[0] of no weights
    else:
        assert str(results[0]) == str(results[1])


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "residual"])
def test_argument_on_another_device(name, device) -> None:
    other = "cpu" if device.type == "cuda" else "meta"
    kwargs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments().items()}
    kwargs["residual"] = torch.zeros(4, 3, 5, device=device)
    kwargs[name] = kwargs[name].to(other)
    with pytest.raises(RuntimeError, match=r"(?i)device|meta"):
        batch_norm_act(**kwargs)


def test_op_refuses_a_wrong_gradient_shape() -> None:
    op = torch.ops.bnext.batch_norm_backward
    x = torch.randn(4, 3, 5)
    stats = torch.ones(3, 3, dtype=f64)
    for grad_out in (torch.randn(4, 3, 6), torch.randn(4, 3), torch.randn(4, 3, 5).double()):
        with pytest.raises(RuntimeError, match="grad_out"):
            op(grad_out, x, None, stats, 1e-5)
    with pytest.raises(RuntimeError, match="save_stats"):
        op(torch.randn(4, 3, 5), x, None, torch.ones(3, 4, dtype=f64), 1e-5)
    with pytest.raises(RuntimeError, match="save_stats"):
        op(torch.randn(4, 3, 5), x, None, torch.ones(3, 3), 1e-5)
    with pytest.raises(RuntimeError, match="bnext: mask: "):
        bad_mask = torch.zeros(1, 1, dtype=torch.uint8)
        op(torch.randn(4, 3, 5), x, None, stats, 1e-5, mask=bad_mask, act=1, need_residual=True)


def test_op_refuses_a_counter_that_is_not_one_int64() -> None:
    x, mean, var = torch.randn(4, 3), torch.zeros(3), torch.ones(3)
    for counter in (
        torch.zeros((), dtype=torch.int32),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(()),
    ):
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            torch.ops.bnext.batch_norm_train(x, None, None, mean, var, counter, 0.1, 1e-5)
        assert torch.equal(mean, torch.zeros(3))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [f32, f64, f16], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_module_refuses_an_input_with_torchs_sentence(channels, dtype, training, device) -> None:
    """Where several tensors do not fit, the one that torch names first."""
    x = torch.ones(2, channels, 5, 5, dtype=dtype)
    theirs = outcome(nn.BatchNorm2d(3).train(training), {"input": x})
    for kind in (bnext.BatchNorm2d, bnext.BatchNormAct2d, bnext.SyncBatchNorm):
        module = kind(3, device=device).train(training)
        ours = outcome(module, {"input": x.to(device)})
        assert type(ours) is type(theirs)
        assert theirs is None or str(theirs) in str(ours)
        assert device == "meta" or int(module.num_batches_tracked) == (training and theirs is None)
