"""Files that are replaced while they are in use."""

import os

import pytest

from phalanx.errors import FailedPrecondition
from phalanx.keys.files import Watched, check_pair, check_trusted
from phalanx.testing.keys import KeyRing


def _joined(contents):
    text = b"".join(contents)
    if b"bad" in text:
        raise FailedPrecondition("bad")
    return text


def test_a_change_of_either_file_is_a_new_version(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    watched = Watched([one, two], _joined)
    assert watched.read() == (1, b"12")
    assert watched.read() == (1, b"12")
    two.write_bytes(b"22")
    assert watched.read() == (2, b"122")
    # Kubernetes swaps a link to a folder.
    os.replace(one, tmp_path / "old")
    one.symlink_to(tmp_path / "old")
    two.write_bytes(b"bad")
    assert watched.read() == (2, b"122")
    two.unlink()
    assert watched.read() == (2, b"122")
    two.write_bytes(b"333")
    assert watched.read() == (3, b"1333")


def test_at_first_all_must_be_there(tmp_path):
    watched = Watched([tmp_path / "one"], _joined)
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="No such file"):
            watched.read()
    (tmp_path / "one").write_bytes(b"bad")
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="bad"):
            watched.read()
    (tmp_path / "one").write_bytes(b"good")
    assert watched.read() == (1, b"good")


def test_what_changes_while_it_is_read_is_read_again(tmp_path):
    path = tmp_path / "one"
    path.write_bytes(b"1")
    seen = []

    def parse(contents):
        seen.append(contents[0])
        if len(seen) == 1:
            path.write_bytes(b"22")
        return contents[0]

    assert Watched([path], parse).read() == (1, b"22")
    assert seen == [b"1", b"22"]


def test_a_key_must_be_that_of_its_certificate(tmp_path):
    ring = KeyRing(tmp_path / "keys")
    check_pair(ring.path / "worker.pem", ring.path / "worker.key")
    check_trusted(ring.ca)
    with pytest.raises(FailedPrecondition, match="no certificate and its key") as refused:
        check_pair(ring.path / "worker.pem", ring.path / "storage.key")
    assert "PRIVATE" not in str(refused.value)
    with pytest.raises(FailedPrecondition, match="holds no certificates"):
        check_trusted(ring.path / "worker.key")
    with pytest.raises(FailedPrecondition):
        check_trusted(ring.path / "missing")
