"""`python -P -m coordinator control|aggregator`: run one coordinator process."""

import sys
from collections.abc import Sequence

from phalanx.ending import end_process

USAGE = """usage: python -m coordinator {control,aggregator} [flags]

  control      leads the cluster: who is in it, who does what, what became of each job
  aggregator   owns ranges of the jobs' parameters and applies their updates

`python -m coordinator control --help` shows the flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the process that the first argument names; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    kind = arguments[0] if arguments else ""
    # Each is imported only where it runs: control stays free of numeric libraries.
    if kind == "control":
        from coordinator.control.main import main as control_main

        return control_main(arguments[1:])
    if kind == "aggregator":
        from coordinator.aggregation.main import main as aggregator_main

        return aggregator_main(arguments[1:])
    asked = kind in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr, end="")
    return 0 if asked else 2


if __name__ == "__main__":
    end_process(main())
