"""Keeps secrets out of the configuration dumps that leave the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping

REDACTED = "<redacted>"

_ALWAYS_SECRET = re.compile(r"secret|passw|passphrase|credential", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"key|token", re.IGNORECASE)
# A tokenizer's settings and the spelling of its special tokens are no secrets, nor is the architecture's name.
_HARMLESS = re.compile(
    r"tokeni[sz](e[dr]?|ation)|tokenformer|(bos|cls|eod|eos|eot|mask|pad|sep|special|unk)[_-]?tokens?", re.IGNORECASE
)


def redact(value: object, name: str = "") -> object:
    """Copies `value`, which stands under `name`, with every secret in it replaced.

    Any value under a name with secret, password, passphrase or credential in it is a secret, at any depth; under a name
    with key or token in it only text is: `wandb_api_key` and `HF_TOKEN` are secrets, `maximum_tokens`, a number,
    and `param_tokens`, a section, are not.
    """
    if isinstance(value, Mapping):
        inherited = f"{name}." if _ALWAYS_SECRET.search(name) else ""
        return {key: redact(item, f"{inherited}{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if value is not None and _ALWAYS_SECRET.search(name):
        return REDACTED
    if isinstance(value, str | bytes) and _SECRET_TEXT.search(_HARMLESS.sub("", name)):
        return REDACTED
    return value
