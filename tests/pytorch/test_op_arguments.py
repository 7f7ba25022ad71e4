"""What the ops accept and refuse, against torch's batch norm: same verdict, torch's words."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import bnext
from bnext import reference

train = torch.ops.bnext.batch_norm_train.default
inference = torch.ops.bnext.batch_norm_inference.default
backward = torch.ops.bnext.batch_norm_backward.default
double_backward = torch.ops.bnext.batch_norm_double_backward.default
f16, f32, f64, bf16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
Arguments = dict[str, Tensor | None]


def arguments(dtype: torch.dtype = f32, **changed: Tensor | None) -> Arguments:
    return {
        "input": torch.randn(4, 3, 5).to(dtype), "weight": torch.ones(3, dtype=dtype),
        "bias": torch.zeros(3, dtype=dtype), "running_mean": torch.zeros(3, dtype=dtype),
        "running_var": torch.ones(3, dtype=dtype), **changed,
    }  # fmt: skip


def ours(training: bool, a: Arguments) -> Tensor:
    head = (a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"])
    output: Tensor = (
        train(*head, None, 0.1, 1e-5) if training
        else inference(*head, 1e-5)
    )[0]  # fmt: skip
    return output


def torchs(training: bool, a: Arguments) -> Tensor:
    return F.batch_norm(**a, training=training)


def message(call: Callable[[bool, Arguments], Tensor], training: bool, a: Arguments) -> str | None:
    try:
        call(training, a)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None


PARAMS = ["weight", "bias", "running_mean", "running_var"]
WRONG: dict[str, Callable[[], Arguments]] = {
    **{
        f"{name} of {c}": lambda name=name, c=c: arguments(**{name: torch.ones(c)})
        for name, c in product(PARAMS, (0, 2, 4))
    },
    **{
        f"{name} elsewhere": lambda name=name: arguments(**{name: torch.ones(3, device="meta")})
        for name in PARAMS
    },
    "input elsewhere": lambda: arguments(input=torch.ones(4, 3, 5, device="meta")),
    **{
        f"{dtype} input": lambda dtype=dtype: arguments(input=torch.empty(4, 3, 5, dtype=dtype))
        for dtype in (torch.int64, torch.int16, torch.uint8, torch.bool, torch.complex64,
                      torch.complex128, torch.float8_e4m3fn, torch.uint16, torch.uint4, torch.bits8)
    },
    **{
        f"{name} [1, C]": lambda name=name: arguments(**{name: torch.ones(1, 3)})
        for name in ("running_mean", "running_var")
    },
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", WRONG)
def test_torchs_sentence_is_in_the_message(name, training) -> None:
    expected = message(torchs, training, WRONG[name]())
    args = WRONG[name]()
    got = message(ours, training, args)
    assert expected is not None and got is not None
    assert expected in got and got.startswith("bnext: ")
    mean = args["running_mean"]
    assert mean is None or mean.is_meta or not mean.any() or mean.numel() != 3 or mean.dim() > 1


@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16], ids=str)
@pytest.mark.parametrize("other", [f32, f64, bf16, f16, torch.int64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dtypes_of_parameters(training, other, dtype) -> None:
    """As torch, but that each may be float32 beside a half input, whatever the others are."""
    for names in (["weight"], ["bias"], ["weight", "bias"], ["running_mean", "running_var"]):
        for bias in (True, False):
            changed = {name: torch.ones(3).to(other) for name in names}
            without = {} if bias or "weight" in names else {"weight": None}
            args = arguments(dtype, **without, **changed)
            expected, got = message(torchs, training, args), message(ours, training, args)
            if other == dtype or (other == f32 and dtype in (bf16, f16)):
                assert got is None
            else:
                assert expected is not None and got is not None and expected in got, (names, bias)


def test_statistics_are_needed_in_eval() -> None:
    for name in ("running_mean", "running_var"):
        expected = message(torchs, False, arguments(**{name: None}))
        got = message(ours, False, arguments(**{name: None}))
        assert got == f"bnext: {expected}" == f"bnext: {name} must be defined in evaluation mode"


def test_a_required_tensor_that_is_none_is_named() -> None:
    x, w = torch.randn(4, 3, 5), torch.ones(3)
    save_stats = torch.ones(3, 3, dtype=f64)
    for device in ("cpu", "meta"):
        x, w, save_stats = (t.to(device) for t in (x, w, save_stats))
        rest = (w, save_stats, 1e-5)
        for name, call in (
            ("input", lambda w=w: train(None, w, w, w, w, None, 0.1, 1e-5)),
            ("input", lambda w=w: inference(None, w, w, w, w, 1e-5)),
            ("grad_out", lambda x=x, rest=rest: backward(None, x, *rest)),
            ("input", lambda x=x, rest=rest: backward(x, None, *rest)),
            ("grad_grad_input",
             lambda x=x, rest=rest: double_backward(None, None, None, None, x, x, *rest)),
            ("grad_out",
             lambda x=x, rest=rest: double_backward(x, None, None, None, None, x, *rest)),
            ("input",
             lambda x=x, rest=rest: double_backward(x, None, None, None, x, None, *rest)),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=rf"^bnext: {name}: expected a tensor, got None"):
                call()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(), (3,), (1,)])
def test_too_few_dimensions(shape, device) -> None:
    for training in (True, False):
        args = arguments(input=torch.ones(shape))
        args = {k: None if v is None else v.to(device) for k, v in args.items()}
        got = message(ours, training, args)
        assert got is not None
        assert f"expected at least 2 dimensions [N, C, ...], got {list(shape)}" in got


@pytest.mark.parametrize(
    "counter",
    [torch.zeros((), dtype=torch.int16), torch.zeros(2, dtype=torch.int64), torch.zeros(1)],
    ids=["Short", "two", "Float"],
)
def test_the_counter_is_one_int64(counter) -> None:
    with pytest.raises(RuntimeError) as error:
        train(torch.randn(4, 3), None, None, None, None, counter, 0.1, 1e-5)
    name = {torch.int16: "Short", torch.int64: "Long", f32: "Float"}[counter.dtype]
    assert f"num_batches_tracked: expected one int64 value (Long), got {name}" in str(error.value)
    assert str(list(counter.shape)) in str(error.value)


@pytest.mark.parametrize("counter", [None, 0, 3])
def test_momentum_nan_is_not_none(counter) -> None:
    x = torch.randn(4, 3, 5)
    for momentum in (float("nan"), None):
        mean, var = torch.zeros(3), torch.ones(3)
        tracked = None if counter is None else torch.tensor(counter)
        train(x, None, None, mean, var, tracked, momentum, 1e-5)
        assert tracked is None or tracked == counter + 1
        theirs = torch.zeros(3), torch.ones(3)
        factor = 0.0 if counter is None else 1 / (counter + 1)
        F.batch_norm(x, *theirs, None, None, True, factor if momentum is None else momentum)
        torch.testing.assert_close((mean, var), theirs, equal_nan=True)
        assert bool(mean.isnan().all()) == (momentum is not None)


def shaped(c: int) -> dict[str, Callable[[], Tensor]]:
    """Parameters of c elements of which torch takes each in a forward."""
    return {
        "[C]": lambda: torch.randn(c),
        "[1, C]": lambda: torch.randn(1, c),
        "[C, 1]": lambda: torch.randn(c, 1),
        "[1, C, 1]": lambda: torch.randn(1, c, 1),
        "[2, C / 2]": lambda: torch.randn(2, c // 2),
        "[C] with gaps": lambda: torch.randn(2 * c)[::2],
        "one value": lambda: torch.randn(1).expand(c),
    }


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", shaped(6))
def test_parameters_of_any_shape(name, training) -> None:
    """torch refuses their gradients; ours have the parameter's shape, as autograd expects."""
    x, grad_out = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    weight, bias = shaped(6)[name](), shaped(6)[name]()
    stats = torch.randn(6), torch.rand(6) + 0.5
    args = {"input": x, "weight": weight, "bias": bias, "running_mean": stats[0].clone(),
            "running_var": stats[1].clone()}  # fmt: skip
    torch.testing.assert_close(
        ours(training, args),
        F.batch_norm(x, stats[0].clone(), stats[1].clone(), weight, bias, training),
    )
    save_stats = None
    if training:
        save_stats = train(x, None, None, None, None, None, 0.1, 1e-5)[1]
    saved = (save_stats, 1e-5, *((None, None) if training else stats), bias)
    grads = backward(grad_out, x, weight, *saved)
    expected = reference.backward(
        grad_out, x, weight.reshape(-1), None if training else stats, active=None
    )
    for grad, param, value in (
        (grads[1], weight, expected.weight),
        (grads[2], bias, expected.bias),
    ):
        assert grad.shape == param.shape and grad.is_contiguous()
        torch.testing.assert_close(grad.reshape(-1), value.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads[0], expected.input.float(), rtol=1e-4, atol=1e-4)
    got = double_backward(x, weight, bias, None, grad_out, x, weight, *saved)
    flat = (t.reshape(-1) for t in (weight, bias))
    want = double_backward(x, *flat, None, grad_out, x, weight.reshape(-1), *saved[:-1])
    assert got[2].shape == weight.shape
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.flatten(), b.flatten())


