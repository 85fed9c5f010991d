"""Servers and channels with keys: who gets through to a handler, and what happens when keys
change."""

import asyncio
import contextlib
import importlib
import pkgutil
import time
from functools import partial

import grpc
import grpc.aio
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import phalanx.v1
from phalanx.errors import FailedPrecondition
from phalanx.keys import tokens
from phalanx.keys.authority import Authority
from phalanx.keys.caller import CODE, Role, Service, current_caller
from phalanx.keys.policy import RULES
from phalanx.rpc import standing
from phalanx.rpc.authentication import Gate
from phalanx.rpc.channel import open_channel
from phalanx.rpc.limits import ServerLimits
from phalanx.rpc.server import Server
from phalanx.rpc.status import from_rpc_error
from phalanx.testing import keys as testing_keys
from phalanx.testing.keys import KeyRing

GUARD_S = 20.0
CONTROL = Service.CONTROL
SESSION = "/phalanx.v1.CoordinationService/Session"
WATCH = "/phalanx.v1.JobService/WatchJob"
UPLOAD = "/phalanx.v1.StorageService/PutBlob"


class Arrivals:
    """Serves every method of every service, and counts the calls that reach a handler."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.release = asyncio.Event()
        self.held = {SESSION}
        self.methods = {}
        for each in pkgutil.iter_modules(phalanx.v1.__path__):
            module = importlib.import_module(f"phalanx.v1.{each.name}")
            services = getattr(module, "DESCRIPTOR", None)
            for service in services.services_by_name.values() if services else ():
                for method in service.methods:
                    self.methods[f"/{service.full_name}/{method.name}"] = method

    def add_to(self, server: grpc.aio.Server) -> None:
        by_service: dict[str, dict[str, object]] = {}
        for path, method in self.methods.items():
            _, service, name = path.split("/")
            by_service.setdefault(service, {})[name] = self._handler(path, method)
        for service, handlers in by_service.items():
            server.add_generic_rpc_handlers(
                (grpc.method_handlers_generic_handler(service, handlers),)
            )

    def _handler(self, path, method):
        answer = GetMessageClass(method.output_type)()

        async def arrived(request, context):
            self.calls.append((path, current_caller().name))
            if path in self.held:
                if method.server_streaming:
                    await context.write(answer)
                await self.release.wait()
                return None if method.server_streaming else answer
            if method.server_streaming:
                await context.write(answer)
                return None
            return answer

        make = getattr(
            grpc,
            f"{'stream' if method.client_streaming else 'unary'}_"
            f"{'stream' if method.server_streaming else 'unary'}_rpc_method_handler",
        )
        return make(
            arrived,
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )


@pytest.fixture
def ring(tmp_path):
    return KeyRing(tmp_path / "keys")


@pytest.fixture
async def arrivals():
    return Arrivals()


@contextlib.asynccontextmanager
async def _served(ring, arrivals, name="control", **settings):
    server = Server(
        listen="127.0.0.1:0",
        metrics_listen=None,
        service_names=["phalanx.v1.JobService"],
        keys=ring.server(name),
        **settings,
    )
    arrivals.add_to(server.raw)
    await server.start()
    server.set_serving(True)
    try:
        yield server
    finally:
        arrivals.release.set()
        await server.stop(0)


async def _call(channel, path, method=None, **fields):
    """Make one call with one message; return its first answer."""
    if method is None:
        return await channel.unary_unary(path)(b"", timeout=GUARD_S)
    request = GetMessageClass(method.input_type)(**fields)
    kind = (
        f"{'stream' if method.client_streaming else 'unary'}_"
        f"{'stream' if method.server_streaming else 'unary'}"
    )
    multi = getattr(channel, kind)(path, lambda message: message.SerializeToString())
    if not method.client_streaming and not method.server_streaming:
        return await multi(request, timeout=GUARD_S)
    call = multi(iter([request]) if method.client_streaming else request, timeout=GUARD_S)
    if not method.server_streaming:
        return await call
    try:
        return await call.read()
    finally:
        if call.done() and await call.code() is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(
                await call.code(),
                await call.initial_metadata(),
                await call.trailing_metadata(),
                await call.details(),
            )
        call.cancel()


async def _arrive(channel, path, method=None, **fields):
    try:
        await _call(channel, path, method, **fields)
    except grpc.aio.AioRpcError as error:
        # The handler ended while the rest of the stream was being written.
        if from_rpc_error(error).reason != "CALL_ENDED":
            raise


async def _refusal(channel, path, method=None, **fields):
    while True:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await _call(channel, path, method, **fields)
        error = from_rpc_error(refused.value)
        # A stream that ends while it is written to loses its status; the next try gets it.
        if error.reason != "CALL_ENDED":
            return error


# Handshakes

JOBS = "/phalanx.v1.JobService/ListJobs"


def _plaintext(ring, address):
    return open_channel(address)


def _no_certificate(ring, address):
    return open_channel(address, keys=ring.client(), service=CONTROL)


def _expired(ring, address):
    name = ring.write("old", ring.expired(Service.WORKER))
    return open_channel(address, keys=ring.client(name), service=CONTROL)


def _wrong_authority(ring, address):
    stranger = Authority.new().issue_node([Service.CONTROL])
    name = ring.write("stranger", stranger)
    return open_channel(address, keys=ring.client(name), service=CONTROL)


def _wrong_name(ring, address):
    return open_channel(address, keys=ring.client("worker"), service=Service.STORAGE)


@pytest.mark.parametrize(
    "opened", [_plaintext, _no_certificate, _expired, _wrong_authority, _wrong_name]
)
async def test_a_bad_handshake_reaches_no_handler(ring, arrivals, opened):
    token = ring.token("ann", Role.ADMIN)
    async with _served(ring, arrivals) as server:
        async with opened(ring, server.address) as channel:
            for path in arrivals.methods:
                call = channel.unary_unary(path)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    # A token is no use before the handshake.
                    metadata = (("authorization", f"Bearer {token}"),)
                    await call(b"", timeout=GUARD_S, metadata=metadata)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, path
        assert arrivals.calls == []
        # The server is well, and the same call with the right keys arrives.
        keys = ring.client("client", token)
        async with open_channel(server.address, keys=keys, service=CONTROL) as channel:
            await _call(channel, JOBS, arrivals.methods[JOBS])
        assert arrivals.calls == [(JOBS, "ann")]


REFLECTION = "ServerReflection/ServerReflectionInfo"
BESIDE_OURS = (
    "/grpc.health.v1.Health/Watch",
    f"/grpc.reflection.v1.{REFLECTION}",
    f"/grpc.reflection.v1alpha.{REFLECTION}",
)


async def test_the_port_for_probes_reaches_no_handler_and_tells_health(ring, arrivals):
    token = ring.token("ann", Role.ADMIN)
    async with _served(ring, arrivals, probe_listen="127.0.0.1:0") as server:
        async with _plaintext(ring, server.probe_address) as channel:
            for path in (*arrivals.methods, *BESIDE_OURS):
                call = channel.unary_unary(path)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    metadata = (("authorization", f"Bearer {token}"),)
                    await call(b"", timeout=GUARD_S, metadata=metadata)
                assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED, path
            answer = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=GUARD_S
            )
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        # It has opened nothing but itself.
        async with _plaintext(ring, server.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(JOBS)(b"", timeout=GUARD_S)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert arrivals.calls == []


async def test_a_client_refuses_a_server_of_another_authority(tmp_path, ring, arrivals):
    other = KeyRing(tmp_path / "other")
    async with _served(ring, arrivals) as server:
        keys = ring.client("client", "phx_secret", ca=other.ca)
        async with open_channel(server.address, keys=keys, service=CONTROL) as channel:
            refused = await _refusal(channel, JOBS, arrivals.methods[JOBS])
        assert "phx_secret" not in str(refused)
    assert arrivals.calls == []


async def test_a_person_checks_the_host_and_needs_no_certificate_on_the_public_port(ring, arrivals):
    token = ring.token("ann", Role.VIEWER)
    async with _served(ring, arrivals, public_listen="127.0.0.1:0") as server:
        assert server.public_address != server.address
        keys = ring.client(token=token)
        async with open_channel(server.public_address, keys=keys) as channel:
            await _call(channel, JOBS, arrivals.methods[JOBS])
        for path in (JOBS, SESSION):
            async with open_channel(server.public_address, keys=ring.client()) as channel:
                refused = await _refusal(channel, path, arrivals.methods[path])
                assert refused.reason == "NO_IDENTITY"
    assert arrivals.calls == [(JOBS, "ann")]
    arrivals.calls.clear()
    # Its certificate names no host that people dial.
    async with (
        _served(ring, arrivals, name="worker", public_listen="127.0.0.1:0") as server,
        open_channel(server.public_address, keys=keys) as channel,
    ):
        await _refusal(channel, JOBS, arrivals.methods[JOBS])
    assert arrivals.calls == []


# Calls

FIELDS = {
    "AppendJournal": {"stream": "code"},
    "ReadJournal": {"stream": "code"},
    "SetPins": {"holder": "code.1"},
}
NODE_FIELDS = {"SetPins": {"holder": "job/1"}, "ReadJournal": {"stream": "tasks/job"}}


@pytest.mark.parametrize("who", [*(role.name for role in Role), *Service, "client"])
async def test_each_kind_of_caller_reaches_what_is_its_own_and_nothing_else(ring, arrivals, who):
    person = Role[who] if who in Role.__members__ else None
    token = ring.token("ann", person, permissions=[CODE]) if person else ""
    keys = ring.client("client" if person else who, token)
    async with (
        _served(ring, arrivals) as server,
        open_channel(server.address, keys=keys, service=CONTROL) as channel,
    ):
        for path, method in arrivals.methods.items():
            arrivals.calls.clear()
            rule = RULES[path[1:]]
            if person:
                allowed = rule.people is not None and person >= rule.people
            else:
                allowed = who in rule.nodes
            fields = FIELDS.get(method.name, {})
            if not person:
                fields = NODE_FIELDS.get(method.name, fields)
            if allowed:
                await _arrive(channel, path, method, **fields)
                assert len(arrivals.calls) == 1, path
            else:
                refused = await _refusal(channel, path, method, **fields)
                expected = "NO_IDENTITY" if who == "client" else "ROLE_NOT_ALLOWED"
                assert refused.reason == expected, path
                assert arrivals.calls == [], path


async def test_a_bad_token_is_refused_whatever_the_certificate(ring, arrivals):
    ring.token("ann", Role.ADMIN)
    old = ring.token("bob", Role.ADMIN, expires_s=1.0)
    async with _served(ring, arrivals) as server:
        for token in ("phx_made_up", old):
            keys = ring.client("control", token)
            async with open_channel(server.address, keys=keys, service=CONTROL) as channel:
                for path in (JOBS, "/phalanx.v1.StorageService/GetLease", SESSION):
                    refused = await _refusal(channel, path, arrivals.methods[path])
                    assert refused.code.value == "UNAUTHENTICATED"
                    assert token not in str(refused)
        keys = ring.client("worker")
        async with open_channel(server.address, keys=keys, service=CONTROL) as channel:
            call = channel.unary_unary(JOBS)
            for header in ("Basic YTpi", "Bearer", "phx_x", ""):
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    await call(b"", timeout=GUARD_S, metadata=(("authorization", header),))
                assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert arrivals.calls == []


async def test_a_revoked_token_is_refused_from_the_next_call_on(ring, arrivals):
    keys = ring.client("client", ring.token("ann", Role.VIEWER))
    async with (
        _served(ring, arrivals) as server,
        open_channel(server.address, keys=keys, service=CONTROL) as channel,
    ):
        await _call(channel, JOBS, arrivals.methods[JOBS])
        tokens.revoke(ring.tokens_path, "ann")
        refused = await _refusal(channel, JOBS, arrivals.methods[JOBS])
        assert refused.reason == "UNKNOWN_TOKEN"


@pytest.mark.parametrize("path", [WATCH, UPLOAD])
@pytest.mark.parametrize("end", ["UNKNOWN_TOKEN", "TOKEN_EXPIRED", "TOKEN_CHANGED"])
async def test_an_open_stream_ends_soon_after_its_token(ring, arrivals, monkeypatch, path, end):
    monkeypatch.setattr(standing, "LOOK_EVERY_S", 0.01)
    now_s = time.time()
    monkeypatch.setattr(testing_keys, "TokenFile", partial(tokens.TokenFile, now_s=lambda: now_s))
    expires_s = now_s + 1.0 if end == "TOKEN_EXPIRED" else None
    token = ring.token("ann", Role.SUBMITTER, expires_s=expires_s)
    keys = ring.client("client", token)
    arrivals.held.add(path)
    async with (
        _served(ring, arrivals) as server,
        open_channel(server.address, keys=keys, service=CONTROL) as channel,
        asyncio.timeout(GUARD_S),
    ):
        make = channel.unary_stream if path == WATCH else channel.stream_unary
        call = make(path)(b"" if path == WATCH else iter([b""]), timeout=GUARD_S)
        while not arrivals.calls:
            await asyncio.sleep(0.001)
        if end == "UNKNOWN_TOKEN":
            tokens.revoke(ring.tokens_path, "ann")
        elif end == "TOKEN_EXPIRED":
            now_s += 1.0
        elif end == "TOKEN_CHANGED":
            text = ring.tokens_path.read_text()
            ring.tokens_path.write_text(text.replace('"*"', '"vision"'))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            if path == WATCH:
                while await call.read() is not grpc.aio.EOF:
                    pass
            await call
    assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert from_rpc_error(ended.value).reason == end
    assert token not in str(ended.value)


async def test_a_token_that_stays_ends_no_stream_and_nodes_have_none(ring, arrivals, monkeypatch):
    monkeypatch.setattr(standing, "LOOK_EVERY_S", 0.001)
    looked = []
    check_again = Gate.check_again

    def check(gate, *call):
        looked.append(call)
        check_again(gate, *call)

    monkeypatch.setattr(Gate, "check_again", check)
    arrivals.held.add(WATCH)
    keys = ring.client("client", ring.token("ann", Role.VIEWER))
    async with _served(ring, arrivals) as server, asyncio.timeout(GUARD_S):
        async with open_channel(server.address, keys=keys, service=CONTROL) as channel:
            call = channel.unary_stream(WATCH)(b"", timeout=GUARD_S)
            while len(looked) < 5:
                await asyncio.sleep(0.001)
            assert not call.done()
            arrivals.release.set()
            assert [each async for each in call] == [b""]
        count = len(looked)
        path, method = SESSION, arrivals.methods[SESSION]
        async with open_channel(
            server.address, keys=ring.client("worker"), service=CONTROL
        ) as channel:
            await _arrive(channel, path, method)
        assert len(looked) == count


async def test_health_asks_for_no_name_and_reflection_for_any(ring, arrivals):
    async with _served(ring, arrivals, public_listen="127.0.0.1:0") as server:
        async with open_channel(server.public_address, keys=ring.client()) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=GUARD_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await health.List(health_pb2.HealthListRequest(), timeout=GUARD_S)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        ask = reflection_pb2.ServerReflectionRequest(list_services="*")
        for token, served in (("", False), (ring.token("ann", Role.VIEWER), True)):
            keys = ring.client(token=token)
            async with open_channel(server.public_address, keys=keys) as channel:
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                call = stub.ServerReflectionInfo(iter([ask]), timeout=GUARD_S)
                if served:
                    names = [
                        each.name
                        async for found in call
                        for each in found.list_services_response.service
                    ]
                    assert "phalanx.v1.JobService" in names
                else:
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        [_ async for _ in call]
                    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


# Keys that change


def _trust_both(ring, other: KeyRing) -> None:
    both = ring.ca.read_bytes() + other.ca.read_bytes()
    ring.ca.write_bytes(both)


def _take_over(ring, other: KeyRing, name: str) -> None:
    for suffix in ("key", "pem"):
        (ring.path / f"{name}.{suffix}").write_bytes((other.path / f"{name}.{suffix}").read_bytes())


async def test_open_streams_outlive_a_change_of_authority_and_calls_never_fail(
    ring, arrivals, tmp_path
):
    """First everybody trusts both authorities, then each takes its new certificate, then the old
    authority goes; a stream that is open all the time is never touched."""
    other = KeyRing(tmp_path / "other")
    lease, session = "/phalanx.v1.StorageService/GetLease", arrivals.methods[SESSION]
    async with _served(ring, arrivals) as server:
        worker = open_channel(server.address, keys=ring.client("worker"), service=CONTROL)
        node = open_channel(server.address, keys=ring.client("control"), service=CONTROL)
        stream = worker.stream_stream(SESSION)(timeout=GUARD_S)
        await stream.write(GetMessageClass(session.input_type)().SerializeToString())
        assert await stream.read() is not grpc.aio.EOF

        async def still_works() -> None:
            await _call(node, lease, arrivals.methods[lease])
            # A connection of its own, with the keys of now.
            async with open_channel(
                server.address,
                keys=ring.client("control"),
                service=CONTROL,
                own_connection=True,
            ) as fresh:
                await _call(fresh, lease, arrivals.methods[lease])
            assert not stream.done()

        await still_works()
        _trust_both(ring, other)
        await still_works()
        for name in ("control", "worker"):
            _take_over(ring, other, name)
            await still_works()
        ring.ca.write_bytes(other.ca.read_bytes())
        await still_works()
        # Who still has the old keys is a stranger now.
        old = KeyRing(tmp_path / "old").client("control", ca=other.ca)
        async with open_channel(server.address, keys=old, service=CONTROL) as channel:
            await _refusal(channel, lease, arrivals.methods[lease])
        arrivals.release.set()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
        await worker.close()
        await node.close()


async def test_half_a_change_is_not_taken(ring, arrivals, tmp_path):
    """Between the new key and the new certificate the old pair goes on."""
    other = KeyRing(tmp_path / "other")
    lease = "/phalanx.v1.StorageService/GetLease"
    async with _served(ring, arrivals) as server:
        # Not by replacing: as an editor writes, in place.
        key = ring.path / "control.key"
        old = key.read_bytes()
        for content in (b"", (other.path / "control.key").read_bytes(), old):
            key.write_bytes(content)
            keys = ring.client("worker") if content != old else ring.client("control")
            async with open_channel(
                server.address, keys=keys, service=CONTROL, own_connection=True
            ) as channel:
                if content == old:
                    await _call(channel, lease, arrivals.methods[lease])
                else:
                    refused = await _refusal(channel, lease, arrivals.methods[lease])
                    assert refused.reason == "ROLE_NOT_ALLOWED"


async def test_a_replaced_channel_is_closed_once_its_calls_have_ended(ring, arrivals):
    async with _served(ring, arrivals) as server:
        channel = open_channel(server.address, keys=ring.client("worker"), service=CONTROL)
        session = arrivals.methods[SESSION]
        stream = channel.stream_stream(SESSION)(timeout=GUARD_S)
        await stream.write(GetMessageClass(session.input_type)().SerializeToString())
        await stream.read()
        ring.write("worker", ring.authority.issue_node([Service.WORKER]))
        second = channel.stream_stream(SESSION)(timeout=GUARD_S)
        await second.write(GetMessageClass(session.input_type)().SerializeToString())
        assert await second.read() is not grpc.aio.EOF
        assert len(channel._retired) == 1
        assert not stream.done()
        stream.cancel()
        async with asyncio.timeout(GUARD_S):
            while channel._retired or channel._closing:
                await asyncio.sleep(0)
        assert not second.done()
        await channel.close()


def test_keys_that_cannot_be_used_are_told_at_the_start(ring):
    (ring.path / "control.key").write_bytes((ring.path / "worker.key").read_bytes())
    for make in (ring.server, lambda: ring.client("control")):
        with pytest.raises(FailedPrecondition, match="no certificate and its key") as refused:
            make()
        assert "PRIVATE" not in str(refused.value)
    ring.tokens_path.write_text("phx_secret")
    with pytest.raises(FailedPrecondition, match="file of tokens") as refused:
        ring.server("storage")
    assert "phx_secret" not in str(refused.value)


async def test_a_handshake_that_looked_before_another_does_not_bring_old_keys_back(
    ring, monkeypatch
):
    fetched = []
    monkeypatch.setattr(
        grpc, "dynamic_ssl_server_credentials", lambda _, fetch, **__: fetched.append(fetch)
    )
    keys = ring.server("control")
    keys.credentials(mutual=True)
    (fetch,) = fetched
    version, _ = keys._watched.read()
    answers = [(version + 2, "newest"), (version + 1, "older"), (version + 2, "newest")]
    monkeypatch.setattr(keys._watched, "read", lambda: answers.pop(0))
    assert [fetch(), fetch(), fetch()] == ["newest", None, None]


async def test_whoever_proves_nothing_leaves_room_for_the_others(ring, arrivals):
    limits = ServerLimits(calls_max=16, peer_calls_max=16)
    token = ring.token("ann", Role.ADMIN)
    async with (
        _served(ring, arrivals, limits=limits, public_listen="127.0.0.1:0") as server,
        open_channel(server.public_address, keys=ring.client()) as strange,
        open_channel(server.address, keys=ring.client("client", token), service=CONTROL) as known,
    ):
        health = health_pb2_grpc.HealthStub(strange)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(16)]
        reasons = []
        for watch in watches:
            try:
                await watch.read()
            except grpc.aio.AioRpcError as error:
                reasons.append(from_rpc_error(error).reason)
        assert reasons == ["TOO_MANY_CALLS_OF_PEER"] * 14
        await _call(known, JOBS, arrivals.methods[JOBS])
        assert arrivals.calls == [(JOBS, "ann")]
        for watch in watches:
            watch.cancel()
