"""Where memory runs out, and stores past the cache: in child processes, which may crash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bnext import _C

TESTS = Path(__file__).resolve().parents[1]


def run(code: str) -> None:
    # Every large block is mapped by itself and given back: what a process has is what it uses.
    environment = {
        **os.environ, "PYTHONPATH": str(TESTS.parent), "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # fmt: skip
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert child.returncode == 0, f"exit {child.returncode}\n{child.stdout}{child.stderr}"[-3000:]


OUT_OF_MEMORY = """
import resource
import torch
import bnext

torch.set_num_threads(1)
torch.manual_seed(0)
C, STEP = 2**18, 2**20


def error_within(extra, call):
    pages = int(open("/proc/self/statm").read().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, limits[1]))
    try:
        call()
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}".lower()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


x, residual, grad_out = torch.randn(3, 2, C)
if "LAYOUT" == "strided":
    x, residual = x.t().contiguous().t(), residual.t().contiguous().t()
train, inference = bnext.BatchNormAct1d(C), bnext.BatchNormAct1d(C).eval()
train(x), inference(x)
leaf = x.clone().requires_grad_()
grad_out.requires_grad_()


def backward_of(module, *args):
    y = module(leaf, *args)
    return lambda: torch.autograd.grad(y, (leaf, module.weight), grad_out, retain_graph=True)


def double_backward_of(module):
    y = module(leaf)
    (dx,) = torch.autograd.grad(y, leaf, grad_out, create_graph=True)
    return lambda: torch.autograd.grad(dx, (grad_out, module.weight), x, retain_graph=True)


@torch.no_grad()
def without_gradient():
    train(x, residual)


calls = {
    "train": lambda: train(x, residual),
    "train, no_grad": without_gradient,
    "eval": lambda: inference(x, residual),
    "backward": backward_of(train),
    "backward, mask": backward_of(train, residual),
    "eval backward": backward_of(inference),
    "double backward": double_backward_of(train),
    "eval double backward": double_backward_of(inference),
}
state = {**train.state_dict(prefix="train."), **inference.state_dict(prefix="eval.")}
for name, call in calls.items():
    call()
    before = {key: value.clone() for key, value in state.items()}
    errors = 0
    while error := error_within((errors + 1) * STEP, call):
        errors += 1
        assert "memory" in error, (name, error)
        for key, value in state.items():
            assert torch.equal(value, before[key]), f"{name}: {key} after {error}"
        assert errors < 200, name
    print(name, errors, flush=True)
    assert errors > 2, f"{name}: memory never ran out"
    counted = train.num_batches_tracked - before["train.num_batches_tracked"]
    assert counted == name.startswith("train"), name
"""


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="ASan aborts instead")
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_a_call_that_runs_out_of_memory_raises_and_changes_nothing(layout) -> None:
    """With ever more memory until it is enough: each allocation is the one that fails once."""
    run(OUT_OF_MEMORY.replace("LAYOUT", layout))


STORES = """
import torch
import bnext
from bnext import _C, reference

torch.manual_seed(0)
L3 = _C.cpu_device_info(1).l3_bytes
# Channels, and elements of a map: runs of every alignment.
SHAPES = [
    *((c, 4, torch.channels_last) for c in (65, 72, 80)),
    *((3, hw, torch.contiguous_format) for hw in (1025, 1028, 1032, 1040)),
    (16, 9, torch.contiguous_format),
]
past_the_cache = 0
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for c, hw, memory_format in SHAPES:
        n = (L3 // (c * hw * dtype.itemsize) // 32 + 1) * 32
        plan = bnext.explain((n, c, hw, 1), dtype, memory_format).forward
        past_the_cache += plan.nontemporal_stores
        print(n, c, hw, memory_format, dtype, plan.nontemporal_stores, flush=True)

        def copies(sample):
            # n of them, one element past where memory is aligned.
            flat = torch.empty(n * c * hw + 1, dtype=dtype)[1:]
            if memory_format is torch.channels_last:
                return flat.view(n, hw, 1, c).permute(0, 3, 1, 2).copy_(sample)
            return flat.view(n, c, hw, 1).copy_(sample)

        sample, grad, other = torch.randn(3, 1, c, hw, 1).to(dtype)
        x, residual = copies(sample).requires_grad_(), copies(other).requires_grad_()
        dy = copies(grad)
        stats = torch.zeros(c).to(dtype), torch.ones(c).to(dtype)
        for training, added, act in (
            (True, None, None), (False, None, None), (True, residual, "relu"), (True, None, "silu")
        ):
            given = None if training else stats
            leaves = (x,) if added is None else (x, added)
            y = bnext.functional.batch_norm_act(
                x, *stats, residual=added, training=training, momentum=0.0, act=act
            )
            gradients = torch.autograd.grad(y, leaves, dy)
            wide = sample.double().requires_grad_()
            forward = reference.forward(
                wide, residual=None if added is None else other, stats=given, act=act
            )
            if act == "silu":
                expected = torch.autograd.grad(forward.output, wide, grad.double())
            else:
                passed = None if act is None else y[:1].detach() > 0
                backward = reference.backward(grad, sample, stats=given, active=passed)
                expected = backward.input, backward.residual
            expected = forward.output.detach(), *expected
            for actual, value in zip((y.detach(), *gradients), expected):
                torch.testing.assert_close(actual[:1].double(), value, rtol=2e-2, atol=2e-2)
                assert torch.equal(actual, actual[:1].expand_as(actual))
assert past_the_cache >= 4 * 2
"""


def test_stores_past_the_cache_are_aligned() -> None:
    """An unaligned one ends the process."""
    if _C.cpu_device_info(1).l3_bytes > 2**27:
        pytest.skip("tensors beyond an L3 of that size take gigabytes")
    run(STORES)