def test_scalars_are_parameters_of_one_channel() -> None:
    args = arguments(
        input=torch.randn(4, 1, 5), weight=torch.tensor(2.0), bias=torch.tensor(1.0),
        running_mean=torch.zeros(1), running_var=torch.ones(1),
    )  # fmt: skip
    for training in (True, False):
        torch.testing.assert_close(ours(training, args), torchs(training, args))


def test_values_at_several_strides_are_refused() -> None:
    args = arguments(input=torch.randn(4, 6), weight=torch.ones(3, 2).t(), bias=None,
                     running_mean=None, running_var=None)  # fmt: skip
    got = message(ours, True, args)
    assert got is not None and "weight: expected values at one stride" in got


EMPTY = [(0, 3), (0, 3, 4), (0, 3, 2, 2), (2, 3, 0), (2, 0, 4), (0, 0), (1, 3, 0), (0,)]
GIVEN = [None, 0, 1]  # more channels than there are; None: no tensor


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_an_empty_input_takes_any_statistics_and_parameters(shape, training) -> None:
    """As torch, which fails on parameters without elements only."""
    c = shape[1] if len(shape) > 1 else 0
    for of_stats, of_params in product(GIVEN, GIVEN):
        mean, var = (None if of_stats is None else torch.ones(c + of_stats) for _ in range(2))
        leaves = [None if of_params is None else torch.ones(c + of_params) for _ in range(2)]
        leaves = [t if t is None else t.requires_grad_() for t in leaves]
        x = torch.randn(shape)
        got = ours(training, {"input": x, "weight": leaves[0], "bias": leaves[1],
                              "running_mean": mean, "running_var": var})  # fmt: skip
        assert got.shape == x.shape
        assert mean is None or bool((mean == 1).all()), "nothing to learn from"
        save_stats = torch.zeros(3, c, dtype=f64) if training else None
        need = leaves[0] is not None
        running = [None, None] if training else [mean, var]
        grads = backward(
            x, x, leaves[0], save_stats, 1e-5, *running, leaves[1],
            need_weight=need, need_bias=need,
        )  # fmt: skip
        assert grads[0].shape == x.shape
        if leaves[0] is None or leaves[0].numel() > 0:
            leaf = x.clone().requires_grad_()
            theirs = F.batch_norm(leaf, mean, var, *leaves, training)
            assert theirs.shape == got.shape
            theirs.sum().backward()
        for grad, param in zip(grads[1:3], leaves, strict=True):
            if param is not None:
                assert grad.shape == param.shape and not grad.any()
                assert param.grad is None or torch.equal(grad, param.grad)


