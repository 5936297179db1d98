"""Generated tokens of two tensor-parallel ranks are those of one."""

from __future__ import annotations

import pytest

import megatron.hf  # noqa: F401 - registers the architectures
from megatron.mpu.context import ParallelContext
from tests.helpers.distributed import run_distributed
from tests.helpers.loaded_models import (
    MODELS,
    PROMPTS,
    generate,
    loaded_model,
    tokens_of,
)


@pytest.mark.parametrize("name", ["tokenformer untied", "pythia tied", "gpt2", "llama"])
def test_two_tensor_parallel_ranks_generate_what_one_does(name: str) -> None:
    for temperature in (0.0, 1.2):
        want = tokens_of(generate(loaded_model(MODELS[name]), PROMPTS, temperature=temperature))
        assert run_distributed(_generate_on_this_rank, 2, name, temperature) == [want, want]


def _generate_on_this_rank(name: str, temperature: float) -> list[list[int]]:
    model = loaded_model(MODELS[name], ParallelContext.create(2, 1))
    return tokens_of(generate(model, PROMPTS, temperature=temperature))


def test_one_rank_stops_all() -> None:
    whole = tokens_of(generate(loaded_model(MODELS["pythia"]), PROMPTS[:2]))
    stopped = [whole[0][:3], whole[1]]
    assert run_distributed(_stop_on_rank_1, 2) == [stopped, stopped]


def _stop_on_rank_1() -> list[list[int]]:
    context = ParallelContext.create(2, 1)

    def should_stop(index: int, tokens: list[int]) -> bool:
        return context.tensor_rank == 1 and index == 0 and len(tokens) == 3

    return tokens_of(generate(loaded_model(MODELS["pythia"], context), PROMPTS[:2], should_stop=should_stop))
