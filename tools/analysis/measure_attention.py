"""Measures how much of their context a model's attention heads use, layer by layer, and writes tables and figures.

    python tools/analysis/measure_attention.py runs/150M --text book.txt --output attention
    python tools/analysis/measure_attention.py runs/150M --iteration all --data_path data/valid_text_document \\
        --output attention
    python tools/analysis/measure_attention.py runs/small runs/large gpt2-medium --text book.txt --output attention

MODEL is a run's folder, one of its global_stepN folders, or a Hugging Face folder of any causal language model. Each
reads the same fixed text by its own tokenizer, in sequences of --length tokens from its beginning. Per layer and head:

  k*       approximate rank: the least number of singular values of the attention matrix whose squares reach --tau of
           their sum (mean over sequences; of a layer, the largest of its heads)
  m*       column mass: the least number of columns whose squared norms do (mean over sequences, and over heads)
  entropy  of a query's probabilities [nats], mean over queries
  sink     probability on the first token, mean over the queries after it

after "When Attention Collapses" (arXiv:2404.08634). Low rank alone is no laziness: the nulls, a head that attends to
all earlier tokens alike and one that attends to the first token alone, are in every table and figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tokenformer import run_tool

from megatron.config.local_path import local_path
from megatron.errors import CheckpointError, ConfigError, DataError, EnvironmentSetupError, os_errors_as
from megatron.registry import install_extra, require
from tools.command_line import positive, progress_bar, stay_on_cpu, tool_parser

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.analysis.attention_report import MeasuredModel
    from megatron.checkpointing.store.checkpoint import Checkpoint

SEQUENCES, LENGTH = 100, 100
"""Of the paper."""


def main(argv: Sequence[str]) -> int:
    """Measures every model, prints a table for each, and writes the report."""
    args = parse_args(argv)
    stay_on_cpu()
    from megatron.analysis.attention_report import write_report

    measured = [found for path in args.models for found in measure(path, args)]
    print_tables(measured, args.length, args.tau)
    with os_errors_as(EnvironmentSetupError, str(args.output)):
        for file in write_report(measured, args.output, args.length, args.tau):
            print(file)
    return 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses which models to measure, and on what."""
    parser = tool_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", type=local_path, help="run, checkpoint, or HF folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=local_path, help="UTF-8 text, read by each model's own tokenizer")
    source.add_argument("--data_path", type=local_path, metavar="PREFIX", help="dataset of the models' tokenizer")
    parser.add_argument("--output", type=local_path, required=True, help="folder for tables and figures")
    parser.add_argument(
        "--iteration", nargs="+", metavar="N", default=[], help="steps of a run's checkpoints, or all (the newest)"
    )
    parser.add_argument("--sequences", type=positive, default=SEQUENCES, help=f"sequences to read ({SEQUENCES})")
    parser.add_argument("--length", type=positive, default=LENGTH, help=f"tokens of a sequence ({LENGTH})")
    parser.add_argument("--tau", type=_share, default=0.9, help="share that k* and m* reach (0.9)")
    args = parser.parse_args(argv)
    if args.length < 2:
        parser.error("--length: a sequence of one token has no choice what to attend to; use 2 or more")
    if args.iteration != ["all"] and not all(word.isdecimal() for word in args.iteration):
        parser.error(f"--iteration: expected steps, or all, not {' '.join(args.iteration)}")
    return args


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and below 1, not {text!r}")
    return value


def measure(path: Path, args: argparse.Namespace) -> Iterator[MeasuredModel]:
    """Yields what is measured of a model; of a run, of each checkpoint that is asked for, the earliest first.

    Raises CheckpointError, ConfigError and DataError for what cannot be measured.
    """
    if is_huggingface(path):
        if args.iteration:
            raise ConfigError(f"--iteration: {path} is a Hugging Face folder, which has no steps.")
        yield measure_folder(path, args)
        return
    for checkpoint in checkpoints(path, args.iteration):
        yield measure_step(path, checkpoint, args)


def is_huggingface(path: Path) -> bool:
    """Tells whether a folder is of Hugging Face. Raises CheckpointError when it is nothing that can be measured."""
    from megatron.checkpointing.store.checkpoint import CHECKPOINT_NAME, checkpoint_paths

    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder. Name a run's folder, a checkpoint, or a Hugging Face folder.")
    if CHECKPOINT_NAME.fullmatch(path.resolve().name) or any(True for _ in checkpoint_paths(path)):
        return False
    if (path / "config.json").is_file():
        return True
    raise CheckpointError(
        f"{path} holds neither checkpoints (global_stepN) nor a Hugging Face model (config.json). Correct the path."
    )


