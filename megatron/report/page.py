"""Builds the page that shows runs: tables and figures, from one template, in one file that needs no network."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from megatron.config.redaction import redact_urls
from megatron.errors import DataError
from megatron.growth.arms import make_arms, shared_spread
from megatron.growth.loss_curves import read_curve
from megatron.growth.verdict import gate, judge, verdict
from megatron.monitor.format_quantities import format_count, format_duration
from megatron.report.figures import MARKED_EVENTS, curves_figure, scores_figure
from megatron.report.foreign_values import one_line
from megatron.report.panels import format_power
from megatron.report.run_files import RunFiles, SavedCheckpoint
from megatron.report.share_losses import share_table
from megatron.report.time_spent import PARTS, time_spent

FOLDER = Path(__file__).parent
MOST_EVENTS = 200
MOST_SAMPLES = 8
"""Steps of a prompt that are shown; the first and the last are among them."""
MOST_CHARACTERS = 4000
"""Of a prompt, a sample or an event [characters]."""
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn the direction of what follows them."""
UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
FIGURE_OPTIONS = {
    "responsive": True,
    "displaylogo": False,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"],
}


@dataclass(frozen=True)
class Verdict:
    """Verdict on growth, of all runs together."""

    sentences: Sequence[str]
    arms: Sequence[Sequence[str]]
    """Name, seeds, FLOPs and final loss of each arm, the lowest loss first."""


@dataclass(frozen=True)
class Page:
    """A report, before it is written."""

    runs: Sequence[RunFiles]
    figures: Mapping[str, go.Figure]
    verdict: Verdict | None
    problems: Sequence[str] = field(default_factory=list)

    def html(self, *, live_seconds: float | None = None, version: str = "") -> str:
        """Renders the page; with `live_seconds`, as one of a server that it asks for news every so often [s]."""
        environment = Environment(
            loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        runs = self.runs
        marked = {event["event"] for run in runs for event in run.events} | (
            {"growth"} if any(run.record.events for run in runs) else set()
        )
        return environment.get_template("page.html.jinja").render(
            title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            live=None if live_seconds is None else f"{live_seconds:g}",
            version=version,
            style=(FOLDER / "page.css").read_text(encoding="utf-8"),
            live_script=(FOLDER / "live.js").read_text(encoding="utf-8"),
            plotly=get_plotlyjs() if live_seconds is None else "",
            runs=runs,
            facts=fact_rows(runs),
            differences=differences(runs),
            times=time_bars(runs),
            problems=[readable(problem) for problem in self.problems],
            verdict=self.verdict,
            figures={name: _figure_html(name, figure) for name, figure in self.figures.items()},
            marked=_listed([kind.replace("_", "-") for kind in MARKED_EVENTS if kind in marked]),
            shares=[(run.name, table) for run in runs if (table := share_table(run.record.records)) is not None],
            samples=[(run.name, list(_samples(run))) for run in runs if run.samples],
            scores=[(run.name, *_score_table(run)) for run in runs if run.scores],
            events=[(run.name, _events(run), len(run.events)) for run in runs if run.events],
            checkpoints=[(run.name, list(map(_checkpoint, run.checkpoints))) for run in runs if run.checkpoints],
        )

    def figures_json(self, version: str) -> str:
        """Writes the figures as JSON, with a word that changes when they may have."""
        figures = {name: json.loads(figure.to_json()) for name, figure in self.figures.items()}
        return json.dumps({"version": version, "figures": figures}, allow_nan=False)


def build_page(runs: Sequence[RunFiles], x: str = "steps", smooth: int = 1) -> Page:
    """Draws the runs. Raises DataError where they have no place on the horizontal axis `x`."""
    figures = {
        "curves": curves_figure(runs, x, smooth),
        "scores": scores_figure(runs),
    }
    problems = [problem for run in runs for problem in run.problems]
    found = None
    if any(run.record.events for run in runs):
        try:
            found = growth_verdict(runs)
        except DataError as error:
            problems.append(f"no verdict on growth: {error}")
    return Page(runs, {name: figure for name, figure in figures.items() if figure is not None}, found, problems)


def growth_verdict(runs: Sequence[RunFiles]) -> Verdict:
    """Judges grown runs against those that did not grow, as tools/growth_report.py does.

    Raises DataError for a run without what that needs.
    """
    curves = [read_curve(str(run.folder))[0] for run in runs]
    arms = make_arms([(None, curve) for curve in curves])
    outcomes = judge(arms, curves)
    spread = shared_spread(arms)
    rows = []
    for arm in sorted(arms, key=lambda arm: arm.loss().mean):
        loss = arm.loss(spread)
        width = f" ± {loss.half_width:.3f}" if loss.half_width < float("inf") else ""
        rows.append((one_line(arm.name), f"{len(arm.runs)}", format_power(arm.first.flops), f"{loss.mean:.3f}{width}"))
    return Verdict([sentence for sentence in (verdict(outcomes), gate(arms)) if sentence], rows)


def readable(text: str) -> str:
    """Returns text for a page: of moderate length, without characters that control a terminal or hide what follows."""
    whole = text[:MOST_CHARACTERS].encode("utf-8", errors="replace").decode("utf-8")
    shown = "".join("\N{REPLACEMENT CHARACTER}" if _is_control(letter) else letter for letter in whole)
    return shown + (" …" if len(text) > MOST_CHARACTERS else "")


def _is_control(letter: str) -> bool:
    return letter in TURNING or (letter not in "\n\t" and unicodedata.category(letter) in ("Cc", "Cs"))


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + (words[-1] if words else "")


def _figure_html(name: str, figure: go.Figure) -> str:
    html: str = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, config=FIGURE_OPTIONS, default_width="100%"
    )
    return html


