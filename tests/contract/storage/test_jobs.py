"""JobStore: terms, whole checkpoints or none, retention, the final manifest."""

import itertools
import random
import threading

import pytest

from phalanx.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from phalanx.testing.storage_messages import digest_of, part
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.checkpoints import manifest_checksum


def raise_term(backend, expected=0, job_id="job-1"):
    return backend.jobs.raise_term(pb.RaiseTermRequest(job_id=job_id, expected_term=expected))


def steps(backend, job_id="job-1"):
    return [(m.term, m.step, m.final) for m in backend.jobs.list_checkpoints(job_id)]


@pytest.fixture
def commit(backend, put):
    """Puts the blob of a part and registers it."""

    def commit_part(content=b"parameters", **fields):
        put(content)
        return backend.jobs.commit(part(content, **fields))

    return commit_part


def test_terms_rise_by_compare_and_set(harness):
    assert raise_term(harness.backend) == 1
    assert raise_term(harness.backend, 1) == 2
    for expected in (0, 1, 3):
        with pytest.raises(Aborted) as caught:
            raise_term(harness.backend, expected)
        assert caught.value.reason == "STALE_TERM"
        assert caught.value.details["term"] == "2"
    harness.reopen()
    assert harness.backend.jobs.get_row("job-1") == pb.GetJobRowResponse(term=2)


def test_a_job_without_a_row(backend, put):
    with pytest.raises(NotFound):
        backend.jobs.get_row("job-1")
    put(b"parameters")
    with pytest.raises(NotFound):
        backend.jobs.commit(part(b"parameters"))
    assert backend.jobs.list_checkpoints("job-1") == []


def test_the_last_part_completes_the_manifest(harness, put):
    backend = harness.backend
    raise_term(backend)
    contents = [b"range-%d" % index for index in range(4)]
    for content in contents:
        put(content)
    for index in (2, 0, 3):
        answer = backend.jobs.commit(part(contents[index], index=index, ranges=4))
        assert not answer.complete
        assert not answer.HasField("manifest")
        assert backend.jobs.list_checkpoints("job-1") == []
    harness.reopen()
    answer = harness.backend.jobs.commit(part(contents[1], index=1, ranges=4))
    assert answer.complete
    manifest = answer.manifest
    assert [p.digest for p in manifest.parts] == [digest_of(content) for content in contents]
    assert manifest.root_state == '{"step": 10}'
    assert manifest.create_unix_nanos == harness.now_unix_nanos
    assert manifest.manifest_sha256 == manifest_checksum(manifest)
    harness.reopen()
    assert harness.backend.jobs.list_checkpoints("job-1") == [manifest]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[::2])
def test_every_order_gives_the_same_manifest(backend, commit, order):
    raise_term(backend)
    for index in order:
        answer = commit(b"%d" % index, index=index, ranges=3)
    assert [p.range for p in answer.manifest.parts] == [0, 1, 2]
    assert answer.manifest.root_state


def test_registering_again_changes_nothing(backend, commit):
    raise_term(backend)
    first = commit(b"0", index=0, ranges=2)
    assert commit(b"0", index=0, ranges=2) == first
    whole = commit(b"1", index=1, ranges=2)
    assert whole.complete
    for index in (0, 1):
        assert commit(b"%d" % index, index=index, ranges=2) == whole
    assert steps(backend) == [(1, 10, False)]


