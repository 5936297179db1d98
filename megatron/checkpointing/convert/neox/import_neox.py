"""A checkpoint of GPT-NeoX, or published TokenFormer weights, to a checkpoint of ours: weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpointing.convert.imported_weights import imported_vocabulary, require_finite, with_configured_rows
from megatron.checkpointing.convert.neox.neox_files import NeoxFiles, open_neox
from megatron.checkpointing.convert.neox.neox_merge import NeoxMerger
from megatron.checkpointing.convert.neox.neox_model import model_of, require_same_model
from megatron.checkpointing.convert.neox.neox_names import deciding_key, neox_names
from megatron.checkpointing.states.name_map import our_names
from megatron.checkpointing.states.parameter_layout import LayerLayout, layer_layouts
from megatron.checkpointing.states.weights_only import write_weights_only
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError
from megatron.io.durable import new_folder
from megatron.model.causal_lm import VocabSize


@dataclass(frozen=True)
class ImportedNeox:
    """What was imported."""

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


def import_neox(source: Path, run: RunConfig, output: Path, progress: Callable[[int, int], None]) -> ImportedNeox:
    """Write `output`/global_step0 and `latest`, in the source's number format; `progress(done, layers)` is called.

    A format for each tensor becomes the narrowest that holds all of them exactly. A layer is in memory at a time. Each
    tensor is one parameter of the configured model, or it is an error; where anything fails, no folder is left. Raises
    ConfigError when the configuration describes another model, CheckpointError for damaged, unsafe or unknown tensors,
    DataError without the configured tokenizer.
    """
    files = open_neox(source, allow_unsafe=run.checkpoint.allow_unsafe_load)
    found = model_of(files)
    require_same_model(files, found, run.model)
    vocab = imported_vocabulary(found.vocabulary_rows, run, str(files.path))
    merger = NeoxMerger(found.vocabulary_rows, parallel_residual=run.model.parallel_residual)
    conversion = _Conversion(files, merger, run.model, vocab)
    with new_folder(output) as temporary:
        versions = {"torch": version("torch")}
        write_weights_only(temporary, conversion.layers(progress), run, vocab, versions)
    return ImportedNeox(
        source=files.path,
        tensor_parallel_size=len(next(iter(files.tensors.values()))),
        num_parameters=conversion.num_parameters,
        dtype=conversion.dtype,
        source_rows=found.vocabulary_rows,
        vocab=vocab,
        differing=merger.differing,
    )


class _Conversion:
    """The tensors of a checkpoint under our names."""

    def __init__(self, files: NeoxFiles, merger: NeoxMerger, model: ModelConfig, vocab: VocabSize) -> None:
        self.files = files
        self.merger = merger
        self.vocab = vocab
        self.layouts = layer_layouts(model, vocab)
        self.num_parameters = 0
        names = neox_names(model, self.layouts)
        expected = [layout.global_name(name) for layout in self.layouts for name in layout.parameters]
        self.theirs = our_names(names, files.tensors, expected, str(files.path), self._describe)
        self.dtype = self._common_dtype()

    def layers(self, progress: Callable[[int, int], None]) -> Iterator[dict[str, Tensor]]:
        """Whole layers by global name, in the order of the pipeline."""
        for done, layout in enumerate(self.layouts, start=1):
            layer = {layout.global_name(name): self._whole(layout, name) for name in layout.parameters}
            self.num_parameters += sum(tensor.numel() for tensor in layer.values())
            yield layer
            progress(done, len(self.layouts))

    def _whole(self, layout: LayerLayout, local_name: str) -> Tensor:
        name = layout.global_name(local_name)
        theirs = self.theirs[name]
        stored, spec = self.files.tensors[theirs], layout.parameters[local_name]
        try:
            whole = self.merger.whole(name, stored, spec)
        except CheckpointError as error:
            raise CheckpointError(f"{self.files.path}: {error}. `{deciding_key(theirs)}` decides about it.") from error
        require_finite(whole, f"{self.files.path}: {stored[0]}")
        return with_configured_rows(name, whole, spec, self.vocab).to(self.dtype)

    def _common_dtype(self) -> torch.dtype:
        dtypes = {}
        for name in self.theirs.values():
            for part in self.files.tensors[name]:
                dtypes[part.read().dtype] = part
        for dtype, part in dtypes.items():
            if not dtype.is_floating_point:
                raise CheckpointError(f"{self.files.path}: {part}: its numbers are {dtype}, which no parameter is.")
        return reduce(torch.promote_types, dtypes)

    def _describe(self, name: str) -> str:
        key = deciding_key(name)
        return self.files.describe(name) + (f" (`{key}`)" if key else "")
