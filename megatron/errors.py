"""Errors that a user can act on: each message says what is wrong, where, why, and what to do."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

STOPPED_ON_REQUEST = 75
"""Exit code of a run that a signal or a limit has ended after saving it: start it again to go on.

It is the EX_TEMPFAIL of sysexits.h.
"""


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
    """Runs an entry point and exits with the code that it returns; a UserError is printed without a traceback."""
    try:
        code = main()
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
