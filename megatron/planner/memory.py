"""Memory of a rank, by part and moment of a step, from what the engine allocates.

The engine is DeepSpeed's pipeline engine under ZeRO-1 (its 0.19: runtime/bf16_optimizer.py, zero/stage_1_and_2.py and
pipe/engine.py) with the model of megatron/model. A step's memory has no single peak: the loss, the backward pass of the
last layer, the reduction of gradients and the optimizer's step each hold something that the others do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron.config.sections.run_config import RunConfig
from megatron.config.sections.training import BatchConfig
from megatron.planner.implementation import BYTES, Implementation
from megatron.planner.layer_costs import LayerCosts, kept_bytes, layer_costs, norm_kept, shape_of_rank
from megatron.planner.stages import Stage

MASTER = 4
"""Bytes of a master weight, of a moment, and of a gradient as it is accumulated and reduced."""
LOSS_CHUNK = {True: 2**29, False: 2**26}
"""Wide logits of a chunk of the fused loss on a GPU, and on a CPU [bytes] (mpu/linear_cross_entropy.py)."""
WEIGHTS, MASTERS, GRADIENTS = "weights", "optimizer state", "gradients"
ACTIVATIONS, RECOMPUTED, SCRATCH = "activations", "layers computed again", "backward pass of a layer"
LOGITS, STAGE_BUFFERS, BUFFERS = "logits and loss", "pipeline buffers", "reduction buffers"
STEP = "optimizer's step"


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank of a pipeline stage [bytes]."""

    stage: int
    moments: dict[str, dict[str, float]]
    """What is held at each moment of a step, by part."""
    host_copy: float
    """Copy in host memory of what an asynchronous save writes; 0 without."""
    files: float
    """Bytes that the rank writes into a checkpoint, of those that tensor and data ranks share its part."""
    not_returned: float
    """Most that the C library of a CPU's rank keeps of freed tensors; 0 on a GPU."""

    @cached_property
    def peak_moment(self) -> str:
        """Returns the moment of the step with the most memory."""
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def parts(self) -> dict[str, float]:
        """Returns what is held then, by part."""
        return self.moments[self.peak_moment]

    @cached_property
    def peak(self) -> float:
        """Returns the most memory of a step [bytes]."""
        return sum(self.parts.values())


def rank_memory(
    run: RunConfig, batch: BatchConfig, stage: Stage, padded_vocab_size: int, implementation: Implementation
) -> RankMemory:
    """Predicts the memory of a rank of `stage` in a step after the first."""
    return _Rank(run, batch, stage, padded_vocab_size, implementation).memory()


