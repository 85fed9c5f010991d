"""DatasetService and ModelService over a back end."""

from phalanx.data.described import described
from phalanx.data.manifest import DatasetManifest
from phalanx.rpc.types import ServicerContext
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import dataset_service_pb2_grpc as dataset_grpc
from phalanx.v1 import model_service_pb2 as model_pb
from phalanx.v1 import model_service_pb2_grpc as model_grpc
from storage.core import catalog
from storage.core.keys import check_digest
from storage.interfaces import Backend
from storage.links.chunks import LinkedChunks
from storage.service.manifests import read_manifest
from storage.service.operations import Operations


class DatasetServicer(dataset_grpc.DatasetServiceServicer):
    """Registers data sets whose manifest is stored, and whose chunks are or can be made."""

    def __init__(self, backend: Backend, operations: Operations, links: LinkedChunks) -> None:
        self._backend = backend
        self._operations = operations
        self._links = links

    async def CreateDataset(
        self, request: dataset_pb.CreateDatasetRequest, context: ServicerContext
    ) -> dataset_pb.CreateDatasetResponse:
        """Register a version."""

        def read() -> DatasetManifest:
            catalog.new_name(request.namespace, request.name)
            check_digest(request.manifest_digest, "manifest_digest")
            return read_manifest(self._backend.blobs, request.manifest_digest)

        def create() -> dataset_pb.Dataset:
            summary = described(manifest, request.manifest_digest)
            digests = manifest.digests()
            stored, linked = ((), digests) if manifest.links else (digests, ())
            return self._backend.catalog.create_dataset(request, summary, stored, linked)

        manifest = await self._operations.blobs("read_manifest", read)
        if manifest.links is not None:
            await self._links.check(manifest)
        dataset = await self._operations.blobs("create_dataset", create)
        return dataset_pb.CreateDatasetResponse(dataset=dataset)

    async def GetDataset(
        self, request: dataset_pb.GetDatasetRequest, context: ServicerContext
    ) -> dataset_pb.GetDatasetResponse:
        """Show a version."""
        name = catalog.parse_name(request.namespace, request.name)
        dataset = await self._operations.state(
            "get_dataset", lambda: self._backend.catalog.get_dataset(name)
        )
        return dataset_pb.GetDatasetResponse(dataset=dataset)

    async def ListDatasets(
        self, request: dataset_pb.ListDatasetsRequest, context: ServicerContext
    ) -> dataset_pb.ListDatasetsResponse:
        """Show a page of versions."""
        page = catalog.parse_page(request.namespace, request.page_size, request.page_token)
        datasets, token = await self._operations.state(
            "list_datasets", lambda: self._backend.catalog.list_datasets(page)
        )
        return dataset_pb.ListDatasetsResponse(datasets=datasets, next_page_token=token)

    async def DeleteDataset(
        self, request: dataset_pb.DeleteDatasetRequest, context: ServicerContext
    ) -> dataset_pb.DeleteDatasetResponse:
        """Delete one version or all."""
        name = catalog.parse_name(request.namespace, request.name)
        await self._operations.state(
            "delete_dataset", lambda: self._backend.catalog.delete_dataset(request, name)
        )
        return dataset_pb.DeleteDatasetResponse()


class ModelServicer(model_grpc.ModelServiceServicer):
    """Registers models whose files are stored."""

    def __init__(self, backend: Backend, operations: Operations) -> None:
        self._backend = backend
        self._operations = operations

    async def CreateModel(
        self, request: model_pb.CreateModelRequest, context: ServicerContext
    ) -> model_pb.CreateModelResponse:
        """Register a version."""
        model = await self._operations.state(
            "create_model", lambda: self._backend.catalog.create_model(request)
        )
        return model_pb.CreateModelResponse(model=model)

    async def GetModel(
        self, request: model_pb.GetModelRequest, context: ServicerContext
    ) -> model_pb.GetModelResponse:
        """Show a version."""
        name = catalog.parse_name(request.namespace, request.name)
        model = await self._operations.state(
            "get_model", lambda: self._backend.catalog.get_model(name)
        )
        return model_pb.GetModelResponse(model=model)

    async def ListModels(
        self, request: model_pb.ListModelsRequest, context: ServicerContext
    ) -> model_pb.ListModelsResponse:
        """Show a page of versions."""
        page = catalog.parse_page(request.namespace, request.page_size, request.page_token)
        models, token = await self._operations.state(
            "list_models", lambda: self._backend.catalog.list_models(page)
        )
        return model_pb.ListModelsResponse(models=models, next_page_token=token)

    async def DeleteModel(
        self, request: model_pb.DeleteModelRequest, context: ServicerContext
    ) -> model_pb.DeleteModelResponse:
        """Delete one version or all."""
        name = catalog.parse_name(request.namespace, request.name)
        await self._operations.state(
            "delete_model", lambda: self._backend.catalog.delete_model(request, name)
        )
        return model_pb.DeleteModelResponse()
