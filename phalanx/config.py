"""Configuration of the services: frozen dataclasses, read from flags and environment, checked at
start.

    @dataclass(frozen=True)
    class StorageConfig(ServiceConfig):
        \"\"\"Keeps journal, leases, checkpoints, data sets and models.\"\"\"

        service: ClassVar[str] = "storage"
        state: Path = option(Path("state"), "Folder that holds everything.")

    config = parse(StorageConfig, argv, os.environ, prog="phalanx storage")

A field ``lease_ttl_s`` of the service ``control`` is the flag ``--lease-ttl-s`` and the variable
``PHALANX_CONTROL_LEASE_TTL_S``; a field marked ``common`` also listens to ``PHALANX_LEASE_TTL_S``.
The flag wins over the variable, the longer variable over the shorter, any over the default. All
wrong values are reported at once, each by the name under which it was given, and the program exits
with 2.
"""

import argparse
import dataclasses
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from phalanx.addresses import is_loopback, split_address
from phalanx.errors import InvalidArgument, Violation
from phalanx.ids import check_name, new_id
from phalanx.telemetry.levels import FORMATS, LEVELS

EXIT_USAGE = 2

Check = Callable[[Any], str | None]
"""Returns what is wrong with a value, or None."""

ConfigT = TypeVar("ConfigT", bound="ServiceConfig")

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def option(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    common: bool = False,
    secret: bool = False,
) -> Any:
    """Declare a field of a configuration; ``check`` says what is wrong with a value, if anything.

    A value that may have a ``secret`` in it is in no message.

    A default of ``...`` makes the field required. Types: str, int, float, bool, Path, ``X | None``
    (empty text is None) and ``tuple[str, ...]`` (comma separated, or the flag repeated). Fields
    named ``*_bytes`` take ``10GiB`` and ``64M``.
    """
    metadata = {
        "help": help,
        "check": check,
        "common": common,
        "secret": secret,
        "required": default is ...,
    }
    return field(default=None if default is ... else default, metadata=metadata)


def at_least(minimum: float) -> Check:
    """Return a check for values of ``minimum`` or more."""
    return lambda value: None if value >= minimum else f"must be at least {minimum:g}"


def positive(value: float) -> str | None:
    """Check for values above 0."""
    return None if value > 0 else "must be more than 0"


def one_of(choices: Sequence[str]) -> Check:
    """Return a check for one of a few words."""
    return lambda value: None if value in choices else "must be one of " + ", ".join(choices)


def address(value: str) -> str | None:
    """Check for HOST:PORT."""
    try:
        split_address(value)
    except InvalidArgument as error:
        return error.message
    return None


def addresses(value: Sequence[str]) -> str | None:
    """Check for one or more HOST:PORT."""
    return next((wrong for part in value if (wrong := address(part))), None)


def url_of(*schemes: str) -> Check:
    """Return a check for nothing, or a URL of one of these schemes with something behind it."""

    def check(value: str) -> str | None:
        scheme, _, rest = value.partition("://")
        if not value or (scheme in schemes and rest):
            return None
        return f"must begin with {' or '.join(f'{each}://' for each in schemes)}"

    return check


def absolute_paths(value: Sequence[str]) -> str | None:
    """Check for absolute paths."""
    relative = next((path for path in value if not os.path.isabs(path)), None)
    return None if relative is None else f"must be an absolute path, not {relative!r}"


def name(value: str) -> str | None:
    """Check for an allowed name."""
    try:
        check_name(value, "the value")
    except InvalidArgument as error:
        return error.message
    return None


def _optional_address(value: str | None) -> str | None:
    return None if not value else address(value)


def _optional_name(value: str) -> str | None:
    return None if value == "" else name(value)


@dataclass(frozen=True)
class ServiceConfig:
    """What every service takes; a subclass sets ``service``."""

    service: ClassVar[str] = "service"

    id: str = option("", "Stable name of this process; made up when empty.", check=_optional_name)
    metrics_listen: str | None = option(
        "127.0.0.1:0",
        "Address of /metrics and /healthz; empty for none.",
        check=_optional_address,
    )
    announce: Path | None = option(
        None, "File to write as JSON once ready: role, id, pid, address, metrics_address."
    )
    log_level: str = option(
        "info", "Least important logs to write.", check=one_of(LEVELS), common=True
    )
    log_format: str = option(
        "json", "json for machines, text for people.", check=one_of(FORMATS), common=True
    )
    tls_certificate: Path | None = option(
        None,
        "Certificate of this process and those that lead to the authority, PEM. It is read again "
        "when it changes, as the other files of keys are.",
        common=True,
    )
    tls_key: Path | None = option(None, "Key of the certificate, PEM.", common=True)
    tls_ca: Path | None = option(
        None, "Certificates of the authorities whose nodes are trusted, PEM.", common=True
    )
    parent_pid: int = option(
        0, "Die at once when this parent process dies; 0 for no parent.", check=at_least(0)
    )

    def violations(self) -> Sequence[Violation]:
        """Return what is wrong between fields; each ``field`` is the field's plain name."""
        tls = {name: getattr(self, name) for name in ("tls_certificate", "tls_key", "tls_ca")}
        if all(value is None for value in tls.values()):
            return ()
        return [
            Violation(name, "is missing: certificate, key and authorities go together")
            for name, value in tls.items()
            if value is None
        ]

    @property
    def has_keys(self) -> bool:
        """Whether this process encrypts, and proves itself to others."""
        return self.tls_certificate is not None


