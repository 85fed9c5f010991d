"""The configurations of a sweep: combinations of the values of its grid, in one order.

Their order is that of scikit-learn's `ParameterGrid`: paths are sorted, and the values of the last
one change fastest. A configuration is known by its number in it. Needs no numeric library.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError

from phalanx.errors import InvalidArgument
from phalanx.v1.job_spec_pb2 import JobSpec, Sweep


@dataclass(frozen=True)
class Configuration:
    """One combination: its number, and its values by field path."""

    number: int
    values: Mapping[str, Any]

    def __str__(self) -> str:
        from phalanx.specs.canonical import canonical_json

        return ", ".join(f"{path} = {canonical_json(each)}" for path, each in self.values.items())


def combinations(sweep: Sweep) -> int:
    """Return how many combinations of values there are."""
    return math.prod(len(values.values) for values in sweep.grid.values())


def count_of(sweep: Sweep) -> int:
    """Return how many configurations are tried."""
    return min(sweep.random_trials or combinations(sweep), combinations(sweep))


def configurations(spec: JobSpec) -> list[Configuration]:
    """Return the configurations of a sweep; drawn ones depend on its seed."""
    from phalanx.specs.canonical import to_json

    grid: Any = to_json(spec.sweep).get("grid", {})
    paths = sorted(grid)
    found = []
    for number, place in enumerate(_places(spec)):
        values, rest = {}, place
        for path in reversed(paths):
            rest, index = divmod(rest, len(grid[path]))
            values[path] = grid[path][index]
        found.append(Configuration(number, {path: values[path] for path in paths}))
    return found


def _places(spec: JobSpec) -> Sequence[int]:
    """Return which of all combinations are tried, ascending."""
    total, wanted = combinations(spec.sweep), count_of(spec.sweep)
    if wanted == total:
        return range(total)
    drawn: set[int] = set()
    turn = 0
    while len(drawn) < wanted:
        # Whoever draws gets the same, whatever the version of the interpreter.
        digest = hashlib.sha256(f"sweep/{spec.seed}/{turn}".encode()).digest()
        drawn.add(int.from_bytes(digest, "big") % total)
        turn += 1
    return sorted(drawn)


def job_of(spec: JobSpec, configuration: Configuration) -> JobSpec:
    """Return the job that a configuration means, with what it has of the sweep; not resolved.

    Raises InvalidArgument for a path or a value that no job has.
    """
    from phalanx.specs.canonical import to_json

    document: Any = to_json(spec.sweep.base)
    for path, value in configuration.values.items():
        _put(document, path, value)
    try:
        job = ParseDict(document, JobSpec())
    except ParseError as error:
        raise InvalidArgument(_reason(document) or f"there is no such job: {error}") from error
    job.name, job.namespace = spec.name, spec.namespace
    job.data.name, job.data.split = spec.data.name, spec.data.split
    job.data.target = spec.data.target
    if not job.HasField("seed") and seeded(job):
        job.seed = spec.seed
    return job


def _reason(document: Any) -> str:
    """Return what a job file with such a field or value is told."""
    from phalanx.specs.json_text import parse_json
    from phalanx.specs.tree import Problems
    from phalanx.specs.walker import Walker

    problems = Problems("")
    root = parse_json(json.dumps(document), problems)
    if root is not None:
        Walker(problems).fill(JobSpec(), root)
    for each in problems.violations[:1]:
        # Of a text that nobody has written the lines say nothing.
        return f"{each.field}: {each.message.replace(' on line 1', '')}"
    return ""


def _put(document: Any, path: str, value: Any) -> None:
    """Set a value in a spec as JSON; what it is of is made where it is not there."""
    *names, last = path.split(".")
    for name in names:
        document = document.setdefault(name, {})
        if not isinstance(document, dict):
            raise InvalidArgument(f"{path} cannot be set: {name} has no fields")
    # Another path may set a part of it, and others have the same value.
    document[last] = copy.deepcopy(value)


def seeded(job: JobSpec) -> bool:
    """Whether anything in the program depends on a seed."""
    return job.WhichOneof("program") != "cascade"
