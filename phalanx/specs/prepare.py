"""The whole path of a spec before it becomes a job, the same for a cluster and in one process."""

from __future__ import annotations

from collections.abc import Iterable

from phalanx.data.choice import RawColumns
from phalanx.errors import Violation
from phalanx.specs import parts
from phalanx.specs.resolve import resolve
from phalanx.specs.unimplemented import refuse_unimplemented, unimplemented
from phalanx.specs.validate import refuse, validate, validate_against
from phalanx.tasks import is_task_set
from phalanx.v1 import dataset_service_pb2, job_spec_pb2


def check_spec(spec: job_spec_pb2.JobSpec, also: Iterable[Violation] = ()) -> None:
    """Check a raw spec as far as possible without its data set.

    Raises InvalidArgument (every wrong field, with `also` what else is wrong) or Unimplemented
    (every field not carried out).
    """
    wrong = validate(spec)
    if wrong:
        refuse([*wrong, *also, *unimplemented(spec)])
    refuse_unimplemented(spec)


def names_dataset(spec: job_spec_pb2.JobSpec) -> bool:
    """Whether the spec names its data set in a way that one may be looked up by."""
    return not any(each.field in ("data.name", "namespace") for each in validate(spec))


def reads_dataset(spec: job_spec_pb2.JobSpec) -> bool:
    """Whether a job reads a data set: all do but sets of independent tasks."""
    return not is_task_set(spec)


def chooses_columns(spec: job_spec_pb2.JobSpec) -> bool:
    """Whether `prepare` has to know the columns of the data set."""
    return reads_dataset(spec) and (bool(spec.data.features) or parts.by_columns(spec.data))


def prepare(
    spec: job_spec_pb2.JobSpec,
    dataset: dataset_service_pb2.Dataset | None,
    columns: RawColumns | None = None,
) -> job_spec_pb2.JobSpec:
    """Return the resolved spec, checked in itself and against its data set, all at once.

    `dataset` is None for a job that reads none; `columns` are those of the data set, None where the
    job does not choose any.

    Raises InvalidArgument (every wrong field, and with them every field not carried out), or
    Unimplemented where nothing else is wrong.
    """
    assert columns is not None or not chooses_columns(spec), "what is chosen has to be checked"
    wrong = validate(spec)
    resolved = resolve(spec, dataset, columns)
    if not wrong:
        wrong = [*validate(resolved), *validate_against(resolved, dataset, columns)]
    else:
        # Fields that are wrong in themselves would only be named twice.
        named = {each.field for each in wrong}
        against = validate_against(resolved, dataset, columns)
        wrong += [each for each in against if each.field not in named]
    if wrong:
        named = {each.field for each in wrong}
        wrong += [each for each in unimplemented(resolved) if each.field not in named]
    refuse(wrong)
    refuse_unimplemented(resolved)
    return resolved
