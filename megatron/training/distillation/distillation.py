"""Distillation of a run: the teacher beside the engine, and the loss that both models enter.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.config.sections.distillation import DistillationConfig
from megatron.data.micro_batch import MicroBatch, Targets
from megatron.model.loss import CausalLMLoss
from megatron.mpu.context import ParallelContext
from megatron.mpu.divergence import vocab_parallel_divergence
from megatron.training.distillation.teacher_stage import TeacherStage
from megatron.training.loss_terms import LossTerms


class Distillation:
    """Teacher of a run and its loss.

    The loss is (1 - weight) times the mean cross entropy plus weight times the mean of T^2 D(teacher, student), over
    the positions that count. Evaluation has no teacher, and its loss is the cross entropy.
    """

    def __init__(
        self,
        config: DistillationConfig,
        stage: TeacherStage,
        num_valid: int | None,
        num_tokens: int,
        accumulation: int,
        context: ParallelContext,
    ) -> None:
        self.config, self.stage, self.context = config, stage, context
        self.num_tokens = num_tokens
        """Rows of the vocabulary that are tokens: the divergence is over those."""
        self.accumulation = accumulation
        self._cross_entropy = CausalLMLoss(num_valid, context)
        self._terms = LossTerms(2, accumulation, stage.device, context)

    def attach(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Returns the micro batches of the next step with the teacher's output. Collective, as TeacherStage.attach."""
        self._terms.begin_step()
        return self.stage.attach(batches, self.accumulation)

    def loss(self, logits_BSv: Tensor, targets: Targets | tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Computes the loss of the student's logits [B, S, V/tp].

        `targets` are labels [B, S], weights [B, S] whose mean over the step is 1, and in training the teacher's output
        [B, S or S/tp, D].
        """
        labels_BS, weights_BS, *teacher = targets
        cross_entropy = self._cross_entropy(logits_BSv, (labels_BS, weights_BS))
        if not teacher:
            return cross_entropy
        config = self.config
        divergences_BS = vocab_parallel_divergence(
            logits_BSv,
            self.stage.local_logits(teacher[0]),
            config.divergence,
            config.temperature,
            self.num_tokens,
            self.context,
        )
        divergence = (divergences_BS * weights_BS).mean(dtype=torch.float64)
        self._terms.add(0, (cross_entropy, divergence))
        return (1.0 - config.weight) * cross_entropy + config.weight * divergence

    def step_losses(self) -> dict[str, Tensor]:
        """Returns the terms of the last step's loss by metric, means over the step, on every rank. Collective."""
        cross_entropy, divergence = self._terms.means()
        return {"lm_loss": cross_entropy, "distillation_loss": divergence}
