"""Where a run starts: fresh, from its own last checkpoint, or from another run's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron.checkpointing.folder import Checkpoint, find_checkpoint, list_checkpoints
from megatron.checkpointing.same_model import model_differences
from megatron.config.output import CheckpointConfig
from megatron.config.run import RunConfig
from megatron.config.training import TrainingConfig
from megatron.errors import CheckpointError, ConfigError
from megatron.model.causal_lm import VocabSize
from megatron.mpu.context import ParallelContext
from megatron.training.progress import Progress


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    checkpoint: Checkpoint | None = None
    """The checkpoint to load; None for a fresh run."""

    continues: bool = False
    """Whether the run goes on where the checkpoint's run stopped. Otherwise only its weights are used (`finetune`)."""

    def progress(self) -> Progress:
        """Steps and samples that are behind the run."""
        if self.checkpoint is None or not self.continues:
            return Progress()
        state = self.checkpoint.state
        return Progress(state.iteration, state.consumed_train_samples, state.consumed_valid_samples)

    @property
    def iteration(self) -> int:
        """Steps that are behind the run [steps]."""
        return self.progress().iteration


def find_start(config: RunConfig, context: ParallelContext) -> Start:
    """Decide where to start.

    `auto_resume` continues from the newest checkpoint in `save`, if there is one. Otherwise `load` must hold a
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
        _require_layout(start, context)
    return start


def _locate(config: CheckpointConfig) -> Start:
    if config.auto_resume and config.save is not None:
        own = find_checkpoint(Path(config.save), None)
        if own is not None:
            return Start(own, continues=True)
    if config.save is not None and list_checkpoints(Path(config.save)) and not _loads_from_save(config):
        raise CheckpointError(
            f"save: {config.save} already holds checkpoints of another run. Set `auto_resume: true` to go on with that "
            "run, or name another folder."
        )
    if config.load is None:
        return Start()
    found = find_checkpoint(Path(config.load), config.iteration)
    if found is None:
        raise CheckpointError(
            f"load: {config.load} holds no checkpoint. Correct the path, or remove `load` to start from step 0; "
            "`auto_resume: true` with `save` alone starts fresh the first time and continues afterwards."
        )
    return Start(found, continues=not config.finetune)


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


def _require_layout(start: Start, context: ParallelContext) -> None:
    if start.checkpoint is None:
        return
    state = start.checkpoint.state
    written = (state.tensor_parallel_size, state.pipe_parallel_size, state.data_parallel_size)
    running = (context.tensor_size, context.pipe_size, context.data_size)
    if written != running:
        raise CheckpointError(
            f"{start.checkpoint.path} was written with (tensor, pipeline, data) parallel sizes {written}, this run has "
            f"{running}. Start it with the sizes of the checkpoint."
        )


def require_same_vocabulary(start: Start, vocab: VocabSize) -> None:
    """Raise CheckpointError when the checkpoint's embedding has another number of rows than this run's."""
    if start.checkpoint is None or start.checkpoint.state.padded_vocab_size == vocab.padded:
        return
    state = start.checkpoint.state
    raise CheckpointError(
        f"{start.checkpoint.path} has a vocabulary of {state.vocab_size} tokens padded to {state.padded_vocab_size}, "
        f"this run one of {vocab.actual} padded to {vocab.padded}. Use the tokenizer that the checkpoint was trained "
        f"with (`vocab_file`, `tokenizer_type`), or set `padded_vocab_size: {state.padded_vocab_size}`."
    )


def adopt_schedule(config: RunConfig, start: Start) -> RunConfig:
    """The configuration with the learning-rate schedule that the run is to follow.

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
    differences = [f"{name}: checkpoint {theirs[name]}, configuration {ours[name]}" for name in ours
                   if ours[name] != theirs[name]]  # fmt: skip
    raise CheckpointError(
        f"the learning-rate schedule differs from the one that {start.checkpoint.path} was trained with: "
        f"{'; '.join(differences)}. Set `override_lr_scheduler: true` to follow the configuration, or "
        "`use_checkpoint_lr_scheduler: true` to follow the checkpoint."
    )


def _described_schedule(training: TrainingConfig) -> dict[str, object]:
    schedule = training.lr_schedule
    return {
        "lr": training.optimizer.lr,
        "style": schedule.style,
        "warmup": schedule.warmup,
        "decay_iters": schedule.decay_iters or training.train_iters,
        "min_lr": schedule.min_lr,
    }
