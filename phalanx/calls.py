"""The calls of a set of independent tasks inside a leaf process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from phalanx.errors import InvalidArgument
from phalanx.models.code import OneProcess, UserCode, load_entrypoint
from phalanx.specs.canonical import struct_to_python
from phalanx.tasks import VALUE_BYTES_MAX
from phalanx.v1 import training_pb2
from phalanx.v1.job_spec_pb2 import JobSpec


class CallWork:
    """The function of one job and its arguments; loaded when it is first needed."""

    def __init__(self, plan: training_pb2.JobPlan, code_dir: Path | None) -> None:
        self.plan = plan
        self._tasks = JobSpec.FromString(plan.spec).tasks
        self._code = None if code_dir is None else UserCode(code_dir)

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The user's function; this is where user code is loaded."""
        with OneProcess():
            return load_entrypoint(self._tasks.entrypoint, self._code)

    def describe(self) -> training_pb2.Layout:
        """Load the function; return how many tasks there are, as elements of one range."""
        assert self.function is not None
        return training_pb2.Layout(element_count=len(self._tasks.arguments))

    def call(self, task: int) -> bytes:
        """Run one task; return what it returned, as JSON."""
        function = self.function
        if self._code is not None:
            self._code.activate()
        with OneProcess():
            return value_json(function(**struct_to_python(self._tasks.arguments[task])))

    def close(self) -> None:
        """Nothing is held."""


def value_json(value: Any) -> bytes:
    """Return a value as JSON. Raises InvalidArgument for one that is none, or too large."""
    try:
        text = json.dumps(
            value, allow_nan=False, default=_convert, ensure_ascii=False, separators=(",", ":")
        )
        data = text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(
            f"what the function returned is no JSON ({error}); return numbers, texts, lists and "
            "mappings, or write a file and return where it is",
            reason="VALUE_NOT_JSON",
        ) from None
    if len(data) > VALUE_BYTES_MAX:
        raise InvalidArgument(
            f"the function returned {len(data)} bytes of JSON; at most {VALUE_BYTES_MAX} are taken",
            reason="VALUE_TOO_LARGE",
        )
    return data


def _convert(value: Any) -> Any:
    """Arrays and numbers of array libraries as what they hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be written")
