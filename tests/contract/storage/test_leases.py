"""LeaseStore: take-over by local time, fencing tokens."""

import threading

import pytest

from phalanx.errors import Aborted, InvalidArgument, NotFound
from phalanx.testing.storage_messages import acquire
from phalanx.v1 import storage_service_pb2 as pb


def renew(backend, lease):
    return backend.leases.renew(
        pb.RenewLeaseRequest(name=lease.name, holder=lease.holder, token=lease.token)
    )


def release(backend, lease):
    backend.leases.release(
        pb.ReleaseLeaseRequest(name=lease.name, holder=lease.holder, token=lease.token)
    )


def test_a_free_lease_is_taken_and_survives_reopening(harness):
    assert harness.backend.leases.get("leader") is None
    answer = harness.backend.leases.acquire(acquire("leader", "one"))
    assert answer.acquired
    assert (answer.lease.holder, answer.lease.token, answer.lease.counter) == ("one", 1, 1)
    assert not answer.lost_holder
    harness.reopen()
    row = harness.backend.leases.get("leader")
    assert (row.holder, row.token, row.counter) == ("one", 1, 1)


def test_a_held_lease_is_not_taken_without_watching_it(backend):
    held = backend.leases.acquire(acquire("leader", "one")).lease
    answer = backend.leases.acquire(acquire("leader", "two"))
    assert not answer.acquired
    assert answer.lease == held


def test_a_lease_that_stood_still_is_taken_over(backend):
    held = backend.leases.acquire(acquire("leader", "one")).lease
    answer = backend.leases.acquire(acquire("leader", "two", (held.token, held.counter)))
    assert answer.acquired
    assert (answer.lease.holder, answer.lease.token) == ("two", held.token + 1)
    assert answer.lost_holder == "one"
    with pytest.raises(Aborted) as caught:
        renew(backend, held)
    assert caught.value.reason == "STALE_GENERATION"
    assert caught.value.details["holder"] == "two"


def test_a_renewal_in_time_defeats_the_challenger(backend):
    held = backend.leases.acquire(acquire("leader", "one")).lease
    renewed = renew(backend, held)
    assert (renewed.token, renewed.counter) == (held.token, held.counter + 1)
    answer = backend.leases.acquire(acquire("leader", "two", (held.token, held.counter)))
    assert not answer.acquired
    assert answer.lease.counter == renewed.counter


def test_a_restarted_holder_fences_its_former_self(backend):
    before = backend.leases.acquire(acquire("leader", "one")).lease
    after = backend.leases.acquire(acquire("leader", "one"))
    assert after.acquired
    assert after.lease.token > before.token
    with pytest.raises(Aborted):
        renew(backend, before)


def test_a_released_lease_is_free_and_its_token_never_comes_again(backend):
    held = backend.leases.acquire(acquire("leader", "one")).lease
    release(backend, held)
    release(backend, held)
    with pytest.raises(Aborted):
        renew(backend, held)
    answer = backend.leases.acquire(acquire("leader", "two"))
    assert answer.acquired
    assert answer.lease.token == held.token + 1


def test_a_late_release_takes_nothing_from_the_next_holder(backend):
    old = backend.leases.acquire(acquire("leader", "one")).lease
    new = backend.leases.acquire(acquire("leader", "two", (old.token, old.counter))).lease
    release(backend, old)
    assert backend.leases.get("leader").holder == "two"
    assert renew(backend, new).counter == new.counter + 1


def test_one_of_many_challengers_wins(backend):
    held = backend.leases.acquire(acquire("leader", "one")).lease
    answers = []
    start = threading.Barrier(8)

    def challenge(index):
        start.wait()
        request = acquire("leader", f"challenger-{index}", (held.token, held.counter))
        answers.append(backend.leases.acquire(request))

    threads = [threading.Thread(target=challenge, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.acquired for answer in answers].count(True) == 1
    assert {answer.lease.token for answer in answers} == {held.token + 1}


def test_leases_are_apart(backend):
    backend.leases.acquire(acquire("leader", "one"))
    assert backend.leases.acquire(acquire("other/lease", "two")).acquired


def test_renewing_what_was_never_held_is_not_found(backend):
    with pytest.raises(NotFound):
        renew(backend, pb.Lease(name="leader", holder="one", token=1))


@pytest.mark.parametrize(
    ("name", "holder", "seen"),
    [
        ("../x", "one", (0, 0)),
        ("leader", "", (0, 0)),
        ("leader", "a b", (0, 0)),
        ("l", "o", (-1, 0)),
    ],
)
def test_wrong_requests_are_refused(backend, name, holder, seen):
    with pytest.raises(InvalidArgument):
        backend.leases.acquire(acquire(name, holder, seen))


def test_who_lost_a_lease_is_told_unless_it_was_released(backend):
    held = backend.leases.acquire(acquire("leader", "one")).lease
    release(backend, held)
    assert not backend.leases.acquire(acquire("leader", "two")).lost_holder
    # A process that was started again takes the place of the one that died.
    assert backend.leases.acquire(acquire("leader", "two")).lost_holder == "two"
    assert not backend.leases.acquire(acquire("leader", "one")).lost_holder


def test_a_grant_whose_answer_got_lost_is_told_again(harness):
    request = acquire("leader", "one")
    request.request_id = "first"
    first = harness.backend.leases.acquire(request)
    harness.reopen()
    leases = harness.backend.leases
    again = leases.acquire(request)
    assert again == first
    assert not again.lost_holder
    fenced = leases.acquire(acquire("leader", "one"))
    assert (fenced.lease.token, fenced.lost_holder) == (first.lease.token + 1, "one")
    assert leases.acquire(request).lease.token == fenced.lease.token + 1, "that grant is over"


def test_a_refusal_is_not_remembered(backend):
    held = backend.leases.acquire(acquire("leader", "one")).lease
    request = acquire("leader", "two")
    request.request_id = "first"
    assert not backend.leases.acquire(request).acquired
    release = pb.ReleaseLeaseRequest(name="leader", holder="one", token=held.token)
    backend.leases.release(release)
    assert backend.leases.acquire(request).acquired
