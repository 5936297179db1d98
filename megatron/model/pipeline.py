"""The layer list as a DeepSpeed PipelineModule, the one form in which models are trained.

Shape letters: see megatron/README.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.utils import partition_balanced, partition_uniform
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from megatron.config.sections.model import ModelConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.training import CheckpointedActivations
from megatron.errors import ConfigError
from megatron.model.causal_lm import LayerEntry, VocabSize, global_parameters, layer_entries
from megatron.model.embedding import TiedHead, head_factors, tied_logits
from megatron.model.layer import TransformerLayer
from megatron.model.loss import CausalLMLoss, FusedCausalLMLoss
from megatron.model.pattention import Pattention
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import initialize_parameters

Loss = Callable[[torch.Tensor, Any], torch.Tensor]
"""(logits [B, S, V/tp], targets) -> loss, on the last stage."""


class WeightsAtHand:
    """Weights that need not be waited for."""

    def wait_for(self, layer: int) -> None:
        """Waits for the weights of one of the stage's layers, by its number there."""

    def wait(self) -> None:
        """Waits for all weights."""


class CausalLMPipeline(PipelineModule):  # type: ignore[misc] # DeepSpeed is untyped
    """This rank's pipeline stage: token ids [B, S] to logits [B, S, V/tp], of which the loss takes the mean.

    With `fused_cross_entropy` the last stage returns the head's input and matrix in place of their product, the logits,
    and the loss multiplies them a few rows at a time.

    Between stages goes one tensor, the residual stream [B, S or S/tp, D].

    Recomputation is done here, by torch.utils.checkpoint without reentrance, and DeepSpeed's own stays off
    (activation_checkpoint_interval 0): that one counts layers from the stage's first, so at intervals above 1 it
    misses transformer layers which share a block with the embedding or the head.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab: VocabSize,
        parallel: ParallelConfig,
        context: ParallelContext,
        *,
        checkpointed: CheckpointedActivations,
        fused_cross_entropy: bool = False,
        loss: Loss | None = None,
    ) -> None:
        if context.pipe_size > model.num_layers:
            raise ConfigError(
                f"pipe_parallel_size={context.pipe_size} is more than num_layers={model.num_layers}: "
                f"a stage would be left without a layer. Use at most {model.num_layers}."
            )
        entries = layer_entries(model, vocab, context)
        own_loss = FusedCausalLMLoss if fused_cross_entropy else CausalLMLoss
        super().__init__(
            layers=layer_specs(entries, model),
            topology=PipeModelDataParallelTopology(
                num_pp=context.pipe_size, num_mp=context.tensor_size, num_dp=context.data_size
            ),
            loss_fn=loss or own_loss(vocab.num_valid(model), context),
            partition_method=parallel.pipe_partition_method,
        )
        self.model_config = model
        self.recompute_contexts: Callable[[], tuple[Any, Any]] = noop_context_fn
        """Makes the contexts in which layers run forward, and again where they are recomputed in the backward pass."""
        self.weights: WeightsAtHand = WeightsAtHand()
        """Knows the weights that are still on their way from other ranks."""
        local_entries = entries[self._local_start : self._local_stop]
        self._segments = list(_segments(local_entries, checkpointed))
        if fused_cross_entropy and self.has_head:
            self.forward_funcs[-1] = partial(head_factors, self._head())
        for module in self.modules():
            if isinstance(module, Pattention):
                module.recompute_scores = checkpointed.scores

    def _partition_layers(self, method: str = "uniform") -> None:
        """Decides each stage's layers. Raises ConfigError, on all ranks alike, as `stage_bounds` does."""
        self.parts = stage_bounds(self._layer_specs, method, self.num_stages)
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    def forward(self, forward_input: torch.Tensor) -> Any:
        x: Any = forward_input
        for start, stop, recompute in self._segments:
            if recompute and torch.is_grad_enabled():
                run = partial(self._run, start, stop)
                x = checkpoint(run, x, use_reentrant=False, context_fn=self.recompute_contexts)
            else:
                x = self._run(start, stop, x)
        return x

    def _run(self, start: int, stop: int, x: Any) -> Any:
        for number in range(start, stop):
            self.weights.wait_for(number)
            x = self.forward_funcs[number](x)
        return x

    @property
    def has_head(self) -> bool:
        """Tells whether this is the last stage."""
        return bool(self._local_stop == len(self._layer_specs))

    def body(self) -> list[nn.Module]:
        """Returns this stage's layers in their order, without the head, once their weights are there."""
        self.weights.wait()
        return list(self.forward_funcs[:-1] if self.has_head else self.forward_funcs)

    def layer_parameters(self) -> list[list[nn.Parameter]]:
        """Returns the parameters that each of this stage's layers reads, the head's last."""
        layers = [layer.parameters() if isinstance(layer, nn.Module) else () for layer in self.forward_funcs]
        if self.has_head:
            layers[-1] = self._head().parameters()
        return [list(parameters) for parameters in layers]

    def head_factors(self, x_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what this rank's logits are the product of, on the last stage: x [B, S, D] and a matrix [V/tp, D]."""
        return head_factors(self._head(), x_BSD)

    def _head(self) -> Any:
        tied = self.model_config.tie_embeddings
        return self.tied_modules["embedding"] if tied else self.get_submodule(str(len(self._layer_specs) - 1))

    def _synchronize_tied_weights(self) -> None:
        # Otherwise autograd records DeepSpeed's broadcast, which has no gradient, into the weights themselves.
        with torch.no_grad():
            super()._synchronize_tied_weights()

    def global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields this rank's parameters under their global names."""
        return global_parameters(self.named_parameters(), self.model_config)


def build_pipeline(
    model: ModelConfig,
    vocab: VocabSize,
    parallel: ParallelConfig,
    context: ParallelContext,
    *,
    seed: int,
    checkpointed: CheckpointedActivations,
    fused_cross_entropy: bool = False,
    loss: Loss | None = None,
) -> CausalLMPipeline:
    """Builds this rank's stage with its initial weights, on DeepSpeed's device; `loss` in place of CausalLMLoss.

    Collective over all ranks; `deepspeed.init_distributed` comes first. Raises ConfigError for sizes that do not
    divide, or more stages than layers.
    """
    module = CausalLMPipeline(
        model,
        vocab,
        parallel,
        context,
        checkpointed=checkpointed,
        fused_cross_entropy=fused_cross_entropy,
        loss=loss,
    )
    initialize_parameters(module.global_parameters(), seed, context)
    return module


def layer_specs(entries: Sequence[LayerEntry], model: ModelConfig) -> list[LayerSpec]:
    """Returns the layers as DeepSpeed builds them."""
    return [_layer_spec(entry, model.tie_embeddings) for entry in entries]


def stage_bounds(specs: Sequence[LayerSpec], method: str, stages: int) -> list[int]:
    """Returns the first layer of every stage, and last the number of layers.

    `method` is `uniform`, `parameters` or `type:REGEX`, as DeepSpeed understands them. Raises ConfigError where that
    leaves a stage nothing to train, or no layer has the type.
    """
    names = [spec.typename.__name__ for spec in specs]
    counts = [_count_parameters(spec) for spec in specs]
    kind, _, pattern = method.partition(":")
    if kind == "uniform":
        bounds = partition_uniform(len(specs), stages)
    elif kind == "parameters":
        bounds = partition_balanced(counts, stages)
    else:
        matches = [int(re.search(pattern, name, re.IGNORECASE) is not None) for name in names]
        if not any(matches):
            raise ConfigError(
                f"pipe_partition_method={method}: no layer has such a name, only {', '.join(dict.fromkeys(names))}. "
                "Use type:transformer, which spreads the transformer layers evenly."
            )
        bounds = partition_balanced(matches, stages)
    for stage, (start, stop) in enumerate(pairwise(bounds)):
        if not any(counts[start:stop]):
            raise ConfigError(
                f"pipe_partition_method={method} leaves stage {stage} of pipe_parallel_size={stages} "
                f"without parameters ({', '.join(names[start:stop])}). Use type:transformer, or fewer stages."
            )
    return list(bounds)


def _layer_spec(entry: LayerEntry, tie_embeddings: bool) -> LayerSpec:
    if not (tie_embeddings and entry.name == "embedding"):
        return LayerSpec(entry.module, *entry.arguments)
    forward: Callable[..., Any] | None = tied_logits if entry.module is TiedHead else None
    return TiedLayerSpec(
        "embedding",
        entry.module,
        *entry.arguments,
        forward_fn=forward,
        tied_weight_attr=["word_embeddings.weight"],
    )


def _count_parameters(spec: LayerSpec) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in spec.build().parameters())


def _segments(entries: list[LayerEntry], checkpointed: CheckpointedActivations) -> Iterator[tuple[int, int, bool]]:
    """Yields the ranges [start, stop) of a stage's layers that run together, and whether each is recomputed."""
    start = 0
    for is_transformer, run in groupby(entries, key=lambda entry: entry.module is TransformerLayer):
        end = start + len(list(run))
        recompute = is_transformer and checkpointed.enabled
        step = checkpointed.num_layers if recompute else end - start
        for first in range(start, end, step):
            yield first, min(first + step, end), recompute
        start = end
