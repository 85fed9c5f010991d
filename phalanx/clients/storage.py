"""Clients of the storage service.

``StorageClient`` is for asyncio (the services), ``SyncStorageClient`` for blocking callers (command
line and SDK). Both speak to StorageService, DatasetService and ModelService.
"""

from phalanx.clients.blob_sources import BlobSource
from phalanx.clients.storage_async import Acquired, BlobSize, StorageClient
from phalanx.clients.storage_sync import SyncStorageClient

__all__ = ["Acquired", "BlobSize", "BlobSource", "StorageClient", "SyncStorageClient"]
