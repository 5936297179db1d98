"""A value is refused at its key, or it can be carried to every place where a run uses it."""

from __future__ import annotations

import json
import math
import os
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.deepspeed_json import deepspeed_config
from megatron.config.effective_config import effective_text
from megatron.config.learning_rate import lr_at
from megatron.config.load_config import LoadedConfig, load_config
from megatron.config.model_size import training_flops
from megatron.config.neox.keys.table import neox_keys, nested_keys
from megatron.config.neox_entries import MapsTo
from megatron.config.optimizer import facts_of
from megatron.config.save_schedule import save_iterations
from megatron.config.sections.run_config import RunConfig, config_text
from megatron.config.sections.section_fields import fields
from megatron.data.datasets import sample_counts
from megatron.errors import ConfigError
from tests.helpers.covers import covered

HERE = Path(__file__).parent
BASES = [HERE / f"published_{name}.yml" for name in ("tokenformer", "pythia")]
KEYS = sorted({*neox_keys(), *nested_keys()})

NUMBERS = [
    *(0, 1, 3, -1, 1000, 10**5, 10**6, 10**8, 10**9, 10**12, 10**13),
    *(2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 10**99),
    *(0.5, -0.5, 1.0, 1.00000001, 1e-45, 1e-300, 1e-30, 1e30, 1e39, 1e300, math.inf, -math.inf, math.nan),
]
TEXTS = [
    *("", " ", "x", "None", "1", "~", "../..", "/", "é" * 150, "x" * 150, "x" * 300, "a/" * 3000, "x" * 20_000),
    *("\0", "a\0b", "\ud800", "a\udfffb", "\x1b[2J", "a\nb", "s3://bucket/run", "https://me:hunter2@host/x", "%s{0}"),
    *("type:(", "type:" + "(" * 1000, "type:a{99999999999}", "1e308, 1e308, 1", "nan, 1", "1,2,3,4"),
]
OTHERS = [
    *(True, False, [], {}, [1], ["x"], [0.5, 0.5], {"enabled": True}, {"enabled": False}, {"x": {"y": 1}}),
    *(["x"] * 300, [1e300], [math.nan], [10**20], [-1], [[]], [["x"] * 3], ["\0"], [None], [[["flash"], 10**15]]),
]
VALUES: list[Any] = [*NUMBERS, *TEXTS, *OTHERS]
CASES = [
    (BASES[number % 2], key, value)
    for number, key in enumerate(KEYS)
    for value in VALUES[number % 2 :: 2 if isinstance(neox_keys().get(key), MapsTo) else 10]
]
"""Half of the values for a key that sets something, a tenth for one that is refused or has no effect."""


def written(value: object) -> str:
    """A value as it stands in a YAML, with escapes."""
    text = json.dumps(value)
    return re.sub(r"-?\b(Infinity|NaN)\b", lambda found: {"I": ".inf", "-": "-.inf", "N": ".nan"}[found[0][0]], text)


FILES = [
    path
    for path, field in fields().items()
    if field.type_schema.get("type", "string") == "string"
    and path.startswith(("data.", "checkpoint.", "monitor.log", "monitor.tensor", "generation.sample", "evaluation."))
]
"""Texts that may become names of files."""


def value_at(run: RunConfig, path: str) -> object:
    return attrgetter(path)(run)


def scalars(value: object) -> list[object]:
    if isinstance(value, dict):
        return [inner for item in value.values() for inner in scalars(item)]
    if isinstance(value, list):
        return [inner for item in value for inner in scalars(item)]
    return [value]


