"""Mixed precision beside torch.nn's: dtypes of outputs, gradients and statistics, and a scaler."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bnext

HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def nets(device) -> tuple[nn.Sequential, nn.Sequential]:
    theirs = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
    )
    return bnext.convert(copy.deepcopy(theirs)).to(device), theirs.to(device)


def run(model: nn.Sequential, x: Tensor, dtype: torch.dtype | None) -> tuple[dict, Tensor, list]:
    """The dtypes of everything, and the numbers."""
    dtypes: dict[str, torch.dtype] = {}
    hooks = [
        m.register_forward_hook(
            lambda m, args, y, name=name: dtypes.update({name: (args[0].dtype, y.dtype)})
        )
        for name, m in model.named_modules()
    ]
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        y = model(x)
        loss = y.float().square().mean()
    loss.backward()
    for hook in hooks:
        hook.remove()
    grads = [p.grad.float() for p in model.parameters()]
    dtypes |= {f"grad of {n}": p.grad.dtype for n, p in model.named_parameters()}
    dtypes |= {n: b.dtype for n, b in model.named_buffers()}
    dtypes["grad of x"] = x.grad.dtype
    return dtypes, y.detach().float(), grads


@HALVES
@MODES
def test_autocast_with_float_parameters(training, dtype, device) -> None:
    x = torch.randn(4, 3, 9, 9, device=device)
    results = [
        run(model.train(training), x.clone().requires_grad_(), dtype) for model in nets(device)
    ]
    (ours, y, grads), (theirs, z, expected) = results
    assert ours == theirs
    assert ours["1"] == (dtype, dtype) and ours["grad of 1.weight"] == torch.float32
    torch.testing.assert_close(y, z, rtol=0.05, atol=0.05)
    torch.testing.assert_close(grads, expected, rtol=0.1, atol=0.05)


@HALVES
@MODES
def test_module_in_half_with_its_statistics(training, dtype, device) -> None:
    """model.half(): parameters and running statistics are cast, the counter is not."""
    results = []
    x = torch.randn(4, 3, 9, 9, device=device).to(dtype)
    for model in nets(device):
        model.to(dtype).train(training)
        results.append(run(model, x.clone().requires_grad_(), None))
    (ours, y, grads), (theirs, z, expected) = results
    assert ours == theirs and ours["1.running_var"] == dtype
    assert ours["1.num_batches_tracked"] == torch.int64
    torch.testing.assert_close(y, z, rtol=0.05, atol=0.05)
    torch.testing.assert_close(grads, expected, rtol=0.1, atol=0.05)


@HALVES
@MODES
def test_half_network_with_float_batch_norms(training, dtype, device) -> None:
    """The other custom: everything cast but the batch norms, which take a half input."""
    results = []
    x = torch.randn(4, 3, 9, 9, device=device).to(dtype)
    for model in nets(device):
        model.to(dtype).train(training)
        for i in (1, 4):
            model[i].float()
        results.append(run(model, x.clone().requires_grad_(), None))
    (ours, y, grads), (theirs, z, expected) = results
    assert ours == theirs and ours["1"] == (dtype, dtype)
    assert ours["grad of 1.weight"] == ours["1.running_var"] == torch.float32
    torch.testing.assert_close(y, z, rtol=0.05, atol=0.05)
    torch.testing.assert_close(grads, expected, rtol=0.1, atol=0.05)


@HALVES
def test_round_trip_keeps_the_module_usable(dtype, device) -> None:
    for bn in (bnext.BatchNorm2d(3, device=device), nn.BatchNorm2d(3, device=device)):
        x = torch.randn(4, 3, 5, 5, device=device)
        assert bn.to(dtype)(x.to(dtype)).dtype == dtype
        assert bn.float()(x).dtype == torch.float32
        assert int(bn.num_batches_tracked) == 2


@HALVES
def test_grad_scaler_trains_and_skips_overflows(dtype, device) -> None:
    """A step whose scaled gradients overflow is skipped, by both, and lowers both scales."""
    results = []
    inputs = [torch.randn(4, 3, 9, 9, device=device) for _ in range(4)]
    for model in nets(device):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
        scales = []
        for i, x in enumerate(inputs):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=dtype):
                loss = model(x).float().square().mean()
            if i == 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales == [1024.0, 512.0, 512.0, 512.0]
        results.append(model.state_dict())
    torch.testing.assert_close(*results, rtol=0.05, atol=0.02)


@HALVES
def test_fused_activation_keeps_the_dtype(dtype, device) -> None:
    bn = bnext.BatchNormAct2d(6, device=device)
    x, residual = torch.randn(2, 4, 6, 5, 5, device=device, dtype=dtype).requires_grad_()
    with torch.autocast(device.type, dtype=dtype):
        y = bn(x, residual)
    y.sum().backward()
    assert y.dtype == dtype and bn.weight.grad.dtype == torch.float32


def test_autocast_caches_no_casts_of_ours(device) -> None:
    """Batch norm is in none of autocast's lists: a float input stays float, as torch.nn's."""
    x = torch.randn(4, 3, 5, 5, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for kind in (bnext, nn):
            assert kind.BatchNorm2d(3, device=device)(x).dtype == torch.float32
