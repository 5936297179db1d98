"""Generated tokens: cached, recomputed and by transformers; batches; lengths; stops; seeds."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig as TheirGenerationConfig

import megatron.hf  # noqa: F401 - registers the architectures
from megatron.loaded_model.generate_tokens import fit_to_context
from tests.helpers.loaded_models import (
    CONTEXT_LENGTH,
    EOD,
    MODELS,
    PROMPTS,
    generate,
    loaded_model,
    random_prompts,
    tokens_of,
)
from tests.helpers.models import VOCAB
from tests.helpers.transformers_pairs import same_in_transformers


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model = loaded_model(MODELS[name])
    cached = tokens_of(generate(model, PROMPTS))
    assert cached == tokens_of(generate(model, PROMPTS, use_cache=False))
    theirs = same_in_transformers(model.module, MODELS[name]).eval()
    greedy = TheirGenerationConfig(
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=EOD,
        pad_token_id=EOD,
        suppress_tokens=list(range(VOCAB.actual, VOCAB.padded)),
    )
    for prompt, ours in zip(PROMPTS, cached, strict=True):
        inputs = torch.tensor([prompt or [EOD]])
        output = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=greedy)
        new = output[0, inputs.shape[1] :].tolist()
        assert ours == (new[: new.index(EOD)] if EOD in new else new)
    assert len({tuple(tokens) for tokens in cached}) > 3


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_ends_with_the_learned_positions(use_cache: bool) -> None:
    """Also where prompts of a batch are so unequal that all columns together are more than there are positions."""
    model = loaded_model(MODELS["gpt2"])
    prompts = random_prompts(2, 46)
    short, long = generate(model, prompts, stop_tokens=(), maximum_tokens=1000, use_cache=use_cache)
    assert short.ending == long.ending == "context_full"
    assert (short.prompt_tokens + len(short.tokens), long.prompt_tokens + len(long.tokens)) == (48, 48)
    alone = [generate(model, [prompt], stop_tokens=(), maximum_tokens=1000)[0].tokens for prompt in prompts]
    assert [short.tokens, long.tokens] == alone


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_batch_of_unequal_prompts_is_each_of_them_alone(temperature: float) -> None:
    model = loaded_model(MODELS["tokenformer"], dtype=torch.float64)
    options = {"temperature": temperature, "top_k": 20, "top_p": 0.9}
    seeds = [(5, i) for i in range(len(PROMPTS))]
    batch = generate(model, PROMPTS, seeds=seeds, **options)
    alone = [generate(model, [p], seeds=[seed], **options)[0] for p, seed in zip(PROMPTS, seeds, strict=True)]
    shuffled = generate(model, PROMPTS[::-1], seeds=seeds[::-1], **options)
    assert tokens_of(batch) == tokens_of(alone) == tokens_of(shuffled)[::-1]
    assert [c.ending for c in batch] == [c.ending for c in alone]


def test_seeds_tell_samples_apart_and_repeat_them() -> None:
    model = loaded_model(MODELS["pythia"])
    first, again, other = (
        tokens_of(generate(model, [PROMPTS[0]] * 4, temperature=2.0, seeds=[(seed, i) for i in range(4)]))
        for seed in (1, 1, 2)
    )
    assert first == again
    assert len({tuple(tokens) for tokens in first + other}) == 8


def test_stop_tokens_end_a_sample_and_are_left_out() -> None:
    model = loaded_model(MODELS["tokenformer"])
    whole = generate(model, PROMPTS)
    stop = whole[1].tokens[4]
    stopped = generate(model, PROMPTS, stop_tokens={EOD, stop})
    for before, after in zip(whole, stopped, strict=True):
        cut = before.tokens.index(stop) if stop in before.tokens else len(before.tokens)
        assert after.tokens == before.tokens[:cut]
        assert after.ending == ("stop_token" if cut < len(before.tokens) else before.ending)
    assert {continuation.ending for continuation in stopped} >= {"stop_token", "maximum_tokens"}


def test_should_stop_ends_a_sample_after_its_token() -> None:
    model = loaded_model(MODELS["pythia"])
    whole = tokens_of(generate(model, PROMPTS[:3], stop_tokens={-1}))
    stopped = generate(model, PROMPTS[:3], stop_tokens={-1}, should_stop=lambda index, tokens: len(tokens) == 2 + index)
    assert tokens_of(stopped) == [tokens[: 2 + index] for index, tokens in enumerate(whole)]
    assert [continuation.ending for continuation in stopped] == ["stopped"] * 3


def test_no_padding_row_is_ever_chosen() -> None:
    model = loaded_model(MODELS["tokenformer untied"])
    assert model.module.head is not None
    with torch.no_grad():
        model.module.head.weight[VOCAB.actual :] = 50 * model.module.head.weight[: VOCAB.padded - VOCAB.actual]
    chosen = [t for tokens in tokens_of(generate(model, PROMPTS, temperature=3.0)) for t in tokens]
    assert chosen and max(chosen) < VOCAB.actual


@pytest.mark.parametrize("use_cache", [True, False])
def test_logits_are_the_models(use_cache: bool) -> None:
    model = loaded_model(MODELS["tokenformer"])
    for prompt, continuation in zip(
        PROMPTS, generate(model, PROMPTS, return_logits=True, use_cache=use_cache), strict=True
    ):
        sequence = (prompt or [EOD]) + continuation.tokens
        whole = model.logits(torch.tensor([sequence]))[0, :, : VOCAB.actual]
        first = len(prompt or [EOD]) - 1
        assert continuation.logits is not None
        torch.testing.assert_close(
            continuation.logits, whole[first : first + len(continuation.tokens)], rtol=1e-4, atol=1e-4
        )


def test_sequences_end_where_the_context_does() -> None:
    model = loaded_model(MODELS["pythia"])
    prompts = random_prompts(20, CONTEXT_LENGTH - 5, CONTEXT_LENGTH, 300)
    first, second, third, fourth = generate(model, prompts, maximum_tokens=40, stop_tokens={-1})
    assert (first.prompt_tokens, len(first.tokens), first.ending) == (20, CONTEXT_LENGTH - 20, "context_full")
    assert (second.prompt_tokens, len(second.tokens), second.ending) == (24, 24, "context_full")
    assert (third.prompt_tokens, len(third.tokens)) == (24, 24)
    assert fourth.tokens == generate(model, [prompts[3][-24:]], maximum_tokens=24, stop_tokens={-1})[0].tokens


def test_prompts_make_room_up_to_half_of_the_context() -> None:
    prompt = list(range(100))
    assert fit_to_context(prompt[:10], 6, 16) == (prompt[:10], 6)
    assert fit_to_context(prompt[:11], 6, 16) == (prompt[1:11], 6)
    assert fit_to_context(prompt, 6, 16) == (prompt[-10:], 6)
    assert fit_to_context(prompt, 1000, 16) == (prompt[-8:], 8)
    assert fit_to_context(prompt[:3], 1000, 16) == (prompt[:3], 13)
    assert fit_to_context(prompt, 5, 1) == (prompt[-1:], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_generates_with_and_without_a_cache(dtype: torch.dtype) -> None:
    model = loaded_model(MODELS["tokenformer"], dtype=dtype)
    for cached, recomputed in zip(
        generate(model, PROMPTS, return_logits=True, maximum_tokens=3),
        generate(model, PROMPTS, return_logits=True, maximum_tokens=3, use_cache=False),
        strict=True,
    ):
        assert cached.logits is not None and recomputed.logits is not None
        scale = recomputed.logits[0].abs().max()
        assert (cached.logits[0] - recomputed.logits[0]).abs().max() < 0.03 * scale
