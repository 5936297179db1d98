"""Finds the start of a run: fresh, from its own last checkpoint, or from another run's weights."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.checkpointing.engine.loading import load_checkpoint, load_weights
from megatron.checkpointing.states.layer_state import LayerState
from megatron.checkpointing.store.checkpoint import Checkpoint, checkpoint_paths
from megatron.checkpointing.store.fetch import local_source, require_free, restore_newer
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.checkpointing.store.publish import put_back_replaced
from megatron.config.local_path import is_url
from megatron.config.optimizer import facts_of
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.growth import GrowthRecord
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import TrainingConfig
from megatron.data.data_fingerprint import fingerprint_differences
from megatron.errors import CheckpointError, NonFiniteError, os_errors_as
from megatron.growth.growth_operator import Growth, grown_layers
from megatron.growth.inheriting.inherit_checkpoint import Reference, plan_inheritance
from megatron.growth.inheriting.inherit_operator import Inheritance, inherited_layers
from megatron.growth.layer_reader import LayerReader
from megatron.model.causal_lm import VocabSize
from megatron.mpu.agreement import on_first_rank
from megatron.mpu.context import ParallelContext
from megatron.training.due_growth import due_growth
from megatron.training.progress import Progress

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine

logger = logging.getLogger(__name__)


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

    growth: tuple[GrowthRecord, ...] = ()
    """Growths of the model so far."""

    due: Growth | None = None
    """The growth that comes before the next step: of the checkpoint, for a run that continues, else of its weights
    while they are loaded."""

    inherits: Inheritance | None = None
    """How the model is made of the checkpoint's, which is then a reference; at once or while it is loaded, as above."""

    @property
    def goes_on(self) -> bool:
        """Tells whether the run goes on with the checkpoint's model as it is."""
        return self.continues and self.due is None and self.inherits is None

    def __str__(self) -> str:
        """Names the start in a sentence for the run's log."""
        if self.checkpoint is None:
            return "starting from initial weights"
        if self.inherits is not None:
            return f"{self.checkpoint.path}: inheriting by {self.inherits.rules.operator}: {self.inherits}"
        if not self.continues:
            grown = "" if self.due is None else f", grown by {self.due.rules.operator}"
            return f"starting from the weights of {self.checkpoint.path}{grown}"
        return f"going on from {self.checkpoint.path}, {self.progress.iteration} steps done"


def find_start(config: RunConfig) -> RunStart:
    """Decides where a run starts. Collective; the same on every rank.

    `auto_resume` continues from the newest whole checkpoint in `save`, if there is one. Otherwise `load` must hold a
    checkpoint unless it is `save`; `finetune` takes only its weights, as `pretrain_partial_init` does. A run that loads
    nothing does not write into a folder that already holds another run's checkpoints. Raises CheckpointError for each
    of these, and for a checkpoint that does not fit; ConfigError for one that cannot grow as configured.
    """
    start = _locate(config.checkpoint)
    _require_same_optimizer(start, config)
    return _with_due_change(config, start)


def newest_start(config: RunConfig, run_id: str) -> RunStart:
    """Returns the start from the newest checkpoint in `save`, which the run has just written. Collective.

    Raises CheckpointError when there is none.
    """
    if config.checkpoint.save is None:
        raise ValueError("a run without `save` has no checkpoint of its own")
    own = find_checkpoint(Path(config.checkpoint.save), None, config.checkpoint.verify_checkpoint)
    if own is None:
        raise CheckpointError(f"save: {config.checkpoint.save}: the checkpoint that this run has saved is gone.")
    return _with_due_change(config, go_on_from(own, config.checkpoint, run_id))


def _with_due_change(config: RunConfig, start: RunStart) -> RunStart:
    if start.checkpoint is None:
        if config.inherit is not None:
            raise CheckpointError(
                f"load: {config.checkpoint.load} is save, and holds no checkpoint to inherit from. Name the folder of "
                "the reference, which stays as it is."
            )
        return start
    if config.inherit is not None and not _is_own(start.checkpoint, config.checkpoint):
        _require_optimizer_state(start, start.checkpoint)
        reference = Reference.of(start.checkpoint, optimizer=False)
        return replace(start, inherits=plan_inheritance(reference, config, config.inherit))
    due = due_growth(config, start.checkpoint, continues=start.continues)
    _require_optimizer_state(start, start.checkpoint)
    if due is None or start.continues:
        return replace(start, due=due)
    flops = start.checkpoint.state.training_flops
    return replace(start, due=due, growth=(due.record,), progress=replace(start.progress, training_flops=flops))


def _is_own(checkpoint: Checkpoint, config: CheckpointConfig) -> bool:
    return config.save is not None and checkpoint.path.resolve().parent == Path(config.save).resolve()


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
    changed: Iterable[LayerState] | None = None
    if start.due is not None:
        changed = grown_layers(LayerReader(start.checkpoint).read, start.due)
    elif start.inherits is not None:
        changed = inherited_layers(LayerReader(start.checkpoint, optimizer=False).read, start.inherits)
    load_weights(engine, start.checkpoint, context, changed, keep_ramp=start.continues)
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
            training_flops=progress.training_flops,
        ),
        checkpoint=checkpoint,
        continues=True,
        loads_optimizer=own is not None or start.loads_optimizer,
        growth=state.growth,
    )


