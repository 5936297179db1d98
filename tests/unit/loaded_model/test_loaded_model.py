"""Logits with and without a cache, and the scores of given tokens, against the plain model."""

from __future__ import annotations

import pytest
import torch

from megatron.loaded_model import loaded_model as tested
from tests.helpers.loaded_models import MODELS, loaded_model, random_prompts, scored_tokens
from tests.helpers.models import VOCAB


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_the_whole_sequence(name: str) -> None:
    model = loaded_model(MODELS[name], dtype=torch.float64)
    tokens = torch.tensor(random_prompts(20, 20))
    whole = model.logits(tokens)
    cache = model.new_cache(2, 20)
    parts = [model.logits(part, cache) for part in tokens.split([7, 1, 1, 5, 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["tokenformer", "pythia", "gpt2", "llama"])
def test_left_padding_changes_nothing(name: str) -> None:
    model = loaded_model(MODELS[name], dtype=torch.float64)
    short, long = random_prompts(5, 12)
    cache = model.new_cache(2, 16, torch.tensor([7, 0]))
    first = model.logits(torch.tensor([[9] * 7 + short, long]), cache)
    then = model.logits(torch.tensor([[3, 4], [5, 6]]), cache)
    got = torch.cat([first, then], dim=1)
    want = model.logits(torch.tensor([[*short, 3, 4]])), model.logits(torch.tensor([[*long, 5, 6]]))
    torch.testing.assert_close(got[0, 7:], want[0][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[1], want[1][0], rtol=1e-12, atol=1e-12)
    assert got.isfinite().all()


def test_rows_that_are_kept_go_on() -> None:
    model = loaded_model(MODELS["tokenformer"], dtype=torch.float64)
    prompts = random_prompts(4, 9, 7, 9)
    cache = model.new_cache(4, 12, torch.tensor([5, 0, 2, 0]))
    model.logits(torch.tensor([[1] * (9 - len(prompt)) + prompt for prompt in prompts]), cache)
    cache.keep([0, 2, 3])
    cache.keep([1, 2])
    got = model.next_logits(torch.tensor([[8], [9]]), cache)
    want = [model.next_logits(torch.tensor([[*prompts[row], token]])) for row, token in ((2, 8), (3, 9))]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-6, atol=1e-6)


def test_next_logits_follow_the_given_lengths_and_leave_padding_rows_out() -> None:
    model = loaded_model(MODELS["pythia"])
    tokens = torch.tensor(random_prompts(9, 9))
    got = model.next_logits(tokens, lengths_B=torch.tensor([3, 9]))
    assert got.shape == (2, VOCAB.actual) and got.dtype == torch.float32
    torch.testing.assert_close(got[0], model.logits(tokens[:1, :3])[0, -1, : VOCAB.actual])
    torch.testing.assert_close(got[1], model.logits(tokens)[1, -1, : VOCAB.actual])


def test_a_cache_that_is_full_says_so() -> None:
    cache = loaded_model(MODELS["pythia"]).new_cache(1, 4)
    with pytest.raises(ValueError, match="holds 4 tokens; 5 are needed"):
        cache.begin(5)


@pytest.mark.parametrize("mask_padded_vocab", [False, True])
def test_scores_are_those_of_the_logits(mask_padded_vocab: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "LOGITS_AT_A_TIME", 5 * VOCAB.padded)
    model = loaded_model(MODELS["pythia"].model_copy(update={"mask_padded_vocab": mask_padded_vocab}))
    tokens, wanted = scored_tokens()
    logits = model.logits(tokens).double()
    if mask_padded_vocab:
        logits = logits[..., : VOCAB.actual]
    rows, positions, ids = wanted.unbind(1)
    scores = model.score_tokens(tokens, wanted)
    want = logits.log_softmax(-1)[rows, positions, ids]
    torch.testing.assert_close(scores.log_probs, want.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(scores.greedy, logits.argmax(-1)[rows, positions] == ids)
    assert scores.greedy.any() and not scores.greedy.all()


def test_another_model_can_learn_from_the_logits() -> None:
    """The gradient of a student's KL divergence from the loaded model: softmax(student) - softmax(teacher)."""
    teacher = loaded_model(MODELS["pythia"])
    logits = teacher.logits(torch.tensor(random_prompts(9)))
    student = torch.zeros_like(logits, requires_grad=True)
    (logits.softmax(-1) * (logits.log_softmax(-1) - student.log_softmax(-1))).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, student.softmax(-1) - logits.softmax(-1))
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
