"""Layers and parameters of each pipeline stage, as DeepSpeed will spread them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from megatron.config.architecture import ARCHITECTURES
from megatron.config.checks.layout import pipeline_layer_types
from megatron.config.model_size import norm_parameters
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.errors import ConfigError
from megatron.planner.layer_costs import replicated_biases

MOST_STEPS = 10**7
"""Steps that the search for balanced stages may take; models of so many layers are split evenly."""


@dataclass(frozen=True)
class Stage:
    """One pipeline stage as each of its tensor-parallel ranks holds it."""

    index: int
    num_layers: int
    """Transformer layers."""
    matrices: int
    """Parameters of a rank that weight decay takes: weights of layers, embeddings, head."""
    vectors: int
    """Parameters of a rank that it spares: norms and biases."""
    vocabulary: int
    """Parameters of a rank's share of the embedding matrix; of the head's where that is another."""
    has_embedding: bool
    has_final_norm: bool
    has_head: bool

    @property
    def parameters(self) -> int:
        """Counts the parameters of a rank."""
        return self.matrices + self.vectors

    @property
    def groups(self) -> int:
        """Counts the optimizer's parameter groups, each of which has flat buffers of its own."""
        return (self.matrices > 0) + (self.vectors > 0)


def stages_of(model: ModelConfig, parallel: ParallelConfig, padded_vocab_size: int) -> tuple[Stage, ...]:
    """Returns the stages. Raises ConfigError where one is left without parameters."""
    facts, tensor, hidden = ARCHITECTURES[model.architecture], parallel.model_parallel_size, model.hidden_size
    replicated = replicated_biases(model)
    layer_vectors = (facts.layer_biases(model) - replicated) // tensor + replicated
    layer_vectors += 2 * norm_parameters(model.norm, model)
    layer_matrices = facts.layer_matrices(model) // tensor
    final_norm = norm_parameters(model.final_norm or model.norm, model)
    vocabulary = padded_vocab_size * hidden // tensor
    positions = model.max_position_embeddings * hidden if model.pos_emb == "learned" else 0
    counts = [vocabulary + positions, *[layer_matrices + layer_vectors] * model.num_layers, final_norm, vocabulary]
    bounds = stage_bounds(model, parallel.pipe_partition_method, parallel.pipe_parallel_size, tuple(counts))
    stages = []
    for index, (start, stop) in enumerate(pairwise(bounds)):
        layers = max(min(stop, 1 + model.num_layers) - max(start, 1), 0)
        embeds, ends = start == 0, stop == len(counts)
        has_norm = start <= 1 + model.num_layers < stop
        copies = embeds + (ends and not (embeds and model.tie_embeddings))
        stages.append(
            Stage(
                index,
                layers,
                matrices=layers * layer_matrices + copies * vocabulary + embeds * positions,
                vectors=layers * layer_vectors + has_norm * final_norm,
                vocabulary=vocabulary,
                has_embedding=embeds,
                has_final_norm=has_norm,
                has_head=ends,
            )
        )
    return tuple(stages)


def stage_bounds(model: ModelConfig, method: str, stages: int, counts: Sequence[int]) -> list[int]:
    """Returns the first layer of every stage, and last the number of layers; `counts` are the layers' parameters.

    They are DeepSpeed's, which builds the stages (its runtime/utils.py); a test compares them. Raises ConfigError
    where a stage is left without parameters, as the run itself would.
    """
    kind, _, pattern = method.partition(":")
    if kind == "uniform":
        bounds = _uniform(len(counts), stages)
    elif kind == "parameters":
        bounds = list(_balanced(tuple(counts), stages))
    else:
        embedding, layer, norm, head = (
            int(re.search(pattern, name, re.IGNORECASE) is not None) for name in pipeline_layer_types(model)
        )
        bounds = list(_balanced((embedding, *[layer] * model.num_layers, norm, head), stages))
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        if not any(counts[start:stop]):
            raise ConfigError(
                f"pipe_partition_method={method} leaves stage {stage} of pipe_parallel_size={stages} without "
                "parameters. Use type:transformer, or fewer stages."
            )
    return bounds


def _uniform(layers: int, stages: int) -> list[int]:
    share, longer = divmod(layers, stages)
    if not share:
        return [min(stage, layers) for stage in range(stages + 1)]
    bounds = [0]
    for stage in range(stages):
        bounds.append(bounds[-1] + share + (stage < longer))
    return bounds


@lru_cache(maxsize=64)
def _balanced(weights: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Returns the bounds that minimize the difference of the heaviest and the lightest stage, as DeepSpeed finds them.

    Its recursion keeps the last of equal splits, which decides where a stage without weight goes.
    """
    count = len(weights)
    if count <= stages or stages == 1 or count**2 * stages > MOST_STEPS:
        return tuple(_uniform(count, stages))
    sums = [0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    infinite = float("inf")
    heaviest = [[infinite] * (stages + 1) for _ in range(count + 1)]
    lightest = [[infinite] * (stages + 1) for _ in range(count + 1)]
    place = [[0] * (stages + 1) for _ in range(count + 1)]
    heaviest[0][0] = 0
    for end in range(1, count + 1):
        for stage in range(1, min(end, stages) + 1):
            best = infinite
            for start in range(end):
                weight = sums[end] - sums[start]
                most = max(heaviest[start][stage - 1], weight)
                least = min(lightest[start][stage - 1], weight)
                if most - least <= best:
                    best = most - least
                    heaviest[end][stage], lightest[end][stage], place[end][stage] = most, least, start
    bounds = [count]
    for stage in range(stages, 0, -1):
        bounds.append(place[bounds[-1]][stage])
    return tuple(reversed(bounds))
