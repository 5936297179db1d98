"""Saves checkpoints while the model trains."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpointing.engine.saving import Saver
from megatron.checkpointing.store.uploads import Uploads, begin_uploads
from megatron.config.save_schedule import save_iterations
from megatron.errors import NonFiniteError, UserError
from megatron.mpu.agreement import on_first_rank, on_first_rank_meanwhile
from megatron.training.callback import Callback
from megatron.training.callbacks.run_events import note
from megatron.training.progress import Step
from megatron.training.run_description import described_versions
from megatron.training.training_context import TrainingContext


class Checkpoints(Callback):
    """Saves after the steps of the schedule, when the run is to stop or the model to grow, and at its end.

    Saves the initial weights as well when the schedule has step 0.
    """

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        run = context.run
        self.iterations = save_iterations(run.config.checkpoint, run.config.training.train_iters)
        self.saver = Saver(
            run.engine,
            run.config,
            run_id=run.run_id,
            versions=described_versions(run.description),
            folder_is_ours=run.lease.check,
            published=self._published,
        )
        self.uploads: Uploads | None = None

    def start(self) -> None:
        """Begins to upload what an earlier start has left; saves the initial weights of a run that starts from step 0.

        Raises EnvironmentSetupError when a package for the URL is missing.
        """
        on_first_rank(self._begin_uploads)
        if self.context.progress.iteration == 0 and 0 in self.iterations:
            self._save(wait=False)

    def after_step(self, step: Step) -> None:
        """Saves when it is time, and publishes an earlier save that is written by now."""
        ends = step.ends_run or self.context.stop.agreed
        if step.iteration in self.iterations or ends or step.grows:
            self._save(wait=ends or step.grows)
        elif self.saver.is_saving:
            with self.context.throughput.paused("save_wait"):
                self.saver.publish_if_written()

    def finish(self) -> None:
        """Publishes a save that is still being written, and waits for uploads, as long as the store takes them."""
        self.saver.finish()
        if self.context.run.config.checkpoint.save_remote is not None:
            on_first_rank_meanwhile(self._finish_uploads)

    def on_error(self, error: UserError) -> None:
        """Publishes a save that is still being written when all ranks give up on a step that is not finite.

        Publishing is collective: after an error that may be one rank's alone, the others would be waited for in vain.
        """
        if isinstance(error, NonFiniteError):
            self.saver.finish()

    def _begin_uploads(self) -> None:
        self.uploads = begin_uploads(self.context.run.config.checkpoint)

    def _finish_uploads(self) -> None:
        if self.uploads is not None:
            self.uploads.finish()

    def _published(self, checkpoint: Path) -> None:
        note(self.context.run, self.context.progress.iteration, "save", f"saved {checkpoint.name}")
        if self.uploads is not None:
            self.uploads.add(checkpoint)

    def _save(self, *, wait: bool) -> None:
        with self.context.throughput.paused("save_wait"):
            self.saver.save(self.context.run_state(), wait=wait)
