"""One tiny model in both forms: ours, and that of transformers, with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import megatron.hf  # noqa: F401 - registers the architectures
from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.hf.hf_architecture import HF_ARCHITECTURES
from megatron.kernels.pattention.theta import THETAS
from megatron.model.causal_lm import LocalCausalLM, build_local
from megatron.model.loss import CausalLMLoss
from megatron.mpu.context import ParallelContext
from tests.helpers.models import VOCAB, tiny_gpt2, tiny_llama, tiny_pythia, tiny_tokenformer

UNEQUAL = {"qkv": 24, "proj": 16, "ffn": 40}


def grown_tokens(theta: str = "l2_norm_gelu") -> ParamTokenConfig:
    """Unequal token counts whose scales are those of a smaller model."""
    return ParamTokenConfig(**UNEQUAL, theta=theta, qkv_scale_base=12, proj_scale_base=10, ffn_scale_base=20)


VARIANTS: dict[str, ModelConfig] = {
    **{theta: tiny_tokenformer(tokens=ParamTokenConfig(**UNEQUAL, theta=theta)) for theta in THETAS},
    "grown": tiny_tokenformer(tokens=grown_tokens()),
    "untied": tiny_tokenformer(tie_embeddings=False),
    "affine_norms": tiny_tokenformer(norm="layernorm", final_norm=None),
    "rms_norms": tiny_tokenformer(norm="rmsnorm", final_norm="rmsnorm", rms_norm_epsilon=1e-6),
    "no_positions": tiny_tokenformer(pos_emb="none"),
    "parallel_residual": tiny_tokenformer(parallel_residual=True, rotary_pct=1.0, rotary_emb_base=500.0),
    "pythia": tiny_pythia(),
    "gpt2": tiny_gpt2(),
    "gpt2_unscaled_erf_untied": tiny_gpt2(
        scale_attn_by_inverse_layer_idx=False, activation="gelu", tie_embeddings=False
    ),
    "gpt2_no_biases": tiny_gpt2(use_bias_in_attn_linear=False, use_bias_in_mlp=False, use_bias_in_norms=False),
    "llama": tiny_llama(),
    "llama_tied_biases_one_shared_head": tiny_llama(
        tie_embeddings=True, num_kv_heads=1, use_bias_in_attn_linear=True, use_bias_in_mlp=True
    ),
    "pythia_tied_erf": tiny_pythia(tie_embeddings=True, activation="gelu", parallel_residual=False),
    "pythia_no_attention_bias": tiny_pythia(use_bias_in_attn_linear=False, rotary_pct=1.0, rotary_emb_base=500.0),
}
TOKENFORMERS = [name for name, model in VARIANTS.items() if model.architecture == "tokenformer"]


def pair(model: ModelConfig, *, eager: bool = False, scale: float = 0.05) -> tuple[LocalCausalLM, PreTrainedModel]:
    """Both forms in evaluation mode. Noise of size `scale` moves biases and norms too, which start at 0 and 1."""
    ours = build_local(model, VOCAB, seed=5)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return ours.eval(), same_in_transformers(ours, model, attn_implementation="eager" if eager else "sdpa").eval()


def same_in_transformers(ours: LocalCausalLM, model: ModelConfig, **settings: Any) -> PreTrainedModel:
    """transformers' form of our model, its weights copied name by name."""
    architecture = HF_ARCHITECTURES[model.architecture]
    config = architecture.to_config(model, VOCAB.padded)
    theirs = architecture.model_class._from_config(config, **settings)
    # GPTNeoX calls the head's module otherwise than its tensor in a folder.
    head = architecture.names.to_theirs("head.")
    their_parameters = {
        name.replace("lm_head.", head) if name.startswith("lm_head.") else name: parameter
        for name, parameter in theirs.named_parameters()
    }
    with torch.no_grad():
        for name, tensor in architecture.to_their_tensors(model, dict(ours.named_parameters())).items():
            their_parameters.pop(architecture.names.to_theirs(name)).copy_(tensor)
    assert not their_parameters
    return theirs


def assert_same_logits_and_loss(ours: LocalCausalLM, theirs: PreTrainedModel, tolerance: float) -> None:
    """Compares logits and loss of random tokens; both models have the gradients of that loss then."""
    tokens = torch.randint(VOCAB.actual, (3, 17), generator=torch.Generator().manual_seed(2))
    our_logits = ours(tokens[:, :-1])
    their_logits = theirs(tokens[:, :-1], use_cache=False).logits
    torch.testing.assert_close(our_logits, their_logits, rtol=tolerance, atol=tolerance)

    labels = tokens[:, 1:]
    loss = CausalLMLoss(None, ParallelContext.single())(our_logits, (labels, torch.ones(labels.shape)))
    their_loss = torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, their_loss.double(), rtol=tolerance, atol=tolerance)
    loss.backward()
    their_loss.backward()


def random_tokens(*shape: int, seed: int = 2) -> Tensor:
    """Token ids of the tiny vocabulary."""
    return torch.randint(1, VOCAB.actual, shape, generator=torch.Generator().manual_seed(seed))
