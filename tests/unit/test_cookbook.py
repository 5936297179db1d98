"""Recipes of CONTRIBUTING.md, each followed by a dummy that is added through its registry alone.

Optimizers, dataset formats, launchers, growth and inherit operators and experiments have such a test beside their own:
test_optimizers.py and ranks/training/test_another_optimizer.py, test_dataset_format.py, test_environment.py,
test_growth_operators.py, test_inherit_tool.py, tools/experiments/test_run_matrix.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import PositiveInt
from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.parameter_layout import ParallelSizes, layer_layouts
from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.config.architecture import ARCHITECTURES as ARCHITECTURE_FACTS
from megatron.config.architecture import ArchitectureFacts
from megatron.config.architectures.tokenformer import param_tokens
from megatron.config.load_config import load_config
from megatron.config.model_size import count_parameters
from megatron.config.optimizer import OPTIMIZERS, OptimizerFacts
from megatron.config.optimizers.adamw import AdamWConfig
from megatron.config.section import Key
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.speedups import SpeedupsConfig
from megatron.config.sections.training import PrecisionConfig
from megatron.errors import ConfigError
from megatron.kernels.backends import Backend
from megatron.kernels.pattention.backends.reference import pattention_reference
from megatron.kernels.pattention.pattention import PATTENTION
from megatron.kernels.pattention.theta import THETAS, RowReduction, wide_dtype
from megatron.model.architectures.tokenformer import tokenformer_layer
from megatron.model.attention import LinearSelfAttention
from megatron.model.causal_lm import build_local
from megatron.model.layer_spec import ARCHITECTURES as ARCHITECTURE_LAYERS
from megatron.model.layer_spec import TransformerLayerSpec
from megatron.model.speedups import apply_speedups, choose_speedups
from megatron.registry import Registry
from tests.helpers.checkpoints import CONFIG
from tests.helpers.forkserver import ROOT
from tests.helpers.models import VOCAB, tiny_tokenformer
from tools.generate_config_docs import flat_schema

TOKENFORMER = ROOT / "configs" / "tokenformer" / "150M.yml"


@pytest.fixture
def registered() -> Iterator[Any]:
    """Registers variants for one test."""
    entries: list[tuple[Registry[Any], str]] = []

    def register(registry: Registry[Any], name: str, entry: Any) -> None:
        registry.register(name)(entry)
        entries.append((registry, name))

    yield register
    for registry, name in entries:
        registry.unregister(name)


class MeanRelu:
    """h = relu(a) s / n, without a statistic: a Theta of a test's own."""

    def definition(self, scores: Tensor, scale_base: int) -> Tensor:
        return scores.relu() / scale_base

    def statistic(self, a_RJp: Tensor, scale_base: int, rows: RowReduction) -> Tensor:
        return a_RJp.new_zeros((*a_RJp.shape[:-1], 1), dtype=wide_dtype(a_RJp))

    def weights(self, a_RJp: Tensor, statistic_RJk: Tensor, scale_base: int) -> Tensor:
        return a_RJp.to(statistic_RJk.dtype).relu() / scale_base

    def gradient(
        self, g_RJp: Tensor, a_RJp: Tensor, statistic_RJk: Tensor, *, scale_base: int, rows: RowReduction
    ) -> tuple[Tensor, Tensor]:
        return self.weights(a_RJp, statistic_RJk, scale_base), g_RJp * (a_RJp > 0) / scale_base


def test_a_theta_is_one_registration(registered: Any) -> None:
    """The YAML selects it, its name is in messages and schema, and the model computes with its closed form."""
    registered(THETAS, "mean_relu", MeanRelu())
    run = load_config([TOKENFORMER], ["norm_activation_type=mean_relu"]).run
    assert param_tokens(run.model).theta == "mean_relu"
    assert "mean_relu" in str(flat_schema()["properties"]["norm_activation_type"])
    with pytest.raises(ConfigError, match=r"expected one of gelu_l2_norm, l2_norm_gelu, mean_relu, softmax"):
        load_config([TOKENFORMER], ["norm_activation_type=mean"])
    tokens = param_tokens(tiny_tokenformer()).model_copy(update={"theta": "mean_relu"})
    layer = build_local(tiny_tokenformer(tokens=tokens), VOCAB, seed=1).double().layers[0].mlp
    x_BSD = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    expected = pattention_reference(x_BSD, layer.key_tokens, layer.value_tokens, "mean_relu", 40)
    inputs = (x_BSD, layer.key_tokens, layer.value_tokens)
    found = layer(x_BSD)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    dy = torch.randn_like(expected)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_kernel_is_one_registration(registered: Any) -> None:
    """A backend of a higher rank takes the place of the others wherever the operation is called."""
    calls = []

    def counted(x_BSD: Tensor, *tokens: Sequence[Tensor], **options: Any) -> Tensor:
        calls.append(x_BSD.shape)
        return PATTENTION["eager"].load()(x_BSD, *tokens, **options)

    module = build_local(tiny_tokenformer(), VOCAB, seed=1)
    tokens_BS = torch.randint(VOCAB.actual, (2, 16))
    before = module(tokens_BS)
    registered(PATTENTION, "counted", Backend(label="counted", rank=99, load=lambda: counted))
    speedups = choose_speedups(SpeedupsConfig(), PrecisionConfig(), AdamWConfig(lr=1e-3), on_gpu=False)
    assert "pattention counted" in str(speedups)
    apply_speedups(module, speedups)
    assert torch.equal(module(tokens_BS), before)
    assert len(calls) == 2 * 3  # in each of two layers: q, k and v together, the output, the feed-forward sublayer


