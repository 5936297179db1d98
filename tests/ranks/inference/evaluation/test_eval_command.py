"""eval.py refuses a Hugging Face model that is not there, and one on several ranks."""

from __future__ import annotations

from pathlib import Path

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
