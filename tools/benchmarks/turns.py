"""What benchmarks of trained models share: contenders that take turns in one process, arguments, and the report."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.config.model_size import count_parameters
from megatron.config.sections.run_config import RunConfig
from megatron.data.tokenizer import build_tokenizer, padded_vocab_size
from megatron.loaded_model.loaded_model import LoadedModel
from megatron.model.causal_lm import VocabSize, build_local
from megatron.model.number_formats import DTYPES
from megatron.monitor.format_quantities import format_count
from megatron.monitor.provenance import device_name
from megatron.mpu.process_group import local_device


def benchmark_parser(description: str) -> argparse.ArgumentParser:
    """A parser of YAML files, overrides and the options that every benchmark of two contenders has."""
    parser = argparse.ArgumentParser(
        description=description, usage="%(prog)s a.yml [b.yml ...] [key=value ...] [options]", allow_abbrev=False
    )
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds of each (default: 5)")
    parser.add_argument("--vocab-size", type=positive, help="ids of the vocabulary, in place of the tokenizer's")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def positive(text: str) -> int:
    """The value of an argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("expected at least 1")
    return value


def untrained_model(config: RunConfig, vocab_size: int | None) -> LoadedModel:
    """A model with the weights that training starts from: what they are makes no difference to the time.

    The tokenizer is read only where the vocabulary's size is not given.
    """
    actual = vocab_size or build_tokenizer(config.data.tokenizer).vocab_size
    vocab = VocabSize(actual, padded_vocab_size(config.model, actual))
    model = build_local(config.model, vocab, config.training.seed)
    model = model.to(local_device(), DTYPES[config.training.precision.dtype])
    return LoadedModel(model, config.model, vocab)


def take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Any], list[Any]]:
    """Seconds of two calls by round, the second's over the first's; and what each has returned last.

    The first round of each is for waking up and does not count. The ratio is taken round by round, within which little
    drifts, and its median over the rounds.
    """
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
    report = {"seconds": timed, "ratios": ratios, "ratio": statistics.median(ratios)}
    return report, [answers[name] for name in calls]


def _synchronized_seconds() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def machine_report(model: LoadedModel, versions: Mapping[str, str]) -> dict[str, Any]:
    """What is measured, and where."""
    return {
        "parameters": count_parameters(model.config, model.vocab.padded),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(),
        "cpu_threads": torch.get_num_threads(),
        "versions": dict(versions),
    }


def machine_line(report: Mapping[str, Any]) -> str:
    """`machine_report` for people."""
    where = f"{report['cpu_threads']} CPU threads" if report["device"] == "cpu" else report["device"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"{format_count(report['parameters'])} parameters, {report['dtype']}, {where}, {versions}"


def write_report(report: Mapping[str, Any], output: Path | None) -> None:
    """Write the JSON file that was asked for, if any, and say where it is."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        print(output)
