"""What a job will do, told before it runs: the Plan for people, the JobPlan for the data plane."""

from __future__ import annotations

from phalanx.layouts import ITEM_BYTES
from phalanx.privacy.settings import is_private
from phalanx.specs import (
    catalog,
    margins,
    parts,
    private,
    programs,
    task_sets,
    updates,
    workspaces,
)
from phalanx.specs.canonical import spec_sha256
from phalanx.specs.copies import COPIES_PER_SLOT, LOCAL_COPIES, SHARED_COPIES, member_copies
from phalanx.specs.resolve import rows_per_leaf, steps_per_epoch, total_steps, train_rows
from phalanx.tasks import is_program
from phalanx.texts import number_of, verb_for
from phalanx.training.best import better
from phalanx.training.metrics import direction
from phalanx.v1 import dataset_service_pb2, job_pb2, job_spec_pb2, training_pb2

EVALUATION_SHARD_ROWS = 256
EVALUATION_SHARDS_MAX = 64
SMALL_LEAF_ROWS = 64
NEAR = 1.1
"""By as many times as many epochs as asked for, a job ends near what was asked for."""


def evaluation_rows(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> int:
    """Return the rows that each evaluation reads, 0 where the job has none."""
    if not spec.train.HasField("evaluation"):
        return 0
    return dataset.rows.get(spec.train.evaluation.split, 0)


def job_plan(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset | None, job_id: str
) -> training_pb2.JobPlan:
    """Return what aggregators and workers need to know of a resolved job, before it is described.

    Layout, evaluation sums, range count, fingerprint and code digests are filled in later.
    """
    if dataset is None:
        return task_sets.job_plan(spec, job_id)
    if is_program(spec):
        return programs.job_plan(spec, dataset, job_id)
    rows = train_rows(spec, dataset)
    held_out = evaluation_rows(spec, dataset)
    shards = -(-held_out // EVALUATION_SHARD_ROWS)
    return training_pb2.JobPlan(
        job_id=job_id,
        spec=spec.SerializeToString(deterministic=True),
        spec_sha256=spec_sha256(spec),
        shards=spec.data.shards,
        train_rows=rows,
        rows_per_leaf=rows_per_leaf(spec, rows),
        steps_per_epoch=steps_per_epoch(spec, rows),
        total_steps=total_steps(spec, rows),
        evaluation_shards=min(EVALUATION_SHARDS_MAX, shards),
        evaluation_rows=held_out,
        manifest_digest=dataset.manifest_digest,
        bitwise=spec.reproducibility.WhichOneof("mode") == "bitwise",
        unit_span=parts.unit_span(spec),
        local_steps=parts.local_steps(spec.train),
        asynchronous=parts.commits_one_by_one(spec.train),
        verified=parts.verifies(spec.train),
        state_every=parts.state_every(spec),
        by_columns=parts.by_columns(spec.data),
    )


def plan(
    spec: job_spec_pb2.JobSpec,
    dataset: dataset_service_pb2.Dataset | None,
    eligible_workers: int = 0,
    slots_per_worker: int = 1,
    model_bytes: int = 0,
) -> job_pb2.Plan:
    """Return the Plan of a resolved spec: numbers and warnings for people.

    `eligible_workers` is how many workers could run it now; 0 with no warning where none is known.
    `model_bytes` is what a stored model takes that rows are put through; see `take_model`.
    """
    if dataset is None:
        return task_sets.plan(spec, eligible_workers)
    if is_program(spec):
        return programs.plan(spec, dataset, eligible_workers, model_bytes)
    rows = train_rows(spec, dataset)
    steps = total_steps(spec, rows)
    every = spec.train.evaluation.every_steps if spec.train.HasField("evaluation") else 0
    evaluated = steps - updates.rounds_of(spec, dataset).first
    saved = spec.train.checkpoints.every_steps
    return job_pb2.Plan(
        steps=steps,
        rows_per_leaf=rows_per_leaf(spec, rows),
        evaluations=-(-evaluated // every) if every else 0,
        checkpoints=-(-steps // saved) if saved else min(steps, 1),
        worker_bytes=worker_bytes(spec, dataset, slots_per_worker),
        eligible_workers=eligible_workers,
        warnings=_warnings(spec, dataset, eligible_workers),
        epsilon=private.epsilon_at(spec.train, rows, steps),
    )


SCORE_BYTES = 8
"""Of a score, and of any number of boosted trees."""


def worker_bytes(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset, slots: int = 1
) -> int:
    """Return about how much memory a worker needs: two versions, the payload, and its leaves.

    For user code, whose parameters are unknown before a worker has built the model, only the rows
    are counted.
    """
    itemsize = ITEM_BYTES.get(spec.train.dtype, 4)
    elements = catalog.element_count(spec.train.model, dataset.features, len(dataset.classes))
    elements += workspaces.element_count(
        spec, dataset.features, len(dataset.classes), train_rows(spec, dataset)
    )
    if parts.by_columns(spec.data):
        elements *= 1 + parts.optimizer_vectors(spec.train.optimizer)
        elements += rows_per_leaf(spec, train_rows(spec, dataset)) + 1
    all_rows = max(1, sum(dataset.rows.values()))
    bytes_per_row = max(itemsize * _activations(spec, dataset), dataset.size_bytes // all_rows)
    leaf = rows_per_leaf(spec, train_rows(spec, dataset)) * bytes_per_row
    # Two versions and the payload for all slots, a buffer and a gradient for each of them. Nodes
    # that travel by themselves have a payload each.
    units = -(-spec.data.shards // max(1, parts.unit_span(spec))) if parts.unit_span(spec) else 1
    copies = parts.equal_copies(spec.train) if parts.verifies(spec.train) else 1
    payloads = -(-units * copies // max(1, spec.resources.min_workers))
    versions = SHARED_COPIES - 1
    if parts.commits_one_by_one(spec.train):
        # Each slot reads the version that its leaf was started with, and has one payload.
        versions, payloads = versions + slots, slots + 1
    versions += member_copies(spec)
    states = _state_vectors(spec)
    if states:
        versions += 1  # the one at which states are made again
    shared = (versions + payloads + states) * elements * itemsize
    per_slot = COPIES_PER_SLOT + (LOCAL_COPIES if spec.train.HasField("local") else 0)
    return (
        shared
        + slots * (per_slot * elements * itemsize + 3 * leaf)
        + _remembered_bytes(spec, dataset, slots)
    )


def _remembered_bytes(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset, slots: int
) -> int:
    """Return about what leaves of boosting remember from step to step.

    Of each row on the worker its bins, a byte each, and its scores; in each slot the model that
    they come of. See `phalanx.models.binned_rows`.
    """
    if parts.update_kind(spec) != "boosting":
        return 0
    features, classes = dataset.features, len(dataset.classes)
    shards = -(-spec.data.shards // max(1, spec.resources.min_workers))
    rows = shards * rows_per_leaf(spec, train_rows(spec, dataset))
    scores = catalog.tensor_shapes(spec.train.model, features, classes)["base"][0]
    model = catalog.element_count(spec.train.model, features, classes)
    return rows * (features + SCORE_BYTES * scores) + slots * SCORE_BYTES * model


def _state_vectors(spec: job_spec_pb2.JobSpec) -> int:
    """Vectors of the states that a worker holds: of each node the present one and the next."""
    span = max(1, parts.unit_span(spec))
    each = int(parts.feeds_back(spec.train.compression)) + parts.inner_vectors(spec.train) * span
    nodes = -(-spec.data.shards // span)
    return 2 * each * -(-nodes // max(1, spec.resources.min_workers))


def _activations(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> int:
    """Numbers held per row while a leaf runs: the dense row and the layers."""
    made_dense = parts.update_kind(spec) in ("pca", "closed_form", "boosting")
    dense = dataset.features if dataset.format != "csr" or made_dense else 0
    return dense + sum(spec.train.model.mlp.hidden) + len(dataset.classes)


def _warnings(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset, eligible_workers: int
) -> list[str]:
    rows = train_rows(spec, dataset)
    return [
        *_leaf_warnings(spec, rows, eligible_workers),
        *_stop_warnings(spec, rows),
        *_best_warnings(spec, rows),
        *_schedule_warnings(spec, rows),
        *_reduction_warnings(spec, rows),
        *_asynchronous_warnings(spec, rows),
        *_verification_warnings(spec, eligible_workers),
        *margins.warnings(spec),
        *updates.warnings(spec, dataset),
        *private.warnings(spec, rows, total_steps(spec, rows)),
    ]


def _leaf_warnings(spec: job_spec_pb2.JobSpec, rows: int, eligible_workers: int) -> list[str]:
    shards, batch, leaf = spec.data.shards, spec.train.batch_size, rows_per_leaf(spec, rows)
    found = []
    if leaf < SMALL_LEAF_ROWS and shards > 1:
        found.append(
            f"a leaf has {number_of(leaf, 'row')}, under {SMALL_LEAF_ROWS}: most of the time is "
            "overhead; use fewer shards or a larger batch"
        )
    if batch > rows:
        found.append(
            f"batch_size {batch} is more than the {number_of(rows, 'row')}: "
            "every step uses all of them"
        )
    elif batch and batch % parts.row_shards(spec.data) and not is_private(spec.train):
        found.append(
            f"batch_size {batch} is no multiple of {number_of(shards, 'shard')}: "
            f"a step has {number_of(leaf * shards, 'row')}"
        )
    if eligible_workers > shards:
        found.append(
            f"{number_of(shards, 'shard')} {verb_for(shards, 'keeps', 'keep')} {shards} of "
            f"{number_of(eligible_workers, 'worker')} busy; use more shards"
        )
    least = spec.resources.min_workers
    if parts.all_reduces(spec.train) and least > shards:
        found.append(
            f"the job waits for {number_of(least, 'worker')} (resources.min_workers), and with "
            "all_reduce "
            f"{number_of(shards, 'shard')} {verb_for(shards, 'has', 'have')} {shards} of them work"
        )
    return found


def _stop_warnings(spec: job_spec_pb2.JobSpec, rows: int) -> list[str]:
    stop, steps = spec.train.stop, total_steps(spec, rows)
    found = []
    if stop.HasField("steps") and stop.HasField("epochs"):
        each = max(1, parts.local_steps(spec.train))
        by_epochs = stop.epochs * steps_per_epoch(spec, rows) / each
        if by_epochs > stop.steps:
            found.append(f"stop.epochs never fires: stop.steps comes first, at {stop.steps}")
        elif by_epochs < stop.steps:
            found.append(f"stop.steps never fires: stop.epochs comes first, at step {steps}")
    found += _overshoot(spec, rows)
    if steps == 0 and not stop.HasField("wall_time"):
        found.append("no rule bounds the steps: the job may run until it is cancelled")
    every = spec.train.evaluation.every_steps if spec.train.HasField("evaluation") else 0
    watched = [each.metric for each in stop.thresholds if not each.metric.startswith("train/")]
    if watched and steps and every >= steps:
        found.append(
            f"the threshold on {watched[0]} never fires early: the first evaluation is at the end"
        )
    patience = stop.plateau.evaluations * every
    if not stop.plateau.metric.startswith("train/") and 0 < steps <= patience:
        found.append(
            f"stop.plateau never fires: {number_of(stop.plateau.evaluations, 'evaluation')} "
            f"without change take {number_of(patience, 'step')}, the job has {steps}"
        )
    if stop.HasField("wall_time"):
        found.append("stop.wall_time depends on the clock: repeated runs may stop at other steps")
    return found


def _overshoot(spec: job_spec_pb2.JobSpec, rows: int) -> list[str]:
    """Local steps end at a commit, which may be far behind the last epoch that was asked for."""
    stop, each, per_epoch = (
        spec.train.stop,
        parts.local_steps(spec.train),
        steps_per_epoch(spec, rows),
    )
    commits = total_steps(spec, rows)
    used = commits * each / per_epoch
    comes_first = not stop.HasField("steps") or stop.steps > commits
    if not stop.HasField("epochs") or not comes_first or used <= NEAR * stop.epochs:
        return []
    found = (
        f"stop.epochs is {stop.epochs:g} and the job uses {used:.4g}: it ends with a commit, and "
        f"each has {number_of(each, 'local step')}, {each / per_epoch:.3g} of an epoch; use fewer"
    )
    return [found]


def _best_warnings(spec: job_spec_pb2.JobSpec, rows: int) -> list[str]:
    if not spec.output.HasField("best"):
        return []
    best, steps = spec.output.best, total_steps(spec, rows)
    found = []
    if better(best) == -direction(best.metric):
        which = "lowest" if better(best) < 0 else "highest"
        bound = best.WhichOneof("bound")
        found.append(f"output.best keeps the {which} {best.metric}, since its bound is {bound}")
    if 0 < steps <= spec.train.evaluation.every_steps:
        found.append("output.best keeps the last step: the only evaluation is at the end")
    return found


def _schedule_warnings(spec: job_spec_pb2.JobSpec, rows: int) -> list[str]:
    steps, schedule = total_steps(spec, rows), spec.train.optimizer.schedule
    found = []
    if steps and schedule.warm_up_steps >= steps:
        found.append(
            f"the warm-up of {number_of(schedule.warm_up_steps, 'step')} never ends: "
            f"the job has {steps}"
        )
    if steps and schedule.WhichOneof("kind") == "step" and schedule.step.every_steps >= steps:
        found.append("the step schedule never lowers the learning rate within this job")
    saved = spec.train.checkpoints.every_steps
    if steps and saved >= steps and not spec.train.checkpoints.HasField("every"):
        found.append("the only checkpoint is the last one: a lost aggregator starts the job again")
    return found


def _reduction_warnings(spec: job_spec_pb2.JobSpec, rows: int) -> list[str]:
    """The shards that are a row longer have the last step of an epoch for themselves, at times."""
    small, larger = divmod(rows, max(1, spec.data.shards))
    least = parts.least_shards(spec.train.reduction)
    if (
        parts.local_steps(spec.train) > 1
        or not larger
        or small % rows_per_leaf(spec, rows)
        or larger >= least
    ):
        return []
    found = f"the last step of each epoch has rows of {number_of(larger, 'shard')} only"
    why = f"changes nothing: the reducer needs {least}"
    if spec.train.reduction.HasField("median"):
        why = f"outvotes nobody: the median needs {least}"
    return [f"{found} and {why}; use another batch_size"]


def _asynchronous_warnings(spec: job_spec_pb2.JobSpec, rows: int) -> list[str]:
    train, steps = spec.train, total_steps(spec, rows)
    count = number_of(steps, "step")
    if steps and train.asynchronous.barrier_every_clocks >= steps:
        return [f"asynchronous.barrier_every_clocks never fires: the job has {count}"]
    if train.stale.replay_log and not parts.commits_one_by_one(train):
        return ["stale.replay_log changes nothing: with a bound of 0 all shards commit together"]
    # The last step of a shard is steps - 1 ahead of one that has not begun.
    if steps and parts.commits_one_by_one(train) and train.stale.bound >= steps - 1 > 0:
        return [f"stale.bound never fires: the job has {count}, and no shard waits for another"]
    return []


def _verification_warnings(spec: job_spec_pb2.JobSpec, eligible_workers: int) -> list[str]:
    """Copies are compared between workers, so there must be enough of them."""
    if not parts.verifies(spec.train):
        return []
    least = parts.equal_copies(spec.train)
    if not 0 < eligible_workers < least:
        return []
    found = (
        f"{number_of(least, 'worker')} have to agree on what is verified, and there "
        f"{verb_for(eligible_workers, 'is', 'are')} {eligible_workers}: the job waits for more"
    )
    return [found]
