"""Where the program starts. Loading the rest of it takes a moment, and Ctrl-C in it is no crash."""

import sys

from phalanx.ending import end_process

_CODE_OF_JOBS = "phalanx.models.code"
"""Where it is loaded, files may be open that are only written when all is taken apart."""


def main() -> None:
    """Run the command line of this process."""
    try:
        from phalanx.cli import main as program

        try:
            program.main()
        except SystemExit as ended:
            if isinstance(ended.code, int) and _CODE_OF_JOBS not in sys.modules:
                end_process(ended.code)
            raise
    except (Exception, KeyboardInterrupt) as error:
        from phalanx.cli.command_line import say_how_to_attach, was_interrupted
        from phalanx.parent import EXIT_INTERRUPTED

        if not was_interrupted(error):
            raise
        say_how_to_attach(sys.argv[1:])
        sys.exit(EXIT_INTERRUPTED)
