"""The contracts of TokenFormerForCausalLM; megatron/hf/README.md lists them by these names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.utils import logging

from megatron.hf import (
    TokenFormerConfig,
    TokenFormerForCausalLM,
    TokenFormerForSequenceClassification,
    TokenFormerModel,
    modeling_tokenformer,
)
from megatron.hf.hf_architecture import HF_ARCHITECTURES
from megatron.kernels.attention.backends.reference import causal_attention_reference
from megatron.kernels.pattention.theta import THETAS
from tests.helpers.models import VOCAB, tiny_tokenformer
from tests.helpers.transformers_pairs import TOKENFORMERS, VARIANTS, grown_tokens, pair, random_tokens

PAD = 0
PROMPTS = [random_tokens(length, seed=length) for length in (3, 9, 6)]


def model_of(variant: str = "grown", *, eager: bool = False) -> PreTrainedModel:
    return pair(VARIANTS[variant], eager=eager, scale=0.3)[1]


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    longest = max(len(row) for row in rows)
    return {
        "input_ids": torch.stack([F.pad(row, (longest - len(row), 0), value=PAD) for row in rows]),
        "attention_mask": torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows]),
    }


def greedy_one_by_one(model: PreTrainedModel, prompt: Tensor, steps: int) -> Tensor:
    """Reference decoding, each token at most once: the whole sequence again for every token, no cache, no padding."""
    tokens = prompt[None]
    with torch.no_grad():
        for _ in range(steps):
            logits = model(tokens, use_cache=False).logits[:, -1]
            logits[:, [PAD, *tokens[0].tolist()]] = -torch.inf
            tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    return tokens[0, len(prompt) :]


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_ours(variant: str, eager: bool) -> None:
    ours, theirs = pair(VARIANTS[variant], eager=eager)
    tokens = random_tokens(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", TOKENFORMERS)
def test_gradients_equal_ours(variant: str) -> None:
    model = VARIANTS[variant]
    ours, theirs = (module.double() for module in pair(model, scale=0.3))
    tokens = random_tokens(2, 17)
    F.cross_entropy(ours(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    theirs(tokens, labels=tokens).loss.double().backward()
    got = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = got.pop(HF_ARCHITECTURES["tokenformer"].names.to_theirs(name))
        # transformers computes the loss in float32
        atol = 2e-6 * float(parameter.grad.abs().max())
        torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=atol, msg=name)
    assert not got


def test_loss_is_the_mean_over_labels_that_count() -> None:
    model = model_of()
    tokens = random_tokens(2, 12)
    labels = tokens.clone()
    labels[:, :5] = -100
    output = model(tokens, labels=labels)
    want = F.cross_entropy(output.logits[:, 4:-1].flatten(0, 1), tokens[:, 5:].flatten())
    torch.testing.assert_close(output.loss, want)
    summed = model(tokens, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(summed, want * 14 / 7)  # the sum over 14 labels, over the given number


@pytest.mark.parametrize(("variant", "cache"), [*((name, "dynamic") for name in TOKENFORMERS), ("grown", "static")])
def test_cached_logits_equal_uncached(variant: str, cache: str) -> None:
    model = model_of(variant).double()
    tokens = random_tokens(2, 12)
    past = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        want = model(tokens, use_cache=False).logits
        pieces = [model(piece, past_key_values=past, use_cache=True).logits for piece in tokens.split([5, 1, 4, 2], 1)]
    assert past.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("variant", "eager"), [*((name, False) for name in [*TOKENFORMERS, "pythia"]), ("grown", True), ("pythia", True)]
)
@pytest.mark.parametrize("use_cache", [False, True], ids=["uncached", "cached"])
def test_greedy_batch_equals_one_by_one(variant: str, use_cache: bool, eager: bool) -> None:
    model = model_of(variant, eager=eager)
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    # A tiny random model would say the same token for ever.
    settings |= {"no_repeat_ngram_size": 1, "suppress_tokens": [PAD]}
    got = model.generate(**left_padded(PROMPTS), use_cache=use_cache, eos_token_id=None, **settings)
    for row, prompt in zip(got, PROMPTS, strict=True):
        assert row[-8:].tolist() == greedy_one_by_one(model, prompt, 8).tolist()


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
def test_left_padding_does_not_change_logits(eager: bool) -> None:
    model = model_of(eager=eager)
    with torch.no_grad():
        batch = model(**left_padded(PROMPTS)).logits
        for row, prompt in zip(batch, PROMPTS, strict=True):
            torch.testing.assert_close(row[-len(prompt) :], model(prompt[None]).logits[0], rtol=0, atol=1e-5)


def test_position_ids_place_tokens() -> None:
    """Rotary attention sees distances alone; stretched distances change it."""
    model = model_of()
    tokens = random_tokens(1, 10)
    positions = torch.arange(10)[None]
    with torch.no_grad():
        plain = model(tokens).logits
        torch.testing.assert_close(model(tokens, position_ids=positions).logits, plain, rtol=0, atol=0)
        torch.testing.assert_close(model(tokens, position_ids=positions + 3).logits, plain, rtol=0, atol=1e-5)
        stretched = model(tokens, position_ids=2 * positions, attention_mask=torch.ones_like(tokens)).logits
    assert (stretched - plain).abs().max() > 1e-3


def test_sampling_is_reproducible_and_beams_score_at_least_greedy() -> None:
    model = model_of()
    batch = left_padded(PROMPTS)
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": PAD, "eos_token_id": None}
    sampled = []
    for _ in range(2):
        torch.manual_seed(3)
        sampled.append(model.generate(**batch, do_sample=True, top_k=20, top_p=0.9, temperature=1.3, **settings))
    assert sampled[0].tolist() == sampled[1].tolist()

    def log_probability(sequences: Tensor) -> Tensor:
        mask = F.pad(batch["attention_mask"], (0, 6), value=1)
        with torch.no_grad():
            log_probs = model(sequences, attention_mask=mask).logits.log_softmax(-1)
        return log_probs[:, -7:-1].gather(-1, sequences[:, -6:, None]).sum((1, 2))

    greedy = model.generate(**batch, do_sample=False, **settings)
    beams = model.generate(**batch, do_sample=False, num_beams=8, **settings)
    assert (log_probability(beams) >= log_probability(greedy) - 1e-5).all()


def test_eager_returns_attention_probabilities() -> None:
    ours, model = pair(VARIANTS["grown"], eager=True, scale=0.3)
    tokens = random_tokens(2, 7)
    seen: list[Tensor] = []

    def recording(q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float | None) -> Tensor:
        output, probabilities = causal_attention_reference(q, k, v, dropout, scale)
        seen.append(probabilities)
        return output

    for layer in ours.layers:
        layer.attention.core_attention = recording
    with torch.no_grad():
        ours(tokens)
        got = model(tokens, output_attentions=True, output_hidden_states=True)
    assert len(got.attentions) == len(seen) == 2
    for probabilities, want in zip(got.attentions, seen, strict=True):
        torch.testing.assert_close(probabilities, want, rtol=0, atol=1e-5)
    assert len(got.hidden_states) == 3
    torch.testing.assert_close(got.hidden_states[0], ours.embedding(tokens), rtol=0, atol=0)
    torch.testing.assert_close(model.lm_head(got.hidden_states[-1]), got.logits, rtol=0, atol=0)


def test_sdpa_returns_no_attentions_and_says_so_like_stock_models(caplog: pytest.LogCaptureFixture) -> None:
    logging.warning_once.cache_clear()
    theirs, tokens = model_of("pythia"), random_tokens(1, 4)
    with caplog.at_level("WARNING", logger="transformers"):
        assert model_of()(tokens, output_attentions=True).attentions == ()
    assert "`sdpa` attention does not support `output_attentions=True`" in caplog.text
    assert theirs(tokens, output_attentions=True).attentions == ()


def test_configurations_of_earlier_exports_are_read() -> None:
    """They say rotary_pct and rotary_emb_base where transformers says rope_parameters."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    old = TokenFormerConfig(**sizes, rotary_pct=0.5, rotary_emb_base=500)
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    assert old.to_dict() == TokenFormerConfig(**sizes, rope_parameters=rope).to_dict()
    assert TokenFormerConfig().rope_parameters == {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25
    }  # fmt: skip


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_rotary_positions_are_those_of_gpt_neox(scaling: dict[str, Any]) -> None:
    """Also past the trained length, and again below it, where `dynamic` takes the first frequencies up again."""
    rope = scaling | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "max_position_embeddings": 16, "rope_parameters": rope}
    ours = modeling_tokenformer.TokenFormerRotaryEmbedding(TokenFormerConfig(**sizes))
    theirs = GPTNeoXRotaryEmbedding(GPTNeoXConfig(**sizes))
    for length in (8, 40, 8):
        positions = torch.arange(length)[None]
        for got, want in zip(ours(torch.zeros(1), positions), theirs(torch.zeros(1), positions), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_frequencies_stay_in_float32_when_the_model_is_cast() -> None:
    model = model_of()
    want = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(model.to(torch.bfloat16).float().model.rotary_emb.inv_freq, want)
    assert model.to(torch.float16).model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles flex attention for the CPU with g++")
def test_flex_attention_computes_the_same() -> None:
    """transformers compiles it, which takes a CPU a minute."""
    model, batch = model_of(), left_padded(PROMPTS)
    with torch.no_grad():
        want = model(**batch).logits
        model.set_attn_implementation("flex_attention")
        difference = (model(**batch).logits - want).abs()
    assert difference[batch["attention_mask"].bool()].max() < 1e-5


@pytest.mark.full
def test_the_model_compiles_in_one_graph() -> None:
    model, tokens = model_of(), random_tokens(2, 9)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)


