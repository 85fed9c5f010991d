"""Log lines are JSON with names that are the same everywhere."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from phalanx.telemetry.logs import configure_logging, get_logger
from phalanx.testing.logging import unconfigured_afterwards

# Made at import, before logs are configured, as modules do.
log = get_logger("phalanx.example")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    with unconfigured_afterwards():
        yield


def _lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_line_has_who_what_when_and_the_ids(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("worker", "worker-1")
    log.info("leaf_finished", job_id="job-1", step=7, shard=3)
    log.info("idle")
    leaf, idle = _lines(capsys)
    assert leaf["time"].endswith("Z")
    expected = {
        "event": "leaf_finished",
        "id": "worker-1",
        "job_id": "job-1",
        "level": "info",
        "logger": "phalanx.example",
        "role": "worker",
        "shard": 3,
        "step": 7,
        "worker_id": "worker-1",
    }
    assert {key: leaf[key] for key in expected} == expected
    assert "job_id" not in idle


def test_only_a_worker_is_named_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("control", "control-1")
    log.info("worker_joined", worker_id="worker-3")
    log.info("idle")
    joined, idle = _lines(capsys)
    assert (joined["id"], joined["worker_id"]) == ("control-1", "worker-3")
    assert "worker_id" not in idle


def test_less_important_lines_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("worker", "worker-1", level="warning")
    log.info("hidden")
    log.warning("shown")
    assert [line["event"] for line in _lines(capsys)] == ["shown"]


def test_traceback_is_one_field_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("worker", "worker-1")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed")
    (line,) = _lines(capsys)
    assert "ValueError: broken" in line["exception"]
    assert line["level"] == "error"


def test_records_of_the_standard_library_have_the_same_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("control", "control-1")
    logging.getLogger("asyncio").warning("slow callback %s", 1)
    (line,) = _lines(capsys)
    assert (line["event"], line["logger"], line["role"]) == (
        "slow callback 1",
        "asyncio",
        "control",
    )


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("control", "control-1", format="text")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("failed", job_id="job-1")
    text = capsys.readouterr().err
    assert "failed" in text
    assert "job_id=job-1" in text
    assert "ValueError: broken" in text
