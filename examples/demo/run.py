"""The demonstration: train, kill a worker half way, get the same bits as without the death.

Run it with ``make demo``. Everything happens on this machine, in a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import phalanx
from phalanx.cli.context import Settings
from phalanx.cli.watch import follow
from phalanx.errors import PhalanxError

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data" / "fashion-mnist-small"
JOB = HERE / "job.yaml"
WORKERS = 4
ACCURACY = "test/accuracy"
ACCURACY_AT_LEAST = 0.85


@dataclass
class Kill:
    """What the assassin did; ``worker_id`` is empty where it came too late."""

    worker_id: str = ""
    pid: int = 0
    step: int = 0
    time_unix_s: float = 0.0


def main() -> int:
    """Run the demonstration; 0 when a worker died, and accuracy and hashes are as they must be."""
    parser = argparse.ArgumentParser(prog="make demo", description=main.__doc__)
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), help="where the curves go")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="phalanx-demo-") as folder:
        # Else the plotting library leaves a cache and a folder of settings in the home folder.
        os.environ.setdefault("MPLCONFIGDIR", folder)
        sha256, accuracy, kill = with_a_death(arguments.plot)
    print("\nThe same job on one undisturbed worker …", flush=True)
    undisturbed = without_a_death()
    print(f"  sha256        {undisturbed}")
    equal = sha256 == undisturbed
    print(f"\ntest accuracy   {accuracy:.4f}  (must be {ACCURACY_AT_LEAST} or more)")
    print(f"same bits       {'yes' if equal else 'NO: ' + sha256}")
    print(f"curves          {arguments.plot.resolve()}")
    print(f"took            {time.monotonic() - started:.0f} s")
    # Without a death equal bits show nothing.
    return 0 if equal and accuracy >= ACCURACY_AT_LEAST and kill.worker_id else 1


def with_a_death(plot: Path) -> tuple[str, float, Kill]:
    """Train on four workers and kill one half way; return hash, test accuracy and the deed."""
    print(f"Starting storage, control, an aggregator and {WORKERS} workers …", flush=True)
    with phalanx.LocalCluster(workers=WORKERS) as cluster:
        for process in cluster.processes():
            print(f"  {process.id:14} pid {process.pid}")
        dataset = cluster.data.add("fashion", str(DATA))
        train, test = dataset.rows["train"], dataset.rows["test"]
        print(f"Data set fashion: {train:,} images to train on, {test:,} to test with")
        job = cluster.submit(JOB)
        kill = Kill()
        assassin = threading.Thread(target=kill_half_way, args=(cluster, job.id, kill), daemon=True)
        assassin.start()
        code = follow(cluster.get(job.id), Settings(), plot=plot)
        if code == 130:
            raise KeyboardInterrupt
        assassin.join(timeout=10)
        tell_recovery(cluster, job.id, kill)
        result = job.wait(timeout_s=60)
        return result.parameters_sha256, result.metrics[ACCURACY], kill


def without_a_death() -> str:
    """Train the same job on one worker that nobody disturbs; return the hash."""
    with phalanx.LocalCluster(workers=1) as cluster:
        cluster.data.add("fashion", str(DATA))
        return cluster.submit(JOB).wait(timeout_s=300).parameters_sha256


def kill_half_way(cluster: phalanx.LocalCluster, job_id: str, kill: Kill) -> None:
    """Kill a worker that holds shards with SIGKILL once half of the steps are done."""
    # Ctrl-C stops the cluster, and with it what is watched here.
    with contextlib.suppress(PhalanxError):
        for update in cluster.get(job_id).watch():
            busy = [worker.worker_id for worker in update.workers if worker.shards]
            if busy and update.total_steps and update.step >= update.total_steps // 2:
                victim = cluster.process(busy[-1])
                kill.worker_id, kill.pid, kill.step = victim.id, victim.pid, update.step
                kill.time_unix_s = time.time()
                os.kill(victim.pid, signal.SIGKILL)
                return


def tell_recovery(cluster: phalanx.Cluster, job_id: str, kill: Kill) -> None:
    """Print what the event log says about the death."""
    if not kill.worker_id:
        print("the job was over before half of its steps were seen; nobody was killed")
        return
    print(f"\nkilled          {kill.worker_id} (pid {kill.pid}, kill -9) at step {kill.step}")
    for event in cluster.events(job_id=job_id):
        committed = event.details.get("committed_unix_s")
        if event.type == "RECOVERED" and committed is not None:
            seconds = float(committed) - kill.time_unix_s
            print(f"next step       committed {seconds:.3f} s after the kill")
            return


def _terminated(*_: object) -> None:
    sys.exit(143)


if __name__ == "__main__":
    # An exception, unlike the signal itself, lets everything be cleaned up.
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; everything that was started has been stopped", file=sys.stderr)
        sys.exit(130)
