"""Parameter counts against published numbers and sums written out."""

from typing import Any

import pytest

from megatron.config.model_size import count_parameters
from megatron.config.sections.model import ModelConfig, ParamTokenConfig


def tokenformer(layers: int, hidden: int) -> ModelConfig:
    return ModelConfig(
        architecture="tokenformer",
        param_tokens=ParamTokenConfig(qkv=hidden, proj=hidden, ffn=4 * hidden),
        norm="layernorm_nonparam",
        final_norm="layernorm",
        **sizes(layers, hidden),
    )


def pythia(layers: int, hidden: int) -> ModelConfig:
    return ModelConfig(architecture="gpt_neox", tie_embeddings=False, **sizes(layers, hidden))


def sizes(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": 4,
        "seq_length": 8,
        "max_position_embeddings": 8,
        "pos_emb": "rotary",
    }


@pytest.mark.parametrize(
    ("layers", "hidden", "count"),
    [(12, 768, 151_881_216), (24, 1024, 454_166_528), (32, 1280, 903_252_480), (40, 1536, 1_587_219_456)],
)
def test_published_tokenformers(layers: int, hidden: int, count: int) -> None:
    assert count_parameters(tokenformer(layers, hidden), 50304) == count


@pytest.mark.parametrize(
    ("layers", "hidden", "count"),
    [
        (6, 512, 70_426_624),
        (12, 768, 162_322_944),
        (24, 1024, 405_334_016),
        (16, 2048, 1_011_781_632),
        (24, 2048, 1_414_647_808),
        (32, 2560, 2_775_208_960),
    ],
)
def test_published_pythias(layers: int, hidden: int, count: int) -> None:
    assert count_parameters(pythia(layers, hidden), 50304) == count


def test_sum_written_out() -> None:
    """Two embeddings of 10 rows, two layers of 12 matrices of 8 x 8 with 9 biases and 2 norms, and a last norm."""
    assert count_parameters(pythia(2, 8), 10) == 2 * 10 * 8 + 2 * (12 * 64 + 9 * 8 + 2 * 16) + 16


@pytest.mark.parametrize(
    ("change", "fewer"),
    [
        ({"use_bias_in_attn_linear": False}, 2 * (3 + 1) * 8),
        ({"use_bias_in_mlp": False}, 2 * (4 + 1) * 8),
        ({"norm": "rmsnorm"}, 5 * 8),
        ({"norm": "layernorm_nonparam"}, 5 * 16),
        ({"norm": "layernorm_nonparam", "final_norm": "layernorm"}, 4 * 16),
        ({"final_norm": "layernorm_nonparam"}, 16),
        ({"tie_embeddings": True}, 10 * 8),
    ],
)
def test_what_is_switched_off_is_not_counted(change: dict[str, object], fewer: int) -> None:
    full = pythia(2, 8)
    assert count_parameters(full, 10) - count_parameters(full.model_copy(update=change), 10) == fewer
