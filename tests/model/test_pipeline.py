"""The pipeline module in DeepSpeed's engine, over layouts, against a plain float64 loop; and what it recomputes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.model import ModelConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.training import CheckpointedActivations
from megatron.errors import ConfigError
from megatron.model.causal_lm import build_local
from megatron.model.loss import CausalLMLoss
from megatron.model.pipeline import CausalLMPipeline, build_pipeline
from megatron.mpu.context import ParallelContext
from tests.helpers.distributed import run_distributed
from tests.helpers.models import VOCAB, tiny_pythia, tiny_tokenformer

STEPS, ACCUMULATION, GLOBAL_MICRO_BATCH, LENGTH = 3, 2, 4, 16
LEARNING_RATE, CLIP = 1e-3, 0.5
Micro = tuple[Tensor, tuple[Tensor, Tensor]]


def micro_batches(rows: slice) -> Iterator[Micro]:
    generator = torch.Generator().manual_seed(21)
    while True:
        tokens = torch.randint(VOCAB.actual, (GLOBAL_MICRO_BATCH, LENGTH + 1), generator=generator)[rows]
        yield tokens[:, :-1], (tokens[:, 1:].contiguous(), torch.ones(tokens[:, 1:].shape))


def plain_loop(model: ModelConfig) -> list[tuple[float, float]]:
    """(loss, gradient norm before clipping) per step."""
    module = build_local(model, VOCAB, seed=6).double()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    objective = CausalLMLoss(None, ParallelContext.single())
    batches = micro_batches(slice(None))
    history = []
    for _ in range(STEPS):
        losses = []
        for _ in range(ACCUMULATION):
            tokens, targets = next(batches)
            losses.append(objective(module(tokens), targets) / ACCUMULATION)
            losses[-1].backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        history.append((float(sum(loss.item() for loss in losses)), float(norm)))
    return history


def build(model: ModelConfig, layout: dict[str, Any], recompute: CheckpointedActivations) -> CausalLMPipeline:
    deepspeed.init_distributed("gloo")
    parallel = ParallelConfig(**layout)
    context = ParallelContext.create(
        parallel.model_parallel_size, parallel.pipe_parallel_size, parallel.sequence_parallel
    )
    return build_pipeline(model, VOCAB, parallel, context, seed=6, checkpointed=recompute)


def engine_loop(
    model: ModelConfig, layout: dict[str, Any], recompute: CheckpointedActivations
) -> list[tuple[float, float]]:
    module = build(model, layout, recompute)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    data_size = module.topology().get_dim("data")
    rows = GLOBAL_MICRO_BATCH // data_size
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "pipeline": {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 1000,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    first = engine.grid.get_data_parallel_rank() * rows
    batches = micro_batches(slice(first, first + rows))
    return [(float(engine.train_batch(batches)), float(engine.get_global_grad_norm())) for _ in range(STEPS)]


OFF, EACH, PAIRS = (
    CheckpointedActivations(),
    CheckpointedActivations(enabled=True),
    CheckpointedActivations(enabled=True, num_layers=2),
)
TOKENFORMER, PYTHIA = tiny_tokenformer(num_layers=3), tiny_pythia(num_layers=3)
CASES = {  # ranks, model, layout, recomputation
    "one rank": (1, TOKENFORMER, {}, OFF),
    "one rank, recomputed": (1, PYTHIA, {}, PAIRS),
    "tensor 2, tied": (2, TOKENFORMER, {"model_parallel_size": 2}, EACH),
    "tensor 2, sequence, untied": (2, PYTHIA, {"model_parallel_size": 2, "sequence_parallel": True}, OFF),
    "pipe 2, tied": (2, TOKENFORMER, {"pipe_parallel_size": 2}, PAIRS),
    "pipe 2, untied, by parameters": (
        2,
        PYTHIA,
        {"pipe_parallel_size": 2, "pipe_partition_method": "parameters"},
        EACH,
    ),
    "data 2": (2, PYTHIA, {}, OFF),
    "tensor 2, pipe 2, sequence, tied": (
        4,
        TOKENFORMER,
        {"model_parallel_size": 2, "pipe_parallel_size": 2, "sequence_parallel": True},
        EACH,
    ),
}


@pytest.fixture(scope="module")
def plain_histories() -> dict[str, list[tuple[float, float]]]:
    return {model.architecture: plain_loop(model) for model in (TOKENFORMER, PYTHIA)}


@pytest.mark.parametrize("case", CASES)
def test_every_layout_follows_the_plain_loop(case: str, plain_histories) -> None:
    ranks, model, layout, recompute = CASES[case]
    want = plain_histories[model.architecture]
    assert all(norm > CLIP for _, norm in want)
    for history in run_distributed(engine_loop, ranks, model, layout, recompute):
        for (loss, norm), (want_loss, want_norm) in zip(history, want, strict=True):
            assert loss == pytest.approx(want_loss, abs=1e-6)
            assert norm == pytest.approx(want_norm, rel=1e-5)


def recomputed_segments(layout: dict[str, Any], recompute: CheckpointedActivations) -> tuple[list[str], list[Any]]:
    module = build(tiny_tokenformer(num_layers=5), layout, recompute)
    runs: list[Any] = []
    original = module._run

    def recording(start: int, stop: int, x: Tensor) -> Tensor:
        runs.append((start, stop))
        return original(start, stop, x)

    module._run = recording
    first_stage = module.stage_id == 0
    x = torch.randint(VOCAB.actual, (2, LENGTH)) if first_stage else torch.randn(2, LENGTH, 32, requires_grad=True)
    y = module(x)
    forward = list(runs)
    runs.clear()
    y.square().sum().backward()
    with torch.no_grad():
        module(x)
    return [type(layer).__name__ for layer in module.forward_funcs], [forward, runs[: -len(forward)]]


def test_transformer_layers_and_nothing_else_are_recomputed() -> None:
    """Groups of two from the first transformer layer of the stage; the embedding, final norm and head run once."""
    ((layers, (forward, recomputed)),) = run_distributed(recomputed_segments, 1, {}, PAIRS)
    assert [layers[start] for start, _ in recomputed] == ["TransformerLayer"] * 3
    assert forward == [(0, 1), (1, 3), (3, 5), (5, 6), (6, 8)]
    assert sorted(recomputed) == [(1, 3), (3, 5), (5, 6)]
    ((_, (forward, recomputed)),) = run_distributed(recomputed_segments, 1, {}, OFF)
    assert forward == [(0, 1), (1, 6), (6, 8)]
    assert recomputed == []
    stages = run_distributed(recomputed_segments, 2, {"pipe_parallel_size": 2}, PAIRS)
    assert [sorted(recomputed) for _, (_, recomputed) in stages] == [[(1, 3), (3, 4)], [(0, 2)]]


def names_of_all_stages() -> list[str]:
    module = build(tiny_tokenformer(), {"pipe_parallel_size": 2}, OFF)
    return [name for name, _ in module.global_parameters()]


def test_stages_share_the_embedding_under_one_name() -> None:
    first, last = run_distributed(names_of_all_stages, 2)
    assert set(first) & set(last) == {"embedding.word_embeddings.weight"}
    whole = {name for name, _ in build_local(tiny_tokenformer(), VOCAB, None).named_parameters()}
    assert set(first) | set(last) == whole


def too_many_stages() -> str:
    with pytest.raises(ConfigError) as error:
        build(tiny_tokenformer(num_layers=1), {"pipe_parallel_size": dist.get_world_size()}, OFF)
    return str(error.value)


def test_more_stages_than_layers_are_refused() -> None:
    for message in run_distributed(too_many_stages, 2):
        assert "pipe_parallel_size=2 is more than num_layers=1" in message
