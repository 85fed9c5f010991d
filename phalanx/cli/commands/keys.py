"""``phalanx certs`` and ``phalanx token``: the keys of a cluster, as files on this machine."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from phalanx.cli.context import settings_of
from phalanx.errors import InvalidArgument
from phalanx.keys.caller import Role, Service

PANEL = "Keys"
_DURATION = re.compile(r"(\d{1,6})([hdw])", re.ASCII)
_HOURS = {"h": 1, "d": 24, "w": 168}

certs = typer.Typer(no_args_is_help=True, help="Make an authority and certificates.")
token = typer.Typer(no_args_is_help=True, help="Make and revoke tokens for people.")

FOLDER = Annotated[
    Path, typer.Option("--dir", metavar="DIR", help="Folder of the authority and certificates.")
]
HOSTS = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="H", help="Name or address that people dial; again for more."),
]
DAYS = Annotated[int, typer.Option(min=1, max=3650, help="Days until they expire.")]
TOKENS = Annotated[
    Path, typer.Option("--tokens", metavar="FILE", help="The file that --tokens of services names.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(certs, name="certs", rich_help_panel=PANEL)
    app.add_typer(token, name="token", rich_help_panel=PANEL)


@certs.command("init")
def init_certs(
    context: typer.Context,
    directory: FOLDER = Path("keys"),
    host: HOSTS = None,
    days: DAYS = 365,
) -> None:
    """Make an authority, a certificate for each kind of process, and one for people.

    Keep `ca.key` to yourself; each process gets `ca.pem` and the two files of its own kind.

    [bold]Example:[/bold] phalanx certs init --dir keys --host train.example --host 10.0.0.1
    """
    from phalanx.keys import folder

    folder.init(directory, hosts=host or (), days=days)
    _show(context, directory)


@certs.command("issue")
def issue_cert(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its files are NAME.pem, NAME.key.")],
    service: Annotated[
        list[str] | None,
        typer.Option(metavar="S", help="control, aggregator, worker or storage; none: for people."),
    ] = None,
    member: Annotated[
        bool, typer.Option("--member", metavar="", help="Only for the member with the id NAME.")
    ] = False,
    directory: FOLDER = Path("keys"),
    host: HOSTS = None,
    days: DAYS = 365,
) -> None:
    """Make one more certificate.

    With --member it is that of one worker or aggregator, started with --id NAME, and nobody can
    go by another id with it.
    """
    from phalanx.keys import folder

    services = [service_of(each, "--service") for each in service or ()]
    if member and not services:
        raise InvalidArgument("--member is for nodes; say which with --service")
    folder.issue(directory, name, services, hosts=host or (), member=member, days=days)
    _show(context, directory, [name])


@certs.command("renew")
def renew_certs(
    context: typer.Context,
    name: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Which ones; default: all.")
    ] = None,
    directory: FOLDER = Path("keys"),
    days: DAYS = 365,
) -> None:
    """Make certificates anew, with new keys and the same names.

    Running processes take the new files by themselves.
    """
    from phalanx.keys import folder

    renewed = folder.renew(directory, name or (), days=days)
    _show(context, directory, renewed)


@certs.command("list")
def list_certs(context: typer.Context, directory: FOLDER = Path("keys")) -> None:
    """List the certificates of a folder, with their names and ends."""
    _show(context, directory)


@token.command("create")
def create_token(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is: the name in logs.")],
    role: Annotated[str, typer.Option(metavar="R", help="viewer, submitter or admin.")],
    tokens: TOKENS = Path("tokens.json"),
    for_namespace: Annotated[
        list[str] | None,
        typer.Option(metavar="N", help="Open to it; again for more. Default: default; * is all."),
    ] = None,
    permission: Annotated[
        list[str] | None, typer.Option(metavar="P", help="code: may bring code that workers run.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="T", help="After 12h, 30d or 8w. Default: never.")
    ] = None,
) -> None:
    """Make a token and print it, once: the file has its hash only.

    [bold]Example:[/bold] phalanx token create ann --role submitter --permission code > ann.token
    """
    from phalanx.cli.output import print_json
    from phalanx.keys import tokens as files

    everywhere = [files.EVERYWHERE] if _role(role).name == "ADMIN" else ["default"]
    expires_s = time.time() + _seconds(expires) if expires is not None else None
    made = files.create(
        tokens,
        name,
        _role(role),
        namespaces=for_namespace or everywhere,
        permissions=permission or (),
        expires_s=expires_s,
    )
    if settings_of(context).json:
        print_json({"name": name, "token": made})
    else:
        print(made)


@token.command("list")
def list_tokens(context: typer.Context, tokens: TOKENS = Path("tokens.json")) -> None:
    """List whose tokens a file takes, and for what."""
    from phalanx.cli.output import print_json_list, print_table
    from phalanx.keys import tokens as files

    found = [entry.to_json() for entry in files.entries_of(tokens)]
    for entry in found:
        del entry["sha256"]
    if settings_of(context).json:
        print_json_list("tokens", found)
        return
    print_table(
        ("NAME", "ROLE", "NAMESPACES", "PERMISSIONS", "EXPIRES"),
        [
            (
                entry["name"],
                entry["role"],
                ",".join(entry["namespaces"]),
                ",".join(entry["permissions"]),
                entry.get("expires", "never"),
            )
            for entry in found
        ],
        empty="no tokens yet; make one with `phalanx token create`",
    )


@token.command("revoke")
def revoke_token(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose token.")],
    tokens: TOKENS = Path("tokens.json"),
) -> None:
    """Take a token out of the file; services refuse it from their next call on."""
    from phalanx.cli.output import print_json, say
    from phalanx.keys import tokens as files

    files.revoke(tokens, name)
    if settings_of(context).json:
        print_json({"name": name})
    else:
        say(f"the token of {name} is taken out of {tokens}")


def _show(context: typer.Context, directory: Path, names: list[str] | None = None) -> None:
    from phalanx.cli.output import print_json_list, print_table
    from phalanx.keys import folder

    found = [each for each in folder.listing(directory) if names is None or each.name in names]
    if settings_of(context).json:
        print_json_list(
            "certificates",
            [
                {
                    "name": each.name,
                    "names": list(each.names),
                    "expires": each.not_after.isoformat(),
                }
                for each in found
            ],
        )
        return
    now = datetime.now(UTC)
    print_table(
        ("FILE", "DAYS LEFT", "NAMES"),
        [(f"{each.name}.pem", (each.not_after - now).days, " ".join(each.names)) for each in found],
        empty=f"no certificates in {directory}; make some with `phalanx certs init`",
    )


def service_of(text: str, flag: str = "--kind") -> Service:
    """Return the kind of node that a flag names. Raises InvalidArgument."""
    try:
        return Service(text)
    except ValueError:
        choices = ", ".join(Service)
        raise InvalidArgument(f"{flag} {text!r}: it is one of {choices}") from None


def _role(text: str) -> Role:
    try:
        return Role[text.upper()]
    except KeyError:
        choices = ", ".join(each.name.lower() for each in Role)
        raise InvalidArgument(
            f"--role {text!r}: it is one of {choices}; nodes have certificates"
        ) from None


def _seconds(text: str) -> float:
    found = _DURATION.fullmatch(text)
    if found is None or int(found[1]) == 0:
        raise InvalidArgument(f"--expires {text!r}: write hours, days or weeks, as 12h, 30d, 8w")
    return int(found[1]) * _HOURS[found[2]] * 3600.0
