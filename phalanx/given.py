"""What control has given a worker to compute in one term of a job, and how the worker proves it.

Control moves shards while owners of ranges take contributions, and either may be away for a while,
so owners are not told who has which shard: each worker shows it to them. What it shows is sealed
with a key that control draws for each term and gives to nobody but the owners of ranges. An owner
that wants a copy of somebody else's nodes seals that, too, since the copy goes to all owners.

What was given in a term stays given: whoever loses a shard delivers what is in flight. Where nobody
proves who he is there are no keys, and nothing is shown or asked for.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable

from phalanx.errors import PermissionDenied, Violation
from phalanx.v1.aggregation_service_pb2 import ContributionFrame
from phalanx.v1.coordination_service_pb2 import HeldWorkerJob
from phalanx.v1.training_pb2 import Given, GivenNodes, JobPlan, TreeNode

KEY_BYTES = 32
EVALUATION_VECTOR = "evaluation"
_DIGEST = "sha256"


def sealed(key: bytes, nodes: GivenNodes) -> Given | None:
    """Return what a worker can show; None: there is no key, and nobody asks for it."""
    if not key:
        return None
    content = nodes.SerializeToString(deterministic=True)
    return Given(nodes=content, seal=hmac.digest(key, content, _DIGEST))


def opened(
    key: bytes, given: Given, job_id: str, term: int, worker_id: str, field: str
) -> GivenNodes:
    """Return what was given to this very worker. Raises PermissionDenied."""
    nodes = GivenNodes()
    if hmac.compare_digest(given.seal, hmac.digest(key, given.nodes, _DIGEST)):
        nodes.ParseFromString(given.nodes)
        if (nodes.job_id, nodes.term, nodes.worker_id) == (job_id, term, worker_id):
            return nodes
    raise PermissionDenied(
        f"{worker_id[:128]!r} does not show that it was given work of job {job_id} in term {term}",
        reason="NOT_YOURS",
        violations=[Violation(field, "shows nothing that was given to this worker")],
    )


def was_given(key: bytes, worker_id: str, held: HeldWorkerJob) -> bool:
    """Whether a worker was given the nodes that it says it holds."""
    if not key:
        return True
    try:
        nodes = opened(key, held.given, held.job_id, held.term, worker_id, "given")
    except PermissionDenied:
        return False
    return _places(nodes.train_nodes) == _places(held.train_nodes) and _places(
        nodes.evaluation_nodes
    ) == _places(held.evaluation_nodes)


class Covered:
    """Shards that all that was given to one worker covers."""

    def __init__(self, plan: JobPlan) -> None:
        self._widths = (plan.shards, plan.evaluation_shards)
        self._train = self._evaluation = self._copies = 0

    def add(self, nodes: GivenNodes) -> bool:
        """Cover these as well; return whether that is more than before."""
        before = (self._train, self._evaluation, self._copies)
        train, evaluation = self._widths
        self._train |= _mask(nodes.train_nodes, train)
        self._evaluation |= _mask(nodes.evaluation_nodes, evaluation)
        self._copies |= _mask(nodes.copies, max(self._widths))
        return before != (self._train, self._evaluation, self._copies)

    def has(self, node: TreeNode, *, evaluation: bool = False) -> bool:
        """Whether all shards of a node are covered; of no node, others say so."""
        width = self._widths[evaluation]
        covered = (self._evaluation if evaluation else self._train) | self._copies
        return not _mask([node], width) & ~covered


class GivenWork:
    """What the owner of ranges knows of who was given what in its term; without a key: nothing."""

    def __init__(self, plan: JobPlan, term: int, key: bytes) -> None:
        self._plan = plan
        self._term = term
        self._key = key
        self._covered: dict[str, Covered] = {}

    def show(self, worker_id: str, given: Given, field: str) -> None:
        """A worker shows what it was given. Raises PermissionDenied where that is not so."""
        if self._key:
            job_id = self._plan.job_id
            nodes = opened(self._key, given, job_id, self._term, worker_id, field)
            self._covered.setdefault(worker_id, Covered(self._plan)).add(nodes)

    def check_frame(self, worker_id: str, frame: ContributionFrame) -> None:
        """Raise PermissionDenied unless a contribution is one that the worker was given to make."""
        self._check(worker_id, frame.node, "frame.node", frame.vector == EVALUATION_VECTOR)

    def check_shards(self, worker_id: str, shards: Iterable[int], field: str) -> None:
        """Raise PermissionDenied unless the worker was given these shards to train."""
        for shard in shards if self._key else ():
            self._check(worker_id, TreeNode(first=shard, span=1), field, evaluation=False)

    def order(self, worker_id: str, nodes: Iterable[TreeNode]) -> Given | None:
        """Give a worker copies of nodes to make."""
        return sealed(
            self._key,
            GivenNodes(
                job_id=self._plan.job_id, term=self._term, worker_id=worker_id, copies=nodes
            ),
        )

    def _check(self, worker_id: str, node: TreeNode, field: str, evaluation: bool) -> None:
        if not self._key:
            return
        covered = self._covered.get(worker_id)
        if covered is not None and covered.has(node, evaluation=evaluation):
            return
        raise PermissionDenied(
            f"shards {node.first} to {node.first + node.span - 1} of job {self._plan.job_id} were "
            f"not given to {worker_id[:128]!r} in term {self._term}",
            reason="NOT_YOURS",
            violations=[Violation(field, "names what was not given to this worker")],
        )


def _mask(nodes: Iterable[TreeNode], width: int) -> int:
    """Bit i is shard i."""
    mask = 0
    for node in nodes:
        if node.first >= 0 and node.span > 0:
            mask |= (1 << min(node.first + node.span, width)) - (1 << min(node.first, width))
    return mask


def _places(nodes: Iterable[TreeNode]) -> list[tuple[int, int]]:
    return [(node.first, node.span) for node in nodes]
