"""Prompts in, text out: a checkpoint, its tokenizer and the configured sampling."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron.checkpointing.search import find_checkpoint
from megatron.checkpointing.weights import load_local_model
from megatron.config.generation import GenerationConfig
from megatron.config.output import CheckpointConfig
from megatron.config.run import RunConfig
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import CheckpointError, ConfigError, DataError
from megatron.inference.generate import generate


def sample_text(config: RunConfig) -> Iterator[dict[str, str]]:
    """Yield a record with `context` and `text` for each sample of each prompt.

    Raises CheckpointError without a checkpoint to sample from, DataError without a readable prompt file.
    """
    checkpoint = find_checkpoint(
        _checkpoint_folder(config.checkpoint), config.checkpoint.iteration, config.checkpoint.verify_checkpoint
    )
    if checkpoint is None:
        raise CheckpointError(
            f"{_checkpoint_folder(config.checkpoint)} holds no checkpoint to sample from. Name a run's folder with "
            "`load=...`."
        )
    tokenizer = build_tokenizer(config.data.tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_local_model(checkpoint, device)
    generator = torch.Generator().manual_seed(config.training.seed)
    for prompt, num_samples in _prompts(config.generation):
        samples = generate(
            model,
            tokenizer.tokenize(prompt),
            config.generation,
            num_samples=num_samples,
            eod=tokenizer.eod,
            vocab_size=checkpoint.state.vocab_size,
            context_length=config.model.seq_length,
            generator=generator,
            device=device,
        )
        for tokens in samples:
            yield {"context": prompt, "text": tokenizer.detokenize(tokens)}


def _checkpoint_folder(config: CheckpointConfig) -> Path:
    folder = config.load or config.save
    if folder is None:
        raise ConfigError("load: no checkpoint is named to sample from. Add `load=FOLDER` to the command.")
    return Path(folder)


def _prompts(generation: GenerationConfig) -> Iterator[tuple[str, int]]:
    """Prompts with the number of samples that each asks for."""
    if generation.text_gen_type == "unconditional":
        yield "", generation.num_samples
    elif generation.text_gen_type == "input-file":
        if generation.sample_input_file is None:
            raise ConfigError("sample_input_file: `text_gen_type: input-file` needs a file of prompts, one a line.")
        try:
            lines = Path(generation.sample_input_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"sample_input_file: {generation.sample_input_file} cannot be read: {error}.") from error
        yield from ((line, generation.num_samples) for line in lines)
    else:
        yield from ((line.rstrip("\n"), generation.num_samples) for line in sys.stdin)
