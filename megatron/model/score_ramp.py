"""Opens the scores of new parameter tokens step by step, after growth by mask_ramp."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from megatron.config.sections.growth import GrowthRecord
from megatron.model.new_rows import local_old_rows
from megatron.model.pattention import Pattention
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import parameter_spec


class ScoreRamp:
    """The multiplier on the scores of new tokens in all Pattentions of a rank; it follows from record and step."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        named: Iterable[tuple[str, nn.Parameter]],
        record: GrowthRecord,
        context: ParallelContext,
    ) -> None:
        """Takes the rank's modules, and its parameters by global name."""
        names = {parameter: name for name, parameter in named}
        self.record = record
        self._multiplier = 1.0
        self._layers = [
            (layer, local_old_rows(names[layer.key_tokens], parameter_spec(layer.key_tokens), record, context))
            for layer in modules
            if isinstance(layer, Pattention)
        ]

    def set_step(self, iteration: int) -> None:
        """Sets the multiplier that holds after `iteration` steps."""
        multiplier = self.record.score_multiplier(iteration)
        if multiplier == self._multiplier:
            return
        self._multiplier = multiplier
        for layer, old_tokens in self._layers:
            layer.open_scores(old_tokens, multiplier)
