"""Finds the start of a run: fresh, from its own last checkpoint, or from another run's weights."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.checkpointing.engine.loading import load_checkpoint, load_weights
from megatron.checkpointing.states.same_model import model_differences
from megatron.checkpointing.store.checkpoint import Checkpoint, checkpoint_paths
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.publish import put_back_replaced
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import TrainingConfig
from megatron.data.data_fingerprint import fingerprint_differences
from megatron.errors import CheckpointError, ConfigError, NonFiniteError, os_errors_as
from megatron.model.causal_lm import VocabSize
from megatron.mpu.agreement import on_first_rank
from megatron.mpu.context import ParallelContext
from megatron.training.progress import Progress

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


@dataclass(frozen=True)
class RunStart:
    """State that a run begins with."""

    run_id: str
    """The run that the checkpoints to come belong to."""

    progress: Progress = field(default_factory=Progress)
    """Steps and samples that are behind the run; never changed."""

    checkpoint: Checkpoint | None = None
    """The checkpoint to load; None for a fresh run."""

    continues: bool = False
    """Whether the run goes on where the checkpoint's run stopped. Otherwise only its weights are used (`finetune`)."""

    loads_optimizer: bool = False
    """Whether the optimizer's state comes from the checkpoint."""

    def __str__(self) -> str:
        """Names the start in a sentence for the run's log."""
        if self.checkpoint is None:
            return "starting from initial weights"
        if not self.continues:
            return f"starting from the weights of {self.checkpoint.path}"
        return f"going on from {self.checkpoint.path}, {self.progress.iteration} steps done"


def find_start(config: RunConfig) -> RunStart:
    """Decides where a run starts. Collective; the same on every rank.

    `auto_resume` continues from the newest whole checkpoint in `save`, if there is one. Otherwise `load` must hold a
    checkpoint; `finetune` takes only its weights. A run that loads nothing does not write into a folder that already
    holds another run's checkpoints. Raises CheckpointError for each of these, and for a checkpoint that does not fit.
    """
    if config.checkpoint.pretrain_partial_init is not None:
        raise ConfigError(
            f"pretrain_partial_init: {config.checkpoint.pretrain_partial_init}: starting from a model with fewer "
            "parameter tokens is not implemented. Remove the key to start from initial weights."
        )
    start = _locate(config.checkpoint)
    if start.checkpoint is not None:
        _require_same_model(config, start.checkpoint)
        _require_optimizer_state(start, start.checkpoint)
    return start


def load_start(
    start: RunStart, engine: PipelineEngine, config: RunConfig, context: ParallelContext, vocab: VocabSize
) -> None:
    """Loads what the run begins with into its engine; nothing for a fresh run. Collective.

    Raises CheckpointError when a file of the checkpoint is damaged or unsafe.
    """
    if start.checkpoint is None:
        return
    if start.loads_optimizer:
        load_checkpoint(engine, start.checkpoint, config, context, vocab)
        return
    load_weights(engine, start.checkpoint, context, keep_ramp=start.continues)
    if start.continues:
        engine.lr_scheduler.load_state_dict({"num_steps": start.checkpoint.state.schedule_steps})


def roll_back(config: CheckpointConfig, start: RunStart, progress: Progress) -> RunStart:
    """Returns the start after a step that was not finite: the newest whole checkpoint, with samples not seen yet.

    Collective. `start` is where the run began, which serves when it has not saved yet. Raises NonFiniteError without
    any checkpoint.
    """
    own = None if config.save is None else find_checkpoint(Path(config.save), None, config.verify_checkpoint)
    checkpoint = own or (start.checkpoint if start.continues else None)
    if checkpoint is None:
        raise NonFiniteError(
            f"step {progress.iteration} was not finite, and there is no checkpoint to roll back to. Save more often "
            "(`checkpoint_factor`), or the initial weights as well (`extra_save_iters: [0]`)."
        )
    state = checkpoint.state
    return RunStart(
        run_id=start.run_id,
        progress=Progress(
            iteration=state.iteration,
            consumed_train_samples=progress.consumed_train_samples,
            consumed_valid_samples=state.consumed_valid_samples,
            non_finite_steps=progress.non_finite_steps,
        ),
        checkpoint=checkpoint,
        continues=True,
        loads_optimizer=own is not None or start.loads_optimizer,
    )


