"""The program ``phalanx``: global options, commands, and one place where errors end."""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from phalanx.cli.command_line import command_at, say_how_to_attach, was_interrupted
from phalanx.cli.commands import (
    backups,
    chaos,
    cluster,
    code,
    data,
    health,
    insight,
    jobs,
    keys,
    models,
    results,
    services,
)
from phalanx.cli.context import Settings
from phalanx.cli.errors import EXIT_OF_CODE, Exit, file_error, show_error
from phalanx.errors import IncompleteWarning, InvalidArgument, PhalanxError
from phalanx.ids import check_namespace

EPILOG = "Start with: phalanx up   ·   Help on one command: phalanx COMMAND --help"

app = typer.Typer(
    name="phalanx",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        import phalanx

        print(f"phalanx {phalanx.__version__}")
        raise typer.Exit


@app.callback()
def global_options(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="H:P,…",
            help="The cluster, HOST:PORT; several are tried in turn. "
            "Default: $PHALANX_ADDRESS, else the cluster of this machine.",
        ),
    ] = None,
    namespace: Annotated[
        str, typer.Option(metavar="N", help="Keeps jobs, data and models apart.")
    ] = "default",
    token_file: Annotated[
        str | None,
        typer.Option(metavar="F", help="File with your token. Default: $PHALANX_TOKEN_FILE."),
    ] = None,
    ca: Annotated[
        str | None,
        typer.Option(metavar="F", help="Authority to trust, PEM. Default: $PHALANX_CA."),
    ] = None,
    cert: Annotated[
        str | None,
        typer.Option(metavar="F", help="Your certificate, for ports that ask for one."),
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="F", help="Key of your certificate.")] = None,
    timeout: Annotated[
        float, typer.Option(metavar="S", min=0.1, help="Longest wait for one answer, seconds.")
    ] = 30.0,
    json: Annotated[
        bool, typer.Option("--json", metavar="", help="Write JSON for programs, errors too.")
    ] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, metavar="", help="Show the version."
        ),
    ] = False,
) -> None:
    """Train machine-learning models on a cluster of unreliable machines.

    [bold]Try it:[/bold] phalanx up --detach · phalanx data add NAME FILE ·
    phalanx submit job.yaml · phalanx watch JOB · phalanx down
    """
    check_namespace(namespace, "--namespace")
    context.obj = Settings(
        address=address,
        namespace=namespace,
        timeout_s=timeout,
        json=json,
        token_file=token_file,
        ca=ca,
        certificate=cert,
        key=key,
    )


cluster.register_start(app)
data.register(app)
jobs.register(app)
models.register(app)
code.register(app)
insight.register(app)
results.register(app)
cluster.register(app)
backups.register(app)
health.register(app)
chaos.register(app)
keys.register(app)
services.register(app)


class _Command(TyperCommand):
    def get_help_option(self, ctx: Any) -> TyperOption | None:
        return _without_type(super().get_help_option(ctx))


class _Group(TyperGroup):
    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _interruptible():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _interruptible():
            return super().invoke(ctx)

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        return _without_type(super().get_help_option(ctx))


class _Interrupted(Exception):
    """Ctrl-C that no command has answered: of KeyboardInterrupt itself typer makes an exit code."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise _Interrupted from error


def _without_type(option: TyperOption | None) -> TyperOption | None:
    """Show ``--help`` as the other flags, which take no value and show none."""
    if option is not None:
        option.metavar = ""
    return option


def _polish_help(group: typer.Typer) -> None:
    """Let paragraphs of docstrings fill the terminal: their line ends are those of the source."""
    group.info.cls = _Group
    for command in group.registered_commands:
        command.cls = _Command
        text = inspect.getdoc(command.callback) or ""
        paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
        command.help = "\n\n".join(paragraphs)
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            inner.cls = _Group
            _polish_help(inner.typer_instance)


_polish_help(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command line; return the exit code. Nothing is raised but SystemExit by
    ``--help``."""
    arguments = _hoist_json(arguments)
    as_json = arguments[:1] == ["--json"]
    try:
        with _warnings_for_people(as_json=as_json):
            code = app(args=arguments, prog_name="phalanx", standalone_mode=False)
        return code if isinstance(code, int) else Exit.DONE
    except typer.TyperException as error:
        show_error(_usage_error(error), as_json=as_json)
        return Exit.USAGE
    except PhalanxError as error:
        show_error(error, as_json=as_json)
        return _exit_code(error)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(arguments)
    except SystemExit:
        # Whoever read our output has seen enough (phalanx jobs | head).
        return Exit.DONE
    except OSError as error:
        # Only an error that names a file can be one of the user's, or a disk that is full.
        own = error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT)
        shown = _bug(error) if own else file_error(error)
        show_error(shown, as_json=as_json)
        return EXIT_OF_CODE[shown.code]
    except MemoryError as error:
        show_error(_memory_error(error), as_json=as_json)
        return Exit.CONFLICT
    except Exception as error:  # noqa: BLE001 - the last resort of the program
        if was_interrupted(error):
            return _interrupted(arguments)
        show_error(_bug(error), as_json=as_json)
        return Exit.BUG


