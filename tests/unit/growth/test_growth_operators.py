"""Every registered growth operator keeps its promise, and a dummy one needs nothing but its registration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.checkpointing.states.fold_ramp import fold_ramp
from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.checkpointing.states.parameter_layout import ParallelSizes, layer_layouts
from megatron.checkpointing.states.read_states import read_weights
from megatron.checkpointing.states.write_states import RunHeader, write_states
from megatron.checkpointing.store.checkpoint import read_checkpoint
from megatron.config.sections.growth import GrowthRecord, GrowthRules, ModelSizes
from megatron.config.sections.model import ModelConfig, ParamTokenConfig
from megatron.config.sections.parallel import ParallelConfig
from megatron.errors import ConfigError
from megatron.growth.added_tokens import with_new_rows
from megatron.growth.grow_checkpoint import grow_checkpoint
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, TokenOperator, grown_layers
from megatron.growth.require_growth import require_growth
from megatron.growth.target_model import grown_model
from megatron.model.causal_lm import LocalCausalLM, build_local
from megatron.registry import variant_names
from tests.helpers.checkpoints import CONFIG
from tests.helpers.models import VOCAB, tiny_llama, tiny_pythia, tiny_tokenformer
from tools.ckpts import grow

BEFORE = ParamTokenConfig(qkv=24, proj=16, ffn=40)
THETAS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
GELUS = THETAS[:2]
LARGER: dict[str, dict[str, Any]] = {
    "copy": {"qkv": 72, "ffn": 80},
    "insert": {"num_layers": 5},
    "stack": {"num_layers": 4},
}
"""Sizes to grow to where the operator cannot do any."""
SIZES = {"qkv": 32, "ffn": 56}
RULES: dict[str, dict[str, Any]] = {
    "mask_ramp": {"ramp_iters": 4},
    "shrink_perturb": {"shrink": 0.8, "perturb": 0.1},
    "published": {"moments": "reset_all", "schedule": "restart"},
}
"""Rules that an operator requires."""
STEP = 7
EXACT = [
    *(("zero_key", theta, {}) for theta in GELUS),
    *(("mask_ramp", theta, {}) for theta in GELUS),
    *(("copy", theta, {}) for theta in THETAS),
    *(("copy", theta, {"perturb": 0.3}) for theta in THETAS),
    *(("insert", "softmax", {"insert_at": place}) for place in ("spread", "bottom", "top")),
    ("insert", None, {}),
    ("insert", "llama", {}),
]
"""(operator, normalization or None for GPT-NeoX, or "llama", further rules)."""


def rules_of(operator: str, **changes: Any) -> GrowthRules:
    return GrowthRules(operator=operator, **(RULES.get(operator, {}) | changes))


def small_model(theta: str | None, **changes: Any) -> ModelConfig:
    if theta in (None, "llama"):
        return tiny_pythia(**changes) if theta is None else tiny_llama(**changes)
    return tiny_tokenformer(tokens=BEFORE.model_copy(update={"theta": theta}), **changes)


def layers_of(model: ModelConfig, module: LocalCausalLM, moments: dict[str, float] | None = None) -> list[LayerState]:
    """A module's weights as the optimizer has them after STEP steps. Moments are a share of the weight each; without
    `moments`, averages that an optimizer would keep of the gradients that the parameters have."""
    layers = []
    for layout in layer_layouts(model, VOCAB):
        states = {}
        for local in layout.parameters:
            parameter = module.get_parameter(layout.global_name(local))
            weight = parameter.detach()
            if moments is not None:
                kept = {name: weight * share for name, share in moments.items()}
            else:
                assert parameter.grad is not None
                kept = {"exp_avg": parameter.grad.clone(), "exp_avg_sq": parameter.grad.square()}
            states[local] = ParameterState(weight, weight, kept, float(STEP))
        layers.append(LayerState(layout.name, states))
    return layers


def module_of(model: ModelConfig, layers: list[LayerState]) -> LocalCausalLM:
    module = build_local(model, VOCAB, seed=None).double()
    weights = {name: weight for layer in layers for name, weight in layer.weights().items()}
    module.load_state_dict(weights, strict=True)
    return module


@dataclass
class Grown:
    """A model and what it grew into."""

    small: LocalCausalLM
    large: LocalCausalLM
    old: list[LayerState]
    new: list[LayerState]
    growth: Growth

    def parameters(self) -> Iterator[tuple[str, ParameterState, int | None]]:
        """The larger model's parameters, with the first row that is new."""
        for layer in self.new:
            for name, state in layer.by_global_name():
                yield name, state, self.growth.first_new_row(name)

    def before(self, name: str) -> ParameterState:
        return dict(pair for layer in self.old for pair in layer.by_global_name())[name]


