"""Values that are opened as files or folders of this machine, among which a URL would only be a path of an odd name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://).*", re.DOTALL)
HUB = "https://huggingface.co/"
PATH_NAMES = {
    "path": ("a path on this machine", "paths on this machine"),
    "path-for-saves": ("a path on this machine", "paths on this machine"),
    "path-or-url": ("a path on this machine or a URL of checkpoints", "paths on this machine or URLs of checkpoints"),
    "url": ("a URL such as s3://bucket/run", "URLs such as s3://bucket/run"),
    "name-or-path": ("a name, or a path on this machine", "names or paths on this machine"),
}
"""Words for the formats of the JSON schema, in singular and plural."""


@dataclass(frozen=True)
class NoUrl:
    """Annotates a text that is opened as a path."""

    format: str
    """Key of PATH_NAMES."""

    def __get_pydantic_core_schema__(self, source: type[str], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Builds pydantic's validator of the path."""
        return core_schema.with_info_after_validator_function(_require_no_url, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Returns the JSON schema of the path, as pydantic asks for it."""
        return handler(schema) | {"format": self.format, "not": {"pattern": "^[A-Za-z][A-Za-z0-9+.-]*://"}}


@dataclass(frozen=True)
class RemoteUrl:
    """Annotates a text that names a place in a store, where fsspec finds it."""

    format: str
    """Key of PATH_NAMES; says whether a path will do as well."""

    def __get_pydantic_core_schema__(self, source: type[str], handler: GetCoreSchemaHandler) -> CoreSchema:
        """Builds pydantic's validator of the URL."""
        check = _require_url if self.format == "url" else _require_no_hub
        return core_schema.no_info_after_validator_function(check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Returns the JSON schema of the URL, as pydantic asks for it."""
        return handler(schema) | {"format": self.format}


PathText = Annotated[str, NoUrl("path")]
"""Path of a file or folder."""
SavePath = Annotated[str, NoUrl("path-for-saves")]
"""Path of a folder that a run writes, for which `save_remote` takes URLs."""
PathOrUrl = Annotated[str, RemoteUrl("path-or-url")]
"""Path of a folder, or URL of one in a store."""
UrlText = Annotated[str, RemoteUrl("url")]
"""URL of a folder in a store."""
NameOrPath = Annotated[str, NoUrl("name-or-path")]
"""Name that a library looks up, or path of a file or folder."""


def holds_paths(schema: Mapping[str, Any]) -> bool:
    """Tells whether values of a JSON schema are paths, or hold some."""
    return any(_has_format(schema, name) for name in PATH_NAMES)


def is_url(text: str) -> bool:
    """Tells whether a text is a URL, rather than a path."""
    return URL.fullmatch(text) is not None


def url_remedy(value: Any, schema: Mapping[str, Any] | None = None) -> str:
    """Says what to do about the first URL in a value or a list of them; nothing without one.

    `schema` is the JSON schema of what was expected.
    """
    texts = value if isinstance(value, list) else [value]
    found = next((match for text in texts if isinstance(text, str) and (match := URL.fullmatch(text))), None)
    if found is None:
        return ""
    if found["scheme"] == "file://":
        return "; leave file:// out"
    if found[0].startswith(HUB):
        return f"; the name of that model is {found[0].removeprefix(HUB)}"
    if schema is not None and _has_format(schema, "path-for-saves"):
        return f"; save to a folder, and set save_remote: {found[0]}, which uploads every checkpoint from there"
    return f"; {found['scheme']} is not supported: copy or mount what is there, and give its local path"


def local_path(text: str) -> Path:
    """Converts a word of a command line to a path. Raises ArgumentTypeError for a URL."""
    remedy = url_remedy(text)
    if remedy:
        raise argparse.ArgumentTypeError(f"{text}: expected a path on this machine{remedy}")
    return Path(text)


def _has_format(schema: Mapping[str, Any], name: str) -> bool:
    inner = [*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())]
    return schema.get("format") == name or any(_has_format(each, name) for each in inner)


def _require_url(text: str) -> str:
    if not is_url(text):
        raise ValueError("expected a URL")
    return text


def _require_no_hub(text: str) -> str:
    if text.startswith(HUB):
        raise ValueError("expected a path on this machine, or a URL of checkpoints")
    return text


def _require_no_url(text: str, info: core_schema.ValidationInfo) -> str:
    # What a checkpoint recorded is read from JSON. Runs of old have trained into folders of such names, and still load.
    if info.mode != "json" and URL.fullmatch(text):
        raise ValueError("expected a path on this machine")
    return text
