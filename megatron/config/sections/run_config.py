"""The root of the configuration."""

from __future__ import annotations

from typing import Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from megatron.config.section import Section
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.data import DataConfig
from megatron.config.sections.distillation import DistillationConfig
from megatron.config.sections.elastic import ElasticConfig
from megatron.config.sections.evaluation import EvaluationConfig
from megatron.config.sections.generation import GenerationConfig
from megatron.config.sections.grow import GrowConfig
from megatron.config.sections.inherit import InheritConfig
from megatron.config.sections.launch import LaunchConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.monitor import MonitorConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.reading import ReadingConfig
from megatron.config.sections.speedups import SpeedupsConfig
from megatron.config.sections.training import TrainingConfig
from megatron.config.sections.watchdog import WatchdogConfig

OPTIONAL_SECTIONS = ("grow", "inherit", "distillation", "elastic", "reading")
"""Sections that a run has only where its configuration says something in them."""


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
    watchdog: WatchdogConfig = WatchdogConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    grow: GrowConfig | None = None
    inherit: InheritConfig | None = None
    distillation: DistillationConfig | None = None
    elastic: ElasticConfig | None = None
    reading: ReadingConfig | None = None

    @model_serializer(mode="wrap")
    def _without_unused_sections(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Configurations without them are saved as they were before these sections existed, for older versions to read.
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if name not in OPTIONAL_SECTIONS or value is not None}


def config_text(run: RunConfig) -> str:
    """Returns the resolved configuration as JSON; `RunConfig.model_validate_json` reads it back."""
    return run.model_dump_json(indent=2)
