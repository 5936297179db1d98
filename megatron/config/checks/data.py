"""Checks of the section `data`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron.config.checks.finding import Check, Finding
from megatron.config.sections.run_config import RunConfig


def _split(run: RunConfig) -> Iterator[Finding]:
    shares = run.data.split.replace("/", ",").split(",")
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or not all(n >= 0 for n in numbers) or not 0 < sum(numbers) < math.inf:
        yield Finding("data.split", "expected up to three shares for training, validation and test, such as 969, 30, 1")


def _one_kind_of_dataset(run: RunConfig) -> Iterator[Finding]:
    data = run.data
    parts = {part: getattr(data, f"{part}_data_paths") for part in ("train", "valid", "test")}
    given = [part for part, paths in parts.items() if paths is not None]
    if data.data_path is not None and given:
        yield Finding("data.data_path", f"contradicts {given[0]}_data_paths; give one split dataset or separate ones")
    elif given and parts["train"] is None:
        yield Finding(f"data.{given[0]}_data_paths", "needs train_data_paths as well")
    elif given and parts["valid"] is None and run.training.eval_iters:
        yield Finding("data.train_data_paths", "needs valid_data_paths as well, or eval_iters: 0")


_MOST_DATASETS = 254
"""Datasets of a blend, as in NeoX: an item's dataset is a byte."""


def _dataset_lists(run: RunConfig) -> Iterator[Finding]:
    for part in ("train", "valid", "test"):
        paths, weights = getattr(run.data, f"{part}_data_paths"), getattr(run.data, f"{part}_data_weights")
        if paths is not None and not 1 <= len(paths) <= _MOST_DATASETS:
            yield Finding(
                f"data.{part}_data_paths", f"expected 1 to {_MOST_DATASETS} paths, and these are {len(paths)}"
            )
        labels = getattr(run.data, f"{part}_label_data_paths")
        if labels is not None and len(labels) != len(paths or ()):
            count = len(paths or ())
            yield Finding(f"data.{part}_label_data_paths", f"has {len(labels)} paths for {count} {part}_data_paths")
        if weights is None:
            continue
        if paths is None or len(weights) != len(paths):
            count = len(paths or ())
            yield Finding(f"data.{part}_data_weights", f"has {len(weights)} weights for {count} {part}_data_paths")
        elif sum(weights) <= 0:
            yield Finding(f"data.{part}_data_weights", "expected numbers of at least 0, not all 0")


def _tokenizer_files(run: RunConfig) -> Iterator[Finding]:
    tokenizer = run.data.tokenizer
    if tokenizer.type == "GPT2BPETokenizer" and tokenizer.vocab_file is not None and tokenizer.merge_file is None:
        yield Finding("data.tokenizer.vocab_file", "GPT2BPETokenizer needs merge_file as well; or use HFTokenizer")


CHECKS: tuple[Check, ...] = (
    _split,
    _one_kind_of_dataset,
    _dataset_lists,
    _tokenizer_files,
)
