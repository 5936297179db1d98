"""Scores and choices of tensor-parallel ranks are those of one."""

from __future__ import annotations

import torch

from megatron.config.sections.model import ModelConfig
from megatron.loaded_model.loaded_model import vocab_parallel_argmax
from megatron.mpu.context import ParallelContext
from tests.helpers.distributed import run_distributed
from tests.helpers.loaded_models import MODELS, loaded_model, scored_tokens


def test_tensor_parallel_answers_are_the_same() -> None:
    for name in ("tokenformer untied", "pythia"):
        want = _answers(MODELS[name], ParallelContext.single())
        for got in run_distributed(_answers_of_this_rank, 2, name):
            for ours, theirs in zip(got[:-1], want[:-1], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
            assert torch.equal(got[-1], want[-1])


def _answers_of_this_rank(name: str) -> list[torch.Tensor]:
    return _answers(MODELS[name], ParallelContext.create(2, 1))


def _answers(config: ModelConfig, context: ParallelContext) -> list[torch.Tensor]:
    model = loaded_model(config, context)
    tokens, wanted = scored_tokens()
    cache = model.new_cache(2, 9)
    scores = model.score_tokens(tokens, wanted)
    cached = [model.next_logits(part, cache) for part in (tokens[:, :8], tokens[:, 8:])]
    return [model.logits(tokens), *cached, scores.log_probs, scores.greedy]


def test_the_first_of_equal_logits_wins_on_any_number_of_ranks() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 0.0, 3.0, 3.0], [0.0, 1.0, 1.0, 9.0]])
    assert vocab_parallel_argmax(logits, None, ParallelContext.single()).tolist() == [1, 0, 3]
    assert vocab_parallel_argmax(logits, 3, ParallelContext.single()).tolist() == [1, 0, 1]
    for got in run_distributed(_argmax, 2, logits):
        assert got == ([1, 0, 3], [1, 0, 1])


def _argmax(logits: torch.Tensor) -> tuple[list[int], list[int]]:
    context = ParallelContext.create(2, 1)
    share = logits.chunk(2, dim=-1)[context.tensor_rank]
    return vocab_parallel_argmax(share, None, context).tolist(), vocab_parallel_argmax(share, 3, context).tolist()
