"""deploy/keys.sh: what it makes, who gets what, and that calling it again changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.keys import folder, tokens
from phalanx.keys.caller import CODE, Role
from phalanx.testing.datasets import REPOSITORY

KINDS = {"aggregator", "control", "storage", "worker"}
CALLED_BY_PEOPLE = {"control", "storage"}


class Volumes:
    """The volumes of the service `keys`, and the script in its container."""

    def __init__(self, path: Path) -> None:
        self.path = path / "volumes"
        for name in ("authority", *KINDS):
            (self.path / name).mkdir(parents=True)
        programs = path / "bin"
        programs.mkdir()
        phalanx = programs / "phalanx"
        phalanx.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m phalanx.cli "$@"\n')
        phalanx.chmod(0o755)
        self._environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "PHALANX_KEYS": str(self.path),
            "PHALANX_HOSTS": "storage train.example",
        }

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            ["sh", str(REPOSITORY / "deploy/keys.sh"), *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def contents(self) -> dict[str, bytes]:
        found = (each for each in self.path.rglob("*") if each.is_file())
        return {str(each.relative_to(self.path)): each.read_bytes() for each in found}


@pytest.fixture
def volumes(tmp_path: Path) -> Volumes:
    return Volumes(tmp_path)


def test_each_kind_is_given_what_it_needs_and_nothing_else(volumes: Volumes) -> None:
    assert volumes() == ""
    made = volumes.contents()
    for kind in KINDS:
        given = {name.removeprefix(f"{kind}/") for name in made if name.startswith(f"{kind}/")}
        wanted = {"ca.pem", "node.pem", "node.key"}
        assert given == wanted | ({"tokens.json"} if kind in CALLED_BY_PEOPLE else set())
        (issued,) = (e for e in folder.listing(volumes.path / kind) if e.name == "node")
        assert f"{kind}.phalanx.internal" in issued.names
        assert ("train.example" in issued.names) == (kind in CALLED_BY_PEOPLE)
    modes = {each.stat().st_mode & 0o777 for each in volumes.path.rglob("*.key")}
    assert modes == {0o600}


def test_what_people_need_can_be_read_and_what_is_new_is_handed_out(volumes: Volumes) -> None:
    ca, token = volumes("ca"), volumes("admin-token").strip()
    before = volumes.contents()
    assert ca.encode() == before["control/ca.pem"]
    caller = tokens.TokenFile(volumes.path / "storage/tokens.json").caller(token)
    assert (caller.role, caller.permissions) == (Role.ADMIN, {CODE})
    assert volumes("admin-token").strip() == token
    assert volumes.contents() == before
    ann = volumes("token", "create", "ann", "--role", "viewer").strip()
    for kind in CALLED_BY_PEOPLE:
        known = tokens.TokenFile(volumes.path / kind / "tokens.json")
        assert (known.caller(ann).name, known.caller(token).name) == ("ann", "admin")
    before = volumes.contents()
    volumes("certs", "renew", "worker")
    after = volumes.contents()
    assert {name for name in after if after[name] != before.get(name)} == {
        *(f"authority/keys/worker.{end}" for end in ("key", "pem")),
        *("worker/node.key", "worker/node.pem"),
    }


def test_one_that_was_ended_half_way_is_made_whole(volumes: Volumes) -> None:
    volumes()
    (volumes.path / "authority/admin.token").unlink()
    (volumes.path / "worker/node.pem").unlink()
    token = volumes("admin-token").strip()
    assert tokens.TokenFile(volumes.path / "control/tokens.json").caller(token).name == "admin"
    assert (volumes.path / "worker/node.pem").exists()
