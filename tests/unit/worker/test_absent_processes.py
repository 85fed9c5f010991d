"""Slots whose leaf processes are away for a moment: nothing that they owe is lost or stuck."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from phalanx.v1 import coordination_service_pb2 as coordination
from phalanx.v1 import training_pb2
from worker import ipc
from worker.core.dispatch import Task
from worker.core.rounds import Round
from worker.ipc import Kind, Message
from worker.session import leaf_server, slots
from worker.session.chunks import ChunkServer
from worker.session.leaf_server import LeafServer
from worker.session.process import LeafProcess
from worker.session.sending import SocketSender
from worker.session.slots import DESCRIBE_ATTEMPTS, SlotPool

pytestmark = pytest.mark.slow

GUARD_S = 30.0
LEAF_TIMEOUT_S = 60.0


class Leaf:
    """A leaf process that does what a test says, in the place of a real one."""

    made: list[Leaf]
    refusals: int
    started: asyncio.Event

    def __init__(
        self, _leaves: Any, _limit: int, on_message: Any, _on_log: Any, on_exit: Any, _gpus: Any
    ) -> None:
        if Leaf.refusals:
            Leaf.refusals -= 1
            raise OSError(12, "Cannot allocate memory")
        self.pid = len(Leaf.made) + 1
        self.ready = self.killed_as_hung = self.orphaned = False
        self.known_jobs: set[int] = set()
        self.sent: list[Kind] = []
        self.cancelled: list[int] = []
        self.page = SimpleNamespace(task=0, shard=-1, leaves=0, cancel=self.cancelled.append)
        self._on_message, self._on_exit = on_message, on_exit
        Leaf.made.append(self)
        Leaf.started.set()

    def send(self, kind: Kind, body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        self.sent.append(kind)

    def kill(self) -> None:
        """Its end is told when a test says so."""

    def was_out_of_memory(self, _code: int) -> bool:
        return False

    def say(self, kind: Kind, body: bytes = b"") -> None:
        self._on_message(self, Message(kind, body))

    def die(self) -> None:
        self._on_exit(self, -9)


class Events:
    """What the pool tells."""

    def __init__(self) -> None:
        self.idle: list[int] = []
        self.ended: list[tuple[int, bool]] = []

    def slot_idle(self, slot: int) -> None:
        self.idle.append(slot)

    def task_ended(self, task: Task, lost: bool) -> None:
        self.ended.append((task.id, lost))

    def process_gone(self, process: Any) -> None:
        pass

    def printed(self, *_: Any) -> None:
        pass


def job(code: str = "") -> Any:
    return SimpleNamespace(
        plan=training_pb2.JobPlan(job_id="job-1"),
        number=1,
        code_key=code,
        timeout_s=0.0,
        arena=SimpleNamespace(fd=0, reserve=lambda _: None),
        setup_body=lambda: b"",
        describe_body=lambda: b"",
    )


def task(number: int = 7) -> Task:
    go = training_pb2.GoRecord(version=3, action=training_pb2.GoRecord.ACTION_TRAIN)
    return Task(number, "job-1", 1, Round(go, 4, 1), [], slot=0)


@pytest.fixture
async def pool(monkeypatch: pytest.MonkeyPatch) -> SlotPool:
    Leaf.made, Leaf.refusals, Leaf.started = [], 0, asyncio.Event()
    monkeypatch.setattr(slots, "LeafProcess", Leaf)
    leaves: Any = SimpleNamespace(ready=True, failed_starts=0)
    made = SlotPool(1, 0, LEAF_TIMEOUT_S, Events(), leaves)  # type: ignore[arg-type]
    made.start()
    return made


def die_until_it_waits(pool: SlotPool) -> None:
    """Kill the process twice: the next one starts a moment later."""
    for _ in range(2):
        Leaf.made[-1].die()
    Leaf.started.clear()
    assert len(Leaf.made) == 2


async def next_leaf() -> Leaf:
    async with asyncio.timeout(GUARD_S):
        await Leaf.started.wait()
    return Leaf.made[-1]


async def test_a_process_that_cannot_be_started_is_tried_again(pool: SlotPool) -> None:
    Leaf.refusals = 3
    Leaf.started.clear()
    Leaf.made[-1].die()
    leaf = await next_leaf()
    leaf.say(Kind.READY)
    assert pool.pids == [leaf.pid]
    assert pool._events.idle == [0]  # type: ignore[attr-defined]
    assert not pool._restarting


async def test_a_worker_whose_processes_never_start_says_so_until_one_does(pool: SlotPool) -> None:
    for _ in range(slots.LOST_STARTS_MAX):
        assert pool.able
        Leaf.started.clear()
        Leaf.made[-1].die()
        await next_leaf()
    assert not pool.able
    Leaf.made[-1].say(Kind.READY)
    assert pool.able


async def test_a_worker_that_has_no_room_for_processes_says_so(pool: SlotPool) -> None:
    Leaf.refusals = slots.LOST_STARTS_MAX
    Leaf.started.clear()
    Leaf.made[-1].say(Kind.READY)
    Leaf.made[-1].die()
    leaf = await next_leaf()
    assert not pool.able
    leaf.say(Kind.READY)
    assert pool.able


async def test_a_job_that_kills_its_processes_is_no_fault_of_the_worker(pool: SlotPool) -> None:
    for _ in range(slots.LOST_STARTS_MAX + 1):
        Leaf.made[-1].say(Kind.READY)
        Leaf.started.clear()
        Leaf.made[-1].die()
        await next_leaf()
    assert pool.able


async def test_a_description_is_asked_of_the_process_that_comes_next(pool: SlotPool) -> None:
    die_until_it_waits(pool)
    described_job = job()
    describing = asyncio.create_task(pool.describe(described_job))
    leaf = await next_leaf()
    assert leaf.sent == [Kind.DESCRIBE]
    answer = coordination.JobDescribed(leaf_sha256="ab")
    body = ipc.pack_json({"job": described_job.number}, answer.SerializeToString())
    leaf.say(Kind.DESCRIBED, body)
    async with asyncio.timeout(GUARD_S):
        assert (await describing).leaf_sha256 == "ab"


@pytest.mark.parametrize("failed", [False, True])
async def test_a_description_that_no_message_has_room_for_is_refused(
    pool: SlotPool, failed: bool
) -> None:
    """Handed on it would end the worker's session. Code of the job runs where it comes from."""
    described_job = job()
    describing = asyncio.create_task(pool.describe(described_job))
    await asyncio.sleep(0)
    tensors = [training_pb2.TensorSpec(name=f"{each:0100}") for each in range(50_000)]
    answer = coordination.JobDescribed(layout=training_pb2.Layout(tensors=tensors))
    if failed:
        answer.Clear()
        answer.failure.traceback = "x" * 5_000_000
    body = ipc.pack_json({"job": described_job.number}, answer.SerializeToString())
    Leaf.made[-1].say(Kind.DESCRIBED, body)
    async with asyncio.timeout(GUARD_S):
        found = await describing
    assert found.failure.code == "DESCRIPTION_TOO_LONG"
    assert failed or "50,000 tensors and 0 evaluation sums, has" in found.failure.message
    assert found.ByteSize() < 16 * 1024


