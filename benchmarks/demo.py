"""bnext against eager PyTorch in five lines: batch norm, a fused block, a ResNet-50, a call."""

import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import cases, gpu, gpu_clock, kernels, overhead, report, resnet50, summary
from benchmarks.cases import Shape

# From the beginning, the middle and the end of ResNet-50.
SHAPES = Shape(64, 56, 6), Shape(512, 28, 5), Shape(1024, 14, 7), Shape(512, 7, 5)
BATCH = 32
BLOCK = "bn_add_relu"


def _timings(
    some: list[cases.Case], device: torch.device, out: Path, progress: Progress
) -> report.Timings:
    """Nothing where bnext is wrong. On a GPU each is checked as it is timed."""
    if device.type == "cuda":
        run = gpu.Run(device, [gpu_clock.MODES["warm eager"]], 2e-3, out, {})
        run.next_write = float("inf")  # gpu.csv is another command's
        run.clock.warm_up()
        run.each(some, "measure", float("inf"), progress)
        for problem in run.problems:
            progress.console.print(f"[red]wrong or left out:[/red] {problem}", highlight=False)
        return {} if run.failed else run.timings
    verdicts = kernels.check_all(some, False, progress)
    if any(verdict["bnext"].failures for verdict in verdicts.values()):
        return {}
    found: report.Timings = {}
    for each in kernels.measure(some, "fresh", False, 0.1, progress):
        found |= each
    return found


def _step(device: torch.device, quick: bool) -> tuple[float, str]:
    """A training step with fused batch norms."""
    on_gpu = device.type == "cuda"
    batch, size = (2, 32) if quick else (256, 224) if on_gpu else (8, 128)
    name = resnet50.ON_GPU[0] if on_gpu else "float32, nchw"
    settings = resnet50.Settings(device, batch, size, 5 if on_gpu else 1, 0.0 if quick else 15.0)
    found = resnet50.measure(resnet50.PRECISIONS[name], settings, compiled=False)
    ratio = found["nn.BatchNorm2d"].timing.ms / found["convert(fuse=True)"].timing.ms
    return ratio, f"a training step of {batch} images, fused"


def run(out: Path, facts: dict[str, str], device: torch.device, quick: bool) -> int:
    console = Console()
    if device.type == "cuda":
        facts = facts | report.gpu_facts(device)
    shapes, batch = (SHAPES[-1:], 4) if quick else (SHAPES, BATCH)
    dtypes = "float32", "bfloat16"
    some = cases.resnet50((batch,), dtypes, ("bn", BLOCK), cases.LAYOUTS, shapes)
    with Progress(console=console, auto_refresh=False) as progress:
        timings = _timings(some, device, out, progress)
        if not timings:
            return 1
        task = progress.add_task("timing ResNet-50", total=1)
        step, network = _step(device, quick)
        progress.advance(task)
    times = report.times(timings)
    torch.set_num_threads(1)  # more are of no use to so small a tensor
    call = overhead.one_call("training forward + backward", False, 300, 11, device)
    _, call_ratio = overhead.measure(call)

    def of(variant: str, direction: str) -> list[float]:
        return summary.speedups(times, "eager", variant=variant, direction=direction)

    maps = f"ResNet-50's batch norms, N = {batch}"
    lines = [
        ("forward", of("bn", "forward"), maps),
        ("backward", of("bn", "backward"), "the same"),
        ("BN + add + ReLU", of(BLOCK, "both"), "fused, forward and backward"),
        ("ResNet-50", [step], network),
        ("a call", [1 / call_ratio], "forward and backward of 32 numbers"),
    ]
    rows = [
        {
            "what": what, "times_as_fast": f"{statistics.geometric_mean(ratios):.2f}",
            "worst": f"{min(ratios):.2f}", "best": f"{max(ratios):.2f}", "of": words,
        }
        for what, ratios, words in lines
    ]  # fmt: skip
    report.write_csv(out / "demo.csv", facts, rows)
    console.print(report.facts_table(facts))
    console.print("\n[bold]Times as fast as eager PyTorch[/bold], mean and range", highlight=False)
    for row in rows:
        span = f"{row['worst']} to {row['best']}" if row["worst"] != row["best"] else ""
        mean = f"[bold]{row['times_as_fast']:>5}[/bold]"
        console.print(f"  {row['what']:15} {mean}  {span:13} {row['of']}", highlight=False)
    console.print()
    with report.plotting(console):
        from benchmarks import plots

        plots.speedups(out / "demo.png", facts, times)
    console.print(f"Written to {out}/demo.csv, demo.png", highlight=False)
    return 0
