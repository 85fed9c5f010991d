"""ReferenceStore: what is named is spared, and nothing can be named while it is swept."""

import threading

import pytest

from phalanx.errors import FailedPrecondition
from phalanx.testing.storage_messages import append, digest_of, model, part
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import model_service_pb2 as model_pb
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.catalog import parse_name
from storage.service.collection import collect_garbage


def blobs(backend):
    return {blob.digest for blob in backend.blobs.scan()}


def test_nothing_names_a_fresh_blob(backend, put):
    digest = put(b"content")
    assert backend.references.unreferenced([digest]) == [digest]
    answer = collect_garbage(backend, grace_s=0, dry_run=True)
    assert (answer.blobs_removed, answer.bytes_removed, answer.blobs_kept) == (1, 7, 0)
    assert blobs(backend) == {digest}
    assert collect_garbage(backend, grace_s=0, dry_run=False) == answer
    assert blobs(backend) == set()


def test_young_blobs_are_spared(backend, put):
    digest = put(b"content")
    answer = collect_garbage(backend, grace_s=3600, dry_run=False)
    assert (answer.blobs_removed, answer.blobs_kept) == (0, 1)
    assert blobs(backend) == {digest}


def test_pins_are_found_by_the_beginning_of_their_holders_names(backend, put):
    one, two, other = (put(content) for content in (b"1", b"2", b"3"))
    for holder, digests in (("code.a", [one]), ("code.b", [one, two]), ("codes", [other])):
        pins = [pb.Pin(blob=digest) for digest in digests]
        backend.catalog.set_pins(pb.SetPinsRequest(holder=holder, pins=pins))
    assert list(backend.references.pinned_by("code.")) == sorted([one, two])
    assert list(backend.references.pinned_by("job-1")) == []


def test_everything_that_is_named_is_spared_until_it_is_named_no_more(harness, put):
    backend = harness.backend
    chunk, manifest, weights, code, text = (put(b"%d" % number) for number in range(5))
    first, second, pending = (put(b"step %d" % number) for number in range(3))
    garbage = put(b"garbage")
    backend.catalog.create_dataset(
        dataset_pb.CreateDatasetRequest(name="adult", manifest_digest=manifest),
        dataset_pb.Dataset(manifest_digest=manifest),
        [chunk],
    )
    backend.catalog.create_model(model_pb.CreateModelRequest(model=model("m", weights=b"2")))
    backend.catalog.set_pins(pb.SetPinsRequest(holder="job-1", pins=[pb.Pin(blob=code)]))
    record = pb.BlobSlice(digest=text, offset=50).SerializeToString()
    backend.journals.append(append("control", b"first", record, b'{"x": "y"}'))
    backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1"))
    backend.jobs.commit(part(b"step 0", step=1, keep=1))
    backend.jobs.commit(part(b"step 2", step=2, index=0, ranges=2))
    named = {chunk, manifest, weights, code, text, first, pending}

    def collect():
        harness.reopen()
        return collect_garbage(harness.backend, grace_s=0, dry_run=False).blobs_removed

    assert collect() == 2
    assert blobs(harness.backend) == named
    assert garbage not in named
    assert second not in named

    backend = harness.backend
    put(b"step 1")
    backend.jobs.commit(part(b"step 1", step=3, keep=1))
    assert collect() == 2, "the checkpoint beyond keep and the superseded part"
    harness.backend.catalog.delete_dataset(
        dataset_pb.DeleteDatasetRequest(name="adult"), parse_name("", "adult")
    )
    assert collect() == 2
    harness.backend.catalog.delete_model(model_pb.DeleteModelRequest(name="m"), parse_name("", "m"))
    assert collect() == 1
    harness.backend.journals.truncate(
        pb.TruncateJournalRequest(stream="control", before_sequence=1)
    )
    assert collect() == 0, "record 1 is still there"
    harness.backend.journals.truncate(
        pb.TruncateJournalRequest(stream="control", before_sequence=2)
    )
    assert collect() == 1
    harness.backend.jobs.delete_row(pb.DeleteJobRowRequest(job_id="job-1"))
    assert collect() == 2, "the checkpoint and the pinned code"
    assert blobs(harness.backend) == set()


def test_a_deleted_journal_names_nothing(harness, put):
    digest = put(b"content")
    harness.backend.journals.append(append("logs/job", digest.encode()))
    assert collect_garbage(harness.backend, 0, False).blobs_removed == 0
    harness.backend.journals.delete(pb.DeleteJournalRequest(stream="logs/job"))
    assert collect_garbage(harness.backend, 0, False).blobs_removed == 1


def test_a_refused_registration_names_nothing(backend, put):
    digest = put(b"content")
    backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1"))
    request = part(b"content")
    request.part.size_bytes += 1
    with pytest.raises(FailedPrecondition):
        backend.jobs.commit(request)
    assert backend.references.unreferenced([digest]) == [digest]


def test_a_checkpoint_committed_during_a_sweep_is_whole_or_refused(backend, put):
    """Registration and sweep exclude each other: no manifest ever names a blob that is gone."""
    outcomes = set()
    for number in range(30):
        job_id = f"job-{number}"
        content = b"parameters of %d" % number
        digest = put(content)
        backend.jobs.raise_term(pb.RaiseTermRequest(job_id=job_id))
        start = threading.Barrier(2)

        def sweep(start=start):
            start.wait()
            collect_garbage(backend, grace_s=0, dry_run=False)

        sweeper = threading.Thread(target=sweep)
        sweeper.start()
        start.wait()
        try:
            backend.jobs.commit(part(content, job_id=job_id))
            committed = True
        except FailedPrecondition:
            committed = False
        sweeper.join()
        assert (digest in backend.blobs.sizes([digest])) == committed
        outcomes.add(committed)
    assert outcomes


def test_touched_blobs_are_young_again(backend, put):
    """A client that asked "is it stored?" may rely on the answer for the grace time."""
    digest = put(b"content")
    assert collect_garbage(backend, 0, True).blobs_removed == 1
    assert backend.blobs.touch([digest]) == {digest: 7}
    assert collect_garbage(backend, 3600, False).blobs_removed == 0
    assert digest_of(b"content") in blobs(backend)


def test_many_short_jobs_leave_the_disk_flat(harness, put):
    """Jobs come, log, checkpoint, finish and are deleted; nothing is left of them."""
    backend = harness.backend

    def one_job(number):
        job_id = f"job-{number}"
        content = b"%d" % number * 5000
        put(content)
        backend.journals.append(append(f"logs/{job_id}", *[b"line" * 25] * 100))
        backend.journals.append(append("control", b"fact" * 50))
        backend.jobs.raise_term(pb.RaiseTermRequest(job_id=job_id))
        backend.jobs.commit(part(content, job_id=job_id, final=True))
        backend.journals.delete(pb.DeleteJournalRequest(stream=f"logs/{job_id}"))
        backend.jobs.delete_row(pb.DeleteJobRowRequest(job_id=job_id))

    def usage_after(first, last):
        for number in range(first, last):
            one_job(number)
        end = pb.TruncateJournalRequest(stream="control", before_sequence=last)
        backend.journals.truncate(end)
        collect_garbage(backend, grace_s=0, dry_run=False)
        harness.tidy()
        return backend.references.usage_bytes(), backend.blobs.usage_bytes()

    first = usage_after(0, 50)
    assert usage_after(50, 250) == first
    assert first[1] == 0
