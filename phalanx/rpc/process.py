"""What every service process does around its work: signals, parent, announcement, exit code.

    async def serve(config: StorageConfig, stop: asyncio.Event) -> None:
        server = Server(...)
        await server.start()
        server.set_serving(True)
        announce(config, role="storage", address=server.address)
        await stop.wait()
        await server.stop()

    def main(argv: Sequence[str] | None = None) -> int:
        config = parse(StorageConfig, argv, prog="phalanx storage")
        return run_service(config, serve, role="storage")

SIGTERM and SIGINT set ``stop``; a second one ends the process at once with 130.
"""

import asyncio
import errno
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from phalanx.config import EXIT_USAGE, ServiceConfig
from phalanx.errors import FailedPrecondition, InvalidArgument
from phalanx.files import replace_content
from phalanx.parent import EXIT_INTERRUPTED, die_with_parent
from phalanx.telemetry import traces
from phalanx.telemetry.logs import configure_logging, get_logger

EXIT_BUG = 70

ConfigT = TypeVar("ConfigT", bound=ServiceConfig)
Main = Callable[[ConfigT, asyncio.Event], Awaitable[int | None]]

_FULL = (errno.ENOSPC, errno.EDQUOT)

_log = get_logger(__name__)


def run_service(config: ConfigT, main: Main[ConfigT], *, role: str) -> int:
    """Run ``main(config, stop)`` and return the exit code of the process.

    ``main`` returns None or an exit code after ``stop`` is set. A wrong setting that shows only at
    start (a port in use: FailedPrecondition, InvalidArgument) gives 2 with one line on standard
    error; anything else that escapes is a defect: 70 and a logged traceback.
    """
    die_with_parent(config.parent_pid)
    configure_logging(role, config.id, config.log_level, config.log_format)
    traces.configure(role, config.id)
    try:
        return asyncio.run(_until_stopped(config, main)) or 0
    except (FailedPrecondition, InvalidArgument) as error:
        _log.error("cannot_start", reason=error.reason, message=error.message)
        print(f"phalanx {role}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:  # noqa: BLE001 - the boundary where defects are told
        _log.exception("crashed")
        return EXIT_BUG
    finally:
        traces.shutdown()


async def _until_stopped(config: ConfigT, main: Main[ConfigT]) -> int | None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(EXIT_INTERRUPTED)
        _log.info("stopping", signal=signal.Signals(number).name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return await main(config, stop)


def announce(
    config: ServiceConfig, *, role: str, address: str = "", metrics_address: str = ""
) -> None:
    """Write the ``--announce`` file, if one is wanted: the whole of it or nothing of it is seen."""
    if config.announce is None:
        return
    facts = {
        "role": role,
        "id": config.id,
        "pid": os.getpid(),
        "address": address,
        "metrics_address": metrics_address,
    }
    _write_atomically(config.announce, json.dumps(facts) + "\n")


def _write_atomically(path: Path, text: str) -> None:
    try:
        replace_content(path, text.encode())
    except OSError as error:
        if error.errno in _FULL and _write_over(path, text):
            return
        raise FailedPrecondition(
            f"cannot write the announcement {path}: {error.strerror}", reason="ANNOUNCE_FAILED"
        ) from error


def _write_over(path: Path, text: str) -> bool:
    """Write into the file of the process before, which takes no space: on a full disk too, whoever
    died must be able to come back. Whoever reads half of it reads again."""
    try:
        with path.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()
    except OSError:
        return False
    return True
