"""One writer per folder: a lease, which names its holder and shows by a heartbeat that the holder lives.

The lease is a file of filelock's SoftFileLease, made by an exclusive create, which file systems without locks have too.
It is touched every BEAT_SECONDS by a thread of the holder: a step, a validation or a save may take hours, and a process
that waits in one of them is still going to write. A process that has ended, or a machine that is lost, touches nothing.

Whoever finds a lease judges its holder by what it can see:

    on this machine   the process with that id and that start time runs, or it does not: decided at once
    elsewhere         on another machine or in another container's process namespace: the file's time is watched, and
                      compared with nothing but itself on this process's own clock, since clocks of machines and file
                      servers differ. A change means that the holder lives. STALE_SECONDS without one mean that it is
                      gone: twelve beats, which a busy file server or a long call into C does not swallow.

A holder that was taken for dead and wakes up finds that the lease is no longer its own, and must write no more.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from megatron.errors import CheckpointError

logger = logging.getLogger(__name__)

LEASE_FILE = ".lease"
BEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
POLL_SECONDS = 1.0
EXIT_SECONDS = 2.0
"""Time that a process which was killed may take to be gone, when the next start comes at once."""
LONGEST_VALUE = 100
"""Characters of a value in the file: filelock takes a file of more than 1,024 bytes for damaged."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease, as the lease's file describes it."""

    token: str
    """Tells this claim from any other."""
    pid: int
    node: str
    boot: str
    """The machine's start, as its kernel names it: a restarted machine, or another of the same name, has another."""
    namespace: str
    """The process namespace, in which `pid` is meant."""
    since: str
    what: str
    stale_seconds: float
    """Time without a heartbeat after which the holder agrees to be taken for dead."""

    def __str__(self) -> str:
        """Names the holder in a message."""
        since = f" since {self.since}" if self.since else ""
        return f"process {self.pid} on {self.node}{f' ({self.what})' if self.what else ''}{since}"

    @property
    def is_visible(self) -> bool:
        """Tells whether this process would see the holder, if it runs."""
        return "" not in (self.boot, self.namespace) and (self.node, self.boot, self.namespace) == _place()

    @property
    def has_another_machines_name(self) -> bool:
        """Tells whether a machine of this one's name holds it that is not this one, or was not started then."""
        node, boot, _ = _place()
        return self.node == node and self.boot not in ("", boot)


