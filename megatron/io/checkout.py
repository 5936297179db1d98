"""The checkout whose commands are run, as far as users have to know where it is."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]


def hint_at_checkout(path: Path) -> str:
    """Returns a sentence that tells where a missing file is, if it is there as seen from the checkout; else nothing.

    The shipped configurations name what commands make in the checkout, and a command may be run from anywhere.
    """
    if path.is_absolute() or not (CHECKOUT / path).exists():
        return ""
    return f" Paths are as seen from {Path.cwd()}; run the command in {CHECKOUT}, where this one is."
