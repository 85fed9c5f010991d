"""A cluster for the length of a ``with`` block: on this machine, or within this process."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from phalanx.errors import FailedPrecondition, InvalidArgument
from phalanx.ids import check_namespace
from phalanx.local.options import LocalOptions
from phalanx.local.state import Member
from phalanx.local.supervisor import START_TIMEOUT_S, Supervisor
from phalanx.sdk import arguments
from phalanx.sdk.backend import Backend, RemoteBackend
from phalanx.sdk.cluster import Cluster
from phalanx.sdk.discovery import parse_addresses
from phalanx.sdk.keys import resolve_keys


class LocalCluster(Cluster):
    """Storage, control, aggregators and workers as real processes that die with this one.

        with phalanx.LocalCluster(workers=4) as cluster:
            job = cluster.submit("job.yaml")

    It is ready when the constructor returns and ends with the ``with`` block, with ``close`` or
    with this process. ``workers=0`` starts no process: the same leaves and the same tree run inside
    this one, with the same SHA-256, which is slower and good for debugging.

    ``state`` is a folder that outlives the cluster; without it everything is gone at the end,
    models included. ``port`` is control's, by default a free one. ``slots`` are leaf processes per
    worker. Several ``storages`` are replicas on the database and the object store that
    ``environment`` names (``PHALANX_STORAGE_METADATA``, ``PHALANX_STORAGE_BLOBS``).
    ``link_roots`` are the folders below which files may lie that ``data.add`` links; with
    ``workers=0`` any file may. ``environment`` is added to that of all processes. A
    ``secure`` one has keys, in the folder ``keys`` of its state; this object has the token of an
    administrator. Raises FailedPrecondition when a port or the folder is taken, and
    DeadlineExceeded when it is not ready after ``timeout_s``.
    """

    def __init__(
        self,
        workers: int = 4,
        aggregators: int = 1,
        *,
        controls: int = 1,
        storages: int = 1,
        slots: int | None = None,
        port: int = 0,
        state: str | PathLike[str] | None = None,
        namespace: str = "default",
        link_roots: Sequence[str | PathLike[str]] = (),
        environment: Mapping[str, str] | None = None,
        secure: bool = False,
        timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        counts = {
            "workers": workers,
            "aggregators": aggregators,
            "controls": controls,
            "storages": storages,
            "slots": 1 if slots is None else slots,
            "port": port,
        }
        for field, value in counts.items():
            arguments.whole(field, value)
        arguments.text("namespace", namespace, "the name of a namespace")
        if state is not None:
            state = arguments.path("state", state, "the path of a folder")
        if not workers and (state is not None or port):
            raise InvalidArgument("workers=0 has no processes: it takes neither state nor port")
        check_namespace(namespace)
        temporary = Path(tempfile.mkdtemp(prefix="phalanx-")) if state is None else None
        self.state_dir = temporary or Path(state or "").resolve()
        self._supervisor: Supervisor | None = None
        try:
            if workers:
                options = LocalOptions(
                    state_dir=self.state_dir,
                    workers=workers,
                    aggregators=aggregators,
                    controls=controls,
                    storages=storages,
                    slots=slots,
                    port=port,
                    link_roots=tuple(Path(root) for root in link_roots),
                    environment=environment or {},
                    secure=secure,
                )
                self._supervisor = Supervisor.launch(options, timeout_s)
            backend = self._open_backend()
        except BaseException:
            _end(self._supervisor, temporary, os.getpid())
            raise
        super().__init__(backend, namespace=namespace)
        # Also at the end of a program that forgot to close it.
        self._finalizer = weakref.finalize(self, _end, self._supervisor, temporary, os.getpid())

    def _open_backend(self) -> Backend:
        if self._supervisor is not None:
            keys = resolve_keys(self._supervisor.options.keys_dir, environ={})
            return RemoteBackend(parse_addresses(self._supervisor.address), keys=keys)
        from phalanx.sdk.in_process import InProcessBackend

        return InProcessBackend(self.state_dir)

    def close(self) -> None:
        """End all processes; jobs that run are lost unless the cluster has a ``state`` folder."""
        super().close()
        self._finalizer()

    def processes(self) -> list[Member]:
        """Return role, id, process id, address and log file of all processes."""
        return [] if self._supervisor is None else self._supervisor.members()

    def process(self, id: str) -> Member:
        """Return one process by its id (``worker-1``). Raises NotFound."""
        return self._require_supervisor().member(id)

    def add_worker(self) -> str:
        """Start one more worker; return its id at once."""
        return self._require_supervisor().add_worker()

    def _require_supervisor(self) -> Supervisor:
        if self._supervisor is None:
            raise FailedPrecondition(
                "with workers=0 there are no processes; give workers=1 or more"
            )
        return self._supervisor


def _end(supervisor: Supervisor | None, temporary: Path | None, owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        # A fork of the program ends, or leaves the ``with`` block: the cluster is not its own.
        return
    try:
        if supervisor is not None:
            supervisor.stop()
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
