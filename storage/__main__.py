"""``python -P -m storage --state DIR``: run the storage service."""

from collections.abc import Sequence

from phalanx.config import parse
from phalanx.ending import end_process
from phalanx.rpc.buffers import reuse_large_buffers
from phalanx.rpc.process import run_service
from storage.config import StorageConfig
from storage.runtime import serve


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service until it is told to stop; return its exit code."""
    config = parse(StorageConfig, argv, prog="phalanx storage")
    reuse_large_buffers()
    return run_service(config, serve, role="storage")


if __name__ == "__main__":
    end_process(main())
