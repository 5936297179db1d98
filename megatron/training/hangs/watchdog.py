"""Notices a step that will not end, reports what every rank is doing, and ends the run with an exit code of its own.

Each rank watches itself: a step that takes `hang_factor` times the usual, and `hang_min_seconds` at least, is a hang,
and so is a collective, in any part of the run, that is about to run into its time limit. The rank that notices calls on
all others through the store in which they met; those that can write their stacks, and the one that called compares
what they have told. Ranks that are stopped cannot answer: what they told last, every two seconds, speaks for them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch._C._distributed_c10d as c10d
from torch import distributed

from megatron.config.sections.watchdog import WatchdogConfig
from megatron.errors import HUNG
from megatron.mpu.collective_trace import CollectiveTrace
from megatron.training.hangs.rank_messages import HangNotice, RankMessages
from megatron.training.hangs.rank_state import RankState, describe_frame, is_compiling, main_thread_frame
from megatron.training.hangs.verdict import Verdict, find_verdict, name_ranks, waiting_line

if TYPE_CHECKING:
    from megatron.training.stop_request import StopRequest

logger = logging.getLogger(__name__)

BEAT_SECONDS = 2.0
"""Time between two messages of a rank, and between two looks at its own step."""
ANSWER_SECONDS = 10.0
"""Time that a rank has to answer before it counts as silent."""
STORE_SECONDS = 20.0
"""Time that the store has to answer before it counts as lost."""
LINGER_SECONDS = 1.5
"""Time that rank 0, which may keep the store, stays for the others to read the end of the report."""
STEPS = 50
"""Steps whose median is the usual one."""
FIRST_STEPS = 5
"""Steps before there is a usual one: the first ones compile, and fill caches."""
COLLECTIVE_SHARE = 0.9
"""Share of a collective's time limit after which the run reports, while it still can."""
REPEATS = 3
"""Hangs at the same step after which no new start is asked for: it would hang again."""
HANGS_FOLDER = "hangs"


