"""What `phalanx certs` makes."""

import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from phalanx.errors import AlreadyExists, FailedPrecondition, NotFound
from phalanx.keys import folder
from phalanx.keys.caller import Service


def test_init_makes_a_certificate_for_each_kind_of_process_and_one_for_people(tmp_path):
    folder.init(tmp_path / "keys", hosts=["train.example", "10.0.0.1"], days=30)
    found = {each.name: each for each in folder.listing(tmp_path / "keys")}
    assert set(found) == {"ca", "client", *Service}
    for service in Service:
        assert f"{service}.phalanx.internal" in found[service].names
        assert ("train.example" in found[service].names) == (service in ("control", "storage"))
    assert "10.0.0.1" in found["control"].names
    assert found["client"].names == ()
    left = found["worker"].not_after - datetime.now(UTC)
    assert timedelta(days=29) < left <= timedelta(days=30)
    for key in (tmp_path / "keys").glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(AlreadyExists):
        folder.init(tmp_path / "keys")


def test_renewing_keeps_names_and_changes_keys(tmp_path):
    folder.init(tmp_path, hosts=["train.example"], days=5)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    names = {each.name: each.names for each in folder.listing(tmp_path)}
    assert folder.renew(tmp_path, ["control"]) == ["control"]
    assert (tmp_path / "worker.pem").read_bytes() == before["worker.pem"]
    folder.renew(tmp_path)
    assert (tmp_path / "ca.pem").read_bytes() == before["ca.pem"]
    assert {each.name: each.names for each in folder.listing(tmp_path)} == names
    for name in (*Service, "client"):
        assert (tmp_path / f"{name}.key").read_bytes() != before[f"{name}.key"]
    with pytest.raises(NotFound):
        folder.renew(tmp_path, ["gpu"])
    with pytest.raises(FailedPrecondition):
        folder.renew(tmp_path, ["ca"])


def test_more_certificates_are_issued(tmp_path):
    folder.init(tmp_path)
    folder.issue(tmp_path, "w-7", [Service.WORKER], member=True)
    folder.issue(tmp_path, "ann", [])
    found = {each.name: each.names for each in folder.listing(tmp_path)}
    assert found["w-7"] == ("worker.phalanx.internal", "w-7.worker.phalanx.internal")
    assert found["ann"] == ()
    with pytest.raises(AlreadyExists):
        folder.issue(tmp_path, "w-7", [Service.WORKER])
    certificate = x509.load_pem_x509_certificate((tmp_path / "w-7.pem").read_bytes())
    authority = x509.load_pem_x509_certificate((tmp_path / "ca.pem").read_bytes())
    certificate.verify_directly_issued_by(authority)
    with pytest.raises(FailedPrecondition, match="certs init"):
        folder.issue(tmp_path / "elsewhere", "w-8", [Service.WORKER])
