"""Reads prompts from the configuration, a file or standard input."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron.config.sections.generation import GenerationConfig
from megatron.errors import ConfigError, DataError


def configured_prompts(config: GenerationConfig) -> Iterator[str]:
    """Yields one empty prompt, that of the configuration, those of the file, or those of standard input until it ends.

    A prompt is the text before `prompt_end`, spaces included; two ends in a row have an empty prompt between them.
    Raises DataError for a file that cannot be read or holds no prompt.
    """
    if config.text_gen_type == "unconditional":
        yield ""
    elif config.prompt is not None:
        yield config.prompt
    elif config.text_gen_type == "input-file":
        prompts = _split(_read(config.sample_input_file), config.prompt_end)
        if not prompts:
            raise DataError(
                f"sample_input_file: {config.sample_input_file} is empty. Write prompts into it, each ended by "
                f"{config.prompt_end!r} (`prompt_end`)."
            )
        yield from prompts
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
    """Yields each prompt as soon as its end has come: the writer may wait for the text of one before the next."""
    decode_with_replacement(sys.stdin)
    text = ""
    for line in sys.stdin:
        *prompts, text = (text + line).split(prompt_end)
        yield from prompts
    yield from _split(text, prompt_end)


def decode_with_replacement(stream: object) -> None:
    """Makes a stream read bytes that are no text as replacement characters, since tokenizers take only text."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
