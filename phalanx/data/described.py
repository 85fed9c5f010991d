"""What storage tells of a data set, from its manifest."""

from __future__ import annotations

from phalanx.data.manifest import DatasetManifest
from phalanx.v1 import dataset_service_pb2


def described(manifest: DatasetManifest, digest: str) -> dataset_service_pb2.Dataset:
    """Return the message of a data set without its name, version and time.

    ``digest`` is that of the manifest.
    """
    message = dataset_service_pb2.Dataset(
        manifest_digest=digest,
        rows=manifest.rows_by_split(),
        features=manifest.features,
        task=manifest.task,
        classes=manifest.classes,
        format=manifest.format,
        size_bytes=manifest.size_bytes,
        target=manifest.target,
        linked=manifest.links is not None,
    )
    if manifest.classes:
        for split in message.rows:
            message.class_rows[split].rows.extend(manifest.class_rows(split))
    return message
