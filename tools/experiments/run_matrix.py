"""Runs the cells of a matrix of experiments, one on each core, and keeps a row of results for each.

    python tools/experiments/run_matrix.py tools/experiments/growth.yml --list
    python tools/experiments/run_matrix.py tools/experiments/growth.yml [--jobs 2] [--only 'small-*'] [--folder DIR]

A cell is a few commands of the project in a folder of its own (tools/experiments/matrix.py has the format). Its row,
with the hash of all that decides its result, is written when it is done: killed and started again, this goes on and has
lost at most the cells that were running. A cell whose hash has changed runs again; --list shows which. Cells that
choose values by others' results wait for them. Ends with 1 when a cell has failed, with 75 when a signal has ended it.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import fnmatch
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any

from megatron_tokenformer import run_tool

import yaml

from megatron.config.local_path import local_path
from megatron.errors import STOPPED_ON_REQUEST, DataError
from megatron.io.durable import atomic_write
from megatron.io.json_files import read_json_object
from megatron.io.lease import LEASE_FILE, leased
from megatron.launch.supervise import FORWARDED_SIGNALS
from megatron.monitor.format_quantities import format_duration
from megatron.monitor.metrics_file import METRICS_FILE, sound_records
from megatron.monitor.provenance import git_commit
from tools.command_line import positive, tool_parser
from tools.experiments.matrix import Cell, Experiment, ReadyCell, Result

ROOT = Path(__file__).resolve().parents[2]
FIXED_COLUMNS = ("cell", "group", "hash", "status")
LAST_COLUMNS = ("steps", "tokens", "parameters", "flops_per_token", "seconds", "commit")
DONE, FAILED = "done", "failed"


def main(argv: Sequence[str]) -> int:
    """Runs the cells that are not done; returns the exit code.

    Raises CheckpointError while another process runs the same matrix in the same folder.
    """
    args = parse_args(argv)
    experiment = Experiment(args.matrix, args.folder)
    table = ResultsTable(experiment)
    if args.list:
        print("\n".join(listing(experiment, table)))
        return 0
    runner = Runner(experiment, table, args.jobs, args.only)
    for number in FORWARDED_SIGNALS:
        signal.signal(number, runner.stop)
    # Another matrix may share the folder, and the data in it; this one's cells and results have one writer.
    with leased(experiment.work, "run_matrix.py", file=experiment.work / f".{args.matrix.stem}{LEASE_FILE}"):
        return runner.run()


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("matrix", type=local_path, help="YAML file of the matrix")
    parser.add_argument("--folder", type=local_path, help="folder for data, runs and logs, in place of the matrix's")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="cells at a time (default: cores)")
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="cells whose name or group matches")
    parser.add_argument("--list", action="store_true", help="list the cells and stop")
    return parser.parse_args(argv)


class ResultsTable:
    """The CSV file of results: a row for each cell that was run."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.rows: dict[str, dict[str, str]] = {}
        if experiment.results.is_file():
            with experiment.results.open(encoding="utf-8", newline="") as file:
                self.rows = {row["cell"]: row for row in csv.DictReader(file)}

    def results(self) -> list[Result]:
        """Lists the cells that are done and whose configuration has not changed since."""
        known: list[Result] = []
        left = list(self.experiment.cells)
        # A cell that chooses from others' results is known when those are: their groups stand before its own.
        for cell in left:
            ready = self.experiment.ready(cell, known)
            row = self.rows.get(ready.name) if ready is not None else None
            if ready is None or row is None or (row["hash"], row["status"]) != (ready.hash, DONE):
                continue
            columns = self.experiment.matrix.groups[cell.group].measure
            measured = {column: float(row[column]) for column in columns}
            known.append(Result(ready.name, ready.hash, cell, ready.variables, measured))
        return known

    def add(self, ready: ReadyCell, status: str, facts: Mapping[str, Any]) -> None:
        """Writes a cell's row, in place of an earlier one."""
        values = {name: value for name, value in ready.variables.items() if not isinstance(value, dict | list)}
        varied = [*ready.cell.variables, *self.experiment.matrix.groups[ready.cell.group].choose]
        row: dict[str, Any] = {"cell": ready.name, "group": ready.cell.group, "hash": ready.hash, "status": status}
        row |= {name: values[name] for name in varied if name in values} | dict(facts)
        self.rows[ready.name] = {name: str(value) for name, value in row.items()}
        self._write()

    def _write(self) -> None:
        names = [name for row in self.rows.values() for name in row]
        inner = [name for name in dict.fromkeys(names) if name not in (*FIXED_COLUMNS, *LAST_COLUMNS)]
        self.experiment.results.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(self.experiment.results) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, [*FIXED_COLUMNS, *inner, *LAST_COLUMNS], restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())


