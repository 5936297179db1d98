"""Describes a growth as an event on the curves of a run."""

from __future__ import annotations

from megatron.config.model_size import count_parameters
from megatron.config.sections.growth import GrowthRecord
from megatron.config.sections.model import ModelConfig
from megatron.monitor.metrics_writer import RunEvent


def growth_event(record: GrowthRecord, larger: ModelConfig, padded_vocab_size: int, training_flops: float) -> RunEvent:
    """Describes a growth for the records of the run, which has the `larger` model from then on.

    `training_flops` are those of all training before it [FLOP].
    """
    models = [sizes.in_model(larger) for sizes in (record.before, record.after)]
    parameters = [count_parameters(model, padded_vocab_size) for model in models]
    return RunEvent(
        iteration=record.iteration,
        kind="growth",
        text=f"grown by {record.rules.operator}: {record.before.change_to(record.after)}; {parameters[0]:,} to "
        f"{parameters[1]:,} parameters",
        details={
            "consumed_tokens": record.tokens,
            "training_flops": training_flops,
            "operator": record.rules.operator,
            "before": record.before.model_dump(),
            "after": record.after.model_dump(),
            "parameters_before": parameters[0],
            "parameters_after": parameters[1],
        },
    )
