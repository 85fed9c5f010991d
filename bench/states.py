"""What it costs to make the states of shards again: from `kill -9` of a worker to the next commit.

Three workers with four shards each take local steps that wait instead of computing. Against the
same job whose shards remember nothing, where only the step that was broken off is done again.
"""

from __future__ import annotations

from typing import Any

from bench.clusters import add_tiny_data, cluster, idle_job, median
from bench.recovery import WORKERS, kill_again_and_again
from bench.results import Measurement

TRIALS = 15
SHARDS = 4 * WORKERS
OWN_STEP_S = 0.005
WAITING_LEAF = f"""
import time

from idle import Idle


class Waiting(Idle):
    def gradient(self, parameters, batch, out):
        time.sleep({OWN_STEP_S})
        return super().gradient(parameters, batch, out)
"""
MOMENTUM = {"learning_rate": 0.1, "momentum": 0.9}


def run(command: str) -> list[Measurement]:
    """`states_again_8_steps_s` (a base in 4 versions) and `…_32_steps_s` (each is one), medians."""
    return [_compared(steps, command) for steps in (8, 32)]


def _compared(steps: int, command: str) -> Measurement:
    without, with_states = (_seconds(steps, sgd) for sgd in ({"learning_rate": 0.1}, MOMENTUM))
    plain, found = median(without), median(with_states)
    return Measurement(
        f"states_again_{steps}_steps_s",
        found,
        "s",
        plain,
        found / plain,
        "",
        None,
        command,
        note=f"medians of {TRIALS} kills; largest {with_states[-1]:.3f} s, without states "
        f"{without[-1]:.3f} s; {steps} own steps of {OWN_STEP_S * 1e3:g} ms, {SHARDS} shards",
    )


def _seconds(steps: int, sgd: dict[str, Any]) -> list[float]:
    job = idle_job("states", 10_000, SHARDS, 10_000_000, {"sgd": sgd})
    job["code"]["files"]["waiting.py"] = WAITING_LEAF
    job["train"]["model"]["custom"]["entrypoint"] = "waiting:Waiting"
    del job["train"]["synchronous"]
    job["train"]["local"] = {"steps": steps}
    with cluster(workers=WORKERS) as running:
        add_tiny_data(running)
        return kill_again_and_again(running, running.submit(job), TRIALS)
