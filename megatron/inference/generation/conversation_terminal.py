"""A conversation in a terminal: prompts are asked for, and text appears as it is generated."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from megatron.inference.generation.read_prompts import decode_with_replacement

FIRST_LINE = "Context prompt >>> "
NEXT_LINE = "... "
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
CONTROLS = {code: INCOMPLETE for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Characters that could command the terminal."""
DUPLICATE_SECONDS = 0.1
"""A launcher forwards the signal that the terminal has sent already; within this time it is the same one [s]."""


class ConversationTerminal:
    """The terminal of the first rank. `prompt_end` ends a prompt, at the end of a line or of its text."""

    def __init__(self, prompt_end: str) -> None:
        self.prompt_end = prompt_end
        self.shown = ""
        self.interrupted = False
        decode_with_replacement(sys.stdin)
        # Gives input() line editing and a history. Not before there is a terminal: it may write to standard output.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401

    def prompts(self) -> Iterator[str]:
        """Yields what the user enters, until Ctrl-D or Ctrl-C at a prompt; asks again after an empty one."""
        print("Ctrl-C stops a text; at the prompt it ends, as does Ctrl-D.", file=sys.stderr)
        try:
            while True:
                prompt = self._read()
                if prompt:
                    yield prompt
                else:
                    print("An empty prompt has nothing to continue.", file=sys.stderr)
        except (EOFError, KeyboardInterrupt):
            # The launcher's copy of the signal may still come.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print()

    def _read(self) -> str:
        text = ""
        while True:
            text += input(NEXT_LINE if text else FIRST_LINE) + "\n"
            for ended in (text, text[:-1]):
                if ended.endswith(self.prompt_end):
                    return ended.removesuffix(self.prompt_end)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Lets Ctrl-C only set `interrupted` while the body runs."""

        def note(number: int, frame: FrameType | None) -> None:
            self.interrupted = True

        self.interrupted = False
        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            if self.interrupted:
                time.sleep(DUPLICATE_SECONDS)
            signal.signal(signal.SIGINT, before)

    def show(self, text: str) -> None:
        """Prints what `text` adds to what is shown already, up to a character that may lack its last bytes."""
        ready = text.rstrip(INCOMPLETE)
        if ready.startswith(self.shown):
            print(ready[len(self.shown) :].translate(CONTROLS), end="", flush=True)
            self.shown = ready

    def finish(self, text: str, message: str | None) -> None:
        """Prints the rest of a text, and the message about it."""
        if not text.startswith(self.shown):
            print()
            self.shown = ""
        print(text[len(self.shown) :].translate(CONTROLS))
        if message is not None:
            print(f"[{message}]", file=sys.stderr)
        self.shown = ""
