"""What workers compare before they compute a job together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from phalanx.data.manifest import ChunkInfo
from phalanx.testing.datasets import StoredDataset, classification, store
from phalanx.testing.plans import plan_for
from phalanx.testing.running_model import RUNNING_MODEL
from worker.leaf.work import JobWork, Paths

PRINTED = """
from pathlib import Path

from running import Running


class Net(Running):
    numeric_fingerprint = Path(__file__).with_name("library.txt").read_text()
"""


@pytest.fixture
def dataset(tmp_path: Path) -> StoredDataset:
    features, targets = classification(300, 6, 3)
    return store(tmp_path / "data", features, targets, test=0.2)


def described(folder: Path, dataset: StoredDataset, library: str, net: str = PRINTED) -> Any:
    code = folder / f"code-{library}-{len(net)}"
    code.mkdir()
    (code / "running.py").write_text(RUNNING_MODEL)
    (code / "net.py").write_text(net)
    (code / "library.txt").write_text(library)
    manifest = folder / "manifest.json"
    manifest.write_bytes(dataset.manifest.to_json())
    document = {"model": {"custom": {"entrypoint": "net:Net"}}, "stop": {"steps": 2}}
    plan = plan_for(dataset, document, data={"name": "data", "shards": 2})

    def fetch(chunk: ChunkInfo) -> Path:
        return dataset.fetch(chunk.digest)

    return JobWork(plan, Paths(manifest, code), fetch).describe()


def test_what_a_models_libraries_compute_is_part_of_the_leaf(
    tmp_path: Path, dataset: StoredDataset
) -> None:
    plain = PRINTED.replace("numeric_fingerprint", "another_name")
    first, other = (described(tmp_path, dataset, library) for library in ("one", "two"))
    assert first.layout == other.layout
    assert first.leaf_sha256 != other.leaf_sha256
    alike = {described(tmp_path, dataset, library, plain).leaf_sha256 for library in ("1", "2")}
    assert len(alike) == 1
