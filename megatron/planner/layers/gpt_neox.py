"""A layer of linear projections and an MLP of two matrices."""

from __future__ import annotations

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


@LAYER_COSTS.register("gpt_neox")
def linear_costs(model: ModelConfig, shape: Shape) -> LayerCosts:
    """Counts a layer's costs."""
    hidden = model.hidden_size
    kept = (
        *norm_kept(model, shape, "first norm", of_input=True),
        *attention_kept(model, shape, projected=3 * hidden, rotated=2 * hidden),
        *norm_kept(model, shape, "second norm", of_input=not model.parallel_residual),
        Kept("MLP before its activation", 4 * hidden, "split"),
        Kept("MLP after its activation", 4 * hidden, "split"),
        *dropout_kept(model, shape),
    )
    inside = 4 * hidden / shape.tensor * shape.width
    # Queries, keys and values lie in one matrix, whose gradient is put together of theirs; biases sum gradients.
    own = Passes(2 * inside, 3 * inside + 9 * hidden / shape.tensor * shape.width, 2 * 4 * hidden / shape.tensor)
    return LayerCosts(
        kept=kept,
        scratch=max(2 * inside + hidden * shape.width, attention_scratch(model, shape, hidden) + 3 * inside / 4),
        products=(
            Product(hidden, 3 * hidden),
            Product(hidden, hidden),
            Product(hidden, 4 * hidden),
            Product(4 * hidden, hidden),
        ),
        passes=own + residual_passes(model, shape) + rotary_passes(model, shape, 2 * hidden),
        messages=4 * hidden,
        exchanges=2,
    )
