"""Time of an optimizer step: products by their operations, passes over tensors by their bytes, messages by both.

Nothing is taken to overlap: gradients and weights travel while ranks compute, but how much of that is hidden depends on
the links.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from megatron.config.model_size import training_flops
from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.planner.implementation import BYTES, Implementation
from megatron.planner.layer_costs import Product, layer_costs, shape_of_rank
from megatron.planner.memory import MASTER
from megatron.planner.rates import Rates
from megatron.planner.stages import Stage

ATTENTION_BACKWARD = 2.5
"""Operations of attention's backward pass in terms of its forward pass, whose scores it computes again."""
PLAIN_STEP, FUSED_STEP = 80, 28
"""Bytes that AdamW reads and writes for each parameter: eight operations, over parts on CPUs, or one kernel."""
ADDED_GRADIENT = {"fp32": 12, "fp16": 10, "bf16": 10}
"""Bytes by which a micro batch's gradient is added to those before it, for each parameter."""
REDUCED = {"fp32": 24, "fp16": 22, "bf16": 22}
"""Bytes that the step reads and writes for each parameter before the optimizer: search for NaN, norm, clipping, weights
in the run's number format."""
RESIDENT = 2.0**24
"""Tensors up to which passes run as fast as over memory that is there already [bytes]."""
LOSS_PASSES = {4: (24, 24), 2: (30, 36)}
"""Bytes for each logit, forward and backward, by the bytes of the number format (mpu/cross_entropy.py)."""

PASSES, MESSAGES = "passes over tensors", "tensor-parallel messages"


