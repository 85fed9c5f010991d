"""Real processes, real signals, and a job whose leaves can be held while a signal is sent."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

import phalanx
from phalanx.errors import FailedPrecondition, Unavailable
from phalanx.sdk.job import Job
from phalanx.sdk.values import Event
from phalanx.specs import parts
from phalanx.testing import stores
from phalanx.testing.scraping import scrape, series

ResultT = TypeVar("ResultT")

SETTLED_S = 0.3
"""What a job shows of its progress is not older than that."""

GUARD_S = 90.0
"""Deadline of every wait; reached only when something is broken."""

TRIES = 5
"""Jobs that may be over too early, one after the other."""

POLLS_S = (0.01, 0.05)
"""Pauses of a wait: the first one, and the longest."""

SOFTMAX_MODEL = '''
"""A softmax regression."""

import numpy as np

from phalanx.models import UserModel


class Softmax(UserModel):
    def __init__(self, schema):
        super().__init__(schema, {"w": (schema.features, schema.classes)})

    def initial(self, seed):
        rows, columns = self.layout.tensors[0].shape
        return {"w": np.linspace(-1, 1, rows * columns).reshape(rows, columns)}

    def loss_and_gradients(self, parameters, features, targets):
        p = self.predictions(parameters, features)
        rows = np.arange(len(targets))
        loss = -np.log(p[rows, targets]).sum()
        p[rows, targets] -= 1
        return float(loss), {"w": features.T @ p}

    def predictions(self, parameters, features):
        scores = features @ parameters["w"]
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)
'''
"""What the models of tests and benchmarks compute, besides what they do on purpose."""

GATED_MODEL = '''
"""A softmax regression whose leaves wait while a file is there, and say that they do."""

import contextlib
import os
import time
from pathlib import Path

from softmax import Softmax

GATE = Path(os.environ["PHALANX_TEST_GATE"])


def may_pass():
    for name in os.listdir(GATE / "passes"):
        with contextlib.suppress(FileNotFoundError):  # another leaf took it
            (GATE / "passes" / name).unlink()
            return True
    return False


def wait():
    mark = GATE / f"entered-{os.getpid()}"
    pause_s = 0.002
    while (GATE / "hold").exists() and not may_pass():
        mark.touch()  # again in each turn: who holds anew deletes all marks
        time.sleep(pause_s)
        pause_s = min(0.01, 1.1 * pause_s)
    mark.unlink(missing_ok=True)


class Gated(Softmax):
    def loss_and_gradients(self, parameters, features, targets):
        wait()
        return super().loss_and_gradients(parameters, features, targets)
'''


def gated_job(steps: int = 60, shards: int = 11, **train: Any) -> dict[str, Any]:
    """A job with an odd number of shards, short last leaves and a checkpoint every 10 steps."""
    return {
        "name": "chaos",
        "data": {"name": "blobs", "shards": shards},
        "code": {"files": {"softmax.py": SOFTMAX_MODEL, "gated.py": GATED_MODEL}},
        "train": {
            "model": {"custom": {"entrypoint": "gated:Gated"}},
            "optimizer": {"adam": {"learning_rate": 0.01}},
            "batch_size": 330,
            "stop": {"steps": steps},
            "evaluation": {"every_steps": 25},
            "checkpoints": {"every_steps": 10},
            **train,
        },
    }


UNHURRIED_MODEL = '''
"""The same model, with leaves that take as long as the environment of the worker says, until they
are told to hurry."""

import os
import time

from gated import GATE, Gated

LEAF_S = float(os.environ.get("PHALANX_TEST_LEAF_S", "0"))


class Unhurried(Gated):
    def loss_and_gradients(self, parameters, features, targets):
        if LEAF_S and not (GATE / "hurry").exists():
            time.sleep(LEAF_S)
        return super().loss_and_gradients(parameters, features, targets)
'''


def unhurried_job(steps: int) -> dict[str, Any]:
    """The gated job; leaves take PHALANX_TEST_LEAF_S where that is set, else no time."""
    job = gated_job(steps)
    job["code"]["files"]["unhurried.py"] = UNHURRIED_MODEL
    job["train"]["model"]["custom"]["entrypoint"] = "unhurried:Unhurried"
    return job


LATER_MODEL = '''
"""The same model; its leaves pass the gate until the parameters have moved far enough."""

import numpy as np

from gated import Gated
from softmax import Softmax


class Later(Gated):
    def __init__(self, schema, moved):
        super().__init__(schema)
        self.moved = moved

    def is_later(self, parameters):
        w = parameters["w"]
        begin = self.initial(0)["w"].astype(w.dtype)
        return np.abs(w - begin).max() > self.moved

    def loss_and_gradients(self, parameters, features, targets):
        model = Gated if self.is_later(parameters) else Softmax
        return model.loss_and_gradients(self, parameters, features, targets)
'''


def held_job(after_steps: int = 0, steps: int = 60, **train: Any) -> dict[str, Any]:
    """The gated job; a gate that is held before it begins stops it at a certain step.

    That is the second one, where every worker has done a leaf, or the first in which the parameters
    have moved as far as Adam moves them in so many steps. So nothing depends on how fast it is.
    """
    job = gated_job(steps, **train)
    job["code"]["files"]["later.py"] = LATER_MODEL
    rate = job["train"]["optimizer"]["adam"]["learning_rate"]
    job["train"]["model"]["custom"] = {
        "entrypoint": "later:Later",
        "arguments": {"moved": after_steps * rate},
    }
    return job


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition is true; its value.

    What takes long is looked at less often: looking costs time that the cluster needs.
    """
    deadline = time.monotonic() + GUARD_S
    pause_s = POLLS_S[0]
    while True:
        # A service that has just been killed is not there for a moment.
        with contextlib.suppress(Unavailable):
            if value := condition():
                return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {GUARD_S:g} s for {what}")
        time.sleep(pause_s)
        pause_s = min(POLLS_S[1], 1.2 * pause_s)


