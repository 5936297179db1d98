"""Loss on held-out data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepspeed.runtime.pipe.engine import PipelineEngine


def evaluate(engine: PipelineEngine, batches: Iterator[Any], eval_iters: int) -> float:
    """Mean loss over `eval_iters` global batches, the same on every rank [nats per token]."""
    losses = [float(engine.eval_batch(batches)) for _ in range(eval_iters)]
    return math.fsum(losses) / len(losses)


def loss_metrics(split: str, loss: float) -> dict[str, float]:
    """The metrics of a loss: itself and its perplexity."""
    return {f"{split}/lm_loss": loss, f"{split}/perplexity": math.exp(min(loss, 700.0))}
