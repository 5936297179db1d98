"""The table of communication: calls and bytes of whole tensors per step, by operation and ranks."""

from __future__ import annotations

import torch

from megatron.mpu.communication_tally import CommunicationTally, communication_table

GRADIENTS, TOKENS, SHARES = torch.zeros(2**18), torch.zeros(2**17, dtype=torch.bfloat16), [torch.zeros(2**16)] * 2
RANKS = {"all": (0, 1), "data": (0, 1), "alone": (0,), "0 to 1": (0, 1), "1 to 0": (1, 0)}


def name(ranks: tuple[int, ...]) -> str:
    return "both" if ranks == (0, 1) else "back"


def sent(tally: CommunicationTally, operation: str, channel: str, *arguments: object) -> None:
    begun = tally.begin(operation, channel, arguments)
    if begun is not None:
        tally.end(begun)


def test_the_mean_step_is_shown() -> None:
    tally = CommunicationTally()
    sent(tally, "all_reduce", "all", GRADIENTS)
    assert not tally.rows, "between steps nothing counts"
    for number in range(2):
        with tally.step():
            sent(tally, "all_reduce", "all", GRADIENTS)
            sent(tally, "all_reduce", "data", GRADIENTS)
            sent(tally, "broadcast", "alone", GRADIENTS)
            sent(tally, "all_gather", "all", SHARES, SHARES[0])
            sent(tally, "send", "1 to 0", TOKENS, 0)
            if number:
                sent(tally, "barrier", "all")
    header, *lines = (line.split("  ") for line in communication_table(tally, RANKS, name).splitlines())
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert [cell.strip() for cell in header if cell.strip()] == ["operation", "among", "calls", "MiB", "ms"]
    assert [row[:4] for row in cells] == [
        ["all_reduce", "both", "2.0", "2.000"],
        ["all_gather", "both", "1.0", "0.500"],
        ["send", "back", "1.0", "0.250"],
        ["barrier", "both", "0.5", "0.000"],
    ]
    assert all(float(row[4]) >= 0 for row in cells)


def test_one_rank_sends_nothing() -> None:
    assert communication_table(CommunicationTally(), {}, name) == "nothing is sent: there is one rank"
