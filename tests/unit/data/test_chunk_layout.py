"""The size of a chunk is that of its bytes, told without them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from phalanx.data.chunk_layout import size_of
from phalanx.data.ingest import ingest_arrays
from phalanx.data.linking import Digests
from phalanx.data.options import IngestOptions


class Sizes(Digests):
    """A BlobSink that keeps how long everything was."""

    def __init__(self) -> None:
        self.bytes_of: dict[str, int] = {}

    def put(self, data: bytes) -> str:
        digest = super().put(data)
        self.bytes_of[digest] = len(data)
        return digest


@pytest.mark.parametrize("rows", [2, 9, 999, 5001])
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float64", "task": "regression"},
        {"layout": "csr", "dtype": "float32"},
        {"layout": "csr", "dtype": "float64", "task": "regression"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_it_is_the_size_of_what_is_written(rows: int, options: dict[str, Any]) -> None:
    generator = np.random.default_rng(rows)
    features: Any = generator.normal(size=(rows, 7)) * (generator.random((rows, 7)) < 0.3)
    if options.get("layout") == "csr":
        features = scipy.sparse.csr_array(features)
    targets = np.arange(rows) % 2
    sink = Sizes()
    chosen = IngestOptions(chunk_bytes=20_000, **options)
    manifest = ingest_arrays(features, targets, chosen, sink)
    for chunk in manifest.splits["train"]:
        assert size_of(chunk, manifest) == sink.bytes_of[chunk.digest] == chunk.size_bytes


def test_a_type_that_no_chunk_has() -> None:
    manifest = ingest_arrays(np.zeros((4, 2)), [0, 1, 0, 1], IngestOptions(), Digests())
    with pytest.raises(KeyError, match="complex64"):
        size_of(manifest.splits["train"][0], replace(manifest, dtype="complex64"))
