"""The benchmark of generation compares like with like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron.errors import ConfigError
from tests.helpers.configs import PYTHIA, TOKENFORMER
from tools.benchmarks.benchmark_generation import main

LENGTHS = ["--prompt-tokens", "5", "--new-tokens", "6", "--batch", "2", "--rounds", "2", "--vocab-size", "500"]


@pytest.mark.parametrize("settings", [TOKENFORMER, PYTHIA])
def test_both_generate_the_same_tokens(
    settings: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yml"
    config.write_text(yaml.safe_dump(settings))
    assert main([str(config), *LENGTHS, "--output", str(tmp_path / "out" / "report.json")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["same_tokens"]
    for name, seconds in report["seconds"].items():
        assert len(seconds) == 2
        assert report["tokens_per_second"][name] == pytest.approx(2 * 6 / (sum(seconds) / 2))
    ours, theirs = report["seconds"].values()
    assert report["ratios"] == [pytest.approx(b / a) for a, b in zip(ours, theirs, strict=True)]
    printed = capsys.readouterr().out
    assert "2 prompts of 5 tokens, 6 new tokens each" in printed and "the same tokens" in printed


def test_lengths_beyond_the_context(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yml"
    config.write_text(yaml.safe_dump(TOKENFORMER))
    with pytest.raises(ConfigError, match="more than seq_length 16"):
        main([str(config), "--prompt-tokens", "10", "--new-tokens", "7", "--vocab-size", "500"])
