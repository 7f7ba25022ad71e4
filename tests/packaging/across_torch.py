"""Builds one wheel and runs a smoke test with it under every Python environment named.

    python tests/packaging/across_torch.py env-a/bin/python env-b/bin/python ...

The wheel is built once, against the torch of the first environment; the others get the same files
whatever their torch (they must be the same Python version). Exits with 1 if any of them fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(pythons: list[str]) -> int:
    if not pythons:
        print(__doc__)
        return 2
    pythons = [os.path.abspath(python) for python in pythons]
    with tempfile.TemporaryDirectory() as scratch:
        pip_wheel = [pythons[0], "-m", "pip", "wheel", "--no-deps", "-w", scratch]
        subprocess.run([*pip_wheel, str(ROOT)], check=True)
        (wheel,) = Path(scratch).glob("bnext-*.whl")
        print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
        unpacked = Path(scratch, "unpacked")
        zipfile.ZipFile(wheel).extractall(unpacked)
        failed = [python for python in pythons if not passes(python, unpacked)]
    print(f"{len(pythons) - len(failed)} of {len(pythons)} environments passed")
    return 1 if failed else 0


def passes(python: str, unpacked: Path) -> bool:
    command = [python, __file__, "--smoke", str(unpacked)]
    result = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    if result.returncode == 0:
        print(f"PASS  {result.stdout.strip()}")
    else:
        print(f"FAIL  {python}\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def smoke(unpacked: str) -> None:
    """Runs in the environment under test: the wheel's files, that environment's torch."""
    sys.path[0] = unpacked  # in place of tests/
    import torch

    import bnext

    assert Path(bnext.__file__).is_relative_to(unpacked), bnext.__file__
    checks = 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 5e-2)):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            for training in (True, False):
                compare(dtype, memory_format, training, tolerance)
                checks += 1
    compiled = torch.compile(bnext.BatchNorm2d(3), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(compiled(x), torch.nn.BatchNorm2d(3)(x))
    built = bnext.build_info()
    for op in ("batch_norm_train", "batch_norm_inference", "batch_norm_backward"):
        has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(f"bnext::{op}", "CUDA")
        assert has_cuda == built["cuda"], op
    print(
        f"torch {torch.__version__}, python {sys.version.split()[0]}: {checks + 1} checks; {built}"
    )


def compare(dtype: object, memory_format: object, training: bool, tolerance: float) -> None:
    """One forward and backward step of bnext.BatchNorm2d against torch.nn's."""
    import torch

    import bnext

    torch.manual_seed(0)
    data = torch.randn(8, 6, 7, 5, dtype=dtype).to(memory_format=memory_format) * 3 + 1
    ours, theirs = bnext.BatchNorm2d(6, dtype=dtype), torch.nn.BatchNorm2d(6, dtype=dtype)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 2)
        theirs.bias.uniform_(-1, 1)
    ours.load_state_dict(theirs.state_dict())
    results = []
    for module in (ours.train(training), theirs.train(training)):
        x = data.clone().requires_grad_()
        y = module(x)
        y.backward(data.cos())
        results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--smoke"]:
        smoke(sys.argv[2])
    else:
        sys.exit(main(sys.argv[1:]))
