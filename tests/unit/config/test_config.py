"""Where a setting comes from, and how wrong ones are named."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from phalanx.config import (
    ServerConfig,
    ServiceConfig,
    absolute_paths,
    addresses,
    at_least,
    build,
    one_of,
    option,
    parse,
    positive,
)
from phalanx.errors import InvalidArgument, Violation


@dataclass(frozen=True)
class ExampleConfig(ServerConfig):
    """An example."""

    service: ClassVar[str] = "example"

    lease_ttl_s: float = option(2.0, "Lease.", check=positive)
    heartbeat_interval_s: float = option(0.5, "Interval.", check=positive)
    slots: int = option(1, "Slots.", check=at_least(1))
    cache_bytes: int = option(10 * 2**30, "Cache.", check=at_least(0))
    control: tuple[str, ...] = option((), "Where control is.", check=addresses, common=True)
    color: str = option("red", "Colour.", check=one_of(("red", "blue")))
    state: Path = option(Path("state"), "Folder.")
    fast: bool = option(False, "Fast.")

    def violations(self) -> Sequence[Violation]:
        if self.lease_ttl_s < 2 * self.heartbeat_interval_s:
            return [Violation("lease_ttl_s", "must be twice the heartbeat interval or more")]
        return ()


@dataclass(frozen=True)
class RequiredConfig(ServiceConfig):
    """One that needs something."""

    service: ClassVar[str] = "needy"

    storage: str = option(..., "Where storage is.")


def _build(environ: dict[str, str] | None = None, **flags: str) -> ExampleConfig:
    return build(ExampleConfig, flags, environ or {})


def _violations(environ: dict[str, str] | None = None, **flags: str) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        _build(environ, **flags)
    return {violation.field: violation.message for violation in caught.value.violations}


def test_defaults_are_loopback_and_a_made_up_id() -> None:
    config = _build()
    assert (config.listen, config.metrics_listen) == ("127.0.0.1:0", "127.0.0.1:0")
    assert (config.lease_ttl_s, config.slots, config.control) == (2.0, 1, ())
    assert config.id.startswith("example-")
    assert config.id != _build().id


def test_flag_wins_over_own_variable_over_common_variable_over_default() -> None:
    environ = {"PHALANX_LOG_LEVEL": "error"}
    assert _build(environ).log_level == "error"
    environ["PHALANX_EXAMPLE_LOG_LEVEL"] = "debug"
    assert _build(environ).log_level == "debug"
    assert _build(environ, log_level="warning").log_level == "warning"


def test_only_common_fields_listen_to_the_short_variable() -> None:
    assert _build({"PHALANX_SLOTS": "7"}).slots == 1
    assert _build({"PHALANX_EXAMPLE_SLOTS": "7"}).slots == 7


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("cache_bytes", "123", 123),
        ("cache_bytes", "64M", 64_000_000),
        ("cache_bytes", "10GiB", 10 * 2**30),
        ("cache_bytes", "1.5 KiB", 1536),
        ("cache_bytes", "2kb", 2000),
        ("control", "a:1, b:2", ("a:1", "b:2")),
        ("state", "/tmp/x y", Path("/tmp/x y")),
        ("fast", "TRUE", True),
        ("metrics_listen", "", None),
        ("announce", "", None),
        ("lease_ttl_s", "1e1", 10.0),
    ],
)
def test_texts_become_values(field: str, text: str, value: Any) -> None:
    assert getattr(_build(**{field: text}), field) == value


def test_several_values_come_by_commas_or_by_repeating_the_flag() -> None:
    def parsed(*argv: str) -> tuple[str, ...]:
        required = ("--state", "/tmp/state")
        return parse(ExampleConfig, [*required, *argv], {}, prog="example").control

    assert parsed("--control", "a:1,b:2") == ("a:1", "b:2")
    assert parsed("--control", "a:1", "--control", "b:2,c:3") == ("a:1", "b:2", "c:3")
    assert parsed() == ()


@pytest.mark.parametrize("wrong", ["data", "/data,more", "./data"])
def test_paths_that_must_be_absolute(wrong: str) -> None:
    assert absolute_paths(("/data", "/more")) is None
    assert "must be an absolute path" in str(absolute_paths(tuple(wrong.split(","))))


@pytest.mark.parametrize(
    ("field", "text", "part"),
    [
        ("lease_ttl_s", "soon", "is not a number"),
        ("lease_ttl_s", "nan", "is not a number"),
        ("lease_ttl_s", "inf", "is not a number"),
        ("lease_ttl_s", "-1", "must be more than 0"),
        ("slots", "1.5", "is not a whole number"),
        ("slots", "0", "must be at least 1"),
        ("cache_bytes", "10 parsecs", "is not a size"),
        ("cache_bytes", "GiB", "is not a size"),
        ("control", "a:1,b", "'b' is not an address"),
        ("color", "green", "must be one of red, blue"),
        ("fast", "perhaps", "is neither true nor false"),
        ("listen", "7410", "is not an address"),
        ("id", "../etc", "is not a name"),
        ("log_level", "loud", "must be one of debug"),
    ],
)
def test_wrong_text_is_refused_with_its_flag(field: str, text: str, part: str) -> None:
    violations = _violations(**{field: text})
    assert list(violations) == ["--" + field.replace("_", "-")]
    assert part in next(iter(violations.values()))


def test_all_wrong_settings_are_named_at_once_as_they_were_given() -> None:
    violations = _violations({"PHALANX_EXAMPLE_SLOTS": "none"}, color="green", log_format="xml")
    assert list(violations) == ["--log-format", "PHALANX_EXAMPLE_SLOTS", "--color"]


def test_relations_between_fields_are_checked_and_named_as_given() -> None:
    violations = _violations({"PHALANX_EXAMPLE_LEASE_TTL_S": "0.6"})
    assert violations == {
        "PHALANX_EXAMPLE_LEASE_TTL_S": "must be twice the heartbeat interval or more"
    }


def test_required_setting_must_be_given() -> None:
    with pytest.raises(InvalidArgument) as caught:
        build(RequiredConfig, {}, {})
    assert caught.value.violations == (Violation("--storage", "is required"),)
    assert build(RequiredConfig, {}, {"PHALANX_NEEDY_STORAGE": "x"}).storage == "x"


def test_parse_exits_with_2_and_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(ExampleConfig, ["--slots", "0", "--color", "green"], {}, prog="phalanx example")
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "phalanx example: --slots: '0' must be at least 1"
    assert lines[1].startswith("phalanx example: --color: 'green' must be one of")


@pytest.mark.parametrize("argv", [["--no-such-flag", "1"], ["--slot", "1"], ["stray"]])
def test_unknown_flags_and_their_beginnings_are_refused(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(ExampleConfig, argv, {}, prog="phalanx example")
    assert caught.value.code == 2


def test_help_names_every_field_with_default_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(ExampleConfig, ["--help"], {}, prog="phalanx example")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "An example." in text
    for part in ("--lease-ttl-s", "default: 2.0", "PHALANX_EXAMPLE_LEASE_TTL_S", "PHALANX_CONTROL"):
        assert part in text
