"""PyTorch's own samples of batch norm, which ship in its wheel, run on ours.

`module_db` has constructor and forward arguments, `op_db` functional ones, both with inputs that
must raise. What torch.nn or torch.nn.functional does with each is what ours must do.
"""

import warnings

import pytest
import torch
from torch import Tensor, nn

import bnext

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

NAMES = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
MODULES = {i.module_cls.__name__: i for i in module_db if i.module_cls.__name__ in NAMES}
(FUNCTIONAL,) = (
    op for op in op_db if op.name == "nn.functional.batch_norm" and not op.variant_test_name
)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def samples(name: str, training: bool, device, dtype=torch.float64) -> list:
    info = MODULES[name]
    return list(info.module_inputs_func(info, str(device), dtype, True, training))


def build(kind: type, sample, training: bool, device, dtype=torch.float64) -> nn.Module:
    arguments = sample.constructor_input
    torch.manual_seed(0)
    module = kind(*arguments.args, **arguments.kwargs).to(device, dtype).train(training)
    with torch.no_grad():
        for p in module.parameters():
            p.uniform_(-1, 1)
    return module


def run(module: nn.Module, x: Tensor) -> tuple:
    leaf = x.detach().clone().requires_grad_()
    y = module(leaf)
    grads = torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])
    return y.detach(), grads, module.state_dict()


@MODES
@pytest.mark.parametrize("name", NAMES)
def test_module_samples(name, training, device) -> None:
    found = samples(name, training, device)
    assert len(found) >= 4
    for sample in found:
        (x,) = sample.forward_input.args
        results = [
            run(build(getattr(package, name), sample, training, device), x)
            for package in (bnext, nn)
        ]
        torch.testing.assert_close(*results, msg=lambda m, s=sample: f"{s.desc}: {m}")


@MODES
@pytest.mark.parametrize("name", NAMES)
def test_module_samples_by_gradcheck(name, training, device) -> None:
    """torch's test_grad and test_gradgrad, in their fast mode."""
    for sample in samples(name, training, device):
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
def test_module_samples_compiled_and_strided(name, training, device) -> None:
    """torch's test_non_contiguous_tensors."""
    for sample in samples(name, training, device):
        (x,) = sample.forward_input.args
        strided = torch.testing._internal.common_utils.noncontiguous_like(x)
        module = build(getattr(bnext, name), sample, training, device)
        twin = build(getattr(nn, name), sample, training, device)
        torch.testing.assert_close(module(strided), twin(x))


@pytest.mark.parametrize("name", NAMES)
def test_module_error_inputs(name, device) -> None:
    info = MODULES[name]
    assert info.module_error_inputs_func is not None
    found = list(info.module_error_inputs_func(info, str(device), torch.float32, False, True))
    for error in found:
        sample = error.module_error_input
        (x,) = sample.forward_input.args if sample.forward_input else (None,)
        kinds = []
        for package in (bnext, nn):
            with pytest.raises(error.error_type, match=error.error_regex) as caught:
                arguments = sample.constructor_input
                getattr(package, name)(*arguments.args, **arguments.kwargs)(x)
            kinds.append(type(caught.value))
        assert kinds[0] is kinds[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_functional_samples(dtype, device) -> None:
    """torch's test_dtypes and test_out of the functional: what it takes, ours takes, alike."""
    count = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(FUNCTIONAL.sample_inputs(device, dtype, requires_grad=True))
    for sample in found:
        results = []
        for function in (bnext.functional.batch_norm, nn.functional.batch_norm):
            x = sample.input.detach().clone().requires_grad_()
            args = [a.detach().clone() if isinstance(a, Tensor) else a for a in sample.args]
            kwargs = {
                k: v.detach().clone() if isinstance(v, Tensor) else v
                for k, v in sample.kwargs.items()
            }
            y = function(x, *args, **kwargs)
            y.sin().sum().backward()
            results.append((y.detach(), x.grad, args, kwargs))
        loose = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {}
        (y, dx, *state), (z, dz, *expected) = results
        torch.testing.assert_close(y, z, **loose)
        if dtype is torch.float64:  # of two values per channel, all else is rounding errors
            torch.testing.assert_close(dx, dz)
        assert dx.dtype == dz.dtype
        for a, b in zip([*state[0], *state[1].values()], [*expected[0], *expected[1].values()],
                        strict=True):  # fmt: skip
            if isinstance(a, Tensor):
                torch.testing.assert_close(a, b, **loose)
        count += 1
    assert count >= 5


def test_functional_samples_forward_and_reverse_derivatives(device) -> None:
    """torch's test_forward_mode_AD and test_vmapvjp: gradcheck's forward and batched checks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(FUNCTIONAL.sample_inputs(device, torch.float64, requires_grad=True))
    for sample in found:
        if sample.input.numel() == 0:
            continue

        def function(x, s=sample):
            args = [a.detach().clone() if isinstance(a, Tensor) else a for a in s.args]
            kwargs = {
                k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in s.kwargs.items()
            }
            return bnext.functional.batch_norm(x, *args, **kwargs)

        x = sample.input.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(
            function, x, fast_mode=False, check_forward_ad=True, check_batched_grad=True,
            check_batched_forward_grad=True, check_undefined_grad=True,
        )  # fmt: skip


def test_functional_error_inputs(device) -> None:
    if FUNCTIONAL.error_inputs_func is None:
        pytest.skip("this torch lists none")
    for error in FUNCTIONAL.error_inputs(device):
        sample = error.sample_input
        with pytest.raises(error.error_type):
            bnext.functional.batch_norm(sample.input, *sample.args, **sample.kwargs)
