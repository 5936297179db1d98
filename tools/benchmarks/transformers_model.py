"""Puts our weights into a model of `transformers`."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from megatron.config.sections.run_config import RunConfig
from megatron.hf.hf_architecture import HF_ARCHITECTURES
from megatron.model.causal_lm import LocalCausalLM, VocabSize


def transformers_model(ours: LocalCausalLM, config: RunConfig, vocab: VocabSize) -> PreTrainedModel:
    """Builds transformers' GPT-NeoX, or the TokenFormer of megatron/hf that ships with exports, from our weights.

    Raises ConfigError for a model that it cannot be.
    """
    architecture = HF_ARCHITECTURES[config.model.architecture]
    weights = {architecture.names.to_theirs(name): tensor for name, tensor in ours.named_parameters()}
    first = next(iter(weights.values()))
    with torch.device(first.device):
        model = architecture.model_class._from_config(architecture.to_config(config.model, vocab.padded))
    # Files may have older names than the module, which transformers renames as it reads them.
    for module_prefix, file_prefix in architecture.names.also_read:
        for name in [name for name in weights if name.startswith(file_prefix)]:
            weights[module_prefix + name.removeprefix(file_prefix)] = weights.pop(name)
    left_over = model.load_state_dict(weights, strict=False).unexpected_keys
    if left_over:
        raise ValueError(f"transformers has no {', '.join(left_over)}")
    model = model.to(first.dtype).eval()
    model.tie_weights()
    return model
