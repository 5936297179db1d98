"""Makes the larger model's section of the configuration from the sizes that are asked for."""

from __future__ import annotations

import math
from typing import Any

from megatron.config.sections.growth import GrowthRules
from megatron.config.sections.model import ModelConfig
from megatron.config.token_share import TOKEN_KEYS
from megatron.errors import ConfigError
from megatron.growth.growth_operator import GROWTH_OPERATORS
from megatron.growth.require_growth import require_growth


def grown_model(
    model: ModelConfig,
    rules: GrowthRules,
    *,
    qkv: int | None = None,
    proj: int | None = None,
    ffn: int | None = None,
    num_layers: int | None = None,
    factor: float | None = None,
) -> ModelConfig:
    """Returns the model that `model` grows into, with the scale of the scores as the operator needs it.

    Sizes that are None stay. `factor` instead of sizes multiplies what the operator adds, all counts of parameter
    tokens or the layers, rounded to whole numbers. Raises ConfigError when both are given, and when the operator
    cannot do it.
    """
    operator = GROWTH_OPERATORS[rules.operator]
    asked = {"qkv": qkv, "proj": proj, "ffn": ffn, "num_layers": num_layers}
    if factor is not None:
        if any(size is not None for size in asked.values()):
            raise ConfigError("factor: it stands for all sizes; give either it or sizes.")
        if not 1 < factor < math.inf:
            raise ConfigError(f"factor: {factor}: expected a number above 1, by which the model grows.")
        asked = dict(_multiplied(model, operator.adds == "layers", factor))
    tokens = model.param_tokens
    changes: dict[str, Any] = {"num_layers": asked.pop("num_layers") or model.num_layers}
    if tokens is not None:
        counts = {field: asked[field] or getattr(tokens, field) for field in TOKEN_KEYS}
        scales = {
            f"{field}_scale_base": operator.scale_base(
                getattr(tokens, f"{field}_scale_base"), getattr(tokens, field), count
            )
            for field, count in counts.items()
        }
        changes["param_tokens"] = tokens.model_copy(update=counts | scales)
    elif any(asked.values()):
        raise ConfigError("architecture: only a TokenFormer has parameter tokens to add. Ask for num_layers.")
    grown = model.model_copy(update=changes)
    require_growth(model, grown, rules)
    return grown


def _multiplied(model: ModelConfig, layers: bool, factor: float) -> dict[str, int | None]:
    sizes: dict[str, int | None] = dict.fromkeys((*TOKEN_KEYS, "num_layers"))
    if layers:
        return sizes | {"num_layers": round(model.num_layers * factor)}
    if model.param_tokens is None:
        raise ConfigError("architecture: only a TokenFormer has parameter tokens to add. Grow by stack or insert.")
    return sizes | {field: round(getattr(model.param_tokens, field) * factor) for field in TOKEN_KEYS}
