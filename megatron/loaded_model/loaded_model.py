"""A trained model in memory: logits, next-token logits, and the log-probabilities of given tokens.

B batch, S sequence, D hidden, V padded vocabulary, W tokens to score. The caller pads batches to a rectangle: padding
on the right needs no mask, since no token sees a later one; padding on the left is known to a cache. All ranks of a
tensor-parallel group must make the same calls, and get the same results.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.checkpointing.states.load_parameters import load_parameters
from megatron.checkpointing.states.same_model import described_model, model_differences
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import Tokenizer
from megatron.errors import CheckpointError, ConfigError
from megatron.kernels.pattention.top_k import ValueReads
from megatron.loaded_model.read_part import choose_tokens, layers_that_are_read, model_that_is_read
from megatron.model.causal_lm import LocalCausalLM, VocabSize, build_local
from megatron.model.kv_cache import KeyValueCache
from megatron.model.speedups import apply_speedups, choose_speedups
from megatron.mpu.collectives import gather_output, max_over_ranks
from megatron.mpu.context import ParallelContext
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy
from megatron.mpu.parameters import DTYPES

LOGITS_AT_A_TIME = 2**26
"""Logits that scoring holds at a time, over all tensor-parallel ranks."""


class TokenScores(NamedTuple):
    """Scores of given tokens, on the CPU."""

    log_probs: Tensor
    """log softmax(logits)[token] [W], natural, float32."""
    greedy: Tensor
    """True where the token is the likeliest one, the first of equals [W]."""


class LoadedModel:
    """A model without its engine: evaluation mode, frozen, tensor parallel, one pipeline stage."""

    def __init__(
        self, module: LocalCausalLM, config: ModelConfig, vocab: VocabSize, reads: ValueReads | None = None
    ) -> None:
        self.module = module.eval().requires_grad_(False)
        self.config = config
        self.vocab = vocab
        self.reads = reads
        """Counts the values that positions have read, where they read the strongest tokens alone."""
        self.context = module.context
        weight = module.embedding.word_embeddings.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.context_length = config.seq_length
        """Longest sequence to give it [tokens]."""

    def new_cache(self, batch: int, capacity: int, padding_B: Tensor | None = None) -> KeyValueCache:
        """Makes an empty cache for `batch` sequences of up to `capacity` columns; `padding_B` as in KeyValueCache."""
        return self.module.new_cache(batch, capacity, padding_B)

    @torch.no_grad()  # not inference_mode: the loss of another model may depend on them, as in distillation
    def logits(self, tokens_BS: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Computes logits [B, S, V] in the model's format; with a cache, the tokens follow those that it has seen."""
        hidden_BSD = self.module.hidden_states(tokens_BS.to(self.device), cache)
        return gather_output(self.module.local_logits(hidden_BSD), -1, self.context)

    @torch.inference_mode()
    def next_logits(
        self, tokens_BS: Tensor, cache: KeyValueCache | None = None, *, lengths_B: Tensor | None = None
    ) -> Tensor:
        """Computes float32 logits [B, vocab.actual] of the token after the last one, or after the first `lengths_B`."""
        hidden_BSD = self.module.hidden_states(tokens_BS.to(self.device), cache)
        if lengths_B is None:
            last_B1D = hidden_BSD[:, -1:]
        else:
            rows_B = torch.arange(len(hidden_BSD), device=self.device)
            last_B1D = hidden_BSD[rows_B, lengths_B.to(self.device) - 1].unsqueeze(1)
        logits_B1V = gather_output(self.module.local_logits(last_B1D), -1, self.context)
        return logits_B1V[:, 0, : self.vocab.actual].float()

    @torch.inference_mode()
    def score_tokens(self, tokens_BS: Tensor, wanted_W3: Tensor) -> TokenScores:
        """Scores each wanted (row, position, token): that token, after the row's tokens up to that position.

        Rows are filled up with anything on the right. Softmax and maximum run over what training's softmax ran over:
        the padded vocabulary, or without its padding rows under `mask_padded_vocab`. The head sees the wanted positions
        alone, a few at a time, and the vocabulary is not gathered.
        """
        hidden_BSD = self.module.hidden_states(tokens_BS.to(self.device))
        rows_W, positions_W, targets_W = wanted_W3.to(self.device).unbind(1)
        hidden_WD = hidden_BSD[rows_W, positions_W]
        num_valid = self.vocab.num_valid(self.config)
        step = max(LOGITS_AT_A_TIME * self.context.tensor_size // self.vocab.padded, 1)
        log_probs, greedy = [], []
        for part_WD, part_W in zip(torch.split(hidden_WD, step), torch.split(targets_W, step), strict=True):
            logits_1Wv = self.module.local_logits(part_WD.unsqueeze(0))
            losses_1W = vocab_parallel_cross_entropy(logits_1Wv, part_W.unsqueeze(0), num_valid, self.context)
            log_probs.append(-losses_1W[0])
            greedy.append(vocab_parallel_argmax(logits_1Wv, num_valid, self.context)[0] == part_W)
        return TokenScores(torch.cat(log_probs).cpu(), torch.cat(greedy).cpu())


def vocab_parallel_argmax(logits: Tensor, num_valid: int | None, context: ParallelContext) -> Tensor:
    """Finds the index of the largest of logits [..., V/tp] over all ranks' shares: [...], replicated.

    The first of equals wins. Rows from `num_valid` on are left out; None lets all in.
    """
    first = context.tensor_rank * logits.shape[-1]
    if num_valid is not None:
        padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= num_valid
        logits = logits.masked_fill(padding, -torch.inf)
    values, indices = logits.max(-1)
    elsewhere = values < max_over_ranks(values, context)
    # The smallest index is the largest of the negated ones.
    return -max_over_ranks((-indices - first).masked_fill(elsewhere, torch.iinfo(indices.dtype).min), context)


def require_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raises ConfigError when a checkpoint was trained with another vocabulary than the tokenizer's."""
    if checkpoint.state.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"{checkpoint.path} was trained with a vocabulary of {checkpoint.state.vocab_size:,} ids, and the "
            f"configured tokenizer has {tokenizer.vocab_size:,}. Configure the tokenizer of the run."
        )


