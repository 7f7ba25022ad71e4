"""The predictions kept until a GPU measures: they are this code's, and the README shows them."""

import csv
import re

import pytest

from benchmarks import predict
from benchmarks.__main__ import main
from bnext._predict import OUTSIDE, instructions


def records(file) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def test_the_file_is_what_the_command_writes(tmp_path, capsys) -> None:
    assert main(["predict", "--out", str(tmp_path)]) == 0
    assert records(tmp_path / predict.FILE.name) == records(predict.FILE)
    assert "not measurements" in capsys.readouterr().out
    assert "nothing here was measured" in predict.FILE.read_text()


def test_the_readme_shows_it() -> None:
    root = predict.FILE.parents[3]
    assert predict.table() in (root / "README.md").read_text()


# Kernels in bfloat16 -> their stage, what the activation needs, bytes of an access.
COUNTED = {
    r"resident_forward_kernel<__nv_bfloat16, 8, [01], 0> (none|relu)":
        ("train_forward", "sign", 16),
    r"apply_forward_kernel<__nv_bfloat16, 8, [01], 0> (none|relu)": ("eval_forward", "sign", 16),
    r"resident_forward_kernel<__nv_bfloat16, 8, [01], 0> silu": ("train_forward", "sum", 16),
    r"resident_backward_kernel<__nv_bfloat16, 8, [01], 0> none":
        ("train_backward", "nothing", 16),
    r"resident_backward_kernel<__nv_bfloat16, 8, [01], 0> (sign|mask)":
        ("train_backward", "sign", 16),
    r"resident_backward_kernel<__nv_bfloat16, 8, 0, 0> silu": ("train_backward", "sum", 16),
    r"resident_backward_kernel<__nv_bfloat16, 4, [01], 0> silu": ("train_backward", "sum", 8),
    r"reduce_backward_kernel<__nv_bfloat16, 8, [01], 0> none frozen":
        ("eval_backward", "nothing", 16),
    r"resident_forward_kernel<__nv_bfloat16, 8, 0, 1> (none|relu)":
        ("train_forward", "sign", 16, "ragged"),
    r"resident_backward_kernel<__nv_bfloat16, 8, 0, 1> (sign|mask)":
        ("train_backward", "sign", 16, "ragged"),
    r"resident_forward_kernel<__nv_bfloat16, 8, 1, 1> (none|relu)":
        ("train_forward", "sign", 16, "sliced"),
    r"resident_backward_kernel<__nv_bfloat16, 8, 1, 1> (none|sign)":
        ("train_backward", "sign", 16, "sliced"),
}  # fmt: skip


@pytest.mark.parametrize("kernel", COUNTED)
def test_instructions_are_those_that_were_counted(kernel) -> None:
    found = records(predict.FILE.parents[1] / "sass" / "sass.csv")
    counts = [
        float(r["total"]) for r in found
        if re.fullmatch(f"batch_norm_{kernel}", f"{r['kernel']} {r['fused']}")
    ]  # fmt: skip
    assert counts
    assert instructions(*COUNTED[kernel]) == pytest.approx(max(counts) + OUTSIDE, rel=0.1)
