"""A process ends as one that calls sys.exit, but that it takes nothing apart."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GUARD_S = 60.0

PROGRAM = """
import atexit, sys, threading
from concurrent.futures import ThreadPoolExecutor
from phalanx.ending import end_process

class Kept:
    def __del__(self):
        print("taken apart")

def last(text):
    kept.text = text
    print(text)

kept = Kept()
atexit.register(last, "hook")
print("main")
said = ThreadPoolExecutor(1).submit(sys.stdin.readline)
threading.Thread(target=lambda: print("thread", said.result())).start()
"""


def ended(how: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-E", "-P", "-c", f"{PROGRAM}\n{how}"],
        input="heard",
        stderr=subprocess.PIPE,
        text=True,
        timeout=GUARD_S,
        check=False,
        **options,
    )


def test_everything_happens_but_taking_apart() -> None:
    there = ended("sys.exit(3)", stdout=subprocess.PIPE)
    here = ended("end_process(3)", stdout=subprocess.PIPE)
    assert (here.returncode, here.stderr) == (there.returncode, there.stderr) == (3, "")
    assert there.stdout == "main\nthread heard\nhook\ntaken apart\n"
    assert here.stdout == "main\nthread heard\nhook\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_written_is_told_as_ever() -> None:
    with open("/dev/full", "w") as full:
        there, here = (ended(how, stdout=full) for how in ("sys.exit(3)", "end_process(3)"))
    assert here.returncode == there.returncode != 3
    assert "No space left on device" in here.stderr


FILE_OF_OTHERS = """
import sys
from phalanx.cli import entry, main
from phalanx.models.code import OneProcess

def runs_code_of_a_job():
    with OneProcess():
        main.file = open(sys.argv[1], "w")
        main.file.write("told")
    sys.exit(3)

main.main = runs_code_of_a_job
entry.main()
"""


def test_what_code_of_a_job_has_not_closed_is_written(tmp_path: Path) -> None:
    """Interpreters write it when they take themselves apart."""
    command = [sys.executable, "-E", "-P", "-c", FILE_OF_OTHERS, str(tmp_path / "file")]
    assert subprocess.run(command, timeout=GUARD_S, check=False).returncode == 3
    assert (tmp_path / "file").read_text() == "told"
