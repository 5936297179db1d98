"""Where prompts come from when nobody is asked for them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron.config.sections.generation import GenerationConfig
from megatron.errors import ConfigError, DataError


def configured_prompts(config: GenerationConfig) -> Iterator[str]:
    """One empty prompt, those of the file, or, as long as there are any, those of standard input.

    A prompt is what stands before `prompt_end`, spaces included; two of those in a row have an empty prompt between
    them. Raises DataError for a file that cannot be read.
    """
    if config.text_gen_type == "unconditional":
        yield ""
    elif config.text_gen_type == "input-file":
        yield from _split(_read(config.sample_input_file), config.prompt_end)
    else:
        yield from _from_standard_input(config.prompt_end)


def _read(name: str | None) -> str:
    if name is None:
        raise ConfigError("sample_input_file: `text_gen_type: input-file` needs a file of prompts.")
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"sample_input_file: {name} cannot be read as UTF-8 text: {error}.") from error


def _split(text: str, prompt_end: str) -> list[str]:
    *prompts, rest = text.split(prompt_end)
    # A last line may lack its end, and a file whose prompts end otherwise still ends with a line.
    return [*prompts, rest] if rest.strip("\n") else prompts


def _from_standard_input(prompt_end: str) -> Iterator[str]:
    """Each prompt as soon as its end has come: whoever writes them may wait for the answer to one."""
    decode_with_replacement(sys.stdin)
    text = ""
    for line in sys.stdin:
        *prompts, text = (text + line).split(prompt_end)
        yield from prompts
    yield from _split(text, prompt_end)


def decode_with_replacement(stream: object) -> None:
    """Read bytes that are no text as replacement characters, for no tokenizer takes anything else."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
