"""GPT-2's layer: GPT-NeoX's in sequence, without rotary positions, which the configuration says."""

from __future__ import annotations

from megatron.planner.layer_costs import LAYER_COSTS
from megatron.planner.layers.gpt_neox import linear_costs

LAYER_COSTS.register("gpt2")(linear_costs)
