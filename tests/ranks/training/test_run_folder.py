"""A run's folder in place of its YAML: training goes on there, and what was trained speaks, also elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.helpers.configs import TOKENFORMER
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, train


def test_a_run_goes_on_by_its_folder_alone(write_config: Callable[..., Path], tmp_path: Path) -> None:
    whole = write_config(TOKENFORMER, "whole", train_iters=6, lr_decay_iters=4)
    train(whole)
    config = write_config(TOKENFORMER, "first", lr_decay_iters=None)
    train(config, "train_iters=4")
    config.unlink()
    folder = (tmp_path / "first").rename(tmp_path / "moved")

    said = train(folder, "train-iters=+2", output=tmp_path)

    assert "train_iters: 4, and 2 more: 6" in said
    assert not (tmp_path / "first").exists()
    kept = yaml.safe_load((folder / "run.yml").read_text())
    assert (kept["train_iters"], kept["lr_decay_iters"], kept["save"]) == (6, 4, str(folder))
    for key in ("train/learning_rate", "train/lm_loss", "train/grad_norm"):
        assert records(folder, key) == records(tmp_path / "whole", key), key

    again = train(folder, output=tmp_path)
    assert "nothing to do, 6 of 6" in again


def test_its_checkpoints_are_loaded_and_a_prompt_is_continued_as_text(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    train(write_config(TOKENFORMER, "tiny", train_iters=2, checkpoint_factor=1))
    run = (tmp_path / "tiny").rename(tmp_path / "run")
    text = run_ranks(run, "prompt=def main", "maximum_tokens=5", script="generate", output=tmp_path)
    assert text.code == 0, text.output
    assert "def main" in text.output and '"context"' not in text.output
    logits = []
    for words in ((), ("iteration=1",)):
        file = tmp_path / f"samples{len(words)}"
        asked = ("prompt=ab", "return_logits=true", f"sample_output_file={file}")
        finished = run_ranks(run, *asked, *words, script="generate", output=tmp_path)
        assert finished.code == 0, finished.output
        record = json.loads(file.read_text())
        assert record["context"] == "ab"
        logits.append(record["logits"][0])
    assert logits[0] != logits[1]
