"""Job files: YAML, or the JSON of ``JobSpec``."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from phalanx.errors import InvalidArgument, NotFound
from phalanx.v1.job_spec_pb2 import JobSpec

FILE_LIMIT_BYTES = 1024 * 1024


def load(path: str | PathLike[str], *, sets: Sequence[str] = ()) -> JobSpec:
    """Read a job file (``.json``: JSON, all others: YAML).

    ``sets`` are changes such as ``"train.batch_size=4096"``. Raises NotFound when there is no such file and
    InvalidArgument with every wrong field and its line.
    """
    file = Path(path)
    try:
        if file.stat().st_size > FILE_LIMIT_BYTES:
            raise InvalidArgument(f"{file} is larger than 1 MiB; that is no job file")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise NotFound(f"there is no file {file}; give the path of a job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"cannot read {file}: {error}") from error
    return parse(text, source=str(file), is_json=file.suffix == ".json", sets=sets)


def parse(
    text: str, *, source: str = "the job", is_json: bool = False, sets: Sequence[str] = ()
) -> JobSpec:
    """Parse the text of a job file; ``source`` is its name in messages. Raises InvalidArgument."""
    from phalanx.specs import apply_sets, load_json, load_yaml

    spec = load_json(text) if is_json else load_yaml(text, source)
    return apply_sets(spec, sets) if sets else spec


def as_spec(job: JobSpec | Mapping[str, Any] | str | PathLike[str]) -> JobSpec:
    """Return the spec of whatever people hand to ``submit``: a spec, a dict of its JSON, or a path."""
    if isinstance(job, JobSpec):
        return job
    if isinstance(job, Mapping):
        import json

        return parse(json.dumps(job), source="the job", is_json=True)
    return load(job)
