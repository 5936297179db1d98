"""GPT-2: NeoX has its layer under the names of its own, and learned positions beside the word embeddings."""

from __future__ import annotations

from megatron.checkpointing.convert.neox.architectures.gpt_neox import LINEAR
from megatron.checkpointing.convert.neox.neox_architecture import NEOX_ARCHITECTURES

NEOX_ARCHITECTURES.register("gpt2")(LINEAR)