class _Rank:
    """The sums behind `rank_memory`, all of them in bytes."""

    def __init__(
        self, run: RunConfig, batch: BatchConfig, stage: Stage, padded_vocab_size: int, implementation: Implementation
    ) -> None:
        model, parallel, training = run.model, run.parallel, run.training
        self.run, self.batch, self.stage, self.implementation = run, batch, stage, implementation
        self.dtype = training.precision.dtype
        self.width = BYTES[self.dtype]
        scores = training.checkpoint_activations.scores
        self.shape = shape_of_rank(
            model, self.dtype, parallel.model_parallel_size, parallel.sequence_parallel, implementation, scores
        )
        self.costs: LayerCosts = layer_costs(model, self.shape)
        self.tokens = batch.micro_batch_size * model.seq_length
        self.parameters = stage.parameters
        self.data = batch.data_parallel_size
        self.own_parameters = self.parameters / self.data
        self.vocabulary = padded_vocab_size / parallel.model_parallel_size
        self.is_first, self.is_last = stage.index == 0, stage.index == parallel.pipe_parallel_size - 1
        self.in_flight = min(parallel.pipe_parallel_size - stage.index, batch.gradient_accumulation_steps)

    def memory(self) -> RankMemory:
        held = {
            WEIGHTS: self.width * self.parameters,
            MASTERS: MASTER * (1 + self.implementation.moments) * self.own_parameters,
            STAGE_BUFFERS: self.stage_buffers(),
        }
        kept, recomputed = self.activations()
        moments = {
            "loss": {
                **held,
                GRADIENTS: MASTER * self.parameters,
                ACTIVATIONS: kept,
                LOGITS: self.loss(),
            },
            "backward pass": {
                **held,
                GRADIENTS: MASTER * self.parameters + self.largest_gradient(),
                ACTIVATIONS: kept,
                RECOMPUTED: recomputed,
                SCRATCH: self.costs.scratch * self.tokens if self.stage.num_layers else 0.0,
                LOGITS: self.logits_between(),
            },
            "gradient reduction": {
                **held,
                GRADIENTS: MASTER * self.parameters,
                LOGITS: self.logits_between(),
                BUFFERS: self.on_the_wire(),
            },
            "optimizer step": {
                **held,
                GRADIENTS: MASTER * self.parameters,
                LOGITS: self.logits_between(),
                STEP: self.optimizer_step(),
            },
        }
        moments = {moment: {part: size for part, size in parts.items() if size} for moment, parts in moments.items()}
        written = (
            self.width * self.parameters + MASTER * (1 + self.implementation.moments) * self.own_parameters * self.data
        )
        copied = self.width * self.parameters + MASTER * (1 + self.implementation.moments) * self.own_parameters
        return RankMemory(
            self.stage.index,
            moments,
            host_copy=copied if self.run.checkpoint.async_save else 0.0,
            files=written,
            not_returned=self.not_returned(moments["backward pass"]),
        )

    def not_returned(self, backward: dict[str, float]) -> float:
        """Returns what the C library keeps at most of freed tensors: as much again as a step makes and frees.

        glibc before 2.38 cannot use a freed aligned block for another of the same size, and gives back to the system
        only what lies at the end of its heap.
        """
        if self.implementation.on_gpu:
            return 0.0
        made = sum(backward.get(part, 0.0) for part in (ACTIVATIONS, RECOMPUTED, SCRATCH, LOGITS))
        return made + MASTER * self.parameters

    def activations(self) -> tuple[float, float]:
        """Returns what micro batches in flight keep, and what one group of layers keeps while it is computed again."""
        stream = self.run.model.hidden_size * self.width * self.shape.share("residual")
        layer, layers = self.costs.kept_bytes(self.shape), self.stage.num_layers
        again = self.run.training.checkpoint_activations
        recomputed = 0.0
        if again.enabled and layers:
            group = min(again.num_layers, layers)
            kept = -(-layers // group) * stream
            recomputed = group * layer - stream
        else:
            kept = layers * layer
        if self.stage.has_final_norm:
            model = self.run.model
            norm = norm_kept(model, self.shape, "final norm", of_input=True, norm=model.final_norm)
            kept += kept_bytes(norm, self.shape)
        if self.stage.has_embedding and self.run.model.hidden_dropout:
            kept += self.run.model.hidden_size * (1 if self.implementation.on_gpu else self.width)
        return self.in_flight * kept * self.tokens, recomputed * self.tokens

    def stage_buffers(self) -> float:
        """Returns tensors that stages send each other: one for each micro batch in flight, and one to receive into.

        The first stage has token ids as well: as they are read, as the engine copies them, and as labels.
        """
        stream = self.run.model.hidden_size * self.width * self.shape.share("residual") * self.tokens
        ends = (not self.is_first) + (not self.is_last)
        ids = self.in_flight * 3 * 8 * self.tokens if self.stage.has_embedding else 0.0
        return ends * (self.in_flight + 1) * stream + ids

    def logits_between(self) -> float:
        """Returns the last stage's outputs that its pipeline buffers hold between steps, two at most."""
        if not self.is_last:
            return 0.0
        buffers = min(2, self.batch.gradient_accumulation_steps)
        return buffers * self.tokens * self.width * (self.run.model.hidden_size if self.is_fused else self.vocabulary)

    def loss(self) -> float:
        """Returns the most that the head and the loss hold, over their forward and backward pass."""
        if not self.is_last:
            return 0.0
        hidden = self.run.model.hidden_size
        if self.is_fused:
            rows = min(max(LOSS_CHUNK[self.implementation.on_gpu] // int(self.vocabulary * 4), 1), self.tokens)
            chunk = rows * self.vocabulary * (self.width + (MASTER if self.width < MASTER else 0))
            computing = chunk + self.tokens * hidden * self.width + self.head_gradient(MASTER)
            rounded = self.head_gradient(MASTER) + (self.head_gradient(self.width) if self.width < MASTER else 0.0)
            return self.logits_between() + max(computing, rounded + 2 * self.tokens * hidden * self.width)
        # Forward: wide logits and their exponentials. Backward: wide logits, softmax, and its rounded gradient.
        wide = 4 + 4 if self.width == 4 else self.width + 4 + 4 + self.width
        stale = self.logits_between() * (self.batch.gradient_accumulation_steps > 1) / 2
        gradients = self.head_gradient(self.width) + self.tokens * hidden * self.width
        backward = 2 * self.width * self.vocabulary * self.tokens + gradients
        return stale + max(wide * self.vocabulary * self.tokens, backward)

    @property
    def is_fused(self) -> bool:
        return self.implementation.fused_cross_entropy

    def head_gradient(self, width: int) -> float:
        """Returns a gradient of the head's matrix, on the last stage."""
        return width * self.stage.vocabulary if self.is_last else 0.0

    def largest_gradient(self) -> float:
        """Returns the largest matrix's gradient, before it is added to the flat ones that stay from step to step."""
        if not self.stage.num_layers:
            return 0.0
        return max(one.inputs * one.outputs for one in self.costs.products) / self.shape.tensor * self.width

    def on_the_wire(self) -> float:
        """Returns copies of gradients that travel in another format; fp32 ones do where they lie."""
        wire = BYTES[self.run.parallel.communication_data_type]
        return wire * self.parameters if self.data > 1 and wire < MASTER else 0.0

    def optimizer_step(self) -> float:
        """Returns what the optimizer holds for itself."""
        largest = max(self.stage.matrices, self.stage.vectors) / self.data
        # torch's AdamW of plain operations has the root of a moment, and its quotient: on CPUs, of a part at a time.
        holds_nothing = self.implementation.fused_optimizer or not self.implementation.on_gpu
        return 0.0 if holds_nothing else 2 * MASTER * largest