@os_errors_as(CheckpointError, "the checkpoint folder")
def _locate(config: CheckpointConfig) -> RunStart:
    save = None if config.save is None else Path(config.save).resolve()
    if save is not None:
        on_first_rank(partial(put_back_replaced, save))
    if config.auto_resume and save is not None:
        own = find_checkpoint(save, None, config.verify_checkpoint)
        if own is not None:
            return _continue(own, config, own.manifest.run_id)
    run_id = on_first_rank(lambda: uuid.uuid4().hex)
    goes_on_in_save = _loads_from_save(config)
    if save is not None and not goes_on_in_save and on_first_rank(lambda: any(True for _ in checkpoint_paths(save))):
        raise CheckpointError(
            f"save: {config.save} already holds checkpoints of another run. Set `auto_resume: true` to go on with that "
            "run, or name another folder."
        )
    if config.load is None:
        return RunStart(run_id)
    found = find_checkpoint(Path(config.load), config.iteration, config.verify_checkpoint)
    if found is None:
        raise CheckpointError(
            f"load: {config.load} holds no checkpoint. Correct the path, or remove `load` to start from step 0; "
            "`auto_resume: true` with `save` alone starts fresh the first time and continues afterwards."
        )
    if config.finetune:
        return RunStart(run_id, checkpoint=found)
    return _continue(found, config, found.manifest.run_id if goes_on_in_save else run_id)


def _continue(checkpoint: Checkpoint, config: CheckpointConfig, run_id: str) -> RunStart:
    state = checkpoint.state
    progress = Progress(
        state.iteration, state.consumed_train_samples, state.consumed_valid_samples, state.non_finite_steps
    )
    return RunStart(run_id, progress, checkpoint, continues=True, loads_optimizer=not config.no_load_optim)


def _loads_from_save(config: CheckpointConfig) -> bool:
    if config.load is None or config.save is None or config.finetune:
        return False
    load, save = Path(config.load).resolve(), Path(config.save).resolve()
    return save in (load, load.parent)


def _require_same_model(config: RunConfig, checkpoint: Checkpoint) -> None:
    differences = model_differences(checkpoint.config.model, config.model)
    if differences:
        raise CheckpointError(
            f"{checkpoint.path} holds another model than the configuration describes: {'; '.join(differences)}. "
            "Make the configuration agree with the checkpoint, or load another one."
        )


def _require_optimizer_state(start: RunStart, checkpoint: Checkpoint) -> None:
    if start.loads_optimizer and checkpoint.holds_weights_alone:
        raise CheckpointError(
            f"{checkpoint.path} holds weights alone, and a run cannot go on from those. Set `finetune: true` to start "
            "a run with them."
        )


def require_same_data(start: RunStart, fingerprint: dict[str, str], config: CheckpointConfig) -> None:
    """Raises CheckpointError when a run that continues would read other tokens than the one that it continues."""
    if start.checkpoint is None or not start.continues or config.allow_changed_data:
        return
    changed = list(fingerprint_differences(fingerprint, start.checkpoint.state.data_fingerprint, "checkpoint"))
    if changed:
        raise CheckpointError(
            f"the data differs from what {start.checkpoint.path} was trained on: {'; '.join(changed)}. Restore it, or "
            "set `allow_changed_data: true` to go on with it as it is."
        )


def adopt_schedule(config: RunConfig, start: RunStart) -> RunConfig:
    """Returns the configuration with the learning-rate schedule that the run is to follow.

    A run that continues must describe the schedule it started with. Where it does not, `override_lr_scheduler` takes
    the new one and `use_checkpoint_lr_scheduler` the old one; without either, CheckpointError names the differences.
    """
    if start.checkpoint is None or not start.continues:
        return config
    ours, theirs = _described_schedule(config.training), _described_schedule(start.checkpoint.config.training)
    if ours == theirs or config.training.lr_schedule.override_lr_scheduler:
        return config
    if config.training.lr_schedule.use_checkpoint_lr_scheduler:
        lr = theirs.pop("lr")
        training = config.training.model_copy(
            update={
                "optimizer": config.training.optimizer.model_copy(update={"lr": lr}),
                "lr_schedule": config.training.lr_schedule.model_copy(update=theirs),
            }
        )
        return config.model_copy(update={"training": training})
    changed = [f"{name}: checkpoint {theirs[name]}, configuration {ours[name]}" for name in ours
               if ours[name] != theirs[name]]  # fmt: skip
    raise CheckpointError(
        f"the learning-rate schedule differs from the one that {start.checkpoint.path} was trained with: "
        f"{'; '.join(changed)}. Set `override_lr_scheduler: true` to follow the configuration, or "
        "`use_checkpoint_lr_scheduler: true` to follow the checkpoint."
    )


def _described_schedule(training: TrainingConfig) -> dict[str, object]:
    schedule = training.lr_schedule
    values = schedule.model_dump(exclude={"override_lr_scheduler", "use_checkpoint_lr_scheduler"})
    return {"lr": training.optimizer.lr, **values, "decay_iters": schedule.decay_iters or training.train_iters}
