"""The whole path of a spec before it becomes a job, the same for a cluster and in one process."""

from __future__ import annotations

from phalanx.specs.resolve import resolve
from phalanx.specs.unimplemented import refuse_unimplemented
from phalanx.specs.validate import refuse, validate, validate_against
from phalanx.v1 import dataset_service_pb2, job_spec_pb2


def check_spec(spec: job_spec_pb2.JobSpec) -> None:
    """Check a raw spec as far as possible without its data set.

    Raises InvalidArgument (every wrong field) or Unimplemented (every field not carried out).
    """
    refuse(validate(spec))
    refuse_unimplemented(spec)


def prepare(
    spec: job_spec_pb2.JobSpec, dataset: dataset_service_pb2.Dataset
) -> job_spec_pb2.JobSpec:
    """Return the resolved spec, checked in itself and against its data set.

    Raises InvalidArgument (every wrong field) or Unimplemented.
    """
    wrong = validate(spec)
    resolved = resolve(spec, dataset)
    if not wrong:
        wrong = [*validate(resolved), *validate_against(resolved, dataset)]
    else:
        # Fields that are wrong in themselves would only be named twice.
        named = {each.field for each in wrong}
        against = validate_against(resolved, dataset)
        wrong += [each for each in against if each.field not in named]
    refuse(wrong)
    refuse_unimplemented(resolved)
    return resolved
