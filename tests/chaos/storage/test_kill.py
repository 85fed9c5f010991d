"""``kill -9`` of storage in the middle of writing: what was acknowledged is there afterwards."""

import itertools
import random
import threading

import pytest

from phalanx.clients.storage import SyncStorageClient
from phalanx.errors import PhalanxError
from phalanx.testing import stores
from phalanx.testing.storage_messages import digest_of, part
from phalanx.testing.storage_process import StorageProcess
from phalanx.v1 import storage_service_pb2 as pb

GUARD_S = 60
ROUNDS = 4

pytestmark = pytest.mark.slow


@pytest.fixture
def kept(tmp_path):
    return stores.kept(tmp_path / "state")


@pytest.fixture
def storage(tmp_path, kept):
    with StorageProcess(tmp_path / "state", environment=kept.environment) as storage:
        yield storage


class Writers:
    """Threads that write until storage is gone; they remember what was acknowledged."""

    def __init__(self, address):
        self._address = address
        self.acknowledged = threading.Semaphore(0)
        self._threads = []

    def start(self, write):
        def run():
            client = SyncStorageClient(self._address, timeout_s=GUARD_S, attempts=1)
            try:
                while True:
                    write(client)
                    self.acknowledged.release()
            except PhalanxError:
                pass
            finally:
                client.close()

        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)

    def wait_for(self, count):
        for _ in range(count):
            assert self.acknowledged.acquire(timeout=GUARD_S)

    def join(self):
        for thread in self._threads:
            thread.join(GUARD_S)
            assert not thread.is_alive()


def test_every_acknowledged_record_survives(storage):
    acknowledged = {0: [], 1: []}
    sent = {0: 0, 1: 0}
    generator = random.Random(1)
    for _ in range(ROUNDS):
        writers = Writers(storage.address)

        def writing(number):
            def write(client):
                payload = b"%d:%d" % (number, sent[number])
                sent[number] += 1
                end = client.append_journal("control", [payload])
                acknowledged[number].append((end - 1, payload))

            return write

        for number in acknowledged:
            writers.start(writing(number))
        writers.wait_for(generator.randrange(10, 60))
        storage.kill()
        writers.join()
        storage.start()
        with SyncStorageClient(storage.address) as client:
            found = [(r.sequence, r.payload) for r in client.read_journal("control")]
        assert [sequence for sequence, _ in found] == list(range(len(found))), "a gap"
        payloads = [payload for _, payload in found]
        assert len(set(payloads)) == len(payloads), "a record was written twice"
        for records in acknowledged.values():
            assert set(records) <= set(found)
        # At most the one that each writer was waiting for is there without an acknowledgement.
        assert len(found) <= sum(map(len, acknowledged.values())) + 2 * ROUNDS
    assert all(acknowledged.values())


def test_every_acknowledged_blob_survives_and_no_half_one_is_left(storage, kept):
    acknowledged = []
    generator = random.Random(2)
    sizes = [100, 70_000, 3_000_000]
    number = 0
    for _ in range(ROUNDS):
        writers = Writers(storage.address)

        def write(client):
            nonlocal number
            number += 1
            content = random.Random(number).randbytes(sizes[number % 3])
            acknowledged.append((client.put_blob(content, check_first=False), content))

        writers.start(write)
        writers.wait_for(generator.randrange(3, 25))
        storage.kill()
        writers.join()
        storage.start()
        assert not kept.unfinished()
        with SyncStorageClient(storage.address) as client:
            for digest, content in acknowledged:
                assert client.get_blob(digest) == content
    for digest, content in kept.blobs().items():
        assert digest_of(content) == digest


