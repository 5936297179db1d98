"""Growth by layers that do nothing at first."""

from __future__ import annotations

from torch import Tensor

from megatron.checkpointing.states.layer_state import LayerState, ParameterState
from megatron.config.architecture import ARCHITECTURES
from megatron.config.sections.growth import GrowthRules
from megatron.config.sections.model import ModelConfig
from megatron.growth.growth_operator import GROWTH_OPERATORS, Growth, LayerOperator


class Insert(LayerOperator):
    """Inserts freshly drawn layers whose outputs are zero: value tokens, or output matrices and their biases.

    Preserves the function of every architecture: a layer that adds zero to the residual stream is the identity. Layers
    whose scores are divided by their place in the model may not move, so that new ones can only be added on top. These
    zeros have gradients from the first step, the rest of a new layer from the second; its moments are zero. `insert_at`
    says where: spread puts each new layer above an old one, at equal distances.
    """

    uses = frozenset({"insert_at"})

    def is_exact(self, theta: str | None) -> bool:
        """Tells that every function is preserved."""
        return True

    def refusal(self, before: ModelConfig, after: ModelConfig, rules: GrowthRules) -> str | None:
        """Requires an architecture that says where its sublayers end, and layers that compute the same elsewhere."""
        if not ARCHITECTURES[before.architecture].output_weights:
            return (
                f"architecture: {before.architecture} does not say which weights its sublayers end in, so insert "
                "cannot make them zero. Use stack."
            )
        if before.scale_attn_by_inverse_layer_idx and self._moves_layers(before.num_layers, after.num_layers, rules):
            return (
                f"insert_at: {rules.insert_at}: it moves layers, and scale_attn_by_inverse_layer_idx: true divides the "
                "attention scores of each by its place, so that they would compute something else there. Use "
                "insert_at: top, or stack, which preserves no function anyway."
            )
        return None

    def _moves_layers(self, before: int, after: int, rules: GrowthRules) -> bool:
        new = self.new_layers(before, after, rules)
        sources = self.source_layers(before, after, rules)
        return any(source != layer for layer, source in enumerate(sources) if layer not in new)

    def source_layers(self, before: int, after: int, rules: GrowthRules) -> tuple[int, ...]:
        """Returns the layer itself, and for a new layer a neighbor."""
        if rules.insert_at == "spread":
            return tuple(layer * before // after for layer in range(after))
        added = after - before
        first = added if rules.insert_at == "bottom" else 0
        return tuple(min(max(layer - first, 0), before - 1) for layer in range(after))

    def new_layers(self, before: int, after: int, rules: GrowthRules) -> tuple[int, ...]:
        """Returns the layers that are inserted."""
        if rules.insert_at == "bottom":
            return tuple(range(after - before))
        sources = self.source_layers(before, after, rules)
        return tuple(layer for layer in range(1, after) if sources[layer] == sources[layer - 1])

    def grow(self, layer: LayerState, growth: Growth) -> LayerState:
        """Returns an old layer as it is, and a new one in place of the neighbor that is given for it."""
        outputs = ARCHITECTURES[growth.after.architecture].output_weights
        inserted = {
            local: _drawn(state, growth.initial_of_layer(f"{layer.name}.{local}"), zero=local in outputs)
            for local, state in layer.parameters.items()
            if growth.first_new_row(f"{layer.name}.{local}") == 0
        }
        return layer.replace(inserted)


def _drawn(state: ParameterState, initial: Tensor, *, zero: bool) -> ParameterState:
    values = initial.zero_() if zero else initial
    moments = {name: moment.new_zeros(moment.shape) for name, moment in state.moments.items()}
    return ParameterState(
        weight=values.to(state.weight.dtype),
        master=None if state.master is None else values.to(state.master.dtype),
        moments=moments,
        step=state.step,
    )


GROWTH_OPERATORS.register("insert")(Insert())
