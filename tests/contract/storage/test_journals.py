"""JournalStore: compare-and-append, fences, order, truncation, durability."""

import random
import threading

import pytest

from phalanx.errors import Aborted, InvalidArgument
from phalanx.testing.storage_messages import acquire, append, read
from phalanx.v1 import storage_service_pb2 as pb


def records_of(backend, request):
    return [
        (record.sequence, record.payload)
        for response in backend.journals.read(request)
        for record in response.records
    ]


def test_records_come_back_in_order_with_gapless_sequences(backend):
    assert backend.journals.append(append("control", b"a", b"b", expected=0)) == 2
    assert backend.journals.append(append("control", b"", expected=2)) == 3
    assert backend.journals.append(append("control", b"d")) == 4
    expected = [(0, b"a"), (1, b"b"), (2, b""), (3, b"d")]
    assert records_of(backend, read("control")) == expected
    assert records_of(backend, read("control", 2)) == expected[2:]
    assert records_of(backend, read("control", 1, 2)) == expected[1:3]


def test_streams_are_apart(backend):
    backend.journals.append(append("logs/job-1", b"a"))
    backend.journals.append(append("logs/job-2", b"b", expected=0))
    assert records_of(backend, read("logs/job-1")) == [(0, b"a")]


def test_records_survive_reopening(harness):
    harness.backend.journals.append(append("control", b"a", b"b"))
    harness.reopen()
    assert records_of(harness.backend, read("control")) == [(0, b"a"), (1, b"b")]
    assert harness.backend.journals.append(append("control", b"c", expected=2)) == 3


@pytest.mark.parametrize("expected", [0, 1, 3, 2**40])
def test_an_append_elsewhere_than_at_the_end_changes_nothing(backend, expected):
    backend.journals.append(append("control", b"a", b"b"))
    with pytest.raises(Aborted) as caught:
        backend.journals.append(append("control", b"x", expected=expected))
    assert caught.value.reason == "SEQUENCE_MISMATCH"
    assert caught.value.details == {"next_sequence": "2"}
    assert records_of(backend, read("control")) == [(0, b"a"), (1, b"b")]


def test_an_empty_append_only_compares(backend):
    backend.journals.append(append("control", b"a"))
    assert backend.journals.append(append("control", expected=1)) == 1
    with pytest.raises(Aborted):
        backend.journals.append(append("control", expected=0))


def test_reading_tells_the_end_even_without_records(backend):
    assert [r.next_sequence for r in backend.journals.read(read("control"))] == [0]
    backend.journals.append(append("control", b"a", b"b"))
    assert [r.next_sequence for r in backend.journals.read(read("control", 2**62))] == [2]
    assert [r.next_sequence for r in backend.journals.read(read("control", 2, 1))] == [2]


def test_a_long_stream_is_read_in_messages_that_fit(backend):
    generator = random.Random(5)
    sizes = [3_000_000, 10, 1_000_000, 2_000_000, *(generator.randrange(2000) for _ in range(9000))]
    payloads = [generator.randbytes(size) for size in sizes]
    for start in range(0, len(payloads), 1000):
        backend.journals.append(append("logs/job", *payloads[start : start + 1000]))
    responses = list(backend.journals.read(read("logs/job")))
    assert max(response.ByteSize() for response in responses) < 4 * 1024 * 1024 - 1024
    assert len(responses) > 3
    received = [record.payload for response in responses for record in response.records]
    assert received == payloads


def test_records_too_large_for_a_message_are_refused(backend):
    with pytest.raises(InvalidArgument, match="records\\[1\\]"):
        backend.journals.append(append("control", b"a", bytes(4 * 1024 * 1024)))
    assert records_of(backend, read("control")) == []


def test_truncation_drops_the_beginning_and_keeps_the_numbers(harness):
    backend = harness.backend
    backend.journals.append(append("control", *[b"%d" % i for i in range(10)]))
    backend.journals.truncate(pb.TruncateJournalRequest(stream="control", before_sequence=7))
    backend.journals.truncate(pb.TruncateJournalRequest(stream="control", before_sequence=3))
    assert records_of(backend, read("control")) == [(7, b"7"), (8, b"8"), (9, b"9")]
    backend.journals.truncate(pb.TruncateJournalRequest(stream="control", before_sequence=10))
    harness.reopen()
    assert records_of(harness.backend, read("control")) == []
    assert harness.backend.journals.append(append("control", b"new", expected=10)) == 11
    assert records_of(harness.backend, read("control", 3)) == [(10, b"new")]


def test_truncation_beyond_the_end_is_refused(backend):
    backend.journals.append(append("control", b"a"))
    with pytest.raises(InvalidArgument, match="beyond the end"):
        backend.journals.truncate(pb.TruncateJournalRequest(stream="control", before_sequence=2))
    assert records_of(backend, read("control")) == [(0, b"a")]


