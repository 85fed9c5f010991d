"""One hosted job in the session process: its streams, its shared memory, its frames."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from phalanx.compressors import build_down_codec, build_up_codec, decoded
from phalanx.errors import InvalidArgument
from phalanx.frames import encode_request
from phalanx.keys.caller import Service
from phalanx.rpc.credentials import ClientKeys
from phalanx.training.two_rounds import step_of
from phalanx.v1 import aggregation_service_pb2 as exchange
from phalanx.v1 import job_spec_pb2, training_pb2
from worker.core.effects import Effect, OpenStreams
from worker.core.job import JobCore
from worker.core.outbox import GoOut, RecallOut, StartsOut
from worker.core.progress import JobProgress
from worker.session.exchange import ExchangeStream
from worker.session.payloads import FrameBuilder
from worker.session.setup import PreparedJob


class HostedJob:
    """Carries out what the job's core decides about the exchange.

    `perform` carries out all other effects and starts waiting tasks.
    """

    owners: ClassVar[Service] = Service.AGGREGATOR
    """What the owners of its ranges are."""

    def __init__(
        self,
        core: JobCore,
        worker_id: str,
        incarnation: str,
        perform: Callable[[list[Effect]], None],
        keys: ClientKeys | None = None,
    ) -> None:
        self._keys = keys
        self.core = core
        self.progress = JobProgress()
        self.prepared: PreparedJob | None = None
        self.preparing: asyncio.Task[None] | None = None
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._perform = perform
        self._streams: dict[str, ExchangeStream] = {}
        self._closing: set[asyncio.Task[None]] = set()
        spec = job_spec_pb2.JobSpec.FromString(core.plan.spec)
        self._builder = FrameBuilder(build_up_codec(spec))
        self._down_codec = build_down_codec(spec.train)
        self._wanted: OpenStreams | None = None
        #: By stream: how many of the proofs of what was given to this worker were shown.
        self._shown: dict[str, int] = {}

    @property
    def step(self) -> int:
        """That of the newest whole version; the version where contributions commit one by one."""
        return step_of(self.core.plan, max(0, self.core.versions.whole_version))

    def became_prepared(self, prepared: PreparedJob) -> None:
        """The job's files and shared memory are here: the streams may open."""
        self.prepared = prepared
        self.open_streams(self._wanted)

    def open_streams(self, wanted: OpenStreams | None) -> None:
        """Close the streams of the term before and open those of this one."""
        self._wanted = wanted
        self._close_streams()
        if wanted is None or self.prepared is None:
            return
        hello = self._hello(wanted)
        for aggregator_id, address in wanted.owners:
            events = _TermEvents(self, wanted.term)
            self._streams[aggregator_id] = ExchangeStream(
                aggregator_id, address, hello, events, self._keys, self.owners
            )

    def _hello(self, wanted: OpenStreams) -> exchange.ExchangeHello:
        return exchange.ExchangeHello(
            job_id=wanted.job_id,
            term=wanted.term,
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            takes_joined_go_records=True,
            takes_copies=True,
            given=self.core.given[0] if self.core.given else None,
        )

    def wake(self, aggregator_id: str) -> None:
        """A stream has something to send."""
        stream = self._streams.get(aggregator_id)
        if stream is not None:
            stream.wake()

    async def close(self) -> None:
        """End the streams; the caller releases what was prepared."""
        if self.preparing is not None:
            self.preparing.cancel()
            await asyncio.gather(self.preparing, return_exceptions=True)
        self._close_streams()
        if self._closing:
            await asyncio.wait(self._closing)

    def _close_streams(self) -> None:
        for stream in self._streams.values():
            task = asyncio.create_task(stream.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._streams.clear()

    # Events of the present term's streams

    def opened(self, aggregator_id: str) -> None:
        """An aggregator accepted its stream, and with its hello what was given first."""
        self._shown[aggregator_id] = 1
        self._perform(self.core.stream_opened(aggregator_id))

    def go_record(self, go: training_pb2.GoRecord) -> None:
        """The root decided."""
        self._perform(self.core.go_record(go))

    def copy_nodes(self, wanted: exchange.CopyNodes) -> None:
        """An aggregator wants copies of what others are late with."""
        self._perform(self.core.copy_nodes(wanted))

    def start_leaf(self, start: exchange.StartLeaf) -> None:
        """The root starts a leaf here."""
        self._perform(self.core.start_leaf(start))

    def version_frame(self, frame: exchange.VersionFrame, payload: memoryview) -> None:
        """Copy a part of a version into its shared buffer."""
        place = self.core.frame_place(frame)
        if place is None or self.prepared is None:
            return
        arena = self.prepared.arena
        values: Any
        if self._down_codec is not None and not frame.HasField("node"):
            values = decoded(self._down_codec, payload, place.element_count)
        elif len(payload) != place.element_count * arena.dtype.itemsize:
            raise InvalidArgument(
                f"{place.element_count} elements of version {place.version} came in "
                f"{len(payload)} bytes; check that both ends run the same version of Phalanx"
            )
        else:
            values = np.frombuffer(payload, arena.dtype)
        first = place.first_element
        arena.array(place.buffer)[first : first + place.element_count] = values
        self._perform(self.core.frame_stored(place))

    def owner_said(self, header: exchange.ExchangeResponseHeader, payload: memoryview) -> None:
        """Only jobs whose workers own the parameters know more messages; see all_reduce."""

    def next_message(self, aggregator_id: str) -> bytes | None:
        """The next message of a stream, encoded; whatever was given is shown before it is done."""
        shown = self._shown.get(aggregator_id, 0)
        if 0 < shown < len(self.core.given):
            self._shown[aggregator_id] = shown + 1
            return encode_request(exchange.ExchangeRequestHeader(given=self.core.given[shown]))
        return self._next_of_core(aggregator_id)

    def _next_of_core(self, aggregator_id: str) -> bytes | None:
        out = self.core.next_message(aggregator_id)
        if out is None:
            return None
        if isinstance(out, GoOut):
            return encode_request(exchange.ExchangeRequestHeader(go_record=out.go))
        if isinstance(out, RecallOut):
            return encode_request(exchange.ExchangeRequestHeader(recall=out.recall))
        if isinstance(out, StartsOut):
            return encode_request(exchange.ExchangeRequestHeader(starts_wanted=out.wish))
        assert self.prepared is not None
        return self._builder.encode(out, self.prepared.arena)


class _TermEvents:
    """Passes on what streams of the job's present term say; those of older terms are silent."""

    def __init__(self, job: HostedJob, term: int) -> None:
        self._job = job
        self._term = term

    @property
    def _current(self) -> bool:
        return self._job.core.term == self._term

    def opened(self, aggregator_id: str) -> None:
        if self._current:
            self._job.opened(aggregator_id)

    def closed(self, aggregator_id: str) -> None:
        if self._current:
            self._job.core.stream_closed(aggregator_id)

    def go_record(self, go: training_pb2.GoRecord) -> None:
        if self._current:
            self._job.go_record(go)

    def copy_nodes(self, wanted: exchange.CopyNodes) -> None:
        if self._current:
            self._job.copy_nodes(wanted)

    def start_leaf(self, start: exchange.StartLeaf) -> None:
        if self._current:
            self._job.start_leaf(start)

    def version_frame(self, frame: exchange.VersionFrame, payload: memoryview) -> None:
        if self._current:
            self._job.version_frame(frame, payload)

    def owner_said(self, header: exchange.ExchangeResponseHeader, payload: memoryview) -> None:
        if self._current:
            self._job.owner_said(header, payload)

    def next_message(self, aggregator_id: str) -> bytes | None:
        return self._job.next_message(aggregator_id) if self._current else None
