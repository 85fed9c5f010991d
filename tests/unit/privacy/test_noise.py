"""The noise of private jobs: normal, the same for the same step, and nobody else's to compute."""

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import kstest

from coordinator.aggregation.core.machine import JobRanges
from coordinator.aggregation.core.making import make_ranges
from phalanx.errors import FailedPrecondition
from phalanx.frames import BLOCK_ELEMENTS
from phalanx.models.base import decay_mask
from phalanx.optimizers import build_optimizer
from phalanx.privacy.noise import GradientNoise, standard_normal
from phalanx.privacy.secret import noise_key, sampler_key
from phalanx.reduction import reduce_leaves
from phalanx.testing.ranges import ScriptedJob, initial_vector, leaf_gradient, make_plan
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import GoRecord, JobPlan, ParameterRange

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
ELEMENTS = 2 * BLOCK_ELEMENTS + 4321
BATCH = 32


def private_plan(elements: int = ELEMENTS, **options: Any) -> JobPlan:
    plan = make_plan(elements=elements, **options)
    spec = JobSpec.FromString(plan.spec)
    spec.train.batch_size = BATCH
    privacy = spec.train.privacy
    privacy.clip_norm, privacy.noise_multiplier, privacy.delta = 0.5, 1.5, 1e-5
    plan.spec = spec.SerializeToString()
    plan.sampler_key = sampler_key(SECRET)
    return plan


def scripted(plan: JobPlan, owners: Any = ((0,),), secret: bytes = SECRET) -> ScriptedJob:
    def make_owner(plan: JobPlan, term: int, owned: list[ParameterRange]) -> JobRanges:
        return make_ranges(plan, term, owned, noise_secret=secret)

    return ScriptedJob(make_owner, plan, owners, 1)


def finished(
    plan: JobPlan, owners: Any = ((0,),), secret: bytes = SECRET, seed: int | None = None
) -> bytes:
    job = scripted(plan, owners, secret)
    job.begin()
    go = job.run(None if seed is None else random.Random(seed))
    assert go.action == GoRecord.ACTION_STOP
    return bytes(job.vector(plan.total_steps).tobytes())


def test_its_numbers_are_those_of_the_inverse_distribution() -> None:
    words = np.random.default_rng(0).integers(0, 2**64, 300_000, np.uint64)
    words[:2] = 0, 2**64 - 1
    uniform = ((words >> np.uint64(12)) + 0.5) * 2.0**-52
    numbers = standard_normal(words)
    assert np.abs(numbers).max() < 8.3
    np.testing.assert_allclose(numbers, ndtri(uniform), rtol=1e-14, atol=1e-15)


def test_it_is_normal_and_has_the_deviation_that_the_job_asks_for() -> None:
    noise = GradientNoise(private_plan(), SECRET)
    numbers = noise.added(None, 0, ELEMENTS, 7, np.dtype(np.float64))
    assert kstest(numbers / 0.75, "norm").pvalue > 1e-3
    assert numbers.std() == pytest.approx(0.75, rel=0.01)


def test_cuts_do_not_matter_and_steps_and_secrets_do() -> None:
    plan, dtype = private_plan(), np.dtype(np.float32)
    noise = GradientNoise(plan, SECRET)
    whole = noise.added(None, 0, ELEMENTS, 3, dtype)
    cuts = [0, 5, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS + 9, 2 * BLOCK_ELEMENTS, ELEMENTS]
    pieces = [noise.added(None, low, high - low, 3, dtype) for low, high in pairwise(cuts)]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    for other in (
        noise.added(None, 0, ELEMENTS, 4, dtype),
        GradientNoise(plan, OTHER).added(None, 0, ELEMENTS, 3, dtype),
        np.concatenate([whole[BLOCK_ELEMENTS:], whole[:BLOCK_ELEMENTS]]),
    ):
        assert abs(np.corrcoef(whole, other)[0, 1]) < 0.02


def test_the_key_of_workers_tells_nothing_of_the_noise() -> None:
    assert sampler_key(SECRET) not in (SECRET[:16], noise_key(SECRET)[:16])
    assert sampler_key(SECRET) != sampler_key(OTHER)


@pytest.mark.parametrize("ranges", [1, 3])
def test_a_step_is_the_noisy_sum_by_the_expected_batch(ranges: int) -> None:
    plan = private_plan(ranges=ranges)
    train, noise = JobSpec.FromString(plan.spec).train, GradientNoise(plan, SECRET)
    optimizer, vector = build_optimizer(train, plan.total_steps), initial_vector(plan)
    for step in range(plan.total_steps):
        leaves = {s: leaf_gradient(plan, s, step, vector) for s in range(plan.shards)}
        total = reduce_leaves(leaves, plan.shards)
        noisy = noise.added(total, 0, ELEMENTS, step, vector.dtype)
        out = np.empty_like(vector)
        optimizer.apply(vector, noisy, BATCH, decay_mask(plan.layout), {}, step, out)
        vector = out
    owners = ((0,),) if ranges == 1 else ((0, 1), (2,))
    assert {finished(plan, owners, seed=seed) for seed in (None, 1, 2)} == {vector.tobytes()}
    assert finished(plan, owners, OTHER) != vector.tobytes()


def test_a_step_without_any_row_has_its_noise_all_the_same() -> None:
    plan = private_plan(elements=100)
    job = scripted(plan)
    job.begin()
    job.run_round()
    before = job.vector(0).copy()
    go = job.go
    job.carry(go)
    nodes = job.division(2, go)
    job.send(job.leaves.frames(nodes, go, before, absent=range(plan.shards)))
    job.pull()
    step = np.abs(job.vector(1) - before)
    assert (step > 0).all()


def test_a_private_job_is_not_begun_without_its_secret() -> None:
    plan = private_plan(elements=100)
    for secret in (b"", b"short"):
        with pytest.raises(FailedPrecondition) as caught:
            scripted(plan, secret=secret)
        assert caught.value.reason == "NO_SECRET"
