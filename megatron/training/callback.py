"""The base of everything that happens around the training steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.data.micro_batch import MicroBatch
from megatron.errors import UserError
from megatron.training.progress import Step
from megatron.training.training_context import TrainingContext


class Callback:
    """One concern around the training steps, on every rank. A subclass overrides the moments that it needs."""

    def __init__(self, context: TrainingContext) -> None:
        self.context = context

    def wrap_batches(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Returns the training micro batches as the engine is to read them; called once, before `start`.

        What a callback returns is what the next one wraps.
        """
        return batches

    def start(self) -> None:
        """Called once, before the first step."""

    def after_step(self, step: Step) -> None:
        """Called after every step but one that is rolled back."""

    def finish(self) -> None:
        """Called once when the steps have ended without an error: with the last, a request to stop or a rollback."""

    def on_error(self, error: UserError) -> None:
        """Called once when the steps have ended with `error`, which is raised again afterwards.

        A NonFiniteError is raised on all ranks. Any other may be this rank's alone, so that a collective operation
        would wait for the others in vain.
        """


@contextmanager
def told_of_the_end(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Calls every callback's `finish` after the body, or `on_error` with the UserError that the body raises."""
    try:
        yield
    except UserError as error:
        for callback in callbacks:
            callback.on_error(error)
        raise
    for callback in callbacks:
        callback.finish()
