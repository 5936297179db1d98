"""Times eval.py's adapter against lm-eval's own `hf` on the same weights and requests in the same process.

    python tools/benchmarks/benchmark_evaluation.py configs/demo.yml --output evaluation.json
    python tools/benchmarks/benchmark_evaluation.py -d configs tokenformer/150M data/pile --vocab-size 50277

The weights are those that training starts from: what they are makes no difference to the time. Requests are random
tokens in the shape of three kinds of task; both adapters are given their tokens, batches have the same size, and take
turns, so that a machine that gets slower or faster does so for both. The first round of each does not count.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tokenformer import run_tool

from megatron.config.sections.data import TokenizerConfig
from megatron.config.sections.run_config import RunConfig
from megatron.data.prompt_tokenizer import PromptTokenizer
from megatron.data.tokenizer import build_tokenizer
from megatron.registry import install_extra, require
from tools.benchmarks.benchmark_command import benchmark_parser, run_benchmark
from tools.command_line import positive

if TYPE_CHECKING:
    from megatron.loaded_model.loaded_model import LoadedModel

Request = tuple[None, list[int], list[int]]
"""Text that no adapter looks at, context, continuation."""
BYTES = TokenizerConfig(type="CharLevelTokenizer")
"""Tokenizer for adapters that insist on one; nothing is tokenized here."""


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the options; returns the remaining words too, which are YAML files and overrides."""
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--questions", type=positive, default=50, help="questions of each kind (default: 50)")
    parser.add_argument("--batch-size", type=positive, default=8, help="sequences at a time (default: 8)")
    return parser.parse_known_args(argv)


def make_requests(questions: int, vocab_size: int, context_length: int, seed: int) -> dict[str, list[Request]]:
    """Makes requests of three kinds: endings of a shared context, single tokens after it, and whole windows."""
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
    """Measures both adapters by kind and round. Returns what the JSON file holds."""
    require("lm_eval", "benchmark_evaluation.py", install_extra("eval"))
    from tools.benchmarks.transformers_model import transformers_model
    from tools.benchmarks.turns import machine_report, take_turns, untrained_model

    model = untrained_model(config, args.vocab_size)
    adapters = {
        "ours": our_adapter(model, args.batch_size),
        "lm-eval hf": their_adapter(transformers_model(model.module, config, model.vocab), config, args.batch_size),
    }
    kinds = {}
    requests_by_kind = make_requests(args.questions, model.vocab.actual, config.model.seq_length, config.training.seed)
    for kind, requests in requests_by_kind.items():
        calls = {name: partial(adapter, requests, disable_tqdm=True) for name, adapter in adapters.items()}
        timed, (ours, theirs) = take_turns(calls, args.rounds)
        kinds[kind] = timed | {
            "requests": len(requests),
            "requests_per_second": {
                name: len(requests) / statistics.median(seconds) for name, seconds in timed["seconds"].items()
            },
            "largest_difference": max(abs(one[0] - other[0]) for one, other in zip(ours, theirs, strict=True)),
        }
    versions = {package: version(package) for package in ("torch", "transformers", "lm_eval")}
    return machine_report(model, versions) | {"batch_size": args.batch_size, "rounds": args.rounds, "kinds": kinds}


def our_adapter(model: LoadedModel, batch_size: int) -> Callable[..., Any]:
    from megatron.inference.evaluation.harness.batch_limit import BatchLimit, compute_in_batches
    from megatron.inference.evaluation.harness.continuation_scores import score_batch
    from megatron.inference.evaluation.harness.harness_model import HarnessModel
    from megatron.inference.evaluation.harness.response_cache import ResponseCache

    limit = BatchLimit(batch_size)

    def score(method: str, rows: Sequence[Any], longest: int | None) -> list[Any]:
        return compute_in_batches(rows, lambda row: len(row.tokens), limit, partial(score_batch, model))

    tokenizer = PromptTokenizer(build_tokenizer(BYTES), model.config)
    return HarnessModel(
        score, tokenizer, model.context_length, limit.sequences, ResponseCache(None)
    )._loglikelihood_tokens


def their_adapter(model: Any, config: RunConfig, batch_size: int) -> Callable[..., Any]:
    import torch
    from lm_eval.models.huggingface import HFLM

    from megatron.hf.tokenizer_files import write_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), BYTES, config.model)
        adapter = HFLM(pretrained=model, tokenizer=folder, batch_size=batch_size, max_length=config.model.seq_length)
    scored: Callable[..., Any] = torch.inference_mode()(adapter._loglikelihood_tokens)
    return scored


def table(report: dict[str, Any]) -> str:
    """Formats the report as a table."""
    from tools.benchmarks.turns import machine_line

    lines = [
        machine_line(report),
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


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, and writes the JSON file."""
    return run_benchmark(*parse_args(argv), benchmark, table)


if __name__ == "__main__":
    run_tool(main)
