"""Progress lines: what they say, on a terminal and in a log."""

import io
import math

import pytest
from rich.console import Console
from rich.text import Text

from megatron.monitor.format_quantities import format_count, format_duration
from megatron.monitor.metrics_writer import RunEvent
from megatron.monitor.writers.console import ConsoleWriter

TRAIN = {
    "consumed_tokens": 251658240,
    "train/lm_loss": 4.56789,
    "train/learning_rate": 5.0349e-5,
    "train/grad_norm": 1.2345,
    "train/tokens_per_second": 418234.0,
    "train/mfu": 0.4317,
    "train/data_wait_share": 0.002,
    "train/skipped_steps": 0,
    "train/seconds_left": 4996.0,
}


def _lines(metrics: dict[str, float], iteration: int = 120, **console: object) -> list[str]:
    file = io.StringIO()
    ConsoleWriter(1430, Console(file=file, highlight=False, **console)).write(iteration, metrics)
    return file.getvalue().splitlines()


def test_a_log_line_is_whole_and_plain() -> None:
    (line,) = _lines(TRAIN, width=80)
    parts = ["8%", "loss 4.5679", "lr 5.03e-05", "grad norm 1.234", "418k tokens/s", "MFU 43.2%", "1h 23m left"]
    assert line == "step   120/1,430 |   " + " | ".join(parts)


def test_unknown_mfu_is_not_shown_and_trouble_is() -> None:
    metrics = TRAIN | {"train/skipped_steps": 3, "train/data_wait_share": 0.25, "train/grad_norm": math.nan}
    del metrics["train/mfu"]
    (line,) = _lines(metrics)
    assert "MFU" not in line
    assert "3 skipped" in line
    assert "data wait 25%" in line
    assert "grad norm nan" in line


def test_evaluations_get_lines_of_their_own() -> None:
    lines = _lines(TRAIN | {"valid/lm_loss": 4.0, "valid/perplexity": math.exp(4.0)})
    assert lines[0].startswith("step   120/1,430 |   8% | loss 4.5679")
    assert lines[1:] == ["step   120/1,430 | validation | loss 4.0000 | perplexity 54.60"]
    final = _lines({"test/lm_loss": 20.0, "test/perplexity": math.exp(20.0)}, iteration=1430)
    assert final == ["step 1,430/1,430 | test | loss 20.0000 | perplexity 4.85e+08"]


def test_an_event_is_a_line() -> None:
    file = io.StringIO()
    ConsoleWriter(1430, Console(file=file, highlight=False)).mark(RunEvent(120, "growth", "grown by zero_key", {}))
    assert file.getvalue() == "step   120/1,430 | grown by zero_key\n"


def test_a_terminal_sees_the_same_words() -> None:
    (coloured,) = _lines(TRAIN, force_terminal=True, color_system="standard", legacy_windows=False)
    assert "\x1b[" in coloured
    assert [Text.from_ansi(coloured).plain] == _lines(TRAIN)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (999.4, "999"), (999.6, "1k"), (12345.0, "12.3k"), (999_600.0, "1M"), (1.5e9, "1.5B"), (3e11, "300B")],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m 00s"), (185, "3m 05s"), (3599.9, "1h 00m"), (7620, "2h 07m"), (356400, "4d 03h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
