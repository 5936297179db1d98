"""The curves are the recorded numbers, on the axes that were asked for."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron.errors import DataError, UserError
from megatron.report.panels import COLOURS, format_power, moving_average
from megatron.report.run_records import load_run, load_runs
from tests.helpers.forkserver import ROOT
from tools.plots.plot_runs import draw, main

TOKENS_PER_STEP = 4096
FLOPS_PER_TOKEN = 1.5e9


def _record(step: int, rate: float = 1.0) -> dict[str, float | None]:
    row: dict[str, float | None] = {
        "iteration": step,
        "consumed_tokens": step * TOKENS_PER_STEP,
        "train/lm_loss": 2.0 + 8.0 / (rate * step),
        "train/learning_rate": 6e-4 / step,
        "train/grad_norm": 1.0 + 1.0 / step,
        "train/tokens_per_second": 1e5 * rate,
    }
    if step % 20 == 0:
        row |= {"valid/lm_loss": 2.1 + 8.0 / step, "valid/perplexity": math.exp(2.1)}
    return row


def _make_run(folder: Path, rows: list[dict], **description: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if description:
        (folder / "run.json").write_text(json.dumps(description))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [_record(step) for step in range(10, 101, 10)]
    rows[-1] |= {"test/lm_loss": 2.5}
    return _make_run(tmp_path / "tiny", rows, name="tiny model", parameters=1_234_567, flops_per_token=FLOPS_PER_TOKEN)


def _panels(figure: Figure) -> dict[str, Axes]:
    return {ax.get_ylabel(): ax for ax in figure.axes}


def _curve(ax: Axes, metric: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in ax.lines if line.get_gid() == metric]
    return list(line.get_xdata()), list(line.get_ydata())


def _texts(figure: Figure) -> list[str]:
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def test_each_panel_shows_its_metric_as_recorded(run: Path) -> None:
    figure = draw([load_run(run)])
    panels = _panels(figure)
    assert list(panels) == ["loss [nat/token]", "learning rate", "gradient norm", "tokens/s"]
    steps = list(range(10, 101, 10))
    assert _curve(panels["loss [nat/token]"], "train/lm_loss") == (steps, [2.0 + 8.0 / step for step in steps])
    assert _curve(panels["loss [nat/token]"], "valid/lm_loss") == (
        [20, 40, 60, 80, 100],
        [2.1 + 8.0 / step for step in (20, 40, 60, 80, 100)],
    )
    assert _curve(panels["loss [nat/token]"], "test/lm_loss") == ([100], [2.5])
    assert _curve(panels["learning rate"], "train/learning_rate")[1] == [6e-4 / step for step in steps]
    assert _curve(panels["gradient norm"], "train/grad_norm")[1] == [1.0 + 1.0 / step for step in steps]
    assert _curve(panels["tokens/s"], "train/tokens_per_second")[1] == [1e5] * 10
    assert panels["tokens/s"].get_ylim()[0] == 0.0
    assert figure.get_suptitle() == "tiny model, 1.23M parameters"
    assert _texts(figure) == ["training", "validation", "test"]
    assert figure.axes[-1].get_xlabel() == "optimizer steps"


@pytest.mark.parametrize(
    ("x", "per_step", "label", "tick"),
    [
        ("tokens", TOKENS_PER_STEP, "training tokens", (2_500_000, "2.5M")),
        ("flops", TOKENS_PER_STEP * FLOPS_PER_TOKEN, "training compute [FLOP]", (2e14, "2e14")),
        ("steps", 1, "optimizer steps", (143000, "143,000")),
    ],
)
def test_horizontal_axes(run: Path, x: str, per_step: float, label: str, tick: tuple[float, str]) -> None:
    figure = draw([load_run(run)], x=x, log_x=True)
    assert _curve(figure.axes[0], "train/lm_loss")[0] == [step * per_step for step in range(10, 101, 10)]
    bottom = figure.axes[-1]
    assert (bottom.get_xlabel(), bottom.get_xscale()) == (label, "log")
    assert bottom.xaxis.get_major_formatter()(tick[0]) == tick[1]


def test_an_evaluation_in_a_row_of_its_own_is_placed_by_its_step(tmp_path: Path) -> None:
    rows = [_record(10), {"iteration": 10, "test/lm_loss": 2.5}]
    figure = draw([load_run(_make_run(tmp_path / "tested", rows))], x="tokens")
    assert _curve(figure.axes[0], "test/lm_loss") == ([10 * TOKENS_PER_STEP], [2.5])


@pytest.mark.parametrize(("x", "place"), [("steps", 40.0), ("tokens", 40.0 * TOKENS_PER_STEP), ("flops", 7e12)])
def test_growth_is_a_line_with_its_sizes(tmp_path: Path, x: str, place: float) -> None:
    """On every axis, and the compute axis is that of both models."""
    rows = [_record(step) | {"training_flops": step * 1e11} for step in range(10, 101, 10)]
    growth = {
        "iteration": 40, "event": "growth", "text": "...", "operator": "zero_key",
        "consumed_tokens": 40 * TOKENS_PER_STEP, "training_flops": 7e12,
        "parameters_before": 1_000_000, "parameters_after": 2_000_000,
    }  # fmt: skip
    run = _make_run(tmp_path / "grown", [*rows[:4], growth, *rows[4:]], flops_per_token=1.0)
    figure = draw([load_run(run)], x=x)
    for ax in figure.axes:
        ((at, _),) = [line.get_xdata() for line in ax.lines if line.get_gid() == "event growth"]
        assert at == place
    assert [text.get_text() for text in figure.axes[0].texts] == ["zero_key: 1M to 2M parameters"]
    if x == "flops":
        assert _curve(figure.axes[0], "train/lm_loss")[0] == [step * 1e11 for step in range(10, 101, 10)]


@pytest.mark.parametrize(
    "event", [{"event": "feast"}, {"event": "growth"}, {"event": ["growth"], "consumed_tokens": 1}]
)
def test_an_event_that_no_run_writes_is_refused(tmp_path: Path, event: dict[str, object]) -> None:
    run = _make_run(tmp_path / "odd", [_record(10), {"iteration": 10, **event}])
    with pytest.raises(DataError, match="the event of iteration 10 is no growth of a run"):
        load_run(run)


def test_runs_differ_by_colour_and_share_one_legend(run: Path, tmp_path: Path) -> None:
    faster = _make_run(tmp_path / "faster", [_record(step, rate=2.0) for step in range(5, 60, 5)])
    figure = draw(load_runs([run, faster / "metrics.jsonl"]), metrics=["loss", "perplexity"])
    assert _texts(figure) == ["tiny model, 1.23M parameters", "faster", "training", "validation", "test"]
    curves = [line for line in figure.axes[0].lines if line.get_gid() == "train/lm_loss"]
    assert [line.get_color() for line in curves] == list(COLOURS[:2])
    assert list(curves[1].get_xdata()) == list(range(5, 60, 5))
    assert [ax.get_ylabel() for ax in figure.axes] == ["loss [nat/token]", "perplexity"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [_make_run(tmp_path / seed, [_record(10)], name="150M") for seed in ("seed1", "seed2")]
    assert [run.name for run in load_runs(paths)] == [f"150M ({path})" for path in paths]


def test_what_was_not_finite_is_a_gap_and_what_was_not_measured_is_none(tmp_path: Path) -> None:
    rows = [{"iteration": step, "train/lm_loss": None if step == 3 else 1.0 * step} for step in range(1, 6)]
    del rows[1]["train/lm_loss"]
    figure = draw([load_run(_make_run(tmp_path / "gaps", rows))], smooth=3)
    steps, raw = _curve(figure.axes[0], "train/lm_loss raw")
    assert steps == [1, 3, 4, 5]
    np.testing.assert_array_equal(raw, [1.0, math.nan, 4.0, 5.0])
    np.testing.assert_array_equal(_curve(figure.axes[0], "train/lm_loss")[1], [1.0, math.nan, 4.5, 5.0])


@pytest.mark.parametrize("window", [1, 2, 3, 7, 100])
def test_moving_average_is_the_mean_of_the_neighbours(window: int) -> None:
    values = np.random.default_rng(0).normal(size=40)
    values[[3, 4, 20]] = math.nan
    got = moving_average(values, window)
    for index, value in enumerate(got):
        reach = min(window // 2, index, len(values) - 1 - index)
        if math.isnan(values[index]):
            assert math.isnan(value)
        else:
            assert value == pytest.approx(np.nanmean(values[index - reach : index + reach + 1]), abs=1e-12)


def test_learning_rate_is_never_smoothed(run: Path) -> None:
    figure = draw([load_run(run)], smooth=5, metrics=["learning_rate", "grad_norm"])
    assert _curve(figure.axes[0], "train/learning_rate")[1] == [6e-4 / step for step in range(10, 101, 10)]
    assert any(line.get_gid() == "train/grad_norm raw" for line in figure.axes[1].lines)


def test_a_spike_does_not_flatten_the_rest(tmp_path: Path) -> None:
    rows = [_record(step) for step in range(1, 40)]
    rows[20]["train/grad_norm"] = 900.0
    figure = draw([load_run(_make_run(tmp_path / "spike", rows))])
    assert _panels(figure)["gradient norm"].get_yscale() == "log"
    assert _panels(figure)["loss [nat/token]"].get_yscale() == "linear"


def test_reference_levels_are_drawn_and_named(run: Path) -> None:
    figure = draw([load_run(run)], references=[(6.5, "unigram entropy")])
    (line,) = [line for line in figure.axes[0].lines if line.get_gid() == "reference unigram entropy"]
    assert set(line.get_ydata()) == {6.5}
    assert figure.axes[0].get_ylim()[1] > 6.5
    assert _texts(figure)[-1] == "unigram entropy: 6.500"
    with pytest.raises(DataError, match="reference"):
        draw([load_run(run)], metrics=["throughput"], references=[(6.5, "unigram entropy")])


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (6e-4, "6e-4"), (2.5e-5, "2.5e-5"), (1e18, "1e18"), (1.0, "1e0")]
)
def test_powers(value: float, text: str) -> None:
    assert format_power(value) == text


def test_the_command_writes_a_picture(run: Path, tmp_path: Path) -> None:
    script = ROOT / "tools" / "plots" / "plot_runs.py"
    output = tmp_path / "pictures" / "curves.png"
    command = [sys.executable, str(script), str(run), "--x", "tokens", "--smooth", "3", "--output", str(output)]
    process = subprocess.run(
        [*command, "--reference", "6.5", "unigram entropy"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert str(output) in process.stdout
    pixels = imread(output)[..., :3]
    assert min(pixels.shape[:2]) > 800
    for colour in (COLOURS[0], COLOURS[1], COLOURS[2]):  # training, validation, test
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(pixels - rgb).max(axis=-1) < 0.02).sum() > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing: no metrics.jsonl here"),
        (["empty"], "no rows yet"),
        (["foreign"], "metrics.jsonl:1: not JSON"),
        (
            ["tiny", "--metrics", "mfu"],
            "metric 'mfu' is in none of the runs. Recorded: loss, perplexity, learning_rate",
        ),
        (["bare", "--x", "flops"], "no flops_per_token in run.json"),
        (["bare", "--x", "tokens"], "without consumed_tokens"),
        (["tiny", "--output", "tiny/metrics.jsonl/curves.png"], "cannot be written"),
    ],
)
@pytest.mark.usefixtures("run")
def test_bad_input_is_a_clear_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _make_run(tmp_path / "empty", [])
    _make_run(tmp_path / "bare", [{"iteration": 1, "train/lm_loss": 2.0}] * 2)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.jsonl").write_text("step,loss\n1,2\n")
    if arguments == ["bare", "--x", "flops"]:
        (tmp_path / "bare" / "metrics.jsonl").write_text('{"iteration": 1, "consumed_tokens": 5, "train/lm_loss": 2}')
    with pytest.raises(UserError, match=re.escape(message)):
        main(arguments)
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "losss"], "losss"),
        (["--smooth", "0"], "--smooth"),
        (["--output", "curves.txt"], ".png, .pdf, .svg"),
        (["--reference", "entropy", "6.5"], "give the level first"),
        (["--x", "epochs"], "epochs"),
    ],
)
def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def _make_described(folder: Path, configuration: str, steps: int = 100, **values: object) -> Path:
    optimizer = {"lr": values.pop("lr", 6e-4)}
    config = {"training": {"optimizer": optimizer, **values}, "checkpoint": {"save": str(folder)}}
    rows = [_record(step) for step in range(10, steps + 1, 10)]
    return _make_run(folder, rows, name=folder.name, configuration=configuration, config=config)


def test_runs_are_called_by_their_configurations(tmp_path: Path) -> None:
    folders = [
        _make_described(tmp_path / "a" / "run", "150M"),
        _make_described(tmp_path / "b" / "run", "150M", lr=1.2e-3),
        _make_described(tmp_path / "c" / "run", "demo"),
    ]
    assert [run.name for run in load_runs(folders)] == ["150M (lr=0.0006)", "150M (lr=0.0012)", "demo"]
    assert load_run(folders[0]).name == "150M"
    same = _make_described(tmp_path / "d" / "run", "demo")
    assert [run.name for run in load_runs([folders[2], same])] == [f"demo ({folders[2]})", f"demo ({same})"]


@pytest.mark.parametrize(("steps", "log_x", "scale"), [
    (1000, None, "linear"), (1010, None, "log"), (1010, False, "linear"), (100, True, "log"),
])  # fmt: skip
def test_a_short_run_can_be_seen_beside_a_long_one(steps: int, log_x: bool | None, scale: str, tmp_path: Path) -> None:
    runs = [_make_described(tmp_path / "short", "short"), _make_described(tmp_path / "long", "long", steps)]
    figure = draw(load_runs(runs), log_x=log_x)
    loss = _panels(figure)["loss [nat/token]"]
    assert loss.get_xscale() == scale
    low, high = loss.transData.inverted().transform(loss.transAxes.transform([(0, 0), (1, 0)]))[:, 0]
    if scale == "log":
        assert (math.log(100) - math.log(10)) / (math.log(high) - math.log(low)) > 0.3
    # The short one is drawn over the long one.
    assert len(loss.lines[-1].get_xdata()) <= len(loss.lines[0].get_xdata())
