"""Builds the sample indices of a run before it starts, on a machine without GPUs if you like.

    python tools/datasets/build_index.py tokenformer/150M.yml data/pile.yml --world-size 64

Takes the words of train.py. Without train_batch_size the number of samples depends on the ranks: give --world-size. The
indices lie where the run looks for them: in `index_cache_dir`, or beside each dataset. A start then reads and compares
them once on each machine.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence

from megatron_tokenformer import run_tool

from megatron.config.command_line import parse_command_line
from megatron.config.load_config import load_config, print_warnings
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from tools.command_line import planned_batch_size


def main(argv: Sequence[str]) -> int:
    """Builds what is missing, and says what is there."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s a.yml [b.yml key=value ...] [--world-size R]",
        allow_abbrev=False,
    )
    _, rest = parser.parse_known_args(argv)
    command = parse_command_line(rest)
    loaded = load_config(command.files, command.overrides)
    print_warnings(loaded)
    from megatron.data.datasets import build_datasets, sample_counts

    run, started = loaded.run, time.monotonic()
    size = planned_batch_size(loaded, command)
    tokenizer = build_tokenizer(run.data.tokenizer)
    datasets = build_datasets(
        run.data,
        sample_counts(run.training, size),
        seq_length=run.model.seq_length,
        seed=run.training.seed,
        vocab_size=padded_vocab_size(run.model, tokenizer.vocab_size),
    )
    for part in ("train", "valid", "test"):
        dataset = getattr(datasets, part)
        if dataset is not None:
            print(f"{part}: {len(dataset):,} samples of {run.model.seq_length + 1:,} tokens")
    print(
        f"{len(datasets.index_keys)} indices are there, for {size} samples a step ({time.monotonic() - started:.1f} s)"
    )
    return 0


if __name__ == "__main__":
    run_tool(main)
