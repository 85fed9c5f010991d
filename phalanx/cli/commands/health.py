"""The command that asks one process whether it is well: what container engines run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from phalanx.cli.commands.cluster import PANEL
from phalanx.cli.context import settings_of
from phalanx.errors import Code, PhalanxError, Unavailable

USUAL_PORTS = (7410, 7420, 7430, 7440)
"""Of control, storage, aggregators and workers."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(rich_help_panel=PANEL)(health)


def health(
    context: typer.Context,
    address: Annotated[
        str,
        typer.Argument(
            metavar="[HOST:PORT]",
            help="The process. Default: whichever listens on a usual port of this machine.",
            show_default=False,
        ),
    ] = "",
    service: Annotated[
        str,
        typer.Option(metavar="NAME", help="One service of it, or `liveness`. Default: all of it."),
    ] = "",
) -> None:
    """Ask one process by gRPC whether it does what it is there for.

    Without an address the ports 7410 (control), 7420 (storage), 7430 (aggregator) and 7440 (worker)
    of this machine are tried: one must answer, and all that answer must be well. In a container
    that is its one process.

    Exit code 4 when nothing answers, and when the answer is no.

    [bold]Examples[/bold]

    phalanx health 10.0.0.2:7430

    phalanx --timeout 3 health --service liveness
    """
    from phalanx.cli.output import print_json

    settings = settings_of(context)
    well = _ask(address, service, settings.timeout_s)
    if settings.json:
        print_json({"addresses": list(well), "service": service, "serving": True})
    else:
        print(f"{', '.join(well)}: serving")


def _ask(address: str, service: str, timeout_s: float) -> Sequence[str]:
    """Return the addresses that are well. Raises Unavailable where one is not, or none is there."""
    if address:
        _check(address, service, timeout_s)
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
        _check(each, service, timeout_s)
    return found


def _listens(address: str) -> bool:
    import socket

    from phalanx.addresses import split_address

    with socket.socket() as probe:
        return probe.connect_ex(split_address(address)) == 0


def _check(address: str, service: str, timeout_s: float) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from phalanx.rpc.channel import open_sync_channel
    from phalanx.rpc.status import from_rpc_error

    with open_sync_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(
                health_pb2.HealthCheckRequest(service=service),
                timeout=timeout_s,
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
