"""A certificate authority for one cluster: for those who have none of their own.

Certificates of nodes carry the name of their service (`worker.phalanx.internal`), which is what
other nodes check; where a node really runs does not matter. Those of control and storage, which
people dial, carry host names and addresses as well.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from phalanx.errors import FailedPrecondition
from phalanx.files import replace_content
from phalanx.keys.caller import Service, member_name, service_name

CA_DAYS = 3650
DAYS = 365
_BACKDATED = timedelta(minutes=5)
"""Machines whose clocks are a little behind must not refuse a new certificate."""
_SECRET_MODE = 0o600
_PUBLIC_MODE = 0o644


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, both PEM."""

    certificate: bytes
    key: bytes

    def write(self, folder: Path, name: str) -> None:
        """Write `NAME.pem` and `NAME.key`; the key is for its owner only."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_content(folder / f"{name}.key", self.key, mode=_SECRET_MODE)
        replace_content(folder / f"{name}.pem", self.certificate, mode=_PUBLIC_MODE)


class Authority:
    """Signs certificates."""

    def __init__(self, pair: Pair, now: Callable[[], datetime] | None = None) -> None:
        self.pair = pair
        self._now = now or (lambda: datetime.now(UTC))
        self._certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = serialization.load_pem_private_key(pair.key, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise FailedPrecondition("the key of this authority is none that `phalanx certs` made")
        self._key = key

    @classmethod
    def new(
        cls,
        name: str = "Phalanx cluster",
        *,
        days: float = CA_DAYS,
        now: Callable[[], datetime] | None = None,
    ) -> Authority:
        """Make an authority of its own name."""
        key = ec.generate_private_key(ec.SECP256R1())
        # While one authority takes over from another both are trusted, and must not be mixed up.
        subject = _subject(f"{name} {secrets.token_hex(4)}")
        start = now() if now else datetime.now(UTC)
        builder = _builder(subject, subject, key.public_key(), start, days)
        builder = builder.add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        builder = builder.add_extension(_usage(signs=True), critical=True)
        named = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(named, critical=False)
        certificate = builder.sign(key, hashes.SHA256())
        return cls(_pair(certificate, key), now)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Read what `write` wrote. Raises FailedPrecondition."""
        try:
            return cls(
                Pair((folder / "ca.pem").read_bytes(), (folder / "ca.key").read_bytes()),
            )
        except OSError as error:
            raise FailedPrecondition(
                f"there is no authority in {folder} ({error.strerror}); make one with "
                "`phalanx certs init`"
            ) from None
        except ValueError:
            raise FailedPrecondition(f"the authority in {folder} cannot be read") from None

    def write(self, folder: Path) -> None:
        """Write `ca.pem`, which everybody needs, and `ca.key`, which nobody but this needs."""
        self.pair.write(folder, "ca")

    def issue(
        self,
        common_name: str,
        names: Sequence[str] = (),
        *,
        days: float = DAYS,
    ) -> Pair:
        """Return a certificate with DNS names and IP addresses, and its new key."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self._certificate.subject
        builder = _builder(_subject(common_name), issuer, key.public_key(), self._now(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        builder = builder.add_extension(_usage(signs=False), critical=True)
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(signer, critical=False)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if names:
            alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
            builder = builder.add_extension(alternatives, critical=False)
        return _pair(builder.sign(self._key, hashes.SHA256()), key)

    def issue_node(
        self,
        services: Sequence[Service],
        *,
        member_id: str = "",
        hosts: Sequence[str] = (),
        days: float = DAYS,
    ) -> Pair:
        """Return the certificate of a node; with a member id it may go by that id only."""
        names = [service_name(service) for service in services]
        if member_id:
            names += [member_name(member_id, service) for service in services]
        common_name = member_id or "+".join(services)
        return self.issue(common_name, [*names, *hosts], days=days)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: datetime,
    days: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return x509.DNSName(name)


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
