"""Checks that depend on the sizes of the parallel groups, and the sizes that pass them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from operator import attrgetter

from megatron.config.architecture import ARCHITECTURES
from megatron.config.checks.finding import Check, Finding, divisors, nearest_multiple, nearest_of
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig


def _does_not_split(ranks: int) -> str:
    return f"does not split over model_parallel_size {ranks}"


_MOST_PROPOSED = 8


def tensor_sizes(run: RunConfig) -> list[int]:
    """Lists the tensor-parallel sizes over which heads, vocabulary and every other size of the model split."""
    model = run.model
    sizes = [attrgetter(path)(model) for path in ARCHITECTURES[model.architecture].split_sizes]
    sizes += [model.num_attention_heads, model.num_kv_heads, model.padded_vocab_size]
    if model.padded_vocab_size is None:
        sizes.append(model.make_vocab_size_divisible_by)
    if run.parallel.sequence_parallel:
        sizes.append(model.seq_length)
    return divisors(math.gcd(*(size for size in sizes if size)))


def _or_tensor_size(run: RunConfig) -> str:
    """Names tensor-parallel sizes that fit the model as it is."""
    *others, last = (str(size) for size in tensor_sizes(run)[:_MOST_PROPOSED])
    return f"; or model_parallel_size {', '.join(others)} or {last}" if others else "; or model_parallel_size 1"


def parallel_sizes(run: RunConfig, world_size: int) -> Iterator[tuple[int, int]]:
    """Yields the tensor-parallel sizes and pipeline stages into which model and ranks divide."""
    for tensor in (size for size in tensor_sizes(run) if world_size % size == 0):
        for stages in divisors(world_size // tensor):
            if stages <= run.model.num_layers:
                yield tensor, stages


def _heads(run: RunConfig) -> Iterator[Finding]:
    hidden, heads = run.model.hidden_size, run.model.num_attention_heads
    ranks = run.parallel.model_parallel_size
    if hidden % heads == 0 and heads % ranks == 0:
        return
    wrong = f"does not divide hidden_size {hidden}" if hidden % heads else _does_not_split(ranks)
    valid = [count for count in divisors(hidden) if count % ranks == 0]
    if valid:
        other = "" if hidden % heads else _or_tensor_size(run)
        yield Finding("model.num_attention_heads", f"{wrong}; nearest valid value: {nearest_of(valid, heads)}{other}")
    else:
        yield Finding(
            "parallel.model_parallel_size",
            f"does not divide hidden_size {hidden}, so no number of heads splits over it; nearest valid value: "
            f"{nearest_of(divisors(hidden), ranks)}",
        )


def _key_value_heads(run: RunConfig) -> Iterator[Finding]:
    """Requires whole groups of query heads, and whole heads of keys and values on every tensor-parallel rank."""
    heads, shared, ranks = run.model.num_attention_heads, run.model.num_kv_heads, run.parallel.model_parallel_size
    if shared is None:
        return
    if heads % shared:
        nearest = nearest_of(divisors(heads), shared)
        message = f"does not divide num_attention_heads {heads}, which share them; nearest valid value: {nearest}"
        yield Finding("model.num_kv_heads", message)
    elif shared % ranks and heads % ranks == 0:
        wrong = f"is above num_kv_heads {shared}" if ranks > shared else f"does not divide num_kv_heads {shared}"
        sizes = [size for size in divisors(shared) if heads % size == 0]
        yield Finding(
            "parallel.model_parallel_size",
            f"{wrong}, and each rank holds whole heads of keys and values; nearest valid value: "
            f"{nearest_of(sizes, ranks)}",
        )


def _tensor_parallel_sizes(run: RunConfig) -> Iterator[Finding]:
    model, ranks = run.model, run.parallel.model_parallel_size
    for path in ARCHITECTURES[model.architecture].split_sizes:
        size = attrgetter(path)(model)
        if size is not None and size % ranks:
            nearest = nearest_multiple(size, ranks)
            yield Finding(
                f"model.{path}", f"{_does_not_split(ranks)}; nearest valid value: {nearest}{_or_tensor_size(run)}"
            )
    if run.parallel.sequence_parallel and model.seq_length % ranks:
        nearest = nearest_multiple(model.seq_length, ranks)
        if nearest > max(model.max_position_embeddings, ranks):
            nearest -= ranks
        yield Finding(
            "model.seq_length", f"{_does_not_split(ranks)}, as sequence_parallel asks; nearest valid value: {nearest}"
        )


def _tensor_parallel_vocabulary(run: RunConfig) -> Iterator[Finding]:
    """Requires a padded vocabulary that splits over tensor ranks: its padding never depends on the layout."""
    ranks, padded = run.parallel.model_parallel_size, run.model.padded_vocab_size
    multiple = run.model.make_vocab_size_divisible_by
    if padded is None and multiple % ranks:
        yield Finding(
            "parallel.model_parallel_size",
            f"does not divide the multiple to which the vocabulary is padded, make_vocab_size_divisible_by {multiple}; "
            f"nearest valid value: {nearest_of(divisors(multiple), ranks)}, or give padded_vocab_size, or pad as NeoX "
            f"does on so many ranks, with make_vocab_size_divisible_by: {multiple * ranks}",
        )
    if padded is not None and padded % ranks:
        nearest = nearest_multiple(padded, math.lcm(ranks, multiple))
        yield Finding(
            "model.padded_vocab_size",
            f"{_does_not_split(ranks)}; nearest valid value: {nearest}{_or_tensor_size(run)}",
        )


def _pipeline_stages(run: RunConfig) -> Iterator[Finding]:
    stages, layers = run.parallel.pipe_parallel_size, run.model.num_layers
    if stages > layers:
        yield Finding(
            "parallel.pipe_parallel_size",
            f"is above num_layers {layers}, and each stage needs a layer; nearest valid value: {layers}",
        )
    kind, _, pattern = run.parallel.pipe_partition_method.partition(":")
    if kind == "type":
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield Finding("parallel.pipe_partition_method", f"is no regular expression after type: ({error})")
            return
        names = pipeline_layer_types(run.model)
        if not any(re.search(pattern, name, re.IGNORECASE) for name in names):
            yield Finding(
                "parallel.pipe_partition_method",
                f"no layer has such a name, only {', '.join(names)}; use type:transformer, which spreads the "
                "transformer layers evenly",
            )


def pipeline_layer_types(model: ModelConfig) -> list[str]:
    """Lists the names of the classes of a model's layers, in the order of the pipeline."""
    norms = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm", "layernorm_nonparam": "NonParametricLayerNorm"}
    final_norm = norms[model.final_norm or model.norm]
    return ["TokenEmbedding", "TransformerLayer", final_norm, "TiedHead" if model.tie_embeddings else "Head"]


def _whole_rows_of_scores(run: RunConfig) -> Iterator[Finding]:
    ranks = run.parallel.model_parallel_size
    if run.speedups.pattention == "reference" and ranks > 1:
        yield Finding(
            "speedups.pattention",
            f"the reference needs all parameter tokens on one rank, and model_parallel_size is {ranks}; use eager",
        )


CHECKS: tuple[Check, ...] = (
    _heads,
    _key_value_heads,
    _tensor_parallel_sizes,
    _tensor_parallel_vocabulary,
    _pipeline_stages,
    _whole_rows_of_scores,
)


def fits_together(run: RunConfig) -> bool:
    """Tells whether the model splits over the configured sizes of the parallel groups."""
    return not any(True for check in CHECKS for _ in check(run))