def test_an_empty_batch_is_counted() -> None:
    counter = torch.tensor(4)
    train(torch.randn(0, 3), None, None, None, None, counter, 0.1, 1e-5)
    assert counter == 5


@pytest.mark.parametrize("which", ["input", *PARAMS])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_negative_bit(training, which) -> None:
    """Of the imaginary part of a conjugate; torch cannot write to one by itself."""
    values = arguments()
    values["running_var"] = torch.rand(3) + 0.5
    view = torch.complex(torch.zeros_like(values[which]), -values[which]).conj().imag
    assert view.is_neg() and torch.equal(view, values[which])
    theirs = {k: v.clone() for k, v in values.items()}
    expected = torchs(training, theirs)
    torch.testing.assert_close(ours(training, {**values, which: view}), expected)
    torch.testing.assert_close(view, theirs[which])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("bias_shape", [(3,), (1, 3), (3, 1), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("weight_shape", [(3,), (1, 3), (3, 1)], ids=str)
def test_gradients_have_the_shapes_of_their_parameters(
    weight_shape, bias_shape, relu, training
) -> None:
    weight, bias = torch.rand(3), torch.randn(3)
    x, dy = torch.randn(2, 4, 3, 5)
    stats = None if training else (torch.zeros(3), torch.ones(3))
    leaves = [weight.view(weight_shape).requires_grad_(), bias.view(bias_shape).requires_grad_()]
    y = bnext.functional.batch_norm_act(
        x, *(stats or (None, None)), *leaves, None, training, act="relu" if relu else None
    )
    grads = torch.autograd.grad(y, leaves, dy)
    expected = reference.backward(
        torch.where(y > 0, dy, 0) if relu else dy, x, weight.detach(), stats
    )
    for leaf, grad, value in zip(leaves, grads, (expected.weight, expected.bias), strict=True):
        assert grad.shape == leaf.shape
        torch.testing.assert_close(grad.double().view(3), value, rtol=1e-5, atol=1e-5)
