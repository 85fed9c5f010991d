"""What tests that start the command line for real share."""

import csv
import time

import numpy as np
import psutil


def write_kinds(path):
    """A CSV file with a number, a word and a class that follows from both."""
    generator = np.random.default_rng(3)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["length", "colour", "kind"])
        for _ in range(600):
            length, colour = generator.normal(), generator.choice(["red", "blue"])
            kind = "long" if length + (colour == "red") > 0.5 else "short"
            writer.writerow([f"{length:.4f}", colour, kind])


def alive(pids):
    """Return those that run; zombies have ended."""
    return [
        pid
        for pid in pids
        if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    ]


def wait_for(condition, what, guard_s):
    """Poll until the condition is true."""
    deadline_s, pause_s = time.monotonic() + guard_s, 0.01
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain: {what}"
        time.sleep(pause_s)
        pause_s = min(0.05, 1.2 * pause_s)  # looking costs time that the cluster needs
