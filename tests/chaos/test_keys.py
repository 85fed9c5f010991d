"""A cluster with keys: the same bits, while workers die and while all keys are replaced."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

import phalanx
from phalanx.errors import NotFound, PermissionDenied, PhalanxError, Unauthenticated
from phalanx.keys import folder, tokens
from phalanx.keys.caller import CODE, Role
from phalanx.local.keys import TOKENS_FILE
from phalanx.rpc.status import from_rpc_error
from phalanx.sdk import methods
from phalanx.sdk.job_files import as_document
from phalanx.testing.arena import GUARD_S, Arena, arena, gated_job, stopped, wait_until
from phalanx.v1.job_service_pb2 import SubmitJobRequest, SubmitJobResponse

pytestmark = pytest.mark.slow


def _keys(ring: Arena) -> Path:
    return ring.cluster.state_dir / "keys"


@pytest.mark.same_bits
def test_a_worker_is_killed_in_a_cluster_with_keys(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2, secure=True) as ring:
        job = ring.submit(gated_job())
        for step in (5, 30):
            ring.caught_at(job, step)
            victim = ring.caught_with_shards(job)
            lost = len(ring.events("WORKER_LOST"))
            ring.signal(victim)
            wait_until(lambda n=lost: len(ring.events("WORKER_LOST")) > n, "the death to be seen")
        ring.gate.release()
        result = job.wait(timeout_s=GUARD_S)
        assert ring.cluster.get(job.id).message.submitter == "admin"
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


@pytest.mark.same_bits
def test_workers_with_keys_reduce_among_themselves(tmp_path: Path, undisturbed_sha256: str) -> None:
    with arena(tmp_path, 2, secure=True) as ring:
        result = ring.cluster.submit(gated_job(all_reduce={})).wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == undisturbed_sha256


@pytest.mark.soak
@pytest.mark.same_bits
@pytest.mark.parametrize("topology", [{}, {"all_reduce": {}}], ids=["served", "all_reduce"])
def test_copies_of_late_shards_are_taken_where_workers_show_what_they_were_given(
    tmp_path: Path, undisturbed_sha256: str, topology: dict[str, Any]
) -> None:
    """A leaf hangs: whoever orders a copy of it proves that to the owners of the other ranges."""
    with arena(tmp_path, 3, secure=True, aggregators=2) as ring:
        ring.workers_ready()
        job = ring.submit(gated_job(**topology))
        victim = ring.caught_at(job, 15)[0]
        children = psutil.Process(ring.cluster.process(victim).pid).children(recursive=True)
        leaf = next(child.pid for child in children if child.pid in ring.gate.entered())
        with stopped(leaf):
            ring.gate.release()
            result = job.wait(timeout_s=GUARD_S)
        assert ring.events("SPECULATION_STARTED")
        assert not ring.events("WORKER_LOST"), "its heartbeats never stopped"
        logs = [path.read_text() for path in (ring.cluster.state_dir / "logs").iterdir()]
    assert not [text for text in logs if "NOT_YOURS" in text or "NOT_SEALED" in text]
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


@pytest.mark.same_bits
def test_all_keys_are_replaced_under_a_running_job(
    tmp_path: Path, long_job: dict[str, Any], long_sha256: str
) -> None:
    """Each time a process dies as well, so that it and all who dial it use the new ones, while the
    others keep their connections. No call fails of the one who watches."""
    calls = 0
    with arena(tmp_path, 2, secure=True, controls=2, leaf_s=0.15) as ring:
        keys = _keys(ring)
        job = ring.cluster.submit(long_job)
        owner = "admin"
        for role in ("worker", "aggregator", "control"):
            old = (keys / "worker.pem").read_bytes()
            folder.renew(keys)
            assert (keys / "worker.pem").read_bytes() != old
            ring.signal(next(each.id for each in ring.cluster.processes() if each.role == role))
            # The new token first: a call is made with one of them.
            new = f"after-{role}"
            token = tokens.create(keys / TOKENS_FILE, new, Role.ADMIN, permissions=[CODE])
            (keys / "admin.token").write_text(token)
            tokens.revoke(keys / TOKENS_FILE, owner)
            owner = new
            step = job.refresh().progress.step
            while not job.done and job.progress.step <= step:
                job.refresh()
                ring.cluster.models.list()
                calls += 2
        assert not job.done
        ring.hurry()
        result = job.wait(timeout_s=GUARD_S)
    assert calls >= 6
    assert result.parameters_sha256 == long_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


def test_secrets_are_nowhere_but_in_their_files(tmp_path: Path) -> None:
    """Not in logs, not in command lines or environments of any process, not in what is stored and
    not in what errors say."""
    state = tmp_path / "state"
    with arena(tmp_path, 1, secure=True, state=state) as ring:
        keys = _keys(ring)
        canary = tokens.create(keys / TOKENS_FILE, "canary", Role.SUBMITTER, namespaces=["birds"])
        secrets = {(keys / "admin.token").read_text().strip(), canary, canary[:-1], canary + "x"}
        secrets |= {_secret_line(each) for each in keys.glob("*.key")}
        assert len(secrets) == 10
        ring.cluster.submit(gated_job(steps=5)).wait(timeout_s=GUARD_S)
        said = [*_refusals_of(ring, canary), *_misuse(ring)]
        for process in _processes(ring):
            said += [" ".join(process.cmdline()), json.dumps(process.environ())]
        logs = [path.read_text(errors="replace") for path in (state / "logs").iterdir()]
    assert any('"caller": "canary"' in text and "call_refused" in text for text in logs)
    stored = [
        path.read_bytes().decode("latin-1")
        for path in state.rglob("*")
        if path.is_file() and keys not in path.parents
    ]
    assert len(stored) > 10
    for text in (*said, *logs, *stored):
        for secret in secrets:
            assert secret not in text


def _refusals_of(ring: Arena, token: str) -> list[str]:
    """Everything that a person with a token hears who goes too far, and who mistypes it."""
    said = []
    ca = _keys(ring) / "ca.pem"
    with phalanx.connect(ring.cluster.address, token=token, ca=ca, namespace="birds") as bird:
        assert bird.jobs() == []
        job_id = ring.cluster.jobs()[0].id
        for attempt, kind in (
            (lambda: bird.submit(gated_job(), namespace="default"), PermissionDenied),
            (lambda: bird.submit(gated_job()), PermissionDenied),
            (lambda: bird.drain("worker-1"), PermissionDenied),
            (bird.gc, PermissionDenied),
            (lambda: bird.get(job_id), NotFound),
        ):
            with pytest.raises(kind) as refused:
                attempt()
            said.append(str(refused.value))
    for wrong in (token + "x", token[:-1]):
        with (
            phalanx.connect(ring.cluster.address, token=wrong, ca=ca) as stranger,
            pytest.raises(Unauthenticated) as unknown,
        ):
            stranger.jobs()
        said += [str(unknown.value), repr(unknown.value.__cause__)]
    return said


def _misuse(ring: Arena) -> list[str]:
    """The command line with a key where a token should be."""
    keys = _keys(ring)
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "phalanx.cli", "--json"),
            *("--address", ring.cluster.address, "--ca", str(keys / "ca.pem")),
            *("--token-file", str(keys / "client.key"), "jobs"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    return [done.stdout, done.stderr]


def _secret_line(key: Path) -> str:
    """One line of the secret part of a key."""
    return re.sub(r"-----[^-]+-----", "", key.read_text()).strip().splitlines()[1]


def _processes(ring: Arena) -> list[psutil.Process]:
    found = []
    for member in ring.cluster.processes():
        process = psutil.Process(member.pid)
        found += [process, *process.children(recursive=True)]
    return found


def test_strangers_get_nothing_from_a_cluster_with_keys(tmp_path: Path) -> None:
    with arena(tmp_path, 1, secure=True) as ring:
        address, ca = ring.cluster.address, _keys(ring) / "ca.pem"
        for keys, code in (
            ({}, "UNAVAILABLE"),
            ({"ca": ca}, "UNAUTHENTICATED"),
            ({"ca": ca, "token": "phx_x"}, "UNAUTHENTICATED"),
            ({"token": "phx_x"}, "UNAVAILABLE"),
        ):
            with (
                phalanx.connect(address, timeout_s=5, **keys) as stranger,
                pytest.raises(PhalanxError) as refused,
            ):
                stranger.jobs()
            assert refused.value.code.value == code, keys
        for member in ring.cluster.processes():
            with grpc.insecure_channel(member.address) as channel:
                call = channel.unary_unary("/grpc.health.v1.Health/Check")
                with pytest.raises(grpc.RpcError) as unreadable:
                    call(b"", timeout=10)
                assert unreadable.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_recorded_submission_gives_the_same_job_again(tmp_path: Path) -> None:
    """Byte by byte what a client sent, sent again, also after others lead and storage has started
    anew: nothing new comes of it, and with the token of somebody else nothing at all."""
    with arena(tmp_path, 1, secure=True, controls=2) as ring:
        keys = _keys(ring)
        job = gated_job(steps=5)
        recorded = SubmitJobRequest(spec=as_document(job).spec, request_id="nightly-1")
        first = ring.cluster.submit(job, request_id="nightly-1")
        viewer = tokens.create(keys / TOKENS_FILE, "ann", Role.VIEWER)
        elsewhere = tokens.create(
            keys / TOKENS_FILE, "bob", Role.SUBMITTER, namespaces=["speech"], permissions=[CODE]
        )
        admin = (keys / "admin.token").read_text().strip()
        credentials = grpc.ssl_channel_credentials((keys / "ca.pem").read_bytes())
        with grpc.secure_channel(ring.cluster.address, credentials) as channel:
            call = channel.unary_unary(methods.SUBMIT_JOB.path)

            def replay(token: str) -> bytes:
                metadata = (("authorization", f"Bearer {token}"),)
                answer = call(recorded.SerializeToString(), timeout=GUARD_S, metadata=metadata)
                assert isinstance(answer, bytes)
                return answer

            def replayed() -> str:
                try:
                    return str(SubmitJobResponse.FromString(replay(admin)).job.id)
                except grpc.RpcError as error:
                    if from_rpc_error(error).code.value not in ("UNAVAILABLE", "ABORTED"):
                        raise
                    return ""

            def refused() -> list[str]:
                found = []
                for token in (viewer, elsewhere, "phx_old"):
                    with pytest.raises(grpc.RpcError) as caught:
                        replay(token)
                    found.append(from_rpc_error(caught.value).code.value)
                return found

            for _ in range(3):
                assert replayed() == first.id
            assert refused() == ["PERMISSION_DENIED", "PERMISSION_DENIED", "UNAUTHENTICATED"]
            first.wait(timeout_s=GUARD_S)
            generation = ring.cluster.describe().generation
            for role in ("control", "storage"):
                for member in ring.cluster.processes():
                    if member.role == role:
                        ring.signal(member.id)
                assert wait_until(replayed, f"an answer after the death of {role}") == first.id
            assert refused() == ["PERMISSION_DENIED", "PERMISSION_DENIED", "UNAUTHENTICATED"]
            assert ring.cluster.describe().generation > generation
        assert len(ring.cluster.jobs()) == 1
