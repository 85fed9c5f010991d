import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from phalanx.cli.main import run
from phalanx.testing.servers import ScriptedCluster


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    def error(self) -> Any:
        return json.loads(self.err)


Phalanx = Callable[..., Outcome]


@pytest.fixture
def cluster() -> Iterator[ScriptedCluster]:
    with ScriptedCluster() as scripted:
        yield scripted


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory):
    """No cluster of this machine and no setting of the developer reaches a test."""
    home = tmp_path_factory.mktemp("home")
    for name in ("PHALANX_ADDRESS", "PHALANX_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PHALANX_STATE", str(home / "state"))
    monkeypatch.setenv("PHALANX_CACHE", str(home / "cache"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def offline(capsys: pytest.CaptureFixture[str]) -> Phalanx:
    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = run(arguments)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def phalanx(offline: Phalanx, cluster: ScriptedCluster) -> Phalanx:
    def call(*arguments: str) -> Outcome:
        return offline("--address", cluster.address, *arguments)

    return call
