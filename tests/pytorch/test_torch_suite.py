"""PyTorch's own samples of batch norm run on ours: values, derivatives, conversions, errors.

What torch.nn or torch.nn.functional does with each sample is what ours must do.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.common_utils import noncontiguous_like
from torch_samples import (
    MODULES,
    NAMES,
    OURS,
    THEIRS,
    build,
    functional_calls,
    module_samples,
    run,
)

import bnext

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
PACKAGES = (bnext, nn)


def run_module(module: nn.Module, x: Tensor) -> tuple:
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    grads = torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])
    return y.detach(), grads, module.state_dict()


@MODES
@pytest.mark.parametrize("name", NAMES)
def test_module_samples(name, training, device) -> None:
    found = module_samples(name, training, device)
    assert len(found) >= 4
    for sample in found:
        (x,) = sample.forward_input.args
        results = [
            run_module(build(getattr(package, name), sample, training, device), x)
            for package in PACKAGES
        ]
        torch.testing.assert_close(*results, msg=lambda m, s=sample: f"{s.desc}: {m}")


@MODES
@pytest.mark.parametrize("name", NAMES)
def test_module_samples_by_gradcheck(name, training, device) -> None:
    """torch's test_grad and test_gradgrad, in their fast mode."""
    for sample in module_samples(name, training, device):
        module = build(getattr(bnext, name), sample, training, device)
        (x,) = sample.forward_input.args
        inputs = [x.detach().clone().requires_grad_(), *module.parameters()]
        names = [n for n, _ in module.named_parameters()]
        buffers = {k: v.clone() for k, v in module.named_buffers()}

        def function(x, *parameters, m=module, names=names, buffers=buffers):
            # Statistics in training do not enter the output; as arguments, they do not move either.
            state = dict(zip(names, parameters, strict=True))
            state |= {k: v.clone() for k, v in buffers.items()}
            return torch.func.functional_call(m, state, (x,))

        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@MODES
@pytest.mark.parametrize("name", NAMES)
def test_module_samples_strided(name, training, device) -> None:
    """torch's test_non_contiguous_tensors, and test_batchnorm_non_contig: the format comes out."""
    last = {"BatchNorm2d": torch.channels_last, "BatchNorm3d": torch.channels_last_3d}.get(name)
    for sample in module_samples(name, training, device):
        (x,) = sample.forward_input.args
        module = build(getattr(bnext, name), sample, training, device)
        twin = build(getattr(nn, name), sample, training, device)
        strided = noncontiguous_like(x)
        torch.testing.assert_close(module(strided), twin(strided))
        dense = [x, x.transpose(0, 1).contiguous().transpose(0, 1)]
        if last is not None:
            dense += [x.to(memory_format=last), x.to(memory_format=last)[1:2]]
        for t in dense:
            y, z = module(t), twin(t)
            torch.testing.assert_close(y, z)
            assert y.stride() == z.stride(), (t.shape, t.stride())


@pytest.fixture
def _swapping(request) -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@MODES
@pytest.mark.parametrize("method", ["to", "type"])
@pytest.mark.parametrize("_swapping", [True, False], ids=["swap", "set data"], indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_module_conversions(name, _swapping, method, training, device) -> None:
    """torch's test_to: a module is used between conversions; `type` converts the counter too."""

    def history(kind: type, sample) -> list:
        module = build(kind, sample, training, device, torch.float32)
        (x,) = sample.forward_input.args
        steps = []
        for dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.float32):
            getattr(module, method)(dtype)
            y = module(x.to(dtype))
            y.sum().backward()
            steps.append((y.detach(), {k: v.clone() for k, v in module.state_dict().items()}))
            del y  # its graph holds parameters, which torch does not swap then
        return steps

    for sample in module_samples(name, training, device, torch.float32):
        ours, theirs = (history(getattr(package, name), sample) for package in PACKAGES)
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.uint8, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_counter_of_any_type_counts(momentum, dtype, device) -> None:
    """What conversions make of the counter, and `load_state_dict(assign=True)`."""
    x = torch.randn(4, 3, device=device)
    counters = []
    for package in PACKAGES:
        module = package.BatchNorm1d(3, momentum=momentum).to(device)
        state = module.state_dict()
        state["num_batches_tracked"] = state["num_batches_tracked"].to(dtype)
        module.load_state_dict(state, assign=True)
        for _ in range(3):
            module(x)
        counters.append(dict(module.named_buffers()))
    torch.testing.assert_close(*counters)
    assert counters[0]["num_batches_tracked"] == 3


@pytest.mark.parametrize("name", NAMES)
def test_module_error_inputs(name, device) -> None:
    info = MODULES[name]
    assert info.module_error_inputs_func is not None
    found = list(info.module_error_inputs_func(info, str(device), torch.float32, False, True))
    for error in found:
        sample = error.module_error_input
        (x,) = sample.forward_input.args if sample.forward_input else (None,)
        kinds = []
        for package in PACKAGES:
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                arguments = sample.constructor_input
                getattr(package, name)(*arguments.args, **arguments.kwargs)(x)
            kinds.append(type(caught.value))
        assert kinds[0] is kinds[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 3, 2, 2), (2, 3, 0, 4), (0, 3, 2, 0, 2)])
