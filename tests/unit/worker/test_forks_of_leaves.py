"""Processes that a leaf forks can be stopped from their first instruction on."""

import subprocess
import sys

PROGRAM = """
import os, signal
from worker.leaf import server

# As if whoever has forked it stopped it before it has run a line.
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1})
server._ignore_stopping()
child = os.fork()
if child == 0:
    signal.sigwait({signal.SIGUSR1})
os.kill(os.getpid(), signal.SIGTERM)
assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGUSR1}
os.kill(os.getpid(), signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_what_stops_a_process_that_was_just_forked_is_not_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        capture_output=True,
        check=False,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "-15\n", "")
