"""The demo, from a text to samples, and its folder in use afterwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.commands import run_command

SHORT = ["train_iters=4", "lr_decay_iters=4", "eval_interval=4", "eval_iters=1", "log_interval=2", "maximum_tokens=4"]


@pytest.mark.full
def test_a_demo_of_a_text_is_whole_and_goes_on(tmp_path: Path) -> None:
    words = np.random.default_rng(0).choice(["the", "fox", "jumps", "over", "lazily"], size=(300, 30))
    text = tmp_path / "my text.txt"
    text.write_text("\n\n".join(map(" ".join, words)))
    finished = run_command(["tools/demo.py", "--text", str(text), "--output-dir", str(tmp_path / "demo-mine"), *SHORT])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo-mine", "my text.txt"]
    demo = tmp_path / "demo-mine"
    assert {path.name for path in demo.iterdir()} == {"data", "run", "loss.png", "samples.jsonl", "demo.yml"}
    assert "held-out loss, TokenFormer" in finished.stdout
    # All paths in the configuration and in the run are those of the folder that it has been moved to.
    more = [*SHORT[1:], "train_iters=6", "override_lr_scheduler=true", "auto_resume=true", "num_workers=0"]
    finished = run_command(["deepy.py", "train.py", "demo-mine/demo.yml", *more], folder=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "4 steps done" in finished.stderr
    assert (demo / "run" / "global_step6").is_dir()
