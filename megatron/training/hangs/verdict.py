"""Says which ranks keep the others waiting, from the numbers of the operations that each has begun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron.mpu.collective_trace import Channel
from megatron.training.hangs.rank_state import RankState

SHOWN_RANKS = 8
"""Ranks that only wait, of which a report shows a line each; the others are counted."""


@dataclass(frozen=True)
class Verdict:
    """The ranks to blame, and what is known of all of them."""

    blamed: tuple[int, ...]
    """Silent ranks, and those that the others wait for; empty when all wait for each other."""
    lines: tuple[str, ...]
    """A sentence or two for each rank, the blamed ones first."""


def find_verdict(answers: Mapping[int, RankState], last_heard: Mapping[int, RankState | None]) -> Verdict:
    """Compares the ranks that have answered, by rank, with each other and with those that have not.

    `last_heard` has what silent ranks told last, or None. A rank is behind when a peer has begun an operation of theirs
    that it has not begun. Where it waits itself, for a third one, that one is to blame.
    """
    known = {**answers, **{rank: state for rank, state in last_heard.items() if state is not None}}
    leaders = _leaders(known)
    behind = {rank: found for rank, state in answers.items() if (found := _lag(state, leaders)) is not None}
    working = [rank for rank, state in answers.items() if state.open is None]
    blamed = [rank for rank in behind if rank in working]
    if not blamed and not last_heard:
        blamed = working
    lines = [_silent_line(rank, state) for rank, state in sorted(last_heard.items())]
    lines += [f"{_name(answers[rank])} {_fault_of(answers[rank], behind.get(rank))}" for rank in sorted(blamed)]
    if not lines:
        lines.append("no rank is behind: all wait, in operations that do not belong together.")
    waiting = [state for rank, state in sorted(answers.items()) if rank not in blamed]
    lines += [f"{_name(state)} {waiting_line(state)}" for state in waiting[:SHOWN_RANKS]]
    if len(waiting) > SHOWN_RANKS:
        lines.append(f"{len(waiting) - SHOWN_RANKS} more ranks wait like these.")
    return Verdict(tuple(sorted([*last_heard, *blamed])), tuple(lines))


@dataclass(frozen=True)
class _Lag:
    """An operation that a peer has begun, and this rank has not."""

    own: int
    peer: int
    channel: Channel
    """The peer's."""


def _leaders(known: Mapping[int, RankState]) -> dict[str, tuple[int, Channel]]:
    """Returns, for each channel, a rank that has begun most of its operations, and what that one has counted."""
    leaders: dict[str, tuple[int, Channel]] = {}
    for rank, state in known.items():
        for name, channel in state.channels.items():
            if name not in leaders or leaders[name][1].begun < channel.begun:
                leaders[name] = rank, channel
    return leaders


def _lag(state: RankState, leaders: Mapping[str, tuple[int, Channel]]) -> _Lag | None:
    for name, (peer, channel) in leaders.items():
        own = state.channels[name].begun if name in state.channels else 0
        if own < channel.begun and state.rank in channel.ranks:
            return _Lag(own, peer, channel)
    return None


def _name(state: RankState) -> str:
    return f"rank {state.rank} ({state.host}, process {state.pid})"


def _silent_line(rank: int, state: RankState | None) -> str:
    if state is None:
        return f"rank {rank} is silent, and has never told anything."
    line = f"{_name(state)} is silent: its process is stopped, dead or cut off. It told last at {state.time} UTC, in "
    return f"{line}{state.phase}, {_operation(state)}."


def _fault_of(state: RankState, lag: _Lag | None) -> str:
    if lag is None:
        return f"waits for no other rank: it is in {state.phase}, at {state.place}."
    group, peer = lag.channel, lag.peer
    return (
        f"is behind: it has begun {lag.own} operations of {name_ranks(group.ranks)}, and rank {peer} {group.begun}, "
        f"the last of them {group.operation}. It is in {state.phase}, at {state.place}."
    )


def waiting_line(state: RankState) -> str:
    """Says what a rank does that is not to blame."""
    return f"is in {state.phase}, {_operation(state)}, at {state.place}."


def _operation(state: RankState) -> str:
    if state.open is None:
        return "in no operation with other ranks"
    channel = state.channels[state.open.channel]
    ranks = name_ranks(channel.ranks)
    return f"in {state.open.operation}, operation {state.open.number} of {ranks}, for {state.open.seconds:.0f} s"


def name_ranks(ranks: Sequence[int]) -> str:
    """Names ranks in a sentence: "rank 1", "ranks 0, 2", "ranks 0 to 7"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
