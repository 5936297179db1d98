"""Numbers of collectives and transfers, which are the same on all ranks that take part."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import distributed

from megatron.mpu.agreement import gather_objects
from megatron.mpu.collective_trace import traced_collectives
from tests.helpers.distributed import run_distributed


def _communicate() -> dict[str, Any]:
    rank = distributed.get_rank()
    pair = distributed.new_group([0, 1])
    untouched = distributed.all_reduce
    with traced_collectives() as trace:
        x = torch.ones(4)
        distributed.all_reduce(x)
        distributed.all_reduce(x, group=pair)
        distributed.all_reduce(x, group=distributed.group.WORLD)
        gather_objects(rank)
        if rank == 0:
            distributed.send(x, 1)
            distributed.send(x, dst=1)
            distributed.recv(x, src=1)
        else:
            distributed.recv(x, 0)
            distributed.irecv(x, src=0).wait()  # type: ignore[union-attr]
            distributed.send(x, group_dst=0)
        assert trace.open_operation() is None
        assert 0 < trace.waited.seconds() < 60
    assert distributed.all_reduce is untouched
    return {name: asdict(channel) for name, channel in trace.channels.items()}


def test_both_ranks_count_alike() -> None:
    first, second = run_distributed(_communicate, 2)
    assert set(first) == set(second)
    for name, channel in first.items():
        other = second[name]
        assert [channel[key] for key in ("ranks", "begun", "finished")] == [
            other[key] for key in ("ranks", "begun", "finished")
        ]
    transfers = {channel["ranks"]: channel["begun"] for name, channel in first.items() if " to " in name}
    assert transfers == {(0, 1): 2, (1, 0): 1}
    # Two all_reduces and the two gathers of objects, of sizes and of contents; one all_reduce of the pair.
    assert sorted(channel["begun"] for name, channel in first.items() if " to " not in name) == [1, 4]
