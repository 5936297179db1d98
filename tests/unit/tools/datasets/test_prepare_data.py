"""Prepared data is complete, split by documents, repeatable, and its unigram loss is right."""

import ast
import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from megatron.data.formats.mmap import IndexedDataset
from megatron.errors import DataError
from tools.datasets.prepare_data import hold_out, main, manual_page, own_groups, prepare, python_groups, unigram_loss

FILES = {"tokenizer.json", "data.json"} | {
    f"{part}{kind}"
    for part in ("train", "valid")
    for kind in (".jsonl", *(f"_text_document.{end}" for end in ("bin", "idx", "manifest.json")))
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 paragraphs of words with unequal frequencies."""
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    rng = np.random.default_rng(0)
    words = ["the", "naïve", "fox", "jumps", "over", "東京", "lazily"]
    paragraphs = [" ".join(rng.choice(words, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05], size=30)) for _ in range(300)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def prepared(text: Path) -> Path:
    folder = text.parent / "prepared"
    prepare(folder, text, 300)
    return folder


def read_texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_everything_is_there_and_agrees(text: Path, prepared: Path) -> None:
    assert {path.name for path in prepared.iterdir()} == FILES
    tokenizer = Tokenizer.from_file(str(prepared / "tokenizer.json"))
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    facts = json.loads((prepared / "data.json").read_text())
    assert facts["vocab_size"] == tokenizer.get_vocab_size() <= 300
    texts = {part: read_texts(prepared / f"{part}.jsonl") for part in ("train", "valid")}
    for part, documents in texts.items():
        dataset = IndexedDataset(prepared / f"{part}_text_document")
        tokens = [dataset[i].tolist() for i in range(len(dataset))]
        assert [tokenizer.decode(ids[:-1]) for ids in tokens] == documents
        assert {ids[-1] for ids in tokens} == {0}
        assert facts[f"{part}_documents"] == len(documents)
        assert facts[f"{part}_characters"] == sum(map(len, documents))
        assert facts[f"{part}_tokens"] == sum(map(len, tokens))
    assert sorted(texts["train"] + texts["valid"]) == sorted(text.read_text(encoding="utf-8").split("\n\n"))
    share = facts["valid_characters"] / (facts["valid_characters"] + facts["train_characters"])
    assert 0.04 < share < 0.06


def test_unigram_loss_is_that_of_the_held_out_tokens(prepared: Path) -> None:
    train, valid = (IndexedDataset(prepared / f"{part}_text_document") for part in ("train", "valid"))
    counts = Counter(token for i in range(len(train)) for token in train[i].tolist())
    facts = json.loads((prepared / "data.json").read_text())
    total = sum(counts.values()) + facts["vocab_size"]
    held_out = [token for i in range(len(valid)) for token in valid[i].tolist()]
    want = -math.fsum(math.log((counts[token] + 1) / total) for token in held_out) / len(held_out)
    assert facts["valid_unigram_nats_per_token"] == pytest.approx(want, rel=1e-12)


def test_unigram_loss_by_hand() -> None:
    """Add-one frequencies of (3, 0, 1) are 4/7, 1/7, 2/7."""
    loss = unigram_loss(np.array([3, 0, 1]), np.array([1, 1, 0]))
    assert loss == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2, rel=1e-15)


def test_a_second_preparation_is_the_same(text: Path, prepared: Path, tmp_path: Path) -> None:
    assert main(["--output-dir", str(tmp_path), "--text", str(text), "--vocab-size", "300"]) == 0
    for name in (name for name in FILES if not name.endswith(".manifest.json")):  # which names its inputs' folder
        assert (tmp_path / name).read_bytes() == (prepared / name).read_bytes(), name


def test_lines_of_jsonl_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a\\n\\nb"}\n{"text": " "}\n{"text": "c"}\n')
    assert list(own_groups(path)) == [["a\n\nb"], ["c"]]
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl:2: no key 'text'"):
        list(own_groups(path))


def test_groups_stay_together_and_about_one_in_twenty_is_held_out() -> None:
    groups = [[f"module {n} " * 50, f"manual {n} " * (n % 13)] for n in range(400)]
    train, valid = hold_out(groups, "text")
    assert sorted(train + valid) == sorted(document for group in groups for document in group)
    for group in groups:
        assert (group[0] in valid) == (group[1] in valid) or group[1] == ""
    assert sum(map(len, valid)) / sum(map(len, train + valid)) == pytest.approx(0.05, abs=0.004)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "mine.txt: 0 characters; at least 20,000"),
        ([["x" * 100]] * 100, "mine.txt: 10,000 characters; at least 20,000"),
        ([["x" * 50_000]], "mine.txt: 1 documents are too few .* blank lines"),
    ],
)
def test_too_little_text(groups: list[list[str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        hold_out(groups, "mine.txt")


def test_nothing_is_written_for_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt: 0 characters"):
        main(["--output-dir", str(tmp_path / "out"), "--text", str(tmp_path / "empty.txt")])
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        main(["--output-dir", str(tmp_path / "out"), "--text", str(tmp_path / "nowhere.txt")])
    assert not (tmp_path / "out").exists()


def test_python_brings_reference_and_library() -> None:
    groups = list(islice(python_groups(), 90))
    assert any('The "assert" statement' in group[0] for group in groups)
    modules = [group for group in groups if len(group) == 2]
    assert len(modules) >= 5
    for page, source in modules:
        assert page.startswith(("Module ", "class ")) or "(" in page
        ast.parse(source)


def test_manual_page_of_a_module() -> None:
    source = '''"""Sums."""
class Sum:
    """A sum."""
    def add(self, x: int = 0, *others) -> None:
        """Add x."""
        def inner(): "not public"
    def _private(self): "not shown"
def bare(): ...
async def later(): "Wait."
'''
    assert manual_page("sums", ast.parse(source)) == (
        "Module sums\n\nSums.\n\nclass Sum\n\nA sum.\n\nSum.add(self, x: int=0, *others)\n\nAdd x.\n\nlater()\n\nWait."
    )
    assert manual_page("empty", ast.parse("x = 1")) == ""
