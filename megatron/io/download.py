"""Downloads of large files: resumed, compared with a published hash, and named only when they are whole."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any

from megatron.errors import DataError
from megatron.io.durable import replace_durably
from megatron.io.json_files import read_json_object
from megatron.io.working_file import WorkingFile, working_path

ATTEMPTS = 5
WAIT_SECONDS = 2.0
"""Wait before the second attempt [s]; it doubles with each."""
_TIMEOUT_SECONDS = 60.0
_BYTES_AT_A_TIME = 1 << 20
_LOCAL = ("127.0.0.1", "localhost", "::1")
_GONE = (401, 403, 404, 410, 451)
_OK, _PARTIAL, _BEYOND_THE_END = 200, 206, 416
_SHA256_DIGITS = 64


@dataclass(frozen=True)
class Remote:
    """A file of a server."""

    url: str
    sha256: str | None = None
    """Published hash; None compares with the one that the server tells, if it does."""
    remedy: str = "Look at the address, and at the network."
    """What to do when the source is dead."""


def download(remote: Remote, path: Path, report: Callable[[int, int | None], None]) -> None:
    """Downloads to `path`, from where an earlier call was interrupted; does nothing where it is there already.

    `report` is given the bytes that are there and the size, where the server tells it. Raises DataError when the source
    is dead, breaks off again and again, or gives something else than was published, and when the disk has no room.
    """
    record = path.with_name(f"{path.name}.download.json")
    if _is_complete(path, record, remote):
        return
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            _fetch(remote, path, record, report)
        except urllib.error.HTTPError as error:
            if error.code in _GONE:
                raise DataError(
                    f"{remote.url}: the source is dead ({error.code} {error.reason}). {remote.remedy}"
                ) from error
            failure: Exception = error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            failure = error
        else:
            return
    raise DataError(
        f"{remote.url}: broke off {ATTEMPTS} times ({failure}). {remote.remedy} The same command goes on where it was."
    )


def _fetch(remote: Remote, path: Path, record: Path, report: Callable[[int, int | None], None]) -> None:
    working = working_path(path)
    before = _read_record(record)
    held = working.stat().st_size if working.exists() and before.get("url") == remote.url and before.get("tag") else 0
    headers = {"User-Agent": "megatron-tokenformer", "Accept-Encoding": "identity"}
    if held:
        headers |= {"Range": f"bytes={held}-", "If-Range": before["tag"]}
    with _opened(remote.url, headers) as (response, published):
        status, size = response.status, _length(response.headers)
        start = held if status == _PARTIAL and _range_start(response.headers) == held else 0
        if start == 0 and status == _PARTIAL:
            raise DataError(f"{remote.url}: the server sends another part than was asked for. Try again later.")
        total = None if size is None else start + size
        if total is not None:
            _require_room(path, total - start)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        expected = remote.sha256 or published or before.get("sha256") or None
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(record, json.dumps({"url": remote.url, "tag": tag, "sha256": expected}) + "\n")
        file = WorkingFile(path, start)
        try:
            while data := response.read(_BYTES_AT_A_TIME):
                file.write(data)
                report(file.size, total)
            if total is not None and file.size != total:
                raise http.client.IncompleteRead(b"", total - file.size)
            facts = file.finish()
        finally:
            file.close()
    if expected is not None and facts.sha256 != expected:
        working.unlink()
        raise DataError(
            f"{remote.url}: SHA-256 {facts.sha256}, and {expected} is published. The download was damaged, or the "
            "source has changed; it is deleted. Try again."
        )
    file.publish()
    facts_text = {"url": remote.url, "tag": tag, "sha256": facts.sha256, "size": facts.size, "compared": bool(expected)}
    replace_durably(record, json.dumps(facts_text) + "\n")


@contextlib.contextmanager
def _opened(url: str, headers: dict[str, str]) -> Iterator[tuple[http.client.HTTPResponse, str | None]]:
    """Opens a URL; yields the response, and the SHA-256 that Hugging Face's hub tells of a large file."""
    redirects = _Redirects()
    _require_safe(url)
    opener = urllib.request.build_opener(redirects)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS)  # noqa: S310 - https
    except urllib.error.HTTPError as error:
        if error.code != _BEYOND_THE_END:
            raise
        # All of it may be there, or another file stands under the name: from the start.
        fresh = {key: value for key, value in headers.items() if key not in ("Range", "If-Range")}
        response = opener.open(urllib.request.Request(url, headers=fresh), timeout=_TIMEOUT_SECONDS)  # noqa: S310 - https
    with response:
        yield response, redirects.sha256 or _linked_sha256(response.headers)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to https alone, and keeps the hash that the first one tells."""

    def __init__(self) -> None:
        self.sha256: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        """Checks where a redirection leads."""
        _require_safe(newurl)
        self.sha256 = self.sha256 or _linked_sha256(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _require_safe(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in _LOCAL):
        raise DataError(f"{url}: only https is downloaded, where nobody on the way can change what comes.")


def _linked_sha256(headers: Message) -> str | None:
    tag = (headers.get("X-Linked-Etag") or "").strip('"')
    return tag if len(tag) == _SHA256_DIGITS and all(digit in "0123456789abcdef" for digit in tag) else None


def _length(headers: Message) -> int | None:
    text = headers.get("Content-Length") or ""
    return int(text) if text.isdecimal() else None


def _range_start(headers: Message) -> int | None:
    """Returns the first byte of `Content-Range: bytes 5-9/10`."""
    text = (headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    return int(text) if text.isdecimal() else None


def _require_room(path: Path, needed: int) -> None:
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(f"{path}: {needed:,} bytes are still to come, and {free:,} are free in {folder}. Make room.")


def _is_complete(path: Path, record: Path, remote: Remote) -> bool:
    known = _read_record(record)
    if not path.is_file() or known.get("url") != remote.url or path.stat().st_size != known.get("size"):
        return False
    return remote.sha256 is None or known.get("sha256") == remote.sha256


def _read_record(record: Path) -> dict[str, Any]:
    try:
        return read_json_object(record)
    except (OSError, ValueError):
        return {}