@dataclass(frozen=True)
class Outcome:
    """The end of a cell's commands."""

    ready: ReadyCell
    status: str | None
    """None where a signal has ended them."""
    facts: Mapping[str, Any]


class Runner:
    """Runs cells as they become ready, and stops when it is asked to."""

    def __init__(self, experiment: Experiment, table: ResultsTable, jobs: int, only: Sequence[str] | None) -> None:
        self.experiment = experiment
        self.table = table
        self.jobs = jobs
        self.only = only
        self._stopped = threading.Event()
        self._children: list[subprocess.Popen[bytes]] = []
        self._running: set[str] = set()

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Ends what runs, and starts nothing more."""
        self._stopped.set()
        for child in list(self._children):
            if child.poll() is None:
                child.terminate()

    def run(self) -> int:
        """Runs what is left; returns the exit code. Raises DataError when the data cannot be prepared."""
        self._prepare()
        tried: set[str] = set()
        failed: list[str] = []
        with ThreadPoolExecutor(self.jobs) as pool:
            running: set[Future[Outcome]] = set()
            while not self._stopped.is_set():
                for ready in self._startable(tried):
                    if len(running) >= self.jobs:
                        break
                    tried.add(ready.name)
                    self._running.add(ready.name)
                    running.add(pool.submit(self._run_cell, ready))
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    outcome = future.result()
                    self._running.discard(outcome.ready.name)
                    if outcome.status is None:
                        continue
                    self.table.add(outcome.ready, outcome.status, outcome.facts)
                    failed += [outcome.ready.name] if outcome.status == FAILED else []
                    self._tell(outcome)
        if self._stopped.is_set():
            print("stopped; start again to go on")
            return STOPPED_ON_REQUEST
        self._write_report_words()
        left = len(self.experiment.cells) - len(self.table.results())
        print(f"{len(failed)} cells failed, {left} are not done, of {len(self.experiment.cells)}")
        return int(bool(failed))

    def _startable(self, tried: set[str]) -> Iterator[ReadyCell]:
        """Yields cells that can run now: what is left, after runs that it starts from and whose folders are gone."""
        results = self.table.results()
        done = {result.name for result in results}
        ready = {cell.name: cell for cell in self._ready(results)}
        left = [cell for name, cell in ready.items() if name not in done | tried and self._is_asked_for(cell)]
        gone = {name for cell in left for name in cell.needs if not ready[name].folder.is_dir()}
        yield from (ready[name] for name in sorted(gone - tried))
        yield from (cell for cell in left if not (gone | self._running) & set(cell.needs))

    def _ready(self, results: Sequence[Result]) -> list[ReadyCell]:
        found = (self.experiment.ready(cell, results) for cell in self.experiment.cells)
        return [ready for ready in found if ready is not None]

    def _is_asked_for(self, ready: ReadyCell) -> bool:
        names = (ready.name, ready.cell.group)
        return not self.only or any(fnmatch.fnmatch(name, pattern) for name in names for pattern in self.only)

    def _prepare(self) -> None:
        self.experiment.work.mkdir(parents=True, exist_ok=True)
        for path, words in self.experiment.preparations():
            if path.exists() or self._stopped.is_set():
                continue
            print(f"$ python {' '.join(words)}", flush=True)
            if self._call(words, self.experiment.work / "prepare.log") != 0:
                raise DataError(f"`python {' '.join(words)}` failed; see {self.experiment.work / 'prepare.log'}.")

    def _run_cell(self, ready: ReadyCell) -> Outcome:
        start = time.monotonic()
        ready.config.parent.mkdir(parents=True, exist_ok=True)
        ready.config.write_text(yaml.safe_dump(dict(ready.keys), sort_keys=False), encoding="utf-8")
        log = ready.config.with_suffix(".log")
        with log.open("wb") as output:
            # A command that has outlived a killed runner holds this lock by its standard output, and is waited for.
            fcntl.flock(output, fcntl.LOCK_EX)
            if self._stopped.is_set():
                return Outcome(ready, None, {})
            shutil.rmtree(ready.folder, ignore_errors=True)
        code = 0
        for words in ready.commands:
            if self._stopped.is_set():
                return Outcome(ready, None, {})
            code = self._call(words, log)
            if self._stopped.is_set():
                return Outcome(ready, None, {})
            if code != 0:
                return Outcome(
                    ready, FAILED, {"seconds": round(time.monotonic() - start), "commit": git_commit() or ""}
                )
        facts = self._measure(ready)
        status = DONE if facts is not None else FAILED
        seconds = round(time.monotonic() - start)
        return Outcome(ready, status, {**(facts or {}), "seconds": seconds, "commit": git_commit() or ""})

    def _call(self, words: Sequence[str], log: Path) -> int:
        """Runs a command of the project in its root folder, with one thread; returns its exit code."""
        with log.open("ab") as output:
            fcntl.flock(output, fcntl.LOCK_EX)
            output.write(f"$ python {' '.join(words)}\n".encode())
            output.flush()
            child = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            self._children.append(child)
            if self._stopped.is_set():
                child.terminate()
            code = child.wait()
            self._children.remove(child)
        return code

    def _measure(self, ready: ReadyCell) -> dict[str, Any] | None:
        """Reads what a cell's run has recorded; None where it has not recorded what is to be measured."""
        group = self.experiment.matrix.groups[ready.cell.group]
        try:
            rows, _ = sound_records(ready.folder / METRICS_FILE)
            description = read_json_object(ready.folder / "run.json")
        except (DataError, OSError, ValueError):
            return None
        facts: dict[str, Any] = {}
        for column, metric in group.measure.items():
            values = _recorded(metric, rows, ready.folder)
            if not values:
                return None
            facts[column] = f"{values[-1]:.6f}"
        return facts | {
            "steps": rows[-1]["iteration"],
            "tokens": rows[-1]["iteration"] * description["tokens_per_step"],
            "parameters": description["parameters"],
            "flops_per_token": description["flops_per_token"],
        }

    def _tell(self, outcome: Outcome) -> None:
        """Prints how a cell has ended, and how long the rest will take by the mean of those that are done."""
        results = self.table.results()
        column = next(iter(self.experiment.matrix.groups[outcome.ready.cell.group].measure))
        left = len(self.experiment.cells) - len(results)
        seconds = mean(float(row["seconds"]) for row in self.table.rows.values())
        what = f"{column} {outcome.facts[column]}" if outcome.status == DONE else f"failed, see {outcome.ready.config}"
        print(
            f"[{len(results)}/{len(self.experiment.cells)}] {outcome.ready.name}: {what}, "
            f"{format_duration(outcome.facts['seconds'])}; {format_duration(seconds * left / self.jobs)} left",
            flush=True,
        )

    def _write_report_words(self) -> None:
        words = report_words(self.experiment, self.table)
        if words:
            path = self.experiment.work / "report.txt"
            path.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
            print(f"python tools/growth_report.py @{path} --output {self.experiment.results.parent}")


