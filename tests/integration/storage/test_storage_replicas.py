"""Two storage processes on one PostgreSQL and one bucket are one storage."""

import contextlib
import os
import random
import signal
import threading
from uuid import uuid4

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from phalanx.clients.storage import SyncStorageClient
from phalanx.errors import Aborted, FailedPrecondition, NotFound, PhalanxError
from phalanx.rpc.channel import open_sync_channel
from phalanx.rpc.health import LIVENESS
from phalanx.rpc.status import from_rpc_error
from phalanx.testing.object_server import Fault
from phalanx.testing.storage_messages import acquire, append, digest_of, part
from phalanx.testing.storage_process import StorageProcess
from phalanx.v1 import storage_service_pb2 as pb
from phalanx.v1 import storage_service_pb2_grpc as pb_grpc

pytestmark = pytest.mark.slow
GUARD_S = 60
STORAGE_SERVICE = pb.DESCRIPTOR.services_by_name["StorageService"].full_name


class Replica:
    """One storage process and blocking ways to call it."""

    def __init__(self, folder, bucket, arguments, environment):
        self.bucket = bucket
        self.process = StorageProcess(folder, arguments=arguments, environment=environment)
        self.connect()

    def connect(self):
        self.client = SyncStorageClient(self.process.address)
        self._channel = open_sync_channel(self.process.address)
        self._stub = pb_grpc.StorageServiceStub(self._channel)

    def call(self, method, request):
        """Call once; a PhalanxError as the service meant it."""
        try:
            return getattr(self._stub, method)(request, timeout=GUARD_S)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def disconnect(self):
        self.client.close()
        self._channel.close()

    def restart(self):
        self.disconnect()
        self.process.start()
        self.connect()

    def close(self):
        self.disconnect()
        self.process.close()


@pytest.fixture
def replicas(postgres_server, object_server, tmp_path):
    """Two of them, and what they share."""
    name = f"replicas-{uuid4().hex}"
    arguments = [
        *("--metadata", postgres_server.create_database(name)),
        *("--blobs", object_server.create_bucket(name)),
        *("--gc-interval-s", "0"),
    ]
    environment = object_server.environment
    with contextlib.ExitStack() as stack:
        opened = []
        for number in range(2):
            opened.append(Replica(tmp_path / f"unused-{number}", name, arguments, environment))
            stack.callback(opened[-1].close)
        yield opened
        assert not (tmp_path / "unused-0").exists()
    object_server.disturb()
    postgres_server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def together(*functions):
    """Run functions at the same time; raise what any of them raises."""
    errors = []
    start = threading.Barrier(len(functions))

    def run(function):
        start.wait()
        try:
            function()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_S)
    if errors:
        raise errors[0]


def test_what_one_stores_the_other_has(replicas):
    one, other = replicas
    digest = one.client.put_blob(b"content")
    assert other.client.get_blob(digest) == b"content"
    one.call("RaiseTerm", pb.RaiseTermRequest(job_id="job-1"))
    other.call("CommitCheckpoint", part(b"content"))
    assert [c.step for c in one.client.list_checkpoints("job-1")] == [10]
    with pytest.raises(Aborted):
        one.call("RaiseTerm", pb.RaiseTermRequest(job_id="job-1", expected_term=7))


def test_a_journal_that_both_append_to_has_no_gap_and_no_double(replicas):
    acknowledged = []

    def run(replica, name):
        expected = 0
        for number in range(40):
            record = f"{name}-{number}".encode()
            while True:
                try:
                    answer = replica.call("AppendJournal", append("s", record, expected=expected))
                    break
                except Aborted as error:
                    expected = int(error.details["next_sequence"])
            expected = answer.next_sequence
            acknowledged.append((expected - 1, record))

    one, other = replicas
    together(*(lambda r=r, n=n: run(r, n) for n, r in (("a", one), ("b", other), ("c", one))))
    records = [(r.sequence, r.payload) for r in other.client.read_journal("s")]
    assert records == sorted(acknowledged)
    assert len(records) == 120


def test_a_lease_has_one_holder_and_fences_everywhere(replicas):
    one, other = replicas
    granted = []

    def challenge(replica, holder):
        answer = replica.call("AcquireLease", acquire("leader", holder))
        if answer.acquired:
            granted.append(answer.lease)

    together(*(lambda r=r, n=n: challenge(r, f"c{n}") for n, r in enumerate([one, other] * 4)))
    (lease,) = granted
    seen = (lease.token, lease.counter)
    assert other.call("AcquireLease", acquire("leader", "next", seen)).acquired
    old = pb.Fence(lease="leader", token=lease.token)
    for replica in replicas:
        with pytest.raises(Aborted) as caught:
            replica.call("AppendJournal", append("control", b"late", fence=old))
        assert caught.value.reason == "STALE_GENERATION"


