"""Data that stays in the user's files: the same bits through deaths, and a clear end without it."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest

import phalanx
from phalanx.clients.storage import SyncStorageClient
from phalanx.errors import FailedPrecondition
from phalanx.sdk.job import JobFailed
from phalanx.testing.arena import (
    GUARD_S,
    arena,
    blobs,
    held_job,
    undisturbed_sha256_of,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

# Cut into many chunks, and dealt in another way than the data that every arena has stored.
OPTIONS: dict[str, Any] = {"test": 0.2, "seed": 3, "chunk_bytes": 2048}
JOB = held_job()
JOB["data"] = {"name": "linked", "shards": 11}


def write(path: Path) -> Path:
    features, targets = blobs()
    columns = {f"x{index}": features[:, index] for index in range(features.shape[1])}
    pyarrow.parquet.write_table(pa.table({**columns, "y": targets}), path, row_group_size=150)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return write(tmp_path / "data" / "blobs.parquet")


@pytest.fixture(scope="module")
def sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bits of the job on the same rows, copied."""
    folder = tmp_path_factory.mktemp("copied")

    def copied(cluster: phalanx.Cluster) -> None:
        cluster.data.add("linked", write(folder / "blobs.parquet"), **OPTIONS)

    return undisturbed_sha256_of(JOB, folder, copied)


def link(cluster: phalanx.Cluster, path: Path) -> None:
    dataset = cluster.data.add("linked", path, link=True, **OPTIONS)
    assert dataset.linked


def test_without_processes(tmp_path: Path, data: Path, sha256: str) -> None:
    before = hashlib.sha256(data.read_bytes()).digest()
    assert undisturbed_sha256_of(JOB, tmp_path, lambda cluster: link(cluster, data)) == sha256
    with phalanx.LocalCluster(workers=0) as cluster:
        link(cluster, data)
        data.rename(data.with_name("elsewhere.parquet"))
        with pytest.raises(JobFailed, match=f"(?s)storage service cannot read {data}"):
            cluster.submit(JOB).wait(timeout_s=GUARD_S)
        cluster.data.add("linked", data.with_name("elsewhere.parquet"), link=True, **OPTIONS)
        assert cluster.submit(JOB).wait(timeout_s=GUARD_S).parameters_sha256 == sha256
    assert hashlib.sha256(data.with_name("elsewhere.parquet").read_bytes()).digest() == before


def test_deaths_of_storage_and_of_a_worker(tmp_path: Path, data: Path, sha256: str) -> None:
    with arena(tmp_path, 2, link_roots=[data.parent]) as ring:
        link(ring.cluster, data)
        job = ring.submit_held(JOB, workers=2)
        with pytest.raises(FailedPrecondition, match="in use"):
            ring.cluster.data.delete("linked")
        readers = psutil.Process(ring.cluster.process("storage").pid).children()
        assert readers
        ring.signal("storage")
        ring.signal("worker-1")
        # Whoever takes its shards over needs data that it has not had, and so does a new one.
        shutil.rmtree(Path(ring.cluster.state_dir) / "cache" / "worker-1")
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert result.parameters_sha256 == sha256
        wait_until(lambda: not any(each.is_running() for each in readers), "their ends")
        assert (result.examples_lost, result.examples_doubled) == (0, 0)
        manifest = ring.cluster.data.manifest("linked")
        (address,) = (m.address for m in ring.cluster.processes() if m.role == "storage")
        with SyncStorageClient(address) as storage:
            storage.collect_garbage(grace_s=0)
            assert storage.missing_blobs(manifest.digests()) == list(manifest.digests())
        job.delete()
        ring.cluster.data.delete("linked")
        assert data.exists()


def test_a_file_that_goes_under_a_job(tmp_path: Path, data: Path, sha256: str) -> None:
    aside = data.with_name("aside.parquet")
    with arena(tmp_path, 2, link_roots=[data.parent]) as ring:
        link(ring.cluster, data)
        # The rows of the evaluation are fetched when they are needed first.
        job = ring.submit_held(JOB, workers=2)
        data.rename(aside)
        ring.gate.release()
        with pytest.raises(JobFailed) as caught:
            job.wait(timeout_s=GUARD_S)
        for words in ("data set linked@1", str(data), "no such file", "add the data set again"):
            assert words in str(caught.value)
        (event,) = ring.events("POISON_SHARD")
        assert str(data) in event.message
        # Others do not notice.
        other = {**JOB, "data": {"name": "blobs", "shards": 11}}
        assert ring.cluster.submit(other).wait(timeout_s=GUARD_S).steps == 60
        aside.rename(data)
        assert job.retry().wait(timeout_s=GUARD_S).parameters_sha256 == sha256
