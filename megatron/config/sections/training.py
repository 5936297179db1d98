"""Training: batch, precision, optimizer, schedule, recomputation, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, SerializeAsAny

from megatron.config.bounds import Count, LayerCount, NonNegative, Positive, SampleCount, Seed, StepCount, StepNumber
from megatron.config.learning_rate import LRScheduleConfig
from megatron.config.optimizer import OptimizerConfig, read_optimizer_section
from megatron.config.section import Key, Section


class BatchConfig(Section):
    """The batch triangle as resolved for the data-parallel ranks of this run:
    micro batch x accumulation x data-parallel ranks = global batch."""

    micro_batch_size: PositiveInt
    """Samples per forward pass and data-parallel rank."""

    gradient_accumulation_steps: PositiveInt
    """Micro batches per optimizer step."""

    data_parallel_size: PositiveInt
    """Data-parallel ranks."""

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.data_parallel_size


class PrecisionConfig(Section):
    """Number formats and loss scaling."""

    key_prefix = "fp16."

    dtype: Annotated[Literal["fp32", "bf16", "fp16"], Key("precision")] = "fp32"
    """Format of weights and activations; the optimizer always keeps fp32 master weights."""

    loss_scale: NonNegative = 0.0
    """fp16 only: fixed loss scale, 0 for dynamic."""

    initial_scale_power: int = Field(default=16, ge=0, le=127)
    """fp16 only: the dynamic scale starts at 2 to this power."""

    loss_scale_window: StepCount = 1000
    """fp16 only: steps without overflow before the scale doubles [steps]."""

    hysteresis: Count = 2
    """fp16 only: overflows before the scale halves."""

    min_loss_scale: Count = 1
    """fp16 only: smallest dynamic scale."""


class CheckpointedActivations(Section):
    """Activation checkpointing: recompute layers in the backward pass instead of keeping their activations."""

    enabled: Annotated[bool, Key("checkpoint_activations")] = False
    """Recompute."""

    num_layers: Annotated[LayerCount, Key("checkpoint_num_layers")] = 1
    """Layers between two kept activations [layers]."""

    scores: Annotated[bool, Key("recompute_scores", difference="not a NeoX key")] = False
    """Recompute the scores of Pattentions from their inputs, and nothing else: 44 % less activations in a layer of the
    published sizes for a sixth more FLOPs in their matrix products."""


class NonFiniteConfig(Section):
    """Reaction to a loss or gradient that is NaN or infinite on any rank (fp16's search for a scale apart)."""

    key_prefix = "non_finite_"

    policy: Annotated[Literal["stop", "skip", "rollback"], Key(difference="not a NeoX key")] = "stop"
    """Stop with an error and leave the last checkpoint the last; leave the step out; or go back to the newest complete
    checkpoint and on with the samples after the bad ones."""

    budget: Annotated[StepCount, Key(difference="not a NeoX key")] = 10
    """Steps of the run that may be left out or rolled back before it stops after all [steps]."""


class TrainingConfig(Section):
    """The run's schedule."""

    seed: Seed = 1234
    """Seed of weights, data order and dropout."""

    train_iters: StepCount
    """Optimizer steps [steps]."""

    train_batch_size: SampleCount | None = None
    """Samples per optimizer step, over all ranks [samples]; derived when unset."""

    train_micro_batch_size_per_gpu: SampleCount | None = None
    """Samples per forward pass and data-parallel rank [samples]; derived when unset."""

    gradient_accumulation_steps: SampleCount | None = None
    """Micro batches per optimizer step [micro batches]; derived when unset."""

    gradient_clipping: Annotated[
        NonNegative, Key(difference="published NeoX runs that say 1.0 very likely did not clip; this does")
    ] = 1.0
    """Largest global gradient norm; 0 does not clip."""

    non_finite: NonFiniteConfig = NonFiniteConfig()
    """NaN and infinity."""

    exit_interval: Annotated[
        StepCount | None, Key(difference="saves first, and ends with the exit code that asks to be resumed")
    ] = None
    """Save and end the run after every multiple of this step, with the exit code that asks to be resumed [steps]; None
    does not."""

    exit_duration_in_mins: Annotated[Positive | None, Key(difference="Megatron's key, not NeoX's")] = None
    """Save and end the run at the first step that ends this long after its start, with the exit code that asks to be
    resumed [minutes]; None does not."""

    eval_interval: StepCount = 1000
    """Steps between validations [steps]."""

    eval_iters: StepNumber = 100
    """Global batches per validation and per final test [batches]; 0 does not evaluate."""

    precision: PrecisionConfig = PrecisionConfig()
    """Number formats."""

    optimizer: Annotated[SerializeAsAny[OptimizerConfig], BeforeValidator(read_optimizer_section)]
    """Optimizer."""

    lr_schedule: LRScheduleConfig = LRScheduleConfig()
    """Learning-rate schedule."""

    checkpoint_activations: CheckpointedActivations = CheckpointedActivations()
    """Activation checkpointing."""
