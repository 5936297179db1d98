"""The shipped recipes of GPT-2 and of the Inheritune paper: sizes by closed form, tokens, schedule, every data file."""

from __future__ import annotations

import pytest

from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.model_size import count_parameters, forward_flops
from tests.helpers.forkserver import ROOT

CONFIGS = ROOT / "configs"
SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20), "xl": (48, 1600, 25)}
"""Layers, width, heads."""
GPT2 = {"small": 124_439_808, "medium": 354_823_168, "large": 774_030_080, "xl": 1_557_611_200}
"""Parameters with 50,257 rows, as published."""
INHERITUNE = {
    ("medium", 24): (3e-4, 384),
    ("medium", 16): (3e-4, 384),
    ("large", 36): (2e-4, 128),
    ("large", 18): (2e-4, 128),
    ("large", 32): (2e-4, 128),
    ("large", 16): (2e-4, 128),
    ("xl", 48): (1.5e-4, 128),
    ("xl", 24): (1.5e-4, 128),
}
"""Learning rate and sequences of a batch, by size and layers (appendix F.2 of the paper, its version 4)."""


def loaded(name: str, *others: str) -> LoadedConfig:
    return load_config([CONFIGS / f"{part}.yml" for part in (name, *others)], ["save=runs/test"])


def test_they_are_the_files_that_are_shipped() -> None:
    assert {file.stem for file in CONFIGS.glob("gpt2/*.yml")} == set(GPT2)
    found = {file.stem for file in CONFIGS.glob("inheritune/gpt2_*.yml")}
    assert found == {f"gpt2_{size}_{layers}" for size, layers in INHERITUNE}


@pytest.mark.parametrize("name", GPT2)
def test_gpt2(name: str) -> None:
    config = loaded(f"gpt2/{name}", "data/openwebtext_gpt2", "clusters/one_machine")
    model, training = config.run.model, config.run.training
    layers, width, heads = SIZES[name]
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (layers, width, heads)
    # Two embeddings; per layer 12 D^2 weights, 9 D biases and 4 D of two norms; the final norm.
    assert GPT2[name] == (50257 + 1024) * width + layers * (12 * width**2 + 13 * width) + 2 * width
    assert count_parameters(model, 50257) == GPT2[name]
    assert forward_flops(model, 50304, 1024).total == 24 * layers * width**2 + 4 * layers * width * 1024 + (
        2 * 50304 * width
    )
    assert training.train_iters * config.batch(8).global_batch_size * 1024 == 294_912_000_000
    assert training.lr_schedule.min_lr == pytest.approx(training.optimizer.lr / 10, rel=1e-12)
    assert round(training.lr_schedule.warmup * training.train_iters) == 2000
    assert not model.scale_attn_by_inverse_layer_idx
    assert config.warnings == ()


@pytest.mark.parametrize(("size", "layers"), INHERITUNE)
@pytest.mark.parametrize("data", ["openwebtext_gpt2", "fineweb_edu"])
def test_inheritune(size: str, layers: int, data: str) -> None:
    config = loaded(f"inheritune/gpt2_{size}_{layers}", f"data/{data}", "clusters/one_machine")
    model, training = config.run.model, config.run.training
    _, width, heads = SIZES[size]
    rate, batch = INHERITUNE[size, layers]
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == (layers, width, heads)
    assert model.scale_attn_by_inverse_layer_idx
    # No biases: two embeddings, 12 D^2 weights and two norms of D a layer, and the final norm.
    assert count_parameters(model, 50304) == (50304 + 1024) * width + layers * (12 * width**2 + 2 * width) + width
    assert (training.optimizer.lr, training.lr_schedule.min_lr, training.train_iters) == (rate, 1e-5, 100_000)
    assert training.lr_schedule.warmup * training.train_iters == 2000
    assert config.batch(8).global_batch_size == batch
    assert config.warnings == ()


@pytest.mark.parametrize("name", ["gpt2/xl", "inheritune/gpt2_xl_48"])
def test_count_agrees_with_the_built_model(name: str) -> None:
    import torch

    from megatron.model.causal_lm import VocabSize, build_local

    model = loaded(name).run.model
    with torch.device("meta"):
        module = build_local(model, VocabSize(50257, 50304), seed=None)
    assert sum(parameter.numel() for parameter in module.parameters()) == count_parameters(model, 50304)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_the_paper_s_batches_fit_any_usual_number_of_ranks(ranks: int) -> None:
    assert loaded("inheritune/gpt2_medium_24").batch(ranks).global_batch_size == 384
