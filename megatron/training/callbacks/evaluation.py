"""Evaluates the model on held-out data: on the validation data as training goes on, on the test data at its end."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron.data.micro_batch import MicroBatch
from megatron.training.callback import Callback
from megatron.training.progress import Step
from megatron.training.training_context import TrainingContext


class Validation(Callback):
    """Evaluates on the validation data every `eval_interval` steps and at the end of the run."""

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        self.batches = context.run.data.read("valid", context.progress.consumed_valid_samples)

    def after_step(self, step: Step) -> None:
        """Adds valid/lm_loss and valid/perplexity to the step's metrics when it is time.

        A validation that a request to stop cuts short is not repeated, and its samples count as read, so that every
        later one reads the same samples as in an uninterrupted run.
        """
        training = self.context.run.config.training
        if step.iteration % training.eval_interval == 0 or step.is_last:
            step.metrics.update(loss_metrics("valid", evaluate(self.context, self.batches)))
            self.context.progress.consumed_valid_samples += (
                training.eval_iters * self.context.run.batch.global_batch_size
            )


class FinalTest(Callback):
    """Evaluates on the test data after the last step."""

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        self.batches = context.run.data.read("test", 0)

    def after_step(self, step: Step) -> None:
        """Adds test/lm_loss and test/perplexity to the last step's metrics."""
        if step.is_last:
            step.metrics.update(loss_metrics("test", evaluate(self.context, self.batches)))


def evaluate(context: TrainingContext, batches: Iterator[MicroBatch]) -> float | None:
    """Returns the mean loss over `eval_iters` global batches, the same on every rank [nats per token].

    None when a request to stop comes before the last batch, which ends the evaluation. Collective.
    """
    engine, losses = context.run.engine, []
    with context.throughput.paused("evaluation"):
        for _ in range(context.run.config.training.eval_iters):
            if context.stop.agree(engine.device):
                return None
            losses.append(float(engine.eval_batch(batches)))
    return math.fsum(losses) / len(losses)


def loss_metrics(split: str, loss: float | None) -> dict[str, float]:
    """Returns the metrics of a loss: itself and its perplexity; none for an evaluation that was cut short."""
    if loss is None:
        return {}
    return {f"{split}/lm_loss": loss, f"{split}/perplexity": math.exp(min(loss, 700.0))}
