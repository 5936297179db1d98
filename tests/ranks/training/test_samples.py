"""Samples of a run while it trains: those of its checkpoints, in any layout, and the run is the same as without."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.configs import PYTHIA, TOKENFORMER, layout_keys
from tests.helpers.records import records
from tests.helpers.runs import run_ranks, train
from tests.helpers.tensor_files import assert_same_checkpoint

PROMPTS = ["3 fox", "", "a long prompt that does not fit", "<b>&amp;"]
SAMPLING = {"maximum_tokens": 6, "temperature": 0.7, "top_k": 20}
STEPS = 6
OWN = {"train_iters": STEPS, "checkpoint_factor": 3, "hidden_dropout": 0.1, **SAMPLING}
BASE = TOKENFORMER | OWN
FULL = pytest.mark.full


def _samples(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def _generated(config: Path, run: Path, step: int, output: Path) -> list[str]:
    """What generate.py writes from a checkpoint of one step, for all prompts, on one rank."""
    prompts = output.with_suffix(".prompts")
    prompts.write_text("".join(f"{prompt}\x03" for prompt in PROMPTS))
    words = [f"load={run}", f"iteration={step}", "save=null", "model_parallel_size=1", "pipe_parallel_size=1"]
    words += ["text_gen_type=input-file", f"sample_input_file={prompts}", 'prompt_end="\\x03"']
    finished = run_ranks(config, *words, "sequence_parallel=false", f"sample_output_file={output}", script="generate")
    assert finished.code == 0, finished.output
    return [json.loads(line)["text"] for line in output.read_text().splitlines()]


@pytest.mark.parametrize(
    ("model", "layout", "more"),
    [
        pytest.param(BASE, (1, 2, 1), {}, id="two stages"),
        pytest.param(BASE, (2, 1, 1), {"sequence_parallel": True}, id="split sequences", marks=FULL),
        pytest.param(BASE, (1, 1, 2), {"no_weight_tying": True}, id="two replicas", marks=FULL),
        pytest.param(BASE, (2, 2, 1), {"fused_cross_entropy": "on"}, id="both, fused loss", marks=FULL),
        pytest.param(PYTHIA | OWN, (1, 1, 1), {}, id="pythia", marks=FULL),
    ],
)
def test_samples_are_those_of_checkpoints_and_change_nothing(
    write_config: Callable[..., Path], tmp_path: Path, model: dict[str, Any], layout: tuple[int, int, int], more: dict
) -> None:
    keys = model | layout_keys(*layout) | more
    ranks = layout[0] * layout[1] * layout[2]
    plain = write_config(keys, "plain")
    sampled = write_config(keys, "sampled", sample_prompts=PROMPTS, sample_interval=3)
    for config in (plain, sampled):
        train(config, ranks=ranks)
    for metric in ("train/lm_loss", "train/grad_norm"):
        assert records(tmp_path / "sampled", metric) == records(tmp_path / "plain", metric)
    assert_same_checkpoint(tmp_path / "sampled" / f"global_step{STEPS}", tmp_path / "plain" / f"global_step{STEPS}")
    found = _samples(tmp_path / "sampled")
    assert [(each["iteration"], each["prompt"]) for each in found] == [(s, p) for s in (3, 6) for p in PROMPTS]
    assert all(0 <= each["length"] <= 6 for each in found)
    assert len({each["text"] for each in found}) > 2
    # Of one rank, in float32: a token is another one only where two are equally likely.
    texts = _generated(sampled, tmp_path / "sampled", 3, tmp_path / "generated.jsonl")
    assert [each["text"] for each in found if each["iteration"] == 3] == texts


def test_a_run_that_goes_on_takes_the_samples_of_its_steps_once(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(BASE | {"eval_interval": 2}, "resumed", sample_prompts=PROMPTS[:1], checkpoint_factor=1000)
    assert run_ranks(config, "exit_interval=3").code == 75
    run = tmp_path / "resumed"
    assert [each["iteration"] for each in _samples(run)] == [2]
    (run / "samples.jsonl").open("a").write(json.dumps({"iteration": 4, "prompt": "", "text": "lost"}) + "\n")
    train(config, "auto_resume=true")
    assert [each["iteration"] for each in _samples(run)] == [2, 4, 6]
    assert "lost" not in (run / "samples.jsonl").read_text()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    noted = [(event["event"], event["iteration"]) for event in events]
    assert noted == [("start", 0), ("save", 3), ("stop", 3), ("resume", 3), ("save", 6), ("end", 6)]
    assert records(run, "train/sampling_seconds").keys() == {2, 4, 6}
