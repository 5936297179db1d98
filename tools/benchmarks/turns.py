"""Times two contenders that take turns in one process, on an untrained model, and describes the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron.config.model_size import count_parameters
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.loaded_model.loaded_model import LoadedModel
from megatron.model.causal_lm import VocabSize, build_local
from megatron.monitor.format_quantities import format_count
from megatron.monitor.provenance import device_name
from megatron.mpu.parameters import DTYPES
from megatron.mpu.process_group import local_device


def untrained_model(config: RunConfig, vocab_size: int | None) -> LoadedModel:
    """Builds a model with the weights that training starts from, for they make no difference to the time.

    The tokenizer is read only where the vocabulary's size is not given.
    """
    actual = vocab_size or build_tokenizer(config.data.tokenizer).vocab_size
    vocab = VocabSize(actual, padded_vocab_size(config.model, actual))
    model = build_local(config.model, vocab, config.training.seed)
    model = model.to(local_device(), DTYPES[config.training.precision.dtype])
    return LoadedModel(model, config.model, vocab)


def take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Any], list[Any]]:
    """Times two calls by round: returns seconds and ratios, the second's over the first's, and their last results.

    The first round of each is for waking up and does not count. The ratio is taken round by round, within which little
    drifts, and its median over the rounds.
    """
    timed, answers = seconds_by_turns(calls, rounds)
    ratios = [theirs / ours for ours, theirs in zip(*timed.values(), strict=True)]
    report = {"seconds": timed, "ratios": ratios, "ratio": statistics.median(ratios)}
    return report, [answers[name] for name in calls]


def seconds_by_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Times calls by turns: returns each one's seconds by round, without the first, and its last result."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    answers = {}
    for number in range(rounds + 1):
        # Whoever goes first in one round goes last in the next: a steady drift then favours neither.
        for name in list(calls)[:: 1 if number % 2 else -1]:
            start = synchronized_seconds()
            answers[name] = calls[name]()
            seconds[name].append(synchronized_seconds() - start)
    return {name: values[1:] for name, values in seconds.items()}, answers


def synchronized_seconds() -> float:
    """Returns the clock's time when the device has done all that was asked of it [s]."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def machine_report(model: LoadedModel, versions: Mapping[str, str]) -> dict[str, Any]:
    """Describes the model and the machine."""
    return {
        "parameters": count_parameters(model.config, model.vocab.padded),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(),
        "cpu_threads": torch.get_num_threads(),
        "versions": dict(versions),
    }


def machine_line(report: Mapping[str, Any]) -> str:
    """Formats `machine_report` as a line of text."""
    where = f"{report['cpu_threads']} CPU threads" if report["device"] == "cpu" else report["device"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"{format_count(report['parameters'])} parameters, {report['dtype']}, {where}, {versions}"
