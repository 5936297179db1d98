"""Keeps secrets out of messages, and out of the configuration dumps that leave the machine."""

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
_SCHEME = r"(?P<scheme>\b[a-z][a-z0-9+.-]{0,30}://)"
# The second form is a password with a / or ? in it, as nobody should but many do write it; digits there are a port.
_USER_OF_URL = re.compile(_SCHEME + r"(?:[^/?#\s]{0,128}@|[^/?#\s:@]{1,128}:(?!\d+[/?#])[^\s@]{0,128}@)", re.IGNORECASE)
_SECRET_OF_QUERY = re.compile(
    r"(?P<name>[?&;][\w.-]{0,60}?(?:key|token|secret|passw|credential|sig)[\w.-]{0,60}=)[^&;#\s]+", re.IGNORECASE
)


def redact(value: object, name: str = "") -> object:
    """Copies `value`, which stands under `name`, with every secret in it replaced.

    Any value under a name with secret, password, passphrase or credential in it is a secret, at any depth; under a name
    with key or token in it only text is: `wandb_api_key` and `HF_TOKEN` are secrets, `maximum_tokens`, a number,
    and `param_tokens`, a section, are not. In any text, so are the user and the password of a URL, and the keys,
    tokens and signatures of its query.
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
    return redact_urls(value) if isinstance(value, str) else value


def redact_urls(text: str) -> str:
    """Replaces the secrets of every URL in a text, such as `https://user:password@host`."""
    if "://" not in text:
        return text
    return _SECRET_OF_QUERY.sub(rf"\g<name>{REDACTED}", _USER_OF_URL.sub(rf"\g<scheme>{REDACTED}@", text))


def holds_secret_url(value: object) -> bool:
    """Tells whether a value, or any in its lists, is a text with a URL that carries a secret."""
    if isinstance(value, list | tuple):
        return any(map(holds_secret_url, value))
    return isinstance(value, str) and redact_urls(value) != value