def carry(loaded: LoadedConfig) -> None:
    """Takes a configuration to the places where its values are used; raises what they raise."""
    run = loaded.run
    assert RunConfig.model_validate_json(config_text(run).encode()) == run
    assert "hunter2" not in config_text(run)
    effective_text(loaded).encode()
    for value in scalars(run.model_dump()):
        if isinstance(value, int):
            np.int64(value)
        elif isinstance(value, float):
            assert math.isfinite(float(np.float32(value)))
        elif isinstance(value, str):
            os.fsencode(value)
    for path in FILES:
        for name in scalars(value_at(run, path)):
            # Whether there is such a file does not matter, but there must be a name.
            assert name is None or not Path(f"{name}_document_index.npy").exists()
    smallest = (run.model.layernorm_epsilon, run.model.rms_norm_epsilon, run.training.optimizer.model_dump()["eps"])
    assert all(np.float32(value) > 0 for value in smallest)
    np.random.RandomState(run.training.seed)
    torch.Generator().manual_seed(run.training.seed)
    training, model = run.training, run.model
    for step in (0, 1, training.train_iters // 2, training.train_iters):
        rate = lr_at(step, peak=training.optimizer.lr, schedule=training.lr_schedule, train_iters=training.train_iters)
        assert math.isfinite(rate)
    assert len(save_iterations(run.checkpoint, training.train_iters)) <= 2 * 10**6
    np.int64(training_flops(model, model.padded_vocab_size or 50_304, model.seq_length))
    facts = facts_of(training.optimizer)
    for implementation in facts.implementations.values():
        implementation.arguments(training.optimizer)
    try:
        batch = loaded.batch(run.parallel.model_parallel_size * run.parallel.pipe_parallel_size)
    except ConfigError:
        return
    counts = sample_counts(training, batch.global_batch_size)
    assert max(counts.train, counts.valid, counts.test) < 2**40
    np.int64((counts.train + 1) * (model.seq_length + 1))
    json.dumps(deepspeed_config(run, batch), allow_nan=False)


def refusal(base: Path, key: str, value: object) -> str | None:
    """What the command says of a key with a value; None where it accepts them and they can be carried."""
    try:
        loaded = load_config([base], [f"{key}={written(value)}"])
    except ConfigError as error:
        return str(error)
    carry(loaded)
    return None


def answer(base: Path, key: str, value: object) -> None:
    message = refusal(base, key, value)
    assert message is None or (names_its_key(message, key) and "hunter2" not in message), f"{key}={value!r}: {message}"


def names_its_key(message: str, key: str) -> bool:
    block = key if key in nested_keys() else key.rpartition(".")[0] or key
    return key in message or f"missing key {block}." in message


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("examples", covered([120, len(CASES)], [120]))
def test_every_key_with_hostile_values(examples: int) -> None:
    @settings(max_examples=examples, derandomize=True, database=None, deadline=None)
    @given(st.sampled_from(CASES))
    def test(case: tuple[Path, str, object]) -> None:
        answer(*case)

    if examples < len(CASES):
        test()
    else:
        for case in CASES:
            answer(*case)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=99999999999999999999999", "expected a whole number of at least 0 and below 4,294,967,296"),
        ("train_iters=99999999999999999999", "expected a whole number above 0 and of at most 1,000,000,000,000"),
        ("hidden_size=1000000000", "expected a whole number above 0 and of at most 1,000,000"),
        ("seq_length=1000000000", "expected a whole number above 0 and of at most 100,000,000"),
        ("num_workers=100000", "expected a whole number of at least 0 and of at most 1024"),
        ("optimizer.params.lr=1e300", "expected a number above 0 and of at most 1e+30"),
        ("optimizer.params.eps=1e-300", "expected a number of at least 1e-30"),
        ("train_iters=1000000000000", "training would read 32,000,000,000,000 samples in batches of 32"),
        ("num_layers=100000 hidden_size=999996", "makes 1,199,9"),
        ("save=''", "names no file or folder"),
        (f"save={'x' * 201}", "has a part of more than 200 bytes"),
        ("extra_save_iters=[10000000000000]", "of at least 0 and of at most 1,000,000,000,000"),
        ("checkpoint_factor=1.00001 checkpoint_scale=log", "expected a ratio above 1, of at least 1.0001"),
        ("checkpoint_factor=1 train_iters=1000000000", "asks for more than 1,000,000 checkpoints"),
        ("pipe_partition_method='type:a{99999999999}'", "is no regular expression after type:"),
    ],
    ids=lambda text: text[:40],
)
def test_what_a_run_would_die_of(override: str, said: str) -> None:
    words = override.split(" ")
    with pytest.raises(ConfigError) as caught:
        load_config([BASES[1]], ["attention_config=null", *words])
    assert said in str(caught.value)
    assert f"command line {words[0].partition('=')[0]}: " in str(caught.value)


def test_more_datasets_than_a_byte_numbers() -> None:
    with pytest.raises(ConfigError, match=r"expected 1 to 254 paths, and these are 300"):
        load_config([BASES[1]], [f"train_data_paths={json.dumps(['x'] * 300)}"])
