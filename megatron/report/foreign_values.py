"""Names and numbers that files bring, made fit for tables and figures."""

from __future__ import annotations

LONGEST_NAME = 100
LARGEST = 1e100
"""Magnitude from which a number was not measured; matplotlib cannot draw axes up to the largest float."""


def one_line(text: str) -> str:
    """Returns a name as a table can show it: of moderate length, on one line, without halves of characters."""
    whole = text[:LONGEST_NAME].encode("utf-8", errors="replace").decode("utf-8")
    return "".join(letter if letter.isprintable() else "?" for letter in whole)


def label(text: str) -> str:
    """Returns a name as a figure shows it: matplotlib takes what stands between two dollars for a formula."""
    return one_line(text).replace("$", r"\$")


def is_number(value: object) -> bool:
    """Tells whether a value of JSON is a number that can be drawn; NaN is, as a gap."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value != value or -LARGEST < value < LARGEST  # noqa: PLR0124 - NaN alone differs from itself
