"""What a command line says before anything has parsed it: the program may be ended that early.

Nothing here imports more than the interpreter has loaded anyway.
"""

import sys
from collections.abc import Sequence

WITH_VALUE = ("--address", "--namespace", "--token-file", "--ca", "--cert", "--key", "--timeout")
"""The options before the command that take a value."""


def command_at(arguments: Sequence[str]) -> int:
    """Return the place of the command: a data set may have the name of one."""
    index = 0
    while index < len(arguments) and arguments[index].startswith("-"):
        index += 2 if arguments[index] in WITH_VALUE else 1
    return index


def was_interrupted(error: BaseException) -> bool:
    """Return whether Ctrl-C is behind an error: in the midst of an import another may come of it,
    as of whatever happens in ``__set_name__``."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, KeyboardInterrupt):
        behind = behind.__cause__ or behind.__context__
    return behind is not None


def say_how_to_attach(arguments: Sequence[str]) -> None:
    """Say how to come back to the job that was to be watched, before it was seen at all.

    Its cluster has not been asked yet, so nothing is said of how it is.
    """
    at = command_at(arguments)
    if list(arguments[at : at + 1]) != ["watch"] or not arguments[at + 1 :]:
        return
    import shlex

    print(
        f"\nnot attached yet, and no job is touched; attach with: phalanx {shlex.join(arguments)}",
        file=sys.stderr,
        flush=True,
    )