def test_a_sequence_is_classified_by_its_last_token() -> None:
    """Logits of each sequence of a padded batch are those that it has alone; padding may stand on either side."""
    causal = model_of()
    causal.config.pad_token_id, causal.config.num_labels = PAD, 3
    model = TokenFormerForSequenceClassification(causal.config).eval()
    model.model.load_state_dict(causal.model.state_dict())
    longest = max(map(len, PROMPTS))
    right = torch.stack([F.pad(row, (0, longest - len(row)), value=PAD) for row in PROMPTS])
    with torch.no_grad():
        want = torch.cat([model.score(model.model(row[None]).last_hidden_state[:, -1]) for row in PROMPTS])
        for batch in (left_padded(PROMPTS), {"input_ids": right, "attention_mask": (right != PAD).long()}):
            torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-5)
        labels = torch.tensor([2, 0, 1])
        loss = model(**left_padded(PROMPTS), labels=labels).loss
    torch.testing.assert_close(loss, F.cross_entropy(want, labels), rtol=0, atol=1e-5)


def test_gradient_checkpointing_recomputes_the_same_gradients() -> None:
    gradients, calls = [], []
    for checkpointed in (False, True):
        model = model_of("l2_norm_gelu").train()
        count = [0]
        model.model.layers[0].attention.register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        if checkpointed:
            model.activation_checkpointing_enable()
        tokens = random_tokens(2, 10)
        model(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        calls.append(count[0])
    assert calls == [1, 2]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_as_configured_and_resize(tied: bool) -> None:
    model = pair(tiny_tokenformer(tie_embeddings=tied))[1]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        before = model(tokens).logits
        model.resize_token_embeddings(VOCAB.padded + 5)
        assert model(tokens).logits.shape[-1] == VOCAB.padded + 5 == model.config.vocab_size
        torch.testing.assert_close(model(tokens).logits[..., : VOCAB.padded], before, rtol=0, atol=1e-6)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.isfinite(model(tokens, labels=tokens).loss)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((name, torch.float32) for name in TOKENFORMERS), ("grown", torch.bfloat16), ("grown", torch.float16)],
)
def test_save_and_load_round_trip(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(variant).to(dtype)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "modeling_tokenformer.py"
    ]  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is TokenFormerForCausalLM
    assert loaded.dtype == dtype
    assert loaded.config.to_diff_dict() | {"_name_or_path": ""} == model.config.to_diff_dict() | {"_name_or_path": ""}
    for (name, got), (_, want) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(got, want), name
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_device_map_places_layers_apart(tied: bool, tmp_path: Path) -> None:
    """One layer on the CPU, one that comes from disk for each use; cached decoding included."""
    model = pair(tiny_tokenformer(tie_embeddings=tied), scale=0.3)[1]
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map | {"lm_head": "cpu"}, offload_folder=tmp_path / "offloaded"
    )
    assert next(loaded.model.layers[0].parameters()).is_meta
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=1e-6)
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    assert loaded.generate(tokens, **settings).tolist() == model.generate(tokens, **settings).tolist()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cpu")
    with torch.no_grad():
        torch.testing.assert_close(whole(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_auto_classes_know_tokenformer_without_remote_code(tmp_path: Path) -> None:
    config = TokenFormerConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TokenFormerConfig
    assert type(AutoModel.from_config(config)) is TokenFormerModel
    assert type(AutoModelForCausalLM.from_config(config)) is TokenFormerForCausalLM
    classifier = AutoModelForSequenceClassification.from_config(config)
    assert type(classifier) is TokenFormerForSequenceClassification


def test_scale_bases_are_saved_and_used(tmp_path: Path) -> None:
    grown, ungrown = tiny_tokenformer(tokens=grown_tokens()), tiny_tokenformer()
    tokens = random_tokens(2, 9)
    model, plain = pair(grown, scale=0.3)[1], pair(ungrown, scale=0.3)[1]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.qkv_scale_base, loaded.config.proj_scale_base, loaded.config.ffn_scale_base) == (12, 10, 20)
    assert (plain.config.qkv_scale_base, plain.config.ffn_scale_base) == (24, 40)
    with torch.no_grad():
        assert (loaded(tokens).logits - plain(tokens).logits).abs().max() > 1e-2


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("variant", list(THETAS))
def test_low_precision_stays_within_its_own_error(variant: str, dtype: torch.dtype, unit: float) -> None:
    """Weights and activations rounded to relative error `unit`: the logits' error is a small multiple of it."""
    model = pair(VARIANTS[variant])[1]
    tokens = random_tokens(2, 16)
    with torch.no_grad():
        want = model(tokens).logits
        got = model.to(dtype)(tokens).logits.float()
    assert 0 < (got - want).norm() / want.norm() < 8 * unit


@pytest.mark.parametrize("theta", list(THETAS))
def test_every_registered_theta_has_its_formula_in_the_modelling_file(theta: str) -> None:
    """Exports carry that file alone, so it spells each Theta out once more."""
    assert theta in modeling_tokenformer.THETAS, f"write {theta} into THETAS of megatron/hf/modeling_tokenformer.py"
    scores = 3 * torch.randn(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    got, want = modeling_tokenformer.THETAS[theta](scores, 7), THETAS[theta].definition(scores, 7)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("theta", list(THETAS))
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_extreme_scores_stay_finite(theta: str, value: float) -> None:
    model = pair(VARIANTS[theta])[1].to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.key_tokens.fill_(value)
        assert torch.isfinite(model(random_tokens(2, 6)).logits).all()


def test_new_weights_follow_the_published_initialization() -> None:
    config = TokenFormerConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_ffn_tokens=2048
    )
    model = TokenFormerForCausalLM(config)
    mlp = model.model.layers[1].mlp
    for tensor, std in ((mlp.key_tokens, 0.02), (mlp.value_tokens, 2 / (2 * 16)), (model.lm_head.weight, 0.02)):
        assert abs(float(tensor.detach().std()) / std - 1) < 0.02
    assert torch.equal(model.model.norm.weight, torch.ones(256))
    assert torch.equal(model.model.norm.bias, torch.zeros(256))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 7}, "not a multiple"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.08}}, "odd number"),
        ({"theta": "relu"}, "unknown theta"),
        ({"final_norm": "batchnorm"}, "unknown norm"),
        ({"rotary_pct": 0.08}, "odd number"),
    ],
)
def test_wrong_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenFormerConfig(**changes)
