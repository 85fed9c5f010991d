import io
import sys
import tempfile

import pytest

import phalanx.cli
from phalanx import errors
from phalanx.cli import entry
from phalanx.cli.errors import EXIT_OF_CODE, Exit
from phalanx.cli.main import main
from phalanx.local.ports import free_ports
from phalanx.v1 import job_pb2

CONTRACT = {
    "DONE": 0,
    "JOB_FAILED": 1,
    "USAGE": 2,
    "NOT_FOUND": 3,
    "UNREACHABLE": 4,
    "DENIED": 5,
    "CONFLICT": 6,
    "BUG": 70,
    "INTERRUPTED": 130,
}


def test_the_numbers_are_a_contract():
    assert {name: int(value) for name, value in Exit.__members__.items()} == CONTRACT


def test_every_error_has_an_exit_code():
    assert set(EXIT_OF_CODE) == set(errors.Code)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidArgument("wrong"), 2),
        (errors.Unimplemented("not yet"), 2),
        (errors.NotFound("where"), 3),
        (errors.PermissionDenied("no"), 5),
        (errors.Unauthenticated("who"), 5),
        (errors.AlreadyExists("twice"), 6),
        (errors.FailedPrecondition("not now"), 6),
        (errors.ResourceExhausted("full"), 6),
        (errors.Aborted("fenced"), 6),
        (errors.DataLoss("bits"), 70),
        (errors.DeadlineExceeded("late"), 4),
    ],
)
def test_an_error_of_the_server_gives_its_exit_code(phalanx, cluster, error, code):
    cluster.fail("ListJobs", error)
    outcome = phalanx("jobs")
    assert outcome.code == code
    assert outcome.err == f"error: {error.message}\n"
    assert outcome.out == ""


def test_a_defect_of_the_server_gives_70(phalanx, cluster):
    cluster.fail("ListJobs", errors.Internal("oops"))
    outcome = phalanx("jobs")
    assert (outcome.code, outcome.err) == (70, "error: oops\n")


def test_a_server_that_stays_unavailable_gives_4_after_a_few_attempts(phalanx, cluster):
    failure = errors.Unavailable("no leader", reason="NO_LEADER", retry_after_s=0.01)
    cluster.fail("ListJobs", *[failure] * 20)
    outcome = phalanx("jobs")
    assert (outcome.code, outcome.err) == (4, "error: no leader\n")
    assert 1 < len(cluster.requests("ListJobs")) < 10