def test_truncation_while_reading_is_told(backend):
    for start in range(0, 5000, 1000):
        backend.journals.append(append("control", *[b"%d" % (start + i) for i in range(1000)]))
    responses = backend.journals.read(read("control"))
    next(responses)
    backend.journals.truncate(pb.TruncateJournalRequest(stream="control", before_sequence=4999))
    with pytest.raises(Aborted) as caught:
        list(responses)
    assert caught.value.reason == "JOURNAL_TRUNCATED"


def test_a_deleted_stream_begins_anew(backend):
    backend.journals.append(append("metrics/job", b"a", b"b"))
    backend.journals.append(append("metrics/other", b"kept"))
    backend.journals.delete(pb.DeleteJournalRequest(stream="metrics/job"))
    backend.journals.delete(pb.DeleteJournalRequest(stream="metrics/job"))
    assert records_of(backend, read("metrics/job")) == []
    assert backend.journals.append(append("metrics/job", b"c", expected=0)) == 1
    assert records_of(backend, read("metrics/other")) == [(0, b"kept")]


def fenced_writes(fence):
    return [
        lambda backend: backend.journals.append(append("control", b"x", fence=fence)),
        lambda backend: backend.journals.truncate(
            pb.TruncateJournalRequest(stream="control", before_sequence=1, fence=fence)
        ),
        lambda backend: backend.journals.delete(
            pb.DeleteJournalRequest(stream="control", fence=fence)
        ),
        lambda backend: backend.jobs.raise_term(
            pb.RaiseTermRequest(job_id="job-1", expected_term=1, fence=fence)
        ),
        lambda backend: backend.jobs.delete_row(
            pb.DeleteJobRowRequest(job_id="job-1", fence=fence)
        ),
        lambda backend: backend.catalog.set_pins(pb.SetPinsRequest(holder="job-1", fence=fence)),
    ]


@pytest.mark.parametrize("index", range(6))
def test_every_fenced_write_of_an_old_generation_is_refused(backend, index):
    backend.journals.append(append("control", b"a"))
    backend.jobs.raise_term(pb.RaiseTermRequest(job_id="job-1"))
    old = backend.leases.acquire(acquire("leader", "one")).lease
    new = backend.leases.acquire(acquire("leader", "two", (old.token, old.counter))).lease
    for token in (old.token, 0, new.token + 1):
        with pytest.raises(Aborted) as caught:
            fenced_writes(pb.Fence(lease="leader", token=token))[index](backend)
        assert caught.value.reason == "STALE_GENERATION"
        assert caught.value.details["token"] == str(new.token)
    assert records_of(backend, read("control")) == [(0, b"a")]
    assert backend.jobs.get_row("job-1").term == 1
    fenced_writes(pb.Fence(lease="leader", token=new.token))[index](backend)


def test_a_fence_on_a_lease_that_nobody_held_is_refused(backend):
    with pytest.raises(Aborted):
        backend.journals.append(append("control", b"x", fence=pb.Fence(lease="leader", token=1)))


def test_concurrent_compare_and_append_has_no_gap_and_no_double(backend):
    writers, rounds = 6, 40
    won: list[list[int]] = [[] for _ in range(writers)]
    refused = [0] * writers

    def compete(writer):
        sequence = 0
        while len(won[writer]) < rounds:
            try:
                request = append("control", b"%d:%d" % (writer, sequence), expected=sequence)
                after = backend.journals.append(request)
                won[writer].append(sequence)
                sequence = after
            except Aborted as error:
                refused[writer] += 1
                sequence = int(error.details["next_sequence"])

    threads = [threading.Thread(target=compete, args=(index,)) for index in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(refused) > 0, "nobody competed"
    expected = sorted((s, b"%d:%d" % (writer, s)) for writer in range(writers) for s in won[writer])
    assert [sequence for sequence, _ in expected] == list(range(writers * rounds))
    assert records_of(backend, read("control")) == expected


@pytest.mark.parametrize("bad", ["", "Control", "a/b/c/d", "../up", "a//b", "a/", "/a", "a/../b"])
def test_names_that_are_no_streams_are_refused(backend, bad):
    for use in (
        lambda: backend.journals.append(append(bad, b"x")),
        lambda: list(backend.journals.read(read(bad))),
        lambda: backend.journals.truncate(pb.TruncateJournalRequest(stream=bad)),
        lambda: backend.journals.delete(pb.DeleteJournalRequest(stream=bad)),
    ):
        with pytest.raises(InvalidArgument) as caught:
            use()
        assert caught.value.violations[0].field == "stream"


@pytest.mark.parametrize(
    ("use", "field"),
    [
        (lambda j: j.append(append("control", b"x", expected=-2)), "expected_sequence"),
        (lambda j: j.read(read("control", -1)), "from_sequence"),
        (lambda j: j.read(read("control", 0, -1)), "max_records"),
        (
            lambda j: j.truncate(pb.TruncateJournalRequest(stream="control", before_sequence=-1)),
            "before_sequence",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(backend, use, field):
    with pytest.raises(InvalidArgument) as caught:
        use(backend.journals)
    assert caught.value.violations[0].field == field
