"""Growth of a model while it trains, or by a tool: the choices that are independent of each other, and their record."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megatron.config.section import OneOf, Section
from megatron.registry import variant_names


class ModelSizes(Section):
    """Sizes that growth changes; everything else about a model stays."""

    qkv: PositiveInt | None = None
    """Parameter tokens in each of the query, key and value Pattentions [tokens]; None without parameter tokens."""

    proj: PositiveInt | None = None
    """Parameter tokens in the output projection's Pattention [tokens]; None without parameter tokens."""

    ffn: PositiveInt | None = None
    """Parameter tokens in the feed-forward Pattention [tokens]; None without parameter tokens."""

    num_layers: PositiveInt
    """Transformer layers [layers]."""


class GrowthRules(Section):
    """Rules by which a model grows and trains on, chosen apart from each other."""

    key_prefix = "grow."

    operator: Annotated[str, OneOf(partial(variant_names, "megatron.growth.operators"))] = "zero_key"
    """Values of what is new; megatron/growth/operators has one module for each."""

    moments: Literal["keep", "reset_new", "reset_all"] = "keep"
    """Optimizer's moments: kept, with what the operator derives for new rows; kept, but zero for new rows; or all zero,
    and the optimizer's step count too."""

    learning_rate: Literal["continue", "rewarm_new", "rewarm_all"] = "continue"
    """Learning rate after growth: the schedule's; or warmed up once more from 0, for new rows or for all."""

    rewarm_iters: NonNegativeInt = 0
    """Steps of that warmup [steps]."""

    old_rows_lr: NonNegativeFloat = 1.0
    """Multiplier on the learning rate of what was there before; 0 freezes it."""

    old_rows_iters: NonNegativeInt = 0
    """Steps for which old_rows_lr holds after growth [steps]."""

    new_rows_weight_decay: NonNegativeFloat | None = None
    """Weight decay of new rows; None means the optimizer's."""

    ramp_iters: PositiveInt | None = None
    """Steps in which mask_ramp opens the scores of new tokens from 0 to 1 [steps]."""

    perturb: NonNegativeFloat = 0.0
    """Noise on what copy and shrink_perturb write, as a share of the standard deviation of the values."""

    shrink: PositiveFloat = Field(default=1.0, le=1.0)
    """Factor of shrink_perturb on the values that were there before."""

    allow_inexact: bool = False
    """Lets a model of softmax grow though no operator preserves its function."""

    data: Literal["continue", "restart"] = "continue"
    """Training data after growth: from where the run was, or from its start."""


class GrowthRecord(Section):
    """A growth that happened; a checkpoint keeps all of them, and the last one's rules hold while it trains on."""

    iteration: NonNegativeInt
    """Optimizer steps that were done when the model grew [steps]."""

    tokens: NonNegativeInt
    """Training tokens that were read when the model grew [tokens]."""

    before: ModelSizes
    after: ModelSizes

    new_layers: tuple[NonNegativeInt, ...] = ()
    """Transformer layers of the larger model that are new."""

    rules: GrowthRules

    def score_multiplier(self, iteration: int) -> float:
        """Returns what mask_ramp multiplies the scores of new tokens with after `iteration` steps, from 0 to 1."""
        steps = self.rules.ramp_iters
        return 1.0 if steps is None else min(max(iteration - self.iteration, 0) / steps, 1.0)
