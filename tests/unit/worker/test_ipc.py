"""Messages between session and leaf processes survive any cut of the stream."""

from __future__ import annotations

import itertools
import os
import socket
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker import ipc
from worker.ipc import Assembler, BlockingConnection, ConnectionClosed, Kind

numbers = st.integers(0, 2**31 - 1)


@settings(deadline=None)
@given(
    parts=st.lists(st.tuples(numbers, numbers, st.integers(-1, 1000)), max_size=5),
    absent=st.lists(numbers, max_size=5),
    version=st.integers(0, 2**62),
    states=st.lists(st.lists(numbers, max_size=4), max_size=3),
)
def test_a_run_order_comes_back(
    parts: list[tuple[int, int, int]], absent: list[int], version: int, states: list[list[int]]
) -> None:
    order = ipc.RunOrder(
        task=2**40,
        job=7,
        action=2,
        version=version,
        parameters=-1,
        parts=tuple(parts),
        absent=tuple(absent),
        states=tuple(tuple(each) for each in states),
    )
    assert ipc.RunOrder.unpack(order.pack()) == order
    order.inputs = ((("a" * 64, 12), ("b" * 64, 0)), ())
    assert ipc.RunOrder.unpack(order.pack()) == order


@settings(deadline=None)
@given(
    mask=st.integers(0, 2**200),
    sums=st.lists(st.floats(allow_nan=False), max_size=4),
    loss=st.floats(allow_nan=False),
)
def test_a_finished_part_comes_back(mask: int, sums: list[float], loss: float) -> None:
    done = ipc.PartDone(1, 2, 3, loss, mask, tuple(sums), (0.5, 0.25), 0.125)
    assert ipc.PartDone.unpack(done.pack()) == done


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6))
def test_messages_are_cut_right_wherever_reads_end(cuts: list[int]) -> None:
    stream = (
        ipc.frame(Kind.PART_DONE, b"one")
        + ipc.frame(Kind.READY)
        + ipc.frame(Kind.TASK_ENDED, ipc.pack_ended(77))
    )
    bounds = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    assembler = Assembler()
    messages = [
        message
        for first, stop in itertools.pairwise(bounds)
        for message in assembler.feed(stream[first:stop])
    ]
    assert [message.kind for message in messages] == [Kind.PART_DONE, Kind.READY, Kind.TASK_ENDED]
    assert ipc.unpack_ended(messages[2].body) == 77


def test_a_large_result_is_copied_once() -> None:
    """Results have up to 1,000 MiB, and while one is copied the session process does nothing."""
    size = 16 * 1024 * 1024
    stream = ipc.frame(Kind.CALL_DONE, ipc.pack_call(7, 2, 0.5, bytes(size)))
    assembler = Assembler()
    assert not assembler.feed(stream[:-1])
    tracemalloc.start()
    try:
        (message,) = assembler.feed(stream[-1:])
        task, index, seconds, returned = ipc.unpack_call(message.body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (task, index, seconds, len(returned.value)) == (7, 2, 0.5, size)
    # The buffer may move as it grows, and that is all beside the copy.
    assert peak < 2.5 * size


def test_what_a_call_leaves_beside_its_result_comes_with_it() -> None:
    body = ipc.pack_call(7, 2, 0.5, b"value", b"kept for others", (3, -1, 2**40))
    *_, returned = ipc.unpack_call(body)
    assert bytes(returned.value) == b"value"
    assert bytes(returned.kept) == b"kept for others"
    assert returned.earlier == (3, -1, 2**40)
    *_, plain = ipc.unpack_call(ipc.pack_call(7, 2, 0.5, b"value"))
    assert (bytes(plain.value), bytes(plain.kept), plain.earlier) == (b"value", b"", ())


def test_a_descriptor_belongs_to_its_setup_message() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = os.memfd_create("test")
        ours.sendall(ipc.frame(Kind.DROP, b"x"))
        socket.send_fds(ours, [ipc.frame(Kind.SETUP, b"y")], [fd])
        connection = BlockingConnection(theirs)
        assert connection.receive().fds == ()
        (received,) = connection.receive().fds
        assert os.fstat(received).st_ino == os.fstat(fd).st_ino
        os.close(fd)
        os.close(received)


def test_waiting_for_one_kind_keeps_the_order_of_the_others() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for body in (b"1", b"2"):
            ours.sendall(ipc.frame(Kind.DROP, body))
        ours.sendall(ipc.frame(Kind.FETCHED, b"answer"))
        ours.sendall(ipc.frame(Kind.RUN, b"3"))
        connection = BlockingConnection(theirs)
        assert connection.receive_only(Kind.FETCHED).body == b"answer"
        assert [connection.receive().body for _ in range(3)] == [b"1", b"2", b"3"]


def test_the_end_of_the_other_process_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(ConnectionClosed):
        BlockingConnection(theirs).receive()