def test_concurrent_last_parts_complete_once(backend, put):
    raise_term(backend)
    contents = [b"part-%d" % index for index in range(8)]
    for content in contents:
        put(content)
    answers = []
    start = threading.Barrier(8)

    def register(index):
        start.wait()
        answers.append(backend.jobs.commit(part(contents[index], index=index, ranges=8)))

    threads = [threading.Thread(target=register, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.complete for answer in answers].count(True) == 1
    assert steps(backend) == [(1, 10, False)]


def test_other_content_for_a_part_is_refused(backend, commit):
    raise_term(backend)
    commit(b"one", ranges=2)
    with pytest.raises(AlreadyExists) as caught:
        commit(b"two", ranges=2)
    assert caught.value.reason == "PART_CONFLICT"


@pytest.mark.parametrize("field", ["range_count", "spec_sha256"])
def test_parts_that_do_not_agree_are_refused(backend, put, field):
    raise_term(backend)
    put(b"0")
    put(b"1")
    backend.jobs.commit(part(b"0", index=0, ranges=2))
    request = part(b"1", index=1, ranges=2)
    setattr(request, field, 3 if field == "range_count" else "cd" * 32)
    with pytest.raises(FailedPrecondition) as caught:
        backend.jobs.commit(request)
    assert caught.value.details == {"field": field}
    assert steps(backend) == []


@pytest.mark.parametrize("offsets", [(0, 1), (1, 0)])
def test_all_parts_hold_the_best_version_beside_their_own_or_none(backend, put, offsets):
    raise_term(backend)
    content = b"parameters"
    put(content)
    requests = [part(content, index=index, ranges=2) for index in (0, 1)]
    for request, offset in zip(requests, offsets, strict=True):
        request.part.parameters_length, request.part.best_offset = 5, offset
    assert not backend.jobs.commit(requests[0]).complete
    with pytest.raises(FailedPrecondition) as caught:
        backend.jobs.commit(requests[1])
    assert caught.value.reason == "CHECKPOINT_MISMATCH"
    assert caught.value.details == {"field": "part.best_offset"}
    assert steps(backend) == []
    requests[1].part.best_offset = requests[0].part.best_offset
    complete = backend.jobs.commit(requests[1])
    assert complete.complete
    assert [each.best_offset for each in complete.manifest.parts] == [offsets[0]] * 2


def test_ranges_must_cover_the_vector(backend, put):
    raise_term(backend)
    put(b"0")
    put(b"1")
    backend.jobs.commit(part(b"0", index=0, ranges=2))
    request = part(b"1", index=1, ranges=2)
    request.part.first_element = 11
    with pytest.raises(FailedPrecondition, match="at element 11"):
        backend.jobs.commit(request)
    assert steps(backend) == []


def test_a_part_whose_blob_is_missing_is_refused(backend, put):
    raise_term(backend)
    with pytest.raises(FailedPrecondition) as caught:
        backend.jobs.commit(part(b"never put"))
    assert caught.value.reason == "BLOB_MISSING"
    request = part(b"content")
    put(b"content")
    request.part.size_bytes += 1
    with pytest.raises(FailedPrecondition, match="7 bytes, not 8"):
        backend.jobs.commit(request)


def test_a_part_that_vanished_keeps_the_manifest_from_completing(backend, put):
    raise_term(backend)
    put(b"0")
    put(b"1")
    backend.jobs.commit(part(b"0", index=0, ranges=2))
    backend.blobs.remove_if_old(digest_of(b"0"), 0)
    with pytest.raises(FailedPrecondition, match="of part 0"):
        backend.jobs.commit(part(b"1", index=1, ranges=2))
    assert steps(backend) == []
    put(b"0")
    assert backend.jobs.commit(part(b"1", index=1, ranges=2)).complete


@pytest.mark.parametrize("term", [1, 3])
def test_another_term_is_refused(backend, commit, term):
    raise_term(backend)
    raise_term(backend, 1)
    with pytest.raises(Aborted) as caught:
        commit(term=term)
    assert caught.value.reason == "STALE_TERM"
    assert caught.value.details["term"] == "2"


def test_raising_the_term_drops_unfinished_checkpoints(backend, commit):
    raise_term(backend)
    commit(b"0", index=0, ranges=2)
    assert backend.references.unreferenced([digest_of(b"0")]) == []
    raise_term(backend, 1)
    assert backend.references.unreferenced([digest_of(b"0")]) == [digest_of(b"0")]
    with pytest.raises(Aborted):
        commit(b"1", index=1, ranges=2)
    answer = commit(b"1", term=2, index=1, ranges=2)
    assert not answer.complete, "a part of the old term was counted"
    assert commit(b"0", term=2, index=0, ranges=2).complete


def test_retention_keeps_the_newest(backend, commit):
    raise_term(backend)
    for step in (10, 20, 30, 40):
        commit(b"%d" % step, step=step, keep=2)
    assert steps(backend) == [(1, 40, False), (1, 30, False)]
    raise_term(backend, 1)
    commit(b"later term", term=2, step=20, keep=2)
    assert steps(backend) == [(2, 20, False), (1, 40, False)]


def test_three_are_kept_by_default(backend, commit):
    raise_term(backend)
    for step in range(1, 6):
        commit(b"%d" % step, step=step)
    assert [step for _, step, _ in steps(backend)] == [5, 4, 3]


def test_parts_of_a_step_before_the_newest_checkpoint_are_not_needed(backend, commit):
    raise_term(backend)
    commit(b"old", step=10, index=0, ranges=2)
    commit(b"new", step=20, index=0, ranges=1)
    with pytest.raises(Aborted) as caught:
        commit(b"late", step=10, index=1, ranges=2)
    assert caught.value.reason == "SUPERSEDED"
    assert steps(backend) == [(1, 20, False)]


def test_the_final_manifest_is_success(harness, put):
    backend = harness.backend
    raise_term(backend)
    put(b"parameters")
    final = backend.jobs.commit(part(b"parameters", final=True)).manifest
    assert final.final
    harness.reopen()
    backend = harness.backend
    assert backend.jobs.get_row("job-1") == pb.GetJobRowResponse(term=1, final_checkpoint=final)
    with pytest.raises(FailedPrecondition) as caught:
        raise_term(backend, 1)
    assert caught.value.reason == "FINAL_CHECKPOINT"
    for fields in ({"step": 20}, {"step": 20, "final": True}, {"step": 10, "final": False}):
        with pytest.raises(FailedPrecondition) as caught:
            backend.jobs.commit(part(b"parameters", **fields))
        assert caught.value.reason == "FINAL_CHECKPOINT"
    assert backend.jobs.commit(part(b"parameters", final=True)).manifest == final


def test_an_ordinary_and_a_final_checkpoint_of_one_step(backend, commit):
    raise_term(backend)
    commit(b"same", step=10)
    commit(b"same", step=10, final=True, keep=1)
    assert steps(backend) == [(1, 10, True)]


def test_either_the_final_manifest_or_the_next_term(backend, put):
    put(b"parameters")
    outcomes = set()
    for number in range(20):
        job_id = f"job-{number}"
        raise_term(backend, 0, job_id)
        start = threading.Barrier(2)
        results = {}

        def finish(job_id=job_id, start=start, results=results):
            start.wait()
            try:
                backend.jobs.commit(part(b"parameters", job_id=job_id, final=True))
                results["final"] = True
            except Aborted:
                results["final"] = False

        def cancel(job_id=job_id, start=start, results=results):
            start.wait()
            try:
                raise_term(backend, 1, job_id)
                results["raised"] = True
            except FailedPrecondition:
                results["raised"] = False

        threads = [threading.Thread(target=finish), threading.Thread(target=cancel)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results["final"] != results["raised"]
        row = backend.jobs.get_row(job_id)
        assert row.HasField("final_checkpoint") == results["final"]
        outcomes.add(results["final"])
    assert outcomes


def test_deleting_a_job_removes_everything_of_it(backend, commit):
    raise_term(backend)
    raise_term(backend, 0, "job-2")
    commit(b"1")
    commit(b"2", job_id="job-2")
    backend.jobs.delete_row(pb.DeleteJobRowRequest(job_id="job-1"))
    backend.jobs.delete_row(pb.DeleteJobRowRequest(job_id="job-1"))
    with pytest.raises(NotFound):
        backend.jobs.get_row("job-1")
    assert steps(backend) == []
    assert steps(backend, "job-2") == [(1, 10, False)]
    assert raise_term(backend) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("term", 0),
        ("step", -1),
        ("keep", -1),
        ("range_count", 0),
        ("range_count", 10**6),
        ("part.range", 1),
        ("part.range", -1),
        ("part.first_element", -1),
        ("part.element_count", 0),
        ("part.size_bytes", -1),
        ("part.parameters_offset", -1),
        ("part.parameters_length", 100),
        ("part.best_offset", -1),
        ("part.best_offset", 1),
        ("part.digest", "abc"),
        ("job_id", "../job"),
        ("root_state", "x" * 2_000_000),
    ],
)
def test_wrong_requests_name_the_field(backend, put, field, value):
    raise_term(backend)
    put(b"parameters")
    request = part(b"parameters")
    holder, _, name = field.rpartition(".")
    setattr(getattr(request, holder) if holder else request, name, value)
    with pytest.raises(InvalidArgument) as caught:
        backend.jobs.commit(request)
    assert caught.value.violations[0].field == field


