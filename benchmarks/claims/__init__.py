"""The claims of Ioffe & Szegedy (2015), each reproduced with bnext's layers on real images."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks import report
from benchmarks.arguments import BadArgumentError
from benchmarks.claims import (
    affine,
    bias,
    covariate_shift,
    data,
    formulas,
    initialisation,
    keras_layer,
    learning_rate,
    regularisation,
    whitening,
)
from benchmarks.claims.finding import Finding, LeftOutError, Setup, show, write, write_page

EXPERIMENTS = {
    "shift": covariate_shift,
    "lr": learning_rate,
    "init": initialisation,
    "regularise": regularisation,
    "bias": bias,
    "whitening": whitening,
    "formulas": formulas,
    "affine": affine,
    "keras": keras_layer,
}


def run(
    out: Path, facts: dict[str, str], names: Sequence[str], folder: Path | None, seeds: int,
    quick: bool,
) -> int:  # fmt: skip
    try:
        images = data.load(folder)
    except (OSError, ValueError) as error:
        raise BadArgumentError(f"argument --data: {error}") from None
    console = Console()
    facts = facts | {"data": images.words, "seeds": str(seeds)}
    console.print(report.facts_table(facts))
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Finding | str] = {}
    start = time.perf_counter()
    with Progress(console=console) as progress:
        for number, name in enumerate(names, 1):
            label = f"{number}/{len(names)} {name}"
            setup = Setup(
                images, range(seeds), quick,
                lambda jobs, label=label: progress.track(jobs, description=label),
            )  # fmt: skip
            try:
                found[name] = finding = EXPERIMENTS[name].run(setup)
            except LeftOutError as reason:
                found[name] = str(reason)
                console.print(f"{name} left out: {reason}", highlight=False)
                continue
            write(out, name, facts, finding)
            show(console, EXPERIMENTS[name].STATEMENT, finding)
    facts["seconds"] = f"{time.perf_counter() - start:.0f}"
    if [*found] == [*EXPERIMENTS]:
        write_page(out, facts, [(n, EXPERIMENTS[n].STATEMENT, found[n]) for n in names])
    console.print(f"Written to {out}/claims* in {facts['seconds']} s", highlight=False)
    failures = [f for each in found.values() if isinstance(each, Finding) for f in each.failures]
    for failure in failures:
        console.print(f"[red]{failure}[/red]")
    return int(bool(failures))
