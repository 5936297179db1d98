"""Base class of the callbacks around the training steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.data.micro_batch import MicroBatch
from megatron.errors import UserError
from megatron.training.progress import Step
from megatron.training.training_context import TrainingContext


class Callback:
    """One concern around the training steps, on every rank. Each method does nothing unless a subclass overrides it."""

    def __init__(self, context: TrainingContext) -> None:
        self.context = context

    def wrap_batches(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Returns the training micro batches as the engine is to read them; called once, before `start`.

        Callbacks wrap one after the other: the last one sees what all others have returned.
        """
        return batches

    def start(self) -> None:
        """Prepares for the steps; called once, before the first."""

    def after_step(self, step: Step) -> None:
        """Handles a step; called after every one that is not rolled back."""

    def finish(self) -> None:
        """Completes pending work; called once when the steps have ended without an error.

        They end with the last step, a request to stop or a rollback.
        """

    def on_error(self, error: UserError) -> None:
        """Handles the error that has ended the steps; called once, before it is raised again.

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