def _state(run: RunFiles) -> str:
    """Says where a run stands, by the last of its events."""
    words = {
        "end": "finished", "stop": "stopped on request", "error": "ended with an error", "rollback": "rolling back",
    }  # fmt: skip
    told = [event for event in run.events if event["event"] in (*words, "start", "resume")]
    if not told:
        return ""
    last = told[-1]
    since = last["time"].replace("T", " ")[:16]
    return f"{words.get(last['event'], 'running, or killed, since')} {since} UTC"


def _steps(run: RunFiles) -> str:
    done = run.record.records[-1]["iteration"] if run.record.records else 0
    total = run.fact("config", "training", "train_iters")
    return f"{done:,} of {total:,}" if isinstance(total, int) else f"{done:,}"


def _model(run: RunFiles) -> str:
    model = run.fact("config", "model")
    if not isinstance(model, Mapping):
        return ""
    layers, width = model.get("num_layers"), model.get("hidden_size")
    return f"{model.get('architecture')}, {layers} layers of {width}"


def _layout(run: RunFiles) -> str:
    ranks, parallel = run.fact("ranks"), run.fact("config", "parallel")
    if not isinstance(ranks, int):
        return ""
    sizes = parallel if isinstance(parallel, Mapping) else {}
    split = [f"{name} {sizes[key]}" for name, key in (("tensor", "model_parallel_size"), ("pipe", "pipe_parallel_size"))
             if isinstance(sizes.get(key), int) and sizes[key] > 1]  # fmt: skip
    return f"{ranks} rank{'s' * (ranks != 1)}" + (f" ({', '.join(split)})" if split else "")


def _packages(run: RunFiles) -> str:
    packages = run.fact("packages")
    known = packages if isinstance(packages, Mapping) else {}
    words = [f"{name} {known[name]}" for name in ("torch", "deepspeed") if name in known]
    commit = run.fact("git_commit")
    return ", ".join([*words, *([f"code {commit[:12]}"] if isinstance(commit, str) else [])])


def _lowest(run: RunFiles) -> str:
    rows = [row for row in run.record.records if row.get("valid/lm_loss") is not None]
    rows = [row for row in rows if math.isfinite(row["valid/lm_loss"])]
    if not rows:
        return ""
    best = min(rows, key=lambda row: row["valid/lm_loss"])
    return f"{best['valid/lm_loss']:.4f} at step {best['iteration']:,}"


def _of(metric: str, write: Callable[[float], str]) -> Callable[[RunFiles], str]:
    def last(run: RunFiles) -> str:
        value = run.last(metric)
        return "" if value is None else write(value)

    return last


def _timed(run: RunFiles) -> str:
    seconds = sum(time_spent(run.record.records).values())
    return format_duration(seconds) if seconds else ""


