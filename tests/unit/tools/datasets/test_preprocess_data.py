"""The tool writes the same files whatever the compression and the workers, and nothing when it fails."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megatron.config.sections.data import TokenizerConfig
from megatron.data.dataset_manifest import read_manifest
from megatron.data.formats.mmap import IndexedDataset
from megatron.data.prepare import encoders
from megatron.data.prepare.batches import TokenizeOptions
from megatron.data.prepare.documents import Limits
from megatron.data.prepare.inputs import find_inputs
from megatron.data.prepare.tokenize_files import Work, tokenize_files
from megatron.data.prepare.tokenizing_pool import TokenizingPool
from megatron.errors import DataError, EnvironmentSetupError, UserError
from megatron.io.lease import leased
from tests.helpers.tokenizer_files import write_tokenizers
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
    with pytest.raises(DataError) as caught, TokenizingPool(options, workers) as pool:
        tokenize_files(find_inputs([str(path)]), tmp_path / "out", pool, Work(max_bad_lines=2))
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


def run(tmp_path: Path, inputs: object, name: str = "out", *arguments: str) -> int:
    return main(["--input", str(inputs), "--output-prefix", str(tmp_path / name), *CHARACTERS, *arguments])


@pytest.mark.full
def test_datasets_of_hugging_face_are_read_like_lines(tmp_path: Path) -> None:
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    table = pyarrow.table({"text": TEXTS, "title": [f"t{n}" for n in range(len(TEXTS))]})
    datasets.Dataset(table).save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"train": datasets.Dataset(table)}).save_to_disk(tmp_path / "splits")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes(lines_of(TEXTS))
    expected = [text.encode() for text in TEXTS]
    for name in ("saved", "splits", "splits/train"):
        run(tmp_path, tmp_path / name, "out", "--overwrite")
        assert documents(tmp_path / "out_text_document") == expected
    hub = ["--hf-dataset", str(tmp_path / "hub"), "--output-prefix", str(tmp_path / "hub_out"), *CHARACTERS]
    assert main(hub) == 0
    assert documents(tmp_path / "hub_out_text_document") == expected


def test_parquet_is_read_like_lines(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": TEXTS, "title": [f"t{n}" for n in range(len(TEXTS))]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=50)
    run(tmp_path, tmp_path / "a.parquet")
    assert documents(tmp_path / "out_text_document") == [text.encode() for text in TEXTS]
    rows = find_inputs([str(tmp_path / "a.parquet")])[0].read(["title"], 97, Limits())
    assert [(raw.number, raw.content) for raw in rows][:2] == [(98, {"title": "t97"}), (99, {"title": "t98"})]
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body'; it has text, title"):
        run(tmp_path, tmp_path / "a.parquet", "other", "--jsonl-keys", "body")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet: not a whole Parquet file"):
        run(tmp_path, tmp_path / "cut.parquet", "other")
    null = pyarrow.table({"text": ["a", None, "b"]})
    parquet.write_table(null, tmp_path / "null.parquet")
    with pytest.raises(DataError, match=r"null\.parquet, row 2: 'text' is not a text"):
        run(tmp_path, tmp_path / "null.parquet", "other")


def test_a_finished_request_is_not_done_again_and_another_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, corpus)
    report = capsys.readouterr().out
    prefix = tmp_path / "out_text_document"
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    with monkeypatch.context() as patch:
        patch.setattr(TokenizingPool, "encode", None)
        run(tmp_path, corpus)
    assert capsys.readouterr().out == report
    with pytest.raises(DataError, match="a dataset is there already, made from other inputs, options or tokenizer"):
        run(tmp_path, corpus, "out", "--append-eod")
    corpus.write_bytes(lines_of([*TEXTS, "one more"]))
    with pytest.raises(DataError, match="a dataset is there already"):
        run(tmp_path, corpus)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before
    run(tmp_path, corpus, "out", "--overwrite")
    assert documents(prefix)[-1] == b"one more"
    (tmp_path / "out_text_document.manifest.json").unlink()
    with pytest.raises(DataError, match="a dataset is there already, without a manifest"):
        run(tmp_path, corpus)


def test_the_manifest_tells_what_a_dataset_is(corpus: Path, tmp_path: Path) -> None:
    run(tmp_path, corpus, "out", "--append-eod")
    prefix = tmp_path / "out_text_document"
    manifest = read_manifest(prefix)
    assert manifest is not None and manifest.tokenizer is not None
    for suffix, facts in manifest.files.items():
        content = prefix.with_name(prefix.name + suffix).read_bytes()
        assert (facts.size, facts.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.tokens == sum(len(text.encode()) + 1 for text in TEXTS) == len(np.fromfile(f"{prefix}.bin", "<u2"))
    assert (manifest.documents, manifest.append_eod, manifest.kind) == (len(TEXTS), True, "tokens")
    assert (manifest.tokenizer.type, manifest.tokenizer.vocab_size, manifest.tokenizer.eod) == (
        "CharLevelTokenizer", 512, 0,
    )  # fmt: skip
    (source,) = manifest.inputs
    assert source["sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert (source["documents"], source["size"]) == (len(TEXTS), corpus.stat().st_size)
    assert manifest.counts["text_bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_shards_are_divided_finished_alone_and_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        (tmp_path / f"in{number}.jsonl").write_bytes(lines_of(TEXTS[number::5] if number != 2 else []))
    pattern = tmp_path / "in*.jsonl"
    run(tmp_path, pattern, "out", "--shard", "2/2")
    names = {path.name for path in (tmp_path / "out_shards").iterdir()}
    kinds = ("bin", "idx", "manifest.json")
    assert names == {f"{n}_in{n - 1}_text_document.{kind}" for n in (2, 4) for kind in kinds}
    capsys.readouterr()
    run(tmp_path, pattern, "out", "--shard", "1/2")
    assert "72 documents; left out: 0 empty" in capsys.readouterr().out.replace("48", "72")
    assert read_manifest(tmp_path / "out_shards" / "3_in2_text_document").documents == 0
    assert documents(tmp_path / "out_shards" / "5_in4_text_document") == [text.encode() for text in TEXTS[4::5]]
    with monkeypatch.context() as patch:
        patch.setattr(TokenizingPool, "encode", None)
        run(tmp_path, pattern, "out", "--shard", "1/1")
    with pytest.raises(DataError, match="--shard 1/6: there are 5 inputs"):
        run(tmp_path, pattern, "out", "--shard", "1/6")


def test_a_wrong_fast_encoder_is_found_out_and_replaced(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is held against the tokenizer when it is built, and on a sample of what it encodes."""
    pytest.importorskip("fastokens")
    write_tokenizers(tmp_path)
    words = ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(tmp_path / "tokenizer.json")]

    def tokens(name: str, *arguments: str) -> bytes:
        assert main(["--input", str(corpus), "--output-prefix", str(tmp_path / name), *words, *arguments]) == 0
        return (tmp_path / f"{name}_text_document.bin").read_bytes()

    right = tokens("right", "--encoder", "tokenizers")
    assert tokens("fast", "--encoder", "fastokens") == right
    original = encoders.FastEncoder._encode

    def wrong(self: encoders.FastEncoder, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = original(self, texts)
        return np.where(ids == ids.max(initial=0), 0, ids), lengths

    monkeypatch.setattr(encoders.FastEncoder, "_encode", wrong)
    with pytest.raises(UserError, match=r"fastokens encodes .* otherwise than the tokenizer does"):
        tokens("refused", "--encoder", "fastokens")
    assert tokens("auto") == right
    monkeypatch.setattr(encoders.FastEncoder, "check", lambda self, added: None)
    assert tokens("late") == right
    assert "Starting over with the tokenizer itself" in caplog.text


@pytest.mark.full
def test_a_second_writer_is_refused(corpus: Path, tmp_path: Path) -> None:
    with (
        leased(tmp_path, "", file=tmp_path / "out.lease"),
        pytest.raises(DataError, match=r"is being written by process \d+"),
    ):
        run(tmp_path, corpus)
