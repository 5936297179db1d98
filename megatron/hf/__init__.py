"""Hugging Face both ways; importing this package registers TokenFormer with transformers' Auto classes."""

from megatron.hf import gpt_neox as _gpt_neox  # noqa: F401 - registers itself
from megatron.hf import tokenformer as _tokenformer  # noqa: F401 - registers itself
from megatron.hf.modeling_tokenformer import TokenFormerConfig, TokenFormerForCausalLM, TokenFormerModel

__all__ = ["TokenFormerConfig", "TokenFormerForCausalLM", "TokenFormerModel"]
