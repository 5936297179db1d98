"""Turns a batch of raw documents into the tokens of each dataset that is written; runs in the worker processes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from megatron.data.prepare.batches import (
    Batch,
    Chat,
    EncodedBatch,
    MaskBefore,
    Pieces,
    Place,
    PromptCompletion,
    TokenizeOptions,
    append_token,
    compact,
)
from megatron.data.prepare.documents import RawDocument, texts_of
from megatron.data.prepare.encoders import Encoder, build_encoder
from megatron.data.prepare.labels import encode_segments, mask_before
from megatron.data.tokenizer import Tokenizer, build_tokenizer
from megatron.registry import require


class BatchEncoder:
    """Encodes batches by one tokenizer."""

    def __init__(self, options: TokenizeOptions) -> None:
        """Builds tokenizer and encoder. Raises what `build_tokenizer` and `build_encoder` raise."""
        self.options = options
        self.tokenizer: Tokenizer = build_tokenizer(options.tokenizer)
        self.encoder: Encoder = build_encoder(self.tokenizer, options.encoder)
        self._fix: Callable[[str], str] | None = None
        if options.fix_text:
            ftfy = require("ftfy", "--ftfy", "Install it with `pip install ftfy`, or leave the flag out.")
            self._fix = ftfy.fix_text

    def __call__(self, batch: Batch) -> EncodedBatch:
        """Encodes a batch. Raises FastEncoderMismatchError, or DataError of a damaged tokenizer."""
        if isinstance(self.options.labels, PromptCompletion | Chat):
            return encode_segments(batch, self.options, self.encoder, self.tokenizer, self._fix)
        keys = self.options.keys
        texts: dict[str, list[str]] = {key: [] for key in keys}
        owners: dict[str, list[int]] = {key: [] for key in keys}
        bad: list[tuple[Place, str]] = []
        text_bytes = 0
        for number, (place, content) in enumerate(zip(batch.places, batch.contents, strict=True)):
            try:
                document = texts_of(RawDocument(place[1], content, 0), keys)
            except ValueError as error:
                bad.append((place, str(error)))
                continue
            for key, text in document.items():
                fixed = self._fix(text) if self._fix else text
                text_bytes += len(fixed) if fixed.isascii() else len(fixed.encode())
                texts[key].append(fixed)
                owners[key].append(number)
        outputs: dict[str, Pieces] = {}
        empty, longest = 0, (0, (0, 0))
        for key in keys:
            tokens, all_lengths = self.encoder.encode(texts[key])
            kept = all_lengths > 0
            lengths: npt.NDArray[np.integer] = all_lengths[kept]
            empty += len(kept) - len(lengths)
            if self.options.append_eod:
                tokens, lengths = append_token(tokens, lengths, self.tokenizer.eod)
            outputs[key] = compact(tokens), lengths.astype(np.int32)
            if len(lengths):
                most = int(lengths.argmax())
                owner = np.flatnonzero(kept)[most]
                longest = max(longest, (int(lengths[most]), batch.places[owners[key][owner]]))
        if isinstance(self.options.labels, MaskBefore):
            tokens, lengths = outputs[keys[0]]
            outputs["label"] = mask_before(tokens, lengths, self.options.labels.tokens), lengths.astype(np.int32)
        return EncodedBatch(outputs, len(batch.places) - len(bad), empty, bad, text_bytes, longest)
