"""What the README and its companions say: code that runs, commands that exist, true figures."""

import csv
import doctest
import importlib.util
import re
import shlex
import statistics
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnext
from benchmarks import __main__ as command
from benchmarks import accuracy, summary

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
AVX2, AVX512 = RESULTS / "epyc-zen4-2cores-avx2", RESULTS / "epyc-zen4-2cores"
README, BENCHMARKS = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
PAGES = [
    README, BENCHMARKS, ROOT / "CONTRIBUTING.md", ROOT / "csrc" / "README.md",
    ROOT / "tests" / "COMPATIBILITY.md",
]  # fmt: skip


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(s for s in file.read_text().splitlines() if not s.startswith("#")))


def test_it_is_short() -> None:
    assert len(README.read_text().split()) < 1500


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        path, _, heading = link.partition("#")
        if path.startswith("https:"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert heading in anchors, link


def test_the_readmes_code_runs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    names = {"model": model, "torch": torch, "x": torch.randn(2, 64, 4, 4), "F": F}
    ran = 0
    for block in blocks(README):
        if ">>>" in block or "dist." in block:  # run by the next test, and in test_sync.py
            continue
        exec(compile(block, "README.md", "exec"), names)
        ran += 1
    assert ran >= 4
    report = bnext.conversion_report(model, fuse=True)
    assert type(model[1]).__module__.startswith("bnext") and report.fused


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_output_shown_is_the_real_output(page) -> None:
    text = "\n".join(block for block in blocks(page) if ">>>" in block)
    test = doctest.DocTestParser().get_doctest(text, {"bnext": bnext}, name(page), None, 0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    assert runner.run(test, out=said.append).failed == 0, "".join(said)
    assert test.examples or page != README


def test_torchs_gradient_is_wrong_as_the_readme_says() -> None:
    (block,) = [block for block in blocks(README) if "x.grad is wrong" in block]
    errors = {}
    for functional in (F, bnext.functional):
        torch.manual_seed(0)
        names = {"torch": torch, "F": functional}
        exec(block, names)
        x, dy = names["x"].detach(), names["dy"]
        exact = bnext.reference.backward(dy, x, None, None, 1e-5, None).input
        errors[functional] = float((names["x"].grad - exact).abs().max() / exact.abs().max())
    assert errors[bnext.functional] < 1e-6
    if torch.__version__.startswith("2.13."):
        assert errors[F] > 0.1


def test_the_code_for_other_libraries_runs() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for buffer in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(buffer, torch.rand(4) + 0.5)

        def forward(self, x):
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    first, second = blocks(ROOT / "tests" / "COMPATIBILITY.md")
    detr = types.SimpleNamespace(FrozenBatchNorm2d=FrozenBatchNorm2d)
    exec(first, {"bnext": bnext, "detr": detr})
    model, x = nn.Sequential(FrozenBatchNorm2d()), torch.randn(2, 4, 3, 3)
    expected = model(x)
    converted = bnext.convert(model)
    assert type(converted[0]) is not FrozenBatchNorm2d
    torch.testing.assert_close(converted(x), expected)
    if importlib.util.find_spec("opacus"):
        exec(second, {"bnext": bnext})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_exists(page) -> None:
    text = page.read_text()
    parser = command._parser()
    for line in re.findall(r"python -m benchmarks ([^`\n#]*)", text):
        words = shlex.split(re.sub(r"[][]", "", line))
        needs_gpu = words[:1] in (["gpu"], ["dram"]) or words == ["resnet50"]
        if not words or "..." in words or (needs_gpu and command.DEVICE == "cpu"):
            continue
        assert parser.parse_args(words if words[0][0] != "-" else ["kernels", *words]), line
    for module in re.findall(r"python -m (bnext\.\w+)", text):
        assert importlib.util.find_spec(module), module
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_tables_are_the_files() -> None:
    text = BENCHMARKS.read_text()
    for folder in (AVX2, AVX512):
        times = summary.times(summary.read(folder / "kernels.csv")[1])
        assert summary.plain_table(times) in text
        assert summary.fused_table(times) in text
    errors = rows(AVX512 / "accuracy.csv")
    assert accuracy.table(errors) in text
    shown = accuracy.table(errors, ("float32",), ("y", "variance", "dx", "dweight"))
    assert shown in README.read_text()


def test_the_figures_are_the_files() -> None:
    text = " ".join(README.read_text().split())
    times = summary.times(summary.read(AVX2 / "kernels.csv")[1])

    def mean(variant: str, direction: str) -> str:
        wanted = {"variant": variant, "direction": direction, "allocator": "fresh"}
        return f"{statistics.geometric_mean(summary.speedups(times, 'eager', **wanted)):.1f}"

    forward, backward = mean("bn", "forward"), mean("bn", "backward")
    relu = mean("bn_relu", "both")
    assert f"{forward} times as fast forward, {backward} backward and {relu} with a ReLU" in text

    wanted = {"variant": "bn", "layout": "channels_last", "allocator": "warm"}
    assert f"the worst shape: {min(summary.speedups(times, 'eager', **wanted)):.1f} times" in text

    steps = [
        float(row["speed_over_torch"])
        for folder in (AVX2, AVX512) for row in rows(folder / "resnet50.csv")
        if row["batch_norm"] == "convert(fuse=True)"
    ]  # fmt: skip
    step = f"{statistics.geometric_mean(steps):.2f}"
    span = f"{min(steps):.2f} to {max(steps):.2f}"
    assert f"({step} times as fast on average, {span}: it is convolutions)" in text

    overhead = {row["mode"]: float(row["ratio"]) for row in rows(AVX512 / "overhead.csv")}
    compiled = 1 / overhead["training forward + backward, compiled"]
    assert f"under torch.compile ({compiled:.1f})" in text

    less = [
        1 - float(row["bnext_saved_bytes"]) / float(row["eager_saved_bytes"])
        for row in rows(AVX512 / "models.csv")
    ]
    most = [saved for saved in less if saved > 0.2]
    less_text = f"{100 * min(most):.0f} to {max(most):.0%} less"
    assert f"keep {less_text}" in text

    page = " ".join(BENCHMARKS.read_text().split())
    assert f"keep {less_text} for backward" in page
    assert f"{min(steps):.2f} to {max(steps):.2f} times as fast, {step} on average" in page
    modes = "eval no_grad", "training forward", "training forward + backward"
    eager, compiled_too = ([overhead[m + more] for m in modes] for more in ("", ", compiled"))
    said = [f"{ratio:.2f}" for ratio in (*eager, *compiled_too)]
    sentence = "eval {}, training forward {}, training forward and backward {}; both compiled: "
    assert (sentence + "{}, {} and {}").format(*said) in page
    second = [
        f"{float(row['torch_us']) / float(row['bnext_us']):.0f}"
        for row in rows(AVX512 / "overhead.csv") if row["mode"].startswith("second")
    ]  # fmt: skip
    assert "{} times as fast as ATen's in NCHW, {} times in channels_last".format(*second) in page

    found = rows(AVX512 / "models.csv")
    norms, converted, fused = (
        sum(int(row[name]) for row in found) for name in ("batch_norms", "converted", "fused")
    )
    assert norms == converted
    assert f"all {norms} batch norms are converted and {fused} fused" in page

    times_of: dict[str, float] = {}
    for row in rows(AVX512 / "sync.csv"):
        if row["layers"]:
            name = row["provider"]
            times_of[name] = times_of.get(name, 0.0) + int(row["layers"]) * float(row["ms"])
    ours, theirs, alone = (f"{ms:,.0f}" for ms in times_of.values())
    assert f"{ours} ms a step against {theirs} of" in page
    assert f"of which {alone} ms are the kernels alone" in page
