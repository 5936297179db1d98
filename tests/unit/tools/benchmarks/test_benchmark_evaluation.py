"""The evaluation benchmark at a size that takes a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.tiny_checkpoints import write_yaml
from tools.benchmarks.benchmark_evaluation import main, make_requests


@pytest.mark.parametrize("model", [TOKENFORMER, PYTHIA], ids=["tokenformer", "pythia"])
def test_both_adapters_give_the_same_answers(
    model: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "report.json"
    flags = ["--questions", "3", "--rounds", "2", "--batch-size", "2", "--output", str(output)]
    assert main([str(write_yaml(tmp_path, model)), *flags]) == 0
    report = json.loads(output.read_text())
    assert {kind: found["requests"] for kind, found in report["kinds"].items()} == {
        "four endings": 12,
        "four letters": 12,
        "whole windows": 3,
    }
    for found in report["kinds"].values():
        assert found["largest_difference"] < 1e-4
        assert [len(values) for values in found["seconds"].values()] == [2, 2]
        assert min(found["requests_per_second"].values()) > 0.0
    assert "ours over lm-eval hf" in capsys.readouterr().out


def test_requests_fit_the_context() -> None:
    for requests in make_requests(5, vocab_size=7, context_length=100, seed=0).values():
        assert all(len(context) + len(ending) <= 101 for _, context, ending in requests)
        assert all(0 <= token < 7 for _, context, ending in requests for token in context + ending)
