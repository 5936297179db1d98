"""The benchmark of shares at a size that takes a second: each is timed beside the whole, and its FLOPs counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.configs import TOKENFORMER
from tests.helpers.tiny_checkpoints import write_yaml
from tools.benchmarks.benchmark_elastic import main


def test_every_share_is_timed_beside_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "elastic.json"
    arguments = ["--vocab-size", "500", "--rows", "32", "--rounds", "2", "--shares", "0.5", "--output", str(output)]
    assert main([str(write_yaml(tmp_path, TOKENFORMER)), *arguments]) == 0
    report = json.loads(output.read_text())
    half, whole = report["shares"]
    assert (half["share"], whole["share"], whole["ratio"], whole["flops_ratio"]) == (0.5, 1.0, 1.0, 1.0)
    assert report["rows"] == 32 and len(half["seconds"]) == 2
    weights, attention = 2 * 2 * 32 * (3 * 24 + 40 + 48), 4 * 32 * 16
    assert half["flops_ratio"] == pytest.approx((weights / 2 + attention) / (weights + attention))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]] == ["share", "0.5", "1"]
