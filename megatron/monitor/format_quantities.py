"""Counts and durations as people read them."""

from __future__ import annotations


def format_count(value: float, digits: int = 3) -> str:
    """Formats 1,234,567 as 1.23M: `digits` digits and a suffix."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # Just below a limit, rounding would give 1000k, or 1e+03k.
        if abs(value) >= limit * (1.0 - 0.5 * 10.0**-digits):
            return f"{value / limit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def format_duration(seconds: float) -> str:
    """Formats the two leading units of a duration: 45s, 3m 05s, 2h 07m, 4d 03h."""
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    if minutes:
        return f"{minutes}m {total % 60:02d}s"
    return f"{total}s"
