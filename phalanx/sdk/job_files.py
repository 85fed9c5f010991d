"""Job files: YAML, or the JSON of ``JobSpec``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from phalanx.errors import InvalidArgument, NotFound
from phalanx.sdk import arguments
from phalanx.v1.job_spec_pb2 import JobSpec

if TYPE_CHECKING:
    from phalanx.specs import Document

FILE_LIMIT_BYTES = 1024 * 1024
_FILE = "the path of a job file"
_JOB = f"a spec (phalanx.load), a dict of its JSON, or {_FILE}"


def load(path: str | PathLike[str], *, sets: Sequence[str] = ()) -> JobSpec:
    """Read a job file (``.json``: JSON, all others: YAML).

    ``sets`` are changes such as ``"train.batch_size=4096"``. Raises NotFound when there is no such
    file and InvalidArgument with every wrong field and its line.
    """
    return read_document(path, sets=sets).spec


def read_document(path: str | PathLike[str], *, sets: Sequence[str] = ()) -> Document:
    """Read a job file and keep the lines of its fields, for messages. Raises as ``load``."""
    file = arguments.path("path", path, _FILE)
    try:
        if file.stat().st_size > FILE_LIMIT_BYTES:
            raise InvalidArgument(f"{file} is larger than 1 MiB; that is no job file")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"there is no file {file}; give the path of a job file") from None
    except IsADirectoryError:
        raise InvalidArgument(f"{file} is a folder; give the path of a job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"cannot read {file}: {error}") from error
    return parse_document(text, str(file), is_json=file.suffix == ".json", sets=sets)


def parse_document(
    text: str, source: str, *, is_json: bool = False, sets: Sequence[str] = ()
) -> Document:
    """Parse the text of a job file; ``source`` is its name in messages. Raises InvalidArgument."""
    from phalanx.specs import load_document

    return load_document(text, source, json=is_json, overrides=sets)


def as_document(job: JobSpec | Mapping[str, Any] | str | PathLike[str]) -> Document:
    """Return whatever people hand to ``submit``: a spec, a dict of its JSON, or a path."""
    from phalanx.specs import Document

    if isinstance(job, JobSpec):
        return Document(job, "the job")
    if isinstance(job, Mapping):
        return parse_document(_json_of(job), "the job", is_json=True)
    if isinstance(job, str) and "\n" in job:
        raise InvalidArgument(f"job is a text of several lines, which is no path; give {_JOB}")
    return read_document(arguments.path("job", job, _JOB))


def _json_of(job: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(job), default=_plain, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(
            f"the job is no JSON: {error}; a dict has strings as keys, and strings, numbers, "
            "lists and dicts as values"
        ) from None


def _plain(value: Any) -> Any:
    """Return what JSON knows of a scalar or an array of NumPy, which a search of parameters may
    hand over."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