def _recorded(metric: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[float]:
    """Returns the values that a cell's run has recorded of a metric, or the one at a key of a JSON file of the cell."""
    file, colon, key = metric.rpartition(":")
    if not colon:
        return [row[metric] for row in rows if isinstance(row.get(metric), int | float)]
    try:
        value = read_json_object(folder / file).get(key)
    except (OSError, ValueError):
        return []
    return [value] if isinstance(value, int | float) else []


def report_words(experiment: Experiment, table: ResultsTable) -> list[str]:
    """Lists the words that tools/growth_report.py takes for cells whose runs are there, from the root folder."""
    results = table.results()
    done = {result.name for result in results}
    ready = [experiment.ready(cell, results) for cell in experiment.cells]
    there = [cell for cell in ready if cell is not None and cell.name in done and cell.folder.is_dir()]
    words = [cell.report for cell in there if cell.report is not None]
    return [word.replace(f"{ROOT}{os.sep}", "") for word in words]


def listing(experiment: Experiment, table: ResultsTable) -> list[str]:
    """Lists every cell with how far it is; what it has yet to choose is not named."""
    results = table.results()
    done = {result.name for result in results}
    lines = []
    for cell in experiment.cells:
        ready = experiment.ready(cell, results)
        if ready is None:
            lines.append(f"{describe(cell)}: waits for others")
            continue
        row = table.rows.get(ready.name)
        state = "to do"
        if ready.name in done and row is not None:
            state = f"done, {row['seconds']} s"
        elif row is not None:
            state = "to do, failed before" if row["hash"] == ready.hash else "to do, its configuration has changed"
        lines.append(f"{ready.name}: {state}")
    seconds = sum(float(row["seconds"]) for row in table.rows.values())
    return [*lines, f"{len(done)} of {len(experiment.cells)} cells done, {format_duration(seconds)} of one core so far"]


def describe(cell: Cell) -> str:
    """Names a cell by its group and values."""
    return " ".join([cell.group, *(f"{name}={value}" for name, value in cell.variables.items())])


if __name__ == "__main__":
    run_tool(main)
