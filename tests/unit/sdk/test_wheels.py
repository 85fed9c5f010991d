"""The list of wheels, which all namespaces share and everybody who brings code appends to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coordinator.control.submission import wheel_of
from phalanx.sdk.wheels import Wheel, Wheels
from phalanx.v1 import storage_service_pb2

WHEEL = Wheel("net-1.0-py3-none-any.whl", "0" * 64, 7)
STRANGE = [
    b"",
    b"\xff",
    b"7",
    b"{}",
    b"[" * 100_000,
    b'{"sha256": 1' + b"0" * 5000 + b"}",
    json.dumps({**WHEEL.to_json(), "size_bytes": "many"}).encode(),
]


class Storage:
    """Answers a read of the journal."""

    def __init__(self, records: list[bytes]) -> None:
        self._records = records

    def stream(self, _method: Any, _request: Any) -> Any:
        answer = storage_service_pb2.ReadJournalResponse()
        for payload in self._records:
            answer.records.add(payload=payload)
        yield answer


@pytest.mark.parametrize("strange", STRANGE, ids=range(len(STRANGE)))
def test_what_is_no_wheel_keeps_nobody_from_the_others(strange: bytes) -> None:
    good = json.dumps(WHEEL.to_json()).encode()
    backend: Any = Storage([strange, good])
    assert Wheels(backend).list() == [WHEEL]
    assert WHEEL.sha256 in {wheel_of(record) for record in (strange, good)}
