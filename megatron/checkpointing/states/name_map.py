"""Our global names of parameters and those of another program's files, as data.

For tensors that have the same shape and element order on both sides: a map is a list of renamed prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron.errors import CheckpointError


@dataclass(frozen=True)
class NameMap:
    """Parameter names, ours to theirs and back."""

    prefixes: tuple[tuple[str, str], ...]
    """(ours, theirs); what follows a prefix is the same on both sides, but for `parts`."""

    parts: tuple[tuple[str, str], ...] = ()
    """(ours, theirs) of what a name may have after its prefix, such as (".mlp.gate.", ".mlp.gate_proj.")."""

    also_read: tuple[tuple[str, str], ...] = ()
    """(other spelling of theirs, theirs), for files of another version of the program."""

    without_weights: re.Pattern[str] | None = None
    """Names of tensors that are no parameters, such as masks and rotary frequencies that old versions saved."""

    def to_theirs(self, name: str) -> str:
        """Returns their name of our parameter. Raises KeyError for a name that no prefix matches."""
        return _replace(_rename(name, self.prefixes), self.parts)

    def to_ours(self, name: str) -> str | None:
        """Returns our name of their tensor; None for a tensor that is no parameter.

        Raises KeyError for an unknown name.
        """
        if self.without_weights is not None and self.without_weights.fullmatch(name):
            return None
        for spelling, usual in self.also_read:
            if name.startswith(spelling):
                name = usual + name.removeprefix(spelling)
        reversed_parts = tuple((theirs, ours) for ours, theirs in self.parts)
        found = _replace(_rename(name, ((theirs, ours) for ours, theirs in self.prefixes)), reversed_parts)
        if self.to_theirs(found) != name:
            raise KeyError(name)
        return found


def _rename(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for source, target in prefixes:
        if name.startswith(source):
            return target + name.removeprefix(source)
    raise KeyError(name)


def _replace(name: str, parts: tuple[tuple[str, str], ...]) -> str:
    for source, target in parts:
        name = name.replace(source, target)
    return name


def our_names(
    names: NameMap,
    theirs: Iterable[str],
    expected: Iterable[str],
    where: str,
    describe: Callable[[str], str] = str,
) -> dict[str, str]:
    """Maps our names to theirs, for all tensors of a folder. Every tensor and every parameter is accounted for.

    Raises CheckpointError, naming `where`, for unknown tensors, missing parameters, and parameters given twice.
    `describe` says more of one of their names.
    """
    found: dict[str, str] = {}
    unknown: list[str] = []
    expected = set(expected)
    for name in theirs:
        try:
            ours = names.to_ours(name)
        except KeyError:
            unknown.append(name)
            continue
        if ours is None:
            continue
        if ours in found:
            raise CheckpointError(
                f"{where}: {describe(name)} and {describe(found[ours])} are the same parameter, {ours}."
            )
        if ours not in expected:
            unknown.append(name)
        else:
            found[ours] = name
    missing = [names.to_theirs(name) for name in expected - found.keys()]
    if unknown or missing:
        raise CheckpointError(
            f"{where}: its tensors are not those of the configured model. Missing: {_listed(missing, describe)}. "
            f"Left over: {_listed(unknown, describe)}."
        )
    return found


def _listed(names: list[str], describe: Callable[[str], str], at_most: int = 8) -> str:
    shown = ", ".join(describe(name) for name in sorted(names)[:at_most])
    more = len(names) - at_most
    return (f"{shown} and {more} more" if more > 0 else shown) or "none"
