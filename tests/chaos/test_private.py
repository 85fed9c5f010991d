"""A private job under faults: each step keeps its rows and its noise, and the secret stays put."""

import base64
import os
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_encoding

from phalanx.data.manifest import DatasetManifest
from phalanx.privacy.secret import SECRET_BYTES, sampler_key
from phalanx.sdk import methods
from phalanx.sdk.in_process import job_code
from phalanx.sdk.job import Job
from phalanx.specs import job_plan
from phalanx.testing.arena import GUARD_S, Arena, arena, gated_job, wait_until
from phalanx.training.local import TrainedModel, train_in_process
from phalanx.v1.control_journal_pb2 import ControlRecord
from phalanx.v1.storage_service_pb2 import ReadJournalRequest

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]


def private_job(**train: Any) -> dict[str, Any]:
    """The gate is in the gradient of each row, since the model is one that does not clip."""
    privacy = {"clip_norm": 1.0, "noise_multiplier": 0.8, "delta": 1e-5}
    return gated_job(steps=20, privacy=privacy, batch_size=20, **train)


def secret_of(ring: Arena, job: Job) -> bytes:
    """What only control's journal tells; on a cluster without keys anybody may read that."""
    request = ReadJournalRequest(stream="control")
    for answer in ring.cluster.backend.stream(methods.READ_JOURNAL, request):
        for each in answer.records:
            record = ControlRecord.FromString(each.payload)
            submitted = record.job_submitted or record.job_snapshot.submitted
            if submitted.job_id == job.id:
                return submitted.secret
    raise AssertionError(f"no record of {job.id}")


def in_process(ring: Arena, job: Job, secret: bytes, folder: Path) -> TrainedModel:
    """The same job in this process, without any fault."""
    backend, spec = ring.cluster.backend, job.message.spec
    plan = job_plan(spec, ring.cluster.data.get(spec.data.name), job.id)
    manifest = DatasetManifest.from_json(backend.get_blob(plan.manifest_digest))

    def fetch(digest: str) -> Path:
        path = folder / digest
        if not path.exists():
            backend.get_blob_to(digest, path)
        return path

    os.environ["PHALANX_TEST_GATE"] = str(ring.gate.folder)
    folder.mkdir(exist_ok=True)
    code = job_code(spec, fetch, folder / "code")
    return train_in_process(plan, manifest, fetch, code_dir=code, secret=secret)


def check(ring: Arena, job: Job, folder: Path) -> None:
    """The bits are those of an undisturbed run with this secret, and nobody has lost a row."""
    result = job.wait(timeout_s=GUARD_S)
    secret = secret_of(ring, job)
    assert len(secret) == SECRET_BYTES
    alone = in_process(ring, job, secret, folder)
    assert result.parameters_sha256 == alone.parameters_sha256
    assert result.metrics == alone.metrics
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
    assert job.refresh().progress.examples == alone.examples
    other = in_process(ring, job, bytes(SECRET_BYTES), folder)
    assert other.parameters_sha256 != alone.parameters_sha256


def files_with(secret: bytes, folder: Path) -> set[str]:
    """Folders of a cluster in which a file holds the secret, in whatever form."""
    forms = (
        secret,
        secret.hex().encode(),
        repr(secret).encode(),
        base64.b64encode(secret),
        text_encoding.CEscape(secret, False).encode(),
    )
    return {
        path.relative_to(folder).parts[0]
        for path in folder.rglob("*")
        if path.is_file() and any(form in path.read_bytes() for form in forms)
    }


def test_workers_killed_in_the_middle_of_a_leaf(tmp_path: Path) -> None:
    with arena(tmp_path, 3) as ring:
        job = ring.submit(private_job())
        for step in (3, 8):
            ring.caught_at(job, step)
            lost = len(ring.events("WORKER_LOST"))
            ring.signal(ring.caught_with_shards(job))
            wait_until(lambda n=lost: len(ring.events("WORKER_LOST")) > n, "the death to be seen")
        ring.gate.release()
        check(ring, job, tmp_path / "alone")


def test_an_aggregator_and_a_leader_killed(tmp_path: Path, embedded_only: None) -> None:
    """Steps are computed again, in another process, by another leader: with the noise they had."""
    with arena(tmp_path, 2, state=tmp_path / "state") as ring:
        job = ring.submit(private_job())
        ring.caught_at(job, 12)
        ring.signal("aggregator-1")
        ring.signal("control-1")
        ring.gate.release()
        check(ring, job, tmp_path / "alone")
        assert ring.events("STEPS_REPLAYED")
        secret = secret_of(ring, job)
        assert files_with(secret, Path(ring.cluster.state_dir)) == {"storage"}
        assert not files_with(sampler_key(secret), Path(ring.cluster.state_dir))


def test_contributions_that_are_verified(tmp_path: Path) -> None:
    with arena(tmp_path, 3) as ring:
        job = ring.cluster.submit(private_job(verification={"replicas": 3}))
        check(ring, job, tmp_path / "alone")
