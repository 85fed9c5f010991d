"""Who may register parts of checkpoints: the member whom control has told to own the range."""

import pytest

from phalanx.errors import Aborted, InvalidArgument, PermissionDenied
from phalanx.keys.caller import ANYBODY, Caller, Service
from phalanx.testing.storage_messages import part
from phalanx.v1 import storage_service_pb2 as pb

AGGREGATOR = Caller("aggregator", services=frozenset({Service.AGGREGATOR}))
WORKER = Caller("worker", services=frozenset({Service.WORKER}))


def named(member_id, service=Service.AGGREGATOR):
    return Caller(member_id, services=frozenset({service}), members=frozenset({member_id}))


@pytest.fixture
def commit(backend, put):
    def commit_part(caller, step=1, index=0, ranges=1, **fields):
        content = b"step %d part %d" % (step, index)
        put(content)
        request = part(content, step=step, index=index, ranges=ranges, **fields)
        return backend.jobs.commit(request, caller)

    return commit_part


def raise_term(backend, expected=0, tells_owners=True):
    request = pb.RaiseTermRequest(job_id="job-1", expected_term=expected, tells_owners=tells_owners)
    return backend.jobs.raise_term(request)


def tell(backend, *member_ids, term=1, workers=False):
    owners = pb.TermOwners(job_id="job-1", term=term, workers=workers, member_ids=member_ids)
    backend.journals.append(
        pb.AppendJournalRequest(
            stream="control", expected_sequence=-1, records=[b"term started"], owners=[owners]
        )
    )


def refused(commit, caller, **fields):
    with pytest.raises(PermissionDenied) as caught:
        commit(caller, **fields)
    assert caught.value.reason == "NOT_YOURS"
    assert [each.field for each in caught.value.violations] == ["part.range"]
    return caught.value.message


def test_a_part_comes_from_the_owner_of_its_range(harness, backend, commit):
    raise_term(backend)
    tell(backend, "a-1", "a-2")
    text = refused(commit, named("a-1"), index=1, ranges=2)
    assert text == "range 1 of job 'job-1' in term 1 was given to the aggregator a-2, not to a-1"
    refused(commit, named("a-3"), index=0, ranges=2)
    # It is not the name alone: a worker may have that of an aggregator.
    refused(commit, named("a-1", Service.WORKER), index=0, ranges=2)
    refused(commit, WORKER, index=0, ranges=2)
    assert backend.jobs.list_checkpoints("job-1") == []
    assert not commit(named("a-1"), index=0, ranges=2).complete
    assert commit(named("a-2"), index=1, ranges=2).complete
    harness.reopen()
    with pytest.raises(PermissionDenied):
        harness.backend.jobs.commit(part(b"step 2 part 0", step=2), named("a-2"))


def test_a_certificate_of_a_whole_kind_owns_what_any_of_it_owns(backend, commit):
    raise_term(backend)
    tell(backend, "a-1")
    refused(commit, WORKER)
    assert commit(AGGREGATOR).complete


def test_with_all_reduce_it_is_the_root_that_registers(backend, commit):
    raise_term(backend)
    tell(backend, "w-1", "w-2", workers=True)
    refused(commit, named("w-2", Service.WORKER))
    refused(commit, AGGREGATOR)
    refused(commit, named("w-1", Service.AGGREGATOR))
    assert commit(named("w-1", Service.WORKER)).complete


def test_a_range_that_nobody_owns_is_nobodys(backend, commit):
    raise_term(backend)
    tell(backend, "a-1")
    text = refused(commit, AGGREGATOR, index=1, ranges=2)
    assert "was given to nobody yet" in text


def test_before_control_tells_who_owns_a_term_nobody_does(backend, commit):
    raise_term(backend)
    refused(commit, AGGREGATOR)
    tell(backend, "a-1")
    assert commit(named("a-1")).complete
    raise_term(backend, 1)
    refused(commit, named("a-1"), term=2, step=2)
    # Who still works in the term before is told that it is over, and not that it was never his.
    with pytest.raises(Aborted) as caught:
        commit(named("a-1"), step=2)
    assert caught.value.reason == "STALE_TERM"


def test_control_that_tells_no_owners_leaves_it_to_any_of_the_members(backend, commit):
    """That of the version before, which may lead again in the middle of an upgrade."""
    raise_term(backend, tells_owners=False)
    assert commit(named("a-9")).complete
    raise_term(backend, 1)
    tell(backend, "a-1", term=2)
    raise_term(backend, 2, tells_owners=False)
    assert commit(named("a-9"), term=3, step=2).complete


def test_owners_of_another_term_are_none(backend, commit):
    raise_term(backend)
    tell(backend, "a-1")
    raise_term(backend, 1)
    tell(backend, "a-9", term=1)
    tell(backend, "a-9", term=3)
    refused(commit, named("a-9"), term=2)
    tell(backend, "a-2", term=2)
    assert commit(named("a-2"), term=2).complete


def test_owners_are_told_with_the_records_or_not_at_all(backend, commit):
    raise_term(backend)
    owners = pb.TermOwners(job_id="job-1", term=1, member_ids=["a-1"])
    append = pb.AppendJournalRequest(
        stream="control", expected_sequence=7, records=[b"term started"], owners=[owners]
    )
    with pytest.raises(Aborted):
        backend.journals.append(append)
    refused(commit, named("a-1"))
    append.fence.CopyFrom(pb.Fence(lease="leader", token=5))
    append.expected_sequence = 0
    with pytest.raises(Aborted):
        backend.journals.append(append)
    refused(commit, named("a-1"))


@pytest.mark.parametrize("wrong", [{"job_id": "../x"}, {"term": 0}, {"member_ids": ["a"] * 65537}])
def test_owners_that_cannot_be_are_refused(backend, wrong):
    owners = pb.TermOwners(**{"job_id": "job-1", "term": 1, "member_ids": ["a-1"], **wrong})
    append = pb.AppendJournalRequest(stream="control", expected_sequence=-1, owners=[owners])
    with pytest.raises(InvalidArgument):
        backend.journals.append(append)


def test_where_nobody_proves_anything_any_may_register(backend, commit):
    raise_term(backend)
    assert commit(ANYBODY).complete
    tell(backend, "a-1")
    assert commit(ANYBODY, step=2).complete


def test_a_deleted_job_leaves_no_owners(backend, commit):
    raise_term(backend)
    tell(backend, "a-1")
    backend.jobs.delete_row(pb.DeleteJobRowRequest(job_id="job-1"))
    raise_term(backend, tells_owners=False)
    assert commit(named("a-9")).complete


def test_results_of_tasks_are_those_of_the_owner(backend):
    def refuses(caller, field="stream"):
        try:
            backend.jobs.check_root("job-1", caller, field)
        except PermissionDenied as error:
            return [each.field for each in error.violations]
        return []

    assert not refuses(named("a-1"))
    raise_term(backend)
    # Nobody is told of a term before its owners are; whoever had the one before may still write.
    assert not refuses(named("a-9"))
    tell(backend, "a-1")
    assert not refuses(named("a-1"))
    assert not refuses(AGGREGATOR)
    assert refuses(named("a-9")) == ["stream"]
    assert refuses(named("a-9"), "holder") == ["holder"]
    raise_term(backend, 1, tells_owners=False)
    assert not refuses(named("a-9"))
