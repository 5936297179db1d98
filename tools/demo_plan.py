"""Chooses the model that a machine can train in a given time on a given text, and says why.

The size follows from compute and text: about 20 tokens for each parameter (Hoffmann et al. 2022, arXiv:2203.15556),
where repeated text counts by the data-constrained scaling law (Muennighoff et al. 2023, arXiv:2305.16264). The learning
rate is a power of the width, through the demo's own at width 128 and the published TokenFormer's at width 768.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.monitor.format_quantities import format_count, format_duration

TOKENS_PER_PARAMETER = 20.0
REPETITIONS = 15.39
"""Passes over a text after the first one, from which the next are worth little: R*_D of the scaling law."""
MOST_PASSES = 16
FEWEST_STEPS = 50
PEAK_RATES = ((128, 3e-3), (768, 6e-4))
"""(hidden_size, learning rate) of configs/demo.yml and of the published 150M model."""
TRAINING_SHARE = 0.85
"""Share of the time for steps; evaluation, samples and saves have the rest."""


@dataclass(frozen=True)
class Size:
    """A model of the ladder."""

    hidden_size: int
    num_layers: int
    num_heads: int

    def keys(self) -> dict[str, int]:
        """Returns its keys: as many parameter tokens as the width in projections, four times that in the MLP."""
        width = self.hidden_size
        return {
            "num_layers": self.num_layers, "hidden_size": width, "num_attention_heads": self.num_heads,
            "qkv_slot_num": width, "proj_slot_num": width, "ffn_slot_num": 4 * width,
        }  # fmt: skip


LADDER = (
    Size(64, 2, 2), Size(64, 4, 2), Size(96, 4, 3), Size(128, 4, 4), Size(192, 4, 6), Size(256, 6, 8), Size(384, 6, 12),
    Size(512, 8, 16), Size(768, 12, 12),
)  # fmt: skip
MEASURED_FIRST = LADDER[3]
"""That of configs/demo.yml."""


@dataclass(frozen=True)
class Cost:
    """Parameters and work of a size."""

    parameters: int
    flops_per_token: float
    """Forward and backward [FLOP]."""


@dataclass(frozen=True)
class Plan:
    """A choice, and its reasons."""

    size: Size
    steps: int
    tokens_per_step: int
    reasons: Sequence[str]

    @property
    def learning_rate(self) -> float:
        """Returns the peak."""
        return learning_rate(self.size.hidden_size)

    def keys(self) -> dict[str, object]:
        """Returns the keys of configs/demo.yml that change."""
        quarter = max(self.steps // 4, 1)
        rate = self.learning_rate
        return {
            **self.size.keys(), "train_iters": self.steps, "lr_decay_iters": self.steps, "lr": rate,
            "min_lr": float(f"{rate / 10:.3g}"), "eval_interval": quarter, "checkpoint_factor": 2 * quarter,
            "log_interval": max(self.steps // 100, 1),
        }  # fmt: skip


def learning_rate(hidden_size: int) -> float:
    """Returns the peak learning rate for a width."""
    (narrow, high), (wide, low) = PEAK_RATES
    power = math.log(low / high) / math.log(wide / narrow)
    return float(f"{high * (hidden_size / narrow) ** power:.2g}")


def worth(tokens: float, text_tokens: float) -> float:
    """Returns how many new tokens so many tokens of training are worth, where the text is read again and again."""
    fresh = min(tokens, text_tokens)
    again = max(tokens / text_tokens - 1.0, 0.0)
    return fresh + text_tokens * REPETITIONS * (1.0 - math.exp(-again / REPETITIONS))


def choose_size(costs: Mapping[Size, Cost], flops_per_second: float, seconds: float, text_tokens: int) -> Size:
    """Chooses the largest size that sees about TOKENS_PER_PARAMETER in the time; the smallest where none does."""

    def is_fed(size: Size) -> bool:
        tokens = min(seconds * flops_per_second / costs[size].flops_per_token, MOST_PASSES * text_tokens)
        return worth(tokens, text_tokens) >= TOKENS_PER_PARAMETER * costs[size].parameters

    return max(filter(is_fed, costs), key=lambda size: costs[size].parameters, default=min(costs, key=_width))


def _width(size: Size) -> tuple[int, int]:
    return size.hidden_size, size.num_layers


def make_plan(
    size: Size, cost: Cost, step_seconds: float, seconds: float, text_tokens: int, tokens_per_step: int
) -> Plan:
    """Plans the steps of a size whose step was measured [s], in so many seconds of training [s].

    Raises ValueError where the time is too short for FEWEST_STEPS.
    """
    affordable = int(seconds / step_seconds)
    if affordable < FEWEST_STEPS:
        raise ValueError(f"{affordable} steps of {step_seconds:.2g} s fit, and at least {FEWEST_STEPS} are needed")
    most = MOST_PASSES * text_tokens // tokens_per_step
    steps = min(affordable, most)
    tokens = steps * tokens_per_step
    rate = format_count(cost.flops_per_token * tokens_per_step / step_seconds)
    if most < affordable:
        why = f"{MOST_PASSES} passes over the text, after which more of them teach little"
    else:
        why = f"what fits into {format_duration(seconds)}, {tokens / text_tokens:.1f} passes over the text"
    (narrow, high), (wide, low) = PEAK_RATES
    reasons = [
        f"a step of {tokens_per_step:,} tokens takes {step_seconds:.2g} s here, as measured: {rate}FLOP/s",
        f"{format_count(cost.parameters)} parameters, the largest of {len(LADDER)} sizes that reads about "
        f"{TOKENS_PER_PARAMETER:g} tokens for each of them: {tokens / cost.parameters:.0f}",
        f"{steps:,} steps: {why}",
        f"learning rate {learning_rate(size.hidden_size):g}: on the line from {high:g} at width {narrow} to {low:g} at "
        f"width {wide}, the published model's",
    ]
    return Plan(size, steps, tokens_per_step, reasons)


def with_values(yaml: str, values: Mapping[str, object]) -> str:
    """Returns the text of a YAML with other values of keys that stand in it, each on a line of its own.

    Raises KeyError for a key that does not.
    """
    for key, value in values.items():
        line = re.compile(rf"^(?P<indent> *){re.escape(key)}:.*$", re.MULTILINE)
        if len(line.findall(yaml)) != 1:
            raise KeyError(key)
        yaml = line.sub(lambda found, new=f"{key}: {value}": found["indent"] + new, yaml)  # type: ignore[misc]
    return yaml
