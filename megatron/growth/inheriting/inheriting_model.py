"""Makes the section of a model that inherits from the reference's, where no configuration says it."""

from __future__ import annotations

from megatron.config.architecture import ARCHITECTURES
from megatron.config.sections.inherit import InheritConfig
from megatron.config.sections.model import ModelConfig
from megatron.errors import ConfigError
from megatron.growth.inheriting.inherit_operator import INHERIT_OPERATORS


def inheriting_model(reference: ModelConfig, rules: InheritConfig, num_layers: int | None) -> ModelConfig:
    """Returns the model of `num_layers` layers that `rules` make of the reference; everything else is its own.

    Without `num_layers` it has as many as a list of layers names, or all of them where the operator halves the width
    or inherits no layer. half_width halves features, heads and what its architecture names beside them. Raises
    ConfigError when the number of layers is missing, or the width has no half.
    """
    operator = INHERIT_OPERATORS[rules.operator]
    if num_layers is None:
        if isinstance(rules.layers, list) and rules.operator != "hybrid_stack":
            num_layers = len(rules.layers)
        elif operator.halves_width or not operator.uses:
            num_layers = reference.num_layers
        else:
            raise ConfigError(
                f"num_layers: how many layers the model is to have is missing; the reference has "
                f"{reference.num_layers}. Give --num_layers, or a configuration."
            )
    changes = {"num_layers": num_layers}
    if operator.halves_width:
        further = ARCHITECTURES[reference.architecture].width_sizes
        for field in ("hidden_size", "num_attention_heads", *further):
            size = getattr(reference, field)
            if size % 2:
                raise ConfigError(f"{field}: the reference's {size} has no half. Use inherit.")
            changes[field] = size // 2
    return reference.model_copy(update=changes)