@MODES
def test_input_without_elements(training, shape, dtype, device) -> None:
    """torch's test_BatchNorm_empty: nothing is computed, so parameters may be of another dtype."""
    name = NAMES[max(len(shape) - 3, 0)]
    results = []
    for package in PACKAGES:
        module = getattr(package, name)(3).to(device).train(training)
        x = torch.empty(shape, device=device, dtype=dtype, requires_grad=True)
        y = module(x)
        y.backward(torch.ones_like(y))
        grads = [x.grad, *(p.grad for p in module.parameters())]
        results.append((y.detach(), grads, dict(module.named_buffers())))
    torch.testing.assert_close(*results)


@MODES
@pytest.mark.parametrize("name", NAMES)
def test_no_channels(name, training, device) -> None:
    """torch takes them without parameters; with some, it looks at the first and raises."""
    x = torch.empty((4, 0, 2, 2, 2)[: int(name[-2]) + 2], device=device, requires_grad=True)
    expected = getattr(nn, name)(0, affine=False).to(device).train(training)(x)
    for affine in (True, False):
        module = getattr(bnext, name)(0, affine=affine).to(device).train(training)
        y = module(x)
        torch.testing.assert_close(y, expected)
        grads = torch.autograd.grad(y.sum(), [x, *module.parameters()])
        assert [g.shape for g in grads] == [x.shape, *(p.shape for p in module.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_functional_samples(dtype, device) -> None:
    """torch's test_dtypes and test_out of the functional: what it takes, ours takes, alike."""
    loose = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {}
    for call in functional_calls(device, dtype):
        (y, dx, *state), (z, dz, *expected) = run(OURS, call), run(THEIRS, call)
        torch.testing.assert_close((y, state), (z, expected), **loose)
        if dtype is torch.float64:  # of two values per channel, all else is rounding errors
            torch.testing.assert_close(dx, dz)
        assert dx.dtype == dz.dtype


def test_functional_samples_forward_and_reverse_derivatives(device) -> None:
    """torch's test_forward_mode_AD and test_vmapvjp: gradcheck's forward and batched checks."""
    for args, kwargs in functional_calls(device):
        if args[0].numel() == 0:
            continue

        def function(x, rest=args[1:], kwargs=kwargs):
            return OURS(x, *(t if t is None else t.clone() for t in rest), **kwargs)

        x = args[0].clone().requires_grad_()
        assert torch.autograd.gradcheck(
            function, x, fast_mode=False, check_forward_ad=True, check_batched_grad=True,
            check_batched_forward_grad=True, check_undefined_grad=True,
        )  # fmt: skip


def wrong_calls(device) -> dict[str, tuple[list, dict]]:
    x, c = torch.randn(4, 3, 5, device=device), torch.ones(3, device=device)
    two = torch.ones(2, device=device)
    return {
        "scalar": ([torch.tensor(1.0, device=device), None, None], {"training": True}),
        "one dimension": ([c, None, None], {"training": True}),
        "one value per channel": ([c[None], None, None], {"training": True}),
        "one pixel": ([c.view(1, 3, 1, 1), None, None], {"training": True}),
        "integers": ([x.long(), None, None], {"training": True}),
        "complex": ([x.to(torch.complex64), None, None], {"training": True}),
        "weight's size": ([x, None, None, two, c], {"training": True}),
        "bias's size": ([x, None, None, c, two], {"training": True}),
        "running_mean's size": ([x, two, c], {}),
        "running_var's size": ([x, c, two], {"training": True}),
        "weight's dtype": ([x, None, None, c.double(), c.double()], {"training": True}),
        "no statistics": ([x, None, None], {}),
        "no running_var": ([x, c, None], {"training": True}),
        "eps 0": ([x, c, c], {"eps": 0.0, "training": True}),
        "momentum": ([x, c, c], {"momentum": "0.1"}),
        "a list": ([[1.0], c, c], {}),
    }


@pytest.mark.parametrize("what", wrong_calls("cpu"))
def test_functional_error_inputs(what, device) -> None:
    """torch's test_errors; `op_db` lists none for batch norm. Nothing is written."""
    args, kwargs = wrong_calls(device)[what]
    before = [t.clone() for t in args if isinstance(t, Tensor)]
    words = []
    for function in (THEIRS, OURS):
        with pytest.raises(Exception) as caught:
            function(*args, **kwargs)
        words.append((caught.type, str(caught.value)))
    torch.testing.assert_close([t for t in args if isinstance(t, Tensor)], before)
    (kind, theirs), (own_kind, ours) = words
    assert own_kind is kind, ours
    assert theirs.splitlines()[0] in ours
