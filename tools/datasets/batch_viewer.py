"""Shows exactly the tokens that a range of training steps reads.

    python tools/datasets/batch_viewer.py config.yml --start 100 --end 102 --output batches.npy
    python tools/datasets/batch_viewer.py config.yml data.yml train_iters=2000 --start 1 --end 1 --text

Steps are numbered as `iteration` in metrics.jsonl: the first is 1, and --end is included. The array is int64
[steps, global batch, seq_length + 1]; rows are in the order of consumption, in which ranks and accumulation steps take
contiguous blocks. Without train_batch_size the global batch depends on the ranks: give --world-size.

Where `save` or `load` holds checkpoints of the run, they decide the data order, as they do when training resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_tokenformer import run_tool

import numpy as np
import numpy.typing as npt

from megatron.checkpointing.store.run_state import RunState
from megatron.config.command_line import CommandLine, parse_command_line
from megatron.config.load_config import LoadedConfig, load_config, print_warnings
from megatron.config.local_path import local_path
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.data.dataset_manifest import require_manifests, tokenizer_facts
from megatron.data.tokenizer import END_OF_DOCUMENT, Tokenizer, build_tokenizer, padded_vocab_size
from megatron.errors import CheckpointError, ConfigError
from megatron.io.durable import atomic_write
from tools.command_line import planned_batch_size


def main(argv: Sequence[str]) -> int:
    """Writes or prints the tokens of the steps."""
    args, command = parse_args(argv)
    loaded = load_config(command.files, command.overrides)
    print_warnings(loaded)
    last = loaded.run.training.train_iters
    if args.end > last:
        raise ConfigError(
            f"--end {args.end}: the run ends with step {last} (`train_iters`), and what a longer one reads depends on "
            f"its length. View steps up to {last}, or add `train_iters=...` as that run will have it."
        )
    tokenizer = build_tokenizer(loaded.run.data.tokenizer)
    size = planned_batch_size(loaded, command)
    from megatron.data.data_fingerprint import data_fingerprint

    data, seed, seq_length = loaded.run.data, loaded.run.training.seed, loaded.run.model.seq_length
    fingerprint = data_fingerprint(data, seq_length=seq_length, seed=seed)
    require_manifests(data, tokenizer_facts(data.tokenizer, tokenizer), fingerprint)
    steps = range(args.start, args.end + 1)
    shape = (len(steps), size, loaded.run.model.seq_length + 1)
    with ExitStack() as stack:
        array: npt.NDArray[np.int64] | None = None
        if args.output is not None:
            temporary = stack.enter_context(atomic_write(args.output))
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.int64, shape=shape)
        for position, samples in enumerate(step_samples(loaded, tokenizer.vocab_size, size, steps)):
            if array is not None:
                array[position] = samples
            if args.text:
                print_text(steps[position], samples, tokenizer)
    if args.output is not None:
        print(f"{args.output}: int64 {list(shape)}, steps {args.start} to {args.end}", file=sys.stderr)
    return 0


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, CommandLine]:
    """Parses the viewer's own flags, and the rest as deepy.py and train.py do."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s a.yml [b.yml key=value ...] --start N --end M [--output FILE.npy] [--text] [--world-size R]",
        allow_abbrev=False,
    )
    parser.add_argument("--start", type=int, required=True, help="first step, counted from 1")
    parser.add_argument("--end", type=int, required=True, help="last step")
    parser.add_argument("--output", type=local_path, help="array to write (.npy)")
    parser.add_argument("--text", action="store_true", help="print the samples as text")
    args, rest = parser.parse_known_args(argv)
    if not 1 <= args.start <= args.end:
        parser.error(f"steps {args.start} to {args.end}: --start counts from 1, and --end is not before it")
    if args.output is None and not args.text:
        parser.error("nothing to do: give --output, --text or both")
    return args, parse_command_line(rest)


def step_samples(loaded: LoadedConfig, vocab_size: int, size: int, steps: range) -> Iterator[npt.NDArray[np.int64]]:
    """Yields the samples of each step [global batch, seq_length + 1].

    Raises ConfigError for steps that were trained with another global batch than the configuration's.
    """
    from megatron.data.datasets import SampleCounts, build_datasets, sample_counts

    run = loaded.run
    state = resumed_state(run.checkpoint)
    num_samples = sample_counts(run.training, size).train if state is None else state.train_index_samples
    dataset = build_datasets(
        run.data.model_copy(update={"train_label_data_paths": None}),
        SampleCounts(train=num_samples, valid=0, test=0),
        seq_length=run.model.seq_length,
        seed=run.training.seed,
        vocab_size=padded_vocab_size(run.model, vocab_size),
    ).train
    done, consumed = (0, 0) if state is None else (state.iteration, state.consumed_train_samples)
    if steps.start <= done and consumed != done * size:
        raise ConfigError(
            f"train_batch_size: the run's checkpoint has read {consumed:,} samples in {done:,} steps, not {size:,} a "
            f"step. Give the batch of those steps, or view steps from {done + 1:,} on."
        )
    for step in steps:
        first = consumed + (step - 1 - done) * size
        yield np.stack([dataset[item % len(dataset)] for item in range(first, first + size)])


def resumed_state(checkpoint: CheckpointConfig) -> RunState | None:
    """Returns the state of this run's newest checkpoint, or of the one that it continues; None without any."""
    from megatron.checkpointing.store.fetch import local_source
    from megatron.checkpointing.store.find_checkpoint import find_checkpoint

    found = None
    if checkpoint.save is not None:
        found = find_checkpoint(Path(checkpoint.save), None, "sizes")
    if found is None and checkpoint.load is not None and not checkpoint.finetune:
        source = local_source(checkpoint.load, checkpoint.iteration, checkpoint)
        found = find_checkpoint(source, checkpoint.iteration, "sizes")
        if found is None:
            raise CheckpointError(f"load: {checkpoint.load} holds no checkpoint. Correct the path, or remove `load`.")
    return None if found is None else found.state


def print_text(step: int, samples: npt.NDArray[np.int64], tokenizer: Tokenizer) -> None:
    """Prints each sample under a heading, with the ends of documents shown."""
    for row, tokens in enumerate(samples):
        print(f"--- step {step}, sample {row}")
        ends = np.flatnonzero(tokens == tokenizer.eod)
        pieces = [piece[piece != tokenizer.eod].tolist() for piece in np.split(tokens, ends + 1)]
        print(END_OF_DOCUMENT.join(tokenizer.detokenize(piece) for piece in pieces))


if __name__ == "__main__":
    run_tool(main)
