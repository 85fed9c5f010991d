"""Who makes a call.

A node proves by its certificate which service it is, a person by a token who they are. Nothing in
a request says so.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from phalanx.errors import PermissionDenied, Violation, no_job

DOMAIN = "phalanx.internal"
"""Certificates of nodes name services below it: `worker.phalanx.internal`."""

CODE = "code"
"""Permission to bring code, or to name some, that workers run."""

PERMISSIONS = (CODE,)


class Role(IntEnum):
    """What a person may do; each may do all that the ones before may."""

    VIEWER = 1
    SUBMITTER = 2
    ADMIN = 3


class Service(StrEnum):
    """What a node is."""

    CONTROL = "control"
    AGGREGATOR = "aggregator"
    WORKER = "worker"
    STORAGE = "storage"


_SERVICES = frozenset(service.value for service in Service)


@dataclass(frozen=True)
class Caller:
    """Somebody who was recognized; without a role and without services: nobody."""

    name: str
    role: Role | None = None
    """Of a person."""
    namespaces: frozenset[str] | None = frozenset()
    """Of a person; None: all."""
    permissions: frozenset[str] = frozenset()
    services: frozenset[Service] = frozenset()
    """Of a node."""
    members: frozenset[str] = frozenset()
    """The only ids that a node may go by; empty: any."""
    open_cluster: bool = field(default=False, compare=False)
    """Nobody has to prove anything here."""

    def may_act_in(self, namespace: str) -> bool:
        """Whether a namespace is open to the caller. Nodes work for all of them."""
        return self.open_cluster or bool(self.services) or self._all or namespace in self._spaces

    @property
    def acts_everywhere(self) -> bool:
        """Whether every namespace, also one that is made later, is open to the caller."""
        return self.open_cluster or bool(self.services) or self._all

    @property
    def _all(self) -> bool:
        return self.role is not None and self.namespaces is None

    @property
    def _spaces(self) -> frozenset[str]:
        return self.namespaces or frozenset()

    def check_namespace(self, namespace: str, field: str = "namespace") -> None:
        """Raise PermissionDenied unless the namespace is open to the caller."""
        if not self.may_act_in(namespace):
            raise PermissionDenied(
                f"{self.name} may not act in the namespace {namespace!r}, only in "
                f"{', '.join(sorted(self._spaces)) or 'none'}",
                reason="NAMESPACE_NOT_ALLOWED",
                violations=[Violation(field, "names a namespace that is not open to this caller")],
            )

    def check_job(self, job_id: str, namespace: str) -> None:
        """Raise NotFound, as for a job that is not there, where its namespace is not open."""
        if not self.may_act_in(namespace):
            raise no_job(job_id)

    def check_code(self, field: str = "code") -> None:
        """Raise PermissionDenied unless the caller may bring code that workers run."""
        if not self.open_cluster and CODE not in self.permissions:
            raise PermissionDenied(
                f"{self.name} may not bring code to this cluster: the token lacks the permission "
                f"{CODE!r}",
                reason="CODE_NOT_ALLOWED",
                violations=[Violation(field, "needs a token with the permission code")],
            )

    def check_member(self, member_id: str, field: str) -> None:
        """Raise PermissionDenied where the certificate is that of other members."""
        if self.members and member_id not in self.members:
            raise PermissionDenied(
                f"the certificate of {', '.join(sorted(self.members))} cannot speak for "
                f"{member_id[:128]!r}",
                reason="NOT_THIS_MEMBER",
                violations=[Violation(field, "names a member whose certificate this is not")],
            )

    def check_given(self, service: Service, member_id: str, field: str, what: str) -> None:
        """Raise PermissionDenied unless this is the member to whom something was given; an empty
        id: nobody."""
        if self.open_cluster:
            return
        mine = service in self.services and (not self.members or member_id in self.members)
        if not mine or not member_id:
            whose = f"the {service} {member_id}" if member_id else "nobody yet"
            raise PermissionDenied(
                f"{what} was given to {whose}, not to {self.name}",
                reason="NOT_YOURS",
                violations=[Violation(field, "names what was not given to this caller")],
            )


ANYBODY = Caller("anybody", open_cluster=True)
"""The caller of a server that asks for no proof."""

NOBODY = Caller("nobody")

_current: ContextVar[Caller] = ContextVar("phalanx_caller", default=ANYBODY)


def current_caller() -> Caller:
    """Return who makes the call that is being served."""
    return _current.get()


def set_caller(caller: Caller) -> None:
    """Say who makes the call that this task serves."""
    _current.set(caller)


def service_name(service: Service) -> str:
    """Return the name that the certificates of a service carry."""
    return f"{service}.{DOMAIN}"


def member_name(member_id: str, service: Service) -> str:
    """Return the name by which a certificate is that of one member only."""
    return f"{member_id}.{service_name(service)}"


def node_of(names: frozenset[str], common_name: str) -> Caller:
    """Return who a certificate is that of, by the DNS names in it; NOBODY: no node."""
    services, members = set(), set()
    for name in names:
        below = name.removesuffix(f".{DOMAIN}")
        member_id, _, service = below.rpartition(".")
        if below != name and service in _SERVICES:
            services.add(Service(service))
            if member_id:
                members.add(member_id)
    if not services:
        return NOBODY
    name = common_name or "+".join(sorted(services))
    return Caller(name, services=frozenset(services), members=frozenset(members))
