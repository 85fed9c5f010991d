"""Catalog: versions, request ids, pages, pins."""

import threading

import pytest

from phalanx.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from phalanx.testing.storage_messages import digest_of, model
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import model_service_pb2 as model_pb
from storage.backends.sql.references import add_references
from storage.core.catalog import parse_name, parse_page
from tests.contract.storage.pinning import delete, pins


@pytest.fixture
def link(harness, put):
    """Registers a linked data set of chunks that are not stored."""

    def create(name, *chunks, content=b"", namespace=""):
        manifest = put(b"links " + b" ".join(chunks) + content)
        request = dataset_pb.CreateDatasetRequest(
            namespace=namespace, name=name, manifest_digest=manifest
        )
        summary = dataset_pb.Dataset(manifest_digest=manifest, size_bytes=10**9, linked=True)
        digests = [digest_of(chunk) for chunk in chunks]
        return harness.backend.catalog.create_dataset(request, summary, (), digests)

    return create


def get(backend, text, namespace=""):
    return backend.catalog.get_dataset(parse_name(namespace, text))


def pages(backend, size, namespace=""):
    found, token = [], ""
    while True:
        entries, token = backend.catalog.list_datasets(parse_page(namespace, size, token))
        found.append([(entry.name, entry.version) for entry in entries])
        if not token:
            return found


def test_versions_count_from_one_and_survive(harness, add):
    first, second = add(content=b"a"), add(content=b"b")
    assert (first.namespace, first.name, first.version) == ("default", "adult", 1)
    assert second.version == 2
    assert first.create_time.ToNanoseconds() == harness.now_unix_nanos
    assert dict(first.rows) == {"train": 10}
    harness.reopen()
    assert get(harness.backend, "adult") == second
    assert get(harness.backend, "adult@1") == first
    assert get(harness.backend, "adult@2") == second


def test_the_same_data_again_is_the_same_version(add):
    first = add(content=b"a")
    assert add(content=b"a") == first
    assert add(content=b"b").version == 2
    assert add(content=b"a").version == 3


def test_a_request_id_gives_the_first_answer(harness, add):
    first = add(content=b"a", request_id="r-1")
    add(content=b"b")
    harness.reopen()
    assert add(content=b"a", request_id="r-1") == first
    with pytest.raises(AlreadyExists) as caught:
        add(content=b"b", request_id="r-1")
    assert caught.value.reason == "REQUEST_ID_REUSED"


def test_request_ids_are_remembered_for_a_day(harness, add):
    add(content=b"a", request_id="r-1")
    harness.now_unix_nanos += int(23.9 * 3600 * 1e9)
    harness.backend.references.reclaim()
    with pytest.raises(AlreadyExists):
        add(content=b"b", request_id="r-1")
    harness.now_unix_nanos += int(0.2 * 3600 * 1e9)
    harness.backend.references.reclaim()
    assert add(content=b"b", request_id="r-1").version == 2


def test_one_request_id_may_serve_two_methods(backend, add, put):
    add(request_id="r-1")
    put(b"{}")
    request = model_pb.CreateModelRequest(model=model("m", model=b"{}"), request_id="r-1")
    assert backend.catalog.create_model(request).version == 1


def test_concurrent_creation_with_one_request_id_makes_one_version(backend, put):
    put(b"{}")
    request = model_pb.CreateModelRequest(model=model("m", model=b"{}"), request_id="r-1")
    versions = []
    threads = [
        threading.Thread(
            target=lambda: versions.append(backend.catalog.create_model(request).version)
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert versions == [1] * 8


def test_what_refers_to_missing_blobs_is_refused(backend, put):
    manifest = put(b"manifest")
    request = dataset_pb.CreateDatasetRequest(name="adult", manifest_digest=manifest)
    with pytest.raises(FailedPrecondition) as caught:
        backend.catalog.create_dataset(request, dataset_pb.Dataset(), [digest_of(b"nowhere")])
    assert caught.value.details == {"digest": digest_of(b"nowhere")}
    with pytest.raises(FailedPrecondition, match="1 of 1 blob not stored"):
        backend.catalog.create_model(model_pb.CreateModelRequest(model=model("m", model=b"{}")))
    with pytest.raises(NotFound):
        get(backend, "adult")


def test_unknown_names_and_versions(backend, add):
    add()
    for text in ("other", "adult@2", "adult@999999999999999999"):
        with pytest.raises(NotFound) as caught:
            get(backend, text)
        assert caught.value.reason == "DATASET_NOT_FOUND"
    with pytest.raises(NotFound):
        get(backend, "adult", namespace="team")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a@",
        "a@0",
        "a@-1",
        "a@01",
        "a@x",
        "a@1@2",
        "A",
        "../a",
        "a/",
        "/a",
        "a/b/c",
        "A/b",
        "@1",
        "a@１",
    ],
)
def test_names_that_are_none(text):
    with pytest.raises(InvalidArgument):
        parse_name("", text)


