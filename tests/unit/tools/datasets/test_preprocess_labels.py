"""Labels mask what the loss does not count: prompts, what precedes a token, and other roles' messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from megatron.data.formats.mmap import IndexedDataset
from megatron.data.prepare.labels import mask_before
from megatron.errors import DataError
from tests.helpers.tokenizer_files import train_bpe
from tools.datasets.preprocess_data import main
from tools.datasets.verify_dataset import main as verify

MASKED = -100
EOD = 0
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]


def preprocess(folder: Path, rows: list[dict[str, Any]], *words: str) -> int:
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / "out"), "--overwrite"]
    return main([*given, "--tokenizer-type", "CharLevelTokenizer", *words])


def read(folder: Path, name: str) -> list[list[int]]:
    dataset = IndexedDataset(folder / f"out_{name}_document")
    return [dataset[number].tolist() for number in range(len(dataset))]


def shown(tokens: list[int], labels: list[int]) -> str:
    """The text of the tokens that count; others are dots."""
    assert len(tokens) == len(labels)
    assert all(label in (token, MASKED) for token, label in zip(tokens, labels, strict=True))
    return "".join("." if label == MASKED else chr(label) if label else "|" for label in labels)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_prompts_do_not_count(tmp_path: Path, workers: str) -> None:
    rows = [{"q": "two+two", "a": "four"}, {"q": "", "a": "only"}, {"q": "nothing", "a": ""}, {"q": "", "a": ""}]
    words = ["--prompt-key", "q", "--completion-key", "a", "--append-eod", "--workers", workers]
    assert preprocess(tmp_path, rows, *words) == 0
    tokens, labels = read(tmp_path, "text"), read(tmp_path, "label")
    assert [shown(*pair) for pair in zip(tokens, labels, strict=True)] == [".......four|", "only|", ".......|"]
    assert bytes(tokens[0]) == b"two+twofour\0"
    assert IndexedDataset(tmp_path / "out_label_document").dtype == np.int32
    assert verify([str(tmp_path / f"out_{name}_document") for name in ("text", "label")]) == 0


def neox_mask(sentence: list[int], pivot: list[int]) -> list[int]:
    """What NeoX's tool does, by a search of its own: the first occurrence is masked, and all before it."""
    for start in range(len(sentence) - len(pivot) + 1):
        if sentence[start : start + len(pivot)] == pivot:
            return [MASKED] * (start + len(pivot)) + sentence[start + len(pivot) :]
    return sentence


def test_what_precedes_a_token_does_not_count(tmp_path: Path) -> None:
    texts = ["Question: x Answer: y", "Answer: Answer: z", "none", "Answer:", "AnsAnswer: w"]
    pattern = ",".join(map(str, b"Answer:"))
    assert preprocess(tmp_path, [{"text": text} for text in texts], "--mask-before-token", pattern, "--append-eod") == 0
    tokens, labels = read(tmp_path, "text"), read(tmp_path, "label")
    assert tokens == [[*text.encode(), EOD] for text in texts]
    assert labels == [neox_mask(document, [*b"Answer:"]) for document in tokens]


def test_masks_equal_a_plain_search() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(0, 9, 6)
        tokens = rng.integers(0, 2, lengths.sum())
        pattern = rng.integers(0, 2, rng.integers(1, 4)).tolist()
        documents = np.split(tokens, np.cumsum(lengths)[:-1])
        expected = [label for document in documents for label in neox_mask(document.tolist(), pattern)]
        assert mask_before(tokens, lengths, pattern).tolist() == expected


