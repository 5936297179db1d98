"""Describes a growth as an event on the curves of a run."""

from __future__ import annotations

from megatron.config.model_size import count_parameters
from megatron.config.sections.growth import GrowthRecord
from megatron.config.sections.model import ModelConfig
from megatron.monitor.metrics_writer import RunEvent


def sizes_in_words(record: GrowthRecord) -> str:
    """Names the sizes that a growth changes, such as `ffn 48 to 96`."""
    before, after = record.before.model_dump(), record.after.model_dump()
    changed = [name for name in after if after[name] != before[name]]
    return ", ".join(f"{name} {before[name]} to {after[name]}" for name in changed)


def growth_event(record: GrowthRecord, larger: ModelConfig, padded_vocab_size: int, training_flops: float) -> RunEvent:
    """Describes a growth for the records of the run, which has the `larger` model from then on.

    `training_flops` are those of all training before it [FLOP].
    """
    parameters = [count_parameters(_with_sizes(larger, sizes.model_dump()), padded_vocab_size)
                  for sizes in (record.before, record.after)]  # fmt: skip
    return RunEvent(
        iteration=record.iteration,
        kind="growth",
        text=f"grown by {record.rules.operator}: {sizes_in_words(record)}; {parameters[0]:,} to {parameters[1]:,} "
        "parameters",
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
