"""The root of the configuration."""

from __future__ import annotations

from megatron.config.data import DataConfig
from megatron.config.evaluation import EvaluationConfig
from megatron.config.generation import GenerationConfig
from megatron.config.launch import LaunchConfig
from megatron.config.model import ModelConfig
from megatron.config.output import CheckpointConfig, MonitorConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.section import Section
from megatron.config.speedups import SpeedupsConfig
from megatron.config.training import TrainingConfig


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
    """JSON of the resolved configuration; `RunConfig.model_validate_json` reads it back."""
    return run.model_dump_json(indent=2)