class Watchdog:
    """Watches the steps of this rank in threads of its own, from `start` to `close`."""

    def __init__(self, config: WatchdogConfig, folder: Path, stop: StopRequest, trace: CollectiveTrace) -> None:
        """Takes what a report needs: the run's folder, what ends the process, and the collectives of this rank."""
        self.config = config
        self.trace = trace
        self._folder = folder
        self._stop = stop
        self._messages: RankMessages | None = None
        self._closed = threading.Event()
        self._reporting = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._rank = distributed.get_rank() if distributed.is_initialized() else 0
        self._host = socket.gethostname()
        self._beats = 0
        self._phase, self._step, self._in_step = "the start of the run", 0, False
        self._seconds = 0.0
        self._open: tuple[str, int] | None = None
        self._open_seconds = 0.0
        self._last_round = time.monotonic()
        self._peers_before: dict[int, int] = {}
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._own_seconds: list[float] = []

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Times the step `number`, which is taken inside."""
        waited, since = self.trace.waited.seconds(), time.monotonic()
        self._enter(f"step {number}", number, in_step=True)
        try:
            with contextlib.nullcontext() if self.trace.tally is None else self.trace.tally.step():
                yield
        finally:
            self._enter(f"what follows step {number}", number, in_step=False)
        seconds = time.monotonic() - since
        self._steps.append(seconds)
        self._own_seconds.append(seconds - (self.trace.waited.seconds() - waited))

    def own_step_seconds(self) -> float:
        """Returns the mean time of the steps since the last call that this rank did not spend in collectives [s]."""
        own, self._own_seconds = self._own_seconds, []
        return statistics.fmean(own) if own else 0.0

    def begin_anew(self) -> None:
        """Drops the times of earlier steps, because those to come are of another model."""
        self._steps.clear()
        self._enter("the start of the run", self._step, in_step=False)

    def start(self) -> None:
        """Begins to watch, unless the watchdog is off. The process group exists."""
        if self.config.hang_factor == 0:
            return
        self._messages = RankMessages.connect()
        targets = [self._watch] if self._messages is None else [self._watch, self._tell]
        self._threads = [threading.Thread(target=target, name="watchdog", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads: none of them may be inside torch while the interpreter goes down."""
        self._closed.set()
        for thread in self._threads:
            thread.join(STORE_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def _enter(self, phase: str, step: int, *, in_step: bool) -> None:
        self._seconds = 0.0
        self._phase, self._step, self._in_step = phase, step, in_step

    def _limit(self) -> float | None:
        """Returns the time that a step may take [s]; None as long as nobody knows."""
        if len(self._steps) < FIRST_STEPS:
            return None
        return max(self.config.hang_min_seconds, self.config.hang_factor * statistics.median(self._steps))

    def _watch(self) -> None:
        """Counts the time that this process runs; alone, or where the store is lost, also reports."""
        last = time.monotonic()
        while not self._closed.wait(BEAT_SECONDS):
            now = time.monotonic()
            # What was stopped as a whole, and went on, has lost time and does not hang.
            self._count(min(now - last, 2 * BEAT_SECONDS))
            last = now
            self._arm_dump()
            reason = self._reason()
            if reason is None:
                continue
            if self._messages is None:
                if not is_compiling(main_thread_frame()):
                    self._report(self._notice(reason))
            elif now - self._last_round > STORE_SECONDS:
                self._report(self._notice(reason), store_is_lost=True)

    def _tell(self) -> None:
        """Tells the others how far this rank is, and reports when a rank has called."""
        messages = self._messages
        # A store whose process has gone; its rank's end ends this one.
        with contextlib.suppress(RuntimeError):
            while messages is not None and not self._closed.wait(BEAT_SECONDS):
                messages.tell(self._describe())
                reason = self._reason()
                if reason is not None and not self._is_excused(messages):
                    messages.notify(self._notice(reason))
                notice = messages.notice()
                self._last_round = time.monotonic()
                if notice is not None:
                    self._report(notice)

    def _count(self, seconds: float) -> None:
        self._seconds += seconds
        operation = self.trace.open_operation()
        current = None if operation is None else (operation.channel, operation.number)
        self._open_seconds = self._open_seconds + seconds if current == self._open and current is not None else 0.0
        self._open = current

    def _arm_dump(self) -> None:
        """Lets a thread without Python write the stacks to the log where a call keeps all of Python waiting."""
        limit = self._limit()
        if self._in_step and limit is not None:
            seconds = max(limit - self._seconds, 0.0) + ANSWER_SECONDS
            faulthandler.dump_traceback_later(seconds, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _reason(self) -> str | None:
        """Says what takes too long on this rank, if anything does."""
        limit = self._limit()
        if self._in_step and limit is not None and self._seconds > limit:
            usual = statistics.median(self._steps)
            return (
                f"{self._phase} has taken {self._seconds:.0f} s, and the last ones took {usual:.2g} s each (limit "
                f"{limit:.0f} s, by `hang_factor` and `hang_min_seconds`)"
            )
        if self._collective_is_late():
            minutes = self.config.distributed_timeout_minutes
            return (
                f"a collective in {self._phase} has taken {self._open_seconds:.0f} s, and may take {minutes:g} minutes "
                "(`distributed_timeout_minutes`)"
            )
        return None

    def _collective_is_late(self) -> bool:
        return self._open_seconds > COLLECTIVE_SHARE * 60.0 * self.config.distributed_timeout_minutes

    def _is_excused(self, messages: RankMessages) -> bool:
        """Tells whether a rank for which this one may be waiting is busy with something that may take long.

        It must have told so since the last look. A collective that is about to fail is never excused.
        """
        if self._collective_is_late():
            return False
        if is_compiling(main_thread_frame()):
            return True
        others = {rank: state for rank, state in messages.others().items() if state is not None}
        before, self._peers_before = self._peers_before, {rank: state.beat for rank, state in others.items()}
        excused = [rank for rank, state in others.items() if state.excused]
        return not before or any(before.get(rank) != others[rank].beat for rank in excused)

    def _describe(self) -> RankState:
        frame = main_thread_frame()
        compiling = is_compiling(frame)
        self._beats += 1
        return RankState(
            rank=self._rank,
            host=self._host,
            pid=os.getpid(),
            beat=self._beats,
            time=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
            step=self._step,
            phase=f"{self._phase}, compiling" if compiling else self._phase,
            excused=compiling or not self._in_step,
            seconds=self._seconds,
            place=describe_frame(frame),
            channels=dict(self.trace.channels),
            open=self.trace.open_operation(),
        )

    def _notice(self, reason: str) -> HangNotice:
        """Chooses the folder of the report; a step that has hung often before asks for no new start."""
        name = f"step{self._step}"
        number = 1
        while (self._folder / HANGS_FOLDER / _numbered(name, number)).exists():
            number += 1
        return HangNotice(self._rank, reason, _numbered(name, number), 1 if number >= REPEATS else HUNG)

    def _report(self, notice: HangNotice, *, store_is_lost: bool = False) -> None:
        """Writes what this rank knows, and as the one that noticed what all know; ends the process."""
        if not self._reporting.acquire(blocking=False):
            return
        messages, state = self._messages, self._describe()
        self._write_stacks(notice, state)
        if messages is None or store_is_lost:
            self._say(notice, _alone(state, store_is_lost=store_is_lost))
        else:
            # The rank with the store may go first.
            with contextlib.suppress(RuntimeError):
                messages.answer(state)
                if notice.rank == self._rank:
                    answers = messages.answers(ANSWER_SECONDS)
                    silent = [rank for rank in range(messages.size) if rank not in answers]
                    self._say(notice, find_verdict(answers, messages.heard(silent)))
                    messages.end()
                else:
                    messages.wait_for_end(2 * ANSWER_SECONDS)
                if self._rank == 0:
                    time.sleep(LINGER_SECONDS)
        self._stop.end_process(notice.exit_code)

    def _write_stacks(self, notice: HangNotice, state: RankState) -> None:
        with self._report_file(notice, f"rank{self._rank}.txt") as path:
            lines = [f"rank {state.rank} on {state.host}, process {state.pid}, {state.time} UTC"]
            lines.append(f"in {state.phase} for {state.seconds:.0f} s, at {state.place}")
            lines += [
                f"{name} ({name_ranks(channel.ranks)}): {channel.begun} operations begun, "
                f"{channel.finished} returned; last begun: {channel.operation}"
                for name, channel in state.channels.items()
            ]
            with path.open("w", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            recorded = _flight_record()
            if recorded:
                path.with_name(f"rank{self._rank}.flight.json").write_bytes(recorded)

    def _say(self, notice: HangNotice, verdict: Verdict) -> None:
        after = (
            f"It is hang number {REPEATS} at this step, so no new start is asked for: exit code 1."
            if notice.exit_code != HUNG
            else f"The run ends with exit code {HUNG}: start it again to go on from its last checkpoint."
        )
        stacks = f"Stacks: {self._folder / HANGS_FOLDER / notice.folder}. {after}"
        text = "\n".join([f"HANG: {notice.reason}.", *(f"  {line}" for line in verdict.lines), stacks])
        logger.error("%s", text)
        with self._report_file(notice, "report.txt") as path:
            path.write_text(text + "\n", encoding="utf-8")

    @contextmanager
    def _report_file(self, notice: HangNotice, name: str) -> Iterator[Path]:
        """Yields the path of a file of the report; where it cannot be written, the log has to do."""
        folder = self._folder / HANGS_FOLDER / notice.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield folder / name
        except OSError as error:
            logger.error("%s cannot be written: %s", folder / name, error.strerror)


@contextmanager
def watched(config: WatchdogConfig, folder: Path, stop: StopRequest, trace: CollectiveTrace) -> Iterator[Watchdog]:
    """Watches this rank while the body runs. The process group exists."""
    watchdog = Watchdog(config, folder, stop, trace)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()


def _alone(state: RankState, *, store_is_lost: bool) -> Verdict:
    """Returns the verdict of a rank that hears no other."""
    if not store_is_lost:
        return find_verdict({state.rank: state}, {})
    keeper = "torchrun's agent" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True) else "rank 0"
    line = (
        f"{keeper} is silent: its process, which keeps the store at {os.environ['MASTER_ADDR']}:"
        f"{os.environ['MASTER_PORT']} through which ranks talk, is stopped, dead or cut off."
    )
    return Verdict((0,), (line, f"rank {state.rank}, which says this, {waiting_line(state)}"))


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}.{number}"


def _flight_record() -> bytes:
    """Returns torch's record of the last operations on GPUs or gloo, as JSON; nothing where it keeps none."""
    names = ["_dump_nccl_trace_json", "_dump_fr_trace_json"] if torch.cuda.is_available() else ["_dump_fr_trace_json"]
    dump = next((getattr(c10d, name) for name in names if hasattr(c10d, name)), None)
    return bytes(dump()) if dump is not None else b""