def growth_of(before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> Growth:
    new_layers = GROWTH_OPERATORS[rules.operator].new_layers(before.num_layers, after.num_layers, rules)
    sizes = ModelSizes.of(before), ModelSizes.of(after)
    record = GrowthRecord(iteration=STEP, tokens=0, before=sizes[0], after=sizes[1], new_layers=new_layers, rules=rules)
    return Growth(before, after, VOCAB, record, seed=2, squared_moments=("exp_avg_sq",))


def grow_layers(
    before: ModelConfig, rules: GrowthRules, layers: list[LayerState], **sizes: Any
) -> tuple[ModelConfig, list[LayerState], Growth]:
    after = grown_model(before, rules, **(sizes or LARGER.get(rules.operator, SIZES)))
    growth = growth_of(before, after, rules)
    return after, list(grown_layers({layer.name: layer for layer in layers}.__getitem__, growth)), growth


def grown(operator: str, theta: str | None, *, true_moments: bool = False, **changes: Any) -> Grown:
    before = small_model(theta)
    rules = rules_of(operator, allow_inexact=theta == "softmax", **changes)
    small = build_local(before, VOCAB, seed=1).double()
    if true_moments:
        logits_of(small, backward=True)
    old = layers_of(before, small, None if true_moments else {"exp_avg": 0.1, "exp_avg_sq": 0.01})
    after, new, growth = grow_layers(before, rules, old)
    return Grown(small, module_of(after, new), old, new, growth)


def logits_of(module: LocalCausalLM, *, backward: bool = False) -> Tensor:
    tokens = torch.randint(VOCAB.actual, (2, 16), generator=torch.Generator().manual_seed(3))
    logits = module(tokens)
    if backward:
        module.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    return logits.detach()


def require_averages_of(gradient: Tensor | None, state: ParameterState, name: str) -> None:
    """Moments are the gradient and its square."""
    assert gradient is not None
    for moment, average in (("exp_avg", gradient), ("exp_avg_sq", gradient.square())):
        assert (state.moments[moment] - average).abs().max() <= 1e-11 * average.abs().max(), (name, moment)


def folded(layers: list[LayerState], growth: Growth, iteration: int) -> list[LayerState]:
    state = RunHeader.new(VOCAB.actual, {}).state
    state = state.__class__(**(vars(state) | {"iteration": iteration, "growth": (growth.record,)}))
    return [fold_ramp(layer, state, growth.squared_moments) for layer in layers]


@pytest.mark.parametrize(("operator", "theta", "changes"), EXACT)
def test_exact_operators_change_no_logit(operator: str, theta: str | None, changes: dict[str, Any]) -> None:
    found = grown(operator, theta, **changes)
    assert GROWTH_OPERATORS[operator].is_exact(theta)
    large = module_of(found.growth.after, folded(found.new, found.growth, STEP))
    before, after = logits_of(found.small), logits_of(large)
    assert (before - after).abs().max() <= 1e-13 * before.abs().max()


@pytest.mark.parametrize("operator", ["random", "published", "shrink_perturb", "stack"])
def test_other_operators_promise_nothing_and_change_the_function(operator: str) -> None:
    found = grown(operator, "l2_norm_gelu")
    assert not any(GROWTH_OPERATORS[operator].is_exact(theta) for theta in (*THETAS, None))
    before, after = logits_of(found.small), logits_of(found.large)
    assert (before - after).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize(
    ("operator", "at_once", "later"),
    [
        ("zero_key", ["mlp.key_tokens"], ["mlp.value_tokens"]),
        ("copy", ["mlp.key_tokens", "mlp.value_tokens"], []),
        ("random", ["mlp.key_tokens", "mlp.value_tokens"], []),
        ("published", ["mlp.key_tokens", "mlp.value_tokens"], []),
        ("shrink_perturb", ["mlp.key_tokens", "mlp.value_tokens"], []),
        ("insert", ["mlp.value_tokens", "attention.proj.value_tokens"], ["mlp.key_tokens", "attention.key.key_tokens"]),
        ("stack", ["mlp.key_tokens", "mlp.value_tokens"], []),
    ],
)  # fmt: skip
def test_what_is_new_trains_from_the_step_that_the_operator_says(
    operator: str, at_once: list[str], later: list[str]
) -> None:
    """`at_once` has gradients in the first step, `later` in the second alone."""
    found = grown(operator, "gelu_l2_norm")
    layer = found.growth.record.new_layers[0] if found.growth.record.new_layers else 0

    def new_rows(local: str) -> Tensor:
        name = f"layers.{layer}.{local}"
        gradient = found.large.get_parameter(name).grad
        assert gradient is not None
        return gradient[found.growth.first_new_row(name) :]

    optimizer = torch.optim.SGD(found.large.parameters(), lr=0.1)
    logits_of(found.large, backward=True)
    assert all(new_rows(local).abs().sum(1).all() for local in at_once)
    assert not any(new_rows(local).any() for local in later)
    optimizer.step()
    logits_of(found.large, backward=True)
    assert all(new_rows(local).any() for local in later)


@pytest.mark.parametrize("theta", THETAS)
def test_moments_of_copies_are_those_of_their_gradients(theta: str) -> None:
    """Averages that are the small model's gradients become the large model's: values' as they are, keys' over c."""
    found = grown("copy", theta, true_moments=True)
    logits_of(found.large, backward=True)
    for name, state, _ in found.parameters():
        gradient = found.large.get_parameter(name).grad
        require_averages_of(gradient, state, name)


def test_copies_stay_equal_unless_they_are_perturbed_or_their_moments_reset() -> None:
    def spread(**changes: Any) -> float:
        found = grown("copy", "l2_norm_gelu", true_moments=True, **changes)
        optimizer = torch.optim.Adam(found.large.parameters(), lr=0.01)
        for name, state, _ in found.parameters():
            parameter = found.large.get_parameter(name)
            optimizer.state[parameter] = {"step": torch.tensor(state.step)} | {
                moment: tensor.clone() for moment, tensor in state.moments.items()
            }
        for _ in range(2):
            logits_of(found.large, backward=True)
            optimizer.step()
        first, second = found.large.get_parameter("layers.0.mlp.key_tokens").detach().chunk(2)
        return float((first - second).abs().max())

    assert spread() <= 1e-12
    assert spread(perturb=0.1) > 1e-5
    assert spread(moments="reset_new") > 1e-5


@pytest.mark.parametrize(
    ("operator", "moments"),
    [
        (operator, moments)
        for operator in GROWTH_OPERATORS
        for moments in ("keep", "reset_new", "reset_all")
        if operator != "published" or moments == "reset_all"
    ],
)
def test_moments_follow_their_rule(operator: str, moments: str) -> None:
    found = grown(operator, "l2_norm_gelu", moments=moments)
    derived = {"copy", "stack"} if moments == "keep" else set()
    for name, state, row in found.parameters():
        assert state.step == (0.0 if moments == "reset_all" else STEP)
        assert state.moments.keys() == {"exp_avg", "exp_avg_sq"}
        for moment, tensor in state.moments.items():
            assert tensor.shape == state.weight.shape
            if moments == "reset_all":
                assert not tensor.any()
                continue
            if row is not None:
                assert bool(tensor[row:].any()) == (operator in derived), name
            if (operator == "copy" and name.endswith(".key_tokens")) or row == 0 or operator in ("stack", "insert"):
                continue  # test_moments_of_copies and test_layers hold these
            kept = found.before(name).moments[moment]
            assert torch.equal(tensor[: len(kept)], kept), name


@pytest.mark.parametrize("operator", ["zero_key", "mask_ramp", "random", "published"])
def test_old_rows_and_new_values_are_those_of_the_release_s_loader(operator: str) -> None:
    """custom_load_fn_incremental: the first rows of each tensor come from the checkpoint, the others stay as drawn."""
    found = grown(operator, "l2_norm_gelu")
    fresh = dict(build_local(found.growth.after, VOCAB, seed=found.growth.seed).named_parameters())
    for name, state, row in found.parameters():
        weight = found.before(name).weight
        assert torch.equal(state.weight[: len(weight)], weight), name
        if row is not None:
            expected = fresh[name].detach()[row:].double()
            is_zero = operator == "zero_key" and name.endswith("key_tokens")
            assert torch.equal(state.weight[row:], expected * (not is_zero)), name
    tokens = found.growth.after.param_tokens
    assert tokens is not None
    bases = (tokens.qkv_scale_base, tokens.proj_scale_base, tokens.ffn_scale_base)
    assert bases == ((32, 16, 56) if operator == "published" else (24, 16, 40))


def test_shrink_perturb_scales_matrices_and_adds_noise() -> None:
    found = grown("shrink_perturb", "l2_norm_gelu", shrink=0.5, perturb=0.2)
    for name, state, _ in found.parameters():
        old = found.before(name).weight
        if name.startswith("final_norm"):
            assert torch.equal(state.weight, old)
            continue
        noise = state.weight[: len(old)] - 0.5 * old
        assert float(noise.std()) == pytest.approx(0.2 * 0.5 * float(old.std()), rel=0.1), name
        assert float(noise.mean()) == pytest.approx(0.0, abs=0.1 * float(noise.std())), name


@pytest.mark.parametrize("theta", ["l2_norm_gelu", None, "llama"])
@pytest.mark.parametrize(
    ("operator", "rules", "origin"),
    [
        ("stack", {}, [0, 1, 0, 1]),
        ("insert", {}, [0, None, 1, None]),
        ("insert", {"insert_at": "top"}, [0, 1, None, None]),
        ("insert", {"insert_at": "bottom"}, [None, None, 0, 1]),
    ],
)
def test_layers_keep_weights_and_moments_where_they_go(
    operator: str, rules: dict[str, Any], origin: list[int | None], theta: str | None
) -> None:
    before = small_model(theta)
    old = layers_of(before, build_local(before, VOCAB, seed=1).double(), {"exp_avg": 0.1, "exp_avg_sq": 0.01})
    _, new, growth = grow_layers(before, rules_of(operator, **rules), old, num_layers=4)
    expected_new = (2, 3) if operator == "stack" else tuple(i for i, source in enumerate(origin) if source is None)
    assert growth.record.new_layers == expected_new
    by_name = {layer.name: layer for layer in new}
    assert [layer.name for layer in new[1:5]] == [f"layers.{index}" for index in range(4)]
    for index, source in enumerate(origin):
        layer = by_name[f"layers.{index}"]
        for local, state in layer.parameters.items():
            if source is None:
                assert not any(moment.any() for moment in state.moments.values())
                continue
            theirs = old[1 + source][local]
            assert torch.equal(state.weight, theirs.weight) and state.moments.keys() == theirs.moments.keys()
            assert all(torch.equal(state.moments[name], theirs.moments[name]) for name in theirs.moments)


def test_inserted_layers_start_as_no_other_layer_has_started() -> None:
    """Also under the seed of the small model's initial values."""
    before = small_model("l2_norm_gelu")
    old = layers_of(before, build_local(before, VOCAB, seed=1), {})
    _, _, growth = grow_layers(before, rules_of("insert"), old, num_layers=4)
    again = replace(growth, seed=1)
    new = list(grown_layers({layer.name: layer for layer in old}.__getitem__, again))
    keys = [layer["mlp.key_tokens"].weight for layer in new[1:5]]
    assert all(not torch.equal(one, two) for one, two in itertools.combinations(keys, 2))
    deviations = [float(key.std()) for key in keys]
    assert deviations == pytest.approx([0.02] * 4, rel=0.1)


@pytest.mark.parametrize(("operator", "steps"), [
    ("zero_key", ({"qkv": 32}, {"qkv": 48, "ffn": 56})),
    ("copy", ({"factor": 2}, {"factor": 2})),
    ("insert", ({"num_layers": 3}, {"num_layers": 6})),
])  # fmt: skip
def test_two_growths_compute_what_one_does(operator: str, steps: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """A, B, C is A, C in function; scales and sizes are the same."""
    small = small_model("l2_norm_gelu")
    layers = layers_of(small, build_local(small, VOCAB, seed=1).double(), {"exp_avg": 0.1, "exp_avg_sq": 0.01})
    rules = rules_of(operator)
    middle, between, _ = grow_layers(small, rules, layers, **steps[0])
    last, after, _ = grow_layers(middle, rules, between, **steps[1])
    sizes = ModelSizes.of(last).model_dump()
    changed = {name: size for name, size in sizes.items() if size != ModelSizes.of(small).model_dump()[name]}
    direct, at_once, _ = grow_layers(small, rules, layers, **changed)
    assert direct == last
    one, two = logits_of(module_of(last, after)), logits_of(module_of(direct, at_once))
    assert (one - two).abs().max() <= 1e-13 * one.abs().max()


@pytest.mark.parametrize("theta", THETAS)
def test_an_unfinished_ramp_folds_into_keys_and_their_moments(theta: str) -> None:
    """Keys times m compute what scores times m do; the folded keys' gradients are 1/m of theirs, as moments become."""
    found = grown("mask_ramp", theta, ramp_iters=8)
    multiplier = found.growth.record.score_multiplier(STEP + 2)
    assert [found.growth.record.score_multiplier(step) for step in (0, STEP, STEP + 8, 99)] == [0.0, 0.0, 1.0, 1.0]
    assert multiplier == 0.25

    def opened(weight: Tensor, row: int) -> Tensor:
        return torch.cat([weight[:row], weight[row:] * multiplier])

    names = {name: row for name, _, row in found.parameters() if row is not None and name.endswith("key_tokens")}
    keys = {name: found.large.get_parameter(name) for name in names}
    tokens = torch.arange(16).reshape(1, 16)
    logits = torch.func.functional_call(
        found.large, {name: opened(key, names[name]) for name, key in keys.items()}, (tokens,)
    )
    logits.square().mean().backward()
    for name in ("layers.0.mlp.key_tokens", "layers.0.mlp.value_tokens"):
        gradient = found.large.get_parameter(name).grad
        assert gradient is not None and gradient[40:].any(), "what is new trains while the ramp opens"
    true = [
        layer.replace({
            local: state.with_moments({"exp_avg": gradient.clone(), "exp_avg_sq": gradient.square()})
            for local, state in layer.parameters.items()
            if (gradient := found.large.get_parameter(f"{layer.name}.{local}").grad) is not None
        })
        for layer in found.new
    ]  # fmt: skip
    layers = folded(true, found.growth, STEP + 2)
    whole = module_of(found.growth.after, layers)
    again = whole(tokens)
    assert (again - logits).abs().max() <= 1e-13 * logits.abs().max()
    again.square().mean().backward()
    for layer in layers:
        for name, state in layer.by_global_name():
            gradient = whole.get_parameter(name).grad
            require_averages_of(gradient, state, name)
    at_start = folded(true, found.growth, STEP)[1]["mlp.key_tokens"]
    assert not at_start.weight[40:].any() and not at_start.moments["exp_avg"][40:].any()


@pytest.mark.parametrize(
    ("rules", "sizes", "message"),
    [
        ({}, {"ffn": 32}, "ffn_slot_num: 32 is fewer than the checkpoint's 40"),
        ({}, {"num_layers": 1}, "num_layers: 1 is fewer than the checkpoint's 2"),
        ({}, {}, "nothing to grow"),
        ({}, {"factor": 2, "ffn": 80}, "give either it or sizes"),
        ({}, {"num_layers": 4}, "Add layers by insert or stack"),
        ({"operator": "stack"}, {"num_layers": 4, "ffn": 80}, "the parameter tokens differ as well. Grow twice"),
        ({"operator": "stack"}, {"num_layers": 5}, "Nearest valid values: 4 and 6; or use insert"),
        ({"operator": "copy"}, {"ffn": 100}, "Nearest valid values: 80 and 120"),
        ({"operator": "mask_ramp"}, SIZES, "grow.ramp_iters: mask_ramp opens"),
        ({"operator": "shrink_perturb"}, SIZES, "no other than random"),
        ({"operator": "published"}, SIZES, "grow.moments: keep, grow.schedule: continue: published starts optimizer"),
        ({"operator": "published", "moments": "reset_all"}, SIZES, "^grow.schedule: continue: published"),
        ({"ramp_iters": 5}, SIZES, "grow.ramp_iters: 5: has no effect with zero_key. It is a rule of mask_ramp"),
        ({"perturb": 0.5}, SIZES, "It is a rule of copy and shrink_perturb"),
        ({"insert_at": "top"}, SIZES, "It is a rule of insert"),
        ({"learning_rate": "rewarm_all"}, SIZES, "grow.learning_rate: rewarm_all: needs grow.rewarm_iters"),
        ({"rewarm_iters": 5}, SIZES, "grow.rewarm_iters: 5: needs grow.learning_rate"),
        ({"old_rows_lr": 0.0}, SIZES, "grow.old_rows_lr: 0.0: needs grow.old_rows_iters"),
        ({"old_rows_iters": 5}, SIZES, "grow.old_rows_iters: 5: needs grow.old_rows_lr"),
    ],
)
def test_growths_that_are_refused(rules: dict[str, Any], sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grown_model(small_model("l2_norm_gelu"), GrowthRules(**rules), **sizes)


@pytest.mark.parametrize("operator", sorted({*GROWTH_OPERATORS} - {"copy", "insert", "stack"}))
def test_softmax_grows_inexactly_only_when_asked_to(operator: str) -> None:
    model = small_model("softmax")
    with pytest.raises(ConfigError, match=f"{operator} would change the function. Grow by copy, or set allow_inexact"):
        grown_model(model, rules_of(operator), **SIZES)
    assert grown_model(model, rules_of(operator, allow_inexact=True), **SIZES).param_tokens is not None


@pytest.mark.parametrize(
    ("operator", "changes", "message"),
    [
        (
            "zero_key",
            {"ffn": 56, "ffn_scale_base": 56},
            "ffn_scale_base: 56: zero_key scales .* Set `ffn_scale_base: 40`",
        ),
        ("copy", {"ffn": 80, "ffn_scale_base": 40}, "Set `ffn_scale_base: 80`"),
        ("published", {"ffn": 56, "ffn_scale_base": 40}, "Set `ffn_scale_base: 56`"),
        ("zero_key", {"theta": "softmax"}, "differs in more than parameter tokens"),
    ],
)
def test_configured_scales_that_the_operator_does_not_need(
    operator: str, changes: dict[str, Any], message: str
) -> None:
    before = small_model("l2_norm_gelu")
    assert before.param_tokens is not None
    after = before.model_copy(update={"param_tokens": before.param_tokens.model_copy(update=changes)})
    with pytest.raises(ConfigError, match=message):
        require_growth(before, after, rules_of(operator))


def test_factors_round_to_whole_counts_and_scales_follow_the_operator() -> None:
    def sizes(operator: str, model: ModelConfig, factor: float) -> dict[str, Any]:
        tokens = grown_model(model, rules_of(operator), factor=factor).param_tokens
        assert tokens is not None
        return tokens.model_dump(exclude={"theta"})

    small = small_model("l2_norm_gelu")
    pinned = {"qkv_scale_base": 24, "proj_scale_base": 16, "ffn_scale_base": 40}
    assert sizes("zero_key", small, 1.3) == {"qkv": 31, "proj": 21, "ffn": 52} | pinned
    counts = {"qkv": 72, "proj": 48, "ffn": 120}
    assert sizes("zero_key", small, 3) == counts | pinned
    assert sizes("copy", small, 3) == counts | {f"{name}_scale_base": count for name, count in counts.items()}
    # A scale that an earlier growth has pinned is multiplied as it is.
    pinned_early = grown_model(small, rules_of("zero_key"), factor=2)
    assert sizes("copy", pinned_early, 2)["ffn_scale_base"] == 80
    assert grown_model(small_model(None), rules_of("stack"), factor=2).num_layers == 4
    with pytest.raises(ConfigError, match="only a TokenFormer has parameter tokens"):
        grown_model(small_model(None), rules_of("zero_key"), factor=2)


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
    layers = layers_of(model, build_local(model, VOCAB, seed=1), {})
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
