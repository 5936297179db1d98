"""Prompts in, text out: a checkpoint, its tokenizer and the configured sampling."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron.config.generation import GenerationConfig
from megatron.config.run import RunConfig
from megatron.data.tokenizer import build_tokenizer
from megatron.errors import ConfigError, DataError
from megatron.inference.generate import generate_tokens
from megatron.inference.inference_model import checkpoint_to_read, load_inference_model
from megatron.mpu.context import ParallelContext


def sample_text(config: RunConfig) -> Iterator[dict[str, str]]:
    """Yield a record with `context` and `text` for each sample of each prompt.

    Raises CheckpointError without a checkpoint to sample from, DataError without a readable prompt file.
    """
    checkpoint = checkpoint_to_read(config.checkpoint)
    tokenizer = build_tokenizer(config.data.tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_inference_model(config, checkpoint, ParallelContext.single(), device)
    for number, (prompt, num_samples) in enumerate(_prompts(config.generation)):
        continuations = generate_tokens(
            model,
            [tokenizer.tokenize(prompt)] * num_samples,
            config.generation,
            start_token=tokenizer.eod,
            stop_tokens={tokenizer.eod},
            seeds=[(config.training.seed, number, sample) for sample in range(num_samples)],
        )
        for continuation in continuations:
            yield {"context": prompt, "text": tokenizer.detokenize(continuation.tokens)}


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
