"""Sampling of text from a trained model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.bounds import NonNegative, SampleCount, StepCount, TokenCount
from megatron.config.local_path import PathText
from megatron.config.section import Key, Section

Prompts = Annotated[list[str], Field(max_length=64)]
"""Prompts that a run continues."""


class GenerationConfig(Section):
    """Sampling of text: prompts, distribution, lengths, records."""

    text_gen_type: Annotated[
        Literal["unconditional", "prompt", "input-file", "interactive"], Key(difference="NeoX has no `prompt`")
    ] = "unconditional"
    """Where prompts come from: nowhere, `prompt`, sample_input_file, or the terminal (without one, standard input)."""

    prompt: Annotated[str | None, Key(difference="not a NeoX key")] = None
    """The prompt (prompt); it and the text that follows are printed as they are, unless records are asked for."""

    temperature: NonNegative = 0.0
    """Divides the logits before sampling; 0 decodes greedily."""

    top_k: int = Field(default=0, ge=0, le=10**8)
    """Sample among this many likeliest tokens; 0 means all."""

    top_p: float = Field(default=0.0, ge=0.0, le=1.0)
    """Sample among the likeliest tokens that together reach this probability; 0 means all."""

    maximum_tokens: TokenCount = 64
    """Tokens generated per sample at most [tokens]. A prompt loses tokens on the left to make room for them, at most
    for half of seq_length; where a sequence reaches seq_length, it ends."""

    num_samples: Annotated[SampleCount, Key(difference="counts for prompts too, not only without")] = 1
    """Samples of each prompt [samples]."""

    sample_prompts: Annotated[Prompts | None, Key(difference="not a NeoX key")] = None
    """Prompts that training continues as it goes on, one sample each, into samples.jsonl in the run's folder; with the
    sampling of this section."""

    sample_interval: Annotated[StepCount | None, Key(difference="not a NeoX key")] = None
    """Steps between such samples [steps]; None takes them at each validation, every eval_interval steps and at the
    end."""

    prompt_end: str = Field(default="\n", min_length=1)
    """What ends a prompt in sample_input_file and in the terminal. It is no part of the prompt."""

    recompute: bool = False
    """Compute the whole sequence anew for every token, without a cache of keys and values. The text is the same."""

    return_logits: bool = False
    """Write the logits that each generated token was chosen from into the records: as many numbers as the vocabulary
    has ids, for every token."""

    sample_input_file: PathText | None = None
    """File of prompts (input-file)."""

    sample_output_file: Annotated[
        PathText | None, Key(difference="records are printed when unset; NeoX's default is samples.txt")
    ] = None
    """File of records, one JSON line per sample; None prints them."""
