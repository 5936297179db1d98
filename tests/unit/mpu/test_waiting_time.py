"""Time that a rank waits in collectives, by a clock of the host and by events of a device."""

from __future__ import annotations

import pytest

from megatron.mpu.waiting_time import DeviceWaitingTime, HostWaitingTime


class Event:
    """An event of a device that has come as far as `Event.reached`; one unit of work is a millisecond."""

    made = 0
    queued = 0
    reached = 0

    def __init__(self) -> None:
        Event.made += 1
        self.at = -1

    def record(self) -> None:
        self.at = Event.queued

    def query(self) -> bool:
        return self.at <= Event.reached

    def elapsed_time(self, later: Event) -> float:
        assert self.query() and later.query(), "a device that has not come so far raises an error"
        return float(later.at - self.at)


def test_a_device_counts_what_it_has_done() -> None:
    Event.made = Event.queued = Event.reached = 0
    waited = DeviceWaitingTime(Event)
    for length in (5, 7):
        Event.queued += 100
        mark = waited.begin()
        Event.queued += length
        waited.end(mark)
    assert waited.seconds() == 0.0, "nothing is done yet, and nobody waits for it"
    Event.reached = 105
    assert waited.seconds() == pytest.approx(0.005)
    Event.reached = Event.queued
    assert waited.seconds() == pytest.approx(0.012)
    for _ in range(10):
        waited.end(waited.begin())
        Event.reached = Event.queued
        waited.seconds()
    assert Event.made == 4, "events are used again"


def test_a_host_counts_between_marks() -> None:
    waited = HostWaitingTime()
    waited.end(waited.begin() - 2.0)
    assert waited.seconds() == pytest.approx(2.0, abs=0.1)
