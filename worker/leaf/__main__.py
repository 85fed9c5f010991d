"""`python -P -m worker.leaf PARENT_PID`: the process whose forks are leaf processes.

Started by the session process only, with its socket as standard input and the thread counts of the
numeric libraries in the environment, since they are read when NumPy is first imported.
"""

from __future__ import annotations

import socket
import sys

from worker.leaf.server import run

if __name__ == "__main__":
    run(socket.socket(fileno=0), int(sys.argv[1]))
