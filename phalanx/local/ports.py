"""Free ports of this machine."""

import socket
from contextlib import ExitStack

from phalanx.errors import FailedPrecondition
from phalanx.local.options import HOST


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, all different.

    Another program may take one before it is used; whoever starts a server there must be ready for
    that.
    """
    with ExitStack() as stack:
        ports = []
        for _ in range(count):
            probe = stack.enter_context(socket.socket())
            probe.bind((HOST, 0))
            ports.append(int(probe.getsockname()[1]))
        return ports


def check_free(port: int) -> None:
    """Raise FailedPrecondition if somebody listens on ``port``."""
    with socket.socket() as probe:
        # As the servers do: a port whose last connections are just closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except PermissionError:
            raise FailedPrecondition(
                f"port {port} needs more rights than this user has; "
                "give --port 0 or one above 1023",
                reason="PORT_DENIED",
            ) from None
        except OSError:
            raise FailedPrecondition(
                f"port {port} is in use; give --port 0 or another, "
                "or stop the cluster that uses it with `phalanx down`",
                reason="PORT_IN_USE",
            ) from None
