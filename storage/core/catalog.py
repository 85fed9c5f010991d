"""Names, versions, pages and remembered requests of data sets and models."""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import Message

from phalanx.errors import AlreadyExists, ResourceExhausted
from phalanx.ids import split_version_name
from phalanx.v1 import dataset_service_pb2 as dataset_pb
from phalanx.v1 import model_service_pb2 as model_pb
from storage.core.keys import check_digest, check_file_path, check_key, check_word, invalid

DEFAULT_NAMESPACE = "default"
PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_LIMIT = 1000
FILE_LIMIT = 1000
REQUEST_MEMORY_S = 24 * 3600.0
"""How long a request id is remembered with its first answer."""

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, order=True)
class VersionName:
    """One version of a data set or of a model; ``version`` 0 stands for the newest."""

    namespace: str
    name: str
    version: int

    def __str__(self) -> str:
        name = self.name if self.namespace == DEFAULT_NAMESPACE else f"{self.namespace}/{self.name}"
        return f"{name}@{self.version}" if self.version else name


def dataset_bytes(dataset: dataset_pb.Dataset) -> int:
    """Return what the chunks of a data set take up; linked ones are in its owner's files."""
    return 0 if dataset.linked else dataset.size_bytes


def model_bytes(model: model_pb.ModelVersion) -> int:
    """Return what the files of a model take up."""
    return sum(file.size_bytes for file in model.files)


def check_quota(namespace: str, limit_bytes: int, used_bytes: int, more_bytes: int) -> None:
    """Raise ResourceExhausted where so many bytes more are too many for a namespace."""
    if used_bytes + more_bytes > limit_bytes:
        raise ResourceExhausted(
            f"the namespace {namespace!r} may have {limit_bytes} bytes of data sets and models "
            f"(quota bytes); it has {used_bytes}, and this needs {more_bytes}: "
            "delete some versions",
            reason="QUOTA_EXCEEDED",
            details={
                "namespace": namespace,
                "quota": "bytes",
                "limit": str(limit_bytes),
                "used": str(used_bytes),
            },
        )


@dataclass(frozen=True)
class Page:
    """Where a page of a listing begins and how long it is.

    ``after`` is the (name, version) of the last item of the page before; None at the beginning.
    Listings go by name, and from the newest version of a name to its oldest.
    """

    namespace: str
    size: int
    after: tuple[str, int] | None


@dataclass(frozen=True)
class Remembered:
    """The first answer to a request id."""

    request_sha256: str
    response: bytes


def namespace_of(value: str) -> str:
    """Return the namespace of a request; empty means ``default``."""
    return check_key(value, "namespace") if value else DEFAULT_NAMESPACE


def new_name(namespace: str, name: str, field: str = "name") -> VersionName:
    """Return the name of something to be created; raise InvalidArgument if it is not a key."""
    return VersionName(namespace_of(namespace), check_key(name, field), 0)


def parse_name(namespace: str, text: str) -> VersionName:
    """Return what ``[NAMESPACE/]NAME[@VERSION]`` stands for; raise InvalidArgument if nothing.

    A name that says no namespace is in ``namespace``.
    """
    space, name, version = split_version_name(text, namespace_of(namespace))
    check_key(space, "namespace")
    check_key(name, "name")
    if "@" not in text:
        return VersionName(space, name, 0)
    plain = version.isascii() and version.isdigit() and len(version) <= 18
    if not plain or str(int(version)) != version or version == "0":
        raise invalid("name", f"{text!r}: write NAME or NAME@VERSION, with a version of 1 or more")
    return VersionName(space, name, int(version))


def parse_page(namespace: str, page_size: int, page_token: str) -> Page:
    """Return the page that a list request asks for; raise InvalidArgument for a foreign token."""
    if page_size < 0:
        raise invalid("page_size", "write 0 (the server's choice) or more")
    size = min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_LIMIT)
    return Page(namespace_of(namespace), size, _parse_token(page_token) if page_token else None)


def split_page(
    page: Page, rows: list[ItemT], key: Callable[[ItemT], tuple[str, int]]
) -> tuple[list[ItemT], str]:
    """Return a page's rows and the next page's token; ``rows`` may hold one more than the page."""
    if len(rows) <= page.size:
        return rows, ""
    kept = rows[: page.size]
    return kept, _make_token(key(kept[-1]))


def _make_token(after: tuple[str, int]) -> str:
    return base64.urlsafe_b64encode(json.dumps(after).encode()).decode()


def _parse_token(token: str) -> tuple[str, int]:
    try:
        name, version = json.loads(base64.urlsafe_b64decode(token.encode()))
    except (binascii.Error, ValueError, TypeError, RecursionError):
        name, version = None, None
    if not isinstance(name, str) or not isinstance(version, int) or abs(version) >= 1 << 62:
        raise invalid("page_token", "pass next_page_token of the page before as it is, or nothing")
    return name, version


def request_checksum(request: Message) -> str:
    """Return what tells two requests with one request id apart."""
    kind = request.DESCRIPTOR.full_name.encode()
    return hashlib.sha256(kind + b"\0" + request.SerializeToString(deterministic=True)).hexdigest()


def recall(remembered: Remembered | None, request_id: str, request: Message) -> bytes | None:
    """Return the first answer to this request id, or None if it is new.

    Raises AlreadyExists (REQUEST_ID_REUSED) if the id came with another request.
    """
    check_word(request_id, "request_id")
    if remembered is None:
        return None
    if remembered.request_sha256 != request_checksum(request):
        raise AlreadyExists(
            f"request id {request_id!r} was used for another request; choose a new one",
            reason="REQUEST_ID_REUSED",
        )
    return remembered.response


def check_model(model: model_pb.ModelVersion) -> VersionName:
    """Return the name of the model to be created; raise InvalidArgument if something is wrong."""
    name = new_name(model.namespace, model.name, "model.name")
    if not model.files or len(model.files) > FILE_LIMIT:
        raise invalid("model.files", f"a model has 1 to {FILE_LIMIT} files")
    paths: set[str] = set()
    for index, file in enumerate(model.files):
        check_file_path(file.path, f"model.files[{index}].path")
        check_digest(file.digest, f"model.files[{index}].digest")
        if file.path in paths:
            raise invalid(f"model.files[{index}].path", f"{file.path!r} is there twice")
        paths.add(file.path)
    if model.parameters_sha256:
        check_digest(model.parameters_sha256, "model.parameters_sha256")
    return name
