"""Reading a file takes the same memory whatever its size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import phalanx
from phalanx.testing.arena import GUARD_S
from phalanx.testing.datasets import REPOSITORY

pytestmark = pytest.mark.slow

LIMIT_BYTES = 512 * 1024 * 1024

CHILD = """
import hashlib, json, pathlib, sys
from phalanx.cli.memory import bound_memory
bound_memory()
from phalanx.data.ingest import ingest
from phalanx.data.options import IngestOptions

class Discard:
    def put(self, data):
        return hashlib.sha256(data).hexdigest()

options = IngestOptions(missing="category", test=0.1, block_bytes=int(sys.argv[2]))
manifest = ingest(sys.argv[1], options, Discard())
# Not ru_maxrss: a child inherits it from the process that started it.
status = pathlib.Path("/proc/self/status").read_text()
peak_kib = int(status.partition("VmHWM:")[2].split()[0])
rows = manifest.rows_by_split()
print(json.dumps({"rows": rows, "peak_bytes": peak_kib * 1024, "size_bytes": manifest.size_bytes}))
"""


LINKED = """
import json, pathlib, sys
from phalanx.data.ingest import ingest
from phalanx.data.link_plans import places_of, plan_of
from phalanx.data.linked_chunks import ChunkMaker, OpenFiles
from phalanx.data.linking import Digests
from phalanx.data.options import IngestOptions

path = pathlib.Path(sys.argv[1])
manifest = ingest(path, IngestOptions(link=True, test=0.1), Digests())
files = OpenFiles([str(path.parent)], 4 << 20)
maker = ChunkMaker(plan_of(manifest), files)
places = [place for place, *_ in places_of(manifest).values()]
for place in (places[-1], places[len(places) // 2], places[0]):
    maker.make(place)
status = pathlib.Path("/proc/self/status").read_text()
print(json.dumps({"peak_bytes": int(status.partition("VmHWM:")[2].split()[0]) * 1024}))
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
    return run_in_child(CHILD, str(path), str(block_bytes))


def run_in_child(program: str, *arguments: str) -> dict[str, object]:
    finished = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "ARROW_DEFAULT_MEMORY_POOL": "system",
        },
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


def test_a_row_group_of_any_size_takes_no_more_memory(tmp_path: Path) -> None:
    """Linked files are read by a process that keeps a few batches, not a row group."""
    peaks = []
    path = tmp_path / "a.parquet"
    generator = np.random.default_rng(1)
    for rows in (200_000, 1_200_000):
        columns = {f"x{index}": generator.normal(size=rows) for index in range(16)}
        table = pa.table({**columns, "y": np.arange(rows) % 2 == 0})
        pyarrow.parquet.write_table(table, path, row_group_size=rows)
        size_bytes = path.stat().st_size
        peaks.append(int(str(run_in_child(LINKED, str(path))["peak_bytes"])))
    path.unlink()
    assert size_bytes > 120_000_000
    assert peaks[1] - peaks[0] < 32 * 1024 * 1024


@pytest.mark.parametrize(
    "size_bytes",
    [
        600_000_000,
        pytest.param(4_000_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
)
def test_a_file_larger_than_the_memory_goes_through_the_command(
    tmp_path: Path, size_bytes: int
) -> None:
    """The program as a user starts it, with a limit on its addresses, against a real storage."""
    assert size_bytes > LIMIT_BYTES
    path = tmp_path / "data.csv"
    rows = write_csv(path, size_bytes)
    try:
        with phalanx.LocalCluster(workers=1, slots=1, state=tmp_path / "state") as cluster:
            limited = ["sh", "-c", f'ulimit -v {LIMIT_BYTES // 1024} && exec "$@"', "sh"]
            program = [sys.executable, "-P", "-m", "phalanx.cli", "--address", cluster.address]
            options = ["--missing", "category", "--test", "0.1"]
            added = subprocess.run(
                [*limited, *program, "data", "add", "large", str(path), *options],
                capture_output=True,
                text=True,
                check=False,
                timeout=GUARD_S + size_bytes / 5_000_000,
            )
            assert (added.returncode, added.stdout) == (0, "large@1\n"), added.stderr[-2000:]
            assert cluster.data.get("large").rows == {"train": rows * 9 // 10, "test": rows // 10}
    finally:
        # Test runners keep the folders of their last runs.
        path.unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "state", ignore_errors=True)
