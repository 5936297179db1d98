"""The guide for NeoX's users says of every key of NeoX's YAMLs what the configuration does with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from megatron.config.neox.keys.table import find_entry
from megatron.config.neox_entries import Inert, MapsTo, Rejected
from tests.helpers.forkserver import ROOT
from tests.helpers.neox_yamls import ALONE, LOADABLE, LOCAL_SETUP, NOT_HERE, WANDB

GUIDE = (ROOT / "docs" / "neox.md").read_text(encoding="utf-8")
HEADINGS = ("**The same**", "**With a difference:**", "**Without effect**", "**Refused:**", "## My data")


def flat(keys: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in keys.items():
        name = prefix + key.replace("-", "_")
        if isinstance(value, Mapping):
            yield from flat(value, f"{name}.")
        else:
            yield name


SHIPPED = {
    key
    for keys in (*LOADABLE.values(), *ALONE.values(), *(keys for keys, _ in NOT_HERE.values()), LOCAL_SETUP, WANDB)
    for key in flat(keys)
}


def fate(key: str) -> str:
    entry = find_entry(key)
    if isinstance(entry, MapsTo):
        return "**With a difference:**" if entry.difference else "**The same**"
    return {Inert: "**Without effect**", Rejected: "**Refused:**"}[type(entry)]


@pytest.mark.parametrize("heading", HEADINGS[:-1])
def test_the_guide_says_what_becomes_of_every_key(heading: str) -> None:
    part = GUIDE.split(heading)[1].split(HEADINGS[HEADINGS.index(heading) + 1])[0]
    if heading == "**With a difference:**":
        # The other columns name values.
        part = "\n".join(line.split("|")[1] for line in part.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`([a-z_0-9.]+)`", part)) & SHIPPED
    want = {key for key in SHIPPED if fate(key) == heading}
    if heading == "**Refused:**":
        # What to use instead is named too.
        named = {key for key in named if fate(key) == heading}
    assert named == want
