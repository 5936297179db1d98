"""Hugging Face both ways: model, export, import, upload."""

from megatron.hf.architectures import tokenformer as _tokenformer  # noqa: F401 - registers with the Auto classes
from megatron.hf.modeling_tokenformer import (
    TokenFormerConfig,
    TokenFormerForCausalLM,
    TokenFormerForSequenceClassification,
    TokenFormerModel,
)

__all__ = ["TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerForSequenceClassification", "TokenFormerModel"]
