"""Which parts of a job do not go together, each with a sentence that says why.

Works on raw as well as resolved specs: what is not written yet is not complained about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from phalanx.errors import Violation
from phalanx.privacy.settings import is_private
from phalanx.specs import catalog, margins, parts, private
from phalanx.texts import number_of
from phalanx.v1 import job_spec_pb2

LOCAL_STEPS_MAX = 65_536
REPLICAS_LEAST, REPLICAS_MAX = 3, 63
AUDIT_WORKERS = 3
"""Whoever is right, of two workers that disagree, only a third one can say."""


def violations(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    """Yield what cannot hold together in a training job."""
    if spec.train.reduction.HasField("trimmed_mean") and spec.train.reduction.trimmed_mean.trim < 1:
        yield Violation("train.reduction.trimmed_mean.trim", "must be at least 1")
    if spec.train.HasField("local") and not 1 <= spec.train.local.steps <= LOCAL_STEPS_MAX:
        message = f"must be at least 1 and at most {LOCAL_STEPS_MAX}, not {spec.train.local.steps}"
        yield Violation("train.local.steps", message)
    yield from _compression(spec.train.compression)
    if spec.data.HasField("shards"):
        yield from _reduction(spec.train.reduction, spec.data.shards)
    yield from _backup(spec)
    yield from _feedback(spec)
    yield from _inner_optimizer(spec)
    yield from _one_by_one(spec)
    if parts.verifies(spec.train):
        yield from _verification(spec)
    yield from _all_reduce(spec)
    yield from margins.violations(spec.train)
    if is_private(spec.train):
        yield from private.violations(spec)


def _verification(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    """What does not go together with copies that are compared bit by bit."""
    verification, path = spec.train.verification, "train.verification"
    replicas, fraction = verification.replicas, verification.audit_fraction
    audits = verification.WhichOneof("kind") == "audit_fraction"
    # What is no number at all is said for every field alike.
    if audits and math.isfinite(fraction) and not 0 < fraction <= 1:
        message = f"must be above 0 and at most 1, not {fraction:.16g}"
        yield Violation(f"{path}.audit_fraction", message)
    elif verification.WhichOneof("kind") == "replicas":
        yield from _replicas(replicas)
    needed = AUDIT_WORKERS if audits else replicas or REPLICAS_LEAST
    most = spec.resources.max_workers
    # Backup shards need a tolerant job; that the two do not go together is said there.
    backup = parts.backup_shards(spec.train) > 0
    if 0 < most < needed:
        message = (
            f"{number_of(most, 'worker')} cannot make {number_of(needed, 'copy', 'copies')} of a "
            "contribution, each on a worker of its own; "
            f"use at least {needed}, or no limit"
        )
        yield Violation("resources.max_workers", message)
    if parts.commits_one_by_one(spec.train):
        kind = spec.train.WhichOneof("consistency")
        message = (
            f"each contribution is computed at parameters that {kind} makes in the order of "
            "arrival and applied at once, so there is no second copy to compare it with; use "
            "synchronous or local"
        )
        yield Violation(path, message)
    elif spec.reproducibility.WhichOneof("mode") == "tolerant" and not backup:
        message = (
            "workers of a tolerant job may compute other bits, so copies that differ say nothing "
            "about who is wrong; leave this out"
        )
        yield Violation("reproducibility.tolerant", message)
    elif spec.reproducibility.bitwise.HasField("fall_back_after"):
        message = (
            "the job would go on on workers that compute other bits, and copies from before and "
            "after would differ although nobody is wrong; leave this out"
        )
        yield Violation("reproducibility.bitwise.fall_back_after", message)


def _replicas(replicas: int) -> Iterator[Violation]:
    path = "train.verification.replicas"
    if not REPLICAS_LEAST <= replicas <= REPLICAS_MAX:
        message = (
            f"must be at least {REPLICAS_LEAST}, since of fewer copies that differ none has a "
            f"majority, and at most {REPLICAS_MAX}, not {replicas}"
        )
        yield Violation(path, message)
    elif replicas % 2 == 0:
        message = (
            f"must be odd: {number_of(replicas, 'copy', 'copies')} stand no more wrong ones than "
            f"{replicas - 1}; use {replicas - 1} or {replicas + 1}"
        )
        yield Violation(path, message)


def _all_reduce(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    """What does not go together with workers that own the parameters."""
    train = spec.train
    if not parts.all_reduces(train):
        return
    instead = "use parameter_server, or leave this out"
    if parts.commits_one_by_one(train):
        message = (
            "applies each contribution by itself, in the order in which it comes, and with "
            "all_reduce there is no one place that decides an order; use parameter_server"
        )
        yield Violation(f"train.{train.WhichOneof('consistency')}", message)
    if parts.backup_shards(train):
        message = (
            "leaves out the slowest shards of a step, and with all_reduce the owner of each range "
            f"would leave out others; {instead}"
        )
        yield Violation("train.synchronous.backup_shards", message)
    if parts.reduces_leaves(train):
        message = (
            "has to see the whole contribution of each shard, and with all_reduce each worker "
            f"sees one range of their sums; {instead}"
        )
        yield Violation(f"train.reduction.{parts.leaf_reducer(train)}", message)
    up = train.compression.WhichOneof("up")
    for encoding in (up, "down_cast_to" if train.compression.down_cast_to else None):
        if encoding:
            message = (
                "is for lines to a parameter server: with all_reduce sums of several shards "
                "travel, twice, and what encoding loses would be lost more than once; "
                f"{instead}"
            )
            yield Violation(f"train.compression.{encoding}", message)
    if parts.verifies(train):
        message = (
            "compares the contributions of several workers in the one place where all come in, and "
            f"with all_reduce the owner of a range may be the one that lies; {instead}"
        )
        yield Violation("train.verification", message)
    if spec.reproducibility.HasField("tolerant"):
        message = (
            "lets workers compute other bits, and with all_reduce each updates a copy of the "
            "parameters of its own, so that the copies would drift apart; use bitwise"
        )
        yield Violation("reproducibility.tolerant", message)


def _one_by_one(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    """What does not go together with contributions that commit by themselves."""
    train = spec.train
    barrier, strength = train.asynchronous.barrier_every_clocks, "delay_compensated.strength"
    if train.HasField("stale") and train.stale.bound < 0:
        yield Violation("train.stale.bound", f"must be at least 0, not {train.stale.bound}")
    if barrier < 0:
        path = "train.asynchronous.barrier_every_clocks"
        yield Violation(path, f"must be at least 0, not {barrier}")
    given = train.asynchronous.delay_compensated
    if given.HasField("strength") and not 0 <= given.strength < math.inf:
        message = f"must be a number from 0 on, not {given.strength}"
        yield Violation(f"train.asynchronous.{strength}", message)
    if not parts.commits_one_by_one(train):
        return
    if spec.reproducibility.HasField("bitwise"):
        message = (
            "contributions are applied in the order in which they come, so no bits can be "
            "promised; leave this out, or use synchronous"
        )
        yield Violation("reproducibility.bitwise", message)
    if parts.reduces_leaves(train):
        message = (
            "compares the contributions of all shards, and here each is applied before the others "
            "are there; use optimizer.clip_norm against long gradients, or synchronous"
        )
        yield Violation(f"train.reduction.{parts.leaf_reducer(train)}", message)


def _feedback(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    """What does not go together with errors that are added to a node's next contribution."""
    train = spec.train
    if not parts.feeds_back(train.compression):
        return
    path = f"train.compression.{train.compression.WhichOneof('up')}"
    instead = "use int8 or cast_to, which need no such memory"
    if parts.commits_one_by_one(train):
        message = (
            "adds what a contribution lost to the next one, which has to follow it, and here each "
            f"commits in its own time; {instead}, or synchronous"
        )
        yield Violation(path, message)
    if parts.backup_shards(train) > 0:
        message = (
            "adds what a contribution lost to the next one, and whose contribution is left out "
            f"would lose both; {instead}, or no backup shards"
        )
        yield Violation(path, message)
    if parts.verifies(train):
        message = (
            "is computed from a state that only a node's own worker has, so copies say nothing "
            f"of other workers; {instead}, or no verification"
        )
        yield Violation(path, message)
    if parts.reduces_leaves(train):
        message = (
            "sends a part of each contribution now and the rest later, so the contributions of a "
            f"step cannot be compared or measured; {instead}, or use optimizer.clip_norm"
        )
        yield Violation(path, message)
    if train.on_nonfinite.HasField("skip"):
        message = (
            "makes the errors of a lost worker again from the steps before, and which shards were "
            "left out of these is not kept; use fail, or a compressor other than "
            f"{train.compression.WhichOneof('up')}"
        )
        yield Violation("train.on_nonfinite.skip", message)


