"""Sizes that the ranks do not divide are refused with the nearest that they do."""

from __future__ import annotations

import pytest

from megatron.config.sections.model import ParamTokenConfig
from megatron.errors import ConfigError
from megatron.model.causal_lm import VocabSize, build_local
from megatron.mpu.context import ParallelContext
from tests.helpers.models import VOCAB, tiny_pythia, tiny_tokenformer

TP4 = ParallelContext(tensor_size=4)
TP4_SEQUENCE = ParallelContext(tensor_size=4, sequence_parallel=True)


@pytest.mark.parametrize(
    ("model", "vocab", "context", "message"),
    [
        (tiny_tokenformer(tokens=ParamTokenConfig(qkv=26, proj=16, ffn=40)), VOCAB, TP4, "26.*Nearest valid: 24 or 28"),
        (tiny_tokenformer(tokens=ParamTokenConfig(qkv=24, proj=3, ffn=40)), VOCAB, TP4, "3.*Nearest valid: 4"),
        (tiny_pythia(hidden_size=36, num_attention_heads=6), VOCAB, TP4, "heads: 6.*Nearest valid: 4 or 8"),
        (tiny_pythia(), VocabSize(61, 62), TP4, "padded vocabulary: 62.*Nearest valid: 60 or 64"),
        (tiny_pythia(seq_length=14), VOCAB, TP4_SEQUENCE, "seq_length.*14.*Nearest valid: 12 or 16"),
        (tiny_pythia(rotary_pct=0.4), VOCAB, ParallelContext(), "rotary_pct=0.4 of a head of 8 features is 3"),
        (tiny_pythia(rotary_pct=0.1), VOCAB, ParallelContext(), "rotary_pct=0.1 of a head of 8 features is 0"),
        (tiny_pythia(num_attention_heads=5), VOCAB, ParallelContext(), "32.*num_attention_heads=5"),
    ],
)
def test_numbers_that_do_not_divide_name_the_nearest_that_do(model, vocab, context, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_local(model, vocab, None, context)
