"""The demonstration, broken off: it ends at once and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from phalanx.testing.arena import GUARD_S
from phalanx.testing.datasets import REPOSITORY

pytestmark = pytest.mark.slow


def test_a_demo_that_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    scratch, home = tmp_path / "tmp", tmp_path / "home"
    scratch.mkdir()
    home.mkdir()
    demo = subprocess.Popen(
        [sys.executable, "-P", "examples/demo/run.py", "--plot", str(tmp_path / "demo.png")],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(scratch), "HOME": str(home), "PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test that runs in the background would hand on that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    guard = threading.Timer(GUARD_S, demo.kill)
    guard.start()
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("step "):
                break
        services = psutil.Process(demo.pid).children(recursive=True)
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=GUARD_S)
    finally:
        guard.cancel()
        demo.kill()
    assert len(services) >= 7
    assert "Traceback" not in errors
    assert demo.returncode == 130
    gone, alive = psutil.wait_procs(services, timeout=GUARD_S)
    assert (len(gone), alive) == (len(services), [])
    assert list(scratch.iterdir()) == []
    assert list(home.iterdir()) == []
