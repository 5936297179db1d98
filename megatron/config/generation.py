"""How text is sampled from a trained model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from megatron.config.section import Section


class GenerationConfig(Section):
    """Sampling."""

    text_gen_type: Literal["unconditional", "input-file", "interactive"] = "unconditional"
    """Where prompts come from."""

    temperature: NonNegativeFloat = 0.0
    """Divides the logits before sampling; 0 decodes greedily."""

    top_k: NonNegativeInt = 0
    """Sample among this many likeliest tokens; 0 means all."""

    top_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Sample among the likeliest tokens that together reach this probability; 0 means all."""

    maximum_tokens: PositiveInt = 64
    """Tokens generated per sample [tokens]."""

    num_samples: PositiveInt = 1
    """Unconditional samples [samples]."""

    sample_input_file: str | None = None
    """Prompts, one a line (input-file)."""

    sample_output_file: str | None = None
    """JSON lines with the prompts and the generated text; None prints them."""
