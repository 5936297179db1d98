"""The benchmark compares like with like, and computes its figures rightly."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron.errors import DataError
from tests.helpers.configs import BENCHMARKED
from tools.benchmarks.benchmark_training import main


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yml"
    path.write_text(yaml.safe_dump(BENCHMARKED))
    return path


@pytest.mark.full
def test_both_take_the_same_steps(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "reports" / "benchmark.json"
    arguments = ["--vocab-size", "100", "--steps", "2", "--rounds", "2", "--output", str(output)]
    assert main([str(config), "weight_decay=0.1", *arguments]) == 0
    report = json.loads(output.read_text())
    # Six steps of the same losses: same weights, tokens, accumulation, clipping, optimizer and learning rate.
    assert report["largest_loss_difference"] < 1e-6
    assert report["first_loss"]["engine"] == pytest.approx(torch.tensor(112.0).log().item(), abs=0.2)
    assert report["parameters"] == 112 * 32 + 3 * 2 * 32 * (3 * 32 + 32 + 64) + 2 * 32
    assert report["config"] == [str(config), "weight_decay=0.1"]
    for result in report["results"].values():
        assert len(result["step_seconds"]) == 2
        assert result["tokens_per_second"] == pytest.approx(result["steps_per_second"] * 2 * 4 * 16)
        assert 0.05 < result["peak_memory_gib"] < 100
    printed = capsys.readouterr().out
    assert "engine over plain torch" in printed
    assert str(output) in printed


@pytest.mark.full
def test_what_a_contender_meets_is_reported_as_training_reports_it(config: Path) -> None:
    with pytest.raises(DataError, match="nothing/here"):
        main([str(config)])


@pytest.mark.full
def test_peers_take_turns(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "peers.json"
    arguments = ["--peers", "--vocab-size", "100", "--steps", "1", "--rounds", "1", "--output", str(output)]
    assert main([str(config), *arguments]) == 0
    results = json.loads(output.read_text())["results"]
    assert results["engine"]["first_loss"] == pytest.approx(results["published operations"]["first_loss"], abs=1e-6)
    ours, theirs = results["Transformer, engine"], results["Transformer, transformers"]
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], abs=1e-5)
    assert ours["parameters"] == theirs["parameters"]
    assert "engine is faster by" in capsys.readouterr().out
