"""A cluster as a Python object: submit jobs, add data, get models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from phalanx.errors import DeadlineExceeded, InvalidArgument, PhalanxError
from phalanx.ids import check_namespace, new_request_id
from phalanx.sdk import arguments, following, methods
from phalanx.sdk.backend import Backend, RemoteBackend
from phalanx.sdk.data import DataSets
from phalanx.sdk.discovery import resolve
from phalanx.sdk.job import Job
from phalanx.sdk.job_files import as_document
from phalanx.sdk.keys import resolve_keys
from phalanx.sdk.listing import Listing, Pages
from phalanx.sdk.models import Models
from phalanx.sdk.transport import CALL_TIMEOUT_S, STREAM_TIMEOUT_S
from phalanx.sdk.values import Event, event_value
from phalanx.sdk.wheels import Wheels
from phalanx.v1 import cluster_service_pb2, job_pb2, job_service_pb2, storage_service_pb2
from phalanx.v1.job_spec_pb2 import JobSpec

if TYPE_CHECKING:
    from phalanx.sdk.verdict import Verdict

DEFAULT_NAMESPACE = "default"
PAGE_SIZE = 500
_DRAIN_LOOK_S = 0.1
_NAMESPACE = "the name of a namespace"
_STATE = 'the names of states, as "RUNNING"'
_SCRUB_S = 7 * 24 * 3600.0
_GRACE_OF_STORAGE = -1
"""Stands for the grace time that storage was started with."""


def connect(
    address: str | None = None,
    *,
    namespace: str = DEFAULT_NAMESPACE,
    timeout_s: float = CALL_TIMEOUT_S,
    token: str | Path | None = None,
    ca: str | PathLike[str] | None = None,
    certificate: str | PathLike[str] | None = None,
    key: str | PathLike[str] | None = None,
) -> Cluster:
    """Return a cluster that runs already.

    ``address`` is HOST:PORT or several of them with commas, tried in turn; by default
    PHALANX_ADDRESS, else the cluster that ``phalanx up`` runs on this machine, else 127.0.0.1:7410.
    Nothing is dialled before the first call. ``timeout_s`` bounds each call.

    ``token`` is who you are to a cluster with keys: the text of a token, or a ``Path`` of a file
    with one (by default PHALANX_TOKEN_FILE), which is read again when it is replaced. ``ca`` is the
    file with the authority to trust (PHALANX_CA). ``certificate`` and ``key`` are files too, for
    ports that ask people for one (PHALANX_CERTIFICATE, PHALANX_KEY). With any of them connections
    are encrypted; a cluster that ``phalanx up --secure`` runs on this machine needs none.

    Raises InvalidArgument for a malformed address, namespace or token, and for files that cannot be
    used.
    """
    check_namespace(arguments.text("namespace", namespace, _NAMESPACE))
    if address is not None:
        arguments.text("address", address, "HOST:PORT, or several with commas")
    arguments.seconds("timeout_s", timeout_s)
    found = resolve(address)
    keys = resolve_keys(found.keys_dir, token=token, ca=ca, certificate=certificate, key=key)
    backend = RemoteBackend(found.addresses, timeout_s=timeout_s, keys=keys)
    return Cluster(backend, namespace=namespace)


class Cluster:
    """Use it in a ``with`` block, or call ``close``.

    Every method raises PhalanxError: Unavailable when no address answers, NotFound, InvalidArgument
    with all wrong fields, and so on.
    """

    def __init__(self, backend: Backend, *, namespace: str = DEFAULT_NAMESPACE) -> None:
        self.backend = backend
        self.namespace = check_namespace(namespace)
        self.data = DataSets(backend, namespace)
        self.models = Models(backend, namespace)
        self.code = Wheels(backend)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A connection has no copy: what is copied with it, as an estimator, goes on with it."""
        return self

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.address}>"

    @property
    def address(self) -> str:
        """Where it is."""
        return self.backend.address

    def close(self) -> None:
        """Close the connections; jobs go on."""
        self.backend.close()

    def submit(
        self,
        job: JobSpec | Mapping[str, Any] | str | PathLike[str],
        *,
        request_id: str | None = None,
        namespace: str | None = None,
    ) -> Job:
        """Submit a job: a spec (``phalanx.load``), a dict of its JSON, or the path of a job file.

        With the same ``request_id`` the same job is submitted once, however often this is called;
        with another spec it raises AlreadyExists. ``job.plan`` says what the job is going to do.
        """
        answer = self._submit(job, request_id or new_request_id(), namespace, dry_run=False)
        return Job(self.backend, answer.job, answer.plan)

    def plan(
        self, job: JobSpec | Mapping[str, Any] | str | PathLike[str]
    ) -> job_service_pb2.SubmitJobResponse:
        """Return the resolved job and its plan without submitting it."""
        return self._submit(job, new_request_id(), None, dry_run=True)

    def _submit(
        self,
        job: JobSpec | Mapping[str, Any] | str | PathLike[str],
        request_id: str,
        namespace: str | None,
        *,
        dry_run: bool,
    ) -> job_service_pb2.SubmitJobResponse:
        document = as_document(job)
        arguments.text("request_id", request_id, "a string, or leave it out")
        spec = JobSpec()
        spec.CopyFrom(document.spec)
        wanted = arguments.text("namespace", namespace or self.namespace, _NAMESPACE)
        if not spec.namespace and wanted != DEFAULT_NAMESPACE:
            spec.namespace = wanted
        request = job_service_pb2.SubmitJobRequest(
            spec=spec, request_id=request_id, validate_only=dry_run
        )
        try:
            return self.backend.call(methods.SUBMIT_JOB, request)
        except PhalanxError as error:
            raise document.locate_error(error) from None

    def get(self, job_id: str) -> Job:
        """Return one job. Raises NotFound."""
        wanted = arguments.text("job_id", job_id, arguments.JOB_ID)
        request = job_service_pb2.GetJobRequest(job_id=wanted)
        return Job(self.backend, self.backend.call(methods.GET_JOB, request).job)

    def jobs(self, *states: str) -> Listing[Job]:
        """Return all jobs, newest first; with ``states`` (``"RUNNING"``) only those in one of
        them.

        Warns with IncompleteWarning where only a control process answers that is cut off from
        storage, so that jobs may be missing; ``incomplete`` of the list says so, too.
        """
        numbers = [_state_number(state) for state in arguments.texts("states", states, _STATE)]
        found: list[Job] = []
        pages, token = Pages[Job](self.backend), ""
        while True:
            request = job_service_pb2.ListJobsRequest(
                namespace=self.namespace, states=numbers, page_size=PAGE_SIZE, page_token=token
            )
            page = pages.ask(methods.LIST_JOBS, request)
            found += [Job(self.backend, job) for job in page.jobs]
            token = page.next_page_token
            if not token:
                return pages.listing(found)

    def verify(self, job: Job | str) -> Verdict:
        """Count what a finished job, or that of this id, has used, and compute it again here.

            verdict = cluster.verify(job)
            assert verdict.balanced  # every example once in every epoch, or named as left out
            assert verdict.equal  # the same bits

        The same leaves are summed by the same tree, without the cluster's workers; the chunks that
        the job reads are downloaded. Where nobody can compute the bits again, ``not_compared`` says
        why. Raises FailedPrecondition for a job that has not succeeded.
        """
        from phalanx.sdk.verification import verify_job

        return verify_job(self, job.id if isinstance(job, Job) else job)

    def gc(self, *, dry_run: bool = False) -> storage_service_pb2.CollectGarbageResponse:
        """Remove stored blobs that nothing refers to any more, or with ``dry_run`` only count them.

        Storage does so by itself from time to time. Blobs that are younger than its grace time are
        kept: somebody may be about to refer to them.
        """
        request = storage_service_pb2.CollectGarbageRequest(
            dry_run=dry_run, grace_s=_GRACE_OF_STORAGE
        )
        return self.backend.call(methods.COLLECT_GARBAGE, request)

    def scrub(self) -> Iterator[storage_service_pb2.ScrubResponse]:
        """Have storage read everything that it has; yield what it finds and how far it is.

        It does so by itself in the background, slowly.
        """
        request = storage_service_pb2.ScrubRequest()
        return self.backend.stream(methods.SCRUB, request, timeout_s=_SCRUB_S)

    def describe(self) -> cluster_service_pb2.GetClusterResponse:
        """Return version, leader, workers, aggregators and number of jobs."""
        return self.backend.call(methods.GET_CLUSTER, cluster_service_pb2.GetClusterRequest())

    def workers(self) -> Listing[cluster_service_pb2.Worker]:
        """Return all known workers, also lost ones, newest first. Warns as ``jobs`` does."""
        found: list[cluster_service_pb2.Worker] = []
        pages, token = Pages[cluster_service_pb2.Worker](self.backend), ""
        while True:
            request = cluster_service_pb2.ListWorkersRequest(page_size=PAGE_SIZE, page_token=token)
            page = pages.ask(methods.LIST_WORKERS, request)
            found += page.workers
            token = page.next_page_token
            if not token:
                found.sort(key=lambda worker: worker.join_time.ToNanoseconds(), reverse=True)
                return pages.listing(found)

    def drain(self, worker_id: str, *, timeout_s: float | None = None) -> None:
        """Move a worker's shards away and let it leave.

        With ``timeout_s`` wait until it has left; raises DeadlineExceeded if it has not.
        """
        if timeout_s is not None:
            arguments.seconds("timeout_s", timeout_s)
        request = cluster_service_pb2.DrainWorkerRequest(
            worker_id=arguments.text("worker_id", worker_id, arguments.WORKER_ID),
            request_id=new_request_id(),
        )
        self.backend.call(methods.DRAIN_WORKER, request)
        if timeout_s is None:
            return
        deadline = time.monotonic() + timeout_s
        while not self._has_left(worker_id):
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(f"worker {worker_id} has not left after {timeout_s:g} s")
            time.sleep(_DRAIN_LOOK_S)

    def _has_left(self, worker_id: str) -> bool:
        gone = (
            cluster_service_pb2.Worker.STATE_LEFT,
            cluster_service_pb2.Worker.STATE_LOST,
        )
        workers = self.workers()
        left = all(worker.state in gone for worker in workers if worker.id == worker_id)
        return left and not workers.incomplete  # who is not listed may be there

    def events(self, job_id: str = "", *, follow: bool = False) -> Iterator[Event]:
        """Yield what happened, in order; with ``follow`` it does not end."""
        for message in self.event_messages(job_id, follow=follow):
            yield event_value(message)

    def event_messages(
        self, job_id: str = "", *, after_sequence: int = 0, follow: bool = False
    ) -> Iterator[job_pb2.Event]:
        """Yield the same as wire messages.

        Each event comes once, also when the cluster was away for a while. Whoever does not follow
        gets Unavailable at the end where nobody answers who knows that there are no more.
        """
        request = cluster_service_pb2.ListEventsRequest(
            job_id=arguments.text("job_id", job_id, arguments.JOB_ID),
            after_sequence=after_sequence,
            follow=follow,
        )

        def attach() -> Iterator[cluster_service_pb2.ListEventsResponse]:
            timeout_s = following.FOLLOW_S if follow else STREAM_TIMEOUT_S
            return self.backend.stream(methods.LIST_EVENTS, request, timeout_s=timeout_s)

        streams = (
            following.follow(self.backend, attach)
            if follow
            else following.whole(self.backend, attach)
        )
        for item in streams:
            request.after_sequence = item.event.sequence
            yield item.event


def _state_number(state: str) -> job_pb2.Job.State.ValueType:
    name = "STATE_" + state.upper().removeprefix("STATE_")
    known: Sequence[str] = job_pb2.Job.State.keys()[1:]
    if name not in known:
        choices = ", ".join(item.removeprefix("STATE_").lower() for item in known)
        raise InvalidArgument(f"{state!r} is no state of a job; the states are {choices}")
    return job_pb2.Job.State.Value(name)
