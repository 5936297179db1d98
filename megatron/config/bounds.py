"""Types of numbers with the bounds that torch, numpy, int64 counters and a machine's memory set, far above any use."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron.config.value_types import SMALLEST

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Seed of numpy's RandomState, which orders the data."""

StepCount = Annotated[int, Field(gt=0, le=10**12)]
"""Optimizer steps. With a batch of ten million samples, int64 still counts the samples."""

StepNumber = Annotated[int, Field(ge=0, le=10**12)]
"""Number of a step, or none."""

LayerCount = Annotated[int, Field(gt=0, le=100_000)]
"""Layers, and pipeline stages."""

Width = Annotated[int, Field(gt=0, le=10**6)]
"""Features, heads, and what a vocabulary is a multiple of."""

TokenCount = Annotated[int, Field(gt=0, le=10**8)]
"""Tokens: of a sequence, of a vocabulary, or parameters."""

SampleCount = Annotated[int, Field(gt=0, le=10**7)]
"""Samples or micro batches of a step."""

LocalCount = Annotated[int, Field(gt=0, le=1024)]
"""Processes of a machine."""

RankCount = Annotated[int, Field(gt=0, le=10**6)]
"""Ranks of a run."""

Count = Annotated[int, Field(gt=0, le=10**9)]
"""Things that cost nothing each."""

ElementCount = Annotated[int, Field(gt=0, le=10**11)]
"""Elements of a buffer."""

Positive = Annotated[float, Field(ge=SMALLEST, le=1e30)]
"""Number that float32 holds with room for products, and that is not 0."""

NonNegative = Annotated[float, Field(ge=0.0, le=1e30)]
"""Such a number, or 0."""
