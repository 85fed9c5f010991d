"""``python -P -m storage.links``: makes chunks of linked files for one storage process.

Standard input is a socket. Files of users are read and parsed here and not in storage: the work
takes processor time that journals must not wait for, and a file that crashes its reader, or that
takes more memory than there is, takes this process with it and nothing else.
"""

import contextlib
import os
import socket
import sys
import traceback
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from setproctitle import setproctitle, setthreadtitle

from phalanx.blas import pin_one_thread

pin_one_thread(os.environ)
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

from phalanx.data.link_plans import ChunkPlace  # noqa: E402
from phalanx.data.linked_chunks import ChunkMaker, OpenFiles  # noqa: E402
from phalanx.data.linked_files import AWAY  # noqa: E402
from phalanx.data.manifest import DatasetManifest  # noqa: E402
from phalanx.errors import PhalanxError, Unavailable  # noqa: E402
from storage.links import messages  # noqa: E402

KEPT_BYTES = 64 * 1024 * 1024
"""Of decoded rows, for the chunks that lie beside."""

_PLANS = 8
_NICE = 5


class Server:
    """Answers requests, one after another."""

    def __init__(self, roots: Sequence[str]) -> None:
        self._files = OpenFiles(roots, KEPT_BYTES)
        self._makers: OrderedDict[str, ChunkMaker] = OrderedDict()

    def answer(self, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
        """Do what a request asks for; every error becomes an answer."""
        try:
            maker = self._maker(header["plan"], body)
            if maker is None:
                return {"wants": "plan"}, b""
            if header["do"] == "check":
                maker.check(header["first"], header["stop"])
                return {}, b""
            return {}, maker.make(ChunkPlace(header["split"], header["first"], header["stop"]))
        except PhalanxError as error:
            passes = isinstance(error, Unavailable)
            return {"error": error.message, "reason": error.reason, "passes": passes}, b""
        except MemoryError as error:
            return {"error": f"out of memory: {error}", "reason": AWAY, "passes": True}, b""
        except Exception as error:  # noqa: BLE001 - whatever a file makes of its readers
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}", "reason": "", "passes": False}, b""

    def _maker(self, digest: str, plan: bytes) -> ChunkMaker | None:
        """The maker of a plan, of which only the digest comes where it is known."""
        maker = self._makers.get(digest)
        if maker is None:
            if not plan:
                return None
            maker = self._makers[digest] = ChunkMaker(DatasetManifest.from_json(plan), self._files)
            while len(self._makers) > _PLANS:
                self._makers.popitem(last=False)
        self._makers.move_to_end(digest)
        return maker


def main(roots: Sequence[str]) -> int:
    """Serve until the other side closes the socket."""
    _step_back()
    connection = socket.socket(fileno=os.dup(0))
    server = Server(roots)
    with connection, contextlib.suppress(OSError):
        while (request := messages.receive(connection)) is not None:
            messages.send(connection, *server.answer(*request))
    return 0


def _step_back() -> None:
    """Have this process yield to the service, and be the one to go where memory runs out."""
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    setproctitle(f"python -P -m storage.links: reads files for process {os.getppid()}")
    setthreadtitle("link-reader")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
