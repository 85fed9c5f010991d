"""The folder that `phalanx certs init` makes: an authority, and a certificate for each kind of
process and for people.

It is worked on where the authority is kept; each machine gets `ca.pem` and the pair of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from phalanx.errors import AlreadyExists, FailedPrecondition, NotFound
from phalanx.ids import check_name
from phalanx.keys.authority import DAYS, Authority
from phalanx.keys.caller import Service

AUTHORITY = "ca"
PEOPLE = "client"
"""A certificate that names nobody: it opens the connection, and a token says who calls."""
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
_DIALLED_BY_PEOPLE = (Service.CONTROL, Service.STORAGE)


@dataclass(frozen=True)
class Issued:
    """A certificate in the folder."""

    name: str
    names: tuple[str, ...]
    not_after: datetime


def init(folder: Path, *, hosts: Sequence[str] = (), days: float = DAYS) -> None:
    """Make an authority and one certificate per kind of process.

    ``hosts`` are names and addresses under which people reach control and storage; this machine is
    always among them. Raises AlreadyExists where there is an authority.
    """
    if (folder / f"{AUTHORITY}.key").exists():
        raise AlreadyExists(
            f"there is an authority in {folder} already, and nodes trust it; `phalanx certs renew` "
            "makes its certificates anew"
        )
    authority = Authority.new()
    authority.write(folder)
    for service in Service:
        dialled = (*THIS_MACHINE, *hosts) if service in _DIALLED_BY_PEOPLE else ()
        pair = authority.issue_node([service], hosts=list(dict.fromkeys(dialled)), days=days)
        pair.write(folder, service.value)
    authority.issue(PEOPLE, days=days).write(folder, PEOPLE)


def issue(
    folder: Path,
    name: str,
    services: Sequence[Service],
    *,
    hosts: Sequence[str] = (),
    member: bool = False,
    days: float = DAYS,
) -> None:
    """Make one more certificate, `NAME.pem`; a ``member`` may go by that name only.

    Without services it is one for people. Raises AlreadyExists.
    """
    check_name(name, "the name")
    if (folder / f"{name}.pem").exists():
        raise AlreadyExists(
            f"{folder / name}.pem is there already; `phalanx certs renew` renews it"
        )
    authority = Authority.load(folder)
    if services:
        member_id = name if member else ""
        pair = authority.issue_node(services, member_id=member_id, hosts=hosts, days=days)
    else:
        pair = authority.issue(name, hosts, days=days)
    pair.write(folder, name)


def renew(folder: Path, names: Sequence[str] = (), *, days: float = DAYS) -> list[str]:
    """Make certificates anew for the same names, with new keys; by default all. Return which."""
    authority = Authority.load(folder)
    there = {issued.name: issued for issued in listing(folder)}
    for name in names:
        if name not in there:
            raise NotFound(f"there is no certificate {name}.pem in {folder}")
    renewed = list(names) or [name for name in there if name != AUTHORITY]
    for name in renewed:
        if name == AUTHORITY:
            raise FailedPrecondition("an authority is not renewed; make another one and trust both")
        certificate = _load(folder / f"{name}.pem")
        common_name = _common_name(certificate) or name
        authority.issue(common_name, there[name].names, days=days).write(folder, name)
    return renewed


def listing(folder: Path) -> list[Issued]:
    """Return the certificates of a folder, by name."""
    return [
        Issued(path.stem, _names(certificate), certificate.not_valid_after_utc)
        for path in sorted(folder.glob("*.pem"))
        for certificate in [_load(path)]
    ]


def _load(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise FailedPrecondition(f"{path} holds no certificate in PEM") from None


def _common_name(certificate: x509.Certificate) -> str:
    found = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in extension.value)