def test_an_architecture_is_its_facts_and_its_layer(registered: Any, tmp_path: Path) -> None:
    """Linear attention beside a Pattention: configured, counted, built, split over ranks, saved and read again."""

    def matrices(model: ModelConfig) -> int:
        return 4 * model.hidden_size**2 + 2 * model.hidden_size * param_tokens(model).ffn

    def layer(model: ModelConfig) -> TransformerLayerSpec:
        tokenformer = tokenformer_layer(model)
        return TransformerLayerSpec(tokenformer.norm, LinearSelfAttention, tokenformer.mlp)

    facts = ArchitectureFacts(
        matrices,
        layer_biases=lambda model: 0,
        attention_types=("mixed",),
        split_sizes=("param_tokens.ffn",),
        defaults={"use_bias_in_attn_linear": False},
        sections={"param_tokens": "parameter tokens"},
    )
    registered(ARCHITECTURE_FACTS, "mixed", facts)
    registered(ARCHITECTURE_LAYERS, "mixed", layer)
    loaded = load_config([TOKENFORMER], ['attention_config=[[["mixed"], 12]]', "architecture=null"]).run
    assert loaded.model.architecture == "mixed"
    with pytest.raises(ConfigError, match="ffn_slot_num: 3070: does not split over model_parallel_size 4"):
        load_config([TOKENFORMER], ["architecture=mixed", "attention_config=null", "ffn_slot_num=3070",
                                    "model_parallel_size=4"])  # fmt: skip

    sizes = {"padded_vocab_size": VOCAB.padded, "make_vocab_size_divisible_by": VOCAB.padded}
    model = tiny_tokenformer(architecture="mixed", use_bias_in_attn_linear=False, **sizes)
    weights = {name: weight.detach() for name, weight in build_local(model, VOCAB, seed=1).named_parameters()}
    assert sum(weight.numel() for weight in weights.values()) == count_parameters(model, VOCAB.padded)
    layers = (
        LayerState(
            layout.name, {local: ParameterState(weights[layout.global_name(local)]) for local in layout.parameters}
        )
        for layout in layer_layouts(model, VOCAB)
    )
    config = CONFIG.model_copy(update={"model": model})
    path = write_states(layers, config, ParallelSizes(tensor=2), tmp_path, RunHeader.new(VOCAB.actual, {}))
    for name, found in read_weights(read_checkpoint(path)).items():
        assert torch.equal(found, weights[name]), name


class PatientAdamWConfig(AdamWConfig):
    """AdamW with one more key."""

    type: Literal["PatientAdamW"] = "PatientAdamW"  # type: ignore[assignment]
    """Name."""

    patience: Annotated[PositiveInt, Key("optimizer.params.patience", difference="not a NeoX key")] = 7
    """Steps to wait [steps]."""


def test_a_key_is_declared_once(registered: Any) -> None:
    """Type, default, unit, meaning and NeoX's difference stand in the section; the rest follows."""
    adamw = OPTIMIZERS["adamw"]
    facts = OptimizerFacts(PatientAdamWConfig, adamw.moments, adamw.groups, adamw.implementations)
    registered(OPTIMIZERS, "patient", facts)
    loaded = load_config([TOKENFORMER], ["optimizer.type=PatientAdamW", "optimizer.params.patience=3"])
    assert loaded.run.training.optimizer.patience == 3  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"optimizer\.params\.patience: 0: expected a whole number above 0"):
        load_config([TOKENFORMER], ["optimizer.type=PatientAdamW", "optimizer.params.patience=0"])
    with pytest.raises(ConfigError, match="it has lr, betas, eps, patience; did you mean patience"):
        load_config([TOKENFORMER], ["optimizer.type=PatientAdamW", "optimizer.params.patients=3"])
    described = flat_schema()["properties"]["optimizer"]["properties"]["params"]["properties"]["patience"]
    assert described["default"] == 7 and described["description"].startswith("Steps to wait")


def test_the_cookbook_names_files_that_exist() -> None:
    """A recipe's NAME stands for a variant, of which there is one at least."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for path in re.findall(r"`((?:megatron|tools|tests|configs)/[\w/.]+)`|\]\(([\w/.]+)\)", text):
        name = path[0] or path[1]
        pattern = name.replace("NAME", "*").replace("OPERATION", "*")
        # The folder of optimizers that no library has is made with the first of them.
        if name != "megatron/training/optimizers/NAME.py":
            assert list(ROOT.glob(pattern.rstrip("/"))), name
