"""The example of a user's model works as it is written."""

from pathlib import Path

import numpy as np
import pytest

from phalanx.models import Batch, DataSchema, build_model
from phalanx.sdk.job_files import load
from phalanx.testing.datasets import digits, store
from phalanx.testing.plans import plan_for
from phalanx.training.local import train_in_process

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "custom_model"


def test_the_job_carries_the_file_beside_it() -> None:
    spec = load(EXAMPLE / "job.yaml")
    assert dict(spec.code.files) == {
        "label_smoothing.py": (EXAMPLE / "label_smoothing.py").read_text()
    }


def test_it_learns_the_digits(tmp_path: Path) -> None:
    spec = load(EXAMPLE / "job.yaml")
    stored = store(tmp_path, *digits(), test=0.2)
    train = {
        "model": {"custom": {"entrypoint": spec.train.model.custom.entrypoint}},
        "optimizer": {"adam": {"learning_rate": 0.003}},
        "batch_size": 256,
        "stop": {"epochs": 12},
    }
    plan = plan_for(stored, train, data={"name": "data", "shards": 4})
    result = train_in_process(plan, stored.manifest, stored.fetch, code_dir=EXAMPLE)
    assert result.metrics["test/accuracy"] > 0.93


def test_its_gradients_agree_with_central_differences() -> None:
    spec = load(EXAMPLE / "job.yaml")
    spec.train.model.custom.arguments.update({"hidden": 5})
    model = build_model(spec, DataSchema(6, 3, "float64"), EXAMPLE)
    rng = np.random.default_rng(4)
    batch = Batch(rng.standard_normal((9, 6)), rng.integers(0, 3, 9))
    w = rng.standard_normal(model.layout.element_count) * 0.5
    gradient, scratch = np.empty_like(w), np.empty_like(w)
    model.gradient(w, batch, gradient)
    for index in range(0, len(w), 3):
        sides = []
        for step in (1e-6, -1e-6):
            moved = w.copy()
            moved[index] += step
            sides.append(model.gradient(moved, batch, scratch).loss_sum)
        assert gradient[index] == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-5, abs=1e-6)
