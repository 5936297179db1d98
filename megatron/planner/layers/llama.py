"""LLaMA's layer: grouped-query attention and a gated MLP of three matrices."""

from __future__ import annotations

from megatron.config.architectures.llama import feed_forward_width, key_value_heads
from megatron.config.sections.model import ModelConfig
from megatron.planner.layer_costs import (
    LAYER_COSTS,
    Kept,
    LayerCosts,
    Passes,
    Product,
    Shape,
    attention_kept,
    attention_scratch,
    dropout_kept,
    norm_kept,
    residual_passes,
    rotary_passes,
)


@LAYER_COSTS.register("llama")
def llama_costs(model: ModelConfig, shape: Shape) -> LayerCosts:
    """Counts a layer's costs."""
    hidden, inside = model.hidden_size, feed_forward_width(model)
    shared = hidden // model.num_attention_heads * key_value_heads(model)
    kept = (
        *norm_kept(model, shape, "first norm", of_input=True),
        # Queries and keys that are not rotated any more make room for those that are.
        *attention_kept(model, shape, projected=hidden + 2 * shared, rotated=0),
        *norm_kept(model, shape, "second norm", of_input=not model.parallel_residual),
        Kept("gate, up and their product", 4 * inside, "split"),
        *dropout_kept(model, shape),
    )
    unit = inside / shape.tensor * shape.width
    return LayerCosts(
        kept=kept,
        scratch=max(3 * unit + hidden * shape.width, attention_scratch(model, shape, shared)),
        products=(
            Product(hidden, hidden),
            *(Product(hidden, shared),) * 2,
            Product(hidden, hidden),
            *(Product(hidden, inside),) * 2,
            Product(inside, hidden),
        ),
        passes=Passes(5 * unit, 10 * unit, 2 * inside / shape.tensor)
        + residual_passes(model, shape)
        + rotary_passes(model, shape, hidden + shared),
        messages=4 * hidden,
        exchanges=2,
    )