def _inner_optimizer(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    """What does not go together with optimizers of shards that remember their steps."""
    train = spec.train
    if not parts.inner_vectors(train):
        return
    kind = train.optimizer.WhichOneof("kind")
    path = "train.optimizer.sgd.momentum" if kind == "sgd" else f"train.optimizer.{kind}"
    what = "momentum" if kind == "sgd" else kind
    instead = "use sgd without momentum here, and momentum in train.local.outer"
    if parts.all_reduces(train):
        message = (
            f"with local steps {what} keeps a state for each shard, of which aggregators keep a "
            "copy for the case that its worker dies, and with all_reduce there are none; use "
            f"parameter_server, or {instead}"
        )
        yield Violation(path, message)
    if parts.verifies(train):
        message = (
            f"with local steps {what} keeps a state for each shard, which only the shard's own "
            "worker has, so copies say nothing of other workers; leave verification out, or "
            f"{instead}"
        )
        yield Violation(path, message)
    if train.on_nonfinite.HasField("skip"):
        message = (
            f"with local steps the state of {what} of a lost worker is made again from the steps "
            "before, and which shards were left out of these is not kept; use fail, or "
            f"{instead}"
        )
        yield Violation("train.on_nonfinite.skip", message)


def _backup(spec: job_spec_pb2.JobSpec) -> Iterator[Violation]:
    backup, path = parts.backup_shards(spec.train), "train.synchronous.backup_shards"
    least = parts.least_shards(spec.train.reduction)
    if backup < 0:
        yield Violation(path, f"must be at least 0, not {backup}")
    elif backup and parts.verifies(spec.train):
        message = (
            "lets who is slow decide which shards count, so the job can promise no bits, and "
            "verification finds out who is wrong by the bits of all; use one of the two"
        )
        yield Violation(path, message)
    elif backup and spec.reproducibility.WhichOneof("mode") != "tolerant":
        message = (
            "who is slow decides which shards count, so no bits can be promised; write "
            "reproducibility: {tolerant: {}}, or leave this out"
        )
        yield Violation(path, message)
    elif backup and spec.data.HasField("shards") and spec.data.shards - backup < least:
        shards = spec.data.shards
        message = f"leaves {max(0, shards - backup)} of {number_of(shards, 'shard')}"
        needs = f"a step needs {least}; use at most {max(0, shards - least)}"
        yield Violation(path, f"{message}, and {needs}")


def _compression(compression: job_spec_pb2.Compression) -> Iterator[Violation]:
    if compression.HasField("top_k") and not 0 < compression.top_k.fraction <= 1:
        message = f"must be above 0 and at most 1, not {compression.top_k.fraction}"
        yield Violation("train.compression.top_k.fraction", message)
    for field in ("cast_to", "down_cast_to"):
        name = getattr(compression, field)
        if (name or compression.WhichOneof("up") == field) and name not in catalog.CASTS:
            message = f"{name[:40]!r} is not known; use {' or '.join(catalog.CASTS)}"
            yield Violation(f"train.compression.{field}", message)


def _reduction(reduction: job_spec_pb2.Reduction, shards: int) -> Iterator[Violation]:
    kind, least = reduction.WhichOneof("kind"), parts.least_shards(reduction)
    if kind == "median" and shards < least:
        needed = number_of(least, "shard")
        message = f"needs at least {needed} to outvote one, and the job has {shards}"
        yield Violation("train.reduction.median", f"{message}; raise data.shards")
    elif kind == "trimmed_mean" and shards < least:
        trim = reduction.trimmed_mean.trim
        message = (
            f"leaves out the {trim} largest and the {trim} smallest of {shards} values, which "
            f"is all of them; raise data.shards to at least {least}"
        )
        yield Violation("train.reduction.trimmed_mean.trim", message)
    elif kind == "krum":
        faulty, keep = reduction.krum.faulty, reduction.krum.keep
        if shards < least:
            message = (
                f"{faulty} faulty shards can be told from the others among at least {least} "
                f"(2 · faulty + 3), and the job has {shards}; raise data.shards"
            )
            yield Violation("train.reduction.krum.faulty", message)
        elif keep > shards - faulty:
            message = (
                f"{keep} of {number_of(shards, 'shard')} cannot be kept if {faulty} may be "
                f"faulty; use at most {shards - faulty}"
            )
            yield Violation("train.reduction.krum.keep", message)
