"""What a control process and two aggregators have storage keep: one act after another.

Everything is the same in every run, so that the state that can be seen after each act is known:
after a fault it is the one before the act that was under way, or the one after it, and no third.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from phalanx.errors import Aborted, PhalanxError
from phalanx.testing.faulty_disk import FaultyDisk
from phalanx.testing.storage_messages import acquire, append, digest_of, model, part, read
from phalanx.v1 import model_service_pb2 as model_pb
from phalanx.v1 import storage_service_pb2 as pb
from storage.backends.file_system import THIS_MACHINE, FileSystem
from storage.backends.sqlite import open_embedded_backend
from storage.core.catalog import VersionName
from storage.interfaces import Backend

State = str
"""All that can be seen of a back end, as text; "" before the first start."""

JOB = "job-1"
LOG_PAGES = 24
"""So few that SQLite copies its log into the database several times within the scenario."""

_STREAM = "control"
_LEASE = "leader"


def _content(name: str, size_bytes: int) -> bytes:
    """Bytes that follow from a name."""
    return hashlib.shake_256(name.encode()).digest(size_bytes)


_PARTS = {
    (step, index): _content(f"part {index} of step {step}", 3000)
    for step in (10, 20, 30)
    for index in (0, 1)
}
_FILES = {"description": _content("description", 700), "parameters": _content("parameters", 5000)}
_GARBAGE = _content("garbage", 900)
_KEPT = [*_PARTS.values(), *_FILES.values()]


def open_state(
    state: Path,
    disk: FileSystem = THIS_MACHINE,
    on_failure: Callable[[PhalanxError], None] = lambda _: None,
    on_corruption: Callable[[str], None] = lambda _: None,
) -> Backend:
    """Open the back end as the storage process does."""
    return open_embedded_backend(
        state,
        disk=disk,
        on_failure=on_failure,
        on_corruption=on_corruption,
        log_pages=LOG_PAGES,
        now_unix_nanos=lambda: 1_700_000_000_000_000_000,
    )


def _put(content: bytes) -> Callable[[Backend], object]:
    def act(backend: Backend) -> object:
        writer = backend.blobs.writer(len(content))
        try:
            writer.write(content)
            return writer.commit(digest_of(content), len(content))
        finally:
            writer.abort()

    return act


def _fence(token: int) -> pb.Fence:
    return pb.Fence(lease=_LEASE, token=token)


def _append(
    first: int, count: int, token: int, size_bytes: int = 40
) -> Callable[[Backend], object]:
    records = [_content(f"record {first + index}", size_bytes) for index in range(count)]
    request = append(_STREAM, *records, expected=first, fence=_fence(token))
    return lambda backend: backend.journals.append(request)


def _raise_term(expected: int, token: int) -> Callable[[Backend], object]:
    request = pb.RaiseTermRequest(job_id=JOB, expected_term=expected, fence=_fence(token))
    return lambda backend: backend.jobs.raise_term(request)


def _commit(
    step: int, index: int, *, term: int, final: bool = False
) -> Callable[[Backend], object]:
    content = _PARTS[step, index]
    request = part(content, term=term, step=step, index=index, ranges=2, final=final, keep=2)
    return lambda backend: backend.jobs.commit(request)


def _renew(holder: str, token: int) -> Callable[[Backend], object]:
    request = pb.RenewLeaseRequest(name=_LEASE, holder=holder, token=token)
    return lambda backend: backend.leases.renew(request)


def _create_model(backend: Backend) -> object:
    request = model_pb.CreateModelRequest(request_id="model-1", model=model("model", **_FILES))
    return backend.catalog.create_model(request)


def _set_pins(backend: Backend) -> None:
    pin = pb.Pin(model=pb.PinnedVersion(name="model", version=1))
    request = pb.SetPinsRequest(holder=JOB, pins=[pin], fence=_fence(2))
    backend.catalog.set_pins(request)


def _collect(backend: Backend) -> object:
    digests = [digest_of(content) for content in (_GARBAGE, *_PARTS.values())]
    return backend.references.sweep(
        digests, lambda digest: backend.blobs.remove_if_old(digest, 0.0)
    )


ACTS: list[tuple[str, Callable[[Backend], object]]] = [
    ("acquire the lease", lambda b: b.leases.acquire(acquire(_LEASE, "one"))),
    ("append", _append(0, 3, token=1)),
    ("renew the lease", _renew("one", 1)),
    ("raise the term", _raise_term(0, token=1)),
    *((f"put part {index} of step 10", _put(_PARTS[10, index])) for index in (0, 1)),
    ("commit part 0 of step 10", _commit(10, 0, term=1)),
    ("commit part 1 of step 10", _commit(10, 1, term=1)),
    ("append many", _append(3, 12, token=1, size_bytes=4000)),
    ("put garbage", _put(_GARBAGE)),
    ("take the lease over", lambda b: b.leases.acquire(acquire(_LEASE, "two", seen=(1, 2)))),
    ("append as the next leader", _append(15, 2, token=2)),
    *((f"put part {index} of step 20", _put(_PARTS[20, index])) for index in (0, 1)),
    ("commit part 1 of step 20", _commit(20, 1, term=1)),
    ("commit part 0 of step 20", _commit(20, 0, term=1)),
    (
        "truncate the journal",
        lambda b: b.journals.truncate(
            pb.TruncateJournalRequest(stream=_STREAM, before_sequence=10, fence=_fence(2))
        ),
    ),
    ("raise the term again", _raise_term(1, token=2)),
    ("put part 0 of the final step", _put(_PARTS[30, 0])),
    ("commit part 0 of the final step", _commit(30, 0, term=2, final=True)),
    *((f"put the model's {name}", _put(content)) for name, content in _FILES.items()),
    ("create the model", _create_model),
    ("pin the model", _set_pins),
    ("collect garbage", _collect),
    ("put part 1 of the final step", _put(_PARTS[30, 1])),
    ("commit part 1 of the final step", _commit(30, 1, term=2, final=True)),
    ("append after success", _append(17, 10, token=2, size_bytes=4000)),
    ("renew the lease again", _renew("two", 2)),
]
"""Acts that a client may repeat after a failure, as the clients that ship do."""


def observe(backend: Backend) -> State:
    """Return everything that the acts are about, as the back end shows it; blobs are verified."""
    lease = backend.leases.get(_LEASE)
    found: dict[str, object] = {
        "lease": None if lease is None else [lease.holder, lease.token, lease.counter],
        "records": [
            [record.sequence, digest_of(record.payload)]
            for response in backend.journals.read(read(_STREAM))
            for record in response.records
        ],
        "blobs": [_read_blob(backend, content) for content in _KEPT],
        "checkpoints": [
            manifest.SerializeToString(deterministic=True).hex()
            for manifest in backend.jobs.list_checkpoints(JOB)
        ],
        "unreferenced": backend.references.unreferenced([digest_of(each) for each in _KEPT]),
    }
    try:
        found["row"] = backend.jobs.get_row(JOB).SerializeToString(deterministic=True).hex()
    except PhalanxError as error:
        found["row"] = error.code.value
    try:
        entry = backend.catalog.get_model(VersionName("", "model", 0))
        found["model"] = entry.SerializeToString(deterministic=True).hex()
    except PhalanxError as error:
        found["model"] = error.code.value
    return json.dumps(found)


def _read_blob(backend: Backend, content: bytes) -> bool:
    """Say whether a blob is stored; AssertionError if it is stored and not whole."""
    digest = digest_of(content)
    if digest not in backend.blobs.sizes([digest]):
        return False
    reader = backend.blobs.open(digest)
    try:
        assert b"".join(reader.chunks(0, reader.size_bytes, 1024)) == content
    finally:
        reader.close()
    return True


def check_folder(state: Path) -> None:
    """AssertionError if a file in the folder of a back end is there by half."""
    assert not list((state / "uploads").iterdir()), "an upload was left behind"
    # As glob does it, it would take a fifth of the whole sweep.
    for folder in os.listdir(state / "blobs"):
        for name in os.listdir(f"{state}/blobs/{folder}"):
            content = Path(f"{state}/blobs/{folder}/{name}").read_bytes()
            assert digest_of(content) == name, f"{name} is there by half"


def stale_write_is_refused(backend: Backend) -> bool:
    """Try to write as a leader that was replaced; say whether it was refused."""
    lease = backend.leases.get(_LEASE)
    token = lease.token - 1 if lease is not None else 7
    try:
        backend.journals.append(append(_STREAM, b"late", fence=_fence(token)))
    except Aborted as error:
        return error.reason == "STALE_GENERATION"
    return False


def expected_states(folder: Path) -> list[State]:
    """Return the state before the first act and after each, on a disk without faults."""
    backend = open_state(folder / "state")
    try:
        states = [observe(backend)]
        for _, act in ACTS:
            act(backend)
            states.append(observe(backend))
    finally:
        backend.close()
    return states


def end_process(disk: FaultyDisk, backend: Backend) -> None:
    """Let a back end go without a change to the disk, as ``os._exit`` does."""
    disk.end()
    backend.close()
