"""Elastic training of a run: the shares of each pass over a step's micro batches, and the loss of those with two.

With two passes the engine accumulates over twice as many micro batches: each comes once for the whole model and then
once more for a share. Stages of a pipeline take micro batches in this order forward, so that each knows the pass by
counting; where activations are recomputed in the backward pass, they are with the share that they were computed with.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.sections.elastic import ElasticConfig
from megatron.config.sections.model import ModelConfig
from megatron.data.micro_batch import MicroBatch, Targets
from megatron.model.pipeline import CausalLMPipeline
from megatron.model.token_shares import TokenShares, sublayer_names
from megatron.mpu.context import ParallelContext
from megatron.mpu.divergence import vocab_parallel_divergence
from megatron.training.elastic.step_shares import WHOLE, mean_saved_flops, saved_flops, step_shares
from megatron.training.loss_terms import LossTerms

CrossEntropy = Callable[[Any, Targets], Tensor]
"""(what the last stage returns, targets) -> loss."""

FULL_LOSS, SHARE_LOSS, DIVERGENCE = range(3)


class TwoPassLoss:
    """Loss of micro batches that come twice: the mean of the whole model's and a share's.

    The whole model's is its cross entropy, the share's (1 - weight) times its own plus weight times the mean of
    T^2 KL(whole model || share) over the positions that count. Evaluation has the cross entropy alone.
    """

    def __init__(
        self,
        config: ElasticConfig,
        cross_entropy: CrossEntropy,
        num_tokens: int,
        accumulation: int,
        device: torch.device,
        context: ParallelContext,
    ) -> None:
        """Takes the number of the vocabulary's rows that are tokens: the divergence is over those."""
        self.config, self.num_tokens, self.context = config, num_tokens, context
        self.is_of_share = False
        """Whether the micro batch comes for the second time."""
        self.terms = LossTerms(3, accumulation, device, context)
        self._cross_entropy = cross_entropy
        self._whole_BSv: Tensor | None = None

    def __call__(self, output: Any, targets: Targets) -> Tensor:
        """Computes the loss of what the last stage returns: logits [B, S, V/tp], or the factors of a fused loss.

        `targets` are labels [B, S], and weights [B, S] whose mean over the step is 1.
        """
        cross_entropy = self._cross_entropy(output, targets)
        if not torch.is_grad_enabled():
            return cross_entropy
        weight = self.config.distillation_weight
        if not self.is_of_share:
            self.terms.add(FULL_LOSS, [cross_entropy])
            if weight:
                self._whole_BSv = output.detach()
            return cross_entropy
        self.terms.add(SHARE_LOSS, [cross_entropy])
        if self._whole_BSv is None:
            return cross_entropy
        whole_BSv, self._whole_BSv = self._whole_BSv, None
        divergences_BS = vocab_parallel_divergence(
            output, whole_BSv, "forward_kl", self.config.temperature, self.num_tokens, self.context
        )
        divergence = (divergences_BS * targets[1]).mean(dtype=torch.float64)
        self.terms.add(DIVERGENCE, [divergence])
        return (1.0 - weight) * cross_entropy + weight * divergence


class ElasticTraining:
    """Shares of a run's steps on one rank. Between steps, and so for evaluation, the model is whole."""

    def __init__(
        self,
        config: ElasticConfig,
        model: ModelConfig,
        seed: int,
        module: CausalLMPipeline,
        loss: TwoPassLoss | None,
        whole_flops: int,
        context: ParallelContext,
    ) -> None:
        """Takes the loss of a run with two passes, and what a pass of the whole model costs [FLOP per token]."""
        groups = 1 if model.param_tokens is None else model.param_tokens.groups
        self.config, self.model, self.seed = config, model, seed
        self.tokens = TokenShares(module.modules(), module.global_parameters(), groups, context)
        self.whole_flops = whole_flops
        self._loss = loss
        self._passes = [WHOLE]
        self._forwards = 0
        if config.passes > 1:
            module.register_forward_pre_hook(self._begin_pass)
            module.recompute_contexts = self._recompute_contexts

    def begin_step(self, iteration: int) -> None:
        """Reads the shares of the step that follows `iteration` steps."""
        self._passes = step_shares(self.config, self.model, self.seed, iteration)
        self._forwards = 0
        self.tokens.read(self._passes[0])
        if self._loss is not None:
            self._loss.terms.begin_step()

    def repeat(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yields each micro batch as often as there are passes; reads none ahead."""
        for batch in batches:
            for _ in self._passes:
                yield batch

    def reading(self, share: float) -> AbstractContextManager[None]:
        """Reads one share in all sublayers inside, to evaluate it."""
        return self.tokens.reading(dict.fromkeys(sublayer_names(self.model), share) if share < 1.0 else WHOLE)

    def end_step(self) -> None:
        """Reads the whole model again."""
        self.tokens.read(WHOLE)

    @property
    def further_flops(self) -> int:
        """Counts what the step costs beyond a step of the whole model; below 0 what it saves [FLOP per token]."""
        further = self.whole_flops * (len(self._passes) - 1)
        return further - sum(saved_flops(self.model, shares) for shares in self._passes)

    @property
    def mean_further_flops(self) -> float:
        """Counts the same of a mean step [FLOP per token]."""
        saved = mean_saved_flops(self.config, self.model)
        if self.config.full_model == "always":
            return self.whole_flops - saved
        return -saved / 2 if self.config.full_model == "alternate" else -saved

    def losses(self, total: Tensor, cross_entropy: Tensor) -> dict[str, Tensor]:
        """Returns the last step's losses by metric, from the engine's whole loss and the cross entropy of its passes.

        Collective with two passes.
        """
        shares = set(self._passes[-1].values()) or {1.0}
        name = f"lm_loss_share_{shares.pop():g}" if self.config.sample == "model" else "lm_loss_shares"
        if self._loss is None:
            return {name: cross_entropy}
        full, share, divergence = self._loss.terms.means()
        terms = {"distillation_loss": divergence} if self.config.distillation_weight else {}
        return {"loss": total, "lm_loss": full, name: share, **terms}

    def _begin_pass(self, module: nn.Module, arguments: Any) -> None:
        """Reads the share of the micro batch that goes forward next."""
        if not module.training:
            return
        number = self._forwards % len(self._passes)
        self._forwards += 1
        self.tokens.read(self._passes[number])
        if self._loss is not None:
            self._loss.is_of_share = number > 0

    def _recompute_contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), self.tokens.reading(self.tokens.shares)
