"""Whether the servers behind storage are there: what health tells about this process."""

import asyncio
from collections.abc import Callable

from phalanx.errors import PhalanxError
from phalanx.telemetry.logs import get_logger

INTERVAL_S = 5.0

_log = get_logger(__name__)


async def watch_servers(check: Callable[[], None], say: Callable[[bool], None]) -> None:
    """Say whenever they went away or came back, until cancelled; at first they are there.

    ``check`` blocks and raises while they are away. It has a thread that no call of a client is in:
    those wait for the same servers.
    """
    there = True
    while True:
        await asyncio.sleep(INTERVAL_S)
        now_there, why = True, ""
        try:
            await asyncio.to_thread(check)
        except PhalanxError as error:
            now_there, why = False, error.message
        if now_there != there:
            there = now_there
            say(there)
            if there:
                _log.info("serves_again")
            else:
                _log.warning("does_not_serve", message=why)
