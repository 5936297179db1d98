"""What a run writes about itself: its description once, its metrics as it goes."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import distributed

from megatron.config.model_size import training_flops
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.model.causal_lm import VocabSize
from megatron.monitor.device_peaks import peak_flops
from megatron.monitor.monitor import Monitor, build_monitor
from megatron.monitor.provenance import device_name, git_commit
from megatron.monitor.throughput import Throughput

RUN_FILE = "run.json"
RECORDED_PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers")


def describe_run(config: RunConfig, batch: BatchConfig, vocab: VocabSize, name: str, parameters: int) -> dict[str, Any]:
    """What run.json holds: sizes, work per token, and what the run was made with."""
    return {
        "name": name,
        "parameters": parameters,
        "flops_per_token": training_flops(config.model, vocab.padded, config.model.seq_length),
        "tokens_per_step": batch.global_batch_size * config.model.seq_length,
        "ranks": distributed.get_world_size(),
        "device": device_name(),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in RECORDED_PACKAGES},
        "config": config.model_dump(mode="json"),
    }


def recorded_versions(description: dict[str, Any]) -> dict[str, str | None]:
    """What a checkpoint's manifest says of the packages and the code, from what run.json says."""
    return {"python": description["python"], "code": description["git_commit"], **description["packages"]}


@contextmanager
def open_record(
    config: RunConfig, description: dict[str, Any], folder: Path, *, iteration: int
) -> Iterator[tuple[Monitor, Throughput]]:
    """Write run.json into `folder` and open the metric writers, on rank 0; closes them at the end.

    Yields the monitor and a throughput meter whose clock starts now. `iteration` is where the run starts.
    """
    rank = distributed.get_rank()
    with build_monitor(
        config.monitor,
        folder,
        rank=rank,
        run_name=description["name"],
        total_iterations=config.training.train_iters,
        resume_iteration=iteration,
        config_dump=description["config"],
    ) as monitor:
        if rank == 0:
            (folder / RUN_FILE).write_text(json.dumps(description, indent=1) + "\n")
        peak = peak_flops(description["device"], config.training.precision.dtype)
        yield (
            monitor,
            Throughput(
                tokens_per_step=description["tokens_per_step"],
                iteration=iteration,
                total_iterations=config.training.train_iters,
                flops_per_token=description["flops_per_token"],
                peak_flops=None if peak is None else peak * description["ranks"],
            ),
        )