def checkpoints(path: Path, steps: Sequence[str]) -> list[Checkpoint]:
    """Finds the checkpoints that are asked for, by step. Raises CheckpointError for what is missing or damaged."""
    from megatron.checkpointing.store.checkpoint import checkpoint_paths
    from megatron.checkpointing.store.find_checkpoint import find_checkpoint, newest_checkpoint

    if not steps:
        return [newest_checkpoint(path, "sizes")]
    numbers = sorted(int(step) for step in steps) if steps != ["all"] else sorted(n for n, _ in checkpoint_paths(path))
    found = [find_checkpoint(path, number, "sizes") for number in numbers]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def measure_step(path: Path, checkpoint: Checkpoint, args: argparse.Namespace) -> MeasuredModel:
    """Measures one checkpoint of a run."""
    from megatron.analysis.attention_report import MeasuredModel
    from megatron.analysis.measure_attention import measure_checkpoint
    from megatron.data.first_tokens import tokens_of_text
    from megatron.data.tokenizer import build_tokenizer

    name = str(checkpoint.path.parent)
    data, layers = checkpoint.config.data, checkpoint.config.model.num_layers
    sequences = read_sequences(args, lambda: tokens_of_text(args.text, build_tokenizer(data.tokenizer)), data.impl)
    with progress_bar() as bar:
        task = bar.add_task(f"{name}, step {checkpoint.state.iteration:,}", total=args.sequences * layers)
        heads = measure_checkpoint(checkpoint, sequences, args.tau, lambda done: bar.advance(task, done))
    return MeasuredModel(name, checkpoint.state.iteration, heads)


def measure_folder(path: Path, args: argparse.Namespace) -> MeasuredModel:
    """Measures a model of Hugging Face."""
    require("transformers", str(path), install_extra("hf"))
    from megatron.analysis.attention_report import MeasuredModel
    from megatron.analysis.huggingface_model import folder_tokens, load_huggingface
    from megatron.analysis.measure_attention import measure_huggingface
    from megatron.config.sections.data import DataConfig

    sequences = read_sequences(args, lambda: folder_tokens(path, args.text), DataConfig().impl)
    model = load_huggingface(path)
    layers = model.config.get_text_config().num_hidden_layers
    with progress_bar() as bar:
        task = bar.add_task(str(path), total=args.sequences * layers)
        heads = measure_huggingface(model, str(path), sequences, args.tau, lambda done: bar.advance(task, done))
    return MeasuredModel(str(path), None, heads)


def read_sequences(args: argparse.Namespace, of_text: Callable[[], list[int]], impl: str) -> Tensor:
    """Returns the token ids [B, S] that a model is measured on: running text, cut without gaps.

    Raises DataError when there are too few.
    """
    import torch

    from megatron.data.first_tokens import first_tokens_of_dataset

    wanted = args.sequences * args.length
    source = args.data_path or args.text
    found = of_text() if args.data_path is None else first_tokens_of_dataset(source, impl, wanted)
    if len(found) < wanted:
        raise DataError(
            f"{source} holds {len(found):,} tokens, and {args.sequences} sequences of {args.length} need {wanted:,}. "
            f"Give more text, or --sequences {max(len(found) // args.length, 1)}."
        )
    return torch.tensor(found[:wanted], dtype=torch.int64).view(args.sequences, args.length)


def print_tables(measured: Sequence[MeasuredModel], length: int, tau: float) -> None:
    """Prints each model's layers, and the nulls."""
    from megatron.analysis.attention_statistics import STATISTICS, layer_statistics, null_statistics

    heading = f"{'layer':>16}{'max k*':>9}{'mean m*':>9}{'entropy':>9}{'sink':>7}"
    widths = dict(zip((each.name for each in STATISTICS), ("9.2f", "9.2f", "9.3f", "7.3f"), strict=True))
    for each in measured:
        layers = layer_statistics(each.heads)
        print(each.label, heading, sep="\n")
        for layer in range(len(layers["rank"])):
            values = "".join(f"{float(layers[name][layer]):{width}}" for name, width in widths.items())
            print(f"{layer + 1:>16}{values}")
        collapsed = int((layers["rank"] < 1.5).sum())
        single = int(((layers["rank"] < 1.5) & (layers["column_mass"] < 1.5)).sum())
        print(
            f"  {collapsed} of {len(layers['rank'])} layers are of rank 1 (k* below 1.5 in every head); in {single} of "
            "them the heads attend to single columns (m* below 1.5)"
        )
    print(f"nulls at {length} tokens, tau {tau:g}")
    for name, statistics in null_statistics(length, tau).items():
        print(f"{name:>16}" + "".join(f"{statistics[key]:{width}}" for key, width in widths.items()))


if __name__ == "__main__":
    run_tool(main)
