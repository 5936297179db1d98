"""Results files and published rows in one table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from megatron.errors import ConfigError, DataError
from tools.plots.zero_shot_table import COLUMNS, PUBLISHED, draw, join, main, read_published, read_results


def write_record(path: Path, name: str = "mine/global_step10", **changes: Any) -> Path:
    """A results file as eval.py writes it, which scores 0.5 everywhere."""
    results = {
        column.partition(":")[0]: {"acc,none": 0.5, "acc_stderr,none": 0.01, "acc_norm,none": 0.4} for column in COLUMNS
    }
    record = {
        "results": results,
        "model": {"name": name, "parameters": 151_881_216, "manifest_sha256": "ab"},
        "config": {"limit": None, "num_fewshot": None},
        "date": "2026-01-02T00:00:00+0000",
    }
    path.write_text(json.dumps(record | changes))
    return path


def test_published_averages_are_those_that_are_printed_but_for_two() -> None:
    """Pythia-160M's 40.1 is another model's, one row up in Mamba's table; Mamba-370M's 50.0 is printed for 51.7.

    GPT-Neo-2.7B's PIQA is 72.1 (Mamba's table, GPT-Neo's README): with TokenFormer's 71.1 its 56.5 does not come out.
    """
    rows = {row.model: row for row in read_published(PUBLISHED)}
    with_average = [row for row in rows.values() if row.printed_average is not None]
    assert len(with_average) == 15
    assert {row.model for row in with_average if row.is_misprinted(COLUMNS)} == {"Pythia-160M", "Mamba-370M"}
    assert rows["Pythia-160M"].average(COLUMNS) == pytest.approx(41.08, abs=0.005)
    assert rows["Pythia-160M (Mamba's figures)"].average(COLUMNS) == pytest.approx(40.63, abs=0.005)
    assert rows["GPT-Neo-2.7B"].average(COLUMNS) == pytest.approx(56.5, abs=0.005)
    assert all(row.sources.keys() == row.values.keys() and all(row.sources.values()) for row in rows.values())


def test_a_published_value_stands_under_its_own_metric() -> None:
    """OPT's PIQA in Mamba's table is acc_norm; acc is lm-eval's."""
    rows = {row.model: row for row in read_published(PUBLISHED)}
    for name, accuracy, normalized in (("OPT-1.3B", 71.71, 72.4), ("OPT-2.7B", 73.88, 74.8)):
        assert (rows[name].values["piqa:acc"], rows[name].values["piqa:acc_norm"]) == (accuracy, normalized)
    assert rows["OPT-1.3B"].source(["piqa:acc_norm"]).startswith("Mamba")
    assert rows["OPT-1.3B"].source(["piqa:acc"]).startswith("lm-eval")
    assert rows["OPT-125M"].average(COLUMNS) is None  # nobody published its HellaSwag with the others


def test_the_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_record(tmp_path / "results.json")
    assert main([str(path), "--output", str(tmp_path / "out" / "table")]) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert capsys.readouterr().out == text
    table, notes = text.split("\n\n")
    head, _, *lines = table.splitlines()
    assert "† Pythia-160M: the source prints 40.1; its figures give 41.1." in notes
    assert sum("†" in line for line in lines) == len(notes.splitlines()) == 2
    assert "| lambada_openai (acc) | hellaswag (acc_norm) |" in head
    (ours,) = [line for line in lines if "mine" in line]
    assert ours == (
        "| **mine/global_step10** | 152M | 50.0 | 40.0 | 50.0 | 50.0 | 40.0 | 50.0 | 46.7 | measured: results.json |"
    )
    assert sum("published: TokenFormer" in line and line.startswith("| *") for line in lines) == 14
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert rows["OPT-1.3B"]["kind"] == "published" and rows["OPT-1.3B"]["hellaswag:acc_norm"] == "53.7"
    assert float(rows["mine/global_step10"]["piqa:acc_stderr"]) == pytest.approx(1.0)
    assert image.imread(tmp_path / "out" / "table.png").std() > 0.01


def test_files_about_one_model_make_one_row(tmp_path: Path) -> None:
    older = write_record(tmp_path / "a.json", results={"piqa": {"acc,none": 0.1}, "winogrande": {"acc,none": 0.2}})
    newer = write_record(tmp_path / "b.json", results={"piqa": {"acc,none": 0.3}}, date="2026-02-01T00:00:00+0000")
    other = write_record(tmp_path / "c.json", config={"limit": 10, "num_fewshot": 5})
    rows = read_results([newer, older, other])
    assert [row.model for row in rows] == ["mine/global_step10", "mine/global_step10 (first 10 only, 5-shot)"]
    assert rows[0].values == pytest.approx({"piqa:acc": 30.0, "winogrande:acc": 20.0})
    assert rows[0].average(COLUMNS) is None


def test_other_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_record(tmp_path / "r.json", results={"lambada_openai": {"perplexity,none": 12.345}})
    flags = ["--columns", "lambada_openai:perplexity", "--without-published", "--output", str(tmp_path / "t")]
    assert main([str(path), *flags]) == 0
    assert "| **mine/global_step10** | 152M | 12.3 | - |" in capsys.readouterr().out


def test_figure_tells_measured_from_published(tmp_path: Path) -> None:
    rows = join(read_results([write_record(tmp_path / "r.json")]), read_published(PUBLISHED), COLUMNS)
    figure = draw(rows, COLUMNS)
    first = figure.axes[0]
    assert len(figure.axes) == len(COLUMNS) + 1
    assert [axes.get_xlabel() for axes in figure.axes[:2]] == ["acc [%]", "acc_norm [%]"]
    fills = [line.get_markerfacecolor() for line in first.lines if line.get_marker() == "o"]
    assert fills.count("white") == len(rows) - 1


@pytest.mark.parametrize(("content", "said"), [("{}", "not a results file"), ("[", "not a results file")])
def test_other_files(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(DataError, match=said):
        main([str(path)])


def test_columns_that_nobody_measured(tmp_path: Path) -> None:
    path = write_record(tmp_path / "r.json")
    with pytest.raises(DataError, match=r"no results file measured boolq:acc\. Measured: arc_challenge:acc"):
        main([str(path), "--columns", "boolq:acc"])
    with pytest.raises(ConfigError, match="'boolq' is not TASK:METRIC"):
        main([str(path), "--columns", "boolq"])
