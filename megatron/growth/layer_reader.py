"""Reads the layers of a trained model by name: what growth and inheriting make theirs of."""

from __future__ import annotations

from megatron.checkpointing.states.fold_ramp import fold_ramp
from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.read_states import StateReader
from megatron.checkpointing.states.write_states import RunHeader
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.optimizer import facts_of


class LayerReader:
    """Reads a checkpoint's layers by name, each as a model without an unfinished ramp has it."""

    def __init__(self, source: Checkpoint, *, optimizer: bool = True) -> None:
        self.checkpoint = source
        self._reader = StateReader(source, optimizer=optimizer)
        self._layouts = {layout.name: layout for layout in self._reader.layouts}
        self._squared_moments = facts_of(source.config.training.optimizer).squared_moments
        self.header = RunHeader.of(self._reader)

    @property
    def names(self) -> list[str]:
        """Returns the names of all layers in the order of the pipeline."""
        return list(self._layouts)

    def read(self, name: str) -> LayerState:
        """Returns the layer of a name, such as `layers.3`. Raises CheckpointError as `read_states` does."""
        return fold_ramp(self._reader.read(self._layouts[name]), self.header.state, self._squared_moments)
