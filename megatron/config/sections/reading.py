"""The section `reading`: the part of a trained TokenFormer's parameter tokens that evaluation and generation read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron.config.bounds import TokenCount
from megatron.config.section import Key, Section
from megatron.config.sections.elastic import Share

FewerThanAll = Annotated[float, Field(gt=0.0, lt=1.0)]
NOT_NEOX = Key(difference="not a NeoX key")


class ReadingConfig(Section):
    """Parameter tokens that eval.py, generate.py, validate.py and token_curve.py read of a checkpoint; no checkpoint
    is changed, and training reads all."""

    key_prefix = "param_token_"

    @property
    def title(self) -> str:
        """Names what is read of a checkpoint, such as `param_token_share 0.5`; empty where that is everything."""
        parts = [] if self.share == 1.0 else [f"param_token_share {self.share:g}"]
        if self.top_k is not None:
            parts.append(f"param_token_top_k {self.top_k:g}" + (f" by {self.block}" if self.block > 1 else ""))
        return ", ".join(parts)

    share: Annotated[Share, NOT_NEOX] = 1.0
    """Part of the parameter tokens of every Pattention: the first part of each of `param_token_groups` blocks. The
    model is the smaller one that `tools/ckpts/extract.py --share` writes."""

    top_k: Annotated[TokenCount | FewerThanAll | None, NOT_NEOX] = None
    """Tokens that each position reads in each Pattention, those with the largest |weight| ‖value‖: a number [tokens]
    or, below 1, a part of them. All keys are multiplied, and the normalization is over all; values of the other tokens
    are left out. None reads all."""

    block: Annotated[TokenCount, NOT_NEOX] = 1
    """Neighboring tokens that top_k chooses together [tokens], as a block-sparse kernel would read them."""

    shares: Annotated[list[Share] | None, NOT_NEOX] = None
    """Shares that token_curve.py measures; None means those of the run's section `elastic`, and without one 0.25, 0.5,
    0.75 and 1."""

    top_ks: Annotated[list[TokenCount | FewerThanAll] | None, NOT_NEOX] = None
    """Values of param_token_top_k that token_curve.py measures instead of shares."""
