"""eval.py on several ranks refuses a Hugging Face model."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.runs import run_ranks


def test_a_hugging_face_model_needs_one_rank(eval_config: Path, tmp_path: Path) -> None:
    finished = run_ranks(
        eval_config, "--hf_model", "x", "--eval_tasks", "piqa", ranks=2, script="eval", output=tmp_path
    )
    assert finished.code == 2
    assert "Add `num_gpus=1`" in finished.output and "Traceback" not in finished.output
