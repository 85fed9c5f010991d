"""What a storage keeps whose disk fails: every call of a run, in every way, one by one."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench.reliability.disk_sweep import FAULTS, Recording, Sweep, Tally, working_folder
from bench.reliability.rows import Row, Rows

_AFTER_CRASH = " in a start after a crash"
NO_POWER_AFTER_SYNC = "EIO at a sync, then no power"
ERRORS = ["EIO once", "EIO lasting", f"EIO once{_AFTER_CRASH}"]
FULL = ["ENOSPC once", "ENOSPC lasting", f"ENOSPC once{_AFTER_CRASH}"]
CRASHES = ["crash", f"crash{_AFTER_CRASH}", NO_POWER_AFTER_SYNC]

_SLICES = 16
_QUICK = 20
_KILLED_IN_ACT = 15


def rows(name: str, what: str, kinds: list[str], command: str, *, quick: bool) -> list[Row]:
    """Break every call (``quick``: one of 20) in these ways, on all cores, and count the lost."""
    tallies: dict[str, Tally] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        step = _SLICES * (_QUICK if quick else 1)
        parts = {
            kind: [
                pool.submit(sweep, kind, range(1 + n, sys.maxsize, step)) for n in range(_SLICES)
            ]
            for kind in kinds
        }
        for kind, waiting in parts.items():
            tallies[kind] = total(part.result() for part in waiting)
    whole = total(tallies.values())
    for failure in whole.failures:
        print(f"  {failure[:600]}")
    by_kind = ", ".join(f"{kind} {tally.faults}" for kind, tally in tallies.items())
    by_call = ", ".join(f"{call} {count}" for call, count in sorted(whole.calls.items()))
    made = Rows(command, quick)
    return [
        made.none(
            f"{name}_facts_lost",
            f"{what}: faults after which an acknowledged fact was missing, something was "
            "there by half, or the service did not go on",
            len(whole.failures),
            unit="faults",
            trials=whole.faults,
            note=f"{by_kind}; by call: {by_call}; {whole.restarts} restarts on what was left, "
            f"{whole.processes_ended} ends of the process as designed",
        ),
        made.none(
            f"{name}_stale_writes_accepted",
            f"{what}: writes of a replaced leader that were accepted afterwards",
            whole.stale_writes_accepted,
            unit="writes",
            trials=whole.stale_writes,
        ),
    ]


def sweep(kind: str, numbers: range) -> Tally:
    """Break the calls with these numbers in one way."""
    with working_folder() as folder:
        fresh = Sweep(folder)
        if kind in FAULTS:
            fresh.fail_each_call(kind, numbers)
            return fresh.tally
        recording = fresh.record()
        if kind == "crash":
            fresh.crash_at_each_call(recording, numbers)
            return fresh.tally
        if kind == NO_POWER_AFTER_SYNC:
            fresh.fail_each_sync_then_power(recording, numbers)
            return fresh.tally
        after_kill = _killed(fresh, folder, recording)
        start = after_kill.record()
        of_the_start = numbers[: len(range(numbers.start, start.started_calls + 1, numbers.step))]
        if kind == f"crash{_AFTER_CRASH}":
            after_kill.crash_at_each_call(start, of_the_start)
        else:
            after_kill.fail_each_call(kind.removesuffix(_AFTER_CRASH), of_the_start)
        return after_kill.tally


def _killed(fresh: Sweep, folder: Path, recording: Recording) -> Sweep:
    """A sweep that begins with what ``kill -9`` left of the scenario, in the middle of a commit."""
    inside = [
        number
        for number, (call, done) in enumerate(
            zip(recording.calls, recording.acts_done, strict=True), 1
        )
        if done == _KILLED_IN_ACT and call.name == "write"
    ]
    middle = inside[len(inside) // 2]
    (folder / "after").mkdir()
    return Sweep(folder / "after", fresh.image_after(recording, middle), _KILLED_IN_ACT)


def total(tallies: Iterable[Tally]) -> Tally:
    """Add tallies up."""
    whole = Tally()
    for tally in tallies:
        whole.faults += tally.faults
        whole.restarts += tally.restarts
        whole.stale_writes += tally.stale_writes
        whole.stale_writes_accepted += tally.stale_writes_accepted
        whole.processes_ended += tally.processes_ended
        whole.calls += Counter(tally.calls)
        whole.failures += tally.failures
    return whole
