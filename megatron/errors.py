"""Errors that a user can act on. Each message says what is wrong, where, why, and what to do."""


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


class EnvironmentSetupError(UserError):
    """This machine cannot run what is configured: a missing package, device, compiler or rank."""
