"""Where the program starts. Loading the rest of it takes a moment, and Ctrl-C in it is no crash."""

import sys

from phalanx.parent import EXIT_INTERRUPTED


def main() -> None:
    """Run the command line of this process."""
    try:
        from phalanx.cli import main as program
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    program.main()
