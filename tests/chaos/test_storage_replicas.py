"""Storage in two replicas under a running job: one is enough, whichever it is."""

import contextlib
import itertools
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from phalanx.clients.storage import SyncStorageClient
from phalanx.errors import PhalanxError
from phalanx.testing import stores
from phalanx.testing.arena import GUARD_S, Arena, arena, gated_job, stopped, wait_until
from phalanx.testing.object_server import ObjectServer
from phalanx.testing.postgres_server import PostgresServer

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

REPLICAS = ("storage-1", "storage-2")
LARGE_BYTES = 3_000_000


@pytest.fixture
def ring(
    tmp_path: Path, postgres_server: PostgresServer, object_server: ObjectServer
) -> Iterator[Arena]:
    with (
        stores.used(stores.SharedStores(postgres_server, object_server)),
        arena(tmp_path, 2, lease_s=10.0, storages=2) as ring,
    ):
        yield ring


class Client:
    """Writes and reads without end; it has what every client has: attempts, and a deadline."""

    def __init__(self, addresses: str) -> None:
        self.rounds = 0
        self.error: BaseException | None = None
        self._addresses = addresses
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with SyncStorageClient(self._addresses) as client:
                for number in itertools.count():
                    if self._over.is_set():
                        return
                    content = random.Random(number).randbytes(LARGE_BYTES)
                    digest = client.put_blob(content)
                    end = client.append_journal(
                        "client", [b"%d" % number], expected_sequence=number
                    )
                    assert end == number + 1
                    assert client.get_blob(digest) == content
                    self.rounds += 1
        except (PhalanxError, AssertionError) as error:
            self.error = error

    def more(self) -> None:
        """Wait for two more rounds: one of them began after now."""
        wanted = self.rounds + 2
        wait_until(lambda: self.rounds >= wanted or self.error, "the client to go on")
        self.none_failed()

    def none_failed(self) -> None:
        assert self.error is None, self.error

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join(GUARD_S)


def addresses(ring: Arena) -> str:
    return ",".join(ring.cluster.process(each).address for each in REPLICAS)


def is_back(ring: Arena, replica: str, before: int) -> bool:
    """Whether it is another process than before, which serves."""
    member = ring.cluster.process(replica)
    if member.pid in (0, before) or not member.address:
        return False
    with SyncStorageClient(member.address, attempts=1) as client:
        client.missing_blobs([])
    return True


def test_one_after_the_other_is_restarted_and_killed(ring: Arena, undisturbed_sha256: str) -> None:
    """Twice around, in good order and without mercy, while a client and a job go on."""
    job = ring.submit(gated_job())
    client = Client(addresses(ring))
    with client.calling():
        steps = itertools.count(5, 10)
        for number, replica in itertools.product((signal.SIGTERM, signal.SIGKILL), REPLICAS):
            ring.caught_at(job, next(steps))
            pid = ring.cluster.process(replica).pid
            ring.signal(replica, number)
            client.more()
            wait_until(lambda: is_back(ring, replica, pid), f"{replica} to be back")  # noqa: B023
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        client.none_failed()
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
    assert not ring.events("WORKER_LOST")


@pytest.mark.soak
@pytest.mark.parametrize("gone", REPLICAS)
def test_one_stands_still(ring: Arena, undisturbed_sha256: str, gone: str) -> None:
    """Its sockets stay open and nothing comes out of them: a job does not need it."""
    job = ring.submit(gated_job())
    ring.caught_at(job, 15)
    with stopped(ring.cluster.process(gone).pid):
        ring.gate.release()
        assert job.wait(timeout_s=GUARD_S).parameters_sha256 == undisturbed_sha256
