"""Gloo all-reduce of the same bytes: the yardstick from a C++ collective library.

Run as ``python -m bench.gloo BYTES ROUNDS`` with an interpreter that has torch;
prints the median seconds of one all-reduce over two processes.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import sys
import time
from typing import Any


def _member(rank: int, port: int, size_bytes: int, rounds: int, results: Any) -> None:
    import torch
    import torch.distributed

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    tensor = torch.ones(size_bytes // 4, dtype=torch.float32)
    seconds = []
    for _ in range(rounds + 2):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        seconds.append(time.perf_counter() - start)
    torch.distributed.destroy_process_group()
    results.put(statistics.median(seconds[2:]))


def main() -> None:
    """Runs two processes on loopback and prints the slower median."""
    size_bytes, rounds = int(sys.argv[1]), int(sys.argv[2])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    members = [
        context.Process(target=_member, args=(rank, port, size_bytes, rounds, results))
        for rank in range(2)
    ]
    for member in members:
        member.start()
    print(max(results.get(timeout=120) for _ in members))
    for member in members:
        member.join(timeout=30)


if __name__ == "__main__":
    main()
