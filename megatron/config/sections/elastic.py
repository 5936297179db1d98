"""The section `elastic`: one run that trains a model and its shares, smaller models of the same parameter tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.section import Key, Section

Share = Annotated[float, Field(gt=0.0, le=1.0)]
"""Part of the parameter tokens of a Pattention."""


class ElasticConfig(Section):
    """Elastic training: steps read a share of the parameter tokens of every Pattention, the first part of each of
    `param_token_groups` blocks, so that each share becomes a model of its own (as MatFormer's feed-forward layers,
    Devvrit et al. 2023, arXiv:2310.07707).

    The scale of the scores is that of the whole model for every share (`*_scale_base`), so that a step of the whole
    model is an ordinary step, and what a share adds to the residual stream is as large as what the whole adds. Rows
    that a step does not read have a gradient of zero in it: their moments decay, momentum and weight decay still move
    them.
    """

    key_prefix = "elastic."

    shares: Annotated[
        list[Share],
        Key(difference="must be given wherever there is a section elastic; not a NeoX key"),
    ]
    """Parts of the parameter tokens that are to be models, such as [0.25, 0.5, 0.75, 1]; 1 is the whole model."""

    sample: Literal["model", "sublayer"] = "model"
    """Draw of a step, the same for all its micro batches and equally likely for every share: one share for the whole
    model, or one for each sublayer (q, k and v; output; feed-forward) of each layer. Seed and step decide it."""

    full_model: Literal["sampled", "alternate", "always"] = "sampled"
    """Turn of the whole model: it is one of the shares that are drawn; or it takes every second step, and smaller
    shares the others; or every step computes it as well as a smaller share, on the same samples, and learns from the
    mean of both losses, at the cost of both."""

    distillation_weight: float = Field(default=0.0, ge=0.0, le=1.0)
    """With full_model always: weight of T^2 KL(whole model || share) in the loss of the share; its cross entropy has 1
    minus it. The whole model gets no gradient from it. 0 does without."""

    temperature: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Temperature T that the logits of both are divided by in that divergence."""

    @property
    def passes(self) -> int:
        """Returns how often a step computes each micro batch."""
        return 2 if self.full_model == "always" else 1

    @property
    def smaller_shares(self) -> list[float]:
        """Returns the shares below the whole model, in rising order."""
        return sorted(share for share in set(self.shares) if share < 1.0)

    @property
    def drawn(self) -> list[float]:
        """Returns the shares that are drawn from, in rising order."""
        return sorted(set(self.shares)) if self.full_model == "sampled" else self.smaller_shares
