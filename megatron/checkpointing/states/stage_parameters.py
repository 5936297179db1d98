"""Finds the parameters of each pipeline stage, under the names and in the order that DeepSpeed's module has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from megatron.checkpointing.states.parameter_layout import ParallelSizes
from megatron.config.sections.run_config import RunConfig
from megatron.model.causal_lm import LayerEntry, VocabSize, from_engine_name, layer_entries
from megatron.model.pipeline import layer_specs, stage_bounds
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import ParameterSpec, parameter_spec


@dataclass(frozen=True)
class StageParameter:
    """One parameter of a stage."""

    engine_name: str
    """In DeepSpeed's module; unlike the global name, it tells a tied head's copy from the embedding."""
    global_name: str
    spec: ParameterSpec


def stage_parameters(config: RunConfig, vocab: VocabSize, sizes: ParallelSizes) -> Iterator[list[StageParameter]]:
    """Yields each stage's parameters in the order of DeepSpeed's module: tied ones first."""
    model = config.model
    entries = layer_entries(model, vocab, ParallelContext(tensor_size=sizes.tensor))
    bounds = stage_bounds(layer_specs(entries, model), config.parallel.pipe_partition_method, sizes.pipe)
    for start, stop in pairwise(bounds):
        yield [
            StageParameter(engine_name, from_engine_name(engine_name, model), spec)
            for engine_name, spec in _engine_names(entries, start, stop, tied=model.tie_embeddings)
        ]


def _engine_names(
    entries: Sequence[LayerEntry], start: int, stop: int, *, tied: bool
) -> Iterator[tuple[str, ParameterSpec]]:
    with torch.device("meta"):
        built = {index: dict(entries[index].build().named_parameters()) for index in range(start, stop)}
    if tied:
        # The embedding's stage and the head's each have it, once.
        shared = [built.pop(index) for index in (0, len(entries) - 1) if index in built]
        for name, parameter in shared[0].items() if shared else ():
            yield f"tied_modules.embedding.{name}", parameter_spec(parameter)
    for index, parameters in built.items():
        for name, parameter in parameters.items():
            yield f"{index}.{name}", parameter_spec(parameter)
