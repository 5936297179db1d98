"""Layer list, names, sizes, initial weights."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.errors import ConfigError
from megatron.model.causal_lm import (
    VocabSize,
    build_local,
    global_name,
    global_parameters,
    layer_entries,
    layer_names,
    pipeline_location,
)
from megatron.model.init_methods import INIT_METHODS
from megatron.mpu.context import ParallelContext
from megatron.mpu.parameters import initialize_parameters, parameter_spec
from tests.helpers.models import VOCAB, tiny_gpt2, tiny_llama, tiny_pythia, tiny_tokenformer

PUBLISHED_SIZES = {  # layers, width, heads: parameters with 50,304 rows
    (12, 768, 12): 151_881_216,
    (24, 1024, 16): 454_166_528,
    (32, 1280, 16): 903_252_480,
    (40, 1536, 16): 1_587_219_456,
}


@pytest.mark.parametrize(("shape", "expected"), PUBLISHED_SIZES.items())
def test_published_tokenformers_have_their_published_sizes(shape: tuple[int, int, int], expected: int) -> None:
    layers, width, heads = shape
    model = tiny_tokenformer(
        num_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        tokens=ParamTokenConfig(qkv=width, proj=width, ffn=4 * width),
    )
    with torch.device("meta"):
        module = build_local(model, VocabSize(50_277, 50_304), seed=None)
    assert sum(p.numel() for p in module.parameters()) == expected


def test_pythia_70m_has_its_published_size() -> None:
    model = tiny_pythia(num_layers=6, hidden_size=512, num_attention_heads=8)
    with torch.device("meta"):
        module = build_local(model, VocabSize(50_277, 50_304), seed=None)
    assert sum(p.numel() for p in module.parameters()) == 70_426_624


@pytest.mark.parametrize(
    "model",
    [tiny_tokenformer(), tiny_pythia(), tiny_gpt2(), tiny_llama()],
    ids=["tokenformer", "pythia", "gpt2", "llama"],
)
def test_names_lead_to_pipeline_layers_and_back(model: ModelConfig) -> None:
    local_names = dict(build_local(model, VOCAB, seed=None).named_parameters())
    pipeline_names = []
    for index, entry in enumerate(layer_entries(model, VOCAB, ParallelContext.single())):
        tied = model.tie_embeddings and entry.name == "embedding"
        prefix = "tied_modules.embedding" if tied else str(index)
        pipeline_names += [(f"{prefix}.{name}", p) for name, p in entry.build().named_parameters()]
    renamed = [name for name, _ in global_parameters(iter(pipeline_names), model)]
    assert set(renamed) == set(local_names)
    for name in local_names:
        assert global_name(*pipeline_location(name, model), model) == name
    assert len(layer_names(model)) == model.num_layers + 3
    with pytest.raises(KeyError):
        pipeline_location("layers.9.mlp.key_tokens", model)


def test_parameter_names_are_the_fields_words() -> None:
    names = {name for name, _ in build_local(tiny_tokenformer(num_layers=1), VOCAB, seed=None).named_parameters()}
    attention = {
        f"layers.0.attention.{projection}.{side}_tokens"
        for projection in ("query", "key", "value", "proj")
        for side in ("key", "value")
    }
    mlp = {"layers.0.mlp.key_tokens", "layers.0.mlp.value_tokens"}
    assert names == attention | mlp | {"embedding.word_embeddings.weight", "final_norm.weight", "final_norm.bias"}

    names = {name for name, _ in build_local(tiny_pythia(num_layers=1), VOCAB, seed=None).named_parameters()}
    modules = [
        "input_layernorm",
        "attention.query_key_value",
        "attention.dense",
        "post_attention_layernorm",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    ]
    layer = {f"layers.0.{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    outside = {"embedding.word_embeddings.weight", "final_norm.weight", "final_norm.bias", "head.weight"}
    assert names == layer | outside


def test_positions_begin_at_the_start_of_each_row_and_end_with_the_table() -> None:
    """Learned positions: the vector of a token's place is added to its own, and there are no more places."""
    model = build_local(tiny_gpt2(), VOCAB, seed=1)
    words, positions = model.embedding.word_embeddings.weight, model.embedding.position_embeddings
    assert positions is not None
    tokens = torch.tensor([[5, 9, 5], [7, 7, 7]])
    torch.testing.assert_close(model.embedding(tokens), words[tokens] + positions.weight[:3], rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"a sequence of 17 tokens does not fit .* has learned 16 positions"):
        model(torch.zeros(1, 17, dtype=torch.long))
    cache = model.new_cache(2, 40, torch.tensor([10, 2]))
    model.hidden_states(torch.zeros(2, 18, dtype=torch.long), cache)
    cache.keep([0])
    model.hidden_states(torch.zeros(1, 8, dtype=torch.long), cache)
    with pytest.raises(ConfigError, match="a sequence of 17 tokens does not fit"):
        model.hidden_states(torch.zeros(1, 1, dtype=torch.long), cache)