def test_acknowledged_checkpoints_survive_whole(storage):
    acknowledged = []
    steps = itertools.count(1)
    with SyncStorageClient(storage.address) as client:
        client._run(client._client.raise_term("job-1", 0))
    generator = random.Random(3)
    for _ in range(ROUNDS):
        writers = Writers(storage.address)

        def write(client):
            step = next(steps)
            for index in range(3):
                content = b"range %d of step %d" % (index, step)
                client.put_blob(content)
                request = part(content, step=step, index=index, ranges=3, keep=1000)
                answer = client._run(client._client.commit_checkpoint(request))
            acknowledged.append((step, answer.manifest))

        writers.start(write)
        writers.wait_for(generator.randrange(2, 15))
        storage.kill()
        writers.join()
        storage.start()
        with SyncStorageClient(storage.address) as client:
            found = {manifest.step: manifest for manifest in client.list_checkpoints("job-1")}
            for acknowledged_step, manifest in acknowledged:
                assert found[acknowledged_step] == manifest
            for manifest in found.values():
                assert len(manifest.parts) == 3
                for item in manifest.parts:
                    assert digest_of(client.get_blob(item.digest)) == item.digest


def test_a_lease_survives_and_its_token_goes_on(storage):
    def acquire():
        with SyncStorageClient(storage.address) as client:
            return client._run(client._client.acquire_lease("leader", "one")).lease

    tokens = [acquire().token]
    for _ in range(2):
        storage.kill()
        storage.start()
        tokens.append(acquire().token)
    assert tokens == [1, 2, 3]


def test_the_blocking_client_finds_a_restarted_storage_again(tmp_path, kept, free_port):
    listen = f"127.0.0.1:{free_port}"
    with (
        StorageProcess(tmp_path / "state", listen=listen, environment=kept.environment) as storage,
        SyncStorageClient(storage.address, timeout_s=GUARD_S, attempts=50) as client,
    ):
        client.append_journal("control", [b"a"], expected_sequence=0)
        storage.kill()
        restart = threading.Thread(target=storage.start)
        restart.start()
        assert client.append_journal("control", [b"b"], expected_sequence=1) == 2
        restart.join()


def test_sigterm_ends_it_cleanly(storage):
    with SyncStorageClient(storage.address) as client:
        client.append_journal("control", [b"a"])
    assert storage.stop() == 0
    assert not (storage.state / "metadata.sqlite3-wal").exists(), "the log was not settled"
    storage.start()
    with SyncStorageClient(storage.address) as client:
        assert [r.payload for r in client.read_journal("control")] == [b"a"]


def test_a_term_and_a_final_checkpoint_race_with_a_kill(storage):
    """Success is decided once, whatever was acknowledged when storage died."""
    with SyncStorageClient(storage.address) as client:
        client.put_blob(b"parameters")
        for number in range(6):
            client._run(client._client.raise_term(f"job-{number}", 0))
    outcomes = {}

    def finish(client):
        number = len(outcomes)
        request = part(b"parameters", job_id=f"job-{number}", final=True)
        outcomes[number] = None
        outcomes[number] = client._run(client._client.commit_checkpoint(request)).complete

    writers = Writers(storage.address)
    writers.start(finish)
    writers.wait_for(3)
    storage.kill()
    writers.join()
    storage.start()
    with SyncStorageClient(storage.address) as client:
        for number, complete in outcomes.items():
            if number > 5:
                continue
            row = client.get_job_row(f"job-{number}")
            if complete:
                assert row.HasField("final_checkpoint")
            if row.HasField("final_checkpoint"):
                with pytest.raises(PhalanxError) as caught:
                    client._run(client._client.raise_term(f"job-{number}", 1))
                assert caught.value.reason == "FINAL_CHECKPOINT"


def test_pins_survive(storage):
    with SyncStorageClient(storage.address) as client:
        digest = client.put_blob(b"code")
        client._run(client._client.set_pins("job-1", [pb.Pin(blob=digest)]))
    storage.kill()
    storage.start()
    with SyncStorageClient(storage.address) as client:
        assert client.collect_garbage(grace_s=0).blobs_removed == 0
        assert client.get_blob(digest) == b"code"