def chat(folder: Path, conversations: list[Any], *words: str) -> list[str]:
    config = {"chat_template": TEMPLATE, "eos_token": {"content": "#"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = ["--chat-template", str(folder / "tokenizer_config.json")]
    assert preprocess(folder, [{"conversation": messages} for messages in conversations], *template, *words) == 0
    pairs = zip(read(folder, "conversation"), read(folder, "conversation_label"), strict=True)
    return [shown(*pair) for pair in pairs]


def test_conversations_count_one_role(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text = "<user>hi#<assistant>hello#<user>bye#<assistant>so long#"
    whole = "".join("." for _ in "<user>hi#<assistant>") + "hello#" + "." * len("<user>bye#<assistant>") + "so long#"
    assert chat(tmp_path, [CHAT]) == [whole]
    assert bytes(read(tmp_path, "conversation")[0]).decode() == text
    assert chat(tmp_path, [CHAT, CHAT[:3]], "--append-eod") == [
        f"{whole}|",
        whole[: text.index("<user>bye")] + "." * len("<user>bye#") + ".",
    ]
    last = "." * (len(text) - len("so long#")) + "so long#"
    assert chat(tmp_path, [CHAT], "--only-last") == [last]
    assert chat(tmp_path, [CHAT], "--no-mask") == [text]
    users = chat(tmp_path, [CHAT], "--generation-role", "user")
    assert "hello" not in users[0] and "bye#" in users[0]


def test_malformed_conversations_are_located(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    rows: list[Any] = [CHAT, "text", [], [{"role": "user"}], [{"role": "user", "content": 3}]]
    with pytest.raises(DataError, match=r"in\.jsonl:2: 'conversation' is no conversation") as caught:
        chat(tmp_path, rows)
    assert "1 malformed lines" in str(caught.value)
    with pytest.raises(DataError, match=r"4 malformed lines; at most 3(.|\n)*in\.jsonl:5: .* without texts 'role'"):
        chat(tmp_path, rows, "--max-bad-lines", "3")
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(DataError, match=r"empty\.json: has no text 'chat_template'"):
        preprocess(tmp_path, [], "--chat-template", str(tmp_path / "empty.json"))
    (tmp_path / "wrong.jinja").write_text("{{ messages[-1]['content'] }}")
    with pytest.raises(DataError, match="changes earlier messages when others follow"):
        preprocess(tmp_path, [{"conversation": CHAT}], "--chat-template", str(tmp_path / "wrong.jinja"))
    (tmp_path / "evil.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match=r"the chat template fails \(.*unsafe"):
        preprocess(tmp_path, [{"conversation": CHAT}], "--chat-template", str(tmp_path / "evil.jinja"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask-before-token", "a"], "expected token ids such as 0,1,1270"),
        (["--prompt-key", "q"], "belong together"),
        (["--prompt-key", "q", "--completion-key", "a", "--mask-before-token", "1"], "decides the labels"),
        (["--mask-before-token", "1", "--jsonl-keys", "a", "b"], "labels belong to one key"),
    ],
)
def test_contradicting_flags(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        preprocess(tmp_path, [], *words)
    assert message in capsys.readouterr().err


def test_a_begin_of_sequence_stands_once(tmp_path: Path) -> None:
    """The tokenizer's own <s> is before a prompt, not within a document, and not beside that of a chat template."""
    pytest.importorskip("transformers")
    tokenizer = train_bpe([AddedToken(name, special=True) for name in ("<|endoftext|>", "<s>")])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save(str(tmp_path / "llama.json"))

    def tokens(name: str, row: dict[str, Any], *words: str) -> tuple[list[int], list[int]]:
        (tmp_path / "in.jsonl").write_text(json.dumps(row))
        given = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out"), "--overwrite"]
        kind = ["--tokenizer-type", "HFTokenizer", "--vocab-file", str(tmp_path / "llama.json")]
        assert main([*given, *kind, *words]) == 0
        label = "label" if name == "text" else f"{name}_label"
        return read(tmp_path, name)[0], read(tmp_path, label)[0]

    ids, labels = tokens("text", {"q": "fox", "a": "dog"}, "--prompt-key", "q", "--completion-key", "a")
    fox, dog = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("fox", "dog"))
    assert ids == [begin, *fox, *dog]
    assert labels == [MASKED] * (1 + len(fox)) + dog
    (tmp_path / "chat.jinja").write_text("<s>{% for m in messages %}{{ m['content'] }}{% endfor %}")
    messages = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]
    ids, _ = tokens("conversation", {"conversation": messages}, "--chat-template", str(tmp_path / "chat.jinja"))
    assert ids == [begin, *fox, *dog]
