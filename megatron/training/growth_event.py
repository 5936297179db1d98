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
    parameters = [count_parameters(_with_sizes(larger, sizes.model_dump()), padded_vocab_size)
                  for sizes in (record.before, record.after)]  # fmt: skip
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


def _with_sizes(model: ModelConfig, sizes: dict[str, int]) -> ModelConfig:
    tokens = model.param_tokens
    if tokens is not None:
        tokens = tokens.model_copy(update={name: sizes[name] for name in ("qkv", "proj", "ffn")})
    return model.model_copy(update={"num_layers": sizes["num_layers"], "param_tokens": tokens})