def test_namespaces_are_apart(backend, add):
    add(content=b"a")
    other = add(content=b"a", namespace="team")
    assert (other.namespace, other.version) == ("team", 1)
    assert pages(backend, 0) == [[("adult", 1)]]
    assert pages(backend, 0, "team") == [[("adult", 1)]]
    for text in ("team/adult", "team/adult@1", str(parse_name("team", "adult@1"))):
        assert get(backend, text) == other
    assert get(backend, "default/adult", namespace="team").namespace == "default"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 0])
def test_pages_show_everything_once(backend, add, size):
    for name in ("b", "a", "c"):
        for content in (b"1", b"2"):
            add(name, content)
    found = pages(backend, size)
    expected = [(name, version) for name in "abc" for version in (2, 1)]
    assert [entry for page in found for entry in page] == expected
    assert all(len(page) == size for page in found[:-1] if size)


def test_pages_go_on_past_what_was_deleted(backend, add):
    for name in "abcd":
        add(name, b"1")
    entries, token = backend.catalog.list_datasets(parse_page("", 2, ""))
    delete(backend, "b")
    delete(backend, "c")
    entries, token = backend.catalog.list_datasets(parse_page("", 2, token))
    assert [entry.name for entry in entries] == ["d"]
    assert token == ""


@pytest.mark.parametrize("token", ["x", "e30=", "WzEsMl0=", "!", "WyJhIiwgMV0" * 1000])
def test_foreign_page_tokens_are_refused(token):
    with pytest.raises(InvalidArgument) as caught:
        parse_page("", 0, token)
    assert caught.value.violations[0].field == "page_token"


def test_a_deleted_version_never_comes_again(harness, add):
    add(content=b"a")
    add(content=b"b")
    delete(harness.backend, "adult@2")
    assert get(harness.backend, "adult").version == 1
    delete(harness.backend, "adult")
    harness.reopen()
    assert add(content=b"c").version == 3
    with pytest.raises(NotFound):
        delete(harness.backend, "adult@2")


def test_deleting_again_with_the_same_request_id_succeeds(backend, add):
    add()
    delete(backend, "adult", "r-1")
    delete(backend, "adult", "r-1")
    with pytest.raises(NotFound):
        delete(backend, "adult", "r-2")


def test_models(harness, put):
    backend = harness.backend
    put(b"{}")
    put(b"weights")
    wanted = model("fashion", model=b"{}", weights=b"weights")
    wanted.metrics["test/accuracy"] = 0.86
    created = backend.catalog.create_model(model_pb.CreateModelRequest(model=wanted))
    assert (created.version, created.namespace) == (1, "default")
    assert [file.size_bytes for file in created.files] == [2, 7]
    assert created.metrics["test/accuracy"] == 0.86
    harness.reopen()
    backend = harness.backend
    assert backend.catalog.get_model(parse_name("", "fashion@1")) == created
    assert backend.catalog.list_models(parse_page("", 0, "")) == ([created], "")
    backend.catalog.set_pins(pins("job-1", ("fashion", 1), kind="model"))
    with pytest.raises(FailedPrecondition):
        backend.catalog.delete_model(
            model_pb.DeleteModelRequest(name="fashion"), parse_name("", "fashion")
        )
    backend.catalog.set_pins(pins("job-1"))
    backend.catalog.delete_model(
        model_pb.DeleteModelRequest(name="fashion"), parse_name("", "fashion")
    )
    with pytest.raises(NotFound) as caught:
        backend.catalog.get_model(parse_name("", "fashion"))
    assert caught.value.reason == "MODEL_NOT_FOUND"


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../b", "a//b", ".hidden", "a\0b"])
def test_model_files_that_would_leave_their_folder_are_refused(backend, put, path):
    wanted = model("m", model=b"{}")
    wanted.files[0].path = path
    put(b"{}")
    with pytest.raises(InvalidArgument) as caught:
        backend.catalog.create_model(model_pb.CreateModelRequest(model=wanted))
    assert caught.value.violations[0].field == "model.files[0].path"


