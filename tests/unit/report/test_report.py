"""A report shows what the files of runs say, and nothing of it as a program or a secret."""

from __future__ import annotations

import html
import json
import math
import re
import socket
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest

from megatron.errors import DataError, EnvironmentSetupError
from megatron.report.figures import curves_figure, thinned
from megatron.report.live_page import LivePage, open_server
from megatron.report.page import build_page, time_bars
from megatron.report.run_files import changed_at, read_runs
from megatron.report.time_spent import time_spent
from megatron.training.callbacks.evaluation import loss_metrics
from tests.helpers.report_runs import (
    FLOPS_PER_TOKEN,
    HOSTILE,
    PRIVATE_URL,
    TOKENS_PER_STEP,
    make_run,
    row,
    write_lines,
    write_results,
)
from tools import report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture(scope="module")
def text(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of one run, without plotly's own program."""
    folder = tmp_path_factory.mktemp("page")
    results = [str(write_results(folder / f"{step}.json", step, 0.3 + step / 1000)) for step in (200, 400)]
    assert report.main([str(run), "--output", str(folder / "a" / "report.html"), "--results", *results]) == 0
    whole = (folder / "a" / "report.html").read_text()
    program = max(re.findall(r"<script>.*?</script>", whole, re.DOTALL), key=len)
    assert len(program) > 1_000_000
    return whole.replace(program, "")


@pytest.mark.parametrize(
    "words",
    [
        "2,345,678", "400 of 400", "819k", "4 ranks", "NVIDIA H100 80GB HBM3", "torch 2.13.0", "c0ffeec0ffee",
        "51.9k tokens/s", "finished 2026-03-04 05:08 UTC", "hidden_size: 128", "global_step200", "tensor 2 x data 2",
        "arc_easy", "0.5 ± 0.012", "step 200 (5-shot)", "The history of", "8 of 12 steps", "was not finite",
    ],
)  # fmt: skip
def test_a_page_tells_what_the_folder_holds(text: str, words: str) -> None:
    assert words in text


def test_a_page_needs_no_network(text: str) -> None:
    assert re.findall(r"(?:src|href|action)\s*=\s*[\"']?(?:https?:)?//", text) == []
    assert "default-src 'none'" in text


def test_no_text_is_a_program_and_no_secret_is_shown(text: str) -> None:
    assert HOSTILE not in text
    assert "<img" not in text
    assert html.escape(HOSTILE, quote=False)[:20] in html.unescape(text.replace("&amp;", "&")) or "&lt;img" in text
    assert "hunter2" not in text
    assert PRIVATE_URL.partition("@")[2] in text


@pytest.mark.parametrize(("x", "per_step"), [("steps", 1), ("tokens", TOKENS_PER_STEP), ("flops", None)])
def test_curves_are_what_was_recorded(run: Path, x: str, per_step: int | None) -> None:
    per_step = per_step or TOKENS_PER_STEP * FLOPS_PER_TOKEN
    figure = curves_figure(read_runs([run]), x)
    rows = [row(step) for step in range(10, 401, 10)]
    drawn = {trace.meta: trace for trace in figure.data}
    assert set(drawn) == {
        "train/lm_loss", "valid/lm_loss", "test/lm_loss", "valid/perplexity", "train/learning_rate", "train/grad_norm",
        "train/tokens_per_second", "train/mfu", "train/data_wait_share", "train/memory_gib",
    }  # fmt: skip
    scales = {"train/mfu": 100.0, "train/data_wait_share": 100.0}
    for metric, trace in drawn.items():
        measured = [each for each in rows if metric in each] or [{"iteration": 400, metric: 3.1}]
        np.testing.assert_allclose(trace.x, [each["iteration"] * per_step for each in measured], rtol=1e-8)
        expected = [each[metric] * scales.get(metric, 1.0) for each in measured]
        np.testing.assert_allclose(np.array(trace.y, dtype=float), expected, rtol=1e-5)


def test_losses_of_shares_are_a_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "elastic")
    whole = {step: 4.0 - step / 1000 for step in range(50, 401, 50)}
    losses = {step: {1.0: loss, 0.5: loss + 0.25, 0.125: loss + 0.5} for step, loss in whole.items()}
    write_lines(folder / "metrics.jsonl", [{"iteration": step} | loss_metrics("valid", losses[step]) for step in whole])
    page = build_page(read_runs([folder])).html()
    (table,) = re.findall(r"<h2>Losses by share</h2>.*?</table>", page, re.DOTALL)
    assert re.findall(r"<th>step (\d+)</th>", table) == ["50", "100", "200", "250", "350", "400"]
    rows = [re.findall(r">([^<>]+)</t[hd]>", line) for line in table.splitlines() if "scope" in line]
    assert rows[0] == ["1", "3.9500", "3.9000", "3.8000", "3.7500", "3.6500", "3.6000"]
    assert [(row[0], row[-2], row[-1]) for row in rows[1:]] == [
        ("0.5", "3.8500", "+0.2500"),
        ("0.125", "4.1000", "+0.5000"),
    ]
    assert "Losses by share" not in build_page(read_runs([make_run(tmp_path / "plain")])).html()


