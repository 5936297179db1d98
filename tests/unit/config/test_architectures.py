"""Architectures as configuration declares them: one that a test adds by registering its facts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.config.architecture import ARCHITECTURES, ArchitectureFacts, FixedValue
from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.model_size import count_parameters, forward_flops
from megatron.errors import ConfigError
from megatron.model.causal_lm import VocabSize, layer_entries
from megatron.mpu.context import ParallelContext
from tools.generate_config_docs import flat_schema, reference

PYTHIA = Path(__file__).parent / "published_pythia.yml"
TOKENFORMER = Path(__file__).parent / "published_tokenformer.yml"


@pytest.fixture
def plain() -> Iterator[None]:
    """Registers an architecture of two square matrices and a bias per layer, which normalizes by RMSNorm alone."""
    facts = ArchitectureFacts(
        layer_matrices=lambda model: 2 * model.hidden_size**2,
        layer_biases=lambda model: model.hidden_size,
        attention_types=("plain",),
        split_sizes=("num_layers",),
        defaults={"rms_norm_epsilon": 1e-6, "activation": "gelu"},
        fixed={"parallel_residual": FixedValue(False, "a plain layer is sequential; use false")},
    )
    ARCHITECTURES.register("plain")(facts)
    yield
    ARCHITECTURES.unregister("plain")


def loaded(*overrides: str) -> LoadedConfig:
    changes = {"attention_config": "[[[plain], 12]]", "bias_gelu_fusion": "null", "gpt_j_residual": "null"}
    changes |= dict(override.split("=") for override in overrides)
    return load_config([PYTHIA], [f"{key}={value}" for key, value in changes.items()])


@pytest.mark.usefixtures("plain")
def test_a_registered_architecture_is_configured_by_neox_attention_types() -> None:
    result = loaded("norm=rmsnorm")
    model = result.run.model
    assert (model.architecture, model.rms_norm_epsilon, model.param_tokens) == ("plain", 1e-6, None)
    assert str(result.origins["model.rms_norm_epsilon"]) == "derived"
    assert model == loaded("attention_config=null", "architecture=plain", "norm=rmsnorm").run.model
    assert loaded("rms_norm_epsilon=1e-5").run.model.rms_norm_epsilon == 1e-5


@pytest.mark.usefixtures("plain")
def test_parameters_and_operations_follow_from_its_facts() -> None:
    model = loaded("norm=rmsnorm").run.model
    # Two embeddings of 768; 12 layers of two matrices, a bias and two norms; the last norm.
    assert count_parameters(model, 1000) == 2 * 1000 * 768 + 12 * (2 * 768**2 + 768 + 2 * 768) + 768
    assert forward_flops(model, 1000, 16).layers == 12 * 2 * 2 * 768**2


@pytest.mark.usefixtures("plain")
def test_its_refusals_are_reported_with_all_others() -> None:
    with pytest.raises(ConfigError) as caught:
        loaded("gpt_j_residual=true", "qkv_slot_num=8", "model_parallel_size=8", "num_attention_heads=16")
    assert str(caught.value).splitlines()[1:] == [
        f"{PYTHIA}:5 num_layers: 12: does not split over model_parallel_size 8; nearest valid value: 16; or "
        "model_parallel_size 1, 2 or 4",
        "command line qkv_slot_num: 8: only the tokenformer architecture has parameter tokens, and this is plain "
        '(command line attention_config: [[["plain"], 12]])',
        "command line gpt_j_residual: true: a plain layer is sequential; use false",
    ]


@pytest.mark.usefixtures("plain")
def test_documentation_and_schema_name_it() -> None:
    architectures = flat_schema()["properties"]["architecture"]["anyOf"][0]["enum"]
    assert architectures == ["gpt2", "gpt_neox", "llama", "plain", "tokenformer"]
    assert "| `architecture` | one of gpt2, gpt_neox, llama, plain, tokenformer |" in reference()
    assert "1e-06 by default for plain" in reference()


@pytest.mark.parametrize("file", [PYTHIA, TOKENFORMER], ids=["pythia", "tokenformer"])
@pytest.mark.parametrize("norm", ["layernorm", "layernorm_nonparam", "rmsnorm"])
@pytest.mark.parametrize("untied", ["true", "false"])
def test_names_that_a_partition_method_searches_are_those_of_the_layers(file: Path, norm: str, untied: str) -> None:
    changes = [f"norm={norm}", "final_norm=null", f"no_weight_tying={untied}"]
    with pytest.raises(ConfigError) as caught:
        load_config([file], ["pipe_partition_method=type:nothing", *changes])
    model = load_config([file], changes).run.model
    entries = layer_entries(model, VocabSize(100, 128), ParallelContext.single())
    names = ", ".join(dict.fromkeys(entry.module.__name__ for entry in entries))
    assert f"no layer has such a name, only {names}; use type:transformer" in str(caught.value)
