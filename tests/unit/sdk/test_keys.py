"""Where a person's keys come from."""

import json
import os

import pytest

import phalanx
from phalanx.errors import InvalidArgument
from phalanx.keys.caller import Role
from phalanx.sdk.discovery import resolve
from phalanx.sdk.keys import resolve_keys
from phalanx.testing.keys import KeyRing


@pytest.fixture
def ring(tmp_path):
    return KeyRing(tmp_path / "keys")


def test_without_a_word_nothing_is_encrypted():
    assert resolve_keys(environ={}) is None


def test_arguments_come_before_the_environment_and_that_before_the_local_cluster(ring, tmp_path):
    missing = str(tmp_path / "missing")
    token = tmp_path / "token"
    token.write_text("phx_abc\n")
    environ = {"PHALANX_CA": str(ring.ca), "PHALANX_TOKEN_FILE": str(token)}
    assert resolve_keys(environ=environ)
    assert resolve_keys(token="phx_x", ca=ring.ca, environ={"PHALANX_CA": missing})
    with pytest.raises(InvalidArgument, match="missing"):
        resolve_keys(environ={**environ, "PHALANX_TOKEN_FILE": missing})
    with pytest.raises(InvalidArgument, match="missing"):
        resolve_keys(ca=missing, environ=environ)
    (ring.path / "admin.token").write_text("phx_abc\n")
    assert resolve_keys(ring.path, environ={})


@pytest.mark.parametrize("token", ["", "two words", "phx_\n", "phx_\u00e9"])
def test_what_is_no_token_is_not_sent_and_not_repeated(ring, token):
    with pytest.raises(InvalidArgument) as refused:
        phalanx.connect("127.0.0.1:1", token=token, ca=ring.ca)
    assert "phx_" not in str(refused.value)


def test_a_certificate_needs_its_key(ring):
    with pytest.raises(InvalidArgument, match="go together"):
        phalanx.connect("127.0.0.1:1", ca=ring.ca, certificate=ring.path / "client.pem")
    with pytest.raises(InvalidArgument, match="no certificate and its key"):
        phalanx.connect(
            "127.0.0.1:1",
            certificate=ring.path / "client.pem",
            key=ring.path / "worker.key",
        )


def test_the_cluster_of_this_machine_has_its_keys_beside_it(ring, tmp_path):
    (tmp_path / "state").mkdir()
    state = {"pid": os.getpid(), "address": "127.0.0.1:71,127.0.0.1:72", "keys_dir": str(ring.path)}
    (tmp_path / "state" / "cluster.json").write_text(json.dumps(state))
    environ = {"PHALANX_STATE": str(tmp_path / "state")}
    assert resolve(None, environ).keys_dir == ring.path
    assert resolve("127.0.0.1:72", environ).keys_dir == ring.path
    # A token is for the cluster that it is of.
    assert resolve("127.0.0.1:73", environ).keys_dir is None
    assert resolve("train.example:71,127.0.0.1:71", environ).keys_dir is None


def test_a_token_is_never_sent_in_the_clear(ring):
    """Without encryption there is no call at all, whatever the address."""
    import socket
    import threading

    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def listen() -> None:
            connection, _ = server.accept()
            connection.settimeout(5)
            with connection:
                heard.extend(connection.recv(65536))

        thread = threading.Thread(target=listen)
        thread.start()
        token = ring.token("ann", Role.VIEWER)
        with (
            phalanx.connect(f"127.0.0.1:{port}", token=token, ca=ring.ca, timeout_s=2) as cluster,
            pytest.raises(phalanx.PhalanxError),
        ):
            cluster.jobs()
        thread.join()
    assert heard
    assert token.encode() not in heard
