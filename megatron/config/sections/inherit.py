"""The section `inherit`: a run whose model is made of layers of a trained one, its reference."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from megatron.config.section import OneOf, Section
from megatron.registry import variant_names

LayerNumber = Annotated[int, Field(ge=0, lt=100_000)]
Sublayer = Literal["attention", "feed_forward", "norms"]
SUBLAYERS: tuple[Sublayer, ...] = ("attention", "feed_forward", "norms")


class InheritConfig(Section):
    """A model that begins with weights of a reference, which `load` names. It is a new run.

    Embeddings, final norm and head are inherited always. What is not inherited begins as in any run of this
    configuration. With `finetune: true` weights alone are taken; without it, `moments` says what comes of the
    optimizer's, and the run goes on from a checkpoint of the new model in `save`.
    """

    key_prefix = "inherit."

    operator: Annotated[str, OneOf(partial(variant_names, "megatron.growth.inheriting.operators"))] = "inherit"
    """Layers that are made of the reference's; megatron/growth/inheriting/operators has one module for each."""

    layers: Literal["first", "last"] | list[LayerNumber] = "first"
    """Layers of the reference to take, the lowest first: as many as num_layers asks for from its beginning or its end,
    or those of a list, counted from 0."""

    sublayers: list[Sublayer] = Field(default=list(SUBLAYERS))
    """Parts of these layers to take: attention, feed_forward, norms."""

    rows: Literal["first", "last", "even"] = "first"
    """Choice of half_width among features, heads and units: the first half, the last, or every second."""

    moments: Literal["keep", "reset_new", "reset_all"] = "reset_all"
    """Optimizer's moments: kept for all that is inherited; kept, but zero for copies of a layer that is there already;
    or all zero, and the optimizer's step count too."""

    schedule: Literal["restart", "continue"] = "restart"
    """Learning-rate schedule and steps: from their start, or from where the reference's run was."""

    data: Literal["restart", "continue"] = "restart"
    """Training data: from its start, or from where the reference's run was."""
