"""Services that are reached from elsewhere need keys."""

from pathlib import Path
from typing import Any

import pytest

from coordinator.aggregation.config import AggregatorConfig
from coordinator.control.config import ControlConfig
from phalanx.config import ServerConfig, build, parse
from phalanx.errors import InvalidArgument
from storage.config import StorageConfig
from worker.config import WorkerConfig

SERVICES = (ControlConfig, StorageConfig, AggregatorConfig, WorkerConfig)
TLS = {"tls_certificate": "c.pem", "tls_key": "c.key", "tls_ca": "ca.pem"}
ELSEWHERE = ("0.0.0.0:7410", "[::]:7410", "10.0.0.1:7410", "train.example:7410", "127.a.example:1")


def _build(service: type[ServerConfig], **flags: str) -> Any:
    if service is StorageConfig:
        flags = {"state": "state", **flags}
    return build(service, flags, {})


def _wrong(service: type[ServerConfig], **flags: str) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as refused:
        _build(service, **flags)
    return {each.field: each.message for each in refused.value.violations}


def _keys(service: type[ServerConfig]) -> dict[str, str]:
    return {**TLS, "tokens": "t.json"} if service in (ControlConfig, StorageConfig) else TLS


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("listen", ELSEWHERE)
@pytest.mark.parametrize("setting", ["metrics_listen", "probe_listen"])
def test_what_is_told_without_keys_is_told_to_this_machine_only_unless_there_are_keys(
    setting, service, listen
):
    flags = {setting: listen}
    assert set(_wrong(service, **flags)) == {"--" + setting.replace("_", "-")}
    assert _build(service, **flags, insecure="true").insecure
    assert _build(service, **flags, **_keys(service)).has_keys


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("listen", ELSEWHERE)
def test_beyond_this_machine_is_refused_without_keys(service, listen):
    wrong = _wrong(service, listen=listen)
    assert set(wrong) == {"--listen"}
    for part in (listen, "from other machines", "certs init", "--tls-ca", "--insecure"):
        assert part in wrong["--listen"]
    assert ("token create" in wrong["--listen"]) == (service in (ControlConfig, StorageConfig))
    assert _build(service, listen=listen, insecure="true").insecure
    assert _build(service, listen=listen, **_keys(service)).has_keys


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize(
    "listen", ["127.0.0.1:0", "127.8.9.1:7410", "localhost:7410", "[::1]:7410"]
)
def test_on_this_machine_nobody_needs_keys(service, listen):
    assert not _build(service, listen=listen).has_keys


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("missing", TLS)
def test_certificate_key_and_authorities_go_together(service, missing):
    flags = {name: value for name, value in _keys(service).items() if name != missing}
    flag = "--" + missing.replace("_", "-")
    assert "go together" in _wrong(service, **flags)[flag]


@pytest.mark.parametrize("service", [ControlConfig, StorageConfig])
def test_tokens_and_certificates_go_together(service):
    assert "token create" in _wrong(service, **TLS)["--tokens"]
    assert "in the clear" in _wrong(service, tokens="t.json")["--tokens"]
    assert "clusters with keys" in _wrong(service, public_listen="127.0.0.1:1")["--public-listen"]
    with_public = _build(service, public_listen="0.0.0.0:7410", **_keys(service))
    assert with_public.public_listen == "0.0.0.0:7410"


def test_code_takes_tokens_or_a_cluster_of_ones_own():
    assert _build(ControlConfig).code_allowed()
    assert _build(ControlConfig, listen="0.0.0.0:1", **_keys(ControlConfig)).code_allowed()
    assert not _build(ControlConfig, listen="0.0.0.0:1", insecure="true").code_allowed()


def test_a_process_that_is_refused_says_why_and_gives_2(capsys, monkeypatch):
    monkeypatch.delenv("PHALANX_INSECURE", raising=False)
    with pytest.raises(SystemExit) as ended:
        parse(ControlConfig, ["--listen", "0.0.0.0:7410"], {}, prog="phalanx coordinator")
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("phalanx coordinator: --listen: '0.0.0.0:7410' is reached from other")
    assert "Traceback" not in told
    flags = ["--listen", "0.0.0.0:7410", "--insecure"]
    assert parse(ControlConfig, flags, {}, prog="phalanx coordinator").insecure
    environ = {"PHALANX_INSECURE": "true", "PHALANX_CONTROL_LISTEN": "0.0.0.0:7410"}
    assert parse(ControlConfig, [], environ, prog="phalanx coordinator").insecure


def test_keys_come_from_one_place_for_all_services(tmp_path):
    environ = {
        "PHALANX_TLS_CERTIFICATE": "/keys/tls.crt",
        "PHALANX_TLS_KEY": "/keys/tls.key",
        "PHALANX_TLS_CA": "/keys/ca.crt",
        "PHALANX_TOKENS": "/keys/tokens.json",
    }
    for service in SERVICES:
        flags = {"state": str(tmp_path)} if service is StorageConfig else {}
        config = build(service, flags, environ)
        assert config.tls_certificate == Path("/keys/tls.crt")
        assert getattr(config, "tokens", Path("/keys/tokens.json")) == Path("/keys/tokens.json")


def test_a_password_in_a_url_of_the_wrong_kind_is_not_repeated():
    for name in ("metadata", "blobs"):
        wrong = _wrong(StorageConfig, **{name: "mysql://ann:s3cret@db/phalanx"})
        assert "must begin with" in wrong[f"--{name}"]
        assert "s3cret" not in wrong[f"--{name}"]
