"""Pins: who needs which data sets, models and blobs, and who did until it ended."""

import pytest

from phalanx.errors import FailedPrecondition, InvalidArgument, NotFound
from phalanx.testing.storage_messages import digest_of
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.sql.rows import Table
from storage.core.catalog import parse_name
from tests.contract.storage.pinning import delete, end, pins


def test_what_is_pinned_cannot_be_deleted(harness, add):
    backend = harness.backend
    add(content=b"a")
    add(content=b"b")
    backend.catalog.set_pins(pins("job-1", ("adult", 1)))
    harness.reopen()
    backend = harness.backend
    for name in ("adult@1", "adult"):
        with pytest.raises(FailedPrecondition) as caught:
            delete(backend, name)
        assert caught.value.reason == "IN_USE"
        assert "job-1" in caught.value.message
    delete(backend, "adult@2")
    backend.catalog.set_pins(pins("job-2", ("adult", 1)))
    backend.catalog.set_pins(pins("job-1"))
    with pytest.raises(FailedPrecondition, match="job-2"):
        delete(backend, "adult")
    backend.jobs.delete_row(pb.DeleteJobRowRequest(job_id="job-2"))
    delete(backend, "adult")


def test_what_ended_holders_have_used_goes_by_force_only(harness, add, put):
    backend = harness.backend
    add(content=b"a")
    put(b"code")
    for holder in ("job-1", "job-2"):
        backend.catalog.set_pins(pins(holder, ("adult", 1), blobs=[digest_of(b"code")]))
    end(backend, "job-1")
    for force in (False, True):
        with pytest.raises(FailedPrecondition, match="in use by job-2;") as caught:
            delete(backend, "adult", force=force)
        assert caught.value.reason == "IN_USE"
    end(backend, "job-2")
    end(backend, "job-2")
    harness.reopen()
    backend = harness.backend
    assert backend.references.unreferenced([digest_of(b"code")]) == [digest_of(b"code")]
    with pytest.raises(FailedPrecondition, match=r"used by job-1, job-2: .*--force") as caught:
        delete(backend, "adult@1")
    assert caught.value.reason == "REFERENCED"
    assert caught.value.details == {"holders": "job-1,job-2"}
    delete(backend, "adult@1", force=True)
    with pytest.raises(NotFound):
        backend.catalog.get_dataset(parse_name("", "adult"))
    # What they refer to may be gone.
    end(backend, "job-1")
    backend.jobs.delete_row(pb.DeleteJobRowRequest(job_id="job-1"))


def test_deleting_what_has_ended_lets_its_data_go(backend, add):
    add()
    backend.catalog.set_pins(pins("job-1", ("adult", 1)))
    end(backend, "job-1")
    backend.jobs.delete_row(pb.DeleteJobRowRequest(job_id="job-1"))
    # Said once more by somebody who did not know.
    end(backend, "job-1")
    delete(backend, "adult")


def test_a_holder_that_ended_may_need_something_again(backend, add):
    add()
    backend.catalog.set_pins(pins("job-1", ("adult", 1)))
    end(backend, "job-1")
    assert backend.catalog.pin_holders("", 9) == []
    backend.catalog.set_pins(pins("job-1", ("adult", 1)))
    assert backend.catalog.pin_holders("", 9) == ["job-1"]
    with pytest.raises(FailedPrecondition, match="in use"):
        delete(backend, "adult", force=True)


def test_a_holder_that_has_ended_pins_nothing_new(backend, add):
    add()
    wrong = pb.SetPinsRequest(holder="job-1", ended=True, pins=pins("x", ("adult", 1)).pins)
    with pytest.raises(InvalidArgument, match="pins"):
        backend.catalog.set_pins(wrong)


def test_pins_replace_those_before_or_change_nothing(backend, add):
    add("a")
    add("b")
    backend.catalog.set_pins(pins("job-1", ("a", 1)))
    for bad in (pins("job-1", ("b", 1), ("gone", 1)), pins("job-1", blobs=[digest_of(b"gone")])):
        with pytest.raises(NotFound):
            backend.catalog.set_pins(bad)
    with pytest.raises(FailedPrecondition):
        delete(backend, "a")
    backend.catalog.set_pins(pins("job-1", ("b", 1)))
    delete(backend, "a")
    with pytest.raises(FailedPrecondition):
        delete(backend, "b")


def test_holders_of_pins_come_in_order_a_page_at_a_time(harness, add, put):
    backend = harness.backend
    add("a")
    for holder in ("job-3", "job-1"):
        backend.catalog.set_pins(pins(holder, ("a", 1)))
    backend.catalog.set_pins(pins("job-2", blobs=[put(b"code")]))
    backend.catalog.set_pins(pins("job-1", ("a", 1), blobs=[digest_of(b"code")]))
    harness.reopen()
    backend = harness.backend
    assert backend.catalog.pin_holders("", 2) == ["job-1", "job-2"]
    assert backend.catalog.pin_holders("job-2", 2) == ["job-3"]
    assert backend.catalog.pin_holders("job-3", 2) == []
    backend.catalog.set_pins(pins("job-2"))
    assert backend.catalog.pin_holders("", 9) == ["job-1", "job-3"]


def test_a_page_of_holders_costs_what_is_on_it(backend, add, put, monkeypatch):
    add("a")
    for number in range(20):
        blobs = [put(b"code %d" % number)]
        backend.catalog.set_pins(pins(f"job-{number:02}", ("a", 1), blobs=blobs))
    opened = []
    real = Table.opened

    def count(table, row):
        opened.append(table.name)
        return real(table, row)

    monkeypatch.setattr(Table, "opened", count)
    last, pages = "", 0
    while page := backend.catalog.pin_holders(last, 2):
        last, pages = page[-1], pages + 1
    assert pages == 10
    assert len(opened) == 40


@pytest.mark.parametrize(
    "pin",
    [
        pb.Pin(),
        pb.Pin(dataset=pb.PinnedVersion(name="a")),
        pb.Pin(dataset=pb.PinnedVersion(name="..", version=1)),
        pb.Pin(blob="x"),
    ],
)
def test_pins_of_nothing_are_refused(backend, pin):
    with pytest.raises(InvalidArgument, match=r"pins\[0\]"):
        backend.catalog.set_pins(pb.SetPinsRequest(holder="job-1", pins=[pin]))
