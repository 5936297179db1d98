"""Every registered growth operator keeps its promise, and a dummy one needs nothing but its registration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.parameter_layout import ParallelSizes, layer_layouts
from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.config.sections.growth import GrowthRecord, GrowthRules, ModelSizes
from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.errors import ConfigError
from megatron.growth.added_tokens import TokenOperator, with_new_rows
from megatron.growth.grow_checkpoint import grow_checkpoint
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, grown_layers, require_growth
from megatron.growth.target_model import grown_model
from megatron.model.causal_lm import LocalCausalLM, build_local
from megatron.registry import variant_names
from tests.helpers.checkpoints import CONFIG
from tests.helpers.models import VOCAB, tiny_tokenformer
from tools.ckpts import grow

BEFORE = ParamTokenConfig(qkv=24, proj=16, ffn=40)
AFTER: dict[str, Any] = {"qkv": 32, "proj": 16, "ffn": 56}
PINNED = {"qkv_scale_base": 24, "proj_scale_base": 16, "ffn_scale_base": 40}
EXACT = [("zero_key", "l2_norm_gelu"), ("zero_key", "gelu_l2_norm")]


def models(theta: str) -> tuple[ModelConfig, ModelConfig]:
    before = BEFORE.model_copy(update={"theta": theta})
    return tiny_tokenformer(tokens=before), tiny_tokenformer(tokens=ParamTokenConfig(**AFTER, **PINNED, theta=theta))


def layers_of(model: ModelConfig, module: LocalCausalLM) -> Iterator[LayerState]:
    parameters = dict(module.named_parameters())
    for layout in layer_layouts(model, VOCAB):
        weights = {local: parameters[layout.global_name(local)].detach() for local in layout.parameters}
        moments = {"exp_avg": 0.1, "exp_avg_sq": 0.01}
        states = {
            local: ParameterState(weight, weight, {name: weight * by for name, by in moments.items()}, 7.0)
            for local, weight in weights.items()
        }
        yield LayerState(layout.name, states)


def grown(operator: str, theta: str) -> tuple[LocalCausalLM, LocalCausalLM, list[LayerState], list[LayerState]]:
    before, after = models(theta)
    small = build_local(before, VOCAB, seed=1).double()
    rules = GrowthRules(operator=operator)
    require_growth(before, after, rules)
    old = list(layers_of(before, small))
    new = list(grown_layers({layer.name: layer for layer in old}.__getitem__, growth_of(before, after, rules)))
    large = build_local(after, VOCAB, seed=None).double()
    large.load_state_dict({name: weight for layer in new for name, weight in layer.weights().items()}, strict=True)
    return small, large, old, new


def growth_of(before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> Growth:
    record = GrowthRecord(
        iteration=7, tokens=0, before=ModelSizes.of(before), after=ModelSizes.of(after), rules=rules
    )  # fmt: skip
    return Growth(before, after, VOCAB, record, seed=2, squared_moments=("exp_avg_sq",))


def logits_and_gradients(module: LocalCausalLM) -> tuple[Tensor, dict[str, nn.Parameter]]:
    tokens = torch.randint(VOCAB.actual, (2, 16), generator=torch.Generator().manual_seed(3))
    logits = module(tokens)
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    return logits.detach(), dict(module.named_parameters())


@pytest.mark.parametrize(("operator", "theta"), EXACT)
def test_exact_operators_change_no_logit(operator: str, theta: str) -> None:
    small, large, _, _ = grown(operator, theta)
    before, _ = logits_and_gradients(small)
    after, _ = logits_and_gradients(large)
    assert (before - after).abs().max() <= 1e-13 * before.abs().max()


@pytest.mark.parametrize(("operator", "theta"), EXACT)
def test_new_keys_train_from_the_first_step_and_new_values_from_the_second(operator: str, theta: str) -> None:
    _, large, _, _ = grown(operator, theta)
    optimizer = torch.optim.SGD(large.parameters(), lr=0.1)
    _, parameters = logits_and_gradients(large)
    key, value = parameters["layers.0.mlp.key_tokens"], parameters["layers.0.mlp.value_tokens"]
    assert key.grad is not None and value.grad is not None
    assert key.grad[40:].abs().sum() > 0
    assert not value.grad[40:].any()
    optimizer.step()
    optimizer.zero_grad()
    logits_and_gradients(large)
    assert value.grad is not None and value.grad[40:].abs().sum() > 0


@pytest.mark.parametrize("operator", ["zero_key", "random"])
def test_old_rows_and_their_moments_are_kept(operator: str) -> None:
    _, _, old, new = grown(operator, "l2_norm_gelu")
    for before, after in zip(old, new, strict=True):
        for (name, ours), (_, larger) in zip(before.by_global_name(), after.by_global_name(), strict=True):
            rows = len(ours.weight)
            assert larger.step == ours.step
            assert torch.equal(larger.weight[:rows], ours.weight), name
            assert larger.moments.keys() == ours.moments.keys()
            for moment, kept in ours.moments.items():
                assert torch.equal(larger.moments[moment][:rows], kept)
                assert not larger.moments[moment][rows:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": 32}, "ffn_slot_num: 32 is fewer than the checkpoint's 40"),
        ({"ffn_scale_base": 56}, "Set `ffn_scale_base: 40`"),
        ({"theta": "softmax"}, "norm_activation_type: softmax"),
    ],
)
def test_what_zero_key_refuses(changes: dict[str, Any], message: str) -> None:
    before = BEFORE.model_copy(update={"theta": changes.get("theta", "l2_norm_gelu")})
    after = ParamTokenConfig(**({**AFTER, **PINNED} | changes))
    with pytest.raises(ConfigError, match=message):
        require_growth(tiny_tokenformer(tokens=before), tiny_tokenformer(tokens=after), GrowthRules())


class Halve(TokenOperator):
    """A test's own operator: half the weights, and zeros."""

    def is_exact(self, theta: str | None) -> bool:
        return False

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        halved = layer.map(lambda name, tensor: tensor / 2)
        return with_new_rows(halved, growth, keys="zero", values="zero")


