"""What all tests share: their order, and how the logs of services that run inside them look."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from phalanx.testing import object_server as objects
from phalanx.testing import postgres_server as postgres
from phalanx.testing import stores
from phalanx.testing.memory_folder import memory_folder
from tests.warm import WarmServer, warm_clusters

ROOM_BYTES = 4 << 30
"""More than the tests that run by default have in files at any one time."""

LONGEST = Path(__file__).parent / "simulation" / "test_simulation.py"
"""The file of tests that takes longest."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stores",
        choices=stores.CHOICES,
        default=stores.EMBEDDED,
        help="What the storage of clusters in tests/chaos keeps things in.",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Soaks may write any number of gigabytes; what runs by default does not.
    if config.option.markexpr == "not soak" and (memory := memory_folder(ROOM_BYTES)):
        os.environ.setdefault("TMPDIR", str(memory))
        tempfile.tempdir = None  # looked up again
    # A shell starts what runs in the background with Ctrl-C ignored, and every process that a test
    # starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Services set their logs up when they start. Without that structlog draws every local variable
    # of a traceback, which takes half a minute where these are large arrays.
    plain = structlog.dev.plain_traceback
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=plain),
        ]
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files that take long come first, so that none is left to one process. The longest never waits
    # for anything; beside it are those that wait for other processes.
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: (item.path != LONGEST, item.path not in slow))


@pytest.fixture(scope="session")
def warm_server() -> Iterator[WarmServer]:
    """A process that has loaded what members of clusters need."""
    made = WarmServer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def loaded_code(warm_server: WarmServer) -> Iterator[None]:
    """Clusters of this module start from code that is loaded already."""
    with warm_clusters(warm_server):
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.PostgresServer]:
    """A PostgreSQL server without databases, one for each process of tests that asks for it."""
    if reason := postgres.why_not():
        pytest.skip(reason)
    with postgres.PostgresServer() as server:
        yield server


@pytest.fixture(scope="session")
def object_server() -> Iterator[objects.ObjectServer]:
    """An S3 server without buckets, which the environment says how to reach."""
    if reason := objects.why_not():
        pytest.skip(reason)
    with objects.ObjectServer() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
