"""The slots of a worker without processes: whose fault a death is."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from phalanx.v1 import coordination_service_pb2, training_pb2
from worker import ipc
from worker.core.rounds import PartState
from worker.ipc import Kind, Message
from worker.session import slots
from worker.session.slots import DESCRIBE_ATTEMPTS, SlotPool

SIGKILL = -9
GUARD_S = 30.0


class FakeProcess:
    """Keeps what it is told; dies when the test wants."""

    def __init__(self, leaves, limit, on_message, on_log, on_exit, gpus) -> None:
        self.gpus = gpus
        self.page = SimpleNamespace(task=0, shard=-1, leaves=0)
        self.known_jobs: set[int] = set()
        self.ready = self.killed_as_hung = self.orphaned = self.killed = False
        self.pid = 1
        self.told: list[Kind] = []
        self.on_message, self.on_exit = on_message, on_exit
        started.append(self)

    def send(self, kind, body=b"", fds=()) -> None:
        self.told.append(kind)

    def was_out_of_memory(self, code) -> bool:
        return False

    def kill(self) -> None:
        self.killed = True

    def die(self) -> None:
        self.on_exit(self, SIGKILL)


started: list[FakeProcess] = []
EVENTS = SimpleNamespace(
    slot_idle=lambda slot: None,
    task_ended=lambda task, lost: None,
    server_died=lambda task, shard: False,
    part_failed=lambda task, index, failure: None,
    process_gone=lambda process: None,
    printed=lambda process, level, data: None,
)
JOB = SimpleNamespace(
    code_key="",
    number=1,
    plan=training_pb2.JobPlan(job_id="job-2"),
    describe_body=lambda: b"",
    timeout_s=0.0,
)


@pytest.fixture
async def pool(monkeypatch):
    started.clear()
    monkeypatch.setattr(slots, "LeafProcess", FakeProcess)
    pool = SlotPool(1, 0, 60.0, EVENTS, SimpleNamespace(ready=True))
    pool.start()
    return pool


async def test_a_model_is_built_anew_where_the_leaf_of_another_job_took_the_process_along(pool):
    process = started[0]
    task = SimpleNamespace(id=7, job_id="job-2", is_call=True, slot=0, parts=[])
    place = pool._places[0, ""]
    place.task, place.job, process.page.task = task, JOB, task.id
    describing = asyncio.create_task(pool.describe(JOB))
    await asyncio.sleep(0)
    process.die()
    assert Kind.DESCRIBE in started[-1].told
    assert started[-1] is not process
    described = coordination_service_pb2.JobDescribed(leaf_sha256="right")
    body = ipc.pack_json({"job": 1}, described.SerializeToString())
    started[-1].on_message(started[-1], Message(Kind.DESCRIBED, body))
    answer = await describing
    assert answer.leaf_sha256 == "right"
    assert not answer.HasField("failure")


async def test_a_description_that_was_given_up_answers_nobody_and_holds_nobody_up(pool):
    process = started[0]
    given_up = asyncio.create_task(pool.describe(JOB))
    await asyncio.sleep(0)
    other = SimpleNamespace(**{**vars(JOB), "number": 2})
    waiting = asyncio.create_task(pool.describe(other))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.wait([given_up])
    for _ in range(5):
        await asyncio.sleep(0)
    assert process.told.count(Kind.DESCRIBE) == 2
    for number, leaf in ((1, "of the first"), (2, "of the second")):
        described = coordination_service_pb2.JobDescribed(leaf_sha256=leaf)
        body = ipc.pack_json({"job": number}, described.SerializeToString())
        process.on_message(process, Message(Kind.DESCRIBED, body))
    assert (await waiting).leaf_sha256 == "of the second"


async def test_a_process_that_dies_over_a_model_is_told_as_the_fault_of_its_job(pool):
    describing = asyncio.create_task(pool.describe(JOB))
    for attempt in range(DESCRIBE_ATTEMPTS):
        async with asyncio.timeout(GUARD_S):
            while not started[attempt].told:
                await asyncio.sleep(0)
        started[attempt].die()
    answer = await describing
    assert answer.failure.code == "JOB_CODE"


CODED = SimpleNamespace(
    **{**vars(JOB), "code_key": "code", "number": 3, "setup_body": lambda: b""},
    arena=SimpleNamespace(fd=0),
)


async def set_up(pool, job, process) -> None:
    """Set a job up; the process says that it has it."""
    setting_up = asyncio.create_task(pool.set_up(job))
    await asyncio.sleep(0)
    body = ipc.pack_json({"job": job.number, "error": "", "traceback": "", "device": ""})
    process.on_message(process, Message(Kind.SETUP_DONE, body))
    await setting_up


async def test_a_job_with_code_takes_over_the_process_that_was_started_in_advance(pool):
    await set_up(pool, CODED, started[0])
    assert started[0].told == [Kind.SETUP]
    assert len(started) == 1


async def test_code_never_gets_a_process_that_has_heard_of_another_job(pool):
    plain = SimpleNamespace(**{**vars(CODED), "code_key": "", "number": 4})
    await set_up(pool, plain, started[0])
    setting_up = asyncio.create_task(pool.set_up(CODED))
    await asyncio.sleep(0)
    assert [process.told for process in started] == [[Kind.SETUP], [Kind.SETUP]]
    setting_up.cancel()


async def test_a_process_that_computes_the_fingerprint_is_not_taken_over(pool):
    asked = asyncio.create_task(pool.fingerprint())
    await asyncio.sleep(0)
    setting_up = asyncio.create_task(pool.set_up(CODED))
    await asyncio.sleep(0)
    assert started[0].told == [Kind.FINGERPRINT]
    assert Kind.SETUP in started[1].told
    setting_up.cancel()
    asked.cancel()


async def test_the_end_of_the_only_code_leaves_a_fresh_process_for_the_next_job(pool):
    await set_up(pool, CODED, started[0])
    pool.drop(CODED, code_in_use=False)
    assert started[0].killed
    assert len(started) == 2
    await set_up(pool, SimpleNamespace(**{**vars(CODED), "code_key": "other"}), started[1])


@pytest.mark.parametrize("orphaned", [False, True])
async def test_what_died_with_its_server_is_nobodys_fault(pool, monkeypatch, orphaned):
    told = []
    monkeypatch.setattr(EVENTS, "part_failed", lambda *failure: told.append("failed"))
    monkeypatch.setattr(EVENTS, "task_ended", lambda task, lost: told.append(lost))
    part = SimpleNamespace(node=SimpleNamespace(first=0, span=4), state=PartState.RUNNING)
    round = SimpleNamespace(is_evaluation=False)
    process, place = started[0], pool._places[0, ""]
    place.task = SimpleNamespace(
        id=7, job_id="job-2", is_call=True, slot=0, parts=[part], round=round
    )
    place.job = JOB
    process.page = SimpleNamespace(task=7, shard=2, leaf_seconds=lambda _: 0.0)
    process.orphaned = orphaned
    monkeypatch.setattr(slots, "rows_of_shard", lambda *_: (0, 1))
    process.die()
    assert told == ([True] if orphaned else ["failed", True])


@pytest.mark.parametrize(("orphaned", "begun"), [(True, 6), (True, 7), (False, 6)])
async def test_who_died_with_its_server_may_not_have_heard_of_its_task(pool, orphaned, begun):
    process, place = started[0], pool._places[0, ""]
    task = place.task = SimpleNamespace(id=7, job_id="job-2", is_call=True, slot=0, parts=[])
    place.job = JOB
    process.page = SimpleNamespace(task=begun, shard=-1)
    process.orphaned = orphaned
    process.die()
    assert task.unheard == (orphaned and begun != task.id)


@pytest.mark.parametrize("guiltless", ["orphaned", "killed_as_hung"])
async def test_a_model_that_is_not_to_blame_for_a_death_is_built_by_the_next(pool, guiltless):
    """Its process died with its server, or was killed since the model before it hung."""
    describing = asyncio.create_task(pool.describe(JOB))
    await asyncio.sleep(0)
    setattr(started[0], guiltless, True)
    started[0].die()
    assert started[1].told == [Kind.DESCRIBE]
    answer = coordination_service_pb2.JobDescribed(leaf_sha256="right")
    body = ipc.pack_json({"job": 1}, answer.SerializeToString())
    started[1].on_message(started[1], Message(Kind.DESCRIBED, body))
    assert (await describing).leaf_sha256 == "right"


async def test_processes_start_once_their_server_is_ready(monkeypatch):
    started.clear()
    monkeypatch.setattr(slots, "LeafProcess", FakeProcess)
    waiting = []
    leaves = SimpleNamespace(ready=False, call_when_ready=waiting.append, forget=waiting.clear)
    pool = SlotPool(2, 0, 60.0, EVENTS, leaves)
    pool.start()
    assert not started
    leaves.ready = True
    for callback in waiting:
        callback()
    assert len(started) == 2


async def test_a_job_does_not_answer_for_the_time_without_a_process(pool, monkeypatch):
    """After some deaths the next process comes late; whose model it is to build did not do that."""
    place, passed_s = pool._places[0, ""], []
    answer = asyncio.get_running_loop().create_future()

    async def tick(_waits, timeout):
        passed_s.append(timeout)
        if sum(passed_s) > 100.0 and not answer.done():
            answer.set_result(b"")

    monkeypatch.setattr(slots, "asyncio", SimpleNamespace(wait=tick))
    process, place.process = place.process, None
    await pool._patiently(place, answer)
    place.process = process
    answer = asyncio.get_running_loop().create_future()
    passed_s.clear()
    with pytest.raises(TimeoutError):
        await pool._patiently(place, answer)


async def test_each_slot_sees_its_share_of_the_gpus(monkeypatch):
    monkeypatch.setattr(slots, "LeafProcess", FakeProcess)
    for gpus, shares in (
        ((), [(), ()]),  # such as where the worker was told `none`: leaves see no other either
        (("0", "1"), [("0",), ("1",)]),
        (("7",), [(), ("7",)]),
    ):
        pool = SlotPool(2, 0, 60.0, EVENTS, SimpleNamespace(ready=True), gpus)
        pool.start()
        assert [place.process.gpus for place in pool._places.values()] == shares


async def test_slots_whose_gpus_give_other_bits_are_named(monkeypatch):
    monkeypatch.setattr(slots, "LeafProcess", FakeProcess)
    pool = SlotPool(3, 0, 60.0, EVENTS, SimpleNamespace(ready=True), ("0", "1", "2"))
    pool.start()
    for devices, said in (
        (("", "", ""), ""),
        (("a", "a", "a"), ""),
        (("a", "b", "a"), "other bits in the slots 0 2 and 1"),
    ):
        job = SimpleNamespace(**{**vars(JOB), "arena": SimpleNamespace(fd=0)})
        job.setup_body = lambda: b""
        # The same slots have processes of another job's code, which say nothing of this one.
        for slot in range(3):
            pool._place(slot, "other")
        waiting = asyncio.ensure_future(pool.set_up(job))
        await asyncio.sleep(0)
        for slot, device in enumerate(devices):
            place = pool._places[slot, ""]
            answer = {"job": job.number, "error": "", "traceback": "", "device": device}
            told = Message(Kind.SETUP_DONE, ipc.pack_json(answer))
            assert place.process is not None
            place.process.on_message(place.process, told)
        assert await asyncio.wait_for(waiting, GUARD_S) is None
        assert pool.unlike(job).startswith(said)
        assert bool(pool.unlike(job)) == bool(said)
        pool.drop(job, code_in_use=True)
        assert not pool.unlike(job)
