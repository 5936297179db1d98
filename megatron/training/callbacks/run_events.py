"""Notes in events.jsonl what happens to the run: its start and end, saves, growth, NaN, errors."""

from __future__ import annotations

from megatron.errors import UserError
from megatron.monitor.metrics_writer import RunEvent
from megatron.mpu.agreement import rank_and_size
from megatron.training.callback import Callback
from megatron.training.progress import Step
from megatron.training.run_start import RunStart
from megatron.training.training_context import TrainingContext, TrainingRun


def note(run: TrainingRun, iteration: int, kind: str, text: str, **details: object) -> None:
    """Notes an event of a run, on rank 0."""
    if rank_and_size()[0] == 0:
        run.event_log.note(RunEvent(iteration, kind, text, details))


def note_start(run: TrainingRun, start: RunStart) -> None:
    """Notes where a run starts, or goes on, with what it runs on."""
    parallel, description = run.parallel, run.description
    sizes = {"tensor": parallel.tensor_size, "pipe": parallel.pipe_size, "data": parallel.data_size}
    facts = {"ranks": description["ranks"], **sizes, "device": description["device"], "code": description["git_commit"]}
    note(run, start.progress.iteration, "resume" if start.continues else "start", str(start), **facts)


class RunEvents(Callback):
    """Notes steps that were not finite, and how the steps have ended."""

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        self.non_finite_steps = context.progress.non_finite_steps
        self.last: Step | None = None

    def after_step(self, step: Step) -> None:
        """Notes a step that was left out because it was not finite."""
        self.last = step
        count = self.context.progress.non_finite_steps
        if count > self.non_finite_steps:
            self.non_finite_steps = count
            text = f"step {step.iteration} was not finite, and was left out; {count} of this run so far"
            note(self.context.run, step.iteration, "non_finite", text)

    def finish(self) -> None:
        """Notes how the steps have ended; a growth has an event of its own."""
        run, iteration = self.context.run, self.context.progress.iteration
        if self.last is None or self.last.iteration != iteration:
            # After a step that is rolled back, no callback is called.
            note(run, iteration, "rollback", f"step {iteration} was not finite: back to the last checkpoint")
        elif self.last.is_last:
            note(run, iteration, "end", f"all {iteration:,} steps are taken")
        elif self.context.stop.agreed or self.last.ends_run:
            why = "a signal or the limit on its duration" if self.context.stop.agreed else "exit_interval"
            note(run, iteration, "stop", f"stopped by {why}")

    def on_error(self, error: UserError) -> None:
        """Notes the error that has ended the steps."""
        note(self.context.run, self.context.progress.iteration, "error", f"{type(error).__name__}: {error}")
