"""The file of tokens."""

import errno
import fcntl
import json
import stat
import threading

import pytest

from phalanx.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PhalanxError,
    Unauthenticated,
)
from phalanx.keys import tokens
from phalanx.keys.caller import CODE, Role
from phalanx.keys.tokens import TokenFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens.json"


def test_a_token_is_made_once_and_the_file_has_its_hash_only(path):
    token = tokens.create(
        path, "ann", Role.SUBMITTER, namespaces=["vision"], permissions=[CODE], expires_s=2e9
    )
    assert token.startswith("phx_")
    assert len(token) > 40
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    caller = TokenFile(path, lambda: 1e9).caller(token)
    assert caller.name == "ann"
    assert caller.role is Role.SUBMITTER
    assert caller.namespaces == {"vision"}
    assert caller.permissions == {CODE}
    assert tokens.create(path, "bob", Role.VIEWER) != token


def test_unknown_expired_and_revoked_tokens_are_refused_without_repeating_them(path):
    now = [100.0]
    token = tokens.create(path, "ann", Role.VIEWER, expires_s=200.0)
    file = TokenFile(path, lambda: now[0])
    assert file.caller(token).namespaces is None
    for wrong in (token + "x", "", "phx_", token.upper()):
        with pytest.raises(Unauthenticated) as refused:
            file.caller(wrong)
        assert not wrong or wrong not in str(refused.value)
    now[0] = 200.0
    with pytest.raises(Unauthenticated, match="expired at 1970-01-01T00:03:20Z"):
        file.caller(token)
    now[0] = 0.0
    assert file.caller(token)
    tokens.revoke(path, "ann")
    with pytest.raises(Unauthenticated, match="not known"):
        file.caller(token)


def test_a_broken_file_leaves_the_last_good_one_in_force(path):
    token = tokens.create(path, "ann", Role.VIEWER)
    file = TokenFile(path)
    good = path.read_bytes()
    file.caller(token)
    path.write_text("{")
    assert file.caller(token)
    path.unlink()
    assert file.caller(token)
    path.write_bytes(good)
    assert file.caller(token)


@pytest.mark.parametrize(
    "change",
    [
        {"role": "root"},
        {"role": "node"},
        {"sha256": "phx_secret"},
        {"namespaces": ["NOT OK"]},
        {"namespaces": "vision"},
        {"permissions": ["fly"]},
        {"expires": "soon"},
        {"expires": "2027-01-01T00:00:00"},
        {"token": "phx_secret"},
        {"name": ""},
    ],
)
def test_a_wrong_entry_is_told_by_its_place_and_not_quoted(path, change):
    good = {"name": "ann", "role": "viewer", "sha256": "0" * 64, "namespaces": ["*"]}
    path.write_text(json.dumps({"tokens": [good]}))
    TokenFile(path).check()
    path.write_text(json.dumps({"tokens": [good, {**good, **change}]}))
    with pytest.raises(FailedPrecondition, match=r"tokens\[1\]") as refused:
        TokenFile(path).check()
    assert "phx_secret" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", '{"tokens": {}}', '{"token": []}', "\xff", '{"tokens"'])
def test_a_file_of_another_form_is_refused(path, text):
    path.write_text(text, encoding="latin-1")
    with pytest.raises(FailedPrecondition):
        TokenFile(path).check()


def test_names_are_taken_once_and_only_known_ones_revoked(path):
    tokens.create(path, "ann", Role.VIEWER)
    with pytest.raises(AlreadyExists):
        tokens.create(path, "ann", Role.ADMIN)
    with pytest.raises(NotFound):
        tokens.revoke(path, "bob")
    with pytest.raises(PhalanxError):
        tokens.create(path, "bob", Role.VIEWER, permissions=["fly"])
    with pytest.raises(InvalidArgument):
        tokens.create(path, "Bob Brown", Role.VIEWER)
    assert [entry.name for entry in tokens.entries_of(path)] == ["ann"]


def test_a_token_that_is_being_revoked_does_not_come_back_with_another_one(path, monkeypatch):
    tokens.create(path, "ann", Role.ADMIN)
    revoking = threading.Thread(target=tokens.revoke, args=(path, "ann"))
    moved = threading.Event()
    write, lock = tokens._write, fcntl.flock

    def lock_tellingly(*arguments):
        if threading.current_thread() is revoking:
            moved.set()
        lock(*arguments)

    def write_late(path, entries):
        # What was read before is written after another one has changed the file, if that can be.
        if threading.current_thread() is not revoking and not moved.is_set():
            revoking.start()
            assert moved.wait(20)
        write(path, entries)
        if threading.current_thread() is revoking:
            moved.set()

    monkeypatch.setattr(fcntl, "flock", lock_tellingly)
    monkeypatch.setattr(tokens, "_write", write_late)
    tokens.create(path, "bob", Role.VIEWER)
    revoking.join(20)
    assert [entry.name for entry in tokens.entries_of(path)] == ["bob"]


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FailedPrecondition, match="No such file"):
        tokens.create(tmp_path / "missing" / "tokens.json", "ann", Role.VIEWER)


def test_a_folder_that_cannot_be_locked_is_told(path, monkeypatch):
    """As some network file systems do; the file is not changed without the lock."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    tokens.create(path, "ann", Role.VIEWER)
    monkeypatch.setattr(fcntl, "flock", refuse)
    for change in (tokens.revoke, lambda *named: tokens.create(*named, Role.ADMIN)):
        with pytest.raises(FailedPrecondition, match=r"cannot lock .*: No locks available"):
            change(path, "ann")
    assert [entry.name for entry in tokens.entries_of(path)] == ["ann"]


def test_the_file_of_a_person_holds_one_line(tmp_path):
    file = tmp_path / "token"
    file.write_text("phx_abc\n")
    assert tokens.read_token(file) == "phx_abc"
    for wrong in ("", "\n", "two words", "phx_a\nphx_b", "phx_\u00fc"):
        file.write_text(wrong)
        with pytest.raises(InvalidArgument) as refused:
            tokens.read_token(file)
        assert "phx_" not in str(refused.value)
    with pytest.raises(InvalidArgument, match="cannot read"):
        tokens.read_token(tmp_path / "missing")