def test_a_model_needs_files_each_once(backend, put):
    put(b"{}")
    twice = model("m", model=b"{}")
    twice.files.append(twice.files[0])
    for wrong in (model("m"), twice):
        with pytest.raises(InvalidArgument):
            backend.catalog.create_model(model_pb.CreateModelRequest(model=wrong))


def test_namespaces_may_have_quotas_of_their_own(harness, put):
    harness.namespace_bytes_max = {"red": 100, "blue": 0, "green": 1000}.__getitem__
    harness.reopen()
    manifest = put(b"manifest")
    summary = dataset_pb.Dataset(manifest_digest=manifest, size_bytes=101)
    for namespace in ("red", "blue", "green"):
        request = dataset_pb.CreateDatasetRequest(
            namespace=namespace, name="a", manifest_digest=manifest
        )
        if namespace == "red":
            with pytest.raises(ResourceExhausted, match="'red' may have 100 bytes"):
                harness.backend.catalog.create_dataset(request, summary, [])
        else:
            harness.backend.catalog.create_dataset(request, summary, [])


def test_a_namespace_holds_data_sets_and_models_up_to_its_quota(harness, put):
    harness.namespace_bytes_max = 1000
    harness.reopen()

    def add_dataset(name, size_bytes, namespace=""):
        manifest = put(name.encode())
        request = dataset_pb.CreateDatasetRequest(
            namespace=namespace, name=name, manifest_digest=manifest
        )
        summary = dataset_pb.Dataset(manifest_digest=manifest, size_bytes=size_bytes)
        return harness.backend.catalog.create_dataset(request, summary, [])

    def add_model(name, content):
        put(content)
        request = model_pb.CreateModelRequest(model=model(name, weights=content))
        return harness.backend.catalog.create_model(request)

    add_dataset("a", 600)
    add_model("m", b"x" * 300)
    with pytest.raises(
        ResourceExhausted, match=r"1000 bytes .*quota bytes.* has 900, and this needs 101"
    ) as caught:
        add_dataset("b", 101)
    assert caught.value.reason == "QUOTA_EXCEEDED"
    details = {"namespace": "default", "quota": "bytes", "limit": "1000", "used": "900"}
    assert caught.value.details == details
    with pytest.raises(ResourceExhausted):
        add_model("n", b"y" * 101)
    add_dataset("a", 600)  # the same again needs nothing
    add_dataset("b", 1000, namespace="blue")
    delete(harness.backend, "a")
    add_dataset("b", 101)


def linking(backend, chunk):
    return [
        (each.name, each.version) for each in backend.catalog.datasets_linking(digest_of(chunk))
    ]


def test_linked_chunks_lead_to_their_data_sets_newest_first(harness, link):
    backend = harness.backend
    assert linking(backend, b"one") == []
    first = link("a", b"one", b"two")
    assert link("a", b"one", b"two") == first
    link("b", b"two", namespace="other")
    link("a", b"two", b"three")
    assert linking(backend, b"one") == [("a", 1)]
    assert linking(backend, b"two") == [("a", 2), ("b", 1), ("a", 1)]
    assert backend.catalog.datasets_linking(digest_of(b"one")) == [first]
    harness.reopen()
    backend = harness.backend
    delete(backend, "a@1")
    assert linking(backend, b"one") == []
    assert linking(backend, b"two") == [("a", 2), ("b", 1)]
    delete(backend, "a")
    assert linking(backend, b"three") == []
    with pytest.raises(InvalidArgument):
        backend.catalog.datasets_linking("no digest")


