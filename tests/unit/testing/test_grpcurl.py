"""What stands in for grpcurl takes what grpcurl takes, and refuses what it does not know."""

import io
import json
from collections.abc import Iterator

import pytest

from phalanx.testing.servers import ScriptedCluster
from tests.system import grpcurl

SUBMIT = "phalanx.v1.JobService/SubmitJob"


@pytest.fixture(scope="module")
def cluster() -> Iterator[ScriptedCluster]:
    with ScriptedCluster() as cluster:
        yield cluster


def test_flags_are_read_as_go_reads_them() -> None:
    call = grpcurl.parse(["--plaintext", "-d={}", "-H", "a: b", "-H=c:d", "localhost:1", SUBMIT])
    assert call == grpcurl.Call(
        "localhost:1", SUBMIT, plaintext=True, data="{}", headers=call.headers
    )
    assert grpcurl.metadata_of(call, {}) == (("a", "b"), ("c", "d"))
    assert grpcurl.parse(["-cacert", "ca.pem", "localhost:1", SUBMIT]).ca == "ca.pem"


@pytest.mark.parametrize(
    "words",
    [
        "-insecure localhost:1 a.B/C",
        "-proto job.proto localhost:1 a.B/C",
        "-dump localhost:1 a.B/C",
        "-plain localhost:1 a.B/C",
        "-plaintext=false localhost:1 a.B/C",
        "-plaintext -cacert ca.pem localhost:1 a.B/C",
        # Flags behind the address are words to Go.
        "localhost:1 a.B/C -plaintext",
        "localhost:1 list",
        "localhost:1",
        "-d",
    ],
)
def test_what_no_document_needs_is_refused(words: str) -> None:
    with pytest.raises(grpcurl.UsageError):
        grpcurl.parse(words.split())


def test_variables_are_filled_in_only_where_they_are_asked_for() -> None:
    words = ["-H", "authorization: Bearer ${TOKEN}", "localhost:1", SUBMIT]
    environ = {"TOKEN": "phx_x"}
    plain = grpcurl.metadata_of(grpcurl.parse(words), environ)
    assert plain == (("authorization", "Bearer ${TOKEN}"),)
    expanding = grpcurl.parse(["-expand-headers", *words])
    assert grpcurl.metadata_of(expanding, environ) == (("authorization", "Bearer phx_x"),)
    with pytest.raises(grpcurl.UsageError, match="TOKEN"):
        grpcurl.metadata_of(expanding, {})


def test_json_becomes_what_the_server_says_that_it_is(
    cluster: ScriptedCluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = {"name": "first", "train": {"batchSize": 7, "stop": {"wallTime": "1800s"}}}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"spec": spec})))
    assert grpcurl.main(["-plaintext", "-d", "@", cluster.address, SUBMIT]) == 0
    answer = json.loads(capsys.readouterr().out)
    (request,) = cluster.requests("SubmitJob")
    assert request.spec.train.batch_size == 7
    assert request.spec.train.stop.wall_time.seconds == 1800
    assert answer["job"]["spec"] == spec
    assert answer["plan"]["rowsPerLeaf"]


@pytest.mark.parametrize(
    ("data", "method", "code", "words"),
    [
        ('{"spec": {"nme": "x"}}', SUBMIT, 2, "nme"),
        ("{", SUBMIT, 2, "SubmitJobRequest"),
        ("{}", "phalanx.v1.JobService/Submit", 2, "no phalanx.v1.JobService/Submit"),
        ("{}", "phalanx.v1.JobServise/SubmitJob", 2, "JobServise"),
        ("{}", "phalanx.v1.StorageService/PutBlob", 2, "takes a stream"),
        ('{"jobId": "nobody-1"}', "phalanx.v1.JobService/GetJob", 64 + 5, "NOT_FOUND"),
    ],
)
def test_what_goes_wrong_is_told(
    cluster: ScriptedCluster,
    capsys: pytest.CaptureFixture[str],
    data: str,
    method: str,
    code: int,
    words: str,
) -> None:
    assert grpcurl.main(["-plaintext", "-d", data, cluster.address, method]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert words in told.err
