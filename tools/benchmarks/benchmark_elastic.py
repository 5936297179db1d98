"""Times a layer's step by share of its parameter tokens, forward and backward, against the whole layer.

    python tools/benchmarks/benchmark_elastic.py configs/demo.yml --vocab-size 512 --shares 0.25 0.5 0.75
    python tools/benchmarks/benchmark_elastic.py -d configs tokenformer/150M data/pile --vocab-size 50277 --rows 8192

All layers of the model, without embedding and head, on one micro batch. Contenders take turns. Beside the time stands
what the FLOPs of the layers' products and of attention lead one to expect: attention between the sequence's tokens, and
norms, cost the same at every share.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron_tokenformer import run_tool

from megatron.config.sections.run_config import RunConfig
from tools.benchmarks.benchmark_command import benchmark_parser, run_benchmark
from tools.command_line import positive


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses the options; returns the remaining words too, which are YAML files and overrides."""
    parser = benchmark_parser(__doc__, rounds=5)
    parser.add_argument("--rows", type=positive, help="tokens of the micro batch (default: one sequence)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="shares below 1")
    return parser.parse_known_args(argv)


def benchmark(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Measures every share. Returns what the JSON file holds."""
    import torch

    from megatron.config.model_size import forward_flops
    from megatron.config.token_share import model_of_share
    from megatron.model.speedups import apply_speedups
    from megatron.model.token_shares import TokenShares, sublayer_names
    from megatron.monitor.provenance import device_name, git_commit
    from megatron.mpu.context import ParallelContext
    from megatron.training.build_engine import require_hardware
    from tools.benchmarks.turns import seconds_by_turns, untrained_model

    models = {1.0: config.model} | {share: model_of_share(config.model, share) for share in args.shares}
    length = config.model.seq_length
    loaded = untrained_model(config, args.vocab_size)
    layers = loaded.module.layers.train().requires_grad_(True)
    apply_speedups(layers, require_hardware(config))
    tokens = config.model.param_tokens
    shares = TokenShares(
        loaded.module.modules(),
        loaded.module.named_parameters(),
        1 if tokens is None else tokens.groups,
        ParallelContext.single(),
    )
    batch = max((args.rows or length) // length, 1)
    x_BSD = torch.randn(batch, length, config.model.hidden_size, device=loaded.device).to(loaded.dtype)

    def step(share: float) -> None:
        shares.read(dict.fromkeys(sublayer_names(config.model), share))
        y_BSD = x_BSD.requires_grad_()
        for layer in layers:
            y_BSD = layer(y_BSD)
        torch.autograd.backward(y_BSD.sum())
        layers.zero_grad(set_to_none=True)

    calls: dict[str, Callable[[], Any]] = {f"{share:g}": partial(step, share) for share in models}
    seconds, _ = seconds_by_turns(calls, args.rounds)
    flops = {share: forward_flops(model, loaded.vocab.padded, length) for share, model in models.items()}
    costs = {share: cost.layers + cost.attention for share, cost in flops.items()}
    return {
        "device": device_name(),
        "dtype": config.training.precision.dtype,
        "commit": git_commit(),
        "rows": batch * length,
        "rounds": args.rounds,
        "shares": [
            {
                "share": share,
                "seconds": seconds[f"{share:g}"],
                "ratio": statistics.median(
                    own / whole for own, whole in zip(seconds[f"{share:g}"], seconds["1"], strict=True)
                ),
                "flops_ratio": costs[share] / costs[1.0],
            }
            for share in sorted(models)
        ],
    }


def table(report: dict[str, Any]) -> str:
    """Lays a report out as text."""
    lines = [
        f"{report['rows']:,} rows, {report['dtype']}, {report['device']}",
        "share  time/whole  FLOP/whole  seconds",
    ]
    for row in report["shares"]:
        seconds = statistics.median(row["seconds"])
        lines.append(f"{row['share']:<5g}  {row['ratio']:>10.3f}  {row['flops_ratio']:>10.3f}  {seconds:.4f}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark, prints the table, and writes the report if asked."""
    args, words = parse_args(argv)
    return run_benchmark(args, words, benchmark, table)


if __name__ == "__main__":
    run_tool(main)