FACTS: dict[str, Callable[[RunFiles], str]] = {
    "folder": lambda run: str(run.folder),
    "state": _state,
    "model": _model,
    "parameters": lambda run: "" if run.record.parameters is None else f"{run.record.parameters:,}",
    "steps": _steps,
    "training tokens": _of("consumed_tokens", format_count),
    "training compute": _of("training_flops", lambda value: f"{format_power(value)} FLOP"),
    "training loss": _of("train/lm_loss", "{:.4f} nat/token".format),
    "validation loss": _of("valid/lm_loss", "{:.4f} nat/token".format),
    "lowest validation loss": _lowest,
    "test loss": _of("test/lm_loss", "{:.4f} nat/token".format),
    "throughput": _of("train/tokens_per_second", lambda value: f"{format_count(value)} tokens/s"),
    "MFU": _of("train/mfu", "{:.1%}".format),
    "peak memory of a rank": _of("train/memory_gib", "{:.2f} GiB".format),
    "time between first and last row": _timed,
    "layout": _layout,
    "device": lambda run: str(run.fact("device") or ""),
    "software": _packages,
}
"""Facts of a run by their names; an empty text is left out where no run has one."""


def fact_rows(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Returns the facts that any of the runs has, one for each run."""
    rows = [(label, [one_line(redact_urls(find(run))) for run in runs]) for label, find in FACTS.items()]
    return [(label, values) for label, values in rows if any(values)]


def time_bars(runs: Sequence[RunFiles]) -> list[tuple[str, str, list[tuple[str, str, str, str]]]]:
    """Returns the whole time of each run that has timed its steps, and its parts: name, colour, share, time."""
    found = []
    for run in runs:
        spent = time_spent(run.record.records)
        whole = sum(spent.values())
        if whole > 0.0:
            parts = [
                (part, colour, f"{100.0 * spent[part] / whole:.1f}", format_duration(spent[part]))
                for part, colour in PARTS.items()
                if spent[part] > 0.0
            ]
            found.append((run.name, format_duration(whole), parts))
    return found


def differences(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Returns the settings in which runs differ, by key, with each run's value; without run.json it is not known."""
    known = [run.record.settings if run.description.get("config") else {} for run in runs]
    keys = dict.fromkeys(key for settings in known for key in settings)
    rows = [(key, [settings.get(key, "?") for settings in known]) for key in keys]
    return [(key, values) for key, values in rows if len({value for value in values if value != "?"}) > 1]


def _samples(run: RunFiles) -> Iterator[tuple[str, list[tuple[str, str, bool]], int]]:
    """Yields each prompt, what followed it at some of the steps, and the number of all steps."""
    by_prompt: dict[str, dict[int, Mapping[str, Any]]] = {}
    for sample in run.samples:
        by_prompt.setdefault(sample["prompt"], {})[sample["iteration"]] = sample
    for prompt, found in by_prompt.items():
        steps = sorted(found)
        if len(steps) > MOST_SAMPLES:
            spread = (len(steps) - 1) / (MOST_SAMPLES - 1)
            steps = [steps[round(index * spread)] for index in range(MOST_SAMPLES)]
        texts = [(f"{step:,}", readable(found[step]["text"]), found[step].get("finished") is True) for step in steps]
        yield readable(prompt), texts, len(found)


def _score_table(run: RunFiles) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """Returns the steps that were scored, and each metric's values there with their standard errors."""
    newest = {(scores.iteration, scores.settings): scores for scores in run.scores}
    columns = [f"step {step:,}" + (f" ({settings})" if settings else "") for step, settings in newest]
    metrics = sorted({metric for scores in newest.values() for metric in scores.metrics})
    rows = []
    for task, metric in metrics:
        values = []
        for scores in newest.values():
            value, error = scores.metrics.get((task, metric), (None, None))
            values.append("" if value is None else f"{value:.4g}" + (f" ± {error:.2g}" if error else ""))
        rows.append((task, metric, values))
    return columns, rows


def _events(run: RunFiles) -> list[dict[str, str]]:
    return [
        {
            "time": event["time"][:19].replace("T", " "),
            "step": f"{event['iteration']:,}",
            "kind": one_line(event["event"]),
            "text": readable(redact_urls(event["text"])),
        }
        for event in run.events[-MOST_EVENTS:]
    ]


def _checkpoint(checkpoint: SavedCheckpoint) -> dict[str, str]:
    size = checkpoint.size
    unit, name = next(((unit, name) for unit, name in UNITS if size >= unit), UNITS[-1])
    return {
        "name": checkpoint.name,
        "size": f"{size / unit:.3g} {name}",
        "num_files": f"{checkpoint.num_files}",
        "layout": checkpoint.layout,
        "damage": readable("; ".join(checkpoint.damage)),
    }
