"""Saves and loads a run through DeepSpeed's engine."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.checkpointing.engine_files import EngineFiles
from megatron.checkpointing.folder import Checkpoint
from megatron.checkpointing.load_universal import load_universal
from megatron.checkpointing.manifest import FileEntry
from megatron.checkpointing.publish import begin, complete, remove_old
from megatron.checkpointing.ranks import gather, on_first_rank
from megatron.checkpointing.same_layout import layout_differences
from megatron.checkpointing.state import RunState
from megatron.checkpointing.universal import universal_form
from megatron.checkpointing.weights import load_parameters
from megatron.config.run import RunConfig
from megatron.errors import CheckpointError
from megatron.model.causal_lm import VocabSize
from megatron.mpu.context import ParallelContext

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

logger = logging.getLogger(__name__)


def save_checkpoint(
    engine: PipelineEngine, state: RunState, config: RunConfig, *, run_id: str, versions: Mapping[str, str | None]
) -> Path:
    """Write weights, optimizer state and `state` to global_stepN in the configured folder `save`; returns its path.

    Collective. A kill or a failure at any moment leaves every earlier checkpoint and `latest` whole. `versions` are of
    the packages and the code, for the manifest. Raises CheckpointError, on all ranks, when a rank cannot write.
    """
    if config.checkpoint.save is None:
        raise CheckpointError("save: no folder is configured to save checkpoints in.")
    folder = Path(config.checkpoint.save).resolve()
    temporary = on_first_rank(partial(begin, folder, state.iteration))
    files = EngineFiles(allow_unsafe=False)
    engine.checkpoint_engine = files
    # DeepSpeed would drop scripts into the folder which unpickle whatever they find there.
    engine._copy_recovery_script = lambda save_path: None
    engine.save_checkpoint(str(folder), tag=temporary.name, save_latest=False)
    try:
        written = _gathered(files)
        final = on_first_rank(partial(complete, temporary, written, state, config, run_id=run_id, versions=versions))
    except CheckpointError as error:
        on_first_rank(partial(shutil.rmtree, temporary, ignore_errors=True))
        raise CheckpointError(
            f"save: the checkpoint of step {state.iteration} could not be written to {folder}: {error}. Earlier ones "
            "are as they were. Make room or repair the disk, then go on with `auto_resume: true`."
        ) from error
    on_first_rank(partial(remove_old, folder, config.checkpoint, run_id))
    return final


def load_checkpoint(
    engine: PipelineEngine, checkpoint: Checkpoint, config: RunConfig, context: ParallelContext, vocab: VocabSize
) -> None:
    """Load weights, optimizer state and the place in the schedule, whatever layout and precision wrote them.

    Collective. What another layout or precision wrote is converted first, unless that was done before. Raises
    CheckpointError when a file is damaged or unsafe, or DeepSpeed does not find what it needs.
    """
    engine.checkpoint_engine = EngineFiles(allow_unsafe=config.checkpoint.allow_unsafe_load)
    differences = layout_differences(checkpoint, config, context, vocab.padded)
    if differences:
        logger.info("%s was written in another layout: %s", checkpoint.path, "; ".join(differences))
        universal = universal_form(checkpoint, config.checkpoint.verify_checkpoint)
        same_precision = checkpoint.config.training.precision.dtype == config.training.precision.dtype
        load_universal(engine, universal, context, vocab_size=vocab.actual, same_precision=same_precision)
        return
    loaded, _ = engine.load_checkpoint(str(checkpoint.path.parent), tag=checkpoint.path.name)
    if loaded is None:
        raise CheckpointError(f"{checkpoint.path}: DeepSpeed found nothing to load in it. Its files are incomplete.")


def load_weights(engine: PipelineEngine, checkpoint: Checkpoint, context: ParallelContext) -> None:
    """Load weights alone, whatever layout wrote them; raises CheckpointError when a file is damaged or unsafe."""
    load_parameters(engine.module.global_parameters(), checkpoint, context)
    engine.optimizer.refresh_fp32_params()


def _gathered(files: EngineFiles) -> dict[str, FileEntry]:
    """All ranks' files. Raises CheckpointError, on all ranks, when one of them could not write."""
    try:
        own: dict[str, FileEntry] | str = files.taken()
    except CheckpointError as error:
        own = str(error)
    reports = gather(own)
    failures = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if isinstance(report, str)]
    if failures:
        raise CheckpointError("; ".join(failures))
    return dict(chain.from_iterable(report.items() for report in reports if not isinstance(report, str)))
