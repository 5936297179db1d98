"""A checkpoint's weights under their global names, whatever layout wrote them, without DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron.checkpointing.states.parameter_layout import LayerLayout, fit_vocabulary, layer_layouts, merge
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.errors import CheckpointError
from megatron.model.causal_lm import VocabSize, pipeline_location
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import local_shard, parameter_spec


def layer_file(folder: Path, layer: int, tensor_rank: int) -> Path:
    """Where DeepSpeed keeps one pipeline layer's weights for one tensor-parallel rank."""
    return folder / f"layer_{layer:02d}-model_{tensor_rank:02d}-model_states.pt"


def vocab_size(checkpoint: Checkpoint) -> VocabSize:
    """The vocabulary that the checkpoint was trained with."""
    return VocabSize(checkpoint.state.vocab_size, checkpoint.state.padded_vocab_size)


def checkpoint_layouts(checkpoint: Checkpoint) -> list[LayerLayout]:
    """The layers of the checkpoint's model that own parameters."""
    return layer_layouts(checkpoint.config.model, vocab_size(checkpoint))


def read_layer(checkpoint: Checkpoint, layout: LayerLayout) -> dict[str, Tensor]:
    """One layer's parameters by global name, merged over tensor-parallel ranks, in the format they were trained in.

    Memory-mapped where nothing had to be merged. Raises CheckpointError when a file is missing, damaged or unsafe,
    when a parameter is missing, left over or of another shape, and when replicas differ.
    """
    files = [layer_file(checkpoint.path, layout.index, rank) for rank in range(checkpoint.state.tensor_parallel_size)]
    shards = [load_tensors(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if not isinstance(shard, dict) or not all(isinstance(value, Tensor) for value in shard.values()):
            raise CheckpointError(f"{file} does not hold named tensors: it is not a layer's weights.")
        missing, left_over = layout.parameters.keys() - shard.keys(), shard.keys() - layout.parameters.keys()
        if missing or left_over:
            raise CheckpointError(
                f"{file} does not hold the weights that its configuration describes: missing "
                f"{', '.join(sorted(missing)) or 'none'}; left over {', '.join(sorted(left_over)) or 'none'}."
            )
    weights = {}
    for name, spec in layout.parameters.items():
        try:
            weights[layout.global_name(name)] = merge([shard[name] for shard in shards], spec)
        except CheckpointError as error:
            raise CheckpointError(
                f"{files[0]}: {layout.global_name(name)}: {error}. The checkpoint's weights are not those of its "
                "configuration."
            ) from error
    return weights


def read_layers(checkpoint: Checkpoint) -> Iterator[dict[str, Tensor]]:
    """`read_layer` of every layer that owns parameters, in order; a layer in memory at a time."""
    for layout in checkpoint_layouts(checkpoint):
        yield read_layer(checkpoint, layout)


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every weight of the model by global name; raises what `read_layer` raises."""
    return {name: tensor for layer in read_layers(checkpoint) for name, tensor in layer.items()}


def load_parameters(
    named: Iterable[tuple[str, nn.Parameter]], checkpoint: Checkpoint, context: ParallelContext
) -> None:
    """Copy a checkpoint's weights into this rank's parameters, given by global name, whatever layout wrote them.

    The checkpoint's model must be that of the parameters, up to what does not change their meaning, such as masked
    padding of the vocabulary. A layer is in memory at a time. Raises what `read_layer` raises.
    """
    model = checkpoint.config.model
    wanted: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        wanted.setdefault(pipeline_location(name, model)[0], []).append((name, parameter))
    for layout in checkpoint_layouts(checkpoint):
        if layout.index not in wanted:
            continue
        weights = read_layer(checkpoint, layout)
        with torch.no_grad():
            for name, parameter in wanted[layout.index]:
                spec = parameter_spec(parameter)
                whole = fit_vocabulary(weights[name], spec, checkpoint.state.vocab_size)
                parameter.copy_(local_shard(whole, spec.shard_dim, context))


def write_layers(folder: Path, layouts: Iterable[LayerLayout], weights: Iterable[Mapping[str, Tensor]]) -> None:
    """Write merged layers, given by global name in the order of `layouts`, as the files of one tensor-parallel rank.

    Raises CheckpointError when a layer holds other parameters or shapes than its layout.
    """
    for layout, layer in zip(layouts, weights, strict=True):
        expected = {layout.global_name(name) for name in layout.parameters}
        if layer.keys() != expected:
            raise CheckpointError(
                f"the weights of {layout.prefix} are not those of the configured model: missing "
                f"{', '.join(sorted(expected - layer.keys())) or 'none'}; left over "
                f"{', '.join(sorted(layer.keys() - expected)) or 'none'}."
            )
        tensors = {}
        for name, spec in layout.parameters.items():
            tensor = layer[layout.global_name(name)]
            if tuple(tensor.shape) != spec.full_shape:
                raise CheckpointError(
                    f"{layout.global_name(name)} has shape {tuple(tensor.shape)}; the configuration describes "
                    f"{spec.full_shape}."
                )
            tensors[name] = tensor.contiguous()
        torch.save(tensors, layer_file(folder, layout.index, tensor_rank=0))
