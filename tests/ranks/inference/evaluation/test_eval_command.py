"""eval.py refuses a Hugging Face model that is not there, and one on several ranks; token_curve.py scores shares."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from megatron.checkpointing.store.checkpoint import Checkpoint
from tests.helpers.runs import run_ranks


def test_a_hugging_face_model_needs_one_rank(eval_config: Path, tmp_path: Path) -> None:
    finished = run_ranks(
        eval_config, "--hf_model", "x", "--eval_tasks", "piqa", ranks=2, script="eval", output=tmp_path
    )
    assert finished.code == 2
    assert "Add `num_gpus=1`" in finished.output and "Traceback" not in finished.output


def test_a_hugging_face_model_that_is_missing_is_named(eval_config: Path, eval_tasks: Path, tmp_path: Path) -> None:
    """lm-eval's adapter makes a process group of its rank, so it is given a process of its own."""
    finished = run_ranks(
        eval_config,
        *("--hf_model", "/nowhere/model", "--include_path", str(eval_tasks), "--eval_tasks", "zen_choice"),
        ranks=1,
        script="eval",
        output=tmp_path,
    )
    assert finished.code == 2
    assert "/nowhere/model cannot be loaded" in finished.output and "Traceback" not in finished.output


@pytest.mark.full
def test_a_curve_over_shares_has_tasks_and_answers_of_each_share(
    eval_config: Path, eval_checkpoint: Checkpoint, eval_tasks: Path, dataset: Path, tmp_path: Path
) -> None:
    finished = run_ranks(
        eval_config,
        *(f"load={eval_checkpoint.path}", f"data_path={dataset}", "eval_iters=1", "param_token_shares=[0.5, 1]"),
        *(f"eval_output={tmp_path / 'curve'}", f"eval_cache={tmp_path / 'cache'}"),
        *("--include_path", str(eval_tasks), "--eval_tasks", "zen_choice"),
        ranks=2,
        script="tools.token_curve",
        output=tmp_path,
    )
    assert finished.code == 0, finished.output
    with (tmp_path / "curve" / "token_curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["share"], row["task"]) for row in rows} == {
        (share, task) for share in ("0.5", "1.0") for task in ("validation", "zen_choice")
    }
    assert len(list((tmp_path / "cache").glob("*.jsonl"))) == 2, "each share has answers of its own"
    named = [json.loads(file.read_text())["model"] for file in (tmp_path / "curve").glob("*.json")]
    assert {model["name"].partition(" ")[2] for model in named} == {"", "param_token_share 0.5"}
    assert len({model["parameters"] for model in named}) == 2