@dataclass(frozen=True)
class StepTime:
    """Time of a step on its slowest rank [s], by what it goes into; the sum is the whole."""

    parts: dict[str, float]
    model_flops: float
    """Operations of the model for a step, without what is computed again [FLOP]."""

    @property
    def total(self) -> float:
        """Returns the time of a step [s]."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Placement:
    """The way in which ranks lie on machines."""

    world_size: int
    per_machine: int
    """Ranks of a machine; neighbors in rank are tensor-parallel, then data-parallel, then stages."""

    def rate(self, rates: Rates, size: int, stride: int) -> float:
        """Returns the rate of collectives of groups of `size` ranks that lie `stride` apart [bytes/s]."""
        if size * stride <= self.per_machine or self.world_size <= self.per_machine:
            return rates.link
        together = max(min(size, self.per_machine // stride), 1)
        return min(rates.link, together * rates.network)


def step_time(
    run: RunConfig,
    batch: BatchConfig,
    stages: Iterable[Stage],
    padded_vocab_size: int,
    implementation: Implementation,
    rates: Rates,
    placement: Placement,
) -> StepTime:
    """Predicts the time of an optimizer step."""
    clock = _Clock(run, batch, padded_vocab_size, implementation, rates, placement)
    parts = max((clock.stage_parts(stage) for stage in stages), key=lambda found: sum(found.values()))
    tokens = batch.global_batch_size * run.model.seq_length
    flops = training_flops(run.model, padded_vocab_size, run.model.seq_length) * tokens
    return StepTime({part: seconds for part, seconds in parts.items() if seconds > 0}, flops)


class _Clock:
    """The sums behind `step_time`."""

    def __init__(
        self,
        run: RunConfig,
        batch: BatchConfig,
        padded_vocab_size: int,
        implementation: Implementation,
        rates: Rates,
        placement: Placement,
    ) -> None:
        model, parallel, training = run.model, run.parallel, run.training
        self.run, self.batch, self.rates, self.placement = run, batch, rates, placement
        self.implementation = implementation
        self.dtype = training.precision.dtype
        self.width = BYTES[self.dtype]
        self.tensor, self.pipe = parallel.model_parallel_size, parallel.pipe_parallel_size
        scores = training.checkpoint_activations.scores
        self.shape = shape_of_rank(model, self.dtype, self.tensor, parallel.sequence_parallel, implementation, scores)
        self.costs = layer_costs(model, self.shape)
        self.tokens = batch.micro_batch_size * model.seq_length
        self.vocabulary = padded_vocab_size / self.tensor

    def stage_parts(self, stage: Stage) -> dict[str, float]:
        """Returns the times of a stage's rank over a step."""
        accumulation = self.batch.gradient_accumulation_steps
        once = {part: stage.num_layers * seconds for part, seconds in self.layer_parts.items()}
        once[PASSES] += self.stage_passes(stage)
        once[MESSAGES] += (stage.has_embedding + stage.has_head) * self.exchange(2 * self.run.model.hidden_size, 1)
        once["head and loss"] = self.head() if stage.has_head else 0.0
        once["messages between stages"] = self.between_stages(stage)
        parts = {part: accumulation * seconds for part, seconds in once.items()}
        if self.pipe > 1:
            parts["waiting for other stages"] = (self.pipe - 1) * sum(once.values())
        parts["gradients over data-parallel ranks"] = self.reduction(stage)
        parts["optimizer"] = self.optimizer(stage)
        return parts

    @cached_property
    def layer_parts(self) -> dict[str, float]:
        """Returns the times of one layer over a micro batch, which do not depend on the stage."""
        recomputed = self.recomputed_share()
        again = self.products(self.costs.score_products) if self.shape.recompute_scores else 0.0
        return {
            "matrix products": (3 + recomputed) * self.products(self.costs.products) + again,
            "attention": (1 + ATTENTION_BACKWARD + recomputed) * self.attention(),
            PASSES: self.passes(recomputed),
            MESSAGES: (2 + recomputed) * self.layer_messages(),
        }

    def recomputed_share(self) -> float:
        """Returns forward passes of the layers that the backward pass has once more."""
        return 1.0 if self.run.training.checkpoint_activations.enabled else 0.0

    def products(self, products: Iterable[Product]) -> float:
        """Returns the time of products with weights, shared by tensor-parallel ranks."""
        seconds = 0.0
        for product in products:
            flops = 2.0 * product.inputs * product.outputs * self.tokens / self.tensor
            seconds += flops / self.rates.products.at(flops)
        return seconds

    def attention(self) -> float:
        """Returns the time of attention's forward pass in one layer: 2 D (S + 1) operations for each token."""
        model = self.run.model
        return 2.0 * model.hidden_size * (model.seq_length + 1) * self.tokens / self.tensor / self.rates.attention

    def passes(self, recomputed: float) -> float:
        """Returns the time of a layer's passes over tensors."""
        passes = self.costs.passes
        moved = ((1 + recomputed) * passes.forward + passes.backward) * self.tokens
        # Joined matrices of keys and values, forward and backward.
        moved += (2 + recomputed) * 2 * self.width * self.costs.copied_weights / self.tensor
        return self.moving(moved, self.typical_tensor()) + self.evaluating(passes.functions * self.tokens)

    def typical_tensor(self) -> float:
        """Returns the size of a layer's larger tensors [bytes], on which the rate of passes over them depends."""
        widest = max(max(product.inputs, product.outputs) for product in self.costs.products) / self.tensor
        return max(widest, self.run.model.hidden_size) * self.tokens * 4.0

    def moving(self, bytes_moved: float, tensor: float) -> float:
        return bytes_moved / self.rates.passes.at(tensor)

    def evaluating(self, count: float) -> float:
        return 0.0 if self.rates.functions is None else count / self.rates.functions

    def stage_passes(self, stage: Stage) -> float:
        """Returns the time of what a micro batch does beside its layers: gradients are added, rows looked up."""
        added: float = ADDED_GRADIENT[self.dtype] * stage.parameters
        if stage.has_embedding:
            # Its gradient is a matrix of zeros, into which rows are added, and which is added to that of the head.
            added += 4 * self.width * stage.vocabulary
        return self.moving(added, 4.0 * max(one.inputs * one.outputs for one in self.costs.products) / self.tensor)

    def head(self) -> float:
        """Returns the time of head and loss, forward and backward."""
        logits = self.vocabulary * self.tokens
        forward, backward = LOSS_PASSES[self.width]
        tensor = 4.0 * logits
        if self.implementation.fused_cross_entropy:
            tensor = min(tensor, 2.0**26)
        products = 3 * self.products([Product(self.run.model.hidden_size, int(self.vocabulary * self.tensor))])
        return products + self.moving((forward + backward) * logits, tensor) + self.evaluating(2 * logits)

    def layer_messages(self) -> float:
        """Returns the time that tensor-parallel ranks exchange in a layer's forward pass."""
        return self.exchange(self.costs.messages, self.costs.exchanges)

    def exchange(self, elements: float, count: int) -> float:
        """Returns the time of `count` exchanges of `elements` in all for each token."""
        if self.tensor == 1:
            return 0.0
        volume = elements * self.tokens * self.width * (self.tensor - 1) / self.tensor
        return volume / self.placement.rate(self.rates, self.tensor, 1) + count * self.rates.latency

    def between_stages(self, stage: Stage) -> float:
        """Returns the time of sending and receiving a micro batch's activations and gradients."""
        if self.pipe == 1:
            return 0.0
        neighbors = (stage.index > 0) + (stage.index < self.pipe - 1)
        volume = self.run.model.hidden_size * self.tokens * self.width * self.shape.share("residual")
        rate = self.placement.rate(self.rates, 2, self.tensor * self.batch.data_parallel_size)
        return neighbors * 2 * (volume / rate + self.rates.latency)

    def reduction(self, stage: Stage) -> float:
        """Returns the time in which gradients and weights travel.

        Both do while ranks compute. How much of it is hidden depends on the links, so all of it counts.
        """
        data = self.batch.data_parallel_size
        if data == 1:
            return 0.0
        rate = self.placement.rate(self.rates, data, self.tensor)
        wire = BYTES[self.run.parallel.communication_data_type]
        volume = (data - 1) / data * stage.parameters * (wire + self.width)
        return volume / rate + 3 * self.rates.latency

    def optimizer(self, stage: Stage) -> float:
        """Returns the time of everything between the last gradient and the next step, but for messages."""
        own = stage.parameters / self.batch.data_parallel_size
        step = FUSED_STEP if self.implementation.fused_optimizer else PLAIN_STEP
        moved = REDUCED[self.dtype] * stage.parameters + step * own
        return self.moving(moved, min(MASTER * own, RESIDENT))
