"""The root of the configuration."""

from __future__ import annotations

from megatron.config.section import Section
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.data import DataConfig
from megatron.config.sections.evaluation import EvaluationConfig
from megatron.config.sections.generation import GenerationConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.monitor import MonitorConfig
from megatron.config.sections.parallel import LaunchConfig, ParallelConfig
from megatron.config.sections.speedups import SpeedupsConfig
from megatron.config.sections.training import TrainingConfig


class RunConfig(Section):
    """Everything that decides what a run computes and where it leaves its results."""

    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    training: TrainingConfig
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()
    launch: LaunchConfig = LaunchConfig()
    speedups: SpeedupsConfig = SpeedupsConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


def config_text(run: RunConfig) -> str:
    """Returns the resolved configuration as JSON; `RunConfig.model_validate_json` reads it back."""
    return run.model_dump_json(indent=2)
