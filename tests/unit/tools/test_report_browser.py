"""A report in a real browser: it opens without a network, every panel draws, and it can be read on any screen."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.forkserver import ROOT
from tests.helpers.report_runs import make_run, row, write_results
from tools import report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PANELS = ("loss", "perplexity", "learning rate", "gradient norm", "tokens/s", "MFU", "waiting for data", "peak memory")
CONTRAST = 4.5
"""Of text with its background, as WCAG 2.2 asks for (AA)."""
READ_PAGE = """() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = luminance(getComputedStyle(document.body).backgroundColor);
  const contrast = (colour) => {
    const own = luminance(colour);
    return (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05);
  };
  const texts = [...document.querySelectorAll(["xtick text", "ytick text", "annotation-text", "legendtext"]
    .map((kind) => "svg ." + kind).join())];
  const words = [...document.querySelectorAll("td, th, p, h1, h2, summary")].filter((each) => each.innerText.trim());
  const shown = (each) => { const box = each.getBoundingClientRect(); return box.width > 0 && box.height > 0; };
  const right = (each) => each.getBoundingClientRect().right;
  return {
    background: page,
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    contrasts: [...texts.map((each) => contrast(getComputedStyle(each).fill)),
                ...words.map((each) => contrast(getComputedStyle(each).color))],
    beyond: texts.filter(shown).filter((each) => right(each) > window.innerWidth + 1).map((each) => each.textContent),
    smallest: Math.min(...[...texts, ...words].map((each) => parseFloat(getComputedStyle(each).fontSize))),
    panels: [...document.querySelectorAll("#curves .annotation-text")].map((each) => each.textContent),
    drawn: [...document.querySelectorAll("#curves .subplot")].map((panel) =>
      [...panel.querySelectorAll(".trace .js-line, .trace .point")].filter((each) => {
        const box = each.getBoundingClientRect();
        return box.width > 0 || box.height > 0;
      }).length),
    bars: [...document.querySelectorAll(".bar span")].filter(shown).length,
    scores: document.querySelectorAll("#scores .subplot .js-line").length,
    hacked: window.hacked === undefined,
  };
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser of this machine; the test is skipped where there is none."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"], timeout=120_000)
        yield browser
        browser.close()


def _opened(browser: Browser, address: str, width: int, scheme: Any) -> tuple[Page, list[str]]:
    """Opens a page; returns it and what it says on the console or asks elsewhere for."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    own = address.rsplit("/", 1)[0]
    page.on(
        "request", lambda request: None if request.url.startswith((own, "blob:", "data:")) else said.append(request.url)
    )
    page.goto(address)
    page.wait_for_selector("#curves .main-svg")
    return page, said


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs with all that one can show, one of them without its configuration and with damage."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        make_run(folder / "first"),
        make_run(folder / "second, with a name that is long", speed=1.5, hidden_size=192),
    ]
    (runs[1] / "run.yml").unlink()
    with (runs[1] / "metrics.jsonl").open("a") as file:
        file.write("{damaged\n")
    results = [write_results(folder / "results" / f"{step}.json", step, step / 1000) for step in (200, 400)]
    words = [*map(str, runs), "--output", str(folder / "report.html"), "--results", *map(str, results)]
    assert report.main(words) == 0
    return folder / "report.html"


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_a_report_can_be_read(browser: Browser, written: Path, width: int, scheme: str) -> None:
    page, said = _opened(browser, written.as_uri(), width, scheme)
    found = page.evaluate(READ_PAGE)
    assert said == []
    assert found["hacked"]
    assert (found["background"] < 0.1) == (scheme == "dark")
    assert found["overflow"] <= 0
    assert found["beyond"] == []
    assert min(found["contrasts"]) >= CONTRAST
    assert found["smallest"] >= 12
    for name, panel in zip(PANELS, found["panels"], strict=True):
        assert panel.startswith(name)
    assert len(found["drawn"]) == len(PANELS)
    assert min(found["drawn"]) >= 2
    assert (found["bars"], found["scores"]) == (12, 4)
    page.close()


@pytest.mark.full
def test_menus_and_zoom(browser: Browser, written: Path) -> None:
    page, said = _opened(browser, written.as_uri(), 1400, "light")
    first = "() => { const line = document.getElementById('curves').data[0]; return [line.x[0], line.y[20]]; }"
    before = page.evaluate(first)
    for menu, choice in ((0, "over tokens"), (1, "mean of 25 rows")):
        page.locator("#curves .updatemenu-header").nth(menu).click()
        page.locator("#curves .updatemenu-dropdown-button", has_text=choice).click()
    after = page.evaluate(first)
    assert after[0] == 2048 * before[0]
    assert after[1] != before[1]
    box = page.locator("#curves .nsewdrag").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 200, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 600, box["y"] + 60, steps=4)
    page.mouse.up()
    ranges = page.evaluate(
        "() => ['xaxis', 'xaxis2', 'xaxis5'].map((axis) => document.getElementById('curves').layout[axis].range)"
    )
    assert ranges[0] == ranges[1] == ranges[2]
    assert 0 < ranges[0][0] < ranges[0][1] < 400 * 2048
    assert said == []
    page.close()


@pytest.mark.full
def test_a_live_report_follows_and_keeps_the_zoom(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "running", steps=200)
    command = [sys.executable, "tools/report.py", str(run), "--live", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = re.search(r"http://127\.0\.0\.1:\d+/", server.stdout.readline())
        assert address is not None
        page, said = _opened(browser, address[0], 1400, "light")
        page.evaluate("() => Plotly.relayout('curves', {'xaxis.range': [50, 150]})")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row(210) | {"train/lm_loss": 1.25}) + "\n")
        last = "() => document.getElementById('curves').data[0].y.at(-1) === 1.25"
        page.wait_for_function(last)
        assert page.evaluate("() => document.getElementById('curves').layout.xaxis.range") == [50, 150]
        page.wait_for_function("() => document.body.innerText.includes('210 of 200')")
        assert said == []
        page.close()
    finally:
        server.terminate()
        server.wait(60)
