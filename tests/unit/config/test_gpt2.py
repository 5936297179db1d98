"""GPT-2 in configurations: what names or implies it, its defaults, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.load_config import load_config
from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError

PYTHIA = Path(__file__).parent / "published_pythia.yml"
GPT2 = ("attention_config=null", "architecture=gpt2", "pos_emb=null", "bias_gelu_fusion=null", "gpt_j_residual=null")


def model(*overrides: str) -> ModelConfig:
    return load_config([PYTHIA], overrides).run.model


def test_its_name_brings_its_defaults() -> None:
    named = model(*GPT2, "no_weight_tying=null", "init_method=null", "output_layer_init_method=null")
    assert (named.architecture, named.pos_emb, named.activation, named.tie_embeddings) == (
        "gpt2", "learned", "gelu_tanh", True,
    )  # fmt: skip
    assert (named.init_method, named.init_method_std, named.output_layer_init_method) == (
        "normal", 0.02, "scaled_normal",
    )  # fmt: skip
    assert not named.scale_attn_by_inverse_layer_idx


@pytest.mark.parametrize("attention", ['[[["flash"], 12]]', '[[["global"], "all"]]', "null"])
@pytest.mark.parametrize(
    ("overrides", "architecture"),
    [
        (("pos_emb=learned", "gpt_j_residual=false"), "gpt2"),
        (("pos_emb=learned", "gpt_j_residual=true"), "gpt_neox"),
        (("pos_emb=rotary", "gpt_j_residual=false"), "gpt_neox"),
        (("pos_emb=learned", "gpt_j_residual=false", "architecture=gpt_neox"), "gpt_neox"),
        (("pos_emb=learned", "gpt_j_residual=false", "architecture=gpt2"), "gpt2"),
    ],
)
def test_learned_positions_in_sequence_imply_it(attention: str, overrides: tuple[str, ...], architecture: str) -> None:
    assert model(f"attention_config={attention}", *overrides).architecture == architecture


def test_a_yaml_of_neox_that_implies_it_computes_what_neox_does() -> None:
    """NeoX's GeLU is the exact one unless it is fused."""
    implying = ("pos_emb=learned", "gpt_j_residual=false", "bias_gelu_fusion=null")
    assert model(*implying).activation == "gelu"
    assert model(*implying, "architecture=gpt2").activation == "gelu_tanh"
    assert model(*implying[:2], "bias_gelu_fusion=true").activation == "gelu_tanh"


def test_tokenformer_may_have_learned_positions() -> None:
    tokenformer = Path(__file__).parent / "published_tokenformer.yml"
    found = load_config([tokenformer], ["pos_emb=learned"]).run.model
    assert (found.architecture, found.pos_emb) == ("tokenformer", "learned")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            (*GPT2[:-1], "gpt_j_residual=true"),
            "gpt_j_residual: true: GPT-2's sublayers are sequential; use false, or architecture: gpt_neox",
        ),
        ((*GPT2, "pos_emb=rotary"), "pos_emb: rotary: GPT-2 has learned positions; use those"),
        (("scale_attn_by_inverse_layer_idx=true",), "belongs to architecture: gpt2, and this is gpt_neox"),
        ((*GPT2, "seq_length=4096"), "max_position_embeddings 2048, which are the positions that the model learns"),
        ((*GPT2, "opt_pos_emb_offset=2"), "OPT's offset of learned positions is not implemented"),
        ((*GPT2, 'attention_config=[[["tokenformer"], 12]]'), "contradicts"),
    ],
)
def test_what_it_refuses(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model(*overrides)
    assert said in str(caught.value)


def test_only_layer_norm_has_a_bias_to_leave_out() -> None:
    assert not model(*GPT2, "use_bias_in_norms=false").use_bias_in_norms
    assert model(*GPT2, "norm=rmsnorm", "use_bias_in_norms=false").use_bias_in_norms
