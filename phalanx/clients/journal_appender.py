"""Appends to a journal, one after another, over one stream: a call for each would cost more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from phalanx.errors import DeadlineExceeded, PhalanxError, Unavailable
from phalanx.rpc.status import error_of, from_rpc_error
from phalanx.v1 import storage_service_pb2 as pb

STREAM_TIMEOUT_S = 24 * 3600.0


class JournalAppender:
    """One append at a time, on a stream that is opened when there is none.

    Nothing is retried: after an error whoever called finds out what became of the append. Close it.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        timeout_s: float,
        on_silence: Callable[[Any], None] = lambda _: None,
    ) -> None:
        """``on_silence`` is told the call of a stream that says nothing for ``timeout_s``."""
        self._method = method
        self._timeout_s = timeout_s
        self._on_silence = on_silence
        self._call: Any = None

    async def append(self, stream: str, records: Sequence[bytes], expected_sequence: int) -> int:
        """Append all records or none; return the sequence after the last, once they are durable.

        Raises PhalanxError: Aborted (SEQUENCE_MISMATCH) where another record has this place.
        """
        request = pb.AppendJournalsRequest(
            append=pb.AppendJournalRequest(
                stream=stream, expected_sequence=expected_sequence, records=records
            )
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._exchange(request)
        except TimeoutError:
            if self._call is not None:
                self._on_silence(self._call)
            self.close()
            text = f"storage did not answer an append to {stream!r} within {self._timeout_s:g} s"
            raise DeadlineExceeded(text, reason="STORAGE_SILENT") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the stream; the next append opens another."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def _exchange(self, request: pb.AppendJournalsRequest) -> int:
        if self._call is None:
            self._call = self._method(timeout=STREAM_TIMEOUT_S)
        call = self._call
        try:
            await call.write(request)
            response = await call.read()
        except grpc.aio.AioRpcError as error:
            raise _known(error) from None
        except asyncio.InvalidStateError:
            response = grpc.aio.EOF
        if response is grpc.aio.EOF:
            raise await _end_of(call)
        return int(response.appended.next_sequence)


async def _end_of(call: Any) -> PhalanxError:
    error = await error_of(call)
    if error is None:
        return Unavailable("storage ended the stream", reason="STREAM_ENDED")
    return _known(error)


def _known(error: grpc.aio.AioRpcError) -> PhalanxError:
    if error.code() is grpc.StatusCode.CANCELLED:
        # Not by whoever waits here: storage is stopping, or the connection is gone.
        return Unavailable("the stream to storage was cancelled", reason="STREAM_ENDED")
    return from_rpc_error(error)