async def test_a_process_that_dies_of_a_description_is_replaced_once(pool: SlotPool) -> None:
    describing = asyncio.create_task(pool.describe(job()))
    await asyncio.sleep(0)
    for _ in range(DESCRIBE_ATTEMPTS):
        leaf = Leaf.made[-1]
        async with asyncio.timeout(GUARD_S):
            while not leaf.sent:
                await asyncio.sleep(0)
        leaf.die()
    async with asyncio.timeout(GUARD_S):
        assert "died" in (await describing).failure.message
    assert [leaf.sent for leaf in Leaf.made if leaf.sent] == [[Kind.DESCRIBE]] * DESCRIBE_ATTEMPTS


async def test_a_process_that_was_killed_over_a_description_is_no_fault_of_the_job(
    pool: SlotPool,
) -> None:
    describing = asyncio.create_task(pool.describe(job()))
    await asyncio.sleep(0)
    Leaf.made[-1].die()
    leaf = Leaf.made[-1]
    async with asyncio.timeout(GUARD_S):
        while not leaf.sent:
            await asyncio.sleep(0)
        leaf.say(Kind.DESCRIBED, ipc.pack_json({"job": job().number}, b""))
        assert not (await describing).HasField("failure")


async def test_code_that_is_being_described_outlives_a_job_that_ends(pool: SlotPool) -> None:
    pool.run(task(), job("code"))
    describing = asyncio.create_task(pool.describe(job("code")))
    await asyncio.sleep(0)
    pool.drop(job("code"), code_in_use=False)
    leaf = Leaf.made[-1]
    assert Kind.DESCRIBE in leaf.sent
    leaf.say(Kind.DESCRIBED, ipc.pack_json({"job": 1}, b""))
    async with asyncio.timeout(GUARD_S):
        assert not (await describing).HasField("failure")


