"""This machine alone: deepy.py starts its ranks itself."""

from __future__ import annotations

from megatron.launch.launcher import LAUNCHERS, Launcher

LAUNCHERS.register("local")(Launcher())
