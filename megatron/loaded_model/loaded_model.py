"""A trained model ready to be asked: next tokens, logits, and the log-probabilities of given tokens.

B batch, S sequence, V padded vocabulary. Batches are padded to a rectangle by whoever asks. On the right, what fills
them up needs no mask: no token sees a later one. On the left, a cache knows the padding. All ranks of a
tensor-parallel group must make the same calls, and get the same answers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.checkpointing.states.load_parameters import load_parameters
from megatron.checkpointing.states.same_model import model_differences
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.find_checkpoint import find_checkpoint
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import Tokenizer
from megatron.errors import CheckpointError, ConfigError
from megatron.model.causal_lm import LocalCausalLM, VocabSize, build_local
from megatron.model.kv_cache import KeyValueCache
from megatron.model.number_formats import DTYPES
from megatron.model.speedups import apply_speedups, choose_speedups
from megatron.mpu.collectives import gather_output, max_over_ranks
from megatron.mpu.context import ParallelContext
from megatron.mpu.cross_entropy import vocab_parallel_cross_entropy

LOGITS_AT_A_TIME = 2**26


class Scores(NamedTuple):
    """What the model thinks of given tokens; on the CPU."""

    log_probs: Tensor
    """log softmax(logits)[token] [N], natural, float32."""
    greedy: Tensor
    """Whether the token is the likeliest one, the first of equals [N]."""


class InferenceModel:
    """A model without its engine: evaluation mode, no gradients, tensor parallel, one pipeline stage."""

    def __init__(self, model: LocalCausalLM, config: RunConfig, vocab: VocabSize) -> None:
        self.model = model.eval().requires_grad_(False)
        self.model_config = config.model
        self.vocab = vocab
        self.context = model.context
        weight = model.embedding.word_embeddings.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.context_length = config.model.seq_length
        """Longest sequence to give it [tokens]."""

    def new_cache(self, batch: int, capacity: int, padding_B: Tensor | None = None) -> KeyValueCache:
        """An empty cache for `batch` sequences of up to `capacity` columns; `padding_B` as in KeyValueCache."""
        return KeyValueCache(
            self.model_config,
            self.context,
            batch=batch,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
            padding_B=padding_B,
        )

    @torch.inference_mode()
    def logits(self, tokens_BS: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Logits [B, S, V] in the model's format; with a cache, the tokens follow those that it has seen."""
        hidden_BSD = self.model.hidden_states(tokens_BS.to(self.device), cache)
        return gather_output(self.model.local_logits(hidden_BSD), -1, self.context)

    @torch.inference_mode()
    def next_logits(
        self, tokens_BS: Tensor, cache: KeyValueCache | None = None, *, lengths_B: Tensor | None = None
    ) -> Tensor:
        """float32 logits [B, vocab.actual] of the token after the last one, or after the first `lengths_B` of a row."""
        hidden_BSD = self.model.hidden_states(tokens_BS.to(self.device), cache)
        if lengths_B is None:
            last_B1D = hidden_BSD[:, -1:]
        else:
            rows_B = torch.arange(len(hidden_BSD), device=self.device)
            last_B1D = hidden_BSD[rows_B, lengths_B.to(self.device) - 1].unsqueeze(1)
        logits_B1V = gather_output(self.model.local_logits(last_B1D), -1, self.context)
        return logits_B1V[:, 0, : self.vocab.actual].float()

    @torch.inference_mode()
    def score_tokens(self, tokens_BS: Tensor, wanted_N3: Tensor) -> Scores:
        """How likely each wanted (row, position, token) is: that token, after the row's tokens up to that position.

        Rows are filled up with anything on the right. Softmax and maximum run over what training's softmax ran over:
        the padded vocabulary, or without its padding rows under `mask_padded_vocab`. The head sees the wanted positions
        alone, a few at a time, and the vocabulary is not gathered.
        """
        hidden_BSD = self.model.hidden_states(tokens_BS.to(self.device))
        rows_N, positions_N, targets_N = wanted_N3.to(self.device).unbind(1)
        hidden_ND = hidden_BSD[rows_N, positions_N]
        num_valid = self.vocab.actual if self.model_config.mask_padded_vocab else None
        step = max(LOGITS_AT_A_TIME * self.context.tensor_size // self.vocab.padded, 1)
        log_probs, greedy = [], []
        for hidden_nD, targets_n in zip(torch.split(hidden_ND, step), torch.split(targets_N, step), strict=True):
            logits_1nV = self.model.local_logits(hidden_nD.unsqueeze(0))
            losses_1n = vocab_parallel_cross_entropy(logits_1nV, targets_n.unsqueeze(0), num_valid, self.context)
            log_probs.append(-losses_1n[0])
            greedy.append(vocab_parallel_argmax(logits_1nV, num_valid, self.context)[0] == targets_n)
        return Scores(torch.cat(log_probs).cpu(), torch.cat(greedy).cpu())


def vocab_parallel_argmax(logits: Tensor, num_valid: int | None, context: ParallelContext) -> Tensor:
    """Index of the largest of logits [..., V/tp] over all ranks' shares, the first of equals; [...], replicated.

    Rows from `num_valid` on are left out; None lets all in.
    """
    first = context.tensor_rank * logits.shape[-1]
    if num_valid is not None:
        padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= num_valid
        logits = logits.masked_fill(padding, -torch.inf)
    values, indices = logits.max(-1)
    elsewhere = values < max_over_ranks(values, context)
    # The smallest index is the largest of the negated ones.
    return -max_over_ranks((-indices - first).masked_fill(elsewhere, torch.iinfo(indices.dtype).min), context)


def checkpoint_to_read(config: CheckpointConfig, iteration: int | None = None) -> Checkpoint:
    """The checkpoint that `load`, or else `save`, holds: of `iteration`, of the configured one, or the newest.

    Collective over all ranks. Raises ConfigError when no folder is named, CheckpointError when it holds nothing whole.
    """
    folder = config.load or config.save
    if folder is None:
        raise ConfigError("load: no checkpoint is named. Add `load=FOLDER` to the command.")
    iteration = config.iteration if iteration is None else iteration
    checkpoint = find_checkpoint(Path(folder), iteration, config.verify_checkpoint)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no checkpoint to read. Name a run's folder with `load=...`.")
    return checkpoint


def require_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raise ConfigError when a checkpoint was trained with another vocabulary than the tokenizer's."""
    if checkpoint.state.vocab_size != tokenizer.vocab_size:
        raise ConfigError(
            f"{checkpoint.path} was trained with a vocabulary of {checkpoint.state.vocab_size:,} ids, and the "
            f"configured tokenizer has {tokenizer.vocab_size:,}. Configure the tokenizer of the run."
        )


def load_inference_model(
    config: RunConfig, checkpoint: Checkpoint, context: ParallelContext, device: torch.device
) -> InferenceModel:
    """This rank's share of a trained model, whatever layout wrote it, in the configured precision.

    Speed-ups are chosen as in training, but nothing is compiled: inputs have too many shapes. Raises ConfigError when
    the configuration describes another model than the checkpoint's, or one that does not split over the ranks of
    `context`; CheckpointError for weights that are damaged or not finite; EnvironmentSetupError for a speed-up that is
    on and cannot be had.
    """
    speedups = choose_speedups(
        config.speedups, config.training.precision, config.training.optimizer, on_gpu=device.type == "cuda"
    )
    differences = model_differences(checkpoint.config.model, config.model)
    if differences:
        raise ConfigError(
            f"{checkpoint.path} holds another model than the configuration describes: {'; '.join(differences)}. Give "
            "the configuration that it was trained with."
        )
    vocab = checkpoint.vocab
    with device:
        model = build_local(config.model, vocab, None, context).to(DTYPES[config.training.precision.dtype])
    load_parameters(model.named_parameters(), checkpoint, context)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(
                f"{checkpoint.path}: {name} holds NaN, infinity, or numbers too large for {parameter.dtype}. Choose "
                "another checkpoint."
            )
    apply_speedups(model, replace(speedups, compile=False))
    return InferenceModel(model, config, vocab)
