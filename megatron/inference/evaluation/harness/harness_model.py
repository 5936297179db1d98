"""lm-eval's interface to a model of ours: text in, likelihoods and generated text out.

Needs lm-eval (the extra `eval`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron.data.prompt_tokenizer import PromptTokenizer
from megatron.data.tokenizer import END_OF_DOCUMENT
from megatron.errors import DataError
from megatron.inference.evaluation.harness.continuation_scores import ContinuationScore, plan_rows
from megatron.inference.evaluation.harness.response_cache import ResponseCache

T = TypeVar("T")
Request = Callable[..., list[Any]]
"""(method, items, **options) -> a result per item: `RankPool.request`."""

BATCHES_AT_A_TIME = 8
"""Batches of each rank between two steps of the progress bar, after which responses are safe in the cache."""

GENERATION_KEYS = {"do_sample", "temperature", "top_k", "top_p", "max_gen_toks", "until"}


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """lm-eval's interface over `request`. To lm-eval it is one process, however many ranks compute.

    `sequences(length)` returns the number of sequences of a length that all ranks together compute at a time.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: PromptTokenizer,
        max_length: int,
        sequences: Callable[[int], int],
        cache: ResponseCache,
    ) -> None:
        super().__init__()
        self.request = request
        self.max_length = max_length
        self.max_gen_toks = 256
        self._tokenizer = tokenizer
        self._sequences = sequences
        self._cache = cache

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.start

    @property
    def tokenizer_name(self) -> str:
        return type(self._tokenizer.tokenizer).__name__

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._tokenizer.tokenize(string, begin=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Scores (text, context, continuation) triples: (log-likelihood [nats], true if greedy decoding gives it)."""
        pairs = [(list(context), list(continuation)) for _, context, continuation in requests]
        responses = self._cache.complete("score", pairs, lambda missing: self._score(missing, disable_tqdm))
        return [(value, greedy) for value, greedy in responses]

    def _score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], silent: bool
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        rows, places = plan_rows(pairs, self.max_length)
        waiting: dict[int, list[int]] = {}
        for index, place in enumerate(places):
            waiting.setdefault(place.row, []).append(index)
        with tqdm(total=len(pairs), desc="log-likelihoods", unit="request", disable=silent) as bar:
            lengths = [len(row.tokens) for row in rows]
            for start, chunk in self._chunks(rows, lengths):
                longest = lengths[0] if start == 0 else None
                for row, scores in enumerate(self.request("score", chunk, longest=longest), start):
                    for index in waiting[row]:
                        found: ContinuationScore = scores[places[index].target]
                        yield index, (found.log_likelihood, found.greedy)
                    bar.update(len(waiting[row]))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores each whole text [nats]: each token once, with as much context as lm-eval's windows give."""
        counts, windows = [], []
        for request in requests:
            own = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in own]
            counts.append(len(pairs))
            windows += [(None, context, continuation) for context, continuation in pairs]
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        return [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each prompt, up to and without the first of its stop texts."""
        prompts = []
        repeats: Counter[str] = Counter()
        for request in requests:
            text, given = request.args
            options = self._generation_options(given)
            prompt = self.tok_encode(text)[-(self.max_length - options["max_gen_toks"]) :]
            # Greedy decoding gives one text however often it is requested; samples are to differ.
            prompts.append((prompt, repeats[text], options))
            repeats[text] += bool(options["do_sample"])
        return self._cache.complete("generate", prompts, lambda missing: self._generate(missing, disable_tqdm))

    def _generate(
        self, prompts: Sequence[tuple[list[int], int, dict[str, Any]]], silent: bool
    ) -> Iterator[tuple[int, str]]:
        groups: dict[str, list[int]] = {}
        for index, (_, _, options) in enumerate(prompts):
            groups.setdefault(json.dumps(options, sort_keys=True), []).append(index)
        with tqdm(total=len(prompts), desc="generation", unit="request", disable=silent) as bar:
            for members in groups.values():
                options = prompts[members[0]][2]
                members.sort(key=lambda index: -len(prompts[index][0]))
                items = [prompts[index][:2] for index in members]
                lengths = [len(prompt) + options["max_gen_toks"] for prompt, _ in items]
                for start, chunk in self._chunks(items, lengths):
                    longest = lengths[0] if start == 0 else None
                    texts = self.request("generate", chunk, longest=longest, options=options)
                    yield from zip(members[start:], texts, strict=False)
                    bar.update(len(chunk))

    def _chunks(self, items: Sequence[T], lengths: Sequence[int]) -> Iterator[tuple[int, Sequence[T]]]:
        """Yields (start, part) of `items`; batches are as large as they have turned out to fit."""
        start = 0
        while start < len(items):
            chunk = items[start : start + BATCHES_AT_A_TIME * self._sequences(lengths[start])]
            yield start, chunk
            start += len(chunk)

    def _generation_options(self, given: dict[str, Any]) -> dict[str, Any]:
        options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        options["until"] = handle_stop_sequences(options.get("until"), END_OF_DOCUMENT)
        unknown = options.keys() - GENERATION_KEYS
        if unknown:
            raise DataError(
                f"a task asks for generation with {', '.join(sorted(unknown))}, which is not supported here. "
                f"Supported: {', '.join(sorted(GENERATION_KEYS))}."
            )
        if options["max_gen_toks"] >= self.max_length:
            raise DataError(
                f"a task asks for {options['max_gen_toks']} generated tokens (max_gen_toks), and this model reads "
                f"{self.max_length} in all. Set max_gen_toks under generation_kwargs in the task's YAML."
            )
        return options
