"""The benchmark of kernels at a size that takes a second: contenders agree, and what is left out is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.configs import PYTHIA, TOKENFORMER
from tests.helpers.tiny_checkpoints import write_yaml
from tools.benchmarks.benchmark_kernels import main


@pytest.mark.parametrize("model", [TOKENFORMER, PYTHIA], ids=["tokenformer", "pythia"])
def test_contenders_compute_the_same(
    model: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "kernels.json"
    arguments = ["--vocab-size", "500", "--rows", "24", "--rounds", "2", "--skip", "compile", "--output", str(output)]
    assert main([str(write_yaml(tmp_path, model)), *arguments]) == 0
    cases = {case["case"]: case for case in json.loads(output.read_text())["cases"]}
    of_pattention = ["query, key and value", "feed-forward", "rows of feed-forward scores"]
    assert list(cases) == [*(of_pattention if model is TOKENFORMER else []), "rotary positions", "head and loss"]
    for case in cases.values():
        for name, found in case["contenders"].items():
            assert len(found["seconds"]) == 2
            assert found["peak_bytes"] > 0 or name == case["limit"]
            assert (found["difference"] is None) == (name == case["limit"])
            assert found["difference"] is None or found["difference"] < 1e-5
    assert cases["rotary positions"]["left_out"].keys() <= {"triton"}
    printed = capsys.readouterr().out
    assert "whole logits" in printed
    assert ("interpreter tells results, not times" in printed) != torch.cuda.is_available()
    assert ("Times of a CPU say nothing about a GPU" in printed) != torch.cuda.is_available()
