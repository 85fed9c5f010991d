"""Job files whose versions no elementwise optimizer makes; see ``phalanx.updates``.

Their defaults, and what does not go with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from phalanx.errors import Violation
from phalanx.specs import parts
from phalanx.texts import number_of
from phalanx.v1 import dataset_service_pb2, job_spec_pb2
from phalanx.v1.training_pb2 import JobPlan

_ALL_ROWS = ("k_means", "pca", "boosting", "closed_form", "cocoa")
"""Each step of these reads every row."""

K_MEANS_STEPS = 50

BOOSTING = job_spec_pb2.Boosting(
    trees=100, learning_rate=0.1, depth=6, bins=64, l2=1.0, min_leaf_rows=20
)
"""What a job has that says nothing."""

COMPONENTS_MAX = 4096
"""Features of pca and closed_form: the vector has the square of them."""


def resolve(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> None:
    """Write out the defaults of such a job; others stay as they are."""
    train, kind = spec.train, parts.update_kind(spec)
    if kind in ("", parts.COLUMNS):
        return
    train.dtype = train.dtype or "float64"
    if kind in parts.PASSES:
        train.stop.steps = parts.PASSES[kind]
    if kind == "k_means" and not train.HasField("stop"):
        train.stop.steps = K_MEANS_STEPS
    if kind == "cocoa":
        cocoa = train.optimizer.cocoa
        if not cocoa.HasField("local_passes"):
            cocoa.local_passes = 1
        if not cocoa.HasField("sigma"):
            cocoa.sigma = spec.data.shards
    if kind == "boosting":
        given = job_spec_pb2.Boosting.FromString(train.model.boosting.SerializeToString())
        train.model.boosting.CopyFrom(BOOSTING)
        train.model.boosting.MergeFrom(given)
        rounds = rounds_of(spec, dataset)
        most = rounds.steps(train.model.boosting.trees)
        train.stop.steps = min(train.stop.steps, most) if train.stop.HasField("steps") else most


@dataclass(frozen=True)
class Rounds:
    """Steps of a job whose model grows by rounds of several steps, as boosting does: `first` before
    the first round, then `each`. A job without rounds has one in each step."""

    first: int = 0
    each: int = 1

    def steps(self, rounds: int) -> int:
        """Return the steps of so many rounds."""
        return self.first + rounds * self.each

    def ends_at(self, step: int) -> bool:
        """Whether a round ends with a step, counted from 1."""
        return step > self.first and (step - self.first) % self.each == 0

    def whole(self, steps: int) -> int:
        """Return at least so many steps, as whole rounds."""
        return -(-steps // self.each) * self.each


def rounds_of(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> Rounds:
    """Return the rounds of a job whose model is resolved."""
    return _rounds(spec, len(dataset.classes))


def planned_rounds(plan: JobPlan) -> Rounds:
    """Return the rounds of a job whose layout is known."""
    spec = job_spec_pb2.JobSpec.FromString(plan.spec)
    if parts.update_kind(spec) != "boosting":
        return Rounds()  # tensors of other models may have these names, and any shape
    sizes = {tensor.name: tensor.shape[0] for tensor in plan.layout.tensors}
    return _rounds(spec, sizes.get("class_rows", 0))


def _rounds(spec: job_spec_pb2.JobSpec, classes: int) -> Rounds:
    """Before the first tree it is told where values lie and, for numbers, what their mean is; then
    each step grows one level of one tree, and each round a tree for each output."""
    if parts.update_kind(spec) != "boosting":
        return Rounds()
    outputs = classes if classes > 2 else 1
    return Rounds(1 if classes else 2, max(1, spec.train.model.boosting.depth) * outputs)


def warnings(spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset) -> list[str]:
    """Return what is allowed and probably not meant."""
    rounds, steps = rounds_of(spec, dataset), spec.train.stop.steps
    if parts.update_kind(spec) != "boosting" or rounds.ends_at(steps):
        return []
    over, left = divmod(max(0, steps - rounds.first), rounds.each)
    found = (
        f"stop.steps ends the job within a round of trees, after {number_of(left, 'step')} of its "
        f"{rounds.each}: the last trees are smaller; the round ends at {rounds.steps(over + 1)}"
    )
    return [found]


def violations(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    """Yield what such a job cannot have; works on raw as well as resolved specs."""
    train, kind = spec.train, parts.update_kind(spec)
    if not kind:
        return
    model = train.model.WhichOneof("kind")
    if kind == model and train.HasField("optimizer"):
        message = f"is not needed: {kind} moves its parameters by a rule of its own; leave it out"
        yield Violation("train.optimizer", message)
    if kind == "closed_form" and model != "linear_regression":
        message = "solves the equations of linear_regression; use another optimizer for others"
        yield Violation("train.optimizer.closed_form", message)
    if kind in _ALL_ROWS and train.batch_size:
        message = f"must be left out: each step of {kind} reads all rows"
        yield Violation("train.batch_size", message)
    if kind in parts.UPDATED_MODELS and train.l2:
        yield Violation("train.l2", f"must be left out: {kind} has no weights to keep short")
    if kind == "k_means" and train.model.k_means.clusters < 2:
        message = f"must be at least 2, not {train.model.k_means.clusters}"
        yield Violation("train.model.k_means.clusters", message)
    if kind == "pca" and train.model.pca.components < 1:
        message = f"must be at least 1, not {train.model.pca.components}"
        yield Violation("train.model.pca.components", message)
    if kind == "boosting" and train.dtype == "float32":
        message = "must be float64, in which the sums of the histograms are exact; leave it out"
        yield Violation("train.dtype", message)
    yield from _stop(train, kind)
    yield from _parts(spec, kind)


def violations_against(spec: job_spec_pb2.JobSpec, features: int, rows: int) -> Iterator[Violation]:
    """Yield what is wrong between such a job and data of so many features and train rows."""
    kind = parts.update_kind(spec)
    if kind in ("pca", "closed_form") and features > COMPONENTS_MAX:
        path = "train.model.pca" if kind == "pca" else "train.optimizer.closed_form"
        message = (
            f"adds up the products of {number_of(features, 'feature')} with one another; it takes "
            f"at most {COMPONENTS_MAX}"
        )
        yield Violation(path, f"{message}: choose fewer in data.features")
    components, clusters = spec.train.model.pca.components, spec.train.model.k_means.clusters
    if kind == "pca" and components > features:
        message = f"{components} are more than the {number_of(features, 'feature')}"
        yield Violation("train.model.pca.components", message)
    if kind == "k_means" and clusters > rows:
        message = f"{clusters} are more than the {number_of(rows, 'row')}"
        yield Violation("train.model.k_means.clusters", message)


def _stop(train: job_spec_pb2.Train, kind: str) -> Iterator[Violation]:
    """Algorithms that end by themselves have no other end; boosting is counted in rounds."""
    if kind == "boosting" and train.stop.HasField("epochs"):
        message = (
            "must be left out: each step of boosting passes over all rows, and a tree takes as "
            "many as it has levels; give train.model.boosting.trees"
        )
        yield Violation("train.stop.epochs", message)
    steps = parts.PASSES.get(kind)
    if steps is None:
        return
    stop = train.stop
    given = [name for name in ("epochs", "plateau", "wall_time") if stop.HasField(name)]
    given += ["thresholds"] if stop.thresholds else []
    given += ["steps"] if stop.HasField("steps") and stop.steps != steps else []
    for name in given:
        message = f"must be left out: {kind} has {number_of(steps, 'step')}"
        yield Violation(f"train.stop.{name}", message)


def _parts(spec: job_spec_pb2.JobSpec, kind: str) -> Iterator[Violation]:
    train = spec.train
    whole = f"{kind} needs all contributions of a step at once, as they are"
    if parts.commits_one_by_one(train) or train.HasField("local"):
        path = f"train.{train.WhichOneof('consistency')}"
        yield Violation(path, f"{whole}; use synchronous")
    if parts.all_reduces(train):
        message = f"{kind} is made in the one place where all sums come in; use parameter_server"
        yield Violation("train.all_reduce", message)
    if parts.backup_shards(train):
        yield Violation("train.synchronous.backup_shards", f"{whole}; leave it out")
    if parts.reduces_leaves(train):
        yield Violation(f"train.reduction.{parts.leaf_reducer(train)}", f"{whole}; leave it out")
    up = train.compression.WhichOneof("up")
    if up:
        yield Violation(f"train.compression.{up}", f"{whole}; leave it out")
    if train.compression.down_cast_to:
        yield Violation("train.compression.down_cast_to", f"{whole}; leave it out")
    if train.on_nonfinite.HasField("skip"):
        yield Violation("train.on_nonfinite.skip", f"{whole}; use fail")
    if kind == parts.COLUMNS:
        return
    if train.HasField("start"):
        path = f"train.start.{train.start.WhichOneof('from') or 'model'}"
        if train.start.WhichOneof("from") != "job":
            message = f"{kind} begins with sums over all rows, not with parameters; leave it out"
            if kind == "cocoa":
                message = (
                    "has weights without the dual variables that they are made of, which cocoa "
                    "goes on from; leave it out"
                )
            yield Violation(path, message)
    if train.optimizer.HasField("clip_norm"):
        yield Violation("train.optimizer.clip_norm", f"{kind} has no gradient; leave it out")
    balance = spec.data.WhichOneof("balance")
    if balance:
        yield Violation(f"data.{balance}", f"{kind} counts every row once; leave it out")
