"""What decides over the bits that a worker computes in a job, and whether two have the same.

The processor and the numeric libraries decide in every job: they are in the numeric fingerprint.
Where a job needs other libraries or computes on GPUs, these decide as well. What nobody has told is
no reason to leave a worker out, since its own leaf is compared before it takes part; but then
another leaf is no lie either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from coordinator.control.core.facts import JobFacts
from phalanx.needs import libraries_of_job, title_of
from phalanx.specs.parts import equal_copies, verifies
from phalanx.v1.coordination_service_pb2 import WorkerHello
from phalanx.v1.training_pb2 import Equipment, JobPlan


@dataclass(frozen=True, order=True)
class Kind:
    """What a worker has of all that decides over the bits of one job."""

    fingerprint: str
    libraries: tuple[tuple[str, str], ...] = ()
    """(package, version) of those that the job needs."""
    gpus: tuple[str, ...] = ()
    """The kinds of GPU, where the job computes on some; empty: not known."""
    complete: bool = field(default=True, compare=False)
    """Whether everything is known that decides: equal kinds that are not may be different."""

    def is_surely(self, other: Kind) -> bool:
        """Whether both give the same bits for all that can be known before they compute."""
        return self.complete and other.complete and self == other

    def may_be(self, other: Kind) -> bool:
        """Whether nothing is known of either by which their bits differ."""
        if (self.fingerprint, self.libraries) != (other.fingerprint, other.libraries):
            return False
        return self.gpus == other.gpus or not self.gpus or not other.gpus

    def write(self, plan: JobPlan) -> None:
        """Have a plan say that its job takes workers of this kind."""
        plan.fingerprint = self.fingerprint
        plan.ClearField("equipment")
        equipment = self.equipment()
        if equipment is not None:
            plan.equipment.CopyFrom(equipment)

    def equipment(self) -> Equipment | None:
        """Return what is beside the numeric fingerprint; None where that decides alone."""
        if not self.libraries and not self.gpus:
            return None
        return Equipment(libraries=dict(self.libraries), gpu_kinds=self.gpus)


def of_worker(facts: JobFacts, hello: WorkerHello) -> Kind:
    """Return of which kind a worker is in a job."""
    return _of_worker(_needed(facts), hello, with_gpus=facts.spec.resources.gpus > 0)


def _of_worker(needed: Sequence[str], hello: WorkerHello, *, with_gpus: bool) -> Kind:
    if not needed and not with_gpus:
        return Kind(hello.fingerprint)
    gpus = _gpus(hello.gpu_kinds) if with_gpus else ()
    return Kind(
        hello.fingerprint,
        tuple((each, hello.libraries[each]) for each in needed if each in hello.libraries),
        gpus,
        complete=all(each in hello.libraries for each in needed) and (bool(gpus) or not with_gpus),
    )


def of_plan(facts: JobFacts, plan: JobPlan) -> Kind | None:
    """Return of which kind the workers of a job must be; None: of any.

    A control process of an earlier version has written down the numeric fingerprint only.
    """
    if not plan.bitwise or not plan.fingerprint:
        return None
    own = plan.equipment
    return Kind(
        plan.fingerprint,
        tuple(sorted(own.libraries.items())),
        tuple(own.gpu_kinds),
        complete=set(_needed(facts)) <= set(own.libraries)
        and (bool(own.gpu_kinds) or facts.spec.resources.gpus == 0),
    )


def difference(wanted: Kind | None, hello: WorkerHello) -> str:
    """Return why a worker would give other bits than those of a kind, as far as it is known; empty:
    it would not."""
    if wanted is None:
        return ""
    if hello.fingerprint != wanted.fingerprint:
        return "its processor or libraries give other bits (fingerprint)"
    for package, version in wanted.libraries:
        own = hello.libraries.get(package, version)
        if own != version:
            return f"it has {title_of(package)} {own}, and the job runs with {version}"
    gpus = _gpus(hello.gpu_kinds) if wanted.gpus else ()
    if gpus and gpus != wanted.gpus:
        which = "its GPU is another one" if len(gpus) == 1 else "its GPUs are others"
        return f"{which} ({', '.join(gpus)}, and the job runs on {', '.join(wanted.gpus)})"
    return ""


def best(facts: JobFacts, hellos: Sequence[WorkerHello]) -> Kind | None:
    """Return the kind for a job that has none yet: among those with enough workers to begin with,
    or among all if none has, the one with most slots. None: nobody is there."""
    needed, with_gpus = _needed(facts), facts.spec.resources.gpus > 0
    there: dict[Kind, list[int]] = {}
    for hello in hellos:
        kind = _of_worker(needed, hello, with_gpus=with_gpus)
        there.setdefault(kind, []).append(hello.slots)
    if len(there) <= 1:
        return next(iter(there), None)
    wanted = max(1, facts.spec.resources.min_workers)
    if verifies(facts.spec.train):
        wanted = max(wanted, equal_copies(facts.spec.train))

    def rank(kind: Kind) -> tuple[bool, int, Kind]:
        unknown = there.get(Kind(kind.fingerprint, kind.libraries), []) if kind.gpus else []
        of_it = there[kind] + unknown
        return len(of_it) < wanted, -sum(of_it), kind

    return min(_told(there), key=rank)


def _told(kinds: Collection[Kind]) -> list[Kind]:
    """Leave out those of unknown GPUs where others may be the same and say more."""
    more = {(kind.fingerprint, kind.libraries) for kind in kinds if kind.gpus}
    return [kind for kind in kinds if kind.gpus or (kind.fingerprint, kind.libraries) not in more]


def _gpus(said: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(said)))


def _needed(facts: JobFacts) -> list[str]:
    return libraries_of_job(facts.spec, facts.kept.submitted.model_libraries)