class FolderLease:
    """This process's claim to be the one that writes a folder."""

    def __init__(self, folder: Path, what: str, *, key: str = "", file: Path | None = None) -> None:
        """Prepares a claim for `what`, as in "train.py".

        `key` is the configuration's name of the folder, for messages; `file` is `.lease` in the folder unless given.
        """
        self.folder = folder.absolute()
        self.named = f"{key}: {folder}" if key else str(folder)
        self.file = self.folder / LEASE_FILE if file is None else file.absolute()
        self.what = what
        self._lease: SoftFileLease | None = None
        self._token: str | None = None
        self._watched: _Watched | None = None
        self._compromised = threading.Event()
        self._device = 0
        self._contents: list[str] = []

    @property
    def is_held(self) -> bool:
        """Tells whether this process has taken the lease and not given it back."""
        return self._token is not None

    @property
    def is_in_doubt(self) -> bool:
        """Tells whether a heartbeat has found the lease missing or another's, so that `check` has work."""
        return self._compromised.is_set()

    def acquire(self) -> None:
        """Takes the lease, waiting as long as a holder that may be dead has to be watched. Raises CheckpointError."""
        while not self.attempt():
            time.sleep(POLL_SECONDS)

    def attempt(self) -> bool:
        """Takes the lease where nobody holds it; returns whether it is taken. False asks to try again in a second.

        Makes the folder. Raises CheckpointError when another process holds the lease and lives, or the folder cannot be
        written.
        """
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            return not self._must_wait() and self._claim()
        except OSError as error:
            raise CheckpointError(
                f"{self.named} cannot be written ({error.strerror}). Name a folder that you may write to, make room, "
                "or give yourself the permission."
            ) from error

    def check(self) -> bool:
        """Looks whether the lease is still this process's; returns False when the folder had been removed.

        It is made again then, and what it held is named in the log. Raises CheckpointError when another process has
        taken the lease, or the folder is gone in a way that says that its file system is: with the folder above it, or
        with another one mounted in its place.
        """
        try:
            held = self._read()
            if held is not None and held.token == self._token:
                if self._compromised.is_set():
                    self._renew()
                self._contents = _names(self.folder)
                return True
            if held is not None:
                raise self._taken_by(held)
            gone = [name for name in self._contents if not (self.folder / name).exists()]
            removed = not self.folder.exists() or bool(gone)
            self._make_again()
        except OSError as error:
            raise CheckpointError(f"{self.named} cannot be used any more ({error.strerror or error}).") from error
        if not removed:
            logger.warning("%s was removed while this process held it; it is made again", self.file)
            return True
        logger.warning(
            "%s was removed while this process was writing it, and is made again. Gone with it: %s",
            self.named,
            ", ".join(gone) or "nothing that it held at its last save",
        )
        return False

    def release(self) -> None:
        """Gives the lease back, if it is this process's."""
        self._token = None
        if self._lease is not None:
            self._lease.release(force=True)

    def _must_wait(self) -> bool:
        """Watches a holder that cannot be seen. Raises CheckpointError when it lives.

        Returns whether filelock must not be asked yet. It watches for itself, from the first time that it is asked; but
        it would look on this machine for the process of another one that has the same name.
        """
        found = self._read_with_time()
        if found is None:
            return False
        holder, changed = found
        if self._watched is None or self._watched.holder.token != holder.token:
            self._watched = _Watched(holder, changed, time.monotonic())
            if not holder.is_visible:
                logger.warning(
                    "%s is leased to %s, which this machine cannot see: waiting %.0f s for a sign of life",
                    self.named,
                    holder,
                    holder.stale_seconds,
                )
        if holder.is_visible:
            if _is_zombie(holder.pid):
                # It writes no more, and filelock cannot tell it from a process that runs.
                self._lease_of(holder).force_break()
            return False
        if changed != self._watched.changed:
            raise self._refusal(holder, "its heartbeat has been seen")
        watching = time.monotonic() - self._watched.since < holder.stale_seconds
        if not watching and not holder.token:
            # Cut by a power loss. filelock would wait for ever for whoever is writing an empty file.
            self._lease_of(holder).force_break()
        return watching and holder.has_another_machines_name

    def _claim(self) -> bool:
        """Asks filelock for the lease, and adds to its file who holds it."""
        watched = self._watched
        lease = self._lease_of(None if watched is None else watched.holder)
        try:
            lease.acquire(timeout=0)
        except Timeout:
            # Another one that takes it over in this moment, or writes its file, is judged at the next attempt.
            if watched is None or not watched.holder.is_visible or _is_zombie(watched.holder.pid):
                return False
            if time.monotonic() - watched.since > EXIT_SECONDS:
                raise self._refusal(watched.holder, "it runs on this machine") from None
            return False
        self._token = lease.token
        self._compromised.clear()
        self._sign()
        self._device = self.folder.stat().st_dev if self.folder.exists() else 0
        self._contents = _names(self.folder)
        if watched is not None:
            seen = "has ended" if watched.holder.is_visible else f"gave no sign of life for {lease.lease_duration:g} s"
            logger.warning("%s: %s %s; going on in its place", self.named, watched.holder, seen)
        self._watched = None
        return True

    def _lease_of(self, holder: Holder | None) -> SoftFileLease:
        """Returns filelock's lease, which must be made for the time that the present holder has agreed to."""
        duration = STALE_SECONDS if holder is None else holder.stale_seconds
        if self._lease is None or self._lease.lease_duration != duration:
            self._lease = SoftFileLease(
                self.file,
                lease_duration=duration,
                heartbeat_interval=min(BEAT_SECONDS, duration / 3),
                on_compromise=self._note_compromise,
                thread_local=False,
            )
        return self._lease

    def _note_compromise(self, compromise: LeaseCompromise) -> None:
        self._compromised.set()

    def _sign(self) -> None:
        """Adds to the lease's file what its holder is called; filelock passes over keys that it does not know."""
        node, boot, namespace = _place()
        since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        values = {"node": node, "boot": boot, "namespace": namespace, "since": since, "what": self.what}
        lines = "".join(f"{key}={' '.join(value.split())[:LONGEST_VALUE]}\n" for key, value in values.items())
        before = self.file.stat().st_size
        try:
            with self.file.open("ab", buffering=0) as file:
                file.write(lines.encode("ascii", "replace"))
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.file, before)
            self.release()
            raise

    def _renew(self) -> None:
        """Starts the heartbeat again, which filelock ends when the file cannot be touched for long."""
        self.release()
        self._lease = None
        if not self._claim():
            raise self._taken_by(self._read())

    def _make_again(self) -> None:
        parent = self.folder.parent
        if self.folder.exists():
            there = self.folder.stat().st_dev == self._device
        else:
            there = parent.exists() and parent.stat().st_dev == self._device
        if not there:
            raise CheckpointError(
                f"{self.named} is gone, with what it lay in: another file system is there now, or none. It is not "
                "made again, for the run would write to another disk. Mount it again, and start again."
            )
        self.folder.mkdir(exist_ok=True)
        self._renew()

    def _read(self) -> Holder | None:
        found = self._read_with_time()
        return None if found is None else found[0]

    def _read_with_time(self) -> tuple[Holder, int] | None:
        """Returns what the lease says and the time of its file [ns]; None where there is none."""
        try:
            # Opened, not only looked at: network file systems ask the server for a file's time when it is opened.
            with self.file.open("rb") as file:
                status = os.fstat(file.fileno())
                text = file.read(4096).decode("utf-8", "replace") if stat.S_ISREG(status.st_mode) else ""
        except FileNotFoundError:
            return None
        return _parse(text), status.st_mtime_ns

    def _refusal(self, holder: Holder, sign: str) -> CheckpointError:
        return CheckpointError(
            f"{self.named} is being written by {holder}: {sign}. A folder has one writer. Wait for its end, end it, "
            f"or name another folder. (If it is gone for certain, delete {self.file}.)"
        )

    def _taken_by(self, holder: Holder | None) -> CheckpointError:
        return CheckpointError(
            f"{self.named} is now written by {holder or 'another process'}, which took this process for dead: its "
            "heartbeat was not seen for too long, or its lease was removed. This process writes no more there."
        )


