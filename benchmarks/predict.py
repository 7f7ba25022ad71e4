"""What the plans for GPUs should take on ResNet-50's batch norms: predictions, no GPU needed."""

import csv
import statistics
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import bnext
from benchmarks import report
from benchmarks.cases import DTYPES, LAYOUTS, Case, resnet50
from bnext.introspect import GPUS

BATCH = 256
SHOWN = ("A100", "H100", "H200", "B200", "RTX 4090", "RTX 5090")
VARIANTS = ("bn", "bn_relu", "bn_add_relu")
FILE = Path(__file__).parent / "results" / "predictions" / "resnet50.csv"
FACTS = {
    "predictions": "nothing here was measured; bnext/_predict.py says how it is computed",
    "case": f"training, N = {BATCH}, the 53 batch norms of ResNet-50 as 12 shapes",
    "copy_share": "time of a copy of the least bytes that must move / time",
}


class Row(NamedTuple):
    """One kernel call of one GPU."""

    gpu: str
    case: Case
    direction: str
    plan: str
    microseconds: float
    copy_share: float

    def values(self) -> dict[str, Any]:
        return {
            "gpu": self.gpu, "shape": self.case.size, "layers": self.case.layers,
            "dtype": self.case.dtype, "layout": self.case.layout, "variant": self.case.variant,
            "direction": self.direction, "plan": self.plan,
            "microseconds": f"{self.microseconds:.1f}", "copy_share": f"{self.copy_share:.3f}",
        }  # fmt: skip


def rows() -> list[Row]:
    """All that the file has."""
    found = []
    for gpu, case in product(SHOWN, resnet50((BATCH,), ("bfloat16", "float32"), VARIANTS)):
        kind = case.kind
        explained = bnext.explain(
            case.shape, DTYPES[case.dtype], case.memory_format, kind.training, GPUS[gpu], kind.act,
            kind.residual,
        )  # fmt: skip
        plans = explained.forward, explained.backward
        for direction, plan, p in zip(
            ("forward", "backward"), plans, explained.predicted, strict=True
        ):
            assert p, "these GPUs' speeds are known"
            words = f"{plan.family} {plan.index_map} {plan.team} of {plan.team_blocks}"
            found.append(Row(gpu, case, direction, words, p.seconds * 1e6, p.copy_share))
    return found


def table(file: Path = FILE) -> str:
    """The README's, from a file of predictions: plain batch norm in bfloat16."""
    with file.open() as lines:
        records = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    columns = list(product(("forward", "backward"), LAYOUTS))
    heads = (f"{direction}, {layout.replace('nchw', 'NCHW')}" for direction, layout in columns)
    lines_of_table = [f"| predicted | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for gpu in SHOWN:
        cells = []
        for direction, layout in columns:
            wanted = {
                "gpu": gpu, "dtype": "bfloat16", "variant": "bn", "direction": direction,
                "layout": layout,
            }  # fmt: skip
            some = [r for r in records if wanted.items() <= r.items()]
            shares = [float(r["copy_share"]) for r in some]
            cells.append(f"{statistics.geometric_mean(shares):.0%} ({min(shares):.0%})")
        lines_of_table.append(f"| {gpu} | {' | '.join(cells)} |")
    return "\n".join(lines_of_table)


def run(out: Path) -> int:
    """Writes resnet50.csv, and prints the README's table of it."""
    file = out / FILE.name
    report.write_csv(file, FACTS, (row.values() for row in rows()))
    print(f"Predictions, not measurements, in {file}:\n\n{table(file)}")
    return 0
