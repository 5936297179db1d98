"""Reads a checkpoint's layers, whole and by name, whatever layout and precision wrote them, without an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.parameter_layout import LayerLayout, layer_layouts, merge
from megatron.checkpointing.states.read_zero_files import EngineState, ZeroFiles
from megatron.checkpointing.states.tensor_folder import named_tensors
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.errors import CheckpointError


def read_states(checkpoint: Checkpoint, *, optimizer: bool = True) -> Iterator[LayerState]:
    """Yields the layers that own parameters, in the order of the pipeline; a layer is in memory at a time.

    What the optimizer keeps comes along unless `optimizer` is false, or the checkpoint holds weights alone. Raises
    CheckpointError when a file is missing, damaged or unsafe, when a parameter is missing, left over or of another
    shape than the configuration describes, and when replicas differ.
    """
    reader = StateReader(checkpoint, optimizer=optimizer)
    for layout in reader.layouts:
        yield reader.read(layout)


class StateReader:
    """Reads single layers of a checkpoint, as `read_states` reads all."""

    def __init__(self, checkpoint: Checkpoint, *, optimizer: bool = True) -> None:
        self.checkpoint = checkpoint
        model, files = checkpoint.config.model, checkpoint.manifest.files
        # Layouts are built of all layers that the configuration claims.
        if model.num_layers > sum(name.startswith("layer_") for name in files):
            raise CheckpointError(
                f"{checkpoint.path}: its configuration has {model.num_layers:,} layers, more than it has files. It is "
                "damaged, or not of this trainer."
            )
        self.layouts = layer_layouts(model, checkpoint.vocab)
        self._has_optimizer = optimizer and not checkpoint.holds_weights_alone

    @cached_property
    def _zero_files(self) -> ZeroFiles | None:
        return ZeroFiles(self.checkpoint, self.layouts) if self._has_optimizer else None

    @property
    def engine_state(self) -> EngineState | None:
        """Returns the engine's part of the checkpoint, the same for all ranks; None for weights alone."""
        return None if self._zero_files is None else self._zero_files.engine_state()

    def read(self, layout: LayerLayout) -> LayerState:
        """Returns one layer's state. Raises CheckpointError as `read_states` does."""
        weights = _merged_weights(self.checkpoint, layout)
        if self._zero_files is None:
            return LayerState(layout.name, {local: ParameterState(weight) for local, weight in weights.items()})
        return LayerState(layout.name, self._zero_files.read(layout, weights))


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Returns every weight of the model by global name. Raises CheckpointError as `read_states` does."""
    layers = read_states(checkpoint, optimizer=False)
    return {name: weight for layer in layers for name, weight in layer.weights().items()}


def layer_file(folder: Path, layer: int, tensor_rank: int) -> Path:
    """Returns the path of one pipeline layer's weights for one tensor-parallel rank, as DeepSpeed names it."""
    return folder / f"layer_{layer:02d}-model_{tensor_rank:02d}-model_states.pt"


def _merged_weights(checkpoint: Checkpoint, layout: LayerLayout) -> dict[str, Tensor]:
    """Returns a layer's weights by local name; memory-mapped where nothing had to be merged."""
    files = [layer_file(checkpoint.path, layout.index, rank) for rank in range(checkpoint.state.tensor_parallel_size)]
    shards = [_named_weights(file, layout) for file in files]
    weights = {}
    for local, spec in layout.parameters.items():
        try:
            weights[local] = merge([shard[local] for shard in shards], spec)
        except CheckpointError as error:
            raise CheckpointError(
                f"{files[0]}: {layout.global_name(local)}: {error}. The checkpoint's weights are not those of its "
                "configuration."
            ) from error
    return weights


def _named_weights(file: Path, layout: LayerLayout) -> Mapping[str, Tensor]:
    shard = named_tensors(load_tensors(file), file)
    missing, left_over = layout.parameters.keys() - shard.keys(), shard.keys() - layout.parameters.keys()
    if missing or left_over:
        raise CheckpointError(
            f"{file} does not hold the weights that its configuration describes: missing "
            f"{', '.join(sorted(missing)) or 'none'}; left over {', '.join(sorted(left_over)) or 'none'}."
        )
    return shard