@dataclass(frozen=True)
class _Watched:
    holder: Holder
    changed: int
    """Time of the lease's file when it was first seen [ns]."""
    since: float
    """When that was, on this process's monotonic clock [s]."""


@contextmanager
def leased(folder: Path, what: str, *, file: Path | None = None) -> Iterator[FolderLease]:
    """Holds the lease of a folder while the body runs; waits and raises as `FolderLease.acquire` does."""
    lease = FolderLease(folder, what, file=file)
    lease.acquire()
    try:
        yield lease
    finally:
        lease.release()


def _parse(text: str) -> Holder:
    """Reads a lease's file; where it is cut or damaged, what is missing is unknown."""
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    try:
        pid, stale = int(fields.get("pid", "0")), float(fields.get("duration", STALE_SECONDS))
    except ValueError:
        pid, stale = 0, STALE_SECONDS
    return Holder(
        token=fields.get("token", ""),
        pid=pid,
        node=fields.get("node") or fields.get("host", "an unknown machine").split("?")[0],
        boot=fields.get("boot", ""),
        namespace=fields.get("namespace", ""),
        since=fields.get("since", ""),
        what=fields.get("what", ""),
        stale_seconds=stale,
    )


def _place() -> tuple[str, str, str]:
    """Returns this machine's name, its kernel's start, and this process's namespace; empty where none can be told."""
    node = socket.gethostname()[:LONGEST_VALUE]
    try:
        # A /proc of another namespace shows processes by other ids.
        if Path("/proc/self").readlink().name != str(os.getpid()):
            return node, "", ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return node, boot, str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return node, "", ""


def _is_zombie(pid: int) -> bool:
    """Tells whether a process of this namespace has ended, and only waits to be asked for its exit code."""
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return content.rpartition(")")[2].split()[:1] in (["Z"], ["X"])


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
