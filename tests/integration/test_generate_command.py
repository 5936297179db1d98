"""`python deepy.py generate.py`: prompts in, JSON lines out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import run_ranks, train
from tests.integration.conftest import run_command


def test_samples_follow_their_prompts(write_config: Callable[..., Path], tmp_path: Path) -> None:
    config = write_config(TOKENFORMER, train_iters=2)
    train(config)
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out" / "samples.jsonl"
    prompts.write_text("Two words\nthree more words\n")
    settings = ["text_gen_type=input-file", f"sample_input_file={prompts}", f"sample_output_file={output}"]
    more = ["temperature=1.0", "top_k=20", "maximum_tokens=6", "num_samples=2"]
    command = ["deepy.py", "generate.py", str(config), f"load={config.with_suffix('')}", *settings, *more]
    finished = run_command(command)
    assert finished.returncode == 0, finished.stderr
    first = output.read_text()
    records = [json.loads(line) for line in first.splitlines()]
    assert [record["context"] for record in records] == ["Two words"] * 2 + ["three more words"] * 2
    assert len({record["text"] for record in records}) > 1
    assert run_ranks(config, *command[3:], script="generate").code == 0
    assert output.read_text() == first, "the same seed samples the same text"


def test_nothing_to_sample_from(write_config: Callable[..., Path]) -> None:
    finished = run_ranks(write_config(TOKENFORMER), script="generate")
    assert finished.code == 1
    assert "holds no checkpoint to read" in finished.output and "Traceback" not in finished.output
