"""What the parts that a job is composed of ask of the data plane; see docs/decisions.

Pure facts of a resolved spec. Control places by them, aggregators and workers find them in the
plan, and validation tells from them which parts do not go together.
"""

from __future__ import annotations

from phalanx.v1 import job_spec_pb2

UNITS_MAX = 8
"""Nodes in which lossy contributions travel."""

STATE_EVERY = 32
"""Versions between two at which the states of nodes are handed in, at most."""

STATE_EVERY_LEAST = 8
"""And at least: a state is as large as the parameters."""

UPDATED_MODELS = ("k_means", "pca", "boosting")
"""Models that no optimizer moves."""

UPDATING_OPTIMIZERS = ("closed_form", "cocoa")
"""Optimizers that see the whole vector."""

COLUMNS = "columns"
"""Shards are groups of columns: the optimizer moves the weights in every second version."""

PASSES = {"pca": 2, "closed_form": 2}
"""Steps of an algorithm that has a fixed number of them."""

_INNER_VECTORS = {"adagrad": 1, "adam": 2, "adamw": 2}


def all_reduces(train: job_spec_pb2.Train) -> bool:
    """Whether the workers own the parameters and reduce among themselves."""
    return train.WhichOneof("topology") == "all_reduce"


def leaf_reducer(train: job_spec_pb2.Train) -> str:
    """Return the field of the reduction that has to see the contribution of each shard by itself;
    empty where sums of several do."""
    kind = train.reduction.WhichOneof("kind")
    if kind is not None and kind != "weighted_mean":
        return kind
    return "clip_norm" if train.reduction.HasField("clip_norm") else ""


def reduces_leaves(train: job_spec_pb2.Train) -> bool:
    """Whether the reducer has to see the contribution of each shard by itself."""
    return leaf_reducer(train) != ""


def backup_shards(train: job_spec_pb2.Train) -> int:
    """Return how many of the slowest shards a step does not wait for."""
    return train.synchronous.backup_shards if train.HasField("synchronous") else 0


def may_lose_examples(train: job_spec_pb2.Train) -> bool:
    """Whether the spec itself lets a step commit without some of its examples."""
    leaves_out = train.reduction.WhichOneof("kind") not in (None, "weighted_mean")
    return backup_shards(train) > 0 or train.on_nonfinite.HasField("skip") or leaves_out


def local_steps(train: job_spec_pb2.Train) -> int:
    """Return the steps of a shard between two commits; 0 where shards contribute gradients."""
    return train.local.steps if train.HasField("local") else 0


def optimizer_vectors(optimizer: job_spec_pb2.Optimizer) -> int:
    """Return how many vectors, each as long as the parameters, an optimizer keeps between steps."""
    kind = optimizer.WhichOneof("kind") or "sgd"
    return _INNER_VECTORS.get(kind, int(optimizer.sgd.momentum > 0))


def inner_vectors(train: job_spec_pb2.Train) -> int:
    """Return how many vectors each shard's own optimizer keeps from one local step to the next.

    Each is as long as the parameters. Without local steps there is no such optimizer.
    """
    return optimizer_vectors(train.optimizer) if train.HasField("local") else 0


def commits_one_by_one(train: job_spec_pb2.Train) -> bool:
    """Whether each contribution commits by itself; a stale bound of 0 is synchronous."""
    return train.HasField("asynchronous") or (train.HasField("stale") and train.stale.bound > 0)


def keeps_replay_log(train: job_spec_pb2.Train) -> bool:
    """Whether the order in which contributions commit is written down, where it is not given."""
    wanted = train.asynchronous.replay_log or train.stale.replay_log
    return commits_one_by_one(train) and wanted


def verifies(train: job_spec_pb2.Train) -> bool:
    """Whether contributions are compared with copies by other workers before they count."""
    return train.HasField("verification")


def equal_copies(train: job_spec_pb2.Train) -> int:
    """Return how many workers must agree on a contribution that is verified: more than half of
    the replicas, or the two of an audit."""
    if train.verification.WhichOneof("kind") == "audit_fraction":
        return 2
    return train.verification.replicas // 2 + 1


