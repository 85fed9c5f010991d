"""A cluster on PostgreSQL and an object store: the same bits, whatever is killed."""

from pathlib import Path
from uuid import uuid4

import pytest

from phalanx.clients.storage import SyncStorageClient
from phalanx.testing.arena import GUARD_S, arena, gated_job, wait_until
from phalanx.testing.object_server import ObjectServer
from phalanx.testing.postgres_server import PostgresServer

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]


def test_storage_control_a_worker_and_the_database_die(
    tmp_path: Path,
    undisturbed_sha256: str,
    postgres_server: PostgresServer,
    object_server: ObjectServer,
) -> None:
    name = f"chaos-{uuid4().hex}"
    environment = {
        **object_server.environment,
        "PHALANX_STORAGE_METADATA": postgres_server.create_database(name),
        "PHALANX_STORAGE_BLOBS": f"{object_server.create_bucket(name)}/cluster",
    }
    with arena(tmp_path, 3, environment=environment) as ring:
        job = ring.submit(gated_job())
        victim = ring.caught_at(job, 15)[0]
        before = {each.id: each.pid for each in ring.cluster.processes()}
        for member in ("storage", "control-1", victim):
            ring.signal(member)
        postgres_server.kill()
        postgres_server.start()
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        wait_until(
            lambda: all(
                ring.cluster.process(each).pid not in (0, before[each])
                for each in ("storage", "control-1", victim)
            ),
            "all of them to be back",
        )
        with SyncStorageClient(ring.cluster.process("storage").address) as storage:
            assert [each.step for each in storage.list_checkpoints(job.id)][:1] == [60]
        # Nothing of it is in the folder that storage would use by itself.
        assert not (Path(ring.cluster.state_dir) / "storage").exists()
        assert any("/blobs/" in key for key in object_server.keys(name))
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