def test_buttons_offer_means_of_neighbours_and_other_axes(run: Path) -> None:
    figure = curves_figure(read_runs([run]))
    axes, windows = figure.layout.updatemenus
    assert [button.label for button in axes.buttons] == ["over steps", "over tokens", "over FLOPs"]
    assert [button.label for button in windows.buttons][:2] == ["as recorded", "mean of 5 rows"]
    changes, places = windows.buttons[1].args
    losses = np.array([row(step)["train/lm_loss"] for step in range(10, 401, 10)])
    assert places[0] == 0
    middle = [losses[index - 2 : index + 3].mean() for index in range(2, 38)]
    np.testing.assert_allclose(changes["y"][0][2:38], middle, rtol=1e-5)
    assert [len(values) for values in axes.buttons[1].args[0]["x"]] == [len(trace.x) for trace in figure.data]


def test_events_are_marked_at_their_steps_on_every_axis(run: Path) -> None:
    figure = curves_figure(read_runs([run]), "tokens")
    marks = {(line.name, line.x0 / TOKENS_PER_STEP) for line in figure.layout.shapes}
    assert marks == {("resume", 200.0), ("non_finite", 203.0), ("rollback", 230.0)}
    assert len(figure.layout.shapes) == 3 * 8


def test_long_curves_keep_their_spikes_and_gaps() -> None:
    values = np.sin(np.arange(100_000) / 5000.0)
    values[54_321], values[70_000:80_000] = 40.0, math.nan
    kept = thinned(values, 500)
    assert len(kept) <= 500
    assert {0, 54_321, 99_999} <= set(kept.tolist())
    assert np.isnan(values[kept]).sum() > 10
    assert np.abs(np.interp(np.arange(54_000), kept, values[kept]) - values[:54_000]).max() < 0.05


def test_where_the_time_went() -> None:
    """By hand: 3 rows of 10 steps; a step of 0.5 s, of which 0.1 s waits for data and 0.15 s for other ranks."""
    rows = [
        {"iteration": step, "train/step_seconds": 0.5, "train/data_wait_share": 0.2, "train/rank_seconds_median": 0.35}
        for step in (10, 20, 30)
    ]
    rows[1] |= {"train/save_wait_seconds": 2.0, "train/evaluation_seconds": 3.5, "train/sampling_seconds": 0.25}
    assert time_spent(rows) == pytest.approx({
        "computing": 7.5, "waiting for other ranks": 4.5, "waiting for data": 3.0,
        "saves": 2.0, "evaluation": 3.5, "samples": 0.25,
    })  # fmt: skip
    # From step 500 on, as after a growth in a folder of its own.
    later = [each | {"iteration": each["iteration"] + 500} for each in rows]
    assert time_spent(later) == pytest.approx(time_spent(rows))
    assert sum(time_spent([{"iteration": 5, "train/step_seconds": 2.0}]).values()) == pytest.approx(10.0)


def test_shares_of_the_time_are_whole(run: Path) -> None:
    ((name, whole, parts),) = time_bars(read_runs([run]))
    # 400 steps of 0.04 s; 4 evaluations of 2 s, saves of 1 s and samples of 0.5 s.
    assert (name, whole) == ("first", "30s")
    assert sum(float(share) for _, _, share, _ in parts) == pytest.approx(100.0, abs=0.3)
    assert ("evaluation", "26.7", "8s") in [(part, share, seconds) for part, _, share, seconds in parts]


def test_runs_are_compared_and_told_apart(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "second", speed=2.0, name="first", hidden_size=192, seed=7)
    page = build_page(read_runs([run, other]))
    assert [each.name for each in page.runs] == [
        "first (hidden_size=128, seed=1234)",
        "first (hidden_size=192, seed=7)",
    ]
    found = re.findall(r"<code>(.*?)</code></th><td>(.*?)</td><td>(.*?)</td>", page.html(live_seconds=5.0))
    assert ("hidden_size", "128", "192") in found
    assert {key for key, _, _ in found} == {"hidden_size", "seed"}


