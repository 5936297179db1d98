"""`python deepy.py generate.py`: prompts in, JSON lines out; and a conversation in a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config.data import TokenizerConfig
from megatron.data.tokenizer import CharLevelTokenizer
from tests.helpers.configs import TOKENFORMER
from tests.helpers.runs import run_ranks, train
from tests.integration.conftest import run_command

Record = dict[str, Any]


@pytest.fixture
def trained(write_config: Callable[..., Path]) -> Path:
    """The YAML of a run of two steps, whose vocabulary is the bytes."""
    config = write_config(TOKENFORMER, train_iters=2)
    train(config)
    return config


def records_of(config: Path, *settings: str, ranks: int = 1) -> list[Record]:
    """What generate.py writes, without the seconds that it took."""
    output = config.parent / "samples.jsonl"
    finished = run_ranks(config, *settings, f"sample_output_file={output}", script="generate", ranks=ranks)
    assert finished.code == 0, finished.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(record.pop("duration_seconds") > 0 for record in records)
    return records


def write_prompts(folder: Path, text: str) -> list[str]:
    """The settings that read prompts from a file of this text."""
    path = folder / "prompts.txt"
    path.write_text(text)
    return ["text_gen_type=input-file", f"sample_input_file={path}"]


def test_the_command_writes_the_records_of_neox(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "samples.jsonl"
    settings = [*write_prompts(tmp_path, "Two words\nthree more words\n"), "maximum_tokens=6", "num_samples=2"]
    finished = run_command(
        ["deepy.py", "generate.py", str(trained), "temperature=1.0", f"sample_output_file={output}", *settings]
    )
    assert finished.returncode == 0, finished.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["context"] for record in records] == ["Two words"] * 2 + ["three more words"] * 2
    assert set(records[0]) == {"context", "text", "length", "finished", "message", "duration_seconds"}
    assert [{**record, "duration_seconds": None} for record in records] == [
        {**record, "duration_seconds": None} for record in records_of(trained, "temperature=1.0", *settings)
    ], "the same seed samples the same text"
    assert len({record["text"] for record in records}) == 4


def test_empty_short_and_long_prompts(trained: Path, tmp_path: Path) -> None:
    prompts = ["", "a", "sixteen tokens..", "", "x" * 40, "  spaces  "]
    records = records_of(trained, *write_prompts(tmp_path, "\n".join(prompts)), "maximum_tokens=8")
    assert [record["context"] for record in records] == prompts
    empty, one, full, again, long, spaces = records
    assert empty["message"] == again["message"] == "the prompt is empty: this is how a document starts"
    assert empty["text"] == again["text"] and empty["length"] == 8
    assert one["message"] is None
    assert "of the prompt's 16 tokens the last 8 were read" in full["message"] and full["length"] == 8
    assert "of the prompt's 40 tokens the last 8 were read" in long["message"]
    more = records_of(trained, *write_prompts(tmp_path, "  spaces  \n"), "maximum_tokens=99")[0]
    assert (more["length"], more["message"]) == (8, "of the prompt's 10 tokens the last 8 were read: it and "
        "maximum_tokens are more than seq_length 16; the sequence has reached seq_length 16")  # fmt: skip
    assert spaces["length"] == 8 and spaces["message"] is not None


def test_layouts_batches_and_the_cache_change_nothing(trained: Path, tmp_path: Path) -> None:
    settings = [*write_prompts(tmp_path, "one\ntwo two\n\nfour\nfive five 5\n"), "num_samples=2", "maximum_tokens=5"]
    settings += ["temperature=1.0", "top_k=50", "top_p=0.95"]
    want = records_of(trained, *settings)
    assert want == records_of(trained, *settings, "train_micro_batch_size_per_gpu=1", "recompute=true")
    assert want == records_of(trained, *settings, "model_parallel_size=2", ranks=2)
    assert want == records_of(trained, *settings, ranks=2)
    assert want != records_of(trained, *settings, "seed=8")


def test_logits_come_with_every_token(trained: Path) -> None:
    record = records_of(trained, "return_logits=true", "maximum_tokens=3")[0]
    assert [len(logits) for logits in record["logits"]] == [512] * record["length"]
    chosen = [logits.index(max(logits)) for logits in record["logits"]]
    assert record["text"] == CharLevelTokenizer(TokenizerConfig()).detokenize(chosen) and record["context"] == ""


def test_prompts_may_hold_lines(trained: Path, tmp_path: Path) -> None:
    settings = write_prompts(tmp_path, "def f():\n    return\nENDsecond\nEND\n")
    records = records_of(trained, *settings, "prompt_end=END", "maximum_tokens=2")
    assert [record["context"] for record in records] == ["def f():\n    return\n", "second\n"]


def test_nothing_to_sample_from(write_config: Callable[..., Path]) -> None:
    finished = run_ranks(write_config(TOKENFORMER), script="generate")
    assert finished.code == 1
    assert "holds no checkpoint to read" in finished.output and "Traceback" not in finished.output


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["text_gen_type=input-file", "sample_input_file=missing.txt"], 1, "missing.txt cannot be read"),
        (["sample_output_file=/dev/null/samples.jsonl"], 1, "cannot be written"),
        (["hidden_size=64"], 2, "hidden_size: checkpoint 32, configuration 64"),
        (["tokenizer_type=HFTokenizer", "vocab_file=TOKENIZER"], 2, "vocabulary of 512 ids"),
        (["model_parallel_size=2"], 2, "1 ranks do not divide"),
        (["text_gen_type=interactive", "return_logits=true"], 2, "a terminal has no room for logits"),
    ],
)
def test_mistakes_are_explained(trained: Path, tmp_path: Path, settings: list[str], code: int, words: str) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    vocabulary = {"<|endoftext|>": 0, "a": 1}
    tokenizer.write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    finished = run_ranks(trained, *[s.replace("TOKENIZER", str(tokenizer)) for s in settings], script="generate")
    assert finished.code == code and words in finished.output, finished.output
    assert "Traceback" not in finished.output
