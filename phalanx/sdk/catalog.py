"""Versions of things by name, as storage keeps them, in memory."""

from __future__ import annotations

from typing import TypeVar

from phalanx.errors import NotFound
from phalanx.ids import split_version_name
from phalanx.sdk.in_process_jobs import now
from phalanx.v1 import dataset_service_pb2, model_service_pb2

VersionT = TypeVar("VersionT", dataset_service_pb2.Dataset, model_service_pb2.ModelVersion)


class Catalog(dict[tuple[str, str], list[VersionT]]):
    """Versions by (namespace, name); ``what`` is said in errors."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        # Outlives its versions, so that NAME@VERSION never comes to mean something else.
        self._last_versions: dict[tuple[str, str], int] = {}

    def register(self, item: VersionT) -> VersionT:
        """Add a new version."""
        key = (item.namespace, item.name)
        item.version = self._last_versions[key] = self._last_versions.get(key, 0) + 1
        item.create_time.CopyFrom(now())
        self.setdefault(key, []).append(item)
        return item

    def find(self, namespace: str, name: str) -> VersionT:
        """Return [NAMESPACE/]NAME (the newest) or …@VERSION. Raises NotFound."""
        space, stem, version = split_version_name(name, namespace or "default")
        for item in reversed(self.get((space, stem), [])):
            if "@" not in name or str(item.version) == version:
                return item
        raise NotFound(f"there is no {self.what} {name!r}")

    def remove(self, namespace: str, name: str) -> None:
        """Remove NAME (all versions) or NAME@VERSION. Raises NotFound."""
        found = self.find(namespace, name)
        key = (found.namespace, found.name)
        self[key] = [item for item in self[key] if "@" in name and item is not found]

    def in_namespace(self, namespace: str) -> list[VersionT]:
        """Return all versions of all names."""
        return [
            item
            for (space, _), items in sorted(self.items())
            if space == (namespace or "default")
            for item in items
        ]
