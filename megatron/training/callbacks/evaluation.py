"""Evaluates the model on held-out data: on the validation data as training goes on, on the test data at its end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import tee

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
        """Adds valid/lm_loss and valid/perplexity to the step's metrics when it is time; losses of shares as well.

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


def evaluate(context: TrainingContext, batches: Iterator[MicroBatch]) -> dict[float, float]:
    """Returns the mean loss over `eval_iters` global batches by share, the same on every rank [nats per token].

    Share 1 is the whole model; an elastic run has others, on the same samples. Empty when a request to stop comes
    before the last batch, which ends the evaluation. Collective.
    """
    run = context.run
    engine, elastic = run.engine, run.elastic
    shares = [1.0] if elastic is None else [1.0, *elastic.config.smaller_shares]
    losses: dict[float, list[float]] = {share: [] for share in shares}
    with context.throughput.paused("evaluation"):
        for _ in range(run.config.training.eval_iters):
            if context.stop.agree(engine.device):
                return {}
            for share, same in zip(shares, tee(batches, len(shares)), strict=True):
                with nullcontext() if elastic is None else elastic.reading(share):
                    loss = engine.eval_batch(same, num_micro_batches=run.batch.gradient_accumulation_steps)
                    losses[share].append(float(loss))
    return {share: math.fsum(values) / len(values) for share, values in losses.items()}


def loss_metrics(split: str, losses: Mapping[float, float]) -> dict[str, float]:
    """Returns the metrics of losses by share: the whole model's and its perplexity, and the losses of other shares.

    None for an evaluation that was cut short.
    """
    if not losses:
        return {}
    whole = losses[1.0]
    found = {f"{split}/lm_loss": whole, f"{split}/perplexity": math.exp(min(whole, 700.0))}
    return found | {f"{split}/lm_loss_share_{share:g}": loss for share, loss in losses.items() if share < 1.0}
