"""Rules that hold after a run's last growth while it trains on: by row, and for the scores of new tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from megatron.config.optimizer import OptimizerConfig
from megatron.config.sections.growth import GrowthRecord
from megatron.model.score_ramp import ScoreRamp
from megatron.mpu.context import ParallelContext
from megatron.training.row_rules import RowRules

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


class AfterGrowth:
    """The rules of one growth in one engine, as they are after a number of steps. Without a growth it does nothing."""

    def __init__(
        self, engine: PipelineEngine, record: GrowthRecord | None, section: OptimizerConfig, context: ParallelContext
    ) -> None:
        self._rows = None if record is None else RowRules(engine, record, section, context)
        self._ramp = (
            None
            if record is None
            else ScoreRamp(engine.module.modules(), engine.module.global_parameters(), record, context)
        )

    def set_step(self, iteration: int) -> None:
        """Sets what holds after `iteration` steps: for the step that follows, and for evaluations before it."""
        if self._rows is not None:
            self._rows.begin_step(iteration)
        if self._ramp is not None:
            self._ramp.set_step(iteration)

    def drop_frozen_gradients(self, slices: Sequence[Tensor]) -> None:
        """Makes the gradients of frozen rows zero, before they count in any norm, in the partitions of all groups."""
        if self._rows is not None:
            self._rows.drop_frozen_gradients(slices)
