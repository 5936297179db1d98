"""Decides whether an operator can make one model of another."""

from __future__ import annotations

from megatron.checkpointing.states.same_model import model_differences
from megatron.config.sections.growth import GrowthRules, ModelSizes, rule_contradictions
from megatron.config.sections.model import ModelConfig
from megatron.config.token_share import TOKEN_KEYS
from megatron.errors import ConfigError
from megatron.growth.growth_operator import GROWTH_OPERATORS, RULES_OF_ONE_OPERATOR, GrowthOperator


def require_growth(before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> None:
    """Raises ConfigError, naming the YAML key, when `rules.operator` cannot make a model `after` of one `before`."""
    operator = GROWTH_OPERATORS[rules.operator]
    _require_consistent_rules(operator, rules)
    _require_same_but_for_sizes(before, after)
    _require_more(before, after)
    if operator.adds == "layers":
        _require_same_tokens(before, after, rules.operator)
    else:
        _require_same_layers(before, after, rules.operator)
        _require_allowed(operator, before, rules)
    refusal = operator.refusal(before, after, rules)
    if refusal is not None:
        raise ConfigError(refusal)
    if operator.adds == "tokens":
        _require_scale(operator, before, after, rules.operator)


def _require_consistent_rules(operator: GrowthOperator, rules: GrowthRules) -> None:
    for name, message in rule_contradictions(rules):
        raise ConfigError(f"grow.{name}: {getattr(rules, name)}: {message}.")
    for field in RULES_OF_ONE_OPERATOR:
        value, default = getattr(rules, field), GrowthRules.model_fields[field].default
        if field not in operator.uses and value != default:
            users = [name for name in GROWTH_OPERATORS if field in GROWTH_OPERATORS[name].uses]
            raise ConfigError(
                f"grow.{field}: {value}: has no effect with {rules.operator}. It is a rule of {' and '.join(users)}: "
                "leave it out, or choose that operator."
            )


def _require_same_but_for_sizes(before: ModelConfig, after: ModelConfig) -> None:
    tokens = before.param_tokens
    if tokens is not None and after.param_tokens is not None:
        tokens = tokens.model_copy(update={"theta": after.param_tokens.theta})
    resized = after.model_copy(update={"param_tokens": tokens, "num_layers": before.num_layers})
    differences = model_differences(before, resized)
    if differences:
        raise ConfigError(
            "The checkpoint cannot grow into the configured model, which differs in more than parameter tokens and "
            f"layers: {'; '.join(differences)}."
        )


def _require_more(before: ModelConfig, after: ModelConfig) -> None:
    old, new = ModelSizes.of(before), ModelSizes.of(after)
    counts = [(key, getattr(old, field), getattr(new, field), "tokens") for field, key in TOKEN_KEYS.items()]
    for key, fewer, more, what in (*counts, ("num_layers", old.num_layers, new.num_layers, "layers")):
        if fewer is not None and more is not None and more < fewer:
            raise ConfigError(
                f"{key}: {more} is fewer than the checkpoint's {fewer}. Growing adds {what}: use {fewer} or more."
            )
    if old == new:
        raise ConfigError("The configured model has the checkpoint's sizes, so there is nothing to grow.")


def _require_same_tokens(before: ModelConfig, after: ModelConfig, name: str) -> None:
    if before.param_tokens != after.param_tokens:
        raise ConfigError(
            f"operator: {name}: it adds layers, and the parameter tokens differ as well. Grow twice: layers by "
            f"{name}, and tokens by another operator."
        )


def _require_same_layers(before: ModelConfig, after: ModelConfig, name: str) -> None:
    if before.num_layers != after.num_layers:
        depth = [name for name in GROWTH_OPERATORS if GROWTH_OPERATORS[name].adds == "layers"]
        raise ConfigError(
            f"num_layers: checkpoint {before.num_layers}, configuration {after.num_layers}, and {name} adds parameter "
            f"tokens. Add layers by {' or '.join(depth)}."
        )
    if before.param_tokens is not None and before.param_tokens.groups > 1:
        raise ConfigError(
            f"param_token_groups: {before.param_tokens.groups}: {name} appends tokens behind the last group, so that "
            "groups, and the shares that were trained of them, would become others. Put them in one group first, which "
            "keeps every share: tools/ckpts/extract.py --share 1 --groups 1."
        )
    if before.param_tokens is None:
        raise ConfigError(
            "architecture: only a TokenFormer has parameter tokens to add. Add layers, by stack or insert."
        )


def _require_allowed(operator: GrowthOperator, before: ModelConfig, rules: GrowthRules) -> None:
    theta = None if before.param_tokens is None else before.param_tokens.theta
    if theta == "softmax" and not operator.is_exact(theta) and not rules.allow_inexact:
        exact = [name for name in GROWTH_OPERATORS if _adds_exactly(GROWTH_OPERATORS[name], theta)]
        raise ConfigError(
            f"norm_activation_type: softmax: every new token takes a share of the probabilities, so {rules.operator} "
            f"would change the function. Grow by {' or '.join(exact)}, or set allow_inexact."
        )


def _adds_exactly(operator: GrowthOperator, theta: str) -> bool:
    return operator.adds == "tokens" and operator.is_exact(theta)


def _require_scale(operator: GrowthOperator, before: ModelConfig, after: ModelConfig, name: str) -> None:
    for field in TOKEN_KEYS:
        key = f"{field}_scale_base"
        base, given = getattr(before.param_tokens, key), getattr(after.param_tokens, key)
        needed = operator.scale_base(base, getattr(before.param_tokens, field), getattr(after.param_tokens, field))
        if given != needed:
            raise ConfigError(
                f"{key}: {given}: {name} scales the scores by {needed}, where the checkpoint's scale is {base} and the "
                f"configuration's {given}. Set `{key}: {needed}`."
            )
