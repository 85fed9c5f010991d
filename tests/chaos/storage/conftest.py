"""Storage as a real process on real disks that fill up and fail."""

import os
import socket
import subprocess

import pytest

from phalanx.testing.storage_process import StorageProcess


@pytest.fixture
def free_port():
    """A port that was free a moment ago."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own with 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def small_storage(small_disk):
    with StorageProcess(
        small_disk / "state", arguments=["--reserve-bytes", "1MiB", "--gc-interval-s", "0"]
    ) as storage:
        yield storage