def test_one_content_put_by_both_at_once_is_one_blob(replicas):
    contents = [random.Random(seed).randbytes(200_000) for seed in range(6)]
    together(
        *(
            lambda r=r: [r.client.put_blob(content, check_first=False) for content in contents]
            for r in replicas * 2
        )
    )
    for replica in replicas:
        for content in contents:
            assert replica.client.get_blob(digest_of(content)) == content
    answer = replicas[0].client.collect_garbage(grace_s=3600)
    assert (answer.blobs_removed, answer.blobs_kept) == (0, len(contents))


def test_what_one_was_asked_about_the_other_spares(replicas):
    """Ages are shared: the memory of the process that collects does not matter."""
    one, other = replicas
    digest = one.client.put_blob(b"content")
    assert other.client.collect_garbage(grace_s=3600).blobs_removed == 0
    one.process.kill()
    one.restart()
    assert one.client.collect_garbage(grace_s=3600).blobs_removed == 0
    assert other.client.missing_blobs([digest]) == []


def test_registrations_by_one_and_collections_by_the_other_exclude_each_other(replicas):
    """No manifest ever names a blob that is gone."""
    one, other = replicas
    stop = threading.Event()
    committed, refused, removed = [], [], []

    def commit():
        try:
            for number in range(40):
                job_id, content = f"job-{number}", b"parameters of %d" % number
                one.client.put_blob(content, check_first=False)
                one.call("RaiseTerm", pb.RaiseTermRequest(job_id=job_id))
                try:
                    one.call("CommitCheckpoint", part(content, job_id=job_id))
                    committed.append((job_id, content))
                except FailedPrecondition as error:
                    refused.append(error.reason)
        finally:
            stop.set()

    def collect(replica):
        while not stop.is_set():
            removed.append(replica.client.collect_garbage(grace_s=0).blobs_removed)

    together(commit, lambda: collect(other), lambda: collect(one))
    assert len(committed) + refused.count("BLOB_MISSING") == 40
    assert committed
    assert sum(removed) == len(refused)
    for job_id, content in committed:
        (checkpoint,) = other.client.list_checkpoints(job_id)
        assert other.client.get_blob(checkpoint.parts[0].digest) == content


def test_a_replica_that_is_killed_in_an_upload_leaves_nothing_that_counts(replicas, object_server):
    one, other = replicas
    content = bytes(20_000_000)
    object_server.disturb(Fault("PUT", query="partNumber=2", delay_s=GUARD_S))
    upload = one.client.start_put_blob(content, digest=digest_of(content))
    pause = threading.Event()
    while not object_server.parts_without_end(one.bucket):
        assert not upload.done()
        pause.wait(0.01)
    with pytest.raises(NotFound):
        other.client.get_blob(digest_of(content))
    one.process.kill()
    object_server.disturb()
    with pytest.raises(PhalanxError):
        upload.result(GUARD_S)
    assert other.client.missing_blobs([digest_of(content)]) == [digest_of(content)]
    other.client.put_blob(content)
    one.restart()
    assert one.client.get_blob(digest_of(content)) == content


def test_a_replica_that_stands_still_holds_the_other_up_for_some_seconds_at_most(replicas):
    """It may stand still inside a transaction: the server ends that one."""
    one, other = replicas
    stop = threading.Event()
    answered = []

    def write():
        while not stop.is_set():
            try:
                one.call("AppendJournal", append("s", b"by one"))
                answered.append(1)
            except PhalanxError:
                return

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    try:
        for number in range(3):
            os.kill(one.process.pid, signal.SIGSTOP)
            try:
                assert other.call("AppendJournal", append("t", b"by other")).next_sequence == (
                    number + 1
                )
            finally:
                before = len(answered)
                os.kill(one.process.pid, signal.SIGCONT)
            pause = threading.Event()
            # Each may have had its answer before and not counted it yet: of one more answer the
            # call was made since then.
            while len(answered) <= before + len(writers):
                assert any(writer.is_alive() for writer in writers)
                pause.wait(0.01)
    finally:
        stop.set()
        for writer in writers:
            writer.join(GUARD_S)
    records = other.client.read_journal("s")
    assert len(records) == len(answered)


def health_of(process, service=""):
    with open_sync_channel(process.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        return stub.Check(request, timeout=GUARD_S).status


def test_it_is_not_ready_while_its_database_takes_nobody_in(replicas, postgres_server):
    """That is no reason to kill it: it lives on, and is ready again by itself."""
    process, name = replicas[0].process, replicas[0].bucket
    serving = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING

    def becomes(status):
        with open_sync_channel(process.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for answer in stub.Watch(health_pb2.HealthCheckRequest(), timeout=GUARD_S):
                if answer.status == status:
                    return

    becomes(serving)
    postgres_server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    postgres_server.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    )
    becomes(not_serving)
    assert health_of(process, LIVENESS) == serving
    assert health_of(process, STORAGE_SERVICE) == not_serving
    postgres_server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    becomes(serving)
    assert health_of(process, STORAGE_SERVICE) == serving
    assert replicas[0].client.append_journal("control", [b"a"], expected_sequence=0) == 1
