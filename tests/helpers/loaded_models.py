"""Tiny models to ask, with weights that no initialization has and that depend on the configuration alone."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

import megatron.hf  # noqa: F401 - registers the architectures
from megatron.config.sections.model import ModelConfig
from megatron.loaded_model.generate_tokens import Continuation, generate_tokens
from megatron.loaded_model.loaded_model import LoadedModel
from megatron.loaded_model.sampling import SamplingSettings
from megatron.model.causal_lm import build_local
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import local_shard, parameter_spec
from tests.helpers.models import VOCAB, tiny_gpt2, tiny_llama, tiny_pythia, tiny_tokenformer

CONTEXT_LENGTH = 48
EOD = 0

MODELS: dict[str, ModelConfig] = {
    "tokenformer": tiny_tokenformer(seq_length=CONTEXT_LENGTH, max_position_embeddings=CONTEXT_LENGTH),
    "tokenformer untied": tiny_tokenformer(
        seq_length=CONTEXT_LENGTH, max_position_embeddings=CONTEXT_LENGTH, tie_embeddings=False
    ),
    "llama": tiny_llama(seq_length=CONTEXT_LENGTH, max_position_embeddings=CONTEXT_LENGTH, num_kv_heads=2),
    "gpt2": tiny_gpt2(seq_length=CONTEXT_LENGTH, max_position_embeddings=CONTEXT_LENGTH),
    "pythia": tiny_pythia(seq_length=CONTEXT_LENGTH, max_position_embeddings=CONTEXT_LENGTH),
    "pythia tied": tiny_pythia(seq_length=CONTEXT_LENGTH, max_position_embeddings=CONTEXT_LENGTH, tie_embeddings=True),
}


def loaded_model(
    model: ModelConfig, context: ParallelContext | None = None, dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """This rank's share of a model whose vocabulary has three rows of padding."""
    context = context or ParallelContext.single()
    module = build_local(model, VOCAB, None, context)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spec = parameter_spec(parameter)
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
            full = 0.3 * torch.randn(spec.full_shape, generator=torch.Generator().manual_seed(seed))
            full += 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(local_shard(full, spec.shard_dim, context))
    return LoadedModel(module.to(dtype), model, VOCAB)


def random_prompts(*lengths: int) -> list[list[int]]:
    """Prompts of the tiny vocabulary, the same in every process; none holds the end of a document."""
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(1, VOCAB.actual, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = [*random_prompts(3, 11, 1, 20, 7), []]
SAMPLING = ("temperature", "top_k", "top_p", "maximum_tokens")


def generate(model: LoadedModel, prompts: list[list[int]], **more: Any) -> list[Continuation]:
    options = {name: more.pop(name) for name in SAMPLING if name in more}
    sampling = SamplingSettings(**{"maximum_tokens": 12} | options)
    return generate_tokens(model, prompts, sampling, **{"start_token": EOD, "stop_tokens": {EOD}} | more)


def tokens_of(continuations: list[Continuation]) -> list[list[int]]:
    return [continuation.tokens for continuation in continuations]


def scored_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor(random_prompts(9, 9))
    likeliest = loaded_model(MODELS["pythia"]).logits(tokens)[..., : VOCAB.actual].argmax(-1)
    wanted = [(r, p, t) for r in range(2) for p in range(9) for t in (int(likeliest[r, p]), 3)]
    return tokens, torch.tensor(wanted)
