"""The documented commands for backups, on a cluster in the midst of a job."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import phalanx
from phalanx.clients.storage_sync import SyncStorageClient
from phalanx.testing.arena import GUARD_S, Gate, add_blobs, arena, gated_job, wait_until
from phalanx.testing.datasets import REPOSITORY
from phalanx.testing.proxied_cluster import ProxiedCluster

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]


def _blocks() -> list[str]:
    text = (REPOSITORY / "docs" / "OPERATIONS.md").read_text()
    section = text.partition("\n### Backup and restore\n")[2].partition("\n### ")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)


def _run(command: str, folder: Path, environment: dict[str, str]) -> str:
    """Run what is documented, in this folder."""
    command = command.replace("/backups", str(folder / "backups"))
    words = shlex.split(command.replace("/var/lib/phalanx", str(folder / "state")), comments=True)
    assert words.pop(0) == "phalanx"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "phalanx.cli", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_job_that_was_half_done_ends_elsewhere_with_the_same_bits(
    tmp_path: Path, undisturbed_sha256: str
) -> None:
    saving, restoring = _blocks()
    with arena(tmp_path, 2) as ring:
        job = ring.submit(gated_job())
        ring.caught_at(job, 25)
        environment = {"PHALANX_ADDRESS": ring.cluster.address}
        for command in saving.strip().splitlines():
            _run(command, tmp_path, environment)
        # What the old cluster does later is not in the backup.
        ring.caught_at(job, 35)
        generation = ring.cluster.describe().generation
    restore, up, *rest = restoring.strip().splitlines()
    assert not rest
    assert "restored" in _run(restore, tmp_path, {})
    state = next(word for word in shlex.split(up) if word.startswith("/var/lib/phalanx"))
    folder = state.replace("/var/lib/phalanx", str(tmp_path / "state"))
    gate = {"PHALANX_TEST_GATE": str(tmp_path)}
    with phalanx.LocalCluster(workers=3, slots=1, state=folder, environment=gate) as elsewhere:
        found = elsewhere.get(job.id)
        result = found.wait(timeout_s=GUARD_S)
        assert elsewhere.describe().generation > generation
        assert found.message.progress.step == 60
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


@pytest.mark.usefixtures("embedded_only")  # it is restored into another folder
@pytest.mark.parametrize("topology", [{}, {"all_reduce": {}}], ids=["aggregator", "all-reduce"])
def test_members_that_are_ahead_of_what_was_restored_begin_again_from_it(
    tmp_path: Path, undisturbed_sha256: str, topology: dict[str, Any]
) -> None:
    """Everybody but storage and control lives on, and who owns the job has even finished it."""
    gate = Gate(tmp_path)
    folder, restored = str(tmp_path / "backups"), str(tmp_path / "restored")
    with ProxiedCluster(tmp_path, environment={"PHALANX_TEST_GATE": str(tmp_path)}) as ring:
        cluster, address = ring.cluster, ring.control.address
        add_blobs(cluster)
        wait_until(lambda: len(cluster.workers()) == 2, "the workers")
        gate.hold()
        job = cluster.submit(gated_job(**topology))
        gate.bring_to(job, 25)
        assert _outcome("backup", folder, address=address)[0] == 0
        ring.control.kill()
        gate.release()
        with SyncStorageClient(ring.storage.address) as storage:

            def is_over() -> bool:
                row = storage.get_job_row(job.id)
                return row is not None and row.HasField("final_checkpoint")

            wait_until(is_over, "the end of the job")
        ring.storage.kill()
        assert _outcome("restore", folder, "--state", restored, address="")[0] == 0
        ring.storage.restart("--state", restored)
        ring.control.restart()
        result = job.wait(timeout_s=GUARD_S)
        again = [each for each in cluster.events() if each.type == "STEPS_REPLAYED"]
        assert "from the checkpoint at step 20" in again[-1].message
    assert result.parameters_sha256 == undisturbed_sha256
    assert (result.examples_lost, result.examples_doubled) == (0, 0)


def _outcome(*words: str, address: str) -> tuple[int, str]:
    """Run a command; return its exit code and what it wrote."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "phalanx.cli", *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PHALANX_ADDRESS": address},
        check=False,
        capture_output=True,
        text=True,
        timeout=GUARD_S,
    )
    return done.returncode, done.stdout + done.stderr


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damage_is_told_by_name_and_exit_code(tmp_path: Path) -> None:
    backups = str(tmp_path / "backups")
    with phalanx.LocalCluster(workers=1, slots=1, state=tmp_path / "state") as cluster:
        add_blobs(cluster)
        (chunk, *_) = sorted((tmp_path / "state" / "storage" / "blobs").glob("*/*"))
        _flip(chunk)
        code, text = _outcome("scrub", address=cluster.address)
        assert (code, chunk.name in text, "data set default/blobs@1" in text) == (1, True, True)
        code, text = _outcome("backup", backups, address=cluster.address)
        assert (code, chunk.name in text) == (1, True)
        _flip(chunk)
        code, _ = _outcome("backup", backups, address=cluster.address)
        assert code == 0
        code, text = _outcome("backup", backups, "--verify", address="")
        assert code == 0
        _flip(tmp_path / "backups" / "blobs" / chunk.name[:2] / chunk.name)
        code, text = _outcome("backup", backups, "--verify", address="")
        assert (code, chunk.name in text) == (1, True)
        elsewhere = str(tmp_path / "elsewhere")
        code, text = _outcome("restore", backups, "--state", elsewhere, address="")
        assert (code, "is damaged" in text) == (6, True)
        # The next backup fetches it again.
        assert _outcome("backup", backups, address=cluster.address)[0] == 0
        assert _outcome("backup", backups, "--verify", address="")[0] == 0
        # One of damaged storage takes nobody's place.
        before = sorted((tmp_path / "backups" / "snapshots").glob("*.json"))
        (tmp_path / "backups" / "blobs" / chunk.name[:2] / chunk.name).unlink()
        _flip(chunk)
        code, _ = _outcome("backup", backups, "--keep", "1", address=cluster.address)
        assert (code, all(path.exists() for path in before)) == (1, True)
