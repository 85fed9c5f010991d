"""Files that jobs left, onto the disk of whoever asks."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from phalanx.errors import FailedPrecondition, InvalidArgument, NotFound
from phalanx.files import completed

if TYPE_CHECKING:
    from phalanx.sdk.backend import Backend
    from phalanx.v1 import job_pb2
    from phalanx.v1.job_pb2 import ResultFile

_NUMBERED = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}(\.parquet)")


def save_files(backend: Backend, job: job_pb2.Job, target: Path, name: str) -> None:
    """Write the file of this name; without a name the only one, or of several the only one with the
    ending of the target. Parts of a table are written as one file.

    Raises FailedPrecondition, NotFound and InvalidArgument.
    """
    if not job.HasField("result"):
        state = job_state(job)
        raise FailedPrecondition(f"job {job.id} is {state} and has left nothing so far")
    wanted = _wanted(job, name, target.suffix)
    with completed(target) as partial, tempfile.TemporaryDirectory() as folder:
        if len(wanted) == 1:
            backend.get_blob_to(wanted[0].digest, partial)
            return
        parts = [Path(folder) / str(number) for number in range(len(wanted))]
        for file, part in zip(wanted, parts, strict=True):
            backend.get_blob_to(file.digest, part)
        _join(parts, partial)


def job_state(job: job_pb2.Job) -> str:
    """Return the state of a job as people read it."""
    from phalanx.sdk.values import state_name

    return state_name(job.state)


def _wanted(job: job_pb2.Job, name: str, ending: str) -> list[ResultFile]:
    files = list(job.result.files)
    if not files:
        raise NotFound(f"job {job.id} left no files")
    if name:
        found = [file for file in files if name in (file.name, _table(file.name))]
    else:
        tables = {_table(file.name) for file in files}
        alike = {each for each in tables if ending and each.endswith(ending)}
        if len(tables) > 1 and len(alike) != 1:
            names = ", ".join(sorted(tables))
            raise InvalidArgument(f"job {job.id} left several files, name one of them: {names}")
        found = [file for file in files if len(tables) == 1 or _table(file.name) in alike]
    if not found:
        names = ", ".join(file.name for file in files)
        raise NotFound(f"job {job.id} left no file {name!r}; it left {names}")
    return sorted(found, key=lambda file: file.name)


def _table(name: str) -> str:
    """Return the name of the table that a file is a part of, or its own."""
    parts = _NUMBERED.fullmatch(name)
    return parts[1] + parts[2] if parts else name


def _join(parts: list[Path], target: Path) -> None:
    """Write Parquet files of one schema as one, a row group at a time."""
    from pyarrow import parquet

    with parquet.ParquetWriter(target, parquet.read_schema(parts[0])) as writer:
        for part in parts:
            with parquet.ParquetFile(part) as file:
                for number in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(number))
