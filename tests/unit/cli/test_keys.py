"""`phalanx certs` and `phalanx token`."""

import json

import pytest

from phalanx.keys.tokens import TokenFile


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_an_authority_is_made_once(offline, tmp_path):
    made = offline("--json", "certs", "init", "--host", "train.example")
    assert made.code == 0
    names = {each["name"]: each["names"] for each in made.json()["certificates"]}
    assert set(names) == {"ca", "client", "control", "aggregator", "storage", "worker"}
    assert "train.example" in names["control"]
    assert (tmp_path / "keys" / "ca.key").stat().st_mode & 0o077 == 0
    again = offline("certs", "init")
    assert again.code == 6
    assert "certs renew" in again.err


def test_certificates_are_issued_and_renewed(offline, tmp_path):
    offline("certs", "init", "--days", "10")
    issued = offline("certs", "issue", "w-7", "--service", "worker", "--member")
    assert issued.code == 0
    assert "w-7.worker.phalanx.internal" in issued.out
    before = (tmp_path / "keys" / "w-7.pem").read_bytes()
    assert offline("certs", "renew", "w-7", "--days", "20").code == 0
    assert (tmp_path / "keys" / "w-7.pem").read_bytes() != before
    listed = offline("certs", "list")
    assert "w-7.pem" in listed.out
    assert offline("certs", "issue", "x", "--service", "gpu").code == 2
    assert offline("certs", "issue", "x", "--member").code == 2
    assert offline("certs", "renew", "nobody").code == 3
    assert offline("certs", "renew", "--dir", "elsewhere").code == 6


def test_a_token_is_printed_once(offline, tmp_path):
    made = offline(
        *("token", "create", "ann", "--role", "submitter", "--for-namespace", "vision"),
        *("--permission", "code", "--expires", "30d"),
    )
    assert made.code == 0
    token = made.out.strip()
    caller = TokenFile(tmp_path / "tokens.json").caller(token)
    assert caller.namespaces == {"vision"}
    listed = offline("--json", "token", "list")
    assert token not in listed.out + made.err
    (entry,) = listed.json()["tokens"]
    assert entry["name"] == "ann"
    assert "sha256" not in entry
    assert "ann" in offline("token", "list").out
    assert offline("token", "revoke", "ann").code == 0
    assert json.loads((tmp_path / "tokens.json").read_text()) == {"tokens": []}
    assert offline("token", "revoke", "ann").code == 3


def test_people_begin_in_the_default_namespace_and_administrators_in_all(offline):
    offline("token", "create", "ann", "--role", "submitter")
    offline("token", "create", "eve", "--role", "admin")
    found = {each["name"]: each for each in offline("--json", "token", "list").json()["tokens"]}
    assert found["ann"]["namespaces"] == ["default"]
    assert found["eve"]["namespaces"] == ["*"]
    assert found["ann"]["permissions"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--role", "node"),
        ("--role", "root"),
        ("--role", "viewer", "--permission", "fly"),
        ("--role", "viewer", "--expires", "soon"),
        ("--role", "viewer", "--expires", "0d"),
        ("--role", "viewer", "--for-namespace", "A B"),
    ],
)
def test_a_wrong_token_is_not_made(offline, tmp_path, arguments):
    refused = offline("token", "create", "ann", *arguments)
    assert refused.code == 2
    assert not refused.out
    assert not (tmp_path / "tokens.json").exists()
