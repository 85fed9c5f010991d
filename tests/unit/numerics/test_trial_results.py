"""Programs that a sweep tries: what their tasks leave lies where no death leaves it behind."""

from __future__ import annotations

import os
import signal
import tempfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.json_format import ParseDict

from phalanx.programs.base import Piece
from phalanx.programs.data import JobData, JobFiles
from phalanx.specs import job_plan, prepare
from phalanx.sweeps import fitting
from phalanx.sweeps.configurations import configurations, job_of
from phalanx.sweeps.results import Results
from phalanx.testing.datasets import StoredDataset, classification, store
from phalanx.testing.plans import dataset_message
from phalanx.v1.job_spec_pb2 import JobSpec

FOREST = {"base": {"forest": {}}, "grid": {"forest.trees": [6]}}
CASCADE = {"base": {"cascade": {"gamma": 0.1}}, "grid": {"cascade.c": [1]}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    return store(tmp_path_factory.mktemp("blobs"), *classification(200, 5, 2))


def trial(stored: StoredDataset, sweep: dict[str, object]) -> fitting.Fitted:
    document = {"name": "search", "data": {"name": "data@1"}, "sweep": sweep}
    spec = ParseDict(document, JobSpec())
    dataset = dataset_message(stored)
    resolved = prepare(spec, dataset)
    plan = job_plan(resolved, dataset, "job-1")
    manifest = stored.blobs.path(stored.manifest_digest())
    job = JobData(plan, JobFiles(manifest), lambda digest, _size: stored.fetch(digest))
    return fitting.fit(job, job_of(resolved, configurations(resolved)[0]), np.arange(150))


@pytest.mark.parametrize("sweep", [FOREST, CASCADE], ids=["forest", "cascade"])
def test_a_killed_process_leaves_no_file(
    stored: StoredDataset, sweep: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert trial(stored, sweep).parameters.size > 0
    plain = Results.add
    added: list[str] = []

    def add(results: Results, result: bytes) -> str:
        added.append(plain(results, result))
        if len(added) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return added[-1]

    monkeypatch.setattr(Results, "add", add)
    process = get_context("fork").Process(target=trial, args=(stored, sweep))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_results_are_read_by_what_they_are() -> None:
    with Results() as results:
        first, second = results.add(b"abcdef"), results.add(b"xyz")
        assert results.add(b"abcdef") == first, "equal ones are one"
        assert results.read(Piece(second, 1, 2)) == b"yz"
        assert results.read(Piece(first, 0, 6)) == b"abcdef"
        assert results.read(Piece(first, 6, 0)) == b""
