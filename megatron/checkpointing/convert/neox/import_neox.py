"""Imports a checkpoint of GPT-NeoX, or published TokenFormer weights: weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron.checkpointing.convert.imported_weights import imported_vocabulary, require_finite, with_configured_rows
from megatron.checkpointing.convert.neox.neox_architecture import NEOX_ARCHITECTURES, GroupedRows
from megatron.checkpointing.convert.neox.neox_files import NeoxFiles, open_neox
from megatron.checkpointing.convert.neox.neox_merge import NeoxMerger
from megatron.checkpointing.convert.neox.neox_model import model_of, require_same_model
from megatron.checkpointing.convert.neox.neox_names import deciding_key, neox_names
from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.name_map import our_names
from megatron.checkpointing.states.parameter_layout import LayerLayout, ParallelSizes, layer_layouts
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError
from megatron.io.durable import new_folder
from megatron.model.causal_lm import VocabSize

RowBiases = Literal["sum", "replicas"]
"""What tensor-parallel ranks hold of the biases of row-parallel matrices: parts that are summed, or the same."""


@dataclass(frozen=True)
class ImportedNeox:
    """Report of an import."""

    source: Path
    tensor_parallel_size: int
    """Ranks that the source was split over."""
    num_parameters: int
    dtype: torch.dtype
    source_rows: int
    """Vocabulary rows of the source."""
    vocab: VocabSize
    differing: dict[str, float]
    """Replicated parameters whose ranks differed, and by how much at most; they were averaged."""
    row_biases: RowBiases | None
    """How biases of row-parallel matrices were merged; None where there was none, or one rank."""


def import_neox(
    source: Path,
    run: RunConfig,
    output: Path,
    progress: Callable[[int, int], None],
    row_biases: RowBiases | None = None,
    grouped_rows: GroupedRows | None = None,
) -> ImportedNeox:
    """Writes `output`/global_step0 and `latest`, in the source's number format; calls `progress(done, layers)`.

    A format for each tensor becomes the narrowest that holds all of them exactly. A layer is in memory at a time. Each
    tensor is one parameter of the configured model, or it is an error; where anything fails, no folder is left. Under
    `gpt_j_residual` each tensor-parallel rank adds its own bias of a row-parallel matrix before the outputs are summed,
    so the model's is their sum; elsewhere they are replicas. `row_biases` decides otherwise. `grouped_rows` says how
    packed queries, keys and values are ordered where the tensors do not tell. Raises ConfigError when it has to, or
    the configuration describes another model, CheckpointError for damaged, unsafe or unknown tensors, DataError without
    the configured tokenizer.
    """
    states = NeoxStates(source, run, row_biases, grouped_rows)
    with new_folder(output) as temporary:
        header = RunHeader.new(states.vocab.actual, {"torch": version("torch")})
        write_states(states.read(progress), run, ParallelSizes(), temporary, header)
    return states.report()


class NeoxStates:
    """The layers of a foreign checkpoint under our names."""

    def __init__(
        self, source: Path, run: RunConfig, row_biases: RowBiases | None, grouped_rows: GroupedRows | None = None
    ) -> None:
        """Opens the files. Raises what `import_neox` raises."""
        packed = open_neox(source, allow_unsafe=run.checkpoint.allow_unsafe_load)
        found = model_of(packed)
        require_same_model(packed, found, run.model)
        architecture = NEOX_ARCHITECTURES[run.model.architecture]
        self.files = NeoxFiles(packed.path, architecture.take_apart(packed.tensors, run.model, grouped_rows))
        self.source_rows = found.vocabulary_rows
        self.vocab = imported_vocabulary(self.source_rows, run, str(self.files.path))
        self._layouts = layer_layouts(run.model, self.vocab)
        self._row_biases: RowBiases = row_biases or (
            "sum" if architecture.row_biases_are_summed(run.model) else "replicas"
        )
        self._merger = NeoxMerger(self.source_rows, architecture.row_biases if self._row_biases == "sum" else ())
        self._has_row_biases = any(
            name.endswith(architecture.row_biases) for layout in self._layouts for name in layout.parameters
        )
        self._num_parameters = 0
        self._theirs = _names_of(self.files, run.model, self._layouts)
        self._dtype = _common_dtype(self.files, self._theirs.values())

    def read(self, progress: Callable[[int, int], None]) -> Iterator[LayerState]:
        """Yields whole layers in the order of the pipeline, weights alone."""
        for done, layout in enumerate(self._layouts, start=1):
            weights = {local: self._whole(layout, local) for local in layout.parameters}
            self._num_parameters += sum(weight.numel() for weight in weights.values())
            yield LayerState(layout.name, {local: ParameterState(weight) for local, weight in weights.items()})
            progress(done, len(self._layouts))

    def report(self) -> ImportedNeox:
        """Returns what was found in the source, once all layers are read."""
        ranks = len(next(iter(self.files.tensors.values())))
        return ImportedNeox(
            source=self.files.path,
            tensor_parallel_size=ranks,
            num_parameters=self._num_parameters,
            dtype=self._dtype,
            source_rows=self.source_rows,
            vocab=self.vocab,
            differing=self._merger.differing,
            row_biases=self._row_biases if ranks > 1 and self._has_row_biases else None,
        )

    def _whole(self, layout: LayerLayout, local: str) -> Tensor:
        name = layout.global_name(local)
        theirs = self._theirs[name]
        stored, spec = self.files.tensors[theirs], layout.parameters[local]
        try:
            whole = self._merger.whole(name, stored, spec)
        except CheckpointError as error:
            raise CheckpointError(f"{self.files.path}: {error}. `{deciding_key(theirs)}` decides about it.") from error
        require_finite(whole, f"{self.files.path}: {stored[0]}")
        return with_configured_rows(name, whole, spec, self.vocab).to(self._dtype)


def _names_of(files: NeoxFiles, model: ModelConfig, layouts: list[LayerLayout]) -> dict[str, str]:
    """Maps our global names to the source's. Raises CheckpointError for tensors that are missing or left over."""

    def describe(name: str) -> str:
        key = deciding_key(name)
        return files.describe(name) + (f" (`{key}`)" if key else "")

    expected = [layout.global_name(local) for layout in layouts for local in layout.parameters]
    return our_names(neox_names(model, layouts), files.tensors, expected, str(files.path), describe)


def _common_dtype(files: NeoxFiles, names: Iterable[str]) -> torch.dtype:
    dtypes = {}
    for name in names:
        for part in files.tensors[name]:
            dtypes[part.read().dtype] = part
    for dtype, part in dtypes.items():
        if not dtype.is_floating_point:
            raise CheckpointError(f"{files.path}: {part}: its numbers are {dtype}, which no parameter is.")
    return reduce(torch.promote_types, dtypes)
