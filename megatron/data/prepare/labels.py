"""Labels beside tokens: for each token itself, or MASKED where the loss does not count it, as in NeoX."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.dataset_format import MASKED
from megatron.data.prepare.batches import (
    Batch,
    Chat,
    EncodedBatch,
    Place,
    PromptCompletion,
    TokenizeOptions,
    append_token,
    compact,
)
from megatron.data.prepare.documents import RawDocument, checked_text, values_of
from megatron.data.prepare.encoders import Encoder
from megatron.data.tokenizer import Tokenizer
from megatron.errors import DataError
from megatron.io.json_files import describe_read_error, read_json_object
from megatron.registry import install_extra, require

Segment = tuple[str, bool]
"""Text of a part of a document, and whether its tokens count."""


def mask_before(
    tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer], pattern: Sequence[int]
) -> npt.NDArray[np.int32]:
    """Returns labels of documents, masked up to the first occurrence of `pattern` in each, which is masked too.

    A document without it is not masked (NeoX, tools/datasets/preprocess_data_with_mask.py).
    """
    labels = tokens.astype(np.int32)
    stop = 0
    for length in lengths.tolist():
        start, stop = stop, stop + length
        document = labels[start:stop]
        places = range(length - len(pattern) + 1)
        found = np.flatnonzero(document[: len(places)] == pattern[0]) if places else ()
        first = next((place for place in found if document[place : place + len(pattern)].tolist() == [*pattern]), None)
        if first is not None:
            document[: first + len(pattern)] = MASKED
    return labels


def encode_segments(
    batch: Batch, options: TokenizeOptions, encoder: Encoder, tokenizer: Tokenizer, fix: Callable[[str], str] | None
) -> EncodedBatch:
    """Encodes prompts and completions, or conversations: each part by itself, as it is at inference.

    Where documents are ended, the ending counts if the last part does. What the tokenizer puts before every text, such
    as <s>, stands once before a prompt, and not in conversations, whose template has it.
    """
    bad: list[tuple[Place, str]] = []
    segments: list[Segment] = []
    owners: list[int] = []
    for number, (place, content) in enumerate(zip(batch.places, batch.contents, strict=True)):
        try:
            parts = list(_segments(RawDocument(place[1], content, 0), options))
        except ValueError as error:
            bad.append((place, str(error)))
            continue
        segments += parts if fix is None else [(fix(text), counts) for text, counts in parts]
        owners += [number] * len(parts)
    eod = tokenizer.eod
    tokens, part_lengths = encoder.encode([text for text, _ in segments])
    goes_on = np.array([isinstance(options.labels, Chat)] * len(owners), dtype=bool)
    goes_on[1:] |= np.array(owners[1:], dtype=int) == np.array(owners[:-1], dtype=int)
    tokens, part_lengths = _without_beginning(tokens, part_lengths, goes_on, tokenizer)
    counts = np.array([counts for _, counts in segments], dtype=bool)
    lengths: npt.NDArray[np.integer] = np.bincount(owners, part_lengths, minlength=len(batch.places)).astype(np.int64)
    last_counts = np.zeros(len(batch.places), dtype=bool)
    last_counts[owners] = counts
    kept = np.flatnonzero(lengths)
    labels = np.where(np.repeat(counts, part_lengths), tokens.astype(np.int64), MASKED)
    lengths = lengths[kept]
    if options.append_eod:
        ended, ended_lengths = append_token(tokens, lengths, eod)
        labels, _ = append_token(labels, lengths, eod)
        labels[(np.cumsum(ended_lengths) - 1)[~last_counts[kept]]] = MASKED
        tokens, lengths = ended, ended_lengths
    text, label = options.outputs()
    most = int(lengths.argmax()) if len(lengths) else 0
    sizes = lengths.astype(np.int32)
    return EncodedBatch(
        outputs={text: (compact(tokens), sizes), label: (labels.astype(np.int32), sizes)},
        documents=len(batch.places) - len(bad),
        empty=len(batch.places) - len(bad) - len(kept),
        bad=bad,
        text_bytes=sum(len(text.encode()) for text, _ in segments),
        longest=(int(lengths[most]), batch.places[kept[most]]) if len(lengths) else (0, (0, 0)),
    )


def _without_beginning(
    tokens: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.int64],
    parts: npt.NDArray[np.bool_],
    tokenizer: Tokenizer,
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
    """Removes what the tokenizer puts before every text from some `parts`.

    Raises DataError for a tokenizer that puts something behind every text.
    """
    added = tokenizer.tokenize("")
    if not added:
        return tokens, lengths
    if tokenizer.tokenize("a")[: len(added)] != added:
        raise DataError("the tokenizer ends every text with a token, so that parts of a document cannot be joined.")
    starts = (np.cumsum(lengths) - lengths)[parts]
    kept = np.ones(len(tokens), dtype=bool)
    for offset in range(len(added)):
        kept[starts + offset] = False
    return tokens[kept], lengths - len(added) * parts


def _segments(raw: RawDocument, options: TokenizeOptions) -> Iterator[Segment]:
    if not raw.number:
        raise ValueError("a .txt file has no keys")
    values = values_of(raw)
    if isinstance(options.labels, PromptCompletion):
        yield checked_text(values, options.labels.prompt), False
        yield checked_text(values, options.labels.completion), True
    elif isinstance(options.labels, Chat):
        yield from chat_segments(_messages(values, options.labels.key), options.labels)


def chat_segments(messages: Sequence[dict[str, Any]], chat: Chat) -> Iterator[Segment]:
    """Yields what each message adds to the rendered conversation.

    The opening of a message of `chat.role` belongs to what comes before it, as a prompt for generation does, where the
    template has one for that role. Raises ValueError when it renders a message otherwise once others follow it.
    """
    before = ""
    for number, message in enumerate(messages):
        is_last = number == len(messages) - 1
        text = _rendered(chat, messages[: number + 1], add_generation_prompt=False)
        if not is_last and messages[number + 1]["role"] == chat.role:
            opened = _rendered(chat, messages[: number + 1], add_generation_prompt=True)
            following = _rendered(chat, messages[: number + 2], add_generation_prompt=False)
            text = opened if following.startswith(opened) else text
        if not text.startswith(before):
            raise ValueError("the chat template changes earlier messages when others follow")
        counts = chat.counts_all or (message["role"] == chat.role and (is_last or not chat.only_last))
        yield text[len(before) :], counts
        before = text


def read_chat_template(path: Path) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Reads a chat template from a .jinja file or a tokenizer_config.json; returns it with the special tokens it uses.

    Raises DataError when the file has none.
    """
    try:
        if path.suffix != ".json":
            return path.read_text(encoding="utf-8"), ()
        content = read_json_object(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: {describe_read_error(error)}. Give a .jinja file or tokenizer_config.json."
        ) from error
    template = content.get("chat_template")
    if not isinstance(template, str):
        raise DataError(f"{path}: has no text 'chat_template'. Give a .jinja file with --chat-template.")
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in content.items()}
    return template, tuple(
        (name, value) for name, value in sorted(tokens.items()) if name.endswith("_token") and isinstance(value, str)
    )


def _messages(values: dict[str, Any], key: str) -> list[dict[str, Any]]:
    messages = values.get(key)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key!r} is no conversation, a list of messages" if key in values else f"no key {key!r}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(part), str) for part in ("role", "content")):
            raise ValueError(f"{key!r} has a message without texts 'role' and 'content'")
        json.dumps(message, ensure_ascii=False).encode()
    return messages


def _rendered(chat: Chat, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
    """Renders messages by the template, in the sandbox of transformers."""
    library = require("transformers.utils.chat_template_utils", "--chat-template", install_extra("hf"))
    from jinja2 import TemplateError

    try:
        (text,), _ = library.render_jinja_template(
            conversations=[list(messages)],
            chat_template=chat.template,
            add_generation_prompt=add_generation_prompt,
            **dict(chat.variables),
        )
    except TemplateError as error:
        raise ValueError(f"the chat template fails ({error})") from None
    return str(text)