def least_shards(reduction: job_spec_pb2.Reduction) -> int:
    """Return how many shards must contribute to a step for the reducer to hold."""
    kind = reduction.WhichOneof("kind")
    if kind == "median":
        return 3  # the median of two is their mean: nobody is outvoted
    if kind == "trimmed_mean":
        return 2 * reduction.trimmed_mean.trim + 1
    return 2 * reduction.krum.faulty + 3 if kind == "krum" else 1


def by_columns(data: job_spec_pb2.Data) -> bool:
    """Whether each shard sees all rows, in columns of its own."""
    return data.HasField("columns")


def row_shards(data: job_spec_pb2.Data) -> int:
    """Return among how many shards the rows of a step are dealt out."""
    return 1 if by_columns(data) else data.shards


def update_kind(spec: job_spec_pb2.JobSpec) -> str:
    """Return which algorithm makes the versions of a job; empty where its optimizer does, which
    treats each parameter by itself."""
    train = spec.train
    if by_columns(spec.data):
        return COLUMNS
    if train.model.WhichOneof("kind") in UPDATED_MODELS:
        return train.model.WhichOneof("kind") or ""
    kind = train.optimizer.WhichOneof("kind") or ""
    return kind if kind in UPDATING_OPTIMIZERS else ""


def steps_without_loss(spec: job_spec_pb2.JobSpec) -> int:
    """Return the steps at the beginning that tell no loss, as there is no model yet: that in which
    k-means draws its centers, and that which adds up what a model is then made of in one step.

    In float32 such sums say too little of the loss of the normal equations, so that it is left out.
    """
    kind = update_kind(spec)
    if kind == "closed_form" and spec.train.dtype == "float32":
        return PASSES[kind]
    return int(kind == "k_means" or kind in PASSES)


def projects(train: job_spec_pb2.Train) -> bool:
    """Whether all parameters of a version are shortened together once its optimizer has made it."""
    return train.optimizer.HasField("pegasos") and train.optimizer.pegasos.project


def needs_one_range(spec: job_spec_pb2.JobSpec) -> bool:
    """Whether one aggregator must see all of each contribution, so that there is one range."""
    train = spec.train
    root = train.local.outer if train.HasField("local") else train.optimizer
    whole = reduces_leaves(train) or backup_shards(train) > 0 or commits_one_by_one(train)
    updates = update_kind(spec) != "" or projects(train)
    return updates or whole or verifies(train) or root.HasField("clip_norm")


def feeds_back(compression: job_spec_pb2.Compression) -> bool:
    """Whether what a node's contribution loses is added to its next one."""
    return compression.WhichOneof("up") in ("top_k", "sign")


def state_every(spec: job_spec_pb2.JobSpec) -> int:
    """Return how many versions lie between two at which nodes hand their state in; 0: none have.

    Checkpoints are at such versions if they can be: they are larger at any other. What is computed
    to make a state again is counted in a shard's own steps, where it has several to a version.
    """
    train = spec.train
    if not (feeds_back(train.compression) or inner_vectors(train)):
        return 0
    most = STATE_EVERY
    if inner_vectors(train):
        most = max(1, most // local_steps(train))
    least = max(1, most * STATE_EVERY_LEAST // STATE_EVERY)
    saved = train.checkpoints.every_steps
    fitting = [each for each in range(least, most + 1) if saved > 0 and saved % each == 0]
    return max(fitting, default=most)


def unit_span(spec: job_spec_pb2.JobSpec) -> int:
    """Return the shards of the nodes that travel in a train round; 0: any node may.

    What is encoded with a loss must be the same node whoever computes it: as large as a few nodes
    for all shards allow, since each of them crosses the wire. So must be what is compared, and
    what has a state; without a loss that is one shard, and with it the node that is encoded.
    """
    train = spec.train
    if reduces_leaves(train) or backup_shards(train) or commits_one_by_one(train):
        return 1
    if train.compression.WhichOneof("up") is None:
        return 1 if verifies(train) or inner_vectors(train) else 0
    span = 1
    while span * UNITS_MAX < spec.data.shards:
        span *= 2
    return span
