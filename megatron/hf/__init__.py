"""Hugging Face both ways; importing this package registers TokenFormer with transformers' Auto classes."""

from megatron.hf.architectures import tokenformer as _tokenformer  # noqa: F401 - registers with the Auto classes
from megatron.hf.modeling_tokenformer import TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel

__all__ = ["TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerModel"]