def load_model(
    config: RunConfig, checkpoint: Checkpoint, context: ParallelContext, device: torch.device
) -> LoadedModel:
    """Loads this rank's share of a trained model, whatever layout wrote it, in the configured precision.

    Of its parameter tokens it reads what the section `reading` says.
    Speed-ups are chosen as in training, but nothing is compiled: inputs have too many shapes. Raises ConfigError when
    the configuration describes another model than the checkpoint's, or one that does not split over the ranks of
    `context`; CheckpointError for weights that are damaged or not finite; EnvironmentSetupError for a speed-up that is
    on and cannot be had.
    """
    model = described_model(config, checkpoint)
    speedups = choose_speedups(
        config.speedups,
        config.training.precision,
        config.training.optimizer,
        on_gpu=device.type == "cuda",
        theta=None if model.param_tokens is None else model.param_tokens.theta,
    )
    differences = model_differences(checkpoint.config.model, model)
    if differences:
        raise ConfigError(
            f"{checkpoint.path} holds another model than the configuration describes: {'; '.join(differences)}. Give "
            "the configuration that it was trained with."
        )
    vocab, whole = checkpoint.vocab, model
    model = model_that_is_read(whole, config.reading)
    with device:
        module = build_local(model, vocab, None, context).to(DTYPES[config.training.precision.dtype])
    load_parameters(module.named_parameters(), checkpoint, context, change=layers_that_are_read(whole, model))
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{checkpoint.path}: {name} holds NaN, infinity, or numbers too large for {parameter.dtype}. Choose "
                "another checkpoint."
            )
    apply_speedups(module, replace(speedups, compile=False))
    return LoadedModel(module, model, vocab, choose_tokens(module, config.reading))
