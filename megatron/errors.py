"""Errors that a user can act on: each message says what is wrong, where, why, and what to do."""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import NoReturn

from megatron.rank_channel import RankChannel

STOPPED_ON_REQUEST = 75
"""Exit code of a run that a signal or a limit has ended after saving it, or before its first step: start it again to go
on. It is the EX_TEMPFAIL of sysexits.h.
"""

HUNG = 76
"""Exit code of a run whose ranks have waited for each other in vain: start it again to go on from its last checkpoint.
It is the EX_PROTOCOL of sysexits.h.
"""

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C has ended, as shells have it."""

SAME_INTERRUPT_SECONDS = 0.5
"""A launcher passes on the Ctrl-C that its ranks have got from the terminal already; within this time it is one."""


class UserError(Exception):
    """Base of the errors that entry points print without a traceback before they exit with `exit_code`."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration is wrong: a key, a value, or two values that contradict each other."""

    exit_code = 2


class DataError(UserError):
    """A dataset, tokenizer or text file is missing, damaged, foreign, or too small for what is asked of it."""


class CheckpointError(UserError):
    """A checkpoint cannot be read or written, or does not fit the run that wants to load it."""


class NonFiniteError(UserError):
    """Training met NaN or infinity, and the configuration does not let it go on."""


class EnvironmentSetupError(UserError):
    """This machine cannot run what is configured: a missing package, device, compiler or rank."""


@contextmanager
def os_errors_as(kind: type[UserError], place: str) -> Iterator[None]:
    """Raises a `kind` for each OSError of the body, or of a function that it decorates.

    The message names the error's file, or else `place`.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{error.filename or place}: {error.strerror or error}") from error


class UntypedErrorsAs:
    """Raises `describe(error)` for each error of the body, of a library in Rust, that has no type to be caught by.

    `tokenizers` raises `Exception` itself, of no subclass, for whatever it finds wrong; where its code panics, a
    PanicException, which derives from BaseException and cannot be imported. Those two are taken, and no others: an
    error with a type passes.
    """

    def __init__(self, describe: Callable[[BaseException], UserError]) -> None:
        self.describe = describe

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and (kind is Exception or type(error).__name__ == "PanicException"):
            raise self.describe(error) from error


def exit_on_user_error(main: Callable[[], int]) -> NoReturn:
    """Runs an entry point and exits with the code that it returns; a UserError is printed without a traceback.

    So is Ctrl-C, in one line, whatever was made of it on its way: libraries turn an interrupt of their import into
    other errors, and ranks fail when a peer has gone. A second one ends the process where the first has not.

    A rank of a launcher tells it what has failed, and prints nothing: of several ranks, only one has the reason.
    """
    try:
        code = _exit_code(main)
    except BaseException as error:
        if not _is_rank():
            raise
        code = _uncaught(error)
    if _is_rank():
        _end_rank(code)
    sys.exit(code)


def _exit_code(main: Callable[[], int]) -> int:
    interrupt = _Interrupt()
    channel = RankChannel.inherited()
    if channel is not None:
        channel.install()
    try:
        try:
            return main()
        except UserError as error:
            # Here, where an interrupt is still caught.
            text = f"{type(error).__name__}: {error}"
            if channel is None:
                print(text, file=sys.stderr)
            else:
                channel.report(error, text)
            return error.exit_code
    except BaseException as error:
        if not (interrupt.has_come or isinstance(error, KeyboardInterrupt)):
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        said_by_another = isinstance(error, SystemExit) and error.code == INTERRUPTED
        if not said_by_another and _speaks_for_all():
            print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _is_rank() -> bool:
    """Tells whether this process is a rank of a run, as its environment says, once it is prepared."""
    return "WORLD_SIZE" in os.environ


def _uncaught(error: BaseException) -> int:
    """Does what Python does with an exception that nobody has caught; returns the exit code."""
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _end_rank(code: int) -> NoReturn:
    """Ends a rank: calls what is registered for the exit, and leaves Python's own teardown out.

    Threads of gloo live as long as anything refers to their group, and drop the tensors of its last collective when
    they get to it, which takes Python's lock. Up to Python 3.13, a thread that asks for it during the teardown is
    unwound through C++, which ends the process by SIGABRT ("terminate called without an active exception") after a run
    that went well.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # of a reader that has gone
            stream.flush()
    os._exit(code)


def end_at_once_when_stopped() -> None:
    """Lets SIGTERM and SIGUSR1 end this process with STOPPED_ON_REQUEST until something else handles them.

    It is for a run that reads its configuration and imports: nothing has begun that could be saved or cleaned up.
    """

    def end(number: int, frame: object) -> None:
        if _speaks_for_all():
            name = signal.Signals(number).name
            os.write(2, f"{name} before the first step: nothing is to be saved yet, the run ends\n".encode())
        os._exit(STOPPED_ON_REQUEST)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


class _Interrupt:
    """Notes Ctrl-C, and raises KeyboardInterrupt as Python does."""

    def __init__(self) -> None:
        self._first: float | None = None
        # Ignored, it stays so (nohup); in a thread, as in tests, nothing can be handled.
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)

    @property
    def has_come(self) -> bool:
        return self._first is not None

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
            raise KeyboardInterrupt
        if now - self._first > SAME_INTERRUPT_SECONDS:
            os._exit(INTERRUPTED)


def _speaks_for_all() -> bool:
    """Tells whether this process is rank 0, or no rank at all."""
    return os.environ.get("RANK", "0") == "0"
