"""Layers of a reference that a configuration chooses: the first, the last, or those of a list."""

from __future__ import annotations

from megatron.config.sections.inherit import InheritConfig
from megatron.errors import ConfigError


def chosen_layers(rules: InheritConfig, before: int, wanted: int, what: str) -> tuple[int, ...]:
    """Returns the chosen ones of `before` layers, of which `wanted` are needed for `what`.

    Raises ConfigError when there are not so many, or a list names others or another number of them.
    """
    if isinstance(rules.layers, list):
        foreign = [layer for layer in rules.layers if layer >= before]
        if foreign:
            raise ConfigError(
                f"inherit.layers: {rules.layers}: the reference has {before} layers, 0 to {before - 1}; it has no "
                f"{', '.join(map(str, foreign))}. Name layers that it has."
            )
        if len(rules.layers) != wanted:
            raise ConfigError(
                f"inherit.layers: {rules.layers}: names {len(rules.layers)} layers, and {what} needs {wanted}. Name as "
                "many, or change num_layers."
            )
        return tuple(rules.layers)
    if wanted > before:
        raise ConfigError(
            f"num_layers: {what} needs {wanted} layers of the reference, which has {before}. Use fewer layers, or a "
            "deeper reference; stack and append make deeper models (`grow`)."
        )
    first = 0 if rules.layers == "first" else before - wanted
    return tuple(range(first, first + wanted))
