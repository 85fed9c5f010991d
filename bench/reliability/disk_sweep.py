"""One fault at every call of storage's journal, lease, blob and checkpoint code, one after another.

After each fault the disk is taken up by the code that ships, three times: as it is (the process was
killed), without what was never synced (the power failed), and with any part of that (a torn write).
Every time it must show what was acknowledged and nothing by half, and go on to the same end.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import os
import random
import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.reliability.disk_scenario import (
    ACTS,
    State,
    check_folder,
    end_process,
    expected_states,
    observe,
    open_state,
    stale_write_is_refused,
)
from phalanx.errors import PhalanxError
from phalanx.testing.disk_model import DiskModel, Image, write_image
from phalanx.testing.faulty_disk import Call, Fault, FaultyDisk
from phalanx.testing.faulty_sqlite import sqlite_on
from storage.interfaces import Backend

FAULTS: dict[str, Callable[[int], Fault]] = {
    "EIO once": lambda call: Fault(call, errno.EIO),
    "EIO lasting": lambda call: Fault(call, errno.EIO, lasting=True),
    "ENOSPC once": lambda call: Fault(call, errno.ENOSPC),
    "ENOSPC lasting": lambda call: Fault(call, errno.ENOSPC, lasting=True),
}

ALL = range(1, sys.maxsize)
"""Every call."""


@dataclass
class Tally:
    """What a sweep found; ``failures`` names every fault after which something was wrong."""

    faults: int = 0
    restarts: int = 0
    stale_writes: int = 0
    stale_writes_accepted: int = 0
    processes_ended: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recording:
    """A run without faults: its calls, what each did to the disk, and the acts done by then."""

    calls: list[Call]
    changes: list[Callable[[DiskModel], object] | None]
    acts_done: list[int]
    started_calls: int

    def syncs(self) -> list[int]:
        """Return the numbers of the calls that sync something."""
        return [number for number, call in enumerate(self.calls, 1) if call.name == "sync"]


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder in memory if there is one: nothing that happens in it need be durable."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="phalanx-disk-", dir=memory if memory.is_dir() else None
    ) as name:
        yield Path(name)


class Sweep:
    """Runs the scenario of ``disk_scenario`` on failing disks inside a folder of its own.

    ``initial`` is what is on the disk before, after ``done`` acts.
    """

    def __init__(self, folder: Path, initial: Image | None = None, done: int = 0) -> None:
        self._folder = folder
        self._initial = initial or {}
        self._done = done
        self._numbers = itertools.count()
        self._states = expected_states(self._fresh({}))
        self._checked: set[int] = set()
        self.tally = Tally()

    def record(self) -> Recording:
        """Run without a fault."""
        disk = FaultyDisk(self._fresh(self._initial))
        acts_done: list[int] = []
        done = self._done
        with sqlite_on(disk):
            backend = open_state(disk.root / "state", disk)
            started = len(disk.calls)
            for _, act in ACTS[done:]:
                act(backend)
                acts_done += [done] * (len(disk.calls) - len(acts_done))
                done += 1
            backend.close()
        acts_done += [done] * (len(disk.calls) - len(acts_done))
        self._remove(disk.root)
        return Recording(disk.calls, disk.changes, acts_done, started)

    def image_after(self, recording: Recording, call: int) -> Image:
        """Return the disk as it was after call number ``call`` of a recording."""
        model = DiskModel.of(self._initial)
        for change in recording.changes[:call]:
            if change is not None:
                change(model)
        return model.as_it_is()

    def fail_each_call(self, kind: str, numbers: range = ALL) -> None:
        """Fail call 1, 2, 3, … (or these) until a whole run passes unharmed."""
        for number in numbers:
            if not self._fail(kind, FAULTS[kind](number)):
                return

    def crash_at_each_call(self, recording: Recording, numbers: range = ALL) -> None:
        """Kill the process, and let the power fail, in the middle of and after each call."""
        model = DiskModel.of(self._initial)
        for number, change in enumerate(recording.changes, 1):
            if change is None:
                continue
            change(model)
            if number not in numbers:
                continue
            done = recording.acts_done[number - 1]
            call = recording.calls[number - 1]
            self.tally.faults += 1
            self.tally.calls[call.name] += 1
            label = f"crash at call {number} ({call.name} {call.path})"
            self._check_images(label, model, done, in_doubt=True, seed=number)

    def fail_each_sync_then_power(self, recording: Recording, numbers: range = ALL) -> None:
        """Fail the first, second, … sync; then let the power fail at each call of the next start.

        What a failed sync was to write can be read, and yet is lost with the power.
        """
        for position, number in enumerate(recording.syncs(), 1):
            if position in numbers:
                self._fail_sync_then_power(number, recording.calls[number - 1])

    def _fail_sync_then_power(self, number: int, call: Call) -> None:
        disk = FaultyDisk(self._fresh(self._initial), Fault(number))
        label = f"EIO at call {number} ({call.name} {call.path})"
        with sqlite_on(disk):
            done, in_doubt = self._run(disk, label)
        if done == len(ACTS):
            self._remove(disk.root)
            return
        self.tally.faults += 1
        self.tally.calls[call.name] += 1
        before = copy.deepcopy(disk.model)
        disk = FaultyDisk(disk.root, model=disk.model)
        with sqlite_on(disk):
            backend = open_state(disk.root / "state", disk)
            # What was once shown is a fact.
            shown = done + (observe(backend) != self._states[done])
            end_process(disk, backend)
        for position, change in enumerate(disk.changes, 1):
            if change is not None:
                change(before)
                at = disk.calls[position - 1]
                where = f"{label}, then power at call {position} of the start ({at.name} {at.path})"
                self._check_images(
                    where, before, done, in_doubt=in_doubt, seed=position, killed=False
                )
        self._check_images(f"{label}, power after the start", before, shown, in_doubt=False, seed=0)
        self._remove(disk.root)

    def _fail(self, kind: str, fault: Fault) -> bool:
        """Run with a fault; return whether the run was long enough for it."""
        root = self._fresh(self._initial)
        disk = FaultyDisk(root, fault)
        label = f"{kind} at call {fault.at_call}"
        with sqlite_on(disk):
            done, in_doubt = self._run(disk, label)
        if len(disk.calls) < fault.at_call:
            self._remove(root)
            return False
        if disk.fired:
            call = disk.fired[0]
            self.tally.faults += 1
            self.tally.calls[call.name] += 1
            label += f" ({call.name} {call.path})"
            # What really is there, which has SQLite's shared memory besides.
            if self._is_new(disk.model.as_it_is(), done, in_doubt):
                self._check(f"{label}, killed", root, done, in_doubt)
            self._check_images(
                label, disk.model, done, in_doubt=in_doubt, seed=fault.at_call, killed=False
            )
        self._remove(root)
        return True

    def _run(self, disk: FaultyDisk, label: str) -> tuple[int, bool]:
        """Do all acts, each again if it failed; say how many are done, and if one is in doubt."""
        done = self._done
        try:
            backend = open_state(disk.root / "state", disk, lambda _: disk.end())
        except PhalanxError:
            # The service ends with an error, and is started again.
            return done, False
        try:
            while done < len(ACTS):
                self._act(disk, backend, done, label)
                if disk.ended:
                    self.tally.processes_ended += 1
                    end_process(disk, backend)
                    return done, True
                done += 1
            disk.heal()
            if observe(backend) != self._states[done]:
                self.tally.failures.append(f"{label}: the service went on to another end")
        except (AssertionError, OSError, PhalanxError, sqlite3.Error) as error:
            self.tally.failures.append(f"{label}: the service does not go on: {error}")
        backend.close()
        return done, False

    def _act(self, disk: FaultyDisk, backend: Backend, done: int, label: str) -> None:
        """Do an act, and if it failed do it again, unless that ended the process."""
        name, act = ACTS[done]
        try:
            act(backend)
            return
        except PhalanxError:
            if disk.ended:
                return
            if not disk.fired:
                raise
        disk.heal()
        if observe(backend) != self._states[done]:
            self.tally.failures.append(f"{label}: {name} failed, and yet it happened")
        act(backend)

    def _check_images(
        self,
        label: str,
        model: DiskModel,
        done: int,
        *,
        in_doubt: bool,
        seed: int,
        killed: bool = True,
    ) -> None:
        images = {
            "without power": model.without_power(),
            "torn": model.torn(random.Random(seed)),
        }
        if killed:
            images["killed"] = model.as_it_is()
        for name, image in images.items():
            if not self._is_new(image, done, in_doubt):
                continue
            root = self._fresh(image)
            self._check(f"{label}, {name}", root, done, in_doubt)
            self._remove(root)

    def _is_new(self, image: Image, done: int, in_doubt: bool) -> bool:
        """Whether this was never checked; many faults leave the same behind."""
        key = hash((tuple(image.items()), done, in_doubt))
        known = key in self._checked
        self._checked.add(key)
        return not known

    def _check(self, label: str, root: Path, done: int, in_doubt: bool) -> None:
        """Start the service that ships on what is left, and have it go on to the end."""
        self.tally.restarts += 1
        try:
            backend = open_state(root / "state")
            try:
                self._check_facts(backend, root / "state", done, in_doubt)
            finally:
                backend.close()
        except (AssertionError, OSError, PhalanxError, sqlite3.Error) as error:
            self.tally.failures.append(f"{label}: {error}")

    def _check_facts(self, backend: Backend, state: Path, done: int, in_doubt: bool) -> None:
        check_folder(state)
        found = observe(backend)
        allowed: list[State] = self._states[done : done + 1 + in_doubt]
        assert found in allowed, f"after {done} acts: {found}\nand not one of {allowed}"
        self.tally.stale_writes += 1
        self.tally.stale_writes_accepted += not stale_write_is_refused(backend)
        for _, act in ACTS[done + (found != self._states[done]) :]:
            act(backend)
        assert observe(backend) == self._states[-1], "it went on to another end"

    def _fresh(self, image: Image) -> Path:
        root = self._folder / str(next(self._numbers))
        root.mkdir()
        write_image(image, root)
        return root

    @staticmethod
    def _remove(root: Path) -> None:
        blobs = f"{root}/state/blobs"
        # Most are empty, and this is several times as fast.
        for name in os.listdir(blobs) if os.path.isdir(blobs) else ():
            with contextlib.suppress(OSError):
                os.rmdir(f"{blobs}/{name}")
        shutil.rmtree(root)
