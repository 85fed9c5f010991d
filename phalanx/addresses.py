"""HOST:PORT addresses and what to say when one cannot be used."""

import errno
import ipaddress
import socket

from phalanx.errors import FailedPrecondition, InvalidArgument


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT`` (``[::1]:80`` for IPv6). Raises InvalidArgument."""
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise InvalidArgument(f"{address!r} is not an address; write HOST:PORT, as 127.0.0.1:7410")
    return host, int(port)


def split_addresses(text: str) -> list[str]:
    """Return the addresses of a text that separates them by commas.

    >>> split_addresses("one:7420, two:7420")
    ['one:7420', 'two:7420']
    """
    return [part.strip() for part in text.split(",") if part.strip()]


def is_loopback(address: str) -> bool:
    """Return whether only this machine reaches ``HOST:PORT``."""
    host = split_address(address)[0]
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind_error(address: str, error: OSError) -> FailedPrecondition:
    """Return the error of a server that cannot listen on ``address``."""
    if error.errno == errno.EADDRINUSE:
        return FailedPrecondition(
            f"cannot listen on {address}: the port is in use; stop the other program or choose "
            "another port",
            reason="ADDRESS_IN_USE",
        )
    return FailedPrecondition(
        f"cannot listen on {address}: {error.strerror or error}", reason="ADDRESS_UNUSABLE"
    )


def explain_bind_failure(address: str) -> FailedPrecondition:
    """Find out why a server could not bind ``address``, by trying it with a plain socket."""
    host, port = split_address(address)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen(1)
    except OSError as error:
        return bind_error(address, error)
    return bind_error(address, OSError(errno.EADDRINUSE, "Address already in use"))
