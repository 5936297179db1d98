"""Checkpoints without optimizer state: the weights of another format, for `finetune`, growth, evaluation and export."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from megatron.checkpointing.states.parameter_layout import layer_layouts
from megatron.checkpointing.states.weights import write_layers
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.manifest import describe_file
from megatron.checkpointing.store.publish import begin, complete
from megatron.checkpointing.store.run_state import RunState
from megatron.config.sections.run_config import RunConfig
from megatron.model.causal_lm import VocabSize


def write_weights_only(
    folder: Path,
    layers: Iterable[Mapping[str, Tensor]],
    config: RunConfig,
    vocab: VocabSize,
    versions: Mapping[str, str | None],
) -> Path:
    """Write `folder`/global_step0 and `latest` from whole layers, given by global name in the order of the pipeline.

    A layer is in memory at a time. `versions` are of the packages that made it, for the manifest. Raises
    CheckpointError when the weights are not those of the configured model.
    """
    temporary = begin(folder, 0)
    write_layers(temporary, layer_layouts(config.model, vocab), layers)
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
        vocab_size=vocab.actual,
        padded_vocab_size=vocab.padded,
    )
    files = {path.name: describe_file(path) for path in temporary.iterdir()}
    return complete(temporary, files, state, config, run_id=secrets.token_hex(8), versions=versions)


def is_weights_only(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint lacks what DeepSpeed keeps beside the layers: a run cannot continue from it."""
    return not any(name.startswith("mp_rank_") for name in checkpoint.manifest.files)
