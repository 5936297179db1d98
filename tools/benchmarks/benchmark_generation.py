"""Times greedy generation, with a cache, against `transformers` running the same weights in the same process.

    python tools/benchmarks/benchmark_generation.py configs/demo.yml --output generation.json
    python tools/benchmarks/benchmark_generation.py -d configs tokenformer/150M data/pile --vocab-size 50277

The weights are those that training starts from. `transformers` runs its own GPT-NeoX, or the TokenFormer of megatron/hf
that ships with exports. Both generate the same number of tokens after the same random prompts, in turns, so that a
machine that gets slower or faster does so for both.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_tokenformer import run_tool

from megatron.config.sections.run_config import RunConfig
from megatron.errors import ConfigError
from megatron.registry import install_extra, require
from tools.benchmarks.benchmark_command import benchmark_parser, run_benchmark
from tools.command_line import positive

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.loaded_model.loaded_model import LoadedModel

NewTokens = list[list[int]]


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the options; returns the remaining words too, which are YAML files and overrides."""
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--batch", type=positive, default=1, help="prompts at a time (default: 1)")
    parser.add_argument("--prompt-tokens", type=positive, default=32, help="tokens of each prompt (default: 32)")
    parser.add_argument("--new-tokens", type=positive, default=64, help="tokens that follow each (default: 64)")
    return parser.parse_known_args(argv)


def benchmark(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Measures both contenders by round. Returns what the JSON file holds.

    Raises ConfigError for lengths beyond the context.
    """
    require("transformers", "benchmark_generation.py", install_extra("hf"))
    import torch
    import transformers

    from tools.benchmarks.turns import machine_report, take_turns, untrained_model

    if args.prompt_tokens + args.new_tokens > config.model.seq_length:
        raise ConfigError(
            f"--prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} are more than seq_length "
            f"{config.model.seq_length}. Lower one of them."
        )
    model = untrained_model(config, args.vocab_size)
    generator = torch.Generator().manual_seed(config.training.seed)
    prompts = torch.randint(model.vocab.actual, (args.batch, args.prompt_tokens), generator=generator)
    calls = {
        "ours": our_generate(model, prompts, args.new_tokens),
        "transformers": their_generate(model, config, prompts, args.new_tokens),
    }
    timed, (ours, theirs) = take_turns(calls, args.rounds)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    shape = {name: getattr(args, name) for name in ("batch", "prompt_tokens", "new_tokens", "rounds")}
    rates = {
        name: args.batch * args.new_tokens / statistics.median(values) for name, values in timed["seconds"].items()
    }
    return machine_report(model, versions) | shape | timed | {"tokens_per_second": rates, "same_tokens": ours == theirs}


def our_generate(model: LoadedModel, prompts: Tensor, new_tokens: int) -> Callable[[], NewTokens]:
    from megatron.loaded_model.generate_tokens import generate_tokens
    from megatron.loaded_model.sampling import SamplingSettings

    sampling = SamplingSettings(maximum_tokens=new_tokens)

    def generate() -> NewTokens:
        found = generate_tokens(model, prompts.tolist(), sampling, start_token=0, stop_tokens=())
        return [continuation.tokens for continuation in found]

    return generate


def their_generate(ours: LoadedModel, config: RunConfig, prompts: Tensor, new_tokens: int) -> Callable[[], NewTokens]:
    import torch
    import transformers

    from tools.benchmarks.transformers_model import transformers_model

    model = transformers_model(ours.module, config, ours.vocab)
    greedy = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
        suppress_tokens=list(range(ours.vocab.actual, ours.vocab.padded)) or None,
    )

    def generate() -> NewTokens:
        inputs = prompts.to(ours.device)
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=greedy)
        new: NewTokens = output[:, inputs.shape[1] :].tolist()
        return new

    return generate


def table(report: dict[str, Any]) -> str:
    """Formats the report as a table."""
    from tools.benchmarks.turns import machine_line

    ratios = report["ratios"]
    same = "the same tokens" if report["same_tokens"] else "tokens that differ"
    return "\n".join(
        [
            machine_line(report),
            f"{report['batch']} prompts of {report['prompt_tokens']} tokens, {report['new_tokens']} new tokens each; "
            f"median of {report['rounds']} rounds, the prompts' own time included",
            "",
            *(f"{name:14}{rate:>10.1f} tokens/s" for name, rate in report["tokens_per_second"].items()),
            "",
            f"ours over transformers: {report['ratio']:.2f} (rounds: {min(ratios):.2f} to {max(ratios):.2f}), {same}",
        ]
    )


def main(argv: Sequence[str]) -> int:
    """Measures, prints the table, and writes the JSON file."""
    return run_benchmark(*parse_args(argv), benchmark, table)


if __name__ == "__main__":
    run_tool(main)