async def test_a_task_that_waits_for_its_process_ends_when_nobody_wants_it(pool: SlotPool) -> None:
    die_until_it_waits(pool)
    waiting = task()
    pool.run(waiting, job())
    pool.cancel(waiting)
    assert pool._events.ended == [(waiting.id, False)]  # type: ignore[attr-defined]
    assert (await next_leaf()).sent == []


async def test_a_running_task_is_cancelled_by_its_process(pool: SlotPool) -> None:
    running = task()
    pool.run(running, job())
    pool.cancel(running)
    assert Leaf.made[-1].cancelled == [running.id]
    assert pool._events.ended == []  # type: ignore[attr-defined]


# Chunks


async def test_a_fetch_is_answered_once_even_when_it_is_cancelled_as_it_ends() -> None:
    answers: list[bytes] = []
    pinned = SimpleNamespace(path="/chunk", release=lambda: None)

    class Cache:
        limit_bytes = 1 << 20

        async def get(self, _digest: str, _size: int) -> Any:
            return pinned

    def answer(_process: Any, body: bytes) -> None:
        answers.append(body)
        if len(answers) == 1:
            # Before the end of the fetch was noticed: a revocation in the same turn of the loop.
            server.cancel(wanted)

    server = ChunkServer(Cache(), answer)  # type: ignore[arg-type]
    wanted = task()
    process: Any = object()
    server.fetch(process, wanted, {"digest": "ab", "size_bytes": 1})
    async with asyncio.timeout(GUARD_S):
        while server._waiting:
            await asyncio.sleep(0)
    server.cancel(wanted)
    assert len(answers) == 1


# Processes


def open_descriptors(*kinds: str) -> set[str]:
    """Which descriptors of these kinds this process has open."""
    gc.collect()  # shared memory stays mapped as long as somebody may look at it
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the folder just listed
            target = os.readlink(f"/proc/self/fd/{number}")
            if target.startswith(kinds):
                found.add(f"{number} {target}")
    return found


OF_A_PROCESS = ("/memfd:phalanx-progress", "pipe:")


def nothing(*_: Any) -> None:
    """Nobody listens."""


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """The processes that the test has started; servers of other tests may be there as well."""
    before = psutil.Process().children()
    return lambda: [child for child in psutil.Process().children() if child not in before]


@pytest.fixture
async def leaves(children: Callable[[], list[psutil.Process]]) -> AsyncIterator[LeafServer]:
    """A leaf server that is ready."""
    server, ready = LeafServer(), asyncio.Event()
    server.call_when_ready(ready.set)
    async with asyncio.timeout(GUARD_S):
        await ready.wait()
    yield server
    server.forget()