@dataclass(frozen=True)
class ServerConfig(ServiceConfig):
    """What every service takes that others call: where, and how much of it they may take up."""

    listen: str = option(
        "127.0.0.1:0", "Address to serve gRPC on; port 0 takes a free one.", check=address
    )
    probe_listen: str = option(
        "",
        "Address where anybody may ask by gRPC whether this process is well, and nothing else: in "
        "plaintext with keys as well, as Kubernetes asks; empty for none.",
        check=_optional_address,
        common=True,
    )
    reflection: bool = option(
        True, "Tell clients such as grpcurl which calls there are (gRPC reflection).", common=True
    )
    connections_max: int = option(
        4096, "Connections open at once; more are closed at once.", check=at_least(16)
    )
    peer_connections_max: int = option(
        2048, "Connections of one host that may have calls open at once.", check=at_least(1)
    )
    calls_max: int = option(16_384, "Calls and streams open at once.", check=at_least(16))
    peer_calls_max: int = option(
        8192, "Calls and streams that one host may have open at once.", check=at_least(1)
    )
    connection_streams_max: int = option(
        128, "Calls and streams open at once on one connection; more wait.", check=at_least(1)
    )
    first_message_timeout_s: float = option(
        5.0, "Time after which a call that says nothing is ended.", check=positive
    )
    idle_connection_s: float = option(
        60.0, "Time after which a connection without a call is closed.", check=at_least(1)
    )
    insecure: bool = option(
        False,
        "Serve beyond this machine although there are no keys: whoever reaches it may do anything.",
        common=True,
    )

    def violations(self) -> Sequence[Violation]:
        """Whoever is reached from elsewhere needs keys."""
        found = list(super().violations())
        if self.has_keys or self.insecure:
            return found
        for name, told, listens in (
            ("listen", "may do anything", self.listen),
            ("metrics_listen", "learns what runs here", self.metrics_listen),
            ("probe_listen", "learns whether it is well", self.probe_listen),
        ):
            if not listens or is_loopback(listens):
                continue
            found.append(
                Violation(
                    name,
                    f"{listens!r} is reached from other machines, and without keys whoever "
                    f"reaches it {told}; {self._remedy()}, listen on 127.0.0.1, or say "
                    "--insecure on a network that nobody else is in",
                )
            )
        return found

    def _remedy(self) -> str:
        return "give --tls-certificate, --tls-key and --tls-ca (`phalanx certs init` makes them)"


@dataclass(frozen=True)
class TokensConfig(ServerConfig):
    """What a service takes in addition that people call, and not only nodes."""

    tokens: Path | None = option(
        None,
        "File with the hashes of the tokens of people; it is read again when it changes.",
        common=True,
    )
    public_listen: str = option(
        "",
        "Address where people need no certificate, only a token; empty: they need both.",
        check=_optional_address,
    )

    def violations(self) -> Sequence[Violation]:
        """Certificates and tokens go together: nobody could call with one of them alone."""
        found = list(super().violations())
        if self.has_keys and self.tokens is None:
            found.append(
                Violation(
                    "tokens",
                    "is missing: with certificates people need tokens (`phalanx token create` "
                    "makes the file)",
                )
            )
        elif self.tokens is not None and not self.has_keys:
            found.append(
                Violation(
                    "tokens",
                    "needs --tls-certificate, --tls-key and --tls-ca: a token that is sent in the "
                    "clear is anybody's (`phalanx certs init` makes them)",
                )
            )
        if self.public_listen and not self.has_keys:
            found.append(
                Violation("public_listen", "is for clusters with keys; without, use --listen")
            )
        return found

    def _remedy(self) -> str:
        return (
            "give --tls-certificate, --tls-key and --tls-ca (`phalanx certs init` makes them) and "
            "--tokens (`phalanx token create`)"
        )


