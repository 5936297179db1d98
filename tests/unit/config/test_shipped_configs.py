"""Every shipped YAML loads, checks and counts, with every data and cluster file."""

import pytest

from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.model_size import count_parameters
from tests.helpers.forkserver import ROOT

CONFIGS = ROOT / "configs"
MODELS = sorted([*CONFIGS.glob("tokenformer/*.yml"), *CONFIGS.glob("pythia/*.yml")])
NAMES = [f"{file.parent.name}/{file.stem}" for file in MODELS]

# Parameters with 50,304 vocabulary rows, and the data-parallel ranks of the published run where they are known.
PUBLISHED = {
    "tokenformer/150M": (151_881_216, 8),
    "tokenformer/450M": (454_166_528, 16),
    "tokenformer/900M": (903_252_480, 32),
    "tokenformer/1-5B": (1_587_219_456, 64),
    "pythia/14M": (14_067_712, 32),
    "pythia/31M": (30_494_720, 32),
    "pythia/70M": (70_426_624, 32),
    "pythia/160M": (162_322_944, 32),
    "pythia/410M": (405_334_016, 32),
    "pythia/1B": (1_011_781_632, 64),
    "pythia/1-4B": (1_414_647_808, 64),
    "pythia/2-8B": (2_775_208_960, 64),
    # These two are published with more vocabulary rows: see test_padding_of_the_largest_pythias.
    "pythia/6-9B": (6_856_253_440, 64),
    "pythia/12B": (11_842_140_160, 64),
}


def loaded(name: str, *others: str) -> LoadedConfig:
    return load_config([CONFIGS / f"{part}.yml" for part in (name, *others)], ["save=runs/test"])


def test_the_published_models_are_shipped() -> None:
    assert set(NAMES) == set(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name: str) -> None:
    config = loaded(name)
    run, (parameters, ranks) = config.run, PUBLISHED[name]
    assert run.model.padded_vocab_size == 50304
    assert count_parameters(run.model, 50304) == parameters
    batch = config.batch(ranks * run.parallel.model_parallel_size)
    assert batch.data_parallel_size == ranks
    assert batch.global_batch_size * run.model.seq_length * run.training.train_iters == 299_892_736_000
    assert run.training.gradient_accumulation_steps is None
    assert run.training.lr_schedule.min_lr == pytest.approx(run.training.optimizer.lr / 10, rel=1e-12)
    assert run.model.rotary_pct == 0.25
    assert config.warnings == ()


@pytest.mark.parametrize(("name", "accumulation"), [("150M", 4), ("450M", 4), ("900M", 4), ("1-5B", 2)])
def test_accumulation_of_the_published_tokenformers(name: str, accumulation: int) -> None:
    _, ranks = PUBLISHED[f"tokenformer/{name}"]
    assert loaded(f"tokenformer/{name}").batch(ranks).gradient_accumulation_steps == accumulation


@pytest.mark.parametrize("name", NAMES)
def test_merges_with_every_data_and_cluster_file(name: str) -> None:
    for data in CONFIGS.glob("data/*.yml"):
        for cluster in CONFIGS.glob("clusters/*.yml"):
            config = loaded(name, f"data/{data.stem}", f"clusters/{cluster.stem}")
            assert config.run.data.data_path is not None
            assert config.run.data.tokenizer.type == "HFTokenizer"


@pytest.mark.parametrize("name", NAMES)
def test_count_agrees_with_the_built_model(name: str) -> None:
    import torch

    from megatron.model.causal_lm import VocabSize, build_local

    with torch.device("meta"):
        module = build_local(loaded(name).run.model, VocabSize(50277, 50304), seed=None)
    assert sum(parameter.numel() for parameter in module.parameters()) == PUBLISHED[name][0]


@pytest.mark.parametrize(
    ("name", "rows", "parameters"), [("6-9B", 50432, 6_857_302_016), ("12B", 50688, 11_846_072_320)]
)
def test_padding_of_the_largest_pythias(name: str, rows: int, parameters: int) -> None:
    """With the rows that NeoX gave them, they have the parameters that their model cards say."""
    assert count_parameters(loaded(f"pythia/{name}").run.model, rows) == parameters


def test_pythia_has_154_checkpoints() -> None:
    checkpoint = loaded("pythia/160M").run.checkpoint
    assert isinstance(checkpoint.checkpoint_factor, int)
    steps = {*checkpoint.extra_save_iters, *range(1000, 143_001, checkpoint.checkpoint_factor)}
    assert len(steps) == 154


@pytest.mark.parametrize("precision", ["bfloat16", "fp32"])
def test_precision_can_be_overridden(precision: str) -> None:
    file = CONFIGS / "tokenformer" / "150M.yml"
    dtype = load_config([file], [f"precision={precision}"]).run.training.precision.dtype
    assert dtype == {"bfloat16": "bf16", "fp32": "fp32"}[precision]
