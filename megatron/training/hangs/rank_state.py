"""State of a rank as it tells it to the others: its place in the run, and the operations that it took part in."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megatron.mpu.collective_trace import Channel, OpenOperation

COMPILERS = (
    ("torch/_dynamo/convert_frame.py", ""),
    ("torch/_inductor/compile_fx.py", "compile_fx_inner"),
    ("torch/_inductor/compile_fx.py", "_compile_fx_inner"),
    ("torch/utils/cpp_extension.py", "_jit_compile"),
    ("triton/compiler/compiler.py", "compile"),
)
"""Ends of file names, and functions in them, that are on the stack while something is compiled."""


@dataclass(frozen=True)
class RankState:
    """One rank at one moment."""

    rank: int
    host: str
    pid: int
    beat: int
    """Number of the message; it stays the same where a rank no longer runs."""
    time: str
    """Wall-clock time at which it was told, UTC."""
    step: int
    """Step that it takes, or has taken last."""
    phase: str
    """Part of the run, in words."""
    excused: bool
    """Whether the part may take as long as it likes, such as a save, an evaluation or a compilation."""
    seconds: float
    """Time since the part began, as far as this process ran [s]."""
    place: str
    """The innermost call of the main thread: file, line and function."""
    channels: dict[str, Channel]
    """Operations by process group or direction."""
    open: OpenOperation | None
    """The operation that it is in."""

    def encode(self) -> bytes:
        """Returns the state as JSON."""
        values = asdict(self)
        for channel in values["channels"].values():
            channel["ranks"] = _packed(channel["ranks"])
        return json.dumps(values).encode()

    @staticmethod
    def decode(text: bytes) -> RankState:
        """Returns the state that a rank has encoded."""
        values = json.loads(text)
        channels = {
            name: Channel(_unpacked(found.pop("ranks")), **found) for name, found in values.pop("channels").items()
        }
        opened = values.pop("open")
        return RankState(**values, channels=channels, open=None if opened is None else OpenOperation(**opened))


def _packed(ranks: Sequence[int]) -> list[int]:
    """Returns first rank, end and stride of evenly spaced ranks, of which a large run has many; or else all of them."""
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    spaced = range(ranks[0], ranks[0] + len(ranks) * stride, stride) if stride > 0 else range(0)
    return [-1, spaced.start, spaced.stop, spaced.step] if list(spaced) == list(ranks) else list(ranks)


def _unpacked(ranks: list[int]) -> tuple[int, ...]:
    return tuple(range(*ranks[1:])) if len(ranks) == 4 and ranks[0] == -1 else tuple(ranks)


def main_thread_frame() -> FrameType | None:
    """Returns the innermost frame of the main thread."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def describe_frame(frame: FrameType | None) -> str:
    """Names a frame by the last parts of its file's path, its line and its function."""
    if frame is None:
        return "nowhere"
    path = Path(frame.f_code.co_filename)
    return f"{Path(*path.parts[-3:])}:{frame.f_lineno} in {frame.f_code.co_name}"


def is_compiling(frame: FrameType | None) -> bool:
    """Tells whether something is compiled on the stack that ends in `frame`."""
    while frame is not None:
        code = frame.f_code
        if any(code.co_filename.endswith(file) and name in ("", code.co_name) for file, name in COMPILERS):
            return True
        frame = frame.f_back
    return False