def test_damage_is_named_and_the_rest_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "damaged")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3], lines[5] = "{torn", json.dumps(row(60) | {"train/lm_loss": "high"})
    (run / "metrics.jsonl").write_text("\n".join(lines))
    (run / "samples.jsonl").write_text('{"iteration": 1}\n')
    (run / "events.jsonl").write_text("[]\n")
    (run / "global_step200" / "manifest.json").write_text("{")
    (run / "global_step400" / "layer_00-model_00-model_states.pt").write_bytes(b"short")
    assert report.main([str(run), "--output", str(tmp_path / "report.html")]) == 0
    said = capsys.readouterr().err
    for words in (
        "metrics.jsonl:4: left out",
        "samples.jsonl:1",
        "events.jsonl:1",
        "global_step200: left out",
        "no numbers",
    ):
        assert words in said
        assert words in (tmp_path / "report.html").read_text()
    assert "5 bytes instead of 1,000" in (tmp_path / "report.html").read_text()
    (losses,) = [each for each in curves_figure(read_runs([run])).data if each.meta == "train/lm_loss"]
    assert list(losses.x) == [step for step in range(10, 401, 10) if step not in (40, 60)]


def test_a_run_without_configuration_or_rows_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "bare")
    for name in ("run.yml", "run.json", "events.jsonl", "samples.jsonl"):
        (run / name).unlink()
    assert "no run.yml in its folder" in build_page(read_runs([run])).html(live_seconds=5.0)
    (run / "metrics.jsonl").write_text("")
    assert "No rows yet" in build_page(read_runs([run])).html(live_seconds=5.0)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"no run's folder.*Give the folder that a run writes to"):
            report.main([str(folder)])


def test_an_axis_that_a_run_has_no_place_on_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old")
    write_lines(run / "metrics.jsonl", [{"iteration": 10, "train/lm_loss": 3.0}])
    with pytest.raises(DataError, match=r"--x tokens: not all of these runs have recorded what it needs. Use steps"):
        report.main([str(run), "--x", "tokens", "--output", str(tmp_path / "report.html")])


def test_grown_runs_get_their_verdict(tmp_path: Path) -> None:
    grown, alone = (make_run(tmp_path / name) for name in ("grown", "alone"))
    sizes = {"qkv": 64, "proj": 64, "ffn": 256, "num_layers": 4}
    event = {
        "iteration": 200, "event": "growth", "text": "", "operator": "zero_key", "consumed_tokens": 409_600,
        "training_flops": 1e12, "before": sizes, "after": {"qkv": 128, "proj": 128, "ffn": 512, "num_layers": 4},
        "parameters_before": 1_000_000, "parameters_after": 2_345_678,
    }  # fmt: skip
    with (grown / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    page = build_page(read_runs([grown, alone]))
    assert page.verdict is not None
    assert page.verdict.sentences[0].startswith("No verdict: one seed has no spread.")
    assert len(page.verdict.arms) == 2
    assert {"growth"} <= {line.name for line in page.figures["curves"].layout.shapes}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    run = make_run(tmp_path / "live", steps=100)
    live = LivePage(lambda: build_page(read_runs([run])), lambda: changed_at([run]))
    with open_server(live, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.server_address[1], run
        server.shutdown()
        thread.join()


def _get(port: int, path: str, host: str | None = None) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    import gzip

    return answer.status, (gzip.decompress(body) if answer.getheader("Content-Encoding") == "gzip" else body).decode()


def test_a_live_page_follows_its_run(served: tuple[int, Path]) -> None:
    port, run = served
    first = json.loads(_get(port, "/figures.json")[1])
    assert json.loads(_get(port, "/figures.json")[1])["version"] == first["version"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(110)) + "\n")
    second = json.loads(_get(port, "/figures.json")[1])
    assert second["version"] != first["version"]
    assert second["figures"]["curves"]["data"][0]["x"][-1] == 110
    assert "110 of 100" in _get(port, "/")[1]
    (run / "metrics.jsonl").unlink()
    for name in ("run.json", "run.yml", "events.jsonl"):
        (run / name).unlink()
    status, text = _get(port, "/")
    assert (status, text.startswith("DataError: ")) == (500, True)


def test_only_this_machine_is_answered(served: tuple[int, Path]) -> None:
    port, _ = served
    assert _get(port, "/", "evil.example")[0] == 403
    assert _get(port, "/", f"evil.example:{port}")[0] == 403
    assert _get(port, "/figures.json", f"localhost:{port}")[0] == 200
    assert _get(port, "/../run.json")[0] == 404


def test_a_port_in_use_is_named(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentSetupError, match=f"--live {port}: another program listens there. Name another"):
            report.main([str(run), "--live", str(port)])
