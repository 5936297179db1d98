"""Loads a checkpoint's weights into the parameters of a rank's modules, whatever layout wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from megatron.checkpointing.states.fold_ramp import fold_ramp
from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.parameter_layout import fit_vocabulary
from megatron.checkpointing.states.read_states import StateReader
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.model.causal_lm import pipeline_location
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import local_shard, parameter_spec


def load_parameters(
    named: Iterable[tuple[str, nn.Parameter]],
    checkpoint: Checkpoint,
    context: ParallelContext,
    *,
    keep_ramp: bool = False,
    change: Callable[[LayerState], LayerState] | None = None,
) -> None:
    """Copies a checkpoint's weights into this rank's parameters, which are given by global name.

    The multiplier of a growth that still opens is folded into the keys, unless the model applies it (`keep_ramp`).
    `change` makes layers of the parameters' model from the checkpoint's; without it both models must be the same, up to
    what does not change their meaning, such as masked padding of the vocabulary. A layer is in memory at a time. Raises
    CheckpointError as `read_states` does.
    """
    named = list(named)
    model = checkpoint.config.model
    wanted = {pipeline_location(name, model)[0] for name, _ in named}
    reader = StateReader(checkpoint, optimizer=False)
    layers: Iterable[LayerState] = (reader.read(layout) for layout in reader.layouts if layout.index in wanted)
    if not keep_ramp:
        layers = (fold_ramp(layer, checkpoint.state) for layer in layers)
    if change is not None:
        layers = map(change, layers)
    load_layers(named, layers, checkpoint.state.vocab_size, context)


def load_layers(
    named: Iterable[tuple[str, nn.Parameter]], layers: Iterable[LayerState], vocab_size: int, context: ParallelContext
) -> None:
    """Copies the weights of whole layers into this rank's parameters, which are given by global name.

    Raises CheckpointError when a shape differs in more than the vocabulary's padding.
    """
    parameters: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        parameters.setdefault(name, []).append(parameter)
    for layer in layers:
        with torch.no_grad():
            for name, weight in layer.weights().items():
                for parameter in parameters.get(name, ()):
                    spec = parameter_spec(parameter)
                    whole = fit_vocabulary(weight, spec, vocab_size)
                    parameter.copy_(local_shard(whole, spec.shard_dim, context))
