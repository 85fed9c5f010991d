"""Estimates π from random points: each call is one task, with its own seed."""

import random


def estimate(seed: int, points: int) -> dict[str, int]:
    """Count the points of a square that lie inside its quarter circle."""
    draw = random.Random(seed)
    inside = sum(draw.random() ** 2 + draw.random() ** 2 <= 1 for _ in range(points))
    return {"inside": inside, "points": points}
