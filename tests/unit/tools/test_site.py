"""The documentation builds without a warning and without a network, and no page of the checkout is left out of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.forkserver import ROOT

FETCHED = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//")
"""What a browser would fetch from elsewhere when it opens a page; a link that a reader may follow is none."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # No proxy answers: a page that needed the network would not build.
    environment = os.environ | dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "127.0.0.1:9")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--conf-dir", "docs"]
    built = subprocess.run(
        [*command, ".", str(folder)], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.md"], check=True, cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert [page for page in tracked if page != "README.md" and not (site / page).with_suffix(".html").is_file()] == []


def test_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    assert [page.name for page in pages if FETCHED.search(page.read_text(encoding="utf-8"))] == []


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    page = (site / "docs" / "arithmetic.html").read_text(encoding="utf-8")
    assert page.count("<math") > 20
    assert "mathjax" not in "".join(re.findall(r"<script[^>]*>", page)).lower()
