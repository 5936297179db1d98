"""Loss on held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron.training.stop_request import StopRequest

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


def evaluate(engine: PipelineEngine, batches: Iterator[Any], eval_iters: int, stop: StopRequest) -> float | None:
    """Mean loss over `eval_iters` global batches, the same on every rank [nats per token].

    None when a request to stop comes before the last batch, which ends the evaluation.
    """
    losses = []
    for _ in range(eval_iters):
        if stop.agree(engine.device):
            return None
        losses.append(float(engine.eval_batch(batches)))
    return math.fsum(losses) / len(losses)


def loss_metrics(split: str, loss: float) -> dict[str, float]:
    """The metrics of a loss: itself and its perplexity."""
    return {f"{split}/lm_loss": loss, f"{split}/perplexity": math.exp(min(loss, 700.0))}
