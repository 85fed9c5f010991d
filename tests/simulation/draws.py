"""What a run of the simulator draws of its jobs."""

from __future__ import annotations

import random

from tests.simulation import jobs
from tests.simulation.parts import INNER, PARTS, STATEFUL

ALL_FROM_SEED = 1000
"""Seeds below draw less: they are those of directed scenarios, and stay what they are."""

INNER_SHARE = 0.12
"""Part of the jobs with parts whose shards' own optimizers remember their steps."""


def draw_parts(chance: random.Random, seed: int) -> str:
    """Draw what a job is composed of."""
    if seed < ALL_FROM_SEED or chance.random() < 0.5:
        return ""
    drawn = chance.choice(sorted(PARTS.keys() - set(STATEFUL)))
    states = random.Random(f"states {seed}")
    inner = random.Random(f"inner states {seed}")
    if inner.random() < INNER_SHARE:
        return inner.choice(sorted(INNER))
    return states.choice(STATEFUL) if states.random() < 0.25 else drawn


def draw_shape(chance: random.Random) -> jobs.Shape:
    """Draw a job, out of few enough that their references are computed once."""
    return jobs.Shape(
        elements=chance.choice([40, 100, 160]),
        shards=chance.choice([3, 4, 6, 8]),
        steps=chance.choice([30, 50]),
        optimizer=chance.choice(["sgd", "momentum", "adam"]),
        dtype=chance.choice(["float32", "float32", "float64"]),
        checkpoint_every=chance.choice([3, 7, 20]),
        evaluate_every=chance.choice([0, 0, 9]),
    )
