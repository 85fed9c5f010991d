"""Whether storage can be used now: it cannot while its database or its object store is away."""

import asyncio
from collections.abc import Callable

from phalanx.errors import PhalanxError
from phalanx.telemetry.logs import get_logger

INTERVAL_S = 1.0
SILENCE_S = 3.0
"""What does not answer for so long is away; the answer is waited for all the same."""

_log = get_logger(__name__)


async def show_readiness(check: Callable[[], None], set_serving: Callable[[bool], None]) -> None:
    """Keep what the health service says up to date until cancelled; it begins as serving.

    ``check`` blocks, and raises PhalanxError where one of them does not answer. It runs in a
    thread of its own, since those for calls may all be waiting for the same.
    """
    serving = True
    while True:
        asked = asyncio.ensure_future(asyncio.to_thread(check))
        await asyncio.wait([asked], timeout=SILENCE_S)
        if not asked.done() and serving:
            serving = _changed(False, set_serving, f"no answer for {SILENCE_S:g} s")
        try:
            await asked
        except PhalanxError as error:
            if serving:
                serving = _changed(False, set_serving, error.message)
        else:
            if not serving:
                serving = _changed(True, set_serving, "")
        await asyncio.sleep(INTERVAL_S)


def _changed(serving: bool, set_serving: Callable[[bool], None], why: str) -> bool:
    _log.warning("ready_again" if serving else "not_ready", message=why)
    set_serving(serving)
    return serving
