"""The predictions kept until a GPU measures: they are this code's, and the README shows them."""

import csv

from benchmarks import predict
from benchmarks.__main__ import main


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
