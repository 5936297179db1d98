"""Which layers a pipeline stage has, and what it recomputes. What it computes is tested in tests/ranks/training."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.sections.model import ModelConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.config.sections.training import CheckpointedActivations
from megatron.errors import ConfigError
from megatron.model.causal_lm import build_local
from megatron.model.pipeline import CausalLMPipeline, build_pipeline
from megatron.mpu.context import ParallelContext
from tests.helpers.distributed import run_distributed
from tests.helpers.models import VOCAB, tiny_gpt2, tiny_pythia, tiny_tokenformer

LENGTH = 16


def build(model: ModelConfig, layout: dict[str, Any], recompute: CheckpointedActivations) -> CausalLMPipeline:
    deepspeed.init_distributed("gloo")
    parallel = ParallelConfig(**layout)
    context = ParallelContext.create(
        parallel.model_parallel_size, parallel.pipe_parallel_size, parallel.sequence_parallel
    )
    return build_pipeline(model, VOCAB, parallel, context, seed=6, checkpointed=recompute)


OFF, PAIRS = CheckpointedActivations(), CheckpointedActivations(enabled=True, num_layers=2)


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


def layers_of_stage(model: ModelConfig, layout: dict[str, Any]) -> list[str]:
    module = build(model, layout, OFF)
    return [spec.typename.__name__ for spec in module._layer_specs[module._local_start : module._local_stop]]


E, T, N, H = "TokenEmbedding", "TransformerLayer", "LayerNorm", "TiedHead"


@pytest.mark.parametrize(
    ("method", "model", "stages"),
    [
        ("type:transformer", tiny_tokenformer(num_layers=4), [[E, T, T], [T, T, N, H]]),
        ("type:transformer|mlp", tiny_tokenformer(num_layers=3), [[E, T, T], [T, N, H]]),
        ("uniform", tiny_tokenformer(num_layers=2), [[E, T, T], [N, H]]),
        # 256 rows of 32 for the embedding, 32 x 384 for each layer.
        ("parameters", tiny_tokenformer(num_layers=4), [[E, T, T], [T, T, N, H]]),
        ("parameters", tiny_pythia(num_layers=3, tie_embeddings=True), [[E, T, T], [T, N, H]]),
    ],
)
def test_layers_are_spread_as_asked(method: str, model: ModelConfig, stages: list[list[str]]) -> None:
    layout = {"pipe_parallel_size": 2, "pipe_partition_method": method}
    assert run_distributed(layers_of_stage, 2, model, layout) == stages


def logits_through_the_stages(model: ModelConfig, layout: dict[str, Any]) -> tuple[list[str], Tensor]:
    """The layers of this stage, and what the last stage makes of the first one's output."""
    module = build(model, layout, OFF)
    tokens = torch.randint(VOCAB.actual, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    names = [spec.typename.__name__ for spec in module._layer_specs[module._local_start : module._local_stop]]
    x = torch.empty(2, LENGTH, model.hidden_size)
    with torch.no_grad():
        if module.stage_id == 0:
            x = module(tokens)
        dist.broadcast(x, 0)
        return names, x if module.stage_id == 0 else module(x)


@pytest.mark.parametrize(
    ("method", "transformer_layers"),
    [("type:transformer", [3, 2]), ("parameters", [2, 3])],
)
def test_layers_know_their_place_in_the_whole_model(method: str, transformer_layers: list[int]) -> None:
    """Scores are divided by the index of the layer, which no stage counts for itself."""
    model = tiny_gpt2(num_layers=5, init_method_std=0.3)
    layout = {"pipe_parallel_size": 2, "pipe_partition_method": method}
    (first, _), (last, logits) = run_distributed(logits_through_the_stages, 2, model, layout)
    assert [names.count("TransformerLayer") for names in (first, last)] == transformer_layers
    tokens = torch.randint(VOCAB.actual, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(logits, build_local(model, VOCAB, seed=6)(tokens), rtol=0, atol=1e-5)
        unscaled = model.model_copy(update={"scale_attn_by_inverse_layer_idx": False})
        assert (build_local(unscaled, VOCAB, seed=6)(tokens) - logits).abs().max() > 1e-2


def refused(model: ModelConfig, layout: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        build(model, layout, OFF)
    return str(error.value)


@pytest.mark.parametrize(
    ("method", "final_norm", "message"),
    [
        (
            "type:mlp",
            "layernorm",
            "no layer has such a name, only TokenEmbedding, TransformerLayer, LayerNorm, TiedHead.",
        ),
        ("type:norm|head", "layernorm_nonparam", "leaves stage 2 of pipe_parallel_size=4 without parameters (NonParam"),
    ],
)
def test_stages_without_anything_to_train_are_refused(method: str, final_norm: str, message: str) -> None:
    layout = {"pipe_parallel_size": 4, "pipe_partition_method": method}
    for error in run_distributed(refused, 4, tiny_tokenformer(num_layers=4, final_norm=final_norm), layout):
        assert message in error
