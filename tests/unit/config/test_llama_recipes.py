"""The shipped recipes of LLaMA: sizes by closed form, tokens, schedule, every data and cluster file."""

from __future__ import annotations

import pytest

from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.model_size import count_parameters, forward_flops
from tests.helpers.forkserver import ROOT

CONFIGS = ROOT / "configs"
RECIPES = {  # layers, parameters, steps, tokens of a batch
    "open_llama_3B": (26, 3_426_473_600, 238_419, 2**22),
    "1-5B": (13, 1_815_638_400, 64_000, 2**17),
}


def loaded(name: str, *others: str) -> LoadedConfig:
    return load_config([CONFIGS / f"{part}.yml" for part in (f"llama/{name}", *others)], ["save=runs/test"])


def test_they_are_the_files_that_are_shipped() -> None:
    assert {file.stem for file in CONFIGS.glob("llama/*.yml")} == {*RECIPES, "tiny"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str) -> None:
    config = loaded(name)
    model, training = config.run.model, config.run.training
    layers, parameters, steps, tokens = RECIPES[name]
    width, inside, rows = 3200, 8640, 32_000
    # Embedding and head; per layer four matrices of D x D, three of D x F and two norms; the final norm.
    assert parameters == 2 * rows * width + layers * (4 * width**2 + 3 * width * inside + 2 * width) + width
    assert count_parameters(model, rows) == parameters
    assert forward_flops(model, rows, 2048).total == (
        2 * layers * (4 * width**2 + 3 * width * inside) + 4 * layers * width * 2048 + 2 * rows * width
    )
    assert (training.train_iters, config.batch(8).global_batch_size * model.seq_length) == (steps, tokens)
    assert round(training.lr_schedule.warmup * steps) == 2000
    assert config.warnings == ()


def test_half_the_depth_is_the_only_difference_of_the_models() -> None:
    large, small = (loaded(name).run.model for name in RECIPES)
    assert large.model_copy(update={"num_layers": 13}) == small


@pytest.mark.parametrize("name", RECIPES)
def test_merges_with_every_data_and_cluster_file(name: str) -> None:
    for data in CONFIGS.glob("data/*.yml"):
        for cluster in CONFIGS.glob("clusters/*.yml"):
            assert loaded(name, f"data/{data.stem}", f"clusters/{cluster.stem}").run.data.data_path is not None


@pytest.mark.parametrize("name", [*RECIPES, "tiny"])
def test_count_agrees_with_the_built_model(name: str) -> None:
    import torch

    from megatron.model.causal_lm import VocabSize, build_local

    model = loaded(name).run.model
    with torch.device("meta"):
        module = build_local(model, VocabSize(32_000, 32_000), seed=None)
    assert sum(parameter.numel() for parameter in module.parameters()) == count_parameters(model, 32_000)


def test_grouped_heads_and_biases_by_closed_form() -> None:
    """Two layers of D = 8, two heads of four features that share one head of keys and values, and F = 6."""
    changes = ["num_layers=2", "hidden_size=8", "num_attention_heads=2", "num_kv_heads=1", "ffn_hidden_size=6"]
    changes += ["use_bias_in_attn_linear=true", "use_bias_in_mlp=true", "padded_vocab_size=null"]
    model = load_config([CONFIGS / "llama" / "1-5B.yml"], changes).run.model
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 6
    biases = 8 + 4 + 4 + 8 + 6 + 6 + 8
    assert count_parameters(model, 10) == 2 * 10 * 8 + 2 * (weights + biases + 2 * 8) + 8
    assert forward_flops(model, 10, 16).layers == 2 * 2 * weights
