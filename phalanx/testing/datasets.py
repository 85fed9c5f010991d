"""Small data sets for tests: the same numbers on every machine, and the way to stored chunks."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import DTypeLike, NDArray

from phalanx.data.ingest import ingest_arrays
from phalanx.data.manifest import DatasetManifest
from phalanx.data.options import IngestOptions
from phalanx.data.reader import ChunkReader
from phalanx.data.writer import DirectoryBlobs

REPOSITORY = Path(__file__).resolve().parents[2]

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class StoredDataset:
    """A data set in a folder: its manifest, and its chunks by digest."""

    manifest: DatasetManifest
    blobs: DirectoryBlobs

    @property
    def fetch(self) -> Callable[[str], Path]:
        """From a chunk's digest to its file."""
        return self.blobs.path

    def manifest_digest(self) -> str:
        """Stores the manifest as a blob and returns its digest."""
        return self.blobs.put(self.manifest.to_json())

    def reader(self, split: str = "train", dtype: DTypeLike = np.float32) -> ChunkReader:
        """A reader of one split."""
        return ChunkReader(self.manifest, split, self.fetch, dtype=dtype)


def store(root: Path, features: Any, targets: Any, **options: Any) -> StoredDataset:
    """Ingests arrays into the folder; ``options`` are those of ``IngestOptions``."""
    blobs = DirectoryBlobs(root)
    manifest = ingest_arrays(features, targets, IngestOptions(**options), blobs)
    return StoredDataset(manifest, blobs)


def classification(
    rows: int = 600, features: int = 8, classes: int = 3, seed: int = 0
) -> tuple[Float32, Int64]:
    """Gaussian clouds around one centre per class: learnable, not separable."""
    generator = np.random.Generator(np.random.Philox(seed))
    centres = generator.normal(scale=1.5, size=(classes, features))
    targets = generator.integers(0, classes, size=rows)
    noise = generator.normal(size=(rows, features))
    return (centres[targets] + noise).astype(np.float32), targets.astype(np.int64)


def regression(
    rows: int = 600, features: int = 8, noise: float = 0.1, seed: int = 0
) -> tuple[Float32, NDArray[np.float64]]:
    """A linear function of standard normal features, with an offset and noise."""
    generator = np.random.Generator(np.random.Philox(seed))
    inputs = generator.normal(size=(rows, features))
    weights = generator.normal(size=features)
    targets = inputs @ weights + 0.5 + noise * generator.normal(size=rows)
    return inputs.astype(np.float32), targets


def sparse_classification(
    rows: int = 600, features: int = 50, density: float = 0.1, seed: int = 0
) -> tuple[scipy.sparse.csr_array, Int64]:
    """Two classes told apart by which features of a sparse row are set; some rows are empty."""
    generator = np.random.Generator(np.random.Philox(seed))
    present = generator.random((rows, features)) < density
    values = np.where(present, generator.normal(loc=1.0, scale=0.3, size=present.shape), 0.0)
    weights = generator.normal(size=features)
    targets = (values @ weights > 0).astype(np.int64)
    return scipy.sparse.csr_array(values.astype(np.float32)), targets


def digits() -> tuple[Float32, Int64]:
    """The 1,797 handwritten digits (8 by 8 pixels, 0 to 16) that ship with scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.data.astype(np.float32), data.target.astype(np.int64)


def store_digits(root: Path) -> StoredDataset:
    """The digits with pixels from 0 to 1: 1,437 rows to train on, 360 to test, always the same."""
    pixels, classes = digits()
    order = np.random.default_rng(1234).permutation(len(classes))
    features, targets = pixels[order] / 16, classes[order]
    blobs = DirectoryBlobs(root)
    held_out = (features[1437:], targets[1437:])
    manifest = ingest_arrays(features[:1437], targets[:1437], IngestOptions(), blobs, test=held_out)
    return StoredDataset(manifest, blobs)


def shared_data(name: str) -> Path:
    """The folder of a data set that is not part of the project; skips the test where it is absent.

    It is looked for in ``PHALANX_SHARED_DATA``, or in ``../shared/data`` beside the checkout.
    """
    import pytest

    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("PHALANX_SHARED_DATA", default)) / name
    if not folder.is_dir():
        pytest.skip(f"needs the data set {name} (not part of the project) in {folder.parent}")
    return folder


def demo_data() -> Path:
    """The Fashion-MNIST subset that ships with the project, as a folder of idx files."""
    return REPOSITORY / "examples" / "data" / "fashion-mnist-small"
