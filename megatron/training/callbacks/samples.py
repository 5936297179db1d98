"""Continues prompts while the model trains (`sample_prompts`), so that one can read what it has learned by when."""

from __future__ import annotations

from itertools import chain
from typing import Any

from megatron.data.prompt_tokenizer import PromptTokenizer, continuation_text
from megatron.data.tokenizer import build_tokenizer
from megatron.loaded_model.generate_tokens import Continuation, generate_tokens
from megatron.loaded_model.sampling import SamplingSettings
from megatron.monitor.step_records import StepRecords
from megatron.mpu.agreement import gather_objects, on_first_rank
from megatron.training.callback import Callback
from megatron.training.progress import Step
from megatron.training.staged_model import StagedModel
from megatron.training.training_context import TrainingContext

SAMPLES_FILE = "samples.jsonl"
SAMPLES_AT_A_TIME = 8


class Samples(Callback):
    """Continues the prompts every `sample_interval` steps and at the end of the run, into samples.jsonl.

    A record has `iteration`, `prompt`, `text`, the text that follows, `length` [tokens] and `finished`, true where a
    document has ended there. Data-parallel ranks share the prompts. A sample follows from the run's seed and its
    prompt's number, at every step alike; the run draws the same random numbers, and takes the same steps, as without.
    """

    def __init__(self, context: TrainingContext) -> None:
        super().__init__(context)
        run = context.run
        generation = run.config.generation
        self.interval = generation.sample_interval or run.config.training.eval_interval
        self.tokenizer = build_tokenizer(run.config.data.tokenizer)
        self.prompt_tokenizer = PromptTokenizer(self.tokenizer, run.config.model)
        self.sampling = SamplingSettings(
            generation.temperature, generation.top_k, generation.top_p, generation.maximum_tokens
        )
        prompts = generation.sample_prompts or []
        self.records: StepRecords | None = None
        """On rank 0, from the start on."""
        self.prompts = [(prompt, self.prompt_tokenizer.tokenize(prompt) if prompt else []) for prompt in prompts]

    def start(self) -> None:
        """Drops the samples of steps that will be taken again. Collective."""
        on_first_rank(self._open)

    def _open(self) -> None:
        self.records = StepRecords(self.context.run.folder / SAMPLES_FILE, self.context.progress.iteration)

    def after_step(self, step: Step) -> None:
        """Takes the samples when it is time. Collective."""
        if not (step.iteration % self.interval == 0 or step.is_last):
            return
        with self.context.throughput.paused("sampling"):
            shares = gather_objects(self._own_samples())
        found = dict(chain.from_iterable(shares))
        if self.records is not None:
            for number in sorted(found):
                self.records.append({"iteration": step.iteration, **found[number]})

    def _own_samples(self) -> list[tuple[int, dict[str, Any]]]:
        """Continues this data-parallel rank's share of the prompts; returns records by the prompts' numbers."""
        run = self.context.run
        model = StagedModel(run.engine, run.vocab, run.parallel)
        own = range(run.parallel.data_rank, len(self.prompts), run.parallel.data_size)
        found = []
        with model.in_use():
            for first in range(0, len(own), SAMPLES_AT_A_TIME):
                numbers = own[first : first + SAMPLES_AT_A_TIME]
                continuations = generate_tokens(
                    model,
                    [self.prompts[number][1] for number in numbers],
                    self.sampling,
                    start_token=self.prompt_tokenizer.start,
                    stop_tokens={self.tokenizer.eod},
                    seeds=[(run.config.training.seed, number, 0) for number in numbers],
                    use_cache=model.takes_cache,
                )
                pairs = zip(numbers, continuations, strict=True)
                found += [(number, self._record(number, continuation)) for number, continuation in pairs]
        return found

    def _record(self, number: int, continuation: Continuation) -> dict[str, Any]:
        prompt, tokens = self.prompts[number]
        return {
            "prompt": prompt,
            "text": continuation_text(self.tokenizer, tokens, continuation.tokens),
            "length": len(continuation.tokens),
            "finished": continuation.ending == "stop_token",
        }
