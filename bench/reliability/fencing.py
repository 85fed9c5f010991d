"""Writes of a control process that leads no more: are any of them accepted?

Half of the trials pause the leader past its lease, let a standby take over, and continue it with a
command in its hands. The other half start a second process with the leader's own id, which storage
lets lead at once, while the first still believes that it does: two live coordinators. In both, the
old one is told to cancel a job, which it tries to journal. The journal says what was accepted:
every record names the generation that wrote it, and generations may only rise. An aggregator
or a worker that took an order of the old one would no longer do what the new one has it do, and a
job that runs for whoever leads would stop. How often they turned an old generation away is in their
logs: seldom, since a leader that storage refuses ends their sessions itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import phalanx
from bench.clusters import wait_for
from bench.reliability.jobs import patient_cluster, patient_job
from bench.reliability.rows import Row, Rows
from phalanx.clients.storage_sync import SyncStorageClient
from phalanx.errors import PhalanxError, Unavailable
from phalanx.local.state import Member, read_state
from phalanx.v1.control_journal_pb2 import ControlRecord

LEASE_S = 0.6
QUICK_LEASE = {"PHALANX_LEASE_TTL_S": str(LEASE_S), "PHALANX_HEARTBEAT_INTERVAL_S": "0.15"}
"""Who is fenced off does not depend on how long a lease is; how long a trial takes does."""
ANSWER_S = 10.0
REFUSAL_S = 3.0
GOES_ON_S, STEPS_ON = 30.0, 3
TURNED_AWAY = "was seen before"
"""What a member says that knows a later generation than that of whoever speaks to it."""
_REFUSED = re.compile(
    r'^grpc_server_handled_total\{grpc_code="ABORTED",grpc_method="(?:AppendJournal|RenewLease)",'
    r'grpc_service="phalanx.v1.StorageService"\} ([0-9.e+]+)$',
    re.MULTILINE,
)


def run(command: str, *, quick: bool) -> list[Row]:
    """`stale_writes_accepted`."""
    wanted = 6 if quick else 50
    refused = trials = attempts = stopped = 0
    with patient_cluster(2, 0.02, controls=2, environment=QUICK_LEASE) as running:
        while trials < wanted:
            attempts += 1
            if attempts > 3 * wanted:
                raise TimeoutError(f"only {trials} of {attempts} attempts made a stale write")
            before = _refusals(running)
            pawn = running.submit(patient_job(f"pawn-{attempts}", 2, 1_000_000))
            wait_for(lambda job=pawn: job.refresh().progress.step, "the first step")
            leader = running.process(running.describe().leader)
            if trials % 2:
                _two_live(running, leader, pawn)
            else:
                _pause_past_lease(running, leader, pawn)
            # A leader that hears of the new generation before it writes anything proves nothing.
            refusals = _soon_refused(running, before)
            trials, refused = trials + (refusals > 0), refused + refusals
            stopped += not goes_on(pawn)
            _patiently_cancel(pawn)
        accepted = _stale_records(running)
        turned_away = _turned_away(running)
    return [
        Rows(command, quick).none(
            "stale_writes_accepted",
            "stale-generation writes accepted: leaders paused past their lease, and two "
            "live coordinators; records in the journal, and jobs that did not go on because an "
            "aggregator or a worker took an order",
            accepted + stopped,
            trials=trials,
            note=f"storage refused {refused} writes and renewals, at least one in each trial; "
            f"aggregators and workers turned {turned_away} sessions away; a lease of {LEASE_S:g} s",
        )
    ]


def _pause_past_lease(running: phalanx.LocalCluster, leader: Member, pawn: phalanx.Job) -> None:
    generation = running.describe().generation
    os.kill(leader.pid, signal.SIGSTOP)
    try:
        # The kernel takes the call; the leader finds it when it wakes up.
        call = threading.Thread(target=_cancel_at, args=(leader.address, pawn))
        call.start()
        wait_for(lambda: _generation(running) > generation, "the standby to lead")
    finally:
        os.kill(leader.pid, signal.SIGCONT)
    call.join()


def _two_live(running: phalanx.LocalCluster, leader: Member, pawn: phalanx.Job) -> None:
    with _same_id_again(running, leader.id):
        _cancel_at(leader.address, pawn)


@contextmanager
def _same_id_again(running: phalanx.LocalCluster, id: str) -> Iterator[None]:
    """A second control process with the same id, once it leads."""
    state = read_state(running.state_dir)
    assert state is not None
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        arguments = ["coordinator", "control", "--listen", "127.0.0.1:0", "--id", id]
        arguments += ["--storage", state.storage_address, "--announce", str(told)]
        arguments += ["--public-address", state.storage_address, "--parent-pid", str(os.getpid())]
        with subprocess.Popen(
            [sys.executable, "-P", "-m", *arguments],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **QUICK_LEASE},
        ) as second:
            try:
                wait_for(told.exists, "the second process to lead")
                assert json.loads(told.read_text())["pid"] == second.pid
                yield
            finally:
                second.kill()


def _cancel_at(address: str, pawn: phalanx.Job) -> None:
    """Tell one control process to cancel the job, whatever it answers."""
    with phalanx.connect(address, timeout_s=ANSWER_S) as stale:
        try:
            phalanx.Job(stale.backend, pawn.message).cancel()
        except PhalanxError:
            # A refusal is what is wanted; what was accepted is counted in the journal.
            return


def _patiently_cancel(pawn: phalanx.Job) -> None:
    """End the job at whoever leads now."""

    def ended() -> bool:
        try:
            return pawn.refresh().done or pawn.cancel().done
        except Unavailable:
            return False

    wait_for(ended, "the job to end")


def goes_on(pawn: phalanx.Job, guard_s: float = GOES_ON_S) -> bool:
    """Whether a job is over for whoever leads now, who may have been handed the command on, or
    commits further steps."""
    deadline_s = time.monotonic() + guard_s
    first: int | None = None
    while time.monotonic() < deadline_s:
        with contextlib.suppress(Unavailable):
            now = pawn.refresh()
            first = now.progress.step if first is None else min(first, now.progress.step)
            if now.done or now.progress.step >= first + STEPS_ON:
                return True
        time.sleep(0.02)
    return False


def _turned_away(running: phalanx.LocalCluster) -> int:
    """How often a member did not listen to an older generation, by their logs."""
    members = [each for each in running.processes() if each.role in ("aggregator", "worker")]
    return sum(Path(each.log).read_text().count(TURNED_AWAY) for each in members)


def _generation(running: phalanx.LocalCluster) -> int:
    try:
        return running.describe().generation
    except PhalanxError:
        return 0


def _soon_refused(running: phalanx.LocalCluster, before: int) -> int:
    """Refusals since before: as soon as there is one, or none after a while."""
    deadline_s = time.monotonic() + REFUSAL_S
    while not (found := _refusals(running) - before) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return found


def _refusals(running: phalanx.LocalCluster) -> int:
    address = running.process("storage").metrics_address
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=ANSWER_S) as answer:
        return round(sum(map(float, _REFUSED.findall(answer.read().decode()))))


def _stale_records(running: phalanx.LocalCluster) -> int:
    """Count the records that were written under a generation after a higher one had written."""
    highest = stale = 0
    with SyncStorageClient(running.process("storage").address) as storage:
        for record in storage.read_journal("control"):
            generation = ControlRecord.FromString(record.payload).generation
            stale += generation < highest
            highest = max(highest, generation)
    assert highest > 1, "no leader has changed, so nothing was tried"
    return stale
