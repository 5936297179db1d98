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


PathText = Annotated[str, NoUrl("path")]
"""Path of a file or folder."""
NameOrPath = Annotated[str, NoUrl("name-or-path")]
"""Name that a library looks up, or path of a file or folder."""


def holds_paths(schema: Mapping[str, Any]) -> bool:
    """Tells whether values of a JSON schema are paths, or hold some."""
    inner = [*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())]
    return schema.get("format") in PATH_NAMES or any(map(holds_paths, inner))


def url_remedy(value: Any) -> str:
    """Says what to do about the first URL in a value or a list of them; nothing without one."""
    texts = value if isinstance(value, list) else [value]
    found = next((match for text in texts if isinstance(text, str) and (match := URL.fullmatch(text))), None)
    if found is None:
        return ""
    if found["scheme"] == "file://":
        return "; leave file:// out"
    if found[0].startswith(HUB):
        return f"; the name of that model is {found[0].removeprefix(HUB)}"
    return f"; {found['scheme']} is not supported: copy or mount what is there, and give its local path"


def local_path(text: str) -> Path:
    """Converts a word of a command line to a path. Raises ArgumentTypeError for a URL."""
    remedy = url_remedy(text)
    if remedy:
        raise argparse.ArgumentTypeError(f"{text}: expected a path on this machine{remedy}")
    return Path(text)


def _require_no_url(text: str, info: core_schema.ValidationInfo) -> str:
    # What a checkpoint recorded is read from JSON. Runs of old have trained into folders of such names, and still load.
    if info.mode != "json" and URL.fullmatch(text):
        raise ValueError("expected a path on this machine")
    return text
