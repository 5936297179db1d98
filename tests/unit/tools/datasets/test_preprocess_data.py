"""The tool writes the same files whatever the compression and the workers, and nothing when it fails."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron.config.sections.data import TokenizerConfig
from megatron.data.formats.mmap import IndexedDataset
from megatron.data.prepare.tokenize_files import TokenizeOptions, tokenize_files
from megatron.errors import DataError, EnvironmentSetupError
from tools.datasets.preprocess_data import main

TEXTS = [f"document {n}\n" * (n % 7) + "é" for n in range(120)]
CHARACTERS = ["--tokenizer-type", "CharLevelTokenizer"]


def lines_of(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(lines_of(TEXTS))
    return path


def documents(prefix: Path) -> list[bytes]:
    """The texts as bytes; the end-of-document token is byte 0."""
    dataset = IndexedDataset(prefix)
    return [bytes(dataset[i].astype(np.uint8)) for i in range(len(dataset))]


def test_documents_end_with_the_token_when_asked(corpus: Path, tmp_path: Path) -> None:
    assert main(["--input", str(corpus), "--output-prefix", str(tmp_path / "plain"), *CHARACTERS]) == 0
    assert documents(tmp_path / "plain_text_document") == [text.encode() for text in TEXTS]
    assert main(["--input", str(corpus), "--output-prefix", str(tmp_path / "ended"), *CHARACTERS, "--append-eod"]) == 0
    assert documents(tmp_path / "ended_text_document") == [text.encode() + b"\0" for text in TEXTS]
    assert IndexedDataset(tmp_path / "ended_text_document").dtype == np.uint16


def test_inputs_of_every_kind_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["a"]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(["b", "c"])))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines_of(["d"])))
    (tmp_path / "d,e.txt").write_text("whole\nfile")
    files = [str(tmp_path / name) for name in ("d,e.txt", "a.jsonl", "b.jsonl.gz", "c.jsonl.zst")]
    inputs = ["--input", files[0], "--input", ",".join(files[1:3]), "--input", files[3]]
    assert main([*inputs, "--output-prefix", str(tmp_path / "out"), *CHARACTERS]) == 0
    assert documents(tmp_path / "out_text_document") == [b"whole\nfile", b"a", b"b", b"c", b"d"]


def test_a_dataset_per_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "t1", "title": "n1", "x": 1}\n{"text": "", "title": "n2"}\n')
    arguments = ["--jsonl-keys", "text", "title", "--input", str(tmp_path / "a.jsonl")]
    assert main([*arguments, "--output-prefix", str(tmp_path / "out"), *CHARACTERS]) == 0
    assert documents(tmp_path / "out_text_document") == [b"t1"]
    assert documents(tmp_path / "out_title_document") == [b"n1", b"n2"]


def test_workers_do_not_change_a_byte(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.prepare.tokenize_files._BATCH_BYTES", 200)
    written = []
    for workers in ("1", "2"):
        prefix = tmp_path / workers
        assert main(["--input", str(corpus), "--output-prefix", str(prefix), *CHARACTERS, "--workers", workers]) == 0
        written.append([prefix.with_name(f"{workers}_text_document.{kind}").read_bytes() for kind in ("bin", "idx")])
    assert written[0] == written[1]
    assert documents(tmp_path / "2_text_document") == [text.encode() for text in TEXTS]


BAD = b'{"text": "good"}\n{"text": 1}\n\n{"text"\n{"text": "fine"}\n{"body": ""}\n'


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_malformed_lines(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(BAD)
    options = TokenizeOptions(TokenizerConfig(type="CharLevelTokenizer"))
    with pytest.raises(DataError) as caught:
        tokenize_files([path], tmp_path / "out", options, workers=workers, max_bad_lines=2)
    assert str(caught.value).splitlines() == [
        "3 malformed lines; at most 2 are allowed (--max-bad-lines):",
        f"  {path}:2: 'text' is not a text",
        f"  {path}:4: not JSON (Expecting ':' delimiter at column 8)",
        f"  {path}:6: no key 'text'",
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_malformed_lines_within_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.jsonl").write_bytes(BAD)
    arguments = ["--input", str(tmp_path / "bad.jsonl"), "--output-prefix", str(tmp_path / "out"), *CHARACTERS]
    assert main([*arguments, "--max-bad-lines", "3"]) == 0
    assert documents(tmp_path / "out_text_document") == [b"good", b"fine"]
    assert "2 documents; left out: 0 empty, 3 malformed" in capsys.readouterr().out
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        f"{tmp_path / 'bad.jsonl'}:{line}" for line in (2, 4, 6)
    ]


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of(["", "a", ""]))
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "out"), *CHARACTERS]
    assert main([*arguments, "--append-eod"]) == 0
    assert documents(tmp_path / "out_text_document") == [b"a\0"]
    assert "left out: 2 empty" in capsys.readouterr().out


def test_failures_leave_nothing(corpus: Path, tmp_path: Path) -> None:
    arguments = ["--output-prefix", str(tmp_path / "out" / "corpus"), *CHARACTERS]
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: no text under 'text'"):
        main([*arguments, "--input", str(tmp_path / "empty.jsonl")])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines_of(TEXTS))[:-9])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: damaged or truncated"):
        main([*arguments, "--input", f"{corpus},{tmp_path / 'cut.jsonl.gz'}"])
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        main([*arguments, "--input", f"{corpus},nowhere.jsonl"])
    assert not list((tmp_path / "out").glob("*"))


def test_ftfy_is_asked_for_by_name(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.registry.is_installed", lambda package: package != "ftfy")
    with pytest.raises(EnvironmentSetupError, match=r"--ftfy needs the package 'ftfy'.*pip install ftfy"):
        main(["--input", str(corpus), "--output-prefix", str(tmp_path / "out"), *CHARACTERS, "--ftfy"])
    assert list(tmp_path.iterdir()) == [corpus]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "expected a whole number above 0, not '0'"),
        (["--dataset-impl", "lazy"], "invalid choice: 'lazy'"),
        (["--tokenizer-type", "Foo"], "invalid choice: 'Foo'"),
    ],
)
def test_wrong_flags(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--input", "a.jsonl", "--output-prefix", "out", *CHARACTERS, *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
