"""Serves the page of runs on this machine alone, and follows them."""

from __future__ import annotations

import errno
import gzip
import hashlib
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from plotly.offline import get_plotlyjs

from megatron.errors import EnvironmentSetupError, UserError
from megatron.report.page import Page

HOST = "127.0.0.1"
SECONDS = 5.0
"""Time between two looks at the run [s]."""
NAMES = (HOST, "localhost")
"""Names under which a browser may ask. Another one is a web page's, which wants to read what is served here."""


class LivePage:
    """The page as its runs stand, built anew when one of their files has changed."""

    def __init__(self, build: Callable[[], Page], state: Callable[[], object]) -> None:
        """Takes what reads and draws the runs, and what tells whether they have changed."""
        self._build = build
        self._state = state
        self._lock = threading.Lock()
        self._built: tuple[object, Page] | None = None

    def page(self) -> tuple[Page, str]:
        """Returns the page and a word for its state. Raises UserError where the runs cannot be read."""
        with self._lock:
            state = self._state()
            if self._built is None or self._built[0] != state:
                self._built = state, self._build()
            return self._built[1], hashlib.sha256(repr(state).encode()).hexdigest()[:16]


def open_server(live: LivePage, port: int) -> ThreadingHTTPServer:
    """Opens the server at `port` of 127.0.0.1; 0 takes a free one.

    Raises EnvironmentSetupError where it is taken, or may not be opened.
    """

    class Handler(_Handler):
        page = live

    try:
        return _Server((HOST, port), Handler)
    except OSError as error:
        why = "another program listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise EnvironmentSetupError(f"--live {port}: {why}. Name another port, or 0 for any that is free.") from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # Otherwise a second server could take the port of one that listens.
    allow_reuse_address = False


class _Handler(BaseHTTPRequestHandler):
    page: LivePage

    def do_GET(self) -> None:
        host, _, port = self.headers.get("Host", "").rpartition(":")
        if host not in NAMES or port != str(self.connection.getsockname()[1]):
            self.send_error(HTTPStatus.FORBIDDEN, "this page is served to this machine alone")
            return
        try:
            if self.path == "/":
                page, version = self.page.page()
                self._send(page.html(live_seconds=SECONDS, version=version), "text/html")
            elif self.path == "/figures.json":
                page, version = self.page.page()
                self._send(page.figures_json(version), "application/json")
            elif self.path == "/plotly.js":
                self._send(get_plotlyjs(), "text/javascript", seconds=86400)
            else:
                self.send_error(HTTPStatus.NOT_FOUND)
        except UserError as error:
            self._send(f"{type(error).__name__}: {error}\n", "text/plain", HTTPStatus.INTERNAL_SERVER_ERROR)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the browser has gone on to something else

    def _send(self, text: str, kind: str, status: HTTPStatus = HTTPStatus.OK, *, seconds: int = 0) -> None:
        content = gzip.compress(text.encode("utf-8"), compresslevel=1)
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", f"{len(content)}")
        self.send_header("Cache-Control", f"max-age={seconds}" if seconds else "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name in http.server
        """Says nothing of single requests."""
