"""Manifests of data sets, out of the blobs that hold them."""

from phalanx.data.manifest import DatasetManifest
from phalanx.errors import DataLoss
from storage.core.keys import invalid
from storage.interfaces import BlobStore

_MANIFEST_LIMIT_BYTES = 64 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024


def read_manifest(blobs: BlobStore, digest: str) -> DatasetManifest:
    """Return the manifest in a blob; InvalidArgument if there is another thing in it."""
    reader = blobs.open(digest)
    try:
        if reader.size_bytes > _MANIFEST_LIMIT_BYTES:
            raise invalid("manifest_digest", "the blob is too large to be a manifest")
        data = b"".join(reader.chunks(0, reader.size_bytes, _CHUNK_BYTES))
    finally:
        reader.close()
    try:
        return DatasetManifest.from_json(data)
    except DataLoss as error:
        # The blob is what was put; it was no manifest from the start.
        raise invalid("manifest_digest", error.message) from None
