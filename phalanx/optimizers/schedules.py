"""Learning rates as pure functions of the step."""

from __future__ import annotations

import math

from phalanx.v1.job_spec_pb2 import Optimizer, Schedule


def base_rate(optimizer: Optimizer) -> float:
    """Return the learning rate that the optimizer's message names."""
    kind = optimizer.WhichOneof("kind")
    return float(getattr(optimizer, kind).learning_rate) if kind else 0.0


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """Return the rate of the update that makes version ``step + 1``.

    Args:
        optimizer: resolved message with its schedule.
        step: the version at which the gradient was taken, from 0.
        total_steps: the job's length, for cosine; 0 where it has none.

    The first ``warm_up_steps`` updates rise linearly to the base rate; the schedule counts from the
    end of the warm-up. Cosine: Loshchilov and Hutter, "SGDR" (2017), equation 5, without restarts.
    """
    rate = base_rate(optimizer)
    schedule = optimizer.schedule
    warm_up = schedule.warm_up_steps
    if step < warm_up:
        return rate * (step + 1) / warm_up
    return rate * _factor(schedule, step - warm_up, max(1, total_steps - warm_up))


def _factor(schedule: Schedule, step: int, total_steps: int) -> float:
    match schedule.WhichOneof("kind"):
        case "step":
            return float(schedule.step.factor ** (step // max(1, schedule.step.every_steps)))
        case "cosine":
            final = schedule.cosine.final_fraction
            progress = min(1.0, step / total_steps)
            return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "inverse_time":
            return 1.0 / (1.0 + schedule.inverse_time.decay * step)
        case _:
            return 1.0
