"""Curves of a checkpoint over the part of its parameter tokens that is read: loss and tasks, parameters and FLOPs."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.fetch import configured_checkpoint
from megatron.config.model_size import count_parameters, forward_flops
from megatron.config.sections.reading import ReadingConfig
from megatron.config.sections.run_config import RunConfig
from megatron.errors import ConfigError
from megatron.loaded_model.read_part import model_that_is_read
from megatron.loaded_model.validation_loss import ValidationLoss, validation_loss
from megatron.mpu.context import ParallelContext

logger = logging.getLogger(__name__)

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares that are measured of a run that was not trained elastic."""
COLUMNS = (
    *("share", "top_k", "parameters", "flops_per_token", "block_sparse_flops_per_token"),
    *("task", "metric", "value", "stderr"),
)


@dataclass(frozen=True)
class Point:
    """One part of a checkpoint's parameter tokens, and what it computes."""

    reading: ReadingConfig
    parameters: int
    """Parameters of the model that is read, embedding included."""
    flops_per_token: float
    """Forward pass, with the values that were chosen alone [FLOP per token]."""
    block_sparse_flops_per_token: float
    """Forward pass by a kernel that reads whole blocks of values around the chosen ones [FLOP per token]."""
    metrics: dict[tuple[str, str], tuple[float, float | None]]
    """Value and standard error by task and metric; the validation loss is validation/loss."""

    def rows(self) -> list[dict[str, Any]]:
        """Returns a row of COLUMNS for each metric."""
        size = (
            *(self.reading.share, self.reading.top_k or ""),
            *(self.parameters, round(self.flops_per_token), round(self.block_sparse_flops_per_token)),
        )
        return [
            dict(zip(COLUMNS, (*size, task, metric, value, "" if error is None else error), strict=True))
            for (task, metric), (value, error) in self.metrics.items()
        ]


def measure_parts(config: RunConfig, samples: int, context: ParallelContext, device: torch.device) -> list[Point]:
    """Measures a checkpoint's validation loss, and the configured tasks of lm-eval, for each part that is to be read.

    Collective. The metrics of tasks are known on rank 0. Raises ConfigError for a part that the model does not have,
    before anything is computed, and what `validation_loss` and `evaluate_checkpoints` raise.
    """
    checkpoint = configured_checkpoint(config.checkpoint)
    parts = parts_to_read(config, checkpoint)
    for part in parts:
        model_that_is_read(checkpoint.config.model, part)
    points = []
    for part in parts:
        run = config.model_copy(update={"reading": part})
        found = validation_loss(run, checkpoint, samples, context, device)
        logger.info("%s, %s: loss %.4f", checkpoint.path, part.title or "everything", found.loss)
        metrics = {("validation", "loss"): (found.loss, None)} | task_metrics(run, context, device)
        points.append(_point(checkpoint, part, found, metrics, config.model.seq_length))
    return points


def parts_to_read(config: RunConfig, checkpoint: Checkpoint) -> list[ReadingConfig]:
    """Returns the parts to measure: the configured ones, or the shares that the checkpoint's run was trained for."""
    reading, elastic = config.reading or ReadingConfig(), checkpoint.config.elastic
    if checkpoint.config.model.param_tokens is None:
        raise ConfigError(f"{checkpoint.path} has no parameter tokens, of which a part could be read.")
    if reading.top_ks is not None:
        return [reading.model_copy(update={"top_k": count, "top_ks": None}) for count in reading.top_ks]
    shares = reading.shares or (SHARES if elastic is None else [*elastic.smaller_shares, 1.0])
    return [reading.model_copy(update={"share": share, "shares": None}) for share in sorted(set(shares))]


def task_metrics(
    config: RunConfig, context: ParallelContext, device: torch.device
) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Scores the configured tasks of lm-eval, if any, and returns value and standard error by task and metric.

    Collective; empty on ranks other than 0.
    """
    if not config.evaluation.tasks:
        return {}
    # It needs lm-eval, which is optional.
    from megatron.inference.evaluation.evaluate_models import evaluate_checkpoints
    from megatron.monitor.evaluation_metrics import metrics_of

    found: dict[tuple[str, str], tuple[float, float | None]] = {}
    for file in evaluate_checkpoints(config, context, device):
        found |= metrics_of(json.loads(file.read_text(encoding="utf-8"))["results"])
    return found


def write_points(points: Sequence[Point], folder: Path) -> list[Path]:
    """Writes token_curve.csv and token_curve.png into a folder; returns both paths.

    The figure is over parameters, or over FLOPs where the points differ in those alone.
    """
    from megatron.inference.evaluation.learning_curve import draw_curve

    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for point in points for row in point.rows()]
    table = folder / "token_curve.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    by_size = len({point.parameters for point in points}) > 1
    over, label = ("parameters", "parameters") if by_size else ("flops_per_token", "forward FLOP per token")
    figure = table.with_suffix(".png")
    draw_curve(sorted(rows, key=lambda row: int(row[over])), over, label).savefig(figure, dpi=150)
    return [table, figure]


def _point(
    checkpoint: Checkpoint,
    part: ReadingConfig,
    found: ValidationLoss,
    metrics: dict[tuple[str, str], tuple[float, float | None]],
    length: int,
) -> Point:
    model, rows = model_that_is_read(checkpoint.config.model, part), checkpoint.vocab.padded
    flops = forward_flops(model, rows, length)
    # Of the products with a layer's weights, half are with keys, all of which are read, and half with values.
    values = flops.layers / 2
    reads = found.value_reads or {"chosen": 1.0, "in_blocks": 1.0}
    unread = {kind: values * (1.0 - share) for kind, share in reads.items()}
    return Point(
        part,
        count_parameters(model, rows),
        flops.total - unread["chosen"],
        flops.total - unread["in_blocks"],
        metrics,
    )
