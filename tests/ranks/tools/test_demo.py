"""The demo, from a text to samples, and its folder in use afterwards."""

from __future__ import annotations

import json
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
    assert {path.name for path in demo.iterdir()} == {
        "data",
        "run",
        "loss.png",
        "samples.jsonl",
        "demo.yml",
        "report.html",
    }
    assert "held-out loss, TokenFormer" in finished.stdout
    assert f"report, for a browser    {tmp_path / 'demo-mine' / 'report.html'}" in finished.stdout
    assert "Curves" in (demo / "report.html").read_text()
    # All paths in the configuration and in the run are those of the folder that it has been moved to.
    more = [*SHORT[1:], "train_iters=6", "override_lr_scheduler=true", "auto_resume=true", "num_workers=0"]
    finished = run_command(["deepy.py", "train.py", "demo-mine/demo.yml", *more], folder=tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "4 steps done" in finished.stderr
    assert (demo / "run" / "global_step6").is_dir()


@pytest.mark.full
def test_a_demo_in_a_given_time_measures_and_says_why(tmp_path: Path) -> None:
    words = np.random.default_rng(0).choice(["the", "fox", "jumps", "over", "lazily"], size=(400, 30))
    text = tmp_path / "mine.txt"
    text.write_text("\n\n".join(map(" ".join, words)))
    demo = tmp_path / "demo"
    finished = run_command(
        ["tools/demo.py", "--text", str(text), "--output-dir", str(demo), "--minutes", "4", "maximum_tokens=4"]
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "chosen for this machine and this text:" in finished.stdout
    config = (demo / "demo.yml").read_text()
    assert "16 passes over the text, after which more of them teach little" in config
    assert "\nhidden_size: 64\n" in config
    assert {path.name for path in demo.iterdir()} == {
        "data",
        "run",
        "loss.png",
        "samples.jsonl",
        "demo.yml",
        "report.html",
    }
    prompts = {json.loads(line)["prompt"] for line in (demo / "run" / "samples.jsonl").read_text().splitlines()}
    assert len(prompts) == 3
    assert all(set(prompt.split()) <= {"the", "fox", "jumps", "over", "lazily"} for prompt in prompts)
