"""Two jobs on the same workers, in virtual time: who has priority ends first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phalanx.testing.simulation.faults import Schedule
from phalanx.v1.job_pb2 import Job
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.simulation import jobs
from tests.simulation.cluster import services
from tests.simulation.runs import Run, draw

STEPS = 50


def seconds(monkeypatch: pytest.MonkeyPatch, priorities: dict[int, int]) -> list[float]:
    """Run a job for each number of elements, with its priority; return how long each took."""
    made = jobs.job_spec

    def job_spec(shape: jobs.Shape, name: str) -> JobSpec:
        spec = made(shape, name)
        spec.priority = priorities[shape.elements]
        return spec

    monkeypatch.setattr(jobs, "job_spec", job_spec)
    shapes = tuple(
        jobs.Shape(elements=elements, shards=8, steps=STEPS, checkpoint_every=STEPS)
        for elements in priorities
    )
    settings = replace(
        draw(3), workers=2, slots=1, leaf_s=0.01, mixed=False, shapes=shapes, aggregators=1
    )
    with services() as given:
        run = Run(given, settings, 3, None)
        run.user.waits_s = [0.0] * len(shapes)
        try:
            run.start()
            run.heal(Schedule(run.world, {}, every_s=settings.every_s, share=0.0))
            run.converge()
            ended = [run.user.last[job_id] for job_id in run.user.ids]
        finally:
            run.close()
            given.collect_garbage()
    assert [job.state for job in ended] == [Job.STATE_SUCCEEDED] * len(ended), ended
    return [job.end_time.ToNanoseconds() - ended[0].start_time.ToNanoseconds() for job in ended]


def test_the_job_of_higher_priority_gets_more_of_the_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    high, low = seconds(monkeypatch, {100: 90, 160: 10})
    assert high < 0.75 * low


def test_jobs_of_one_priority_take_equally_long(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = seconds(monkeypatch, {100: 50, 160: 50})
    assert 0.9 < first / second < 1.1
