"""What a command that reads large files takes beside the data, seen in a process of its own."""

import json
import platform
import subprocess
import sys

import pytest

from phalanx.cli.main import main

THREADS = 16
PROGRAM = """
import json, os, pathlib, sys, threading

def address_space_kib():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmSize:")[2].split()[0])

if "bounded" in sys.argv:
    from phalanx.cli.memory import bound_memory

    bound_memory()
import numpy, pyarrow, pyarrow.csv, threadpoolctl

before_kib = address_space_kib()
count = int(sys.argv[1])
meet = threading.Barrier(count + 1)

def work():
    kept = bytearray(1000)
    meet.wait(20)
    meet.wait(20)

threads = [threading.Thread(target=work) for _ in range(count)]
for thread in threads:
    thread.start()
meet.wait(20)
after_kib = address_space_kib()
meet.wait(20)
print(json.dumps({
    "pool": pyarrow.default_memory_pool().backend_name,
    "arrow_threads": pyarrow.cpu_count(),
    "blas_threads": max(each["num_threads"] for each in threadpoolctl.threadpool_info()),
    "kib_per_thread": (after_kib - before_kib) / count,
}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_threads_and_allocators_reserve_little():
    def seen(how):
        command = [sys.executable, "-c", PROGRAM, str(THREADS), how]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return json.loads(done.stdout)

    bounded = seen("bounded")
    assert bounded["pool"] == "system"
    assert (bounded["arrow_threads"], bounded["blas_threads"]) == (1, 1)
    # A stack with its guard page, and no heap of its own.
    assert bounded["kib_per_thread"] < 1200
    assert seen("as it comes")["kib_per_thread"] > 4 * 1200


@pytest.mark.parametrize(
    ("arguments", "bounds"),
    [
        (["data", "add", "--help"], True),
        (["--json", "--namespace", "data", "data", "add", "--help"], True),
        (["data", "list", "--help"], False),
        (["up", "--help"], False),
    ],
)
def test_only_a_program_that_reads_large_files_is_bounded(arguments, bounds, monkeypatch, capsys):
    called = []
    monkeypatch.setattr("phalanx.cli.memory.bound_memory", lambda: called.append(True))
    monkeypatch.setattr(sys, "argv", ["phalanx", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0, capsys.readouterr().err
    assert bool(called) == bounds
