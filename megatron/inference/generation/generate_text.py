"""Prompts in, text out: a checkpoint, its tokenizer and the configured sampling, on all ranks.

Rank 0 reads prompts and writes records; every data-parallel rank continues a share of the prompts.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.errors import DataError
from megatron.inference.generation.prompts import configured_prompts
from megatron.inference.generation.terminal import Terminal
from megatron.io.progress import PeriodicReport
from megatron.loaded_model.generate_tokens import Continuation, generate_tokens
from megatron.loaded_model.loaded_model import (
    InferenceModel,
    checkpoint_to_read,
    load_inference_model,
    require_tokenizer,
)
from megatron.loaded_model.workers import Ranks
from megatron.mpu.agreement import rank_and_size
from megatron.mpu.context import ParallelContext
from megatron.mpu.process_group import local_device

logger = logging.getLogger(__name__)

SAMPLES_AT_A_TIME = 8
SECONDS_BETWEEN_REPORTS = 10.0

Record = dict[str, Any]
"""What GPT-NeoX writes about a sample.

context            the prompt
text               what follows it
length             its tokens
finished           whether it ended by itself, with the end of a document
message            what else there is to know, or None: an empty prompt, one that was cut, a context that was full
duration_seconds   time that its batch took
logits             with return_logits: [length][vocabulary], what each token was chosen from
"""


@dataclass(frozen=True)
class Request:
    """One sample of one prompt."""

    prompt: str
    tokens: list[int]
    seed: tuple[int, ...]


def generate_text(config: RunConfig, context: ParallelContext) -> None:
    """Continue the configured prompts, on the ranks of `context`.

    Raises ConfigError and CheckpointError for a checkpoint that is missing, damaged or another model's, DataError for
    files that cannot be read or written.
    """
    checkpoint = checkpoint_to_read(config.checkpoint)
    tokenizer = build_tokenizer(config.data.tokenizer)
    require_tokenizer(checkpoint, tokenizer)
    generator = TextGenerator(load_inference_model(config, checkpoint, context, local_device()), tokenizer, config)
    interactive = config.generation.text_gen_type == "interactive"
    with Ranks(context, generator.answer) as ranks:
        if rank_and_size()[0] != 0:
            if interactive:
                # Ctrl-C reaches every process of a terminal, and means something to the first rank alone.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            ranks.follow()
            return
        with _record_file(config.generation.sample_output_file) as file:
            if interactive and sys.stdin.isatty():
                converse(generator, ranks, file)
            else:
                write_records(generator, ranks, file or sys.stdout)


class TextGenerator:
    """This rank's model with what it takes to continue prompts."""

    def __init__(self, model: InferenceModel, tokenizer: Tokenizer, config: RunConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.config = config.generation
        self.seed = config.training.seed
        self.batch_size = config.training.train_micro_batch_size_per_gpu or SAMPLES_AT_A_TIME
        self.terminal: Terminal | None = None
        """Where texts appear while they grow; on the first rank of a conversation."""

    def requests(self, prompt: str, number: int) -> list[Request]:
        """The samples that the prompt which is the run's number `number` asks for."""
        tokens = self.tokenizer.tokenize(prompt)
        return [Request(prompt, tokens, (self.seed, number, sample)) for sample in range(self.config.num_samples)]

    def answer(self, method: str, requests: Sequence[Request], options: dict[str, Any]) -> list[Record]:
        """A record for each request; `method` is "write", or "show" to let one appear in the terminal as well."""
        records = []
        for first in range(0, len(requests), self.batch_size):
            batch = requests[first : first + self.batch_size]
            start = time.monotonic()
            continuations = generate_tokens(
                self.model,
                [request.tokens for request in batch],
                self.config,
                start_token=self.tokenizer.eod,
                stop_tokens={self.tokenizer.eod},
                seeds=[request.seed for request in batch],
                should_stop=self._stopper(batch[0]) if method == "show" else None,
                use_cache=not self.config.recompute,
                return_logits=self.config.return_logits,
            )
            seconds = round(time.monotonic() - start, 6)
            records += [
                self._record(request, continuation) | {"duration_seconds": seconds}
                for request, continuation in zip(batch, continuations, strict=True)
            ]
        return records

    def _stopper(self, request: Request) -> Callable[[int, list[int]], bool]:
        def show(index: int, tokens: list[int]) -> bool:
            if self.terminal is None:
                return False
            self.terminal.show(self._text(request, tokens))
            return self.terminal.interrupted

        return show

    def _text(self, request: Request, tokens: list[int]) -> str:
        """What the tokens add to the prompt. By themselves they may read otherwise, as without a first space."""
        before, whole = (self.tokenizer.detokenize(ids) for ids in (request.tokens, request.tokens + tokens))
        return whole.removeprefix(before) if whole.startswith(before) else self.tokenizer.detokenize(tokens)

    def _record(self, request: Request, continuation: Continuation) -> Record:
        record: Record = {
            "context": request.prompt,
            "text": self._text(request, continuation.tokens),
            "length": len(continuation.tokens),
            "finished": continuation.ending == "stop_token",
            "message": self._message(request, continuation),
        }
        if self.config.return_logits:
            record["logits"] = [] if continuation.logits is None else continuation.logits.tolist()
        return record

    def _message(self, request: Request, continuation: Continuation) -> str | None:
        context_length = self.model.context_length
        messages = []
        if not request.tokens and self.config.text_gen_type != "unconditional":
            messages.append("the prompt is empty: this is how a document starts")
        if continuation.prompt_tokens < len(request.tokens):
            messages.append(
                f"of the prompt's {len(request.tokens)} tokens the last {continuation.prompt_tokens} were read: it and "
                f"maximum_tokens are more than seq_length {context_length}"
            )
        if continuation.ending == "context_full":
            messages.append(f"the sequence has reached seq_length {context_length}")
        if continuation.ending == "stopped":
            messages.append("stopped by the user")
        return "; ".join(messages) or None


def write_records(generator: TextGenerator, ranks: Ranks, file: TextIO) -> None:
    """Continue the prompts that are configured, a batch for each data-parallel rank at a time; a line per sample.

    From standard input, each prompt is answered before the next one is read.
    """
    config = generator.config
    if config.text_gen_type != "input-file" and config.sample_input_file is not None:
        logger.warning("sample_input_file is not read with text_gen_type: %s", config.text_gen_type)
    prompts: Iterable[str] = configured_prompts(config)
    total, size = "", config.num_samples
    if config.text_gen_type != "interactive":
        prompts = list(prompts)
        total, size = f" of {len(prompts) * size}", generator.batch_size * ranks.context.data_size
    requests = chain.from_iterable(generator.requests(prompt, number) for number, prompt in enumerate(prompts))
    report = PeriodicReport(logger.info, SECONDS_BETWEEN_REPORTS)
    done = 0
    while chunk := list(islice(requests, size)):
        for record in ranks.ask("write", chunk):
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
        done += len(chunk)
        report("%d%s samples", done, total)


def converse(generator: TextGenerator, ranks: Ranks, file: TextIO | None) -> None:
    """Ask for prompts in the terminal and show what follows them; records go to `file` as well."""
    generator.terminal = terminal = Terminal(generator.config.prompt_end)
    for number, prompt in enumerate(terminal.prompts()):
        for request in generator.requests(prompt, number):
            with terminal.listening():
                record = ranks.ask("show", [request])[0]
            terminal.finish(record["text"], record["message"])
            if file is not None:
                print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
            if terminal.interrupted:
                break


@contextmanager
def _record_file(name: str | None) -> Iterator[TextIO | None]:
    if name is None:
        yield None
        return
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    except OSError as error:
        raise DataError(f"sample_output_file: {name} cannot be written: {error}.") from error
    with Path(name).open("w", encoding="utf-8") as file:
        yield file