def test_a_link_keeps_its_manifest_and_no_blob(backend, put, link):
    chunk = put(b"chunk")
    manifest = link("a", b"chunk").manifest_digest
    assert backend.references.unreferenced([chunk, manifest]) == [chunk]
    assert backend.references.sweep([chunk, manifest], lambda digest: 1) == [1]
    delete(backend, "a")
    assert backend.references.unreferenced([manifest]) == [manifest]


def chunks(count):
    return [b"chunk %d" % index for index in range(count)]


class Counting:
    """A connection that counts the rows that are changed."""

    def __init__(self, connection):
        self._connection = connection
        self.rows = 0

    def execute(self, statement, *values):
        cursor = self._connection.execute(statement, *values)
        if not statement.startswith("SELECT"):
            self.rows += cursor.rowcount
        return cursor

    def executemany(self, statement, rows):
        cursor = self._connection.executemany(statement, rows)
        self.rows += cursor.rowcount
        return cursor

    def scan(self, selection):
        return self._connection.scan(selection)


def test_many_links_are_written_and_dropped_in_pieces(harness, link, monkeypatch):
    monkeypatch.setattr("storage.backends.sql.links.PIECE_LINKS", 4)
    database, changes = harness.database, []
    write = database.write

    def counted(act, **options):
        def count(connection):
            counting = Counting(connection)
            result = act(counting)
            changes.append(counting.rows)
            return result

        return write(count, **options)

    monkeypatch.setattr(database, "write", counted)
    link("a", *chunks(30))
    delete(harness.backend, "a")
    assert sum(changes) > 60
    # The version itself, its name and its manifest are a few more.
    assert max(changes) <= 8


@pytest.mark.parametrize("after", [0, 1, 2])
def test_links_of_a_registration_that_failed_are_nobodys_and_go(harness, link, monkeypatch, after):
    monkeypatch.setattr("storage.backends.sql.links.PIECE_LINKS", 4)
    link("other", *chunks(3))
    pieces = []

    def failing(connection, *args):
        pieces.append(args)
        if len(pieces) > after:
            raise ResourceExhausted("the disk is full")
        add_references(connection, *args)

    with monkeypatch.context() as patch:
        patch.setattr("storage.backends.sql.links.add_references", failing)
        # As if the process had ended there: what it wrote stays.
        patch.setattr("storage.backends.sql.links.SqlLinks.give_up", lambda *_: None)
        with pytest.raises(ResourceExhausted):
            link("a", *chunks(10))
    assert linking(harness.backend, b"chunk 0") == [("other", 1)]
    harness.reopen()
    harness.tidy()
    count = "SELECT (SELECT count(*) FROM versions), (SELECT count(*) FROM blob_references)"
    rows = harness.database.read(lambda found: found.execute(count).fetchone())
    assert rows == (1, 4)
    link("a", *chunks(10))
    assert linking(harness.backend, b"chunk 0") == [("a", 1), ("other", 1)]


def test_links_of_a_deletion_that_broke_off_are_nobodys_and_go(harness, link, monkeypatch):
    monkeypatch.setattr("storage.backends.sql.links.PIECE_LINKS", 4)
    link("a", *chunks(10))
    with monkeypatch.context() as patch:
        patch.setattr("storage.backends.sql.links.SqlLinks.drop", lambda *_: None)
        delete(harness.backend, "a")
    assert linking(harness.backend, b"chunk 9") == []
    link("b", *chunks(10))
    assert linking(harness.backend, b"chunk 9") == [("b", 1)]
    harness.reopen()
    harness.tidy()
    assert linking(harness.backend, b"chunk 9") == [("b", 1)]
    rows = harness.database.read(
        lambda found: found.execute("SELECT count(*) FROM blob_references").fetchone()
    )
    assert rows == (11,)


def test_a_registration_that_is_repeated_leaves_no_second_links(harness, link):
    first = link("a", *chunks(10))
    assert link("a", *chunks(10)) == first
    assert linking(harness.backend, b"chunk 9") == [("a", 1)]
    rows = harness.database.read(
        lambda found: found.execute("SELECT count(*) FROM blob_references").fetchone()
    )
    assert rows == (11,)


def test_linked_data_sets_count_nothing(harness, link, add):
    harness.namespace_bytes_max = 1000
    harness.reopen()
    assert link("a", b"one").size_bytes == 10**9
    assert link("b", b"two").version == 1
    assert add().version == 1
