"""What an aggregator measures of one job."""

from __future__ import annotations

import math
import time

import numpy as np

from coordinator.aggregation.core.effects import Committed
from coordinator.aggregation.core.plan import GRADIENT_VECTOR
from phalanx.compressors import build_down_codec, build_up_codec
from phalanx.frames import decode_response
from phalanx.telemetry.metrics import AggregatorMetrics
from phalanx.training.decisions import RootDecider
from phalanx.v1 import aggregation_service_pb2 as pb
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan


class JobGauges:
    """The series of one job; nothing is counted where the limit of jobs with series is reached."""

    def __init__(
        self, metrics: AggregatorMetrics, job_id: str, plan: JobPlan | None = None
    ) -> None:
        """The `plan` tells how frames are encoded; without one they are not."""
        spec = JobSpec.FromString(plan.spec) if plan is not None else JobSpec()
        up, down = build_up_codec(spec), build_down_codec(spec.train)
        self._up = None if up is None else up.name
        self._down = down
        self._itemsize = np.dtype(spec.train.dtype or "float32").itemsize
        self._metrics = metrics
        self._job_id = job_id
        self._admitted = metrics.per_job.admits(job_id)
        self._last_commit_s: float | None = None
        if self._admitted:
            metrics.per_job.resume(job_id)
            wire = metrics.wire_bytes_total
            self._received = wire.labels(job_id, "in", "raw")
            self._received_encoded = wire.labels(job_id, "in", self._up or "raw")
            self._sent = wire.labels(job_id, "out", "raw" if down is None else down.name)
            whole = metrics.wire_uncompressed_bytes_total
            self._received_whole = whole.labels(job_id, "in")
            self._sent_whole = whole.labels(job_id, "out")
            self._steps = metrics.step_seconds.labels(job_id)
            self._step = metrics.job_step.labels(job_id)
            self._examples = metrics.job_examples_total.labels(job_id)
            self._lost = metrics.job_examples_lost_total.labels(job_id)
            self._doubled = metrics.job_examples_doubled_total.labels(job_id)
            self._verified = metrics.verified_leaves_total.labels(job_id)
            self._outvoted = metrics.outvoted_copies_total.labels(job_id)
            self._staleness = metrics.staleness_versions.labels(job_id)

    def received(self, frame: pb.ContributionFrame, size_bytes: int, payload_bytes: int) -> None:
        """A frame came in."""
        if not self._admitted:
            return
        if self._up is None or frame.vector != GRADIENT_VECTOR or not payload_bytes:
            self._received.inc(size_bytes)
            self._received_whole.inc(size_bytes)
        else:
            self._received_encoded.inc(size_bytes)
            whole_bytes = frame.element_count * self._itemsize
            self._received_whole.inc(size_bytes - payload_bytes + whole_bytes)

    def sent(self, message: bytes) -> None:
        """A message went out."""
        if not self._admitted:
            return
        size_bytes = len(message)
        self._sent.inc(size_bytes)
        if self._down is not None:
            header, payload = decode_response(message)
            size_bytes += header.frame.element_count * self._itemsize - len(payload)
        self._sent_whole.inc(size_bytes)

    def committed(self, effect: Committed, now_s: float) -> None:
        """A step is done."""
        if not self._admitted:
            return
        self._step.set(effect.version)
        self._examples.inc(effect.example_count)
        self._lost.inc(max(0, effect.expected_count - effect.example_count))
        self._doubled.inc(max(0, effect.example_count - effect.expected_count))
        for each in effect.staleness:
            self._staleness.observe(each)
        if self._last_commit_s is not None:
            self._steps.observe(now_s - self._last_commit_s)
        self._last_commit_s = now_s

    def verified(self) -> None:
        """Copies of a contribution are equal."""
        if self._admitted:
            self._verified.inc()

    def outvoted(self) -> None:
        """A worker's copy differs from that of a majority."""
        if self._admitted:
            self._outvoted.inc()

    def metrics(self, decider: RootDecider | None) -> None:
        """Show the newest values of the job's metrics."""
        if self._admitted and decider is not None:
            for name, value in decider.metrics.items():
                if math.isfinite(value):
                    self._metrics.job_metric.labels(self._job_id, name).set(value)

    def replayed(self, steps: int) -> None:
        """A roll-back makes these steps run again."""
        if self._admitted:
            self._metrics.steps_replayed_total.labels(self._job_id).inc(max(0, steps))

    def checkpointed(self, seconds: float) -> None:
        """A part became durable."""
        if self._admitted:
            self._metrics.checkpoint_seconds.labels(self._job_id).observe(seconds)
            gauge = self._metrics.checkpoint_last_success_timestamp_seconds
            gauge.labels(self._job_id).set(time.time())

    def ended(self) -> None:
        """The job left this process; its series go after a while."""
        self._metrics.per_job.end(self._job_id, time.monotonic())
