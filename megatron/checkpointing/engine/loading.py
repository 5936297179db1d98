"""Loads a run through DeepSpeed's engine."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megatron.checkpointing.engine.hyperparameters import configured_hyperparameters
from megatron.checkpointing.engine.load_universal import load_universal
from megatron.checkpointing.engine.universal import universal_form
from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.states.load_parameters import load_layers, load_parameters
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.safe_load import load_tensors
from megatron.config.sections.run_config import RunConfig
from megatron.errors import CheckpointError
from megatron.model.causal_lm import VocabSize
from megatron.mpu.agreement import gather_objects, rank_and_size
from megatron.mpu.context import ParallelContext

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

logger = logging.getLogger(__name__)


def load_checkpoint(
    engine: PipelineEngine, checkpoint: Checkpoint, config: RunConfig, context: ParallelContext, vocab: VocabSize
) -> None:
    """Loads weights, optimizer state and the place in the schedule, whatever layout and precision wrote them.

    Hyperparameters stay the engine's. Collective. A checkpoint of another layout or precision is converted first,
    unless that was done before. Raises CheckpointError when a file is damaged or unsafe, or DeepSpeed does not find
    what it needs.
    """
    if not config.checkpoint.allow_unsafe_load:
        _require_safe(checkpoint, prefix="", allow_unsafe=False)
    try:
        with configured_hyperparameters(engine.optimizer):
            _load(engine, checkpoint, config, context, vocab)
    # What Python raises where a file lacks an entry, or has one of another kind.
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{checkpoint.path} does not hold what DeepSpeed 0.19.8 writes ({error!r}). Load another checkpoint."
        ) from error


def _load(
    engine: PipelineEngine, checkpoint: Checkpoint, config: RunConfig, context: ParallelContext, vocab: VocabSize
) -> None:
    differences = _layout_differences(checkpoint, config, context, vocab.padded)
    if differences:
        logger.info("%s was written in another layout: %s", checkpoint.path, "; ".join(differences))
        universal = universal_form(checkpoint, config.checkpoint.verify_checkpoint)
        same_precision = checkpoint.config.training.precision.dtype == config.training.precision.dtype
        load_universal(
            engine,
            universal,
            context,
            config.training.optimizer,
            vocab_size=vocab.actual,
            same_precision=same_precision,
        )
        return
    loaded, _ = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if loaded is None:
        raise CheckpointError(f"{checkpoint.path}: DeepSpeed found nothing to load in it. Its files are incomplete.")


def _layout_differences(
    checkpoint: Checkpoint, config: RunConfig, context: ParallelContext, padded_vocab_size: int
) -> list[str]:
    """Lists the differences between the layout that wrote a checkpoint and a run's, one sentence each."""
    state, theirs = checkpoint.state, checkpoint.config
    pairs: dict[str, tuple[object, object]] = {
        "tensor-parallel size": (state.tensor_parallel_size, context.tensor_size),
        "pipeline-parallel size": (state.pipe_parallel_size, context.pipe_size),
        "data-parallel size": (state.data_parallel_size, context.data_size),
        "padded vocabulary": (state.padded_vocab_size, padded_vocab_size),
        "precision": (theirs.training.precision.dtype, config.training.precision.dtype),
    }
    if context.pipe_size > 1:
        methods = (theirs.parallel.pipe_partition_method, config.parallel.pipe_partition_method)
        pairs["pipe_partition_method"] = methods
    return [f"{name} {before}, here {now}" for name, (before, now) in pairs.items() if before != now]


def load_weights(
    engine: PipelineEngine,
    checkpoint: Checkpoint,
    context: ParallelContext,
    changed: Iterable[LayerState] | None = None,
    *,
    keep_ramp: bool,
) -> None:
    """Loads weights alone, whatever layout wrote them. Collective.

    `changed` are the layers that are made of the checkpoint's, where the engine's model is not the checkpoint's. The
    multiplier of a growth that still opens is folded into the keys, unless the run goes on with it (`keep_ramp`).
    Raises CheckpointError when a file is damaged or unsafe.
    """
    _require_safe(checkpoint, prefix="layer_", allow_unsafe=None)
    named = engine.module.global_parameters()
    if changed is None:
        load_parameters(named, checkpoint, context, keep_ramp=keep_ramp)
    else:
        load_layers(named, changed, checkpoint.state.vocab_size, context)
    engine.optimizer.refresh_fp32_params()


def _require_safe(checkpoint: Checkpoint, *, prefix: str, allow_unsafe: bool | None) -> None:
    """Opens the tensor files that begin with `prefix`, a share of them on each rank, without reading the tensors.

    Collective. Raises CheckpointError, on all ranks, for a file that is damaged or could run code: a rank that met it
    later would leave the others waiting.
    """
    names = sorted(name for name in checkpoint.manifest.files if name.startswith(prefix) and name.endswith(".pt"))
    rank, size = rank_and_size()
    failure: str | None = None
    for name in names[rank::size]:
        try:
            load_tensors(checkpoint.path / name, allow_unsafe=allow_unsafe)
        except CheckpointError as error:
            failure = str(error)
            break
    failures = [text for text in gather_objects(failure) if text is not None]
    if failures:
        raise CheckpointError(failures[0])
