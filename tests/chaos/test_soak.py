"""Minutes of random faults of all kinds on one cluster: `make chaos ARGS="-m soak"`.

PHALANX_SOAK_S says how long (120 s), PHALANX_SOAK_SEED draws the faults: the same seed, the same
schedule. What it found is printed and the seed with it.
"""

import json
import os
import random
from pathlib import Path

import pytest

from phalanx.chaos.run import Chaos, ChaosOptions
from phalanx.chaos.schedule import FAULTS
from phalanx.chaos.victims import LocalVictims
from phalanx.testing.arena import arena, undisturbed_sha256_of, unhurried_job

DURATION_S = float(os.environ.get("PHALANX_SOAK_S", "120"))
GUARD_S = DURATION_S + 300
LEAF_S = 0.05


@pytest.mark.soak
@pytest.mark.timeout(GUARD_S + 120)
def test_random_faults_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("PHALANX_SOAK_SEED", random.randrange(1_000_000)))
    # About as many steps as the time allows without a fault, at three leaves of LEAF_S each.
    job = unhurried_job(steps=round((DURATION_S + 10) / 0.2))
    expected = undisturbed_sha256_of(job, tmp_path)
    options = ChaosOptions(
        mix=tuple(FAULTS.values()), every_s=4.0, duration_s=DURATION_S, baseline_s=5.0, seed=seed
    )
    with arena(tmp_path, 4, leaf_s=LEAF_S, controls=2, aggregators=2) as ring:
        handle = ring.cluster.submit(job)
        victims = LocalVictims(ring.cluster.state_dir)
        chaos = Chaos(ring.cluster, handle, victims, options)
        chaos.run()
        result = handle.wait(timeout_s=GUARD_S)
        report = chaos.report(bit_identical=result.parameters_sha256 == expected)
    with capsys.disabled():
        print(f"\nseed {seed}:", json.dumps(report.to_json(), indent=1))
    assert report.healthy
    assert report.harmful
    assert not report.notes
    fired = {injury.fault for injury in report.injuries}
    assert 4 * len(FAULTS) > DURATION_S or fired == set(FAULTS), "a kind of fault never fired"