def parse(
    config_class: type[ConfigT],
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    prog: str,
    description: str | None = None,
) -> ConfigT:
    """Return the configuration; print what is wrong and exit with 2, or print the help and exit
    with 0.

    ``argv`` and ``environ`` are those of this process by default.
    """
    parser = _parser(config_class, prog, description or config_class.__doc__)
    flags = {
        name: ",".join(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(argv)).items()
    }
    try:
        return build(config_class, flags, os.environ if environ is None else environ)
    except InvalidArgument as error:
        lines = [
            f"{prog}: {violation.field}: {violation.message}" for violation in error.violations
        ]
        print("\n".join([*lines, f"{prog}: see {prog} --help"]), file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None


def build(
    config_class: type[ConfigT], flags: Mapping[str, str | None], environ: Mapping[str, str]
) -> ConfigT:
    """Return the configuration from flag texts by field name and the environment.

    Raises InvalidArgument with one violation for each wrong value, named as the user gave it.
    """
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    violations: list[Violation] = []
    for item in dataclasses.fields(config_class):
        origin, text = _text_of(config_class, item, flags, environ)
        given_as[item.name] = origin
        if text is None:
            if item.metadata["required"]:
                violations.append(Violation(origin, "is required"))
            continue
        shown = "the value" if item.metadata["secret"] else repr(text)
        try:
            value = _convert(text, hints[item.name], item.name)
        except ValueError as error:
            violations.append(Violation(origin, f"{shown} {error}"))
            continue
        check: Check | None = item.metadata["check"]
        wrong = check(value) if check is not None else None
        if wrong is not None:
            violations.append(Violation(origin, f"{shown} {wrong}" if text not in wrong else wrong))
        values[item.name] = value
    if not violations:
        if not values.get("id"):
            values["id"] = new_id(config_class.service)
        config = config_class(**values)
        violations = [
            Violation(given_as[wrong.field], wrong.message) for wrong in config.violations()
        ]
    if violations:
        raise InvalidArgument(
            f"{len(violations)} wrong settings of {config_class.service}",
            reason="BAD_CONFIGURATION",
            violations=violations,
        )
    return config


def _flag(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def _variables(config_class: type[ServiceConfig], item: dataclasses.Field[Any]) -> list[str]:
    names = [f"PHALANX_{config_class.service}_{item.name}"]
    if item.metadata["common"]:
        names.append(f"PHALANX_{item.name}")
    return [name.upper() for name in names]


def _parser(
    config_class: type[ServiceConfig], prog: str, description: str | None
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="Every flag can also be given by the environment variable named with it.",
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        # Several values: separated by commas, or the flag again and again.
        action = "append" if typing.get_origin(hints[item.name]) is tuple else "store"
        shown = "required" if item.metadata["required"] else f"default: {_shown(item.default)}"
        variable = _variables(config_class, item)[-1]
        help = f"{item.metadata['help']} ({shown}; {variable})".replace("%", "%%")
        # A switch may stand alone: `--insecure` is `--insecure true`.
        alone: dict[str, Any] = {"nargs": "?", "const": "true"} if hints[item.name] is bool else {}
        parser.add_argument(
            _flag(item.name), dest=item.name, metavar="VALUE", help=help, action=action, **alone
        )
    return parser


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(default) or "none"
    return "none" if default is None or default == "" else str(default)


def _text_of(
    config_class: type[ServiceConfig],
    item: dataclasses.Field[Any],
    flags: Mapping[str, str | None],
    environ: Mapping[str, str],
) -> tuple[str, str | None]:
    """Return under which name the value was given, and its text (None: not given)."""
    text = flags.get(item.name)
    if text is not None:
        return _flag(item.name), text
    for variable in _variables(config_class, item):
        if variable in environ:
            return variable, environ[variable]
    return _flag(item.name), None


def _convert(text: str, kind: Any, field_name: str) -> Any:
    """Return ``text`` as a value of type ``kind``; ValueError says what it is not."""
    if isinstance(kind, types.UnionType):
        if text == "":
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        return _bool(text)
    if kind is int:
        if field_name.endswith("_bytes"):
            return read_bytes(text)
        return _number(text, int, "whole number")
    if kind is float:
        return _number(text, float, "number")
    return kind(text)


def _number(text: str, kind: type[int] | type[float], what: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"is not a {what}") from None
    if not math.isfinite(value):
        raise ValueError(f"is not a {what}")
    return value


def _bool(text: str) -> bool:
    word = text.lower()
    if word not in ("true", "false", "1", "0"):
        raise ValueError("is neither true nor false")
    return word in ("true", "1")


def read_bytes(text: str) -> int:
    """Return a size that is written as 10GiB or 64M. Raises ValueError."""
    unit = text.strip().upper().removesuffix("B").lstrip("0123456789. ")
    number = text.strip()[: len(text.strip().upper().removesuffix("B")) - len(unit)]
    factor = {**_UNITS, **_BINARY_UNITS}.get(unit)
    if factor is None:
        raise ValueError("is not a size; write bytes, 64M or 10GiB")
    try:
        return int(float(number) * factor) if "." in number else int(number) * factor
    except (ValueError, OverflowError):
        raise ValueError("is not a size; write bytes, 64M or 10GiB") from None
