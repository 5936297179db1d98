"""Time eval.py's adapter against lm-eval's own `hf` on the same weights and requests in the same process.

    python tools/benchmarks/benchmark_evaluation.py configs/demo.yml --output evaluation.json
    python tools/benchmarks/benchmark_evaluation.py -d configs tokenformer/150M data/pile --vocab-size 50277

The weights are those that training starts from: what they are makes no difference to the time. Requests are random
tokens in the shape of three kinds of task; both adapters are given their tokens, batches have the same size, and take
turns, so that a machine that gets slower or faster does so for both. The first round of each does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from lm_eval.models.huggingface import HFLM

import megatron.hf  # noqa: F401 - registers what transformers is to know
from megatron.config.cli import parse_command_line
from megatron.config.data import TokenizerConfig
from megatron.config.load import load_config
from megatron.config.parameters import count_parameters
from megatron.config.run import RunConfig
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.errors import exit_on_user_error
from megatron.hf.tokenizer_files import write_tokenizer
from megatron.inference.inference_model import DTYPES, InferenceModel
from megatron.inference.lm_eval_adapter import HarnessModel
from megatron.inference.lm_eval_batches import BatchLimit, in_batches
from megatron.inference.lm_eval_cache import AnswerCache
from megatron.inference.lm_eval_scoring import score_batch
from megatron.model.causal_lm import VocabSize, build_local
from megatron.monitor.console import format_count
from megatron.monitor.provenance import device_name
from tools.benchmarks.transformers_model import transformers_model

Request = tuple[None, list[int], list[int]]
"""Text that is not looked at, context, continuation."""
BYTES = TokenizerConfig(type="CharLevelTokenizer")
"""Both adapters need a tokenizer, which has nothing to do here."""


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description="Time log-likelihoods against lm-eval's own adapter.",
        usage="%(prog)s a.yml [b.yml ...] [key=value ...] [options]",
        allow_abbrev=False,
    )
    parser.add_argument("--questions", type=_positive, default=50, help="questions of each kind (default: 50)")
    parser.add_argument("--batch-size", type=_positive, default=8, help="sequences at a time (default: 8)")
    parser.add_argument("--rounds", type=_positive, default=5, help="timed rounds of each (default: 5)")
    parser.add_argument("--vocab-size", type=_positive, help="ids of the vocabulary, in place of the tokenizer's")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_known_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected at least 1")
    return value


def make_requests(questions: int, vocab_size: int, context_length: int, seed: int) -> dict[str, list[Request]]:
    """Requests by kind: endings of a shared context, single tokens after a shared context, whole windows."""
    rng = random.Random(seed)  # noqa: S311 - test data

    def tokens(low: float, high: float) -> list[int]:
        count = rng.randint(max(int(low * context_length), 1), max(int(high * context_length), 1))
        return [rng.randrange(vocab_size) for _ in range(count)]

    contexts = [tokens(0.2, 0.6) for _ in range(questions)]
    return {
        "four endings": [(None, context, tokens(0.1, 0.3)) for context in contexts for _ in range(4)],
        "four letters": [(None, context, [letter]) for context in contexts for letter in range(4)],
        "whole windows": [(None, [0], tokens(1.0, 1.0)) for _ in contexts],
    }


def benchmark(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Both adapters' seconds by kind and round, and what was measured."""
    actual = args.vocab_size or build_tokenizer(config.data.tokenizer).vocab_size
    vocab = VocabSize(actual, padded_vocab_size(config.model, actual))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_local(config.model, vocab, config.training.seed).to(device, DTYPES[config.training.precision.dtype])
    adapters = {
        "ours": our_adapter(InferenceModel(model, config, vocab), args.batch_size),
        "lm-eval hf": their_adapter(transformers_model(model, config, vocab), config, args.batch_size),
    }
    kinds = {}
    for kind, requests in make_requests(args.questions, actual, config.model.seq_length, config.training.seed).items():
        calls = {name: partial(adapter, requests, disable_tqdm=True) for name, adapter in adapters.items()}
        kinds[kind] = {"requests": len(requests)} | take_turns(calls, args.rounds, len(requests))
    return {
        "parameters": count_parameters(config.model, vocab.padded),
        "dtype": config.training.precision.dtype,
        "device": device_name(),
        "cpu_threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("torch", "transformers", "lm_eval")},
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "kinds": kinds,
    }


def take_turns(calls: dict[str, Callable[[], Any]], rounds: int, requests: int) -> dict[str, Any]:
    """Seconds of each call by round, the ratio of their rates, and the largest difference of their log-likelihoods."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    answers = {}
    for number in range(rounds + 1):
        # Whoever goes first in one round goes last in the next: a steady drift then favours neither.
        for name in list(calls)[:: 1 if number % 2 else -1]:
            start = _synchronized_seconds()
            answers[name] = calls[name]()
            seconds[name].append(_synchronized_seconds() - start)
    timed = {name: values[1:] for name, values in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(*timed.values(), strict=True)]
    differences = [abs(one[0] - other[0]) for one, other in zip(*answers.values(), strict=True)]
    return {
        "seconds": timed,
        "requests_per_second": {name: requests / statistics.median(values) for name, values in timed.items()},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "largest_difference": max(differences),
    }


def our_adapter(model: InferenceModel, batch_size: int) -> Callable[..., Any]:
    limit = BatchLimit(batch_size)

    def ask(method: str, rows: Sequence[Any], longest: int | None) -> list[Any]:
        return in_batches(rows, lambda row: len(row.tokens), limit, partial(score_batch, model))

    return HarnessModel(
        ask, build_tokenizer(BYTES), model.context_length, limit.rows, AnswerCache(None)
    )._loglikelihood_tokens


def their_adapter(model: Any, config: RunConfig, batch_size: int) -> Callable[..., Any]:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), BYTES, config.model.max_position_embeddings)
        adapter = HFLM(pretrained=model, tokenizer=folder, batch_size=batch_size, max_length=config.model.seq_length)
    scored: Callable[..., Any] = torch.inference_mode()(adapter._loglikelihood_tokens)
    return scored


def _synchronized_seconds() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    where = f"{report['cpu_threads']} CPU threads" if report["device"] == "cpu" else report["device"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        f"{format_count(report['parameters'])} parameters, {report['dtype']}, {where}, {versions}",
        f"batches of {report['batch_size']}, median of {report['rounds']} rounds",
        "",
        f"{'requests/s':16}{'ours':>10}{'lm-eval hf':>12}   ours over lm-eval hf",
    ]
    for kind, found in report["kinds"].items():
        ours, theirs = found["requests_per_second"].values()
        spread = f"{min(found['ratios']):.2f} to {max(found['ratios']):.2f}"
        lines.append(
            f"{kind:16}{ours:>10.1f}{theirs:>12.1f}   {found['ratio']:.2f} (rounds: {spread}), log-likelihoods within "
            f"{found['largest_difference']:.1g}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the JSON file. Returns the exit code."""
    args, words = parse_args(argv)
    command = parse_command_line(words)
    report = {"config": words} | benchmark(load_config(command.files, command.overrides).run, args)
    print(table(report))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(args.output)
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
