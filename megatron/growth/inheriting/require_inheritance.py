"""Decides whether one model can be made of the layers of another."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from megatron.checkpointing.states.same_model import free_model_fields
from megatron.config.architecture import ARCHITECTURES
from megatron.config.sections.inherit import InheritConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.token_share import TOKEN_KEYS
from megatron.errors import ConfigError
from megatron.growth.inheriting.inherit_operator import INHERIT_OPERATORS, RULES_OF_ONE_OPERATOR


def require_inheritance(before: ModelConfig, after: ModelConfig, rules: InheritConfig) -> None:
    """Raises ConfigError, naming the YAML key, when `rules.operator` cannot make a model `after` of one `before`."""
    operator = INHERIT_OPERATORS[rules.operator]
    require_rules_with_effect(rules)
    differences = dict(_differences(_values(before), _values(after), free_model_fields(after) | {"num_layers"}))
    if operator.halves_width:
        _require_half(before, after, differences)
    elif differences:
        shown = "; ".join(f"{name}: reference {old}, configuration {new}" for name, (old, new) in differences.items())
        raise ConfigError(
            f"The configured model cannot inherit from the reference, which differs in more than its layers: {shown}. "
            "Take these values from the reference; half_width makes a narrower model."
        )
    operator.source_layers(before.num_layers, after.num_layers, rules)


def require_rules_with_effect(rules: InheritConfig) -> None:
    """Raises ConfigError, naming the rule, when the operator does not follow one that is set."""
    operator = INHERIT_OPERATORS[rules.operator]
    for field in RULES_OF_ONE_OPERATOR:
        value = getattr(rules, field)
        if field not in operator.uses and value != InheritConfig.model_fields[field].default:
            users = [name for name in INHERIT_OPERATORS if field in INHERIT_OPERATORS[name].uses]
            raise ConfigError(
                f"inherit.{field}: {value}: has no effect with {rules.operator}. It is a rule of "
                f"{' and '.join(users)}: leave it out, or choose that operator."
            )


def _values(model: ModelConfig) -> dict[str, Any]:
    return model.model_dump() | {"final_norm": model.final_norm or model.norm}


def _differences(
    before: dict[str, Any], after: dict[str, Any], free: Collection[str], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yields what two models differ in beside their layers, by dotted field, with both values."""
    for name, new in after.items():
        old = before.get(name)
        if name in free or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, free, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", (old, new)


def _require_half(before: ModelConfig, after: ModelConfig, differences: dict[str, tuple[Any, Any]]) -> None:
    if not ARCHITECTURES[before.architecture].axes:
        raise ConfigError(
            f"architecture: {before.architecture} does not say what the dimensions of its weights are, so half_width "
            "cannot cut it. Use inherit."
        )
    for name in ("hidden_size", "num_attention_heads"):
        differences.setdefault(name, (getattr(before, name), getattr(after, name)))
    for name, (old, new) in differences.items():
        if type(old) is int and type(new) is int and new * 2 == old:
            continue
        half = f"half of it is {old // 2}" if type(old) is int and old % 2 == 0 else "it has no half"
        raise ConfigError(
            f"{name}: reference {old}, configuration {new}. half_width halves features and heads, and may halve other "
            f"sizes; {half}, and everything else stays."
        )
    _require_scales(before, after)


def _require_scales(before: ModelConfig, after: ModelConfig) -> None:
    for field in TOKEN_KEYS if before.param_tokens is not None else ():
        (old, base), (new, given) = (
            (getattr(model.param_tokens, field), getattr(model.param_tokens, f"{field}_scale_base"))
            for model in (before, after)
        )
        if given * old != base * new:
            raise ConfigError(
                f"{field}_scale_base: {given}: the reference scales the scores of {old} tokens by {base}, so that "
                f"{new} tokens need {base * new / old:g}. Set `{field}_scale_base: {base * new / old:g}`."
            )
