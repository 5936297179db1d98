"""Writes a stream of layers as a checkpoint of any model, layout and precision."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from megatron.checkpointing.states import universal_info
from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.parameter_layout import LayerLayout, ParallelSizes, layer_layouts, split
from megatron.checkpointing.states.read_states import StateReader, layer_file
from megatron.checkpointing.states.read_zero_files import EngineState
from megatron.checkpointing.states.stage_parameters import stage_parameters
from megatron.checkpointing.states.write_zero_files import StageFiles
from megatron.checkpointing.store.manifest import FileEntry
from megatron.checkpointing.store.publish import begin, complete
from megatron.checkpointing.store.run_state import RunState
from megatron.checkpointing.store.tensor_files import write_tensors
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import padded_vocab_size
from megatron.errors import CheckpointError
from megatron.model.causal_lm import VocabSize
from megatron.mpu.parameters import DTYPES, ParameterSpec


@dataclass(frozen=True)
class RunHeader:
    """Part of a checkpoint that speaks of its run rather than of a layer."""

    state: RunState
    """Where the run stands; its parallel sizes and padded vocabulary are set by who writes it."""
    run_id: str
    versions: Mapping[str, str | None]
    """Of the packages and the code that made the checkpoint."""
    engine: EngineState | None = None
    """What DeepSpeed's engine goes on with; None for weights alone."""

    @staticmethod
    def of(reader: StateReader) -> RunHeader:
        """Returns what the checkpoint that is being read says of its run."""
        checkpoint = reader.checkpoint
        manifest = checkpoint.manifest
        return RunHeader(checkpoint.state, manifest.run_id, manifest.versions, reader.engine_state)

    @staticmethod
    def new(vocab_size: int, versions: Mapping[str, str | None]) -> RunHeader:
        """Returns the header of a run at step 0, for weights that come from elsewhere; `vocab_size` in [tokens]."""
        state = RunState(
            iteration=0,
            consumed_train_samples=0,
            consumed_valid_samples=0,
            schedule_steps=0,
            non_finite_steps=0,
            train_index_samples=0,
            valid_index_samples=0,
            data_fingerprint={},
            tensor_parallel_size=1,
            pipe_parallel_size=1,
            data_parallel_size=1,
            vocab_size=vocab_size,
            padded_vocab_size=vocab_size,
        )
        return RunHeader(state, secrets.token_hex(8), versions)


def write_states(
    states: Iterable[LayerState], config: RunConfig, sizes: ParallelSizes, output: Path, header: RunHeader
) -> Path:
    """Writes `output`/global_stepN and `latest` as a run of `config` on `sizes` ranks would have; returns the path.

    Layers come in the order of the pipeline, and one is in memory at a time. Where they bring what the optimizer keeps,
    weights are the optimizer's in the configured precision; otherwise they keep their format, and the checkpoint holds
    weights alone. A failure at any moment leaves `output` as it was. Raises CheckpointError when the layers are not
    those of the configured model, or do not split over the ranks.
    """
    vocab = VocabSize(header.state.vocab_size, padded_vocab_size(config.model, header.state.vocab_size))
    state = replace(
        header.state,
        tensor_parallel_size=sizes.tensor,
        pipe_parallel_size=sizes.pipe,
        data_parallel_size=sizes.data,
        padded_vocab_size=vocab.padded,
    )
    temporary = begin(output, state.iteration)
    try:
        files = _ShardedFiles(temporary, config, sizes, vocab, header.engine)
        for layer in states:
            files.add(layer)
            del layer  # or it would stay until the next one is read
        return complete(
            temporary, files.finished(), state, config, run_id=header.run_id, versions=header.versions
        )  # fmt: skip
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone by then, under its own name, unless something failed


class _ShardedFiles:
    """The tensor files of a checkpoint on their way: weights by layer, the optimizer's state by pipeline stage."""

    def __init__(
        self, folder: Path, config: RunConfig, sizes: ParallelSizes, vocab: VocabSize, engine: EngineState | None
    ) -> None:
        self.folder = folder
        self.config = config
        self.sizes = sizes
        if engine is not None:
            info = {universal_info.KEY: universal_info.universal_info(config, vocab)}
            engine = replace(engine, counters=dict(engine.counters) | info)
        self.engine = engine
        self._layouts = {layout.name: layout for layout in layer_layouts(config.model, vocab)}
        self._written: dict[str, FileEntry] = {}
        self._stages: list[StageFiles] = []
        if engine is not None:
            stages = enumerate(stage_parameters(config, vocab, sizes))
            self._stages = [StageFiles(folder, stage, own, sizes, config.training) for stage, own in stages]

    def add(self, layer: LayerState) -> None:
        """Writes a layer's weights, and takes what the optimizer keeps of it."""
        layout = self._layouts.pop(layer.name, None)
        if layout is None:
            raise CheckpointError(f"{layer.name} is no layer of the configured model, or comes twice.")
        _require_parameters(layer, layout)
        for tensor_rank in range(self.sizes.tensor):
            shares = {local: self._share(layer[local], spec, tensor_rank) for local, spec in layout.parameters.items()}
            file = layer_file(self.folder, layout.index, tensor_rank)
            self._written[file.name] = write_tensors(shares, file)
        for stage in self._stages:
            for name, parameter in layer.by_global_name():
                stage.add(name, parameter)
        self._write_complete_stages()

    def finished(self) -> dict[str, FileEntry]:
        """Returns all files. Raises CheckpointError when a layer is missing."""
        if self._layouts:
            raise CheckpointError(f"layers of the configured model are missing: {', '.join(self._layouts)}.")
        return self._written

    def _share(self, parameter: ParameterState, spec: ParameterSpec, tensor_rank: int) -> Tensor:
        if parameter.master is None or self.engine is None:
            share = split(parameter.weight, spec, self.sizes.tensor)[tensor_rank]
            dtype = parameter.weight.dtype
        else:
            share = split(parameter.master, spec, self.sizes.tensor)[tensor_rank]
            dtype = DTYPES[self.config.training.precision.dtype]
        # A copy: torch.save writes all of the memory that a view is of.
        return share.to(dtype, copy=True).contiguous()

    def _write_complete_stages(self) -> None:
        for stage in [stage for stage in self._stages if stage.is_complete]:
            if self.engine is not None:
                self._written |= stage.write(self.engine)
            self._stages.remove(stage)


def _require_parameters(layer: LayerState, layout: LayerLayout) -> None:
    missing = layout.parameters.keys() - layer.parameters.keys()
    left_over = layer.parameters.keys() - layout.parameters.keys()
    if missing or left_over:
        raise CheckpointError(
            f"the weights of {layer.name} are not those of the configured model: missing "
            f"{', '.join(sorted(missing)) or 'none'}; left over {', '.join(sorted(left_over)) or 'none'}."
        )
    for local, spec in layout.parameters.items():
        shape = tuple(layer[local].weight.shape)
        if shape != spec.full_shape:
            raise CheckpointError(
                f"{layout.global_name(local)} has shape {shape}; the configuration describes {spec.full_shape}."
            )
