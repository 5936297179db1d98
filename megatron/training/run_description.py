"""Describes a run for run.json: sizes, work per token, machine, code and configuration."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import distributed

from megatron.config.model_size import count_parameters, training_flops
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.errors import EnvironmentSetupError, os_errors_as
from megatron.io.durable import replace_durably
from megatron.model.causal_lm import VocabSize
from megatron.monitor.provenance import device_name, git_commit
from megatron.training.distillation.find_teacher import Teacher

RUN_FILE = "run.json"
RECORDED_PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers")


def describe_run(
    config: RunConfig,
    batch: BatchConfig,
    vocab: VocabSize,
    name: str,
    configuration: str,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Returns the content of run.json for a run called `name`, of the configuration that goes by `configuration`.

    The work per token includes the teacher's forward pass, which its own entry gives alone.
    """
    own_flops = training_flops(config.model, vocab.padded, config.model.seq_length)
    return {
        "name": name,
        "configuration": configuration,
        "parameters": count_parameters(config.model, vocab.padded),
        "flops_per_token": own_flops + (0 if teacher is None else teacher.flops_per_token),
        "tokens_per_step": batch.global_batch_size * config.model.seq_length,
        "ranks": distributed.get_world_size(),
        "device": device_name(),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in RECORDED_PACKAGES},
        **({} if teacher is None else {"teacher": teacher.describe()}),
        "config": config.model_dump(mode="json"),
    }


def write_description(description: Mapping[str, Any], folder: Path) -> None:
    """Writes run.json, whole or not at all; a link of that name is replaced itself.

    Raises EnvironmentSetupError where it cannot be written.
    """
    file = folder / RUN_FILE
    with os_errors_as(EnvironmentSetupError, str(file)):
        replace_durably(file, json.dumps(description, indent=1) + "\n")


def described_versions(description: dict[str, Any]) -> dict[str, str | None]:
    """Returns the versions of packages and code in `description`, as a checkpoint's manifest holds them."""
    return {"python": description["python"], "code": description["git_commit"], **description["packages"]}
