"""The commands of the section on keys, as they stand there: a cluster comes of them, and answers
every call by grpcurl that any document has for a cluster with keys."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import phalanx
from phalanx.local.ports import free_ports
from phalanx.testing.arena import GUARD_S, wait_until
from phalanx.testing.datasets import REPOSITORY, classification
from tests.system import documents

pytestmark = pytest.mark.slow

SERVICES = ("storage", "coordinator", "aggregator", "worker")
PORTS = ("7410", "7411", "7420", "7421", "7430")


def _blocks() -> list[str]:
    text = (REPOSITORY / "docs" / "OPERATIONS.md").read_text()
    section = text.partition("\n### Keys\n")[2].partition("\n### ")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


def _here(command: str, ports: dict[str, str]) -> str:
    """The same on this machine and on free ports."""
    for documented, port in ports.items():
        command = re.sub(rf":{documented}\b", f":{port}", command)
    return command.replace("train.example", "localhost").replace("/var/lib/phalanx", "state")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs = documents.install(tmp_path / "bin", "phalanx", "grpcurl")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextlib.contextmanager
def _services(commands: list[str], exports: dict[str, str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for command in commands:
            words = shlex.split(command)
            if words[1] == "worker":
                words += ["--slots", "1", "--cache-dir", "cache"]
            log = stack.enter_context(open(f"{words[1]}.log", "wb"))
            process = subprocess.Popen(words, env={**os.environ, **exports}, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def _call_by_grpcurl(folder: Path, ports: dict[str, str], anns: phalanx.Job) -> None:
    """Each call with the token that its document has exported before."""
    calls = documents.calls_by_grpcurl(plaintext=False)
    assert [document for document, _ in calls] == ["DEPLOYMENT.md", "OPERATIONS.md"]
    submitting, listing = (_here(command, ports) for _, command in calls)
    tokens = {name: (folder / f"{name}.token").read_text().strip() for name in ("ann", "eve")}
    [answer] = documents.run_grpcurl(listing, folder, {"TOKEN": tokens["ann"]})
    assert [each["id"] for each in answer["jobs"]] == [anns.id]
    for path in (REPOSITORY / "deploy/job.json", folder / "keys/ca.pem"):
        shutil.copy(path, folder)
    with phalanx.connect(token=folder / "eve.token") as eve:
        eve.data.add("fashion", *classification(4096, 4, 2), test=0.2)
        [answer] = documents.run_grpcurl(submitting, folder, {"TOKEN": tokens["eve"]})
        job = eve.get(answer["job"]["id"])
        assert job.message.submitter == "eve"
        # Of its 200 epochs none is waited for.
        job.cancel()
        # The token decides, and not whoever has the address.
        with pytest.raises(AssertionError, match="this token is not known here"):
            documents.run_grpcurl(submitting, folder, {"TOKEN": "phx_made_up"})


def test_the_commands_make_a_cluster_with_keys(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    making, serving, calling = (_here(block, ports) for block in _blocks())
    subprocess.run(["sh", "-eu", "-c", making], check=True, timeout=GUARD_S)
    assert (folder / "ann.token").stat().st_mode & 0o077 == 0
    lines = serving.replace("\\\n", " ").splitlines()
    exports = dict(word.split("=") for word in shlex.split(lines[0])[1:])
    assert [shlex.split(line)[1] for line in lines[1:]] == list(SERVICES)
    settings = calling.splitlines()[0]
    for word in shlex.split(settings)[1:]:
        monkeypatch.setenv(*word.split("="))
    with _services(lines[1:], exports), phalanx.connect(namespace="vision") as ann:

        def is_ready() -> bool:
            with contextlib.suppress(phalanx.PhalanxError):
                found = ann.describe()
                return len(found.workers) == len(found.aggregators) == 1
            return False

        wait_until(is_ready, "the cluster to be there")
        x = np.random.default_rng(1).normal(size=(400, 4)).astype("float32")
        ann.data.add("digits", x, (x[:, 0] > 0).astype("int64"), test=0.2)
        (folder / "job.yaml").write_text(
            "name: first\nnamespace: vision\ndata: {name: digits, shards: 2}\n"
            "train: {model: {logistic_regression: {}}, batch_size: 160, stop: {steps: 4}}\n"
        )
        submit = next(line for line in calling.splitlines() if " submit " in line)
        done = subprocess.run(shlex.split(submit), check=False, timeout=GUARD_S)
        assert done.returncode == 0
        (job,) = ann.jobs()
        assert job.message.submitter == "ann"
        with phalanx.connect(token=folder / "eve.token") as eve:
            assert not eve.jobs()
            assert eve.get(job.id).done
        _call_by_grpcurl(folder, ports, job)
        # Exchanged and revoked while it runs.
        subprocess.run(["phalanx", "certs", "renew", "--dir", "keys"], check=True)
        assert ann.get(job.id).done
        tokens = ["--tokens", "keys/tokens.json"]
        subprocess.run(["phalanx", "token", "revoke", "ann", *tokens], check=True)
        with pytest.raises(phalanx.PhalanxError, match="not known"):
            ann.jobs()