def test_gpt2_starts_as_it_was_published() -> None:
    """N(0, 0.02), residual projections over sqrt(2 L), biases 0 and norms 1 (Radford et al. 2019, section 2.3)."""
    model = tiny_gpt2(num_layers=8, hidden_size=128, max_position_embeddings=64)
    for name, parameter in build_local(model, VOCAB, seed=1).named_parameters():
        if parameter.dim() == 1:
            assert bool((parameter == float(name.endswith("norm.weight"))).all()), name
            continue
        residual = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
        assert float(parameter.std()) == pytest.approx(0.02 / (4 if residual else 1), rel=0.05), name


def test_weight_decay_spares_norms_and_biases_only() -> None:
    for model in (tiny_tokenformer(), tiny_pythia(), tiny_gpt2(), tiny_llama(), tiny_pythia(norm="rmsnorm")):
        for name, parameter in build_local(model, VOCAB, seed=None).named_parameters():
            assert parameter_spec(parameter).decays == (parameter.dim() == 2), name


def test_the_same_seed_gives_the_same_weights_and_another_gives_others() -> None:
    first, second, other = (dict(build_local(tiny_pythia(), VOCAB, seed).named_parameters()) for seed in (1, 1, 2))
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name])
        if parameter.dim() == 2:
            assert not torch.equal(parameter, other[name])
    layers = [first[f"layers.{i}.mlp.dense_h_to_4h.weight"] for i in range(2)]
    assert not torch.equal(*layers)


def test_initial_values_do_not_depend_on_the_process_wide_generator() -> None:
    torch.manual_seed(0)
    first = build_local(tiny_tokenformer(), VOCAB, 3)
    torch.rand(5)
    second = build_local(tiny_tokenformer(), VOCAB, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("tensor_rank", [0, 1])
def test_a_tensor_rank_holds_its_share_of_the_same_weights(tensor_rank: int) -> None:
    context = ParallelContext(tensor_size=2, tensor_rank=tensor_rank)
    for model in (tiny_tokenformer(), tiny_pythia(), tiny_gpt2(), tiny_llama()):
        whole = dict(build_local(model, VOCAB, 1).named_parameters())
        for name, share in build_local(model, VOCAB, 1, context).named_parameters():
            spec = parameter_spec(share)
            assert spec.full_shape == tuple(whole[name].shape)
            if spec.shard_dim is None:
                assert torch.equal(share, whole[name])
                assert not share.tensor_model_parallel
            else:
                assert torch.equal(share, whole[name].chunk(2, spec.shard_dim)[tensor_rank])
                assert share.tensor_model_parallel
                assert share.model_parallel


EXPECTED_STD = {  # of a [128, 256] matrix with L = 6, d = 256, std 0.02
    "normal": 0.02,
    "scaled_normal": 0.02 / math.sqrt(12),
    "small_init": math.sqrt(2 / (5 * 256)),
    "wang_init": 2 / (6 * 16),
    "xavier_uniform": math.sqrt(2 / (128 + 256)),
    "xavier_normal": math.sqrt(2 / (128 + 256)),
    "orthogonal": math.sqrt(2 / 256),
    "scaled_orthogonal": math.sqrt(2 / 6 / 256),
}


@pytest.mark.parametrize("method", list(INIT_METHODS))
def test_initial_spread_follows_the_formula(method: str) -> None:
    model = tiny_pythia(num_layers=6, hidden_size=256)
    tensor = torch.empty(128, 256)
    INIT_METHODS[method](model)(tensor, torch.Generator().manual_seed(0))
    assert tensor.mean().abs() < 5 * EXPECTED_STD[method] / math.sqrt(tensor.numel())
    assert float(tensor.std()) == pytest.approx(EXPECTED_STD[method], rel=0.02)
    if "orthogonal" in method:
        gain = EXPECTED_STD[method] ** 2 * 256
        torch.testing.assert_close(tensor @ tensor.T, gain * torch.eye(128), rtol=0, atol=1e-5)


def test_input_side_and_output_side_start_by_their_own_rules() -> None:
    wide = {"hidden_size": 256, "num_layers": 1, "init_method": "normal", "output_layer_init_method": "wang_init"}
    tokenformer = build_local(
        tiny_tokenformer(tokens=ParamTokenConfig(qkv=256, proj=256, ffn=256), **wide), VocabSize(250, 256), 1
    )
    pythia = build_local(tiny_pythia(**wide), VocabSize(250, 256), 1)
    output_side = ("value_tokens", "attention.dense.weight", "mlp.dense_4h_to_h.weight")
    for module in (tokenformer, pythia):
        for name, parameter in module.named_parameters():
            if parameter.dim() == 2:
                expected = 2 / 16 if name.endswith(output_side) else 0.02
                assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            else:
                assert (parameter == (1 if name.endswith("norm.weight") else 0)).all(), name


def test_initialization_survives_a_change_of_dtype() -> None:
    module = build_local(tiny_pythia(), VOCAB, None).bfloat16()
    initialize_parameters(module.named_parameters(), 1, ParallelContext.single())
    want = build_local(tiny_pythia(), VOCAB, 1)
    for got, full in zip(module.parameters(), want.parameters(), strict=True):
        assert torch.equal(got, full.bfloat16())
