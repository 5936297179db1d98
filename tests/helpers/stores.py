"""An S3 server on this machine."""

from __future__ import annotations

import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest

WHY = "needs moto's S3 server and s3fs, of the extra `dev`"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYID",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def s3_server(port: int = 0) -> Iterator[str]:
    """Yields the URL of a server with an empty bucket `bucket`."""
    server_of = pytest.importorskip("moto.server", reason=WHY).ThreadedMotoServer
    pytest.importorskip("s3fs", reason=WHY)
    server = server_of(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        endpoint = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        # Servers of one process share what they hold.
        for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):
            request = urllib.request.Request(f"{endpoint}/{path}", method=method)  # noqa: S310
            urllib.request.urlopen(request, timeout=60).close()  # noqa: S310
        yield endpoint
    finally:
        server.stop()


def use_s3(endpoint: str) -> None:
    """Sets what a user sets; on the rank itself, since ranks are forks of an older process.

    The packages below try again by themselves, for half a minute, before they report what a test waits for.
    """
    import s3fs

    os.environ.update(CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint})
    fsspec.config.conf["s3"] = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 5}}
    s3fs.S3FileSystem.retries = 1
