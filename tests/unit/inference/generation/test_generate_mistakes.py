"""generate.py explains what cannot be generated, or not like this."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import generate
from megatron.checkpointing.store.checkpoint import Checkpoint
from megatron.errors import exit_on_user_error


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["text_gen_type=input-file", "sample_input_file=missing.txt"], 1, "missing.txt cannot be read"),
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
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    vocabulary = {"<|endoftext|>": 0, "a": 1}
    tokenizer.write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    config = tokenformer.path.parents[1] / "run.yml"
    arguments = [str(config), *(setting.replace("TOKENIZER", str(tokenizer)) for setting in settings)]
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(lambda: generate.main(arguments))
    assert ended.value.code == code
    assert words in capsys.readouterr().err
