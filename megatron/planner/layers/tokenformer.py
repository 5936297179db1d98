"""A layer of five Pattentions: scores are kept, weights of them are computed again (kernels/pattention/closed_form.py).

Each projection has its outputs whole on every rank before they are summed and scattered.
"""

from __future__ import annotations

from megatron.config.architectures.tokenformer import param_tokens
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

STATISTICS = {"softmax": 2}
"""Numbers of a row's statistic, where it is not one."""


@LAYER_COSTS.register("tokenformer")
def tokenformer_costs(model: ModelConfig, shape: Shape) -> LayerCosts:
    """Counts a layer's costs."""
    tokens, hidden = param_tokens(model), model.hidden_size
    statistic = STATISTICS.get(tokens.theta, 1)
    groups = {"query, key and value": (3, tokens.qkv), "projection": (1, tokens.proj), "feed-forward": (1, tokens.ffn)}
    kept = [
        *norm_kept(model, shape, "first norm", of_input=True),
        *attention_kept(model, shape, projected=3 * hidden, rotated=2 * hidden),
        # The projection reads all heads, which its ranks have gathered.
        *([Kept("gathered attention output", hidden, "whole")] if shape.tensor > 1 else []),
        *norm_kept(model, shape, "second norm", of_input=True),
        *dropout_kept(model, shape),
    ]
    for name, (projections, count) in groups.items():
        kept.append(Kept(f"{name} statistics", projections * statistic, "whole", 4))
        if not shape.recompute_scores:
            kept.append(Kept(f"{name} scores", projections * count, "split"))
    score_bytes, in_width = _scratch_of_scores(shape)
    largest = max(projections * count for projections, count in groups.values()) / shape.tensor
    recomputed = shape.width if shape.recompute_scores else 0
    outputs = 3 * hidden * shape.width * (1 if shape.tensor == 1 else 2)
    scratch = max(largest * (score_bytes + in_width * shape.width + recomputed) + hidden * shape.width, outputs)
    keys = (Product(hidden, 3 * tokens.qkv), Product(hidden, tokens.proj), Product(hidden, tokens.ffn))
    values = (*(Product(tokens.qkv, hidden),) * 3, Product(tokens.proj, hidden), Product(tokens.ffn, hidden))
    scores = (3 * tokens.qkv + tokens.proj + tokens.ffn) / shape.tensor
    return LayerCosts(
        kept=tuple(kept),
        scratch=max(scratch, attention_scratch(model, shape, hidden)),
        products=(*keys, *values),
        passes=_score_passes(shape, scores) + residual_passes(model, shape) + rotary_passes(model, shape, 2 * hidden),
        messages=8 * hidden,
        exchanges=7,
        score_products=keys,
        copied_weights=2 * 3 * tokens.qkv * hidden,
    )


def _scratch_of_scores(shape: Shape) -> tuple[int, int]:
    """Returns wide bytes and elements of the run's format that a score takes in the backward pass, beside itself."""
    if shape.implementation.pattention == "triton":
        return 0, 1  # its gradient takes the memory of the weights' gradient, the weights that of the scores
    if shape.implementation.pattention == "compile":
        return 0, 3
    return 12, 1  # scaled score, its gradient and their product in fp32, beside the gradient of the weight


def _score_passes(shape: Shape, scores: float) -> Passes:
    """Counts the passes over a rank's scores (megatron/kernels/pattention/thetas/l2_norm_gelu.py)."""
    if shape.implementation.pattention in ("triton", "compile"):
        return Passes(2 * shape.width * scores, 4 * shape.width * scores, 2 * scores)
    # Forward: norm, scaling, GeLU. Backward: scaling, gradient of GeLU, product, its sum, GeLU, product and sum, and
    # scaling. A narrow format adds what is read and written to widen and to round.
    forward, backward = (20, 64) if shape.width == 4 else (22, 80)
    return Passes(forward * scores, backward * scores, 3 * scores)