@os_errors_as(CheckpointError, "the checkpoint folder")
def _locate(config: CheckpointConfig) -> RunStart:
    save = None if config.save is None else Path(config.save).resolve()
    if save is not None:
        on_first_rank(partial(put_back_replaced, save))
    if config.auto_resume and save is not None:
        own = find_checkpoint(save, None, config.verify_checkpoint)
        if restore_newer(config, save, own):
            own = find_checkpoint(save, None, config.verify_checkpoint)
        if own is not None:
            return go_on_from(own, config, own.manifest.run_id)
    run_id = on_first_rank(lambda: uuid.uuid4().hex)
    goes_on_in_save = _loads_from_save(config)
    if save is not None and not goes_on_in_save and on_first_rank(lambda: any(True for _ in checkpoint_paths(save))):
        raise CheckpointError(
            f"save: {config.save} already holds checkpoints of another run. Set `auto_resume: true` to go on with that "
            "run, or name another folder."
        )
    if not goes_on_in_save:
        require_free(config)
    source = config.load or config.pretrain_partial_init
    if source is None:
        return RunStart(run_id)
    found = find_checkpoint(local_source(source, config.iteration, config), config.iteration, config.verify_checkpoint)
    if found is None and goes_on_in_save:
        # As in NeoX, whose YAMLs name one folder for both: the first start is fresh, and later ones go on.
        require_free(config)
        logger.info("load: %s is save, and holds no checkpoint yet", config.load)
        return RunStart(run_id)
    if found is None:
        key = "load" if config.load is not None else "pretrain_partial_init"
        raise CheckpointError(
            f"{key}: {source} holds no checkpoint. Correct the path, or remove `{key}` to start from step 0; "
            "`auto_resume: true` with `save` alone starts fresh the first time and continues afterwards."
        )
    if config.finetune or config.load is None:
        return RunStart(run_id, checkpoint=found)
    return go_on_from(found, config, found.manifest.run_id if goes_on_in_save else run_id)


def go_on_from(checkpoint: Checkpoint, config: CheckpointConfig, run_id: str) -> RunStart:
    """Returns the start of a run `run_id` that goes on where a checkpoint's run stopped."""
    state = checkpoint.state
    progress = Progress(
        state.iteration,
        state.consumed_train_samples,
        state.consumed_valid_samples,
        state.non_finite_steps,
        state.training_flops,
    )
    return RunStart(
        run_id,
        progress,
        checkpoint,
        continues=True,
        loads_optimizer=not config.no_load_optim,
        growth=state.growth,
    )


def _loads_from_save(config: CheckpointConfig) -> bool:
    if config.load is None or config.save is None or config.finetune or is_url(config.load):
        return False
    load, save = Path(config.load).resolve(), Path(config.save).resolve()
    return save in (load, load.parent)


def _require_same_optimizer(start: RunStart, config: RunConfig) -> None:
    if start.checkpoint is None or not start.loads_optimizer:
        return
    theirs, ours = start.checkpoint.config.training.optimizer, config.training.optimizer
    if facts_of(theirs) is not facts_of(ours):
        raise CheckpointError(
            f"{start.checkpoint.path} was trained by {theirs.type}, whose moments {ours.type} (optimizer.type) cannot "
            f"go on with. Set `no_load_optim: true` to begin {ours.type} with moments of zero."
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
    if not start.checkpoint.state.data_fingerprint:
        return  # It has inherited, and reads its data from their start.
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
    rates = facts_of(config.training.optimizer).learning_rates
    ours, theirs = (_described_schedule(each.training, rates) for each in (config, start.checkpoint.config))
    if ours == theirs or config.training.lr_schedule.override_lr_scheduler:
        return config
    if config.training.lr_schedule.use_checkpoint_lr_scheduler:
        peaks = {name: theirs.pop(name) for name in rates}
        training = config.training.model_copy(
            update={
                "optimizer": config.training.optimizer.model_copy(update=peaks),
                "lr_schedule": config.training.lr_schedule.model_copy(update=theirs),
            }
        )
        return config.model_copy(update={"training": training})
    changed = [f"{name}: checkpoint {theirs.get(name)}, configuration {ours.get(name)}" for name in ours | theirs
               if ours.get(name) != theirs.get(name)]  # fmt: skip
    raise CheckpointError(
        f"the learning-rate schedule differs from the one that {start.checkpoint.path} was trained with: "
        f"{'; '.join(changed)}. Set `override_lr_scheduler: true` to follow the configuration, or "
        "`use_checkpoint_lr_scheduler: true` to follow the checkpoint."
    )


def _described_schedule(training: TrainingConfig, rates: Sequence[str]) -> dict[str, object]:
    schedule = training.lr_schedule
    values = schedule.model_dump(exclude={"override_lr_scheduler", "use_checkpoint_lr_scheduler"})
    peaks = {name: getattr(training.optimizer, name, None) for name in rates}
    return {**peaks, **values, "decay_iters": schedule.decay_iters or training.train_iters}