def test_random_histories_keep_the_promises(backend, put):
    """Whatever comes in whatever order: whole checkpoints only, rising terms, one final."""
    generator = random.Random(11)
    for content in (b"0", b"1", b"2"):
        put(content)
    accepted = 0
    for number in range(12):
        job_id = f"random-{number}"
        term, finals = raise_term(backend, 0, job_id), 0
        for _ in range(40):
            if generator.random() < 0.1:
                try:
                    term = raise_term(backend, term, job_id)
                except FailedPrecondition:
                    assert finals == 1
                continue
            index = generator.randrange(3)
            request = part(
                b"%d" % index,
                job_id=job_id,
                term=max(1, term - generator.choice((0, 0, 0, 1))),
                step=generator.randrange(1, 5),
                index=index,
                ranges=3,
                final=generator.random() < 0.15,
                keep=generator.randrange(3),
            )
            try:
                answer = backend.jobs.commit(request)
            except (Aborted, FailedPrecondition):
                continue
            accepted += 1
            assert request.term == term
            if answer.complete:
                assert [p.range for p in answer.manifest.parts] == [0, 1, 2]
                finals = max(finals, int(answer.manifest.final))
            found = steps(backend, job_id)
            assert found == sorted(found, reverse=True)
            assert sum(final for _, _, final in found) == finals
    assert accepted > 50
