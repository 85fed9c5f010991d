"""A leaf process that is killed while it builds the model of a job costs the job nothing."""

import os
import signal
from pathlib import Path

import pytest

from phalanx.testing.arena import GUARD_S, arena, gated_job, undisturbed_sha256_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.same_bits]

MODEL = '''
"""The gated model, which waits at the gate when it is built as well."""

from gated import Gated, wait


class Slow(Gated):
    def initial(self, seed):
        wait()
        return super().initial(seed)
'''


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_killed_while_it_builds_the_model(tmp_path: Path, workers: int) -> None:
    job = gated_job(steps=6)
    job["code"]["files"]["slow.py"] = MODEL
    job["train"]["model"]["custom"]["entrypoint"] = "slow:Slow"
    with arena(tmp_path, workers) as ring:
        ring.gate.hold()
        submitted = ring.cluster.submit(job)
        wait_until(ring.gate.entered, "a process to build the model")
        assert submitted.refresh().reason == "DESCRIBING"
        (victim,) = ring.gate.entered()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: ring.gate.entered() - {victim}, "another to build it")
        ring.gate.release()
        result = submitted.wait(timeout_s=GUARD_S)
    assert result.parameters_sha256 == undisturbed_sha256_of(job, tmp_path)
    assert (result.examples_lost, result.examples_doubled) == (0, 0)
