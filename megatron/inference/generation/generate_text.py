"""Continues prompts with a checkpoint, its tokenizer and the configured sampling, on all ranks.

Rank 0 reads prompts and writes records; every data-parallel rank continues a share of the prompts.
"""

from __future__ import annotations

import io
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

from megatron.checkpointing.store.fetch import configured_checkpoint
from megatron.config.sections.run_config import RunConfig
from megatron.data.prompt_tokenizer import PromptTokenizer, continuation_text
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.errors import DataError
from megatron.inference.generation.conversation_terminal import ConversationTerminal
from megatron.inference.generation.read_prompts import configured_prompts
from megatron.io.progress import PeriodicReport
from megatron.loaded_model.generate_tokens import Continuation, generate_tokens
from megatron.loaded_model.loaded_model import LoadedModel, load_model, require_tokenizer
from megatron.loaded_model.rank_pool import RankPool
from megatron.loaded_model.sampling import SamplingSettings
from megatron.mpu.context import ParallelContext
from megatron.mpu.process_group import local_device

logger = logging.getLogger(__name__)

SAMPLES_AT_A_TIME = 8
SECONDS_BETWEEN_REPORTS = 10.0

Record = dict[str, Any]
"""Record of a sample, with GPT-NeoX's keys.

context            the prompt
text               the text that follows it
length             number of generated tokens
finished           true if it ended by itself, with the end of a document
message            anything else to know, or None: an empty prompt, one that was cut, a context that was full
duration_seconds   time that its batch took
logits             with return_logits: [length][vocabulary], from which each token was chosen
"""


@dataclass(frozen=True)
class SampleRequest:
    """A request for one sample of one prompt."""

    prompt: str
    tokens: list[int]
    seed: tuple[int, ...]


def generate_text(config: RunConfig, context: ParallelContext) -> None:
    """Continues the configured prompts on the ranks of `context`.

    Raises ConfigError and CheckpointError for a checkpoint that is missing, damaged or another model's, DataError for
    files that cannot be read or written.
    """
    checkpoint = configured_checkpoint(config.checkpoint)
    tokenizer = build_tokenizer(config.data.tokenizer)
    require_tokenizer(checkpoint, tokenizer)
    generator = TextGenerator(load_model(config, checkpoint, context, local_device()), tokenizer, config)
    interactive = config.generation.text_gen_type == "interactive"
    with RankPool(context, generator.generate) as pool:
        if not pool.is_driver:
            if interactive:
                # Ctrl-C reaches every process of a terminal, and means something to the first rank alone.
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            pool.serve()
            return
        with _record_file(config.generation.sample_output_file) as file:
            if interactive and sys.stdin.isatty():
                converse(generator, pool, file)
            else:
                write_records(generator, pool, file)
        if config.generation.sample_output_file is not None:
            print(f"written: {config.generation.sample_output_file}", file=sys.stderr)


class TextGenerator:
    """This rank's model and tokenizer, with the settings to continue prompts."""

    def __init__(self, model: LoadedModel, tokenizer: Tokenizer, config: RunConfig) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompt_tokenizer = PromptTokenizer(tokenizer, config.model)
        self.config = config.generation
        self.sampling = SamplingSettings(
            self.config.temperature, self.config.top_k, self.config.top_p, self.config.maximum_tokens
        )
        self.seed = config.training.seed
        self.batch_size = config.training.train_micro_batch_size_per_gpu or SAMPLES_AT_A_TIME
        self.terminal: ConversationTerminal | None = None
        """Shows texts while they grow; on the first rank of a conversation."""

    def requests(self, prompt: str, number: int) -> list[SampleRequest]:
        """Builds the requests of the run's prompt number `number`, one for each sample."""
        tokens = self.prompt_tokenizer.tokenize(prompt) if prompt else []
        return [SampleRequest(prompt, tokens, (self.seed, number, sample)) for sample in range(self.config.num_samples)]

    def generate(self, method: str, requests: Sequence[SampleRequest], options: dict[str, Any]) -> list[Record]:
        """Generates a record for each request; `method` is "write", or "show" to show one in the terminal as well."""
        records = []
        for first in range(0, len(requests), self.batch_size):
            batch = requests[first : first + self.batch_size]
            start = time.monotonic()
            continuations = generate_tokens(
                self.model,
                [request.tokens for request in batch],
                self.sampling,
                start_token=self.prompt_tokenizer.start,
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

    def _stopper(self, request: SampleRequest) -> Callable[[int, list[int]], bool]:
        def show(index: int, tokens: list[int]) -> bool:
            if self.terminal is None:
                return False
            self.terminal.show(continuation_text(self.tokenizer, request.tokens, tokens))
            return self.terminal.interrupted

        return show

    def _record(self, request: SampleRequest, continuation: Continuation) -> Record:
        record: Record = {
            "context": request.prompt,
            "text": continuation_text(self.tokenizer, request.tokens, continuation.tokens),
            "length": len(continuation.tokens),
            "finished": continuation.ending == "stop_token",
            "message": self._message(request, continuation),
        }
        if self.config.return_logits:
            record["logits"] = [] if continuation.logits is None else continuation.logits.tolist()
        return record

    def _message(self, request: SampleRequest, continuation: Continuation) -> str | None:
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


def write_records(generator: TextGenerator, pool: RankPool, file: TextIO | None) -> None:
    """Continues the configured prompts, a batch for each data-parallel rank at a time; writes a line per sample.

    Without a file, records are printed; of the one `prompt`, the text itself, unless logits are asked for, too.
    From standard input, each prompt is answered before the next one is read.
    """
    config = generator.config
    if config.text_gen_type != "input-file" and config.sample_input_file is not None:
        logger.warning("sample_input_file is not read with text_gen_type: %s", config.text_gen_type)
    prompts: Iterable[str] = configured_prompts(config)
    total, size = "", config.num_samples
    if config.text_gen_type != "interactive":
        prompts = list(prompts)
        total, size = f" of {len(prompts) * size}", generator.batch_size * pool.context.data_size
    requests = chain.from_iterable(generator.requests(prompt, number) for number, prompt in enumerate(prompts))
    report = PeriodicReport(logger.info, SECONDS_BETWEEN_REPORTS)
    show = print_text if file is None and config.prompt is not None and not config.return_logits else None
    done = 0
    while chunk := list(islice(requests, size)):
        for record in pool.request("write", chunk):
            if show is not None:
                show(record)
            else:
                print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
        done += len(chunk)
        report("%d%s samples", done, total)


def print_text(record: Record) -> None:
    """Prints a prompt with the text that follows it, and beside it what else there is to know."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may not have all letters of a text.
        sys.stdout.reconfigure(errors="backslashreplace")
    print(record["context"] + record["text"], flush=True)
    if record["message"] is not None:
        print(f"({record['message']})", file=sys.stderr)


def converse(generator: TextGenerator, pool: RankPool, file: TextIO | None) -> None:
    """Asks for prompts in the terminal and shows what follows them; records go to `file` as well."""
    generator.terminal = terminal = ConversationTerminal(generator.config.prompt_end)
    for number, prompt in enumerate(terminal.prompts()):
        for request in generator.requests(prompt, number):
            with terminal.listening():
                record = pool.request("show", [request])[0]
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
