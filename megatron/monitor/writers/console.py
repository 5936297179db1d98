"""Prints progress lines: the same words on a terminal, where rich colours them, and in a batch system's log."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.console import Console
from rich.text import Text

from megatron.config.sections.monitor import MonitorConfig
from megatron.monitor.format_quantities import format_count, format_duration
from megatron.monitor.metrics_writer import WRITERS, MonitoredRun, RunEvent, lost_on


class _TrainingConsole(Console):
    """rich's console, which would exit the process when the reader of its output goes away (`| head`)."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("the reader of standard output is gone")


class ConsoleWriter:
    """Prints a line for the training metrics of a record and one for each evaluation in it."""

    def __init__(self, total_iterations: int, console: Console | None = None) -> None:
        """Takes the length of the run [steps]; `console` defaults to standard output."""
        self._total = total_iterations
        # Lines stay whole (soft_wrap below): a log folded at 80 columns can be neither searched nor read.
        self._console = console or _TrainingConsole(highlight=False)

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        step = self._step(iteration)
        for split, title in _SPLITS.items():
            parts = [
                (_style(key), show(metrics[f"{split}/{key}"]))
                for key, show in _COLUMNS.items()
                if f"{split}/{key}" in metrics
            ]
            parts = [part for part in parts if part[1]]
            if not parts:
                continue
            line = Text().append(step, style="dim")
            if title:
                line.append(f" | {title}", style="bold cyan")
            else:
                line.append(f" | {iteration / self._total:4.0%}", style="dim")
            for style, text in parts:
                line.append(" | ", style="dim").append(text, style=style)
            with lost_on("standard output", (OSError,)):
                self._console.print(line, soft_wrap=True)

    def mark(self, event: RunEvent) -> None:
        line = Text().append(self._step(event.iteration), style="dim").append(" | ", style="dim")
        with lost_on("standard output", (OSError,)):
            self._console.print(line.append(event.text, style="bold magenta"), soft_wrap=True)

    def _step(self, iteration: int) -> str:
        total = f"{self._total:,}"
        return f"step {iteration:>{len(total)},}/{total}"

    def close(self) -> None:
        """Does nothing: no file is held open."""


@WRITERS.register("console")
def build_console(config: MonitorConfig, run: MonitoredRun) -> ConsoleWriter:
    """Builds the writer of progress lines."""
    return ConsoleWriter(run.total_iterations)


def _style(key: str) -> str:
    return "bold" if key == "lm_loss" else ""


_SPLITS = {"train": "", "valid": "validation", "test": "test"}

# Columns of a line, in this order; an empty text is left out.
_COLUMNS: dict[str, Callable[[float], str]] = {
    "lm_loss": lambda value: f"loss {value:.4f}",
    "distillation_loss": lambda value: f"distillation {value:.4f}",
    "perplexity": lambda value: f"perplexity {value:,.2f}" if value < 1e6 else f"perplexity {value:.2e}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "grad_norm": lambda value: f"grad norm {value:.3f}",
    "tokens_per_second": lambda value: f"{format_count(value)} tokens/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "data_wait_share": lambda value: f"data wait {value:.0%}" if value >= 0.01 else "",
    "memory_gib": lambda value: f"{value:.1f} GiB",
    "skipped_steps": lambda value: f"{value:.0f} skipped" if value else "",
    "seconds_left": lambda value: f"{format_duration(value)} left" if value else "",
}
