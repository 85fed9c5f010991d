"""Ingestion of a CSV file takes the same memory whatever the size of the file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from phalanx.data.options import IngestOptions
from phalanx.testing.datasets import REPOSITORY

pytestmark = pytest.mark.slow

LIMIT_BYTES = 512 * 1024 * 1024

# Runs in a process of its own, whose address space is limited before anything is imported.
CHILD = """
import hashlib, json, pathlib, resource, sys
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from phalanx.data.ingest import ingest
from phalanx.data.options import IngestOptions

class Discard:
    def put(self, data):
        return hashlib.sha256(data).hexdigest()

options = IngestOptions(missing="category", test=0.1, block_bytes=int(sys.argv[3]))
manifest = ingest(sys.argv[1], options, Discard())
# Not ru_maxrss: a child inherits it from the process that started it.
status = pathlib.Path("/proc/self/status").read_text()
peak_kib = int(status.partition("VmHWM:")[2].split()[0])
rows = manifest.rows_by_split()
print(json.dumps({"rows": rows, "peak_bytes": peak_kib * 1024, "size_bytes": manifest.size_bytes}))
"""


def write_csv(path: Path, size_bytes: int) -> int:
    """Numbers, categories and missing values; returns the number of rows."""
    lines = [
        ",".join(f"{(index * factor) % 1000 - 500 + factor / 7:.5f}" for factor in range(1, 11))
        + f",{('red', 'green', '?')[index % 3]},{('yes', 'no')[index % 2]}\n"
        for index in range(10_000)
    ]
    block = "".join(lines).encode()
    count = -(-size_bytes // len(block))
    with path.open("wb") as file:
        file.write(b"a,b,c,d,e,f,g,h,i,j,colour,label\n")
        for _ in range(count):
            file.write(block)
    return count * len(lines)


def ingest_in_child(path: Path, block_bytes: int) -> dict[str, object]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        # Threads reserve address space that they never touch; the limit here is on addresses.
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "ARROW_DEFAULT_MEMORY_POOL": "system",
    }
    finished = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(LIMIT_BYTES), str(block_bytes)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    result: dict[str, object] = json.loads(finished.stdout)
    return result


def test_thirty_times_the_rows_take_no_more_memory(tmp_path: Path) -> None:
    peaks = []
    for size_bytes in (10_000_000, 300_000_000):
        rows = write_csv(tmp_path / "data.csv", size_bytes)
        # Small blocks, since the parser reads some dozens of them ahead where there are as many.
        result = ingest_in_child(tmp_path / "data.csv", block_bytes=1 << 17)
        assert result["rows"] == {"train": rows * 9 // 10, "test": rows // 10}
        peaks.append(result["peak_bytes"])
    assert result["size_bytes"] > 150_000_000  # more than the peaks may differ by
    assert peaks[1] - peaks[0] < 16 * 1024 * 1024


@pytest.mark.parametrize(
    "size_bytes",
    [
        600_000_000,
        pytest.param(4_000_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_a_file_larger_than_the_memory_fits_through(tmp_path: Path, size_bytes: int) -> None:
    assert size_bytes > LIMIT_BYTES
    path = tmp_path / "data.csv"
    try:
        rows = write_csv(path, size_bytes)
        result = ingest_in_child(path, IngestOptions().block_bytes)
    finally:
        path.unlink(missing_ok=True)
    assert result["rows"] == {"train": rows * 9 // 10, "test": rows // 10}
    assert isinstance(result["peak_bytes"], int)
    assert result["peak_bytes"] < LIMIT_BYTES // 2
