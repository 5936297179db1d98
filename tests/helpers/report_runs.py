"""Folders of runs, as training leaves them, with all that a report shows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron.checkpointing.store.manifest import Manifest, describe_file, write_manifest
from megatron.config.load_config import load_config
from megatron.config.run_yaml import write_run_yaml
from tests.helpers.forkserver import ROOT

TOKENS_PER_STEP = 2048
FLOPS_PER_TOKEN = 4.8e6
RUN_ID = "0123456789abcdef"
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
"""Text that is a program where it is not escaped."""
PRIVATE_URL = "https://user:hunter2@store.example/data"
PROMPTS = ("def main(", "The history of", HOSTILE)


def make_run(
    folder: Path,
    *,
    steps: int = 400,
    every: int = 10,
    speed: float = 1.0,
    name: str | None = None,
    events: bool = True,
    **keys: object,
) -> Path:
    """Writes the folder of a run of configs/demo.yml with other `keys`; its curves follow from `speed`."""
    folder.mkdir(parents=True)
    words = [f"train_iters={steps}", f"save={folder}", *(f"{key}={value}" for key, value in keys.items())]
    loaded = load_config([ROOT / "configs" / "demo.yml"], words)
    write_run_yaml(loaded.given.text(), folder)
    description = {
        "name": folder.name,
        "configuration": name or folder.name,
        "parameters": 2_345_678,
        "flops_per_token": FLOPS_PER_TOKEN,
        "tokens_per_step": TOKENS_PER_STEP,
        "ranks": 4,
        "device": "NVIDIA H100 80GB HBM3",
        "git_commit": "c0ffee" * 6 + "c0ff",
        "python": "3.12.1",
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "config": loaded.run.model_dump(mode="json"),
    }
    (folder / "run.json").write_text(json.dumps(description))
    rows = [row(step, every, speed) for step in range(every, steps + 1, every)]
    rows[-1] |= {"test/lm_loss": 3.1}
    write_lines(folder / "metrics.jsonl", rows)
    if events:
        write_lines(folder / "events.jsonl", event_rows(steps))
    write_lines(folder / "samples.jsonl", sample_rows(steps))
    for step in (steps // 2, steps):
        make_checkpoint(folder, step)
    return folder


def row(step: int, every: int = 10, speed: float = 1.0) -> dict[str, Any]:
    """A row of metrics after a step; losses fall by a power law, with a little noise."""
    noise = 0.1 * math.sin(7.0 * step * speed)
    found: dict[str, Any] = {
        "iteration": step,
        "consumed_tokens": step * TOKENS_PER_STEP,
        "training_flops": step * TOKENS_PER_STEP * FLOPS_PER_TOKEN,
        "train/lm_loss": 2.4 + 9.0 * (speed * step) ** -0.4 + noise,
        "train/learning_rate": 3e-3 * min(step / 20.0, 1.0) * (0.55 + 0.45 * math.cos(step / 130.0)),
        "train/grad_norm": 0.8 + 4.0 / step**0.5 + noise,
        "train/skipped_steps": 0,
        "train/memory_gib": 11.5,
        "train/tokens_per_second": 52_000.0 * speed + 900.0 * noise,
        "train/step_seconds": 0.04,
        "train/data_wait_share": 0.05,
        "train/rank_seconds_min": 0.030,
        "train/rank_seconds_median": 0.034,
        "train/rank_seconds_max": 0.037,
        "train/slowest_rank": 2,
        "train/seconds_left": 12.0,
        "train/mfu": 0.41 + noise / 50.0,
    }
    if step % (10 * every) == 0:
        found |= {"valid/lm_loss": 2.5 + 9.0 * (speed * step) ** -0.4, "train/evaluation_seconds": 2.0}
        found |= {"valid/perplexity": math.exp(found["valid/lm_loss"]), "train/sampling_seconds": 0.5}
        found |= {"train/save_wait_seconds": 1.0}
    return found


def event_rows(steps: int) -> list[dict[str, Any]]:
    """Events of a run that was stopped, went on, met a NaN and rolled back."""
    half = steps // 2
    told = [
        ("start", 0, "starting from initial weights"),
        ("save", half, f"saved global_step{half}"),
        ("stop", half, "stopped by a signal or the limit on its duration"),
        ("resume", half, f"going on from {PRIVATE_URL}/global_step{half}, {half} steps done"),
        ("non_finite", half + 3, f"step {half + 3} was not finite, and was left out; 1 of this run so far"),
        ("rollback", half + 30, f"step {half + 30} was not finite: back to the last checkpoint"),
        ("resume", half, HOSTILE),
        ("save", steps, f"saved global_step{steps}"),
        ("end", steps, f"all {steps} steps are taken"),
    ]
    return [
        {"time": f"2026-03-04T05:{minute:02}:00+00:00", "event": kind, "iteration": step, "text": text}
        for minute, (kind, step, text) in enumerate(told)
    ]


def sample_rows(steps: int) -> list[dict[str, Any]]:
    """Samples of three prompts at twelve steps."""
    return [
        {
            "iteration": step,
            "prompt": prompt,
            "text": f" text after {step} steps {HOSTILE}",
            "length": 9,
            "finished": step == steps,
        }
        for step in range(steps // 12, steps + 1, steps // 12)
        for prompt in PROMPTS
    ]


def make_checkpoint(folder: Path, step: int) -> Path:
    """Writes a checkpoint's manifest and one file of 1,000 bytes."""
    path = folder / f"global_step{step}"
    path.mkdir()
    (path / "layer_00-model_00-model_states.pt").write_bytes(bytes(1000))
    files = {"layer_00-model_00-model_states.pt": describe_file(path / "layer_00-model_00-model_states.pt")}
    layout = {"tensor_parallel_size": 2, "pipe_parallel_size": 1, "data_parallel_size": 2}
    write_manifest(path, Manifest(RUN_ID, step, step, layout, "0" * 64, {"torch": "2.13.0"}, files))
    return path


def write_results(file: Path, step: int, accuracy: float) -> Path:
    """Writes a results file of eval.py for one checkpoint."""
    tasks = {task: {"acc,none": accuracy + 0.1 * number, "acc_stderr,none": 0.012, "alias": task}
             for number, task in enumerate(("arc_easy", "piqa"))}  # fmt: skip
    model = {"name": f"run/global_step{step}", "iteration": step, "tokens": step * TOKENS_PER_STEP, "run_id": RUN_ID}
    record = {"results": tasks, "model": model, "config": {"num_fewshot": 5, "limit": None}, "date": "2026-03-05"}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))
    return file


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Writes JSON lines."""
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