def main() -> None:
    """Run the command line of this process."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal does not have is no reason to say nothing.
        sys.stdout.reconfigure(errors="replace")
    arguments = sys.argv[1:]
    if _reads_large_files(arguments):
        from phalanx.cli.memory import bound_memory

        bound_memory()
    code = run(arguments)
    try:
        # A program that was started with its output closed has none.
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            shown = file_error(error)
            show_error(shown, as_json=False)
            code = EXIT_OF_CODE[shown.code]
        # Else the interpreter complains at exit that it cannot flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


@contextlib.contextmanager
def _warnings_for_people(*, as_json: bool) -> Iterator[None]:
    """Tell that a list may not be whole in a line of its own; in JSON the list says so itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if as_json else "always", IncompleteWarning)
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, IncompleteWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _exit_code(error: PhalanxError) -> int:
    # Asked by name, so that a plain error does not import the SDK.
    if type(error).__name__ in ("JobFailed", "JobCancelled"):
        return Exit.JOB_FAILED
    return EXIT_OF_CODE[error.code]


def _interrupted(arguments: Sequence[str]) -> int:
    # A watch that had attached said it itself, and ended with an exit code.
    say_how_to_attach(arguments)
    return Exit.INTERRUPTED


def _usage_error(error: typer.TyperException) -> InvalidArgument:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "phalanx"
    # Without a command the help has just been shown, and the message is empty.
    what = error.format_message().rstrip(".") or "a command is missing"
    option = getattr(error, "option_name", "")
    if option and context is not None:
        root = context.find_root()
        if any(option in each.opts for each in root.command.params) and root is not context:
            what = (
                f"{option} comes before the command, as in phalanx {option} … {context.info_name}"
            )
    return InvalidArgument(f"{what}; see {path} --help", reason="USAGE")


def _memory_error(error: MemoryError) -> PhalanxError:
    from phalanx.errors import ResourceExhausted

    what = f" ({error})" if str(error) else ""
    return ResourceExhausted(
        f"there is not enough memory for this{what}; close other programs, or raise the limit of "
        "this one (ulimit -v)",
        reason="MEMORY",
    )


def _bug(error: Exception) -> PhalanxError:
    from phalanx.errors import Internal

    if os.environ.get("PHALANX_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
    return Internal(
        f"{type(error).__name__}: {error}; this is a defect of Phalanx, "
        "set PHALANX_TRACEBACK=1 and run the command again to see where it is",
        reason="UNEXPECTED",
    )


def _reads_large_files(arguments: Sequence[str]) -> bool:
    at = command_at(arguments)
    return list(arguments[at : at + 2]) == ["data", "add"]


def _hoist_json(arguments: Sequence[str]) -> list[str]:
    """Return the command line with ``--json`` in front.

    It belongs before the command, but who writes it at the end means the same; and errors of a
    command line that does not parse shall be JSON as well. The services have options of their own.
    """
    at = command_at(arguments)
    own = at if arguments[at : at + 1] and arguments[at] in services.NAMES else len(arguments)
    end = next((i for i, word in enumerate(arguments[:own]) if word == "--"), own)
    if "--json" not in arguments[:end]:
        return list(arguments)
    kept = [word for word in arguments[:end] if word != "--json"]
    return ["--json", *kept, *arguments[end:]]
