"""`python -P -m worker`: the worker as a process of its own."""

import os

from phalanx.blas import pin_one_thread
from phalanx.ending import end_process

if __name__ == "__main__":
    # Before NumPy is imported: leaf processes are forks of this one.
    pin_one_thread(os.environ)
    from worker.main import main

    end_process(main())
