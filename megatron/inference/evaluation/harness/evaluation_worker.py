"""The work of one rank of an evaluation: load a checkpoint, score rows, continue prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.checkpointing.store.fetch import configured_checkpoint
from megatron.config.sections.run_config import RunConfig
from megatron.data.prompt_tokenizer import PromptTokenizer
from megatron.data.tokenizer import Tokenizer
from megatron.inference.evaluation.harness.batch_limit import BatchLimit, compute_in_batches, tokens_that_fit
from megatron.inference.evaluation.harness.continuation_scores import ContinuationScore, ScoringRow, score_batch
from megatron.loaded_model.generate_tokens import generate_tokens
from megatron.loaded_model.loaded_model import LoadedModel, load_model, require_tokenizer
from megatron.loaded_model.sampling import SamplingSettings
from megatron.mpu.context import ParallelContext


class EvaluationWorker:
    """This rank's share of the model, and its batches."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, context: ParallelContext, device: torch.device) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.prompt_tokenizer = PromptTokenizer(tokenizer, config.model)
        self.context = context
        self.device = device
        self.limit = BatchLimit(config.evaluation.batch_size, together=context.tensor_size > 1)
        self._loaded: tuple[Checkpoint, LoadedModel] | None = None

    def __call__(self, method: str, items: Sequence[Any], options: dict[str, Any]) -> list[Any]:
        """Computes a result for each item; `method` is load, score or generate. Raises what they raise."""
        methods: dict[str, Callable[..., list[Any]]] = {
            "load": self.load,
            "score": self.score,
            "generate": self.generate,
        }
        return methods[method](items, **options)

    @property
    def loaded(self) -> tuple[Checkpoint, LoadedModel]:
        """Returns the checkpoint that was loaded last, and this rank's share of its model."""
        if self._loaded is None:
            raise RuntimeError("no checkpoint was loaded")
        return self._loaded

    @property
    def model(self) -> LoadedModel:
        """Returns this rank's share of the model that was loaded last."""
        return self.loaded[1]

    def load(self, items: Sequence[Any], iteration: int | None) -> list[Any]:
        """Loads a checkpoint in place of the last one. Collective over all ranks.

        Raises CheckpointError when there is none, or a damaged one; ConfigError when it is of another model or of
        another tokenizer's vocabulary.
        """
        self._loaded = None
        checkpoint = configured_checkpoint(self.config.checkpoint, iteration)
        require_tokenizer(checkpoint, self.tokenizer)
        model = load_model(self.config, checkpoint, self.context, self.device)
        self._loaded = checkpoint, model
        return list(items)

    def score(self, rows: Sequence[ScoringRow], longest: int | None) -> list[list[ContinuationScore]]:
        """Scores each row's targets, longest rows first; `longest` comes with the first rows of all."""
        if longest is not None:
            self._fit_batches(longest)
        return compute_in_batches(
            rows, lambda row: len(row.tokens), self.limit, lambda batch: score_batch(self.model, batch)
        )

    def generate(
        self, prompts: Sequence[tuple[list[int], int]], longest: int | None, options: dict[str, Any]
    ) -> list[str]:
        """Continues each prompt, given with the number of its repetition; longest first.

        The text ends before the first of the stop texts `until`, which may appear in the middle of a token.
        """
        if longest is not None:
            self._fit_batches(longest)
        sampling = SamplingSettings(
            temperature=float(options["temperature"]) if options["do_sample"] else 0.0,
            top_k=int(options.get("top_k", 0)),
            top_p=float(options.get("top_p", 0.0)),
            maximum_tokens=options["max_gen_toks"],
        )
        until = [text for text in options["until"] if text]

        def continue_batch(batch: Sequence[tuple[list[int], int]]) -> list[str]:
            continuations = generate_tokens(
                self.model,
                [prompt for prompt, _ in batch],
                sampling,
                start_token=self.prompt_tokenizer.start,
                stop_tokens={self.tokenizer.eod},
                seeds=[(repeat, *prompt) for prompt, repeat in batch],
                should_stop=lambda _, tokens: any(text in self.tokenizer.detokenize(tokens) for text in until),
            )
            return [cut_at_stop(self.tokenizer.detokenize(found.tokens), until) for found in continuations]

        return compute_in_batches(
            prompts, lambda item: len(item[0]) + sampling.maximum_tokens, self.limit, continue_batch
        )

    def _fit_batches(self, longest: int) -> None:
        """Measures how much fits into memory, now that the longest sequence is known."""
        if self.limit.batch_size == "auto" and self.device.type == "cuda":
            self.limit.tokens = tokens_that_fit(self.model, longest, self.context)


def cut_at_stop(text: str, until: Sequence[str]) -> str:
    """Returns `text` up to the first place where one of `until` stands."""
    return min((text.split(stop, maxsplit=1)[0] for stop in until), key=len, default=text)
