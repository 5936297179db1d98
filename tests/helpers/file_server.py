"""A server of files on this machine that has the troubles of real ones."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FileServer:
    """Files by path, and what goes wrong with them."""

    files: dict[str, bytes] = field(default_factory=dict)
    break_off: dict[str, list[int]] = field(default_factory=dict)
    """Bytes after which each answer ends, in turn; later answers are whole."""
    redirects: dict[str, str] = field(default_factory=dict)
    linked_hashes: dict[str, str] = field(default_factory=dict)
    """X-Linked-Etag, as Hugging Face's hub tells it."""
    ignores_ranges: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and range of each request."""
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    state: FileServer

    def do_GET(self) -> None:
        state, asked = self.state, self.headers.get("Range")
        state.requests.append((self.path, asked))
        if self.path in state.redirects:
            self.send_response(302)
            self.send_header("Location", state.redirects[self.path])
            self.end_headers()
            return
        content = state.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.md5(content).hexdigest()}"'  # noqa: S324 - tells versions apart
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if state.ignores_ranges or self.headers.get("If-Range", tag) != tag:
            start = 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", tag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.path in state.linked_hashes:
            self.send_header("X-Linked-Etag", f'"{state.linked_hashes[self.path]}"')
        self.end_headers()
        stops = state.break_off.get(self.path)
        self.wfile.write(content[start:] if not stops else content[start : start + stops.pop(0)])

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def file_server() -> Iterator[FileServer]:
    """Serves on a free port while the body runs."""
    state = FileServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
