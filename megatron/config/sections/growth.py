"""Growth of a model while it trains, or by a tool: the choices that are independent of each other, and their record."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, SerializerFunctionWrapHandler, model_serializer

from megatron.config.bounds import LayerCount, NonNegative, StepCount, StepNumber, TokenCount
from megatron.config.local_path import PathText
from megatron.config.section import OneOf, Section
from megatron.config.sections.model import ModelConfig
from megatron.registry import variant_names


class ModelSizes(Section):
    """Sizes that growth changes; everything else about a model stays."""

    qkv: TokenCount | None = None
    """Parameter tokens in each of the query, key and value Pattentions [tokens]; None without parameter tokens."""

    proj: TokenCount | None = None
    """Parameter tokens in the output projection's Pattention [tokens]; None without parameter tokens."""

    ffn: TokenCount | None = None
    """Parameter tokens in the feed-forward Pattention [tokens]; None without parameter tokens."""

    num_layers: LayerCount
    """Transformer layers [layers]."""

    @staticmethod
    def of(model: ModelConfig) -> ModelSizes:
        """Returns the sizes of a model."""
        tokens = model.param_tokens
        if tokens is None:
            return ModelSizes(num_layers=model.num_layers)
        return ModelSizes(qkv=tokens.qkv, proj=tokens.proj, ffn=tokens.ffn, num_layers=model.num_layers)

    def in_model(self, model: ModelConfig) -> ModelConfig:
        """Returns the model with these sizes; everything else stays, the scale of the scores too."""
        tokens = model.param_tokens
        if tokens is not None:
            tokens = tokens.model_copy(update={"qkv": self.qkv, "proj": self.proj, "ffn": self.ffn})
        return model.model_copy(update={"num_layers": self.num_layers, "param_tokens": tokens})

    def change_to(self, larger: ModelSizes) -> str:
        """Names the sizes that change, such as `ffn 48 to 96`."""
        before, after = self.model_dump(), larger.model_dump()
        changed = [name for name in after if after[name] != before[name]]
        return ", ".join(f"{name} {before[name]:,} to {after[name]:,}" for name in changed)


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

    rewarm_iters: StepNumber = 0
    """Steps of that warmup [steps]."""

    old_rows_lr: NonNegative = 1.0
    """Multiplier on the learning rate of what was there before; 0 freezes it."""

    old_rows_iters: StepNumber = 0
    """Steps for which old_rows_lr holds after growth [steps]."""

    new_rows_weight_decay: NonNegative | None = None
    """Weight decay of new rows; None means the optimizer's."""

    ramp_iters: StepCount | None = None
    """Steps in which mask_ramp opens the scores of new tokens from 0 to 1 [steps]."""

    perturb: NonNegative = 0.0
    """Noise on what copy and shrink_perturb write, as a share of the standard deviation of the values."""

    shrink: PositiveFloat = Field(default=1.0, le=1.0)
    """Factor of shrink_perturb on the values that were there before."""

    reference: PathText | None = None
    """Checkpoint folder of a deeper model, whose layers append adds above those that there are."""

    insert_at: Literal["spread", "bottom", "top"] = "spread"
    """Place of the layers that insert adds: among the old ones at equal distances, below all, or above all."""

    allow_inexact: bool = False
    """Lets a softmax model grow by an operator that changes its function; copy does not."""

    schedule: Literal["continue", "restart"] = "continue"
    """Learning-rate schedule after growth: from the step where the run was, or from its start, warmup included."""

    data: Literal["continue", "restart"] = "continue"
    """Training data after growth: from where the run was, or from its start."""

    @model_serializer(mode="wrap")
    def _without_unused_reference(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Growths by other operators are saved as they were before append, so that older versions read them.
        values: dict[str, Any] = dump(self)
        return {name: value for name, value in values.items() if name != "reference" or value is not None}


def rule_contradictions(rules: GrowthRules) -> Iterator[tuple[str, str]]:
    """Yields each rule that another one contradicts, by name, with what it needs."""
    if rules.learning_rate != "continue" and not rules.rewarm_iters:
        yield "learning_rate", "needs grow.rewarm_iters: the steps of that warmup"
    if rules.learning_rate == "continue" and rules.rewarm_iters:
        yield "rewarm_iters", "needs grow.learning_rate: rewarm_new or rewarm_all"
    if rules.old_rows_lr != 1.0 and not rules.old_rows_iters:
        yield "old_rows_lr", "needs grow.old_rows_iters: the steps for which it holds"
    if rules.old_rows_lr == 1.0 and rules.old_rows_iters:
        yield "old_rows_iters", "needs grow.old_rows_lr: the multiplier that holds, 0 to freeze"


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
        """Returns the number that scores of new tokens are multiplied by before Theta, after `iteration` steps.

        It opens linearly from 0, at the growth, to 1, `ramp_iters` steps later, and is 1 without a ramp. Nothing but
        this record decides it.
        """
        if self.rules.ramp_iters is None:
            return 1.0
        return min(max((iteration - self.iteration) / self.rules.ramp_iters, 0.0), 1.0)
