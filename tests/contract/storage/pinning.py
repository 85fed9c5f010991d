"""Pins, and what they keep from being deleted."""

from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import storage_service_pb2 as pb
from storage.core.catalog import parse_name


def delete(backend, name, request_id="", **more):
    request = dataset_pb.DeleteDatasetRequest(name=name, request_id=request_id, **more)
    backend.catalog.delete_dataset(request, parse_name("", name))


def pins(holder, *versions, blobs=(), kind="dataset"):
    return pb.SetPinsRequest(
        holder=holder,
        pins=[
            *(
                pb.Pin(**{kind: pb.PinnedVersion(name=name, version=version)})
                for name, version in versions
            ),
            *(pb.Pin(blob=blob) for blob in blobs),
        ],
    )


def end(backend, holder, **more):
    backend.catalog.set_pins(pb.SetPinsRequest(holder=holder, ended=True, **more))
