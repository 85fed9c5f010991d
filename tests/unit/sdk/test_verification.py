"""Jobs whose parameters nobody can compute again: each is refused with the reason."""

from types import SimpleNamespace

import pytest

from phalanx.errors import FailedPrecondition
from phalanx.sdk.in_process import IN_PROCESS
from phalanx.sdk.verification import verify_job
from phalanx.v1.job_spec_pb2 import JobSpec, Stale, Synchronous, Train


class _WentOn(Exception):
    """The job was not refused: its data set was asked for."""


def _verify(spec, *, lost=0, address="127.0.0.1:7410"):
    def get_data(name):
        raise _WentOn

    result = SimpleNamespace(examples_lost=lost, examples_doubled=0)
    job = SimpleNamespace(id="job-1", message=SimpleNamespace(spec=spec), result=result)
    verify_job(
        SimpleNamespace(
            get=lambda job_id: job,
            data=SimpleNamespace(get=get_data),
            backend=SimpleNamespace(address=address),
        ),
        "job-1",
    )


BACKUPS = JobSpec(train=Train(synchronous=Synchronous(backup_shards=2)))
STALE = JobSpec(train=Train(stale=Stale(bound=3)))


def test_tasks_have_no_parameters():
    with pytest.raises(FailedPrecondition, match="phalanx results job-1"):
        _verify(JobSpec(tasks={}))


def test_which_contributions_were_left_out_is_not_known():
    with pytest.raises(FailedPrecondition, match=r"backup_shards.*lost 64, counted twice 0"):
        _verify(BACKUPS, lost=64)
    with pytest.raises(_WentOn):
        _verify(BACKUPS)


def test_the_order_of_stale_contributions_is_not_known_but_where_it_is_always_the_same():
    with pytest.raises(FailedPrecondition, match=r"stale jobs do not.*examples lost 0"):
        _verify(STALE)
    for spec, address in ((STALE, IN_PROCESS), (JobSpec(train=Train(stale=Stale())), "a:1")):
        with pytest.raises(_WentOn):
            _verify(spec, address=address)
