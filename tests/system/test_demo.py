"""The demonstration: it shows what it says, and broken off it ends at once and leaves nothing."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from phalanx.testing.arena import GUARD_S
from phalanx.testing.datasets import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture
def demo() -> ModuleType:
    """The module of the demonstration, to be changed at will."""
    spec = importlib.util.spec_from_file_location("demo", REPOSITORY / "examples/demo/run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    del sys.modules[spec.name]
    return module


def test_it_kills_a_worker_and_gets_the_same_bits(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With fewer steps, which are enough for all but the accuracy."""
    demo.JOB = tmp_path / "job.yaml"
    text = (REPOSITORY / "examples/demo/job.yaml").read_text()
    assert "epochs: 80" in text
    demo.JOB.write_text(text.replace("epochs: 80", "epochs: 12"))
    demo.WORKERS, demo.ACCURACY_AT_LEAST = 2, 0.75
    plot = tmp_path / "demo.png"
    monkeypatch.setattr(sys, "argv", ["demo", "--plot", str(plot)])
    # This process goes on when the demo's own folder is gone, and would make it again.
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path))
    assert demo.main() == 0
    said = capsys.readouterr().out
    for words in ("killed          worker-", "s after the kill", "same bits       yes"):
        assert words in said
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("sha256", "accuracy", "victim", "code"),
    [
        ("ab", 0.85, "worker-1", 0),
        ("cd", 0.85, "worker-1", 1),
        ("ab", 0.84, "worker-1", 1),
        ("ab", 0.85, "", 1),
    ],
)
def test_whatever_is_missing_makes_it_fail(
    demo: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    sha256: str,
    accuracy: float,
    victim: str,
    code: int,
) -> None:
    kill = demo.Kill(worker_id=victim)
    monkeypatch.setattr(sys, "argv", ["demo"])
    monkeypatch.setattr(demo, "with_a_death", lambda _: (sha256, accuracy, kill))
    monkeypatch.setattr(demo, "without_a_death", lambda: "ab")
    monkeypatch.setenv("MPLCONFIGDIR", "unused")
    assert demo.main() == code


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
