"""The section `grow`: growth of a run while it trains, or of the smaller checkpoint that it loads."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from pydantic import Field

from megatron.config.bounds import LayerCount, StepCount, TokenCount
from megatron.config.section import Key, OneOf
from megatron.config.sections.growth import GrowthRules
from megatron.registry import variant_names


class GrowConfig(GrowthRules):
    """One growth of a run. A run that grows several times is a chain of runs (tools/run_stages.py).

    With at_step or at_tokens the model above is the small one, which grows while it trains, and `save` holds the larger
    one from then on. Without them the model above is the large one, and `load` names a checkpoint of the small one.
    """

    operator: Annotated[
        str,
        OneOf(partial(variant_names, "megatron.growth.operators")),
        Key(difference="not a NeoX key; must be given wherever a model is to grow: a wrong size is an error otherwise"),
    ]
    """Values of what is new; megatron/growth/operators has one module for each."""

    at_step: StepCount | None = None
    """Optimizer steps after which the model grows [steps]."""

    at_tokens: int | None = Field(default=None, gt=0, le=10**18)
    """Training tokens after which the model grows, at the end of the step that reads the last of them [tokens]."""

    qkv_slot_num: TokenCount | None = None
    """Parameter tokens in each of the query, key and value Pattentions after growth [tokens]; None leaves them."""

    proj_slot_num: TokenCount | None = None
    """Parameter tokens in the output projection's Pattention after growth [tokens]; None leaves them."""

    ffn_slot_num: TokenCount | None = None
    """Parameter tokens in the feed-forward Pattention after growth [tokens]; None leaves them."""

    num_layers: LayerCount | None = None
    """Transformer layers after growth [layers]; None leaves them."""

    factor: float | None = Field(default=None, gt=1.0, le=1e6)
    """Factor on all that the operator adds, parameter tokens or layers, in place of the sizes."""

    @property
    def happens_in_training(self) -> bool:
        """Tells whether the run grows at one of its steps, rather than at its start from a smaller checkpoint."""
        return self.at_step is not None or self.at_tokens is not None

    def is_due(self, iteration: int, tokens: int) -> bool:
        """Tells whether the model grows before the step that follows `iteration` steps and `tokens` training tokens."""
        if self.at_step is not None:
            return iteration >= self.at_step
        return self.at_tokens is not None and tokens >= self.at_tokens

    @property
    def sizes(self) -> dict[str, Any]:
        """Returns what the model is to grow to, as `grown_model` takes it."""
        return {
            "qkv": self.qkv_slot_num,
            "proj": self.proj_slot_num,
            "ffn": self.ffn_slot_num,
            "num_layers": self.num_layers,
            "factor": self.factor,
        }

    @property
    def rules(self) -> GrowthRules:
        """Returns the rules without moment and sizes, as a growth's record keeps them."""
        return GrowthRules.model_validate({name: getattr(self, name) for name in GrowthRules.model_fields})