@pytest.fixture
def halve() -> Iterator[None]:
    GROWTH_OPERATORS.register("halve")(Halve())
    yield
    GROWTH_OPERATORS.unregister("halve")


@pytest.mark.usefixtures("halve")
def test_an_operator_needs_nothing_but_its_registration(tmp_path: Path) -> None:
    """The command offers it, and it is applied to a checkpoint of any layout, moments and all."""
    assert "halve" in variant_names("megatron.growth.operators")
    words = ["--input_dir", "a", "--output_dir", "b", "--config_file", "c.yml", "--operator", "halve"]
    assert grow.parse_args(words).operator == "halve"
    model = tiny_tokenformer(padded_vocab_size=VOCAB.padded, make_vocab_size_divisible_by=VOCAB.padded)
    config = CONFIG.model_copy(update={"model": model})
    rules = GrowthRules(operator="halve")
    parallel = ParallelConfig(model_parallel_size=4)
    larger = config.model_copy(update={"model": grown_model(model, rules, ffn=56), "parallel": parallel})
    layers = list(layers_of(model, build_local(model, VOCAB, seed=1)))
    weights_alone = (
        layer.replace({name: ParameterState(state.weight) for name, state in layer.parameters.items()})
        for layer in layers
    )
    header = RunHeader.new(VOCAB.actual, {})
    source = read_checkpoint(write_states(weights_alone, config, ParallelSizes(tensor=2), tmp_path / "source", header))
    grown = read_checkpoint(grow_checkpoint(source, larger, rules, ParallelSizes(tensor=4), tmp_path / "grown"))
    assert grown.state.tensor_parallel_size == 4
    found = read_weights(grown)
    for layer in layers:
        for name, weight in layer.weights().items():
            assert torch.equal(found[name][: len(weight)], weight / 2), name
            assert len(found[name]) == (56 if name.startswith("layers") and "mlp" in name else len(weight))
