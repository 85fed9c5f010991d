"""Hostile peers against a real server: it stays small, lives, and answers honest callers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from phalanx.clients.storage import SyncStorageClient
from phalanx.testing.attackers import HELD_STREAMS, MUTE_CONNECTIONS, Attack
from phalanx.testing.storage_process import StorageProcess

pytestmark = pytest.mark.slow

GROWTH_LIMIT_BYTES = 64 * 1024 * 1024
REFUSED_GROWTH_LIMIT_BYTES = 12 * 1024 * 1024
"""Of messages that are refused because of their size only the beginning is received."""
HONEST_CALLS = 50


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StorageProcess]:
    with StorageProcess(tmp_path_factory.mktemp("hostile") / "state") as process:
        honest_calls(process)
        yield process


def honest_calls(storage: StorageProcess) -> None:
    for number in range(HONEST_CALLS):
        content = b"honest %d" % number
        with SyncStorageClient(storage.address) as client:
            assert client.get_blob(client.put_blob(content)) == content


def memory_bytes(storage: StorageProcess, what: str) -> int:
    status = Path(f"/proc/{storage.pid}/status").read_text()
    return int(dict(line.split(":", 1) for line in status.splitlines())[what].split()[0]) * 1024


# Compressed bombs have a test of their own: they cost their sender too much for this one.
@pytest.mark.parametrize(
    "kind",
    [
        "mute_connections",
        "held_streams",
        "watching_streams",
        "oversized_messages",
        "deep_messages",
    ],
)
def test_an_attack_costs_little_memory_and_no_honest_call(
    storage: StorageProcess, kind: str
) -> None:
    before = memory_bytes(storage, "VmRSS")
    Path(f"/proc/{storage.pid}/clear_refs").write_text("5")
    pid = storage.pid
    with Attack(kind, storage.address) as attack:
        honest_calls(storage)
    growth = memory_bytes(storage, "VmHWM") - before
    assert storage.running()
    assert storage.pid == pid
    assert growth <= GROWTH_LIMIT_BYTES
    if kind == "mute_connections":
        assert attack.report["most_open"] == MUTE_CONNECTIONS, "the attack never stood"
    elif kind == "watching_streams":
        assert attack.report["messages"] >= HELD_STREAMS, "the attack never stood"
    elif kind == "oversized_messages":
        assert growth <= REFUSED_GROWTH_LIMIT_BYTES
        assert attack.report["RESOURCE_EXHAUSTED"] > 0
    elif kind == "deep_messages":
        assert attack.report["INVALID_ARGUMENT"] > 0