async def test_a_start_that_fails_leaves_no_descriptor(
    leaves: LeafServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(leaves, "start_leaf", refuse)
    before = open_descriptors(*OF_A_PROCESS)
    with pytest.raises(OSError, match="temporarily"):
        LeafProcess(leaves, 0, nothing, nothing, nothing)
    assert open_descriptors(*OF_A_PROCESS) <= before


async def test_the_end_of_a_process_is_told_whatever_its_last_words_break(
    leaves: LeafServer,
) -> None:
    gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    before = open_descriptors(*OF_A_PROCESS)

    def break_down(*_: Any) -> None:
        raise KeyError("a defect")

    process = LeafProcess(leaves, 0, break_down, break_down, lambda _, code: gone.set_result(code))
    # Only the end itself is to read what was said.
    asyncio.get_running_loop().remove_reader(process._socket)
    async with asyncio.timeout(GUARD_S):
        await asyncio.to_thread(select.select, [process._socket], [], [], GUARD_S)
        process.kill()
        assert await gone == -9
    del process
    assert open_descriptors(*OF_A_PROCESS) <= before


async def test_processes_that_come_and_go_leave_no_descriptor_on_either_side(
    leaves: LeafServer, children: Callable[[], list[psutil.Process]]
) -> None:
    async def come_and_go() -> None:
        gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        process = LeafProcess(leaves, 0, nothing, nothing, lambda _, code: gone.set_result(code))
        # At once: it may have neither its group nor its limits yet.
        process.kill()
        assert await gone == -9

    async with asyncio.timeout(GUARD_S):
        await come_and_go()
        (server,) = children()
        ours, theirs = open_descriptors(""), server.num_fds()
        for _ in range(5):
            await come_and_go()
    assert open_descriptors("") <= ours
    assert server.num_fds() == theirs == 3
    assert not server.children()
    assert server.num_threads() == 1


async def test_a_server_that_is_not_ready_is_ended_at_once(
    children: Callable[[], list[psutil.Process]],
) -> None:
    server = LeafServer()
    server.call_when_ready(lambda: pytest.fail("nobody waits any more"))
    (process,) = children()
    server.forget()
    assert not process.is_running()


async def test_a_server_that_cannot_be_started_is_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusals = [OSError(11, "Resource temporarily unavailable")] * 2
    popen = subprocess.Popen

    def start(*args: Any, **more: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return popen(*args, **more)

    monkeypatch.setattr(subprocess, "Popen", start)
    server, ready = LeafServer(), asyncio.Event()
    server.call_when_ready(ready.set)
    async with asyncio.timeout(GUARD_S):
        await ready.wait()
    assert server.ready
    server.forget()
    assert not server.ready


async def test_a_server_that_dies_before_it_is_ready_is_replaced(
    children: Callable[[], list[psutil.Process]],
) -> None:
    server, ready = LeafServer(), asyncio.Event()
    server.call_when_ready(ready.set)
    (first,) = children()
    first.kill()
    async with asyncio.timeout(GUARD_S):
        await ready.wait()
    assert first not in children()
    server.forget()


HANGING_SERVER = """
import os, socket, sys, time
from worker.leaf.server import run

setattr(os, sys.argv[2], lambda *_: time.sleep(3600))
run(socket.socket(fileno=0), int(sys.argv[1]))
"""


@pytest.mark.parametrize("hangs", ["fork", "waitpid"])
async def test_a_server_that_hangs_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, hangs: str, children: Callable[[], list[psutil.Process]]
) -> None:
    def start(_ours: socket.socket, theirs: socket.socket) -> Any:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", HANGING_SERVER, str(os.getpid()), hangs],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": leaf_server._ROOT},
        )

    monkeypatch.setattr(leaf_server, "_start_program", start)
    loop = asyncio.get_running_loop()
    server, ready, given_up = LeafServer(), asyncio.Event(), asyncio.Event()
    gone: asyncio.Future[int] = loop.create_future()
    lost = server._lost

    def lose(*why: Any) -> None:
        given_up.set()
        lost(*why)

    monkeypatch.setattr(server, "_lost", lose)
    server.call_when_ready(ready.set)
    async with asyncio.timeout(GUARD_S):
        await ready.wait()
        (child,) = children()
        monkeypatch.setattr(leaf_server, "ANSWER_TIMEOUT_S", 0.5)
        process = LeafProcess(server, 0, nothing, nothing, lambda _, code: gone.set_result(code))
        process.kill()
        # The loop turns while there is no answer; it would not if somebody waited for it.
        assert not given_up.is_set()
        await given_up.wait()
        assert await gone == -9
        assert process.orphaned
        assert not server.ready
        while child.is_running():
            await asyncio.sleep(0)
    server.forget()


# Sending


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


async def test_a_descriptor_that_waits_to_be_sent_is_our_own(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    sender = SocketSender(asyncio.get_running_loop(), ours)
    large = bytes(2**20)
    sender.send(large)
    reader, writer = os.pipe()
    sender.send(b"with it", (writer,))
    sender.send(b"after it")
    os.close(writer)
    writer = os.open(os.devnull, os.O_WRONLY)  # most likely under the same number
    wanted = len(large) + len(b"with it") + len(b"after it")
    theirs.setblocking(False)
    got, received = 0, list[int]()
    async with asyncio.timeout(GUARD_S):
        while got < wanted:
            try:
                data, fds, _, _ = socket.recv_fds(theirs, 65_536, 4)
            except BlockingIOError:
                await asyncio.sleep(0)
                continue
            got += len(data)
            received += fds
    sender.close()
    try:
        (passed,) = received
        os.write(passed, b"x")
        assert os.read(reader, 1) == b"x"
    finally:
        for fd in (reader, writer, *received):
            os.close(fd)


async def test_what_waits_to_be_sent_to_the_dead_is_let_go(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    sender = SocketSender(asyncio.get_running_loop(), ours)
    sender.send(bytes(2**20))
    with tempfile.NamedTemporaryFile() as file:
        sender.send(b"with it", (file.fileno(),))
    assert open_descriptors(file.name)
    theirs.close()
    sender.close()
    assert not open_descriptors(file.name)
