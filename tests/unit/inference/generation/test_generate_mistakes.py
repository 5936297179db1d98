"""generate.py explains what cannot be generated, or not like this."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import generate
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.errors import UserError


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["text_gen_type=input-file", "sample_input_file=missing.txt"], 1, "missing.txt cannot be read"),
        (["text_gen_type=input-file", "sample_input_file=EMPTY"], 1, "empty.txt is empty. Write prompts into it"),
        (["sample_output_file=/dev/null/samples.jsonl"], 1, "cannot be written"),
        (["hidden_size=64"], 2, "hidden_size: checkpoint 32, configuration 64"),
        (["tokenizer_type=HFTokenizer", "vocab_file=TOKENIZER"], 2, "vocabulary of 512 ids"),
        (["model_parallel_size=2"], 2, "1 ranks do not divide"),
        (["sample_input_file=a/p.txt", "sample_output_file=a/b/../p.txt"], 2, "would overwrite the prompts"),
        (["text_gen_type=interactive", "return_logits=true"], 2, "a terminal has no room for logits"),
    ],
)
def test_mistakes_are_explained(
    settings: list[str],
    code: int,
    words: str,
    tokenformer: Checkpoint,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty.txt").touch()
    places = {"TOKENIZER": "tokenizer.json", "EMPTY": "empty.txt"}
    for word, name in places.items():
        settings = [setting.replace(word, str(tmp_path / name)) for setting in settings]
    tokenizer = tmp_path / "tokenizer.json"
    vocabulary = {"<|endoftext|>": 0, "a": 1}
    tokenizer.write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    config = tokenformer.path.parents[1] / "run.yml"
    arguments = [str(config), *settings]
    with pytest.raises(UserError, match=re.escape(words)) as ended:
        generate.main(arguments)
    assert ended.value.exit_code == code


def test_the_file_of_samples_is_named(
    tokenformer: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = tokenformer.path.parents[1] / "run.yml", tmp_path / "out" / "samples.jsonl"
    assert generate.main([str(config), f"sample_output_file={output}", "maximum_tokens=2"]) == 0
    printed = capsys.readouterr()
    assert f"written: {output}" in printed.err.splitlines()
    assert printed.out == ""
    assert len(output.read_text().splitlines()) == 1