def send(pid: int, number: int) -> None:
    """Send a signal to one process. Raises ProcessLookupError where it is down.

    The process id of a member that is down is 0, which would mean everybody in our own group.
    """
    if pid <= 0:
        raise ProcessLookupError("no process to send a signal to: it is down for the moment")
    os.kill(pid, number)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    send(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            send(pid, signal.SIGCONT)


class TooLate(AssertionError):
    """The job was over before the fault could be injected: the machine was busy elsewhere."""


def in_time(attempt: Callable[[], ResultT]) -> ResultT:
    """Submit a job that no gate holds and inject a fault into it; again, with another job, where
    `attempt` raises TooLate."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(TooLate):
            return attempt()
    return attempt()


def not_over(job: Job) -> None:
    """Raise what the job failed with, or TooLate, if it is over."""
    if job.done:
        job.wait(timeout_s=GUARD_S)  # tells why, where it failed
        raise TooLate("the job was over before the fault could be injected")


def pause(job: Job) -> None:
    """Pause a job that runs, and wait until it is. Raises TooLate where it ended before."""
    try:
        job.pause()
    except FailedPrecondition:
        not_over(job.refresh())
        raise
    wait_until(lambda: job.refresh().state == "PAUSED" or job.done, "the pause")
    not_over(job)


def _step_of(job: Job) -> Any:
    return series("job_step", job_id=job.id)


def leaves_of_a_step(job: Job) -> int:
    """How often a gradient is computed for one step, copies that are compared included."""
    spec = job.message.spec
    copies = parts.equal_copies(spec.train) if parts.verifies(spec.train) else 1
    return spec.data.shards * max(1, parts.local_steps(spec.train)) * copies


@dataclass
class Gate:
    """Holds leaves in the middle of their work."""

    folder: Path
    furthest: dict[str, int] = field(default_factory=dict)
    """The furthest step that was seen of each job."""

    def __post_init__(self) -> None:
        (self.folder / "passes").mkdir(exist_ok=True)

    def hold(self) -> None:
        """Every leaf that begins from now on waits.

        Marks of killed leaves go. A leaf that waits, even since before a release that it has not
        seen yet, marks itself anew.
        """
        (self.folder / "hold").touch()
        for entered in self.folder.glob("entered-*"):
            entered.unlink(missing_ok=True)

    def release(self) -> None:
        """All go on."""
        (self.folder / "hold").unlink(missing_ok=True)

    def let_pass(self, leaves: int) -> bool:
        """So many leaves go on although the gate is held, if all that were let pass before did;
        whether they were."""
        passes = self.folder / "passes"
        if any(passes.iterdir()):
            return False
        for number in range(leaves):
            (passes / str(number)).touch()
        return True

    def bring_to(
        self, job: Job, step: int, committed: Callable[[Job], int | None] | None = None
    ) -> None:
        """Hold, and let leaves pass until the job has committed a step, or is over.

        After a death, or on a busy machine, an earlier step may be shown for seconds than the job
        has come to. So leaves of the steps that are missing from the furthest one are let pass
        together once, and after that those of one step at a time: else the job could run to its
        end meanwhile. And `committed` is asked before, which tells the newest step at once, or
        None; where nobody can tell, the waits double until the shown step changes.
        """
        leaves = leaves_of_a_step(job)
        self.hold()
        known, since_s, wait_s, first = -1, 0.0, SETTLED_S, True

        def is_there() -> bool:
            nonlocal known, since_s, wait_s, first
            now_s, at = time.monotonic(), job.refresh().progress.step
            if at != known:
                known, since_s, wait_s = at, now_s, SETTLED_S
                self.furthest[job.id] = max(at, self.furthest.get(job.id, 0))
            elif at < step and now_s - since_s >= wait_s:
                furthest = self.furthest[job.id]
                told = committed(job) if committed else None
                if told is not None and told > furthest:
                    self.furthest[job.id], since_s = told, now_s
                    return told >= step
                if self.let_pass((max(1, step - furthest) if first else 1) * leaves):
                    since_s, first = now_s, False
                    wait_s = 2 * wait_s if told is None else wait_s
            return at >= step or job.done

        wait_until(is_there, f"step {step}")
        self.let_nobody_pass()

    def let_nobody_pass(self) -> None:
        """Who was let pass and has not come yet waits, too."""
        for each in (self.folder / "passes").iterdir():
            each.unlink(missing_ok=True)

    def entered(self) -> set[int]:
        """Process ids of the leaf processes that wait in a leaf."""
        return {int(path.name.partition("-")[2]) for path in self.folder.glob("entered-*")}


class Arena:
    """A cluster, its gate and the bits that every undisturbed run has."""

    def __init__(self, cluster: phalanx.LocalCluster, gate: Gate, kept: stores.Kept) -> None:
        self.cluster = cluster
        self.gate = gate
        self.kept = kept
        """What its storage keeps."""

    def submit(self, job: Mapping[str, Any]) -> Job:
        """Submit a job whose leaves wait from the first one on, until `caught_at` lets some pass.

        A job of short leaves may be over before a test, on a busy machine, comes to hold the gate.
        And all workers are there before: while it is held, who comes later may get no shard.
        """
        self.workers_ready()
        self.gate.hold()
        return self.cluster.submit(job)

    def grow_to(self, workers: int) -> None:
        """Start workers until there are so many, and wait until all can take work."""
        there = sum(each.role == "worker" for each in self.cluster.processes())
        for _ in range(workers - there):
            self.cluster.add_worker()
        self.workers_ready()

    def workers_ready(self) -> None:
        """Wait until every worker process of the cluster can take work."""

        def all_are() -> bool:
            there = [each.id for each in self.cluster.processes() if each.role == "worker"]
            ready = {each.id for each in self.cluster.workers() if each.state == each.STATE_READY}
            return ready >= {*there}

        wait_until(all_are, "the workers")

    def at_step(self, job: Job, step: int) -> None:
        """Wait until the job has committed a step."""
        wait_until(lambda: job.refresh().progress.step >= step or job.done, f"step {step}")
        not_over(job)

    def caught_at(self, job: Job, step: int) -> list[str]:
        """Hold the gate when the job has committed a step, and is about to do the next ones; ids of
        the workers that are in the middle of a leaf, at least one.

        Leaves are let pass by numbers: however busy the machine is, a job that was submitted to a
        held gate, and was not released since, does not run away.
        """
        self.gate.bring_to(job, step, self.committed)
        return self._caught(job)

    def committed(self, job: Job) -> int | None:
        """The newest step that the aggregators of the job have committed; None where none tells."""
        found = []
        for member in self.cluster.processes():
            if member.role == "aggregator" and member.metrics_address:
                with contextlib.suppress(OSError):  # it has died, or begins
                    found.append(scrape(member.metrics_address).get(_step_of(job)))
        return max((int(step) for step in found if step is not None), default=None)

    def hosting(self, job: Job, worker_id: str) -> None:
        """Wait until a worker holds shards of the job, or the job is over."""

        def hosts() -> bool:
            workers = job.refresh().progress.workers
            held = any(each.worker_id == worker_id and each.shards for each in workers)
            return held or job.done

        wait_until(hosts, f"{worker_id} to hold shards")

    def caught_with_shards(self, job: Job) -> str:
        """A worker that the gate holds in a leaf, and that holds shards of the job.

        One that has just come back may only compute copies of what others hold.
        """

        def caught() -> str:
            inside = self.in_a_leaf()
            holders = (each.worker_id for each in job.refresh().progress.workers if each.shards)
            found = next((each for each in holders if each in inside), "")
            if not found:
                # The others may be through with this step: they begin leaves again with the next.
                self.gate.let_pass(1)
            return found

        return str(wait_until(caught, "a leaf of its own shard"))

    def in_a_leaf(self) -> set[str]:
        """Ids of the workers that the gate holds in the middle of a leaf now."""
        above: set[int] = set()
        for leaf in self.gate.entered():
            with contextlib.suppress(psutil.NoSuchProcess):
                above |= {each.pid for each in psutil.Process(leaf).parents()}
        if not above:
            return set()
        members = self.cluster.processes()
        return {each.id for each in members if each.role == "worker" and each.pid in above}

    def caught_in_a_leaf(self, job: Job) -> list[str]:
        """Hold the gate; ids of the workers that are in the middle of a leaf, at least one."""
        self.gate.hold()
        return self._caught(job)

    def _caught(self, job: Job) -> list[str]:
        caught = wait_until(
            lambda: self.in_a_leaf() or job.refresh().done, "a worker in the middle of a leaf"
        )
        not_over(job)
        return sorted(caught)

    def submit_held(self, job: Mapping[str, Any], workers: int) -> Job:
        """Submit a `held_job`; return it when so many workers are in a leaf of their own shards."""

        def hosts() -> int:
            return sum(bool(each.shards) for each in submitted.refresh().progress.workers)

        submitted = self.submit(job)
        wait_until(lambda: hosts() == workers, "every worker to hold shards")
        wait_until(lambda: len(self.in_a_leaf()) == workers, "a leaf on every worker")
        return submitted

    def hurry(self) -> None:
        """From now on leaves of an `unhurried_job` take no time: what is shown is shown."""
        (self.gate.folder / "hurry").touch()

    def signal(self, member_id: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to one process of the cluster, which must be up."""
        send(self.cluster.process(member_id).pid, number)

    def events(self, kind: str) -> list[Event]:
        """The events of one type so far."""
        return [event for event in self.cluster.events() if event.type == kind]


def blobs() -> tuple[np.ndarray, np.ndarray]:
    """Three clouds of 1,000 points with features of very different sizes."""
    rng = np.random.default_rng(17)
    targets = rng.integers(0, 3, 1000)
    features = rng.standard_normal((1000, 12)) + targets[:, None]
    return (features * 10.0 ** rng.integers(-3, 3, 12)).astype(np.float32), targets


def add_blobs(cluster: phalanx.Cluster) -> None:
    """Register the data set of these tests."""
    features, targets = blobs()
    cluster.data.add("blobs", features, targets, test=0.2)


def undisturbed_sha256_of(
    job: Mapping[str, Any], folder: Path, add_data: Callable[[phalanx.Cluster], None] = add_blobs
) -> str:
    """The bits of a job in this process, without any cluster."""
    os.environ["PHALANX_TEST_GATE"] = str(folder)
    with phalanx.LocalCluster(workers=0) as alone:
        add_data(alone)
        return alone.submit(job).wait(timeout_s=GUARD_S).parameters_sha256


@contextlib.contextmanager
def arena(
    folder: Path,
    workers: int,
    *,
    leaf_s: float = 0.0,
    lease_s: float | None = None,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[Arena]:
    """A cluster of real processes with a gate; leaves of `unhurried_job` take `leaf_s`.

    Where nobody may be taken for lost, `lease_s` is longer than a busy machine holds up any of
    them.
    """
    gate = Gate(folder)
    shared = stores.shared_kept(options.get("state"))
    variables = {
        "PHALANX_TEST_GATE": str(folder),
        "PHALANX_TEST_LEAF_S": str(leaf_s),
        **({} if lease_s is None else {"PHALANX_CONTROL_LEASE_TTL_S": str(lease_s)}),
        **(shared.environment if shared is not None else {}),
        **(environment or {}),
    }
    with phalanx.LocalCluster(
        workers=workers, slots=1, environment=variables, **options
    ) as cluster:
        try:
            add_blobs(cluster)
            embedded = stores.EmbeddedKept(Path(cluster.state_dir) / "storage")
            yield Arena(cluster, gate, shared or embedded)
        finally:
            gate.release()