def test_nobody_at_the_address_gives_4_and_says_what_to_do(offline):
    address = f"127.0.0.1:{free_ports(1)[0]}"
    outcome = offline("--address", address, "--timeout", "5", "jobs")
    assert outcome.code == 4
    assert address in outcome.err
    assert "phalanx up" in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("jobs", "--nonsense"),
        ("show",),
        ("--timeout", "soon", "jobs"),
        ("--address", "nowhere", "jobs"),
        ("--address", "127.0.0.1:0", "jobs"),
        ("--token-file", "token", "jobs"),
        ("--namespace", "a b", "jobs"),
        ("jobs", "--state", "sleeping"),
        ("up", "--workers", "-1"),
    ],
)
def test_a_wrong_command_line_gives_2(offline, arguments):
    outcome = offline(*arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err


def test_a_wrong_namespace_is_refused_before_anything_is_asked(offline):
    outcome = offline("--json", "--namespace", "a b", "data", "list")
    assert outcome.code == 2
    assert outcome.error()["message"].startswith("--namespace: 'a b' is not allowed; use a-z")
    assert outcome.error()["violations"][0]["field"] == "namespace"


def test_json_errors_have_the_shape_of_the_contract(phalanx, cluster):
    cluster.fail(
        "ListJobs",
        errors.InvalidArgument(
            "2 wrong fields", reason="BAD", violations=[errors.Violation("train.l2", "is negative")]
        ),
    )
    outcome = phalanx("--json", "jobs")
    assert outcome.code == 2
    assert outcome.error() == {
        "code": "INVALID_ARGUMENT",
        "reason": "BAD",
        "message": "2 wrong fields",
        "violations": [{"field": "train.l2", "line": None, "message": "is negative"}],
        "retry_after_s": None,
    }


def test_json_errors_tell_when_to_retry(phalanx, cluster):
    cluster.fail("GetJob", *[errors.Unavailable("busy", reason="BUSY", retry_after_s=0.05)] * 9)
    assert phalanx("--json", "show", "x").error()["retry_after_s"] == 0.05


@pytest.mark.parametrize(
    "arguments", [("--json", "nonsense"), ("show", "--json"), ("jobs", "--nonsense", "--json")]
)
def test_a_wrong_command_line_is_told_in_json_as_well(offline, arguments):
    outcome = offline(*arguments)
    assert outcome.code == 2
    assert outcome.error()["reason"] == "USAGE"


def test_a_defect_gives_70_without_a_traceback(phalanx, cluster, monkeypatch):
    from phalanx.sdk.cluster import Cluster

    monkeypatch.setattr(Cluster, "jobs", lambda self: 1 / 0)
    outcome = phalanx("jobs")
    assert outcome.code == 70
    assert "ZeroDivisionError" in outcome.err


def test_too_little_memory_gives_6_and_is_no_defect(phalanx, monkeypatch):
    from phalanx.sdk.cluster import Cluster

    def take_much(_cluster):
        raise MemoryError("Unable to allocate 4.00 GiB")

    monkeypatch.setattr(Cluster, "jobs", take_much)
    outcome = phalanx("--json", "jobs")
    assert outcome.code == 6
    error = outcome.error()
    assert (error["code"], error["reason"]) == ("RESOURCE_EXHAUSTED", "MEMORY")
    assert "Unable to allocate 4.00 GiB" in error["message"]
    assert "defect" not in error["message"]
    assert "Traceback" not in outcome.err


def test_a_failed_job_gives_1_and_shows_the_traceback(phalanx, cluster):
    cluster.jobs["digits-1"] = job_pb2.Job(
        id="digits-1",
        state=job_pb2.Job.STATE_FAILED,
        reason="POISON_SHARD",
        message="shard 3 failed 3 times",
        failures=[job_pb2.Failure(code="RAISED", shard=3, traceback="ValueError: bad label")],
    )
    outcome = phalanx("watch", "digits-1")
    assert outcome.code == 1
    assert "ValueError: bad label" in outcome.err
    assert "error: job digits-1 failed: shard 3 failed 3 times" in outcome.err


def test_a_cancelled_job_gives_1(phalanx, cluster):
    cluster.jobs["digits-1"] = job_pb2.Job(id="digits-1", state=job_pb2.Job.STATE_CANCELLED)
    assert phalanx("watch", "digits-1").code == 1


def wrong(message, *violations):
    from phalanx.cli.errors import error_to_text

    return error_to_text(errors.InvalidArgument(message, violations=violations))


def test_one_wrong_field_is_told_once():
    violation = errors.Violation("train.l2", "is negative", 7)
    assert wrong("train.l2: is negative", violation) == "error: line 7: train.l2: is negative"
    assert wrong("job.yaml:7: train.l2: is negative", violation) == (
        "error: job.yaml:7: train.l2: is negative"
    )


def test_several_wrong_fields_are_a_list_by_line():
    violations = (
        errors.Violation("train.l2", "is bad", 9),
        errors.Violation("data", "is missing", 2),
    )
    listed = "  line 2: data      is missing\n  line 9: train.l2  is bad"
    assert wrong("job.yaml: train.l2: is bad (and 1 more)", *violations) == (
        f"error: job.yaml: 2 fields are wrong\n{listed}"
    )
    assert (
        wrong("train.l2: is bad (and 1 more)", *violations)
        == f"error: 2 fields are wrong\n{listed}"
    )
    assert wrong("the job cannot run", *violations) == f"error: the job cannot run\n{listed}"


@pytest.mark.parametrize("buffering", [-1, 0])
def test_a_full_disk_under_the_output_is_no_defect(monkeypatch, capsys, buffering):
    with open("/dev/full", "wb", buffering) as full:
        output = io.TextIOWrapper(full, encoding="utf-8", write_through=buffering == 0)
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "argv", ["phalanx", "--version"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 6
    assert "cannot write the output: no space left on device" in capsys.readouterr().err


def test_a_terminal_without_our_characters_gets_others(monkeypatch):
    with tempfile.TemporaryFile() as file:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="ascii"))
        monkeypatch.setattr(sys, "argv", ["phalanx", "--help"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        file.seek(0)
        assert b"Start with: phalanx up   ?   Help" in file.read()


class Interrupting:
    """Ctrl-C that comes while a module is found."""

    def find_spec(self, name, path=None, target=None):
        if name == "phalanx.cli.main":
            raise KeyboardInterrupt


def test_ctrl_c_while_the_program_is_loaded_is_no_crash(monkeypatch):
    monkeypatch.delitem(sys.modules, "phalanx.cli.main")
    monkeypatch.delattr(phalanx.cli, "main")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130
