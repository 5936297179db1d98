"""The reason of a failure comes last, from whatever machine; what only follows from it is marked."""

from __future__ import annotations

import io
from functools import partial

from megatron.launch.failures import Failure, Outcome, print_failures
from megatron.launch.launcher import Place
from megatron.launch.messages import MessageReader
from megatron.launch.rank_environment import rank_environment
from megatron.rank_channel import is_lost_peer

LOST = "Traceback (most recent call last):\n  ...\nRuntimeError: Connection closed by peer [10.0.0.2]:4"


def printed(*failures: Failure, killed: tuple[int, ...] = ()) -> list[str]:
    output = io.StringIO()
    print_failures(Outcome((0, 1, 2), 1, failures, killed), output)
    return output.getvalue().splitlines()


def test_the_first_cause_is_last_although_others_failed_before() -> None:
    """Clocks of machines differ, and a rank that unwinds ends after those that it has left."""
    lines = printed(
        Failure(2, "b", 1, 12.0, "Traceback:\nValueError: boom"),
        Failure(0, "a", 1, 10.0, LOST, lost_peer=True),
        killed=(1,),
    )
    assert lines == [
        "rank 1 did not end within the grace period and was killed",
        "secondary: rank 0 on host a ended with exit code 1: RuntimeError: Connection closed by peer [10.0.0.2]:4",
        "rank 2 on host b ended with exit code 1:",
        "Traceback:",
        "ValueError: boom",
    ]


def test_a_signal_is_named() -> None:
    assert printed(Failure(1, "b", -9, 12.0), Failure(0, "a", 1, 11.0, LOST, lost_peer=True))[-1] == (
        "rank 1 on host b was killed by signal 9 (SIGKILL)"
    )


def test_what_all_ranks_say_is_said_once() -> None:
    assert printed(*(Failure(rank, "a", 1, 1.0, "DataError: x.bin: cut off") for rank in range(3))) == [
        "DataError: x.bin: cut off"
    ]


def test_broken_connections_are_told_from_other_errors() -> None:
    try:
        try:
            raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer")
        except RuntimeError as error:
            raise ValueError("while it went on") from error
    except ValueError as error:
        assert is_lost_peer(error)
    assert is_lost_peer(ConnectionResetError())
    assert not is_lost_peer(RuntimeError("shapes do not match"))


def test_messages_are_found_in_what_programs_write_in_any_pieces() -> None:
    """ssh, srun and mpirun pass output on in pieces of their own, and mix that of several ranks."""
    first = b'\x1e["aa",0,2,"{\\"kind\\": \\"up\\", "]\n'
    second = b'\x1e["aa",1,2,"\\"node\\": 3}"]\n'
    stream = b"step 1\nhalf a line" + first + b" and its rest\n" + second + b"step 2\r"
    for size in (1, 7, len(stream)):
        output = io.BytesIO()
        heard: list[tuple[str, dict[str, object]]] = []
        reader = MessageReader(output, partial(lambda into, *message: into.append(message), heard))
        for start in range(0, len(stream), size):
            reader.feed(stream[start : start + size])
        reader.close()
        assert heard == [("up", {"node": 3})]
        assert output.getvalue() == b"step 1\nhalf a line and its rest\nstep 2\r"


def test_threads_are_shared_out_unless_the_user_decides() -> None:
    place, meeting_point = Place(0, 2, 0), ("127.0.0.1", 1)
    assert rank_environment({"OMP_NUM_THREADS": "3"}, place, meeting_point, (0, 1))["OMP_NUM_THREADS"] == "3"
    assert int(rank_environment({}, place, meeting_point, range(1000))["OMP_NUM_THREADS"]) == 1


def test_chosen_gpus_are_those_of_the_ones_that_are_visible() -> None:
    place, meeting_point = Place(0, 2, 0), ("127.0.0.1", 1)
    chosen = rank_environment({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, place, meeting_point, (1, 3))
    assert chosen["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert "CUDA_VISIBLE_DEVICES" not in rank_environment({}, place, meeting_point, (0, 1))
    assert rank_environment({}, place, meeting_point, (2, 3))["CUDA_VISIBLE_DEVICES"] == "2,3"
