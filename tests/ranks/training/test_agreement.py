"""All ranks take the same decisions about gradients, in the engine of a real configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
import yaml
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

from megatron.config.load_config import load_config
from megatron.model.causal_lm import VocabSize
from megatron.mpu.context import ParallelContext
from megatron.training.build_engine import build_engine
from megatron.training.stability.step_guard import StepGuard
from megatron.training.stop_request import StopRequest
from tests.helpers.configs import PYTHIA, SEQ_LENGTH, TOKENFORMER, VOCAB_SIZE, layout_keys
from tests.helpers.covers import covered
from tests.helpers.distributed import run_on_new_ranks

STEPS, POISONED = 4, 2
EMBEDDING, FINAL_NORM = "embedding.word_embeddings.weight", "final_norm.weight"


@dataclass
class Steps:
    """Observations of one rank's engine."""

    norms: list[float]
    rates: list[float]
    skipped: int
    weights: list[dict[str, torch.Tensor]]
    """Before the first step and after each."""


def micro_batches(rows: int, data_rank: int) -> Iterator[Any]:
    """Yields random tokens, alike on the ranks that read the same samples."""
    generator = torch.Generator().manual_seed(data_rank)
    while True:
        tokens = torch.randint(VOCAB_SIZE, (rows, SEQ_LENGTH + 1), generator=generator)
        yield tokens[:, :-1], (tokens[:, 1:].contiguous(), torch.ones(rows, SEQ_LENGTH))


def take_steps(config: Path, poisoned_rank: int | None, poisoned_parameter: str, as_fp16: bool = False) -> Steps:
    """Takes a few steps without the guard; in one of them a gradient on one rank is NaN.

    The guard would make every gradient NaN before their norm is taken. `as_fp16` gives bf16 the optimizer of fp16.
    """
    deepspeed.init_distributed("gloo", verbose=False)
    loaded = load_config([config])
    batch, parallel = loaded.batch(dist.get_world_size()), loaded.run.parallel
    context = ParallelContext.create(
        parallel.model_parallel_size, parallel.pipe_parallel_size, parallel.sequence_parallel
    )
    unguarded = mock.patch.object(StepGuard, "inspect", lambda guard, bad_gradients: None)
    optimizer = mock.patch.object(DeepSpeedEngine, "_do_optimizer_sanity_check", lambda *_: ZERO_OPTIMIZATION)
    with optimizer if as_fp16 else nullcontext():
        engine = build_engine(loaded.run, batch, VocabSize(VOCAB_SIZE, VOCAB_SIZE), context, StopRequest()).engine
    parameters = dict(engine.module.global_parameters())
    seen = Steps(norms=[], rates=[], skipped=0, weights=[copied(parameters)])
    if dist.get_rank() == poisoned_rank:
        parameters[poisoned_parameter].register_hook(
            lambda gradient: gradient * math.nan if len(seen.norms) == POISONED - 1 else gradient
        )
    batches = micro_batches(batch.micro_batch_size, context.data_rank)
    for _ in range(STEPS):
        with unguarded:
            engine.train_batch(batches)
        seen.norms.append(float(engine.get_global_grad_norm()))
        seen.rates.append(engine.lr_scheduler.get_last_lr()[0])
        seen.weights.append(copied(parameters))
    seen.skipped = engine.skipped_steps
    return seen


def copied(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def write(folder: Path, settings: dict[str, Any]) -> Path:
    config = folder / "config.yml"
    config.write_text(yaml.safe_dump(settings))
    return config


PLACES: dict[str, tuple[dict[str, Any], dict[str, int], int, str]] = {
    "data": (TOKENFORMER, {"data": 2}, 1, "layers.1.mlp.key_tokens"),
    "tensor, split": (TOKENFORMER, {"tensor": 2}, 1, "layers.0.attention.query.value_tokens"),
    "tensor, norm": (TOKENFORMER, {"tensor": 2}, 1, FINAL_NORM),
    "tensor, bias": (PYTHIA, {"tensor": 2}, 1, "layers.0.mlp.dense_4h_to_h.bias"),
    "pipe, first stage": (TOKENFORMER, {"pipe": 2}, 0, "layers.0.attention.proj.key_tokens"),
    "pipe, tied head": (TOKENFORMER, {"pipe": 2}, 1, EMBEDDING),
    "both, norm": (TOKENFORMER, {"pipe": 2, "tensor": 2}, 3, FINAL_NORM),
}
"""Model, layout, and the rank and parameter whose gradient is NaN."""


@pytest.mark.parametrize(
    ("place", "precision", "clipping"), covered(list(product(PLACES, ["fp32", "bfloat16"], [0.0, 1.0])))
)
def test_a_gradient_that_is_not_finite_on_one_rank_stops_the_step_on_all(
    place: str, precision: str, clipping: float, tmp_path: Path
) -> None:
    base, layout, rank, parameter = PLACES[place]
    settings = base | layout_keys(**layout) | {"precision": precision, "gradient_clipping": clipping}
    ranks = run_on_new_ranks(take_steps, math.prod(layout.values()), write(tmp_path, settings), rank, parameter)
    for seen in ranks:
        assert seen.skipped == 1
        assert [math.isfinite(norm) for norm in seen.norms] == [step != POISONED for step in range(1, STEPS + 1)]
        assert (seen.norms, seen.rates) == (ranks[0].norms, ranks[0].rates)
        assert seen.rates[POISONED - 1] == seen.rates[POISONED - 2]
        assert all(tensor.isfinite().all() for weights in seen.weights for tensor in weights.values())
        changed = [any(not torch.equal(after[n], before[n]) for n in after) for before, after in pairwise(seen.weights)]
        # The warmup's first step has learning rate 0.
        assert changed == [False, False, True, True]


def test_a_rank_without_a_gradient_of_its_own_still_counts(tmp_path: Path) -> None:
    """The last stage has the final norm and the tied head: tensor rank 0 counts the norm, rank 1 nothing at all."""
    two_stages = layout_keys(tensor=2, pipe=2) | {"pipe_partition_method": "uniform"}
    norms = {}
    for name, layout in {"alone": layout_keys(), "split": two_stages}.items():
        config = write(tmp_path, TOKENFORMER | layout | {"precision": "bfloat16"})
        ranks = run_on_new_ranks(take_steps, 4 if name == "split" else 1, config, None, "")
        norms[name] = ranks[0].norms
        if name == "split":
            assert set(ranks[2].weights[0]) == {EMBEDDING, FINAL_NORM, "final_norm.bias"}
    assert norms["split"] == pytest.approx(norms["alone"], rel=0.02)


def test_tied_gradients_are_summed_where_they_accumulate_beside_the_weights(tmp_path: Path) -> None:
    """As fp16 does, which needs a GPU: DeepSpeed's own sum of tied gradients does not find them there."""
    alone, stages = (
        run_on_new_ranks(take_steps, count, write(tmp_path, settings), None, "", True)
        for count, settings in (
            (1, TOKENFORMER | layout_keys(accumulation=2) | {"precision": "bfloat16"}),
            (2, TOKENFORMER | layout_keys(pipe=2, accumulation=2) | {"precision": "bfloat16"}),
        )
    )
    assert stages[0].norms == pytest.approx(alone[0].norms, rel=0.02)
    first, last = (seen.weights[-1][EMBEDDING] for seen in stages)
    assert torch.equal(first, last)
