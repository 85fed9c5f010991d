"""The command that asks one process whether it is well: what container engines run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phalanx.cli.commands.cluster import PANEL
from phalanx.cli.commands.keys import service_of
from phalanx.cli.context import Settings, settings_of
from phalanx.errors import Code, FailedPrecondition, InvalidArgument, PhalanxError, Unavailable
from phalanx.keys.caller import Service

if TYPE_CHECKING:
    from phalanx.rpc.credentials import ClientKeys

USUAL_PORTS = {
    7410: Service.CONTROL,
    7420: Service.STORAGE,
    7430: Service.AGGREGATOR,
    7440: Service.WORKER,
}
_VARIABLES = ("TLS_CA", "TLS_CERTIFICATE", "TLS_KEY")


@dataclass(frozen=True)
class _Question:
    """What is asked of each process."""

    settings: Settings
    service: str
    kind: Service | None


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(rich_help_panel=PANEL)(health)


def health(
    context: typer.Context,
    address: Annotated[
        str,
        typer.Argument(
            metavar="HOST:PORT",
            help="The process. Default: whichever listens on a usual port of this machine.",
            show_default=False,
        ),
    ] = "",
    service: Annotated[
        str,
        typer.Option(metavar="NAME", help="One service of it, or `liveness`. Default: all of it."),
    ] = "",
    kind: Annotated[
        str,
        typer.Option(
            metavar="K",
            help="control, storage, aggregator or worker: its certificate must be that of one, and "
            "need not name the host.",
        ),
    ] = "",
) -> None:
    """Ask one process by gRPC whether it does what it is there for.

    Without an address the ports 7410 (control), 7420 (storage), 7430 (aggregator) and 7440 (worker)
    of this machine are tried: one must answer, and all that answer must be well. In a container
    that is its one process.

    Where there are keys, the files that PHALANX_TLS_CA, PHALANX_TLS_CERTIFICATE and PHALANX_TLS_KEY
    name are used, as by the process itself, unless --ca and --cert say others.

    Exit code 4 when nothing answers, and when the answer is no.

    [bold]Examples[/bold]

    phalanx health 10.0.0.2:7430

    phalanx --timeout 3 health --service liveness

    phalanx --ca ca.pem --cert client.pem --key client.key health 10.0.0.3:7440 --kind worker
    """
    from phalanx.cli.output import print_json

    settings = settings_of(context)
    well = _ask(address, _Question(settings, service, service_of(kind) if kind else None))
    if settings.json:
        print_json({"addresses": list(well), "service": service, "serving": True})
    else:
        print(f"{', '.join(well)}: serving")


def _ask(address: str, question: _Question) -> Sequence[str]:
    """Return the addresses that are well. Raises Unavailable where one is not, or none is there."""
    if address:
        _check(address, question)
        return (address,)
    found = [each for each in (f"127.0.0.1:{port}" for port in USUAL_PORTS) if _listens(each)]
    if not found:
        ports = ", ".join(map(str, USUAL_PORTS))
        raise Unavailable(
            f"nothing listens on the ports {ports} of this machine; name the process: "
            "phalanx health HOST:PORT",
            reason="NOT_SERVING",
        )
    for each in found:
        _check(each, question)
    return found


def _listens(address: str) -> bool:
    import socket

    from phalanx.addresses import split_address

    with socket.socket() as probe:
        return probe.connect_ex(split_address(address)) == 0


def _keys(address: str, question: _Question) -> tuple[ClientKeys | None, Service | None]:
    """Return what to prove oneself with, and what the process has to be; None: any."""
    from phalanx.addresses import split_address
    from phalanx.sdk.keys import resolve_keys

    given = question.settings
    keys = resolve_keys(ca=given.ca, certificate=given.certificate, key=given.key, environ={})
    if keys is not None:
        return keys, question.kind
    kind = question.kind or USUAL_PORTS.get(split_address(address)[1])
    if own := _own_keys(kind, os.environ):
        return own, kind
    return resolve_keys(), question.kind


def _own_keys(kind: Service | None, environ: Mapping[str, str]) -> ClientKeys | None:
    """Return the keys that a process of this environment has."""
    from phalanx.rpc.credentials import ClientKeys

    prefixes = (f"PHALANX_{kind.upper()}", "PHALANX") if kind else ("PHALANX",)
    found = [
        next((value for each in prefixes if (value := environ.get(f"{each}_{name}"))), "")
        for name in _VARIABLES
    ]
    paths = [Path(each) for each in found if each]
    if len(paths) < len(_VARIABLES):
        return None
    ca, certificate, key = paths
    try:
        return ClientKeys(ca=ca, certificate=certificate, key=key)
    except FailedPrecondition as error:
        raise InvalidArgument(error.message, reason=error.reason) from error


def _check(address: str, question: _Question) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from phalanx.rpc.channel import open_sync_channel
    from phalanx.rpc.status import from_rpc_error

    keys, kind = _keys(address, question)
    credentials = keys.current()[1] if keys is not None else None
    with open_sync_channel(address, credentials, kind) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(
                health_pb2.HealthCheckRequest(service=question.service),
                timeout=question.settings.timeout_s,
                # A container that starts is asked before it listens.
                wait_for_ready=True,
            )
        except grpc.RpcError as error:
            raise _told(address, from_rpc_error(error)) from error
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unavailable(f"{address} does not serve (yet)", reason="NOT_SERVING")


def _told(address: str, error: PhalanxError) -> PhalanxError:
    if error.code in (Code.DEADLINE_EXCEEDED, Code.UNAVAILABLE):
        return Unavailable(f"{address} does not answer", reason="NOT_SERVING")
    return error
