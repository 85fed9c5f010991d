"""The cost of a step itself: 10,000 parameters, two workers, no arithmetic."""

from __future__ import annotations

from bench.clusters import add_tiny_data, cluster, idle_job, median, steps_per_s
from bench.results import Measurement

STEPS = 4_000
ROUNDS = 3


def run(command: str) -> list[Measurement]:
    """`small_model_steps_per_s`."""
    rates = []
    with cluster(workers=2) as running:
        add_tiny_data(running)
        for number in range(ROUNDS):
            sgd = {"sgd": {"learning_rate": 0.1}}
            job = running.submit(idle_job(f"small-{number}", 10_000, 2, STEPS, sgd))
            job.wait(timeout_s=300)
            rates.append(steps_per_s(job, STEPS // 4))
    rate = median(rates)
    return [
        Measurement(
            "small_model_steps_per_s", rate, "steps/s", None, None, ">= 500", rate >= 500, command
        )
    ]
