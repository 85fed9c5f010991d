"""A real engine builds the image and runs the services of deploy/compose.yaml; some are killed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict

import phalanx
from phalanx.clients.storage_sync import SyncStorageClient
from phalanx.rpc.channel import open_sync_channel
from phalanx.sdk.job import Job
from phalanx.testing.arena import wait_until
from phalanx.testing.datasets import REPOSITORY
from phalanx.testing.object_server import ObjectServer
from phalanx.testing.postgres_server import PostgresServer
from phalanx.testing.tcp_proxy import TcpProxy
from phalanx.v1 import cluster_service_pb2, job_service_pb2, job_service_pb2_grpc
from phalanx.v1.job_spec_pb2 import JobSpec
from tests.deploy import noise_job
from tests.deploy.engine import (
    CERTIFICATES,
    Engine,
    Unavailable,
    base_image,
    compose_commands,
    engine,
)
from tests.deploy.noise_job import GUARD_S, STEPS, add_noise, job

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

SERVICES = ("keys", "storage", "coordinator-1", "coordinator-2", "aggregator", "worker")
CANARY = "canary-" + secrets.token_hex(16)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def docker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(engine(tmp_path_factory.mktemp("engine")))
        except Unavailable as error:
            pytest.skip(str(error))
        yield found


@pytest.fixture(scope="module")
def image(docker: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    try:
        base = base_image(docker)
    except Unavailable as error:
        pytest.skip(str(error))
    # Certificates of a proxy come in as a secret; a line in it tells whether any of it stays.
    bundle = tmp_path_factory.mktemp("secrets") / "certificates.pem"
    known = CERTIFICATES.read_text() if CERTIFICATES.exists() else ""
    bundle.write_text(f"{known}\n# {CANARY}\n" if known else "")
    name = f"phalanx-test:{secrets.token_hex(4)}"
    docker.docker(
        *("build", "--network", "host", "--file", str(REPOSITORY / "deploy/Dockerfile")),
        *("--build-arg", f"BASE_IMAGE={base}", "--secret", f"id=certificates,src={bundle}"),
        *("--tag", name, str(REPOSITORY)),
    )
    yield name
    docker.docker("image", "rm", "--force", name, check=False)


class Compose:
    """The services of deploy/compose.yaml under a project name of their own."""

    def __init__(self, docker: Engine, image: str) -> None:
        commands = compose_commands()
        wanted = os.environ.get("PHALANX_TEST_COMPOSE", next(iter(commands), "any kind of"))
        if wanted not in commands:
            pytest.skip(f"compose {wanted} is not installed: there is {list(commands) or 'none'}")
        self.docker = docker
        self.project = f"phalanx{secrets.token_hex(4)}"
        self.ports = [free_port(), free_port()]
        self._command = commands[wanted]
        self._variables = {
            "COMPOSE_PROJECT_NAME": self.project,
            "PHALANX_IMAGE": image,
            "PHALANX_PORT": str(self.ports[0]),
            "PHALANX_STANDBY_PORT": str(self.ports[1]),
            "PHALANX_STORAGE_PORT": str(free_port()),
            "DOCKER_SOCKET": docker.socket,
            "CHAOS_EVERY_S": "0.5",
            "CHAOS_DOWN_S": "0.5",
            "CHAOS_KILLS": "1",
        }
        self.address = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        self.ca = self.token = ""

    def read_keys(self) -> None:
        """As people are told to."""
        self.ca = self("run", "--rm", "-T", "keys", "ca")
        self.token = self("run", "--rm", "-T", "keys", "admin-token").strip()

    def connect(self, folder: Path) -> phalanx.Cluster:
        ca = folder / "ca.pem"
        ca.write_text(self.ca)
        return phalanx.connect(self.address, token=self.token, ca=ca)

    def __call__(self, *arguments: str) -> str:
        files = ["--file", str(REPOSITORY / "deploy/compose.yaml")]
        return self.docker.run([*self._command, *files, *arguments], **self._variables).stdout

    def containers(self, service: str = "") -> dict[str, dict[str, Any]]:
        """What the engine knows about each container, by its short id."""
        labels = [f"com.docker.compose.project={self.project}"]
        if service:
            labels.append(f"com.docker.compose.service={service}")
        filters = [part for label in labels for part in ("--filter", f"label={label}")]
        ids = self.docker.docker("ps", "--all", "--quiet", *filters).split()
        if not ids:
            return {}
        found = json.loads(self.docker.docker("inspect", *ids))
        return {each["Config"]["Hostname"]: each for each in found}

    def health(self) -> dict[str, str]:
        found = [each for name in SERVICES[1:] for each in self.containers(name).values()]
        return {each["Name"]: each["State"]["Health"]["Status"] for each in found}


@pytest.fixture(scope="module")
def compose(docker: Engine, image: str) -> Iterator[Compose]:
    made = Compose(docker, image)
    try:
        made("up", "--detach", "--no-build", *SERVICES)
        made.read_keys()
        yield made
    finally:
        made("--profile", "chaos", "down", "--volumes", "--timeout", "1")


@pytest.fixture(scope="module")
def expected(docker: Engine, image: str) -> str:
    """The bits of one process of the image, without any cluster."""
    done = docker.run(
        [
            *(docker.docker_path, "run", "--rm", "--interactive", "--network", "none"),
            *("--read-only", "--tmpfs", "/tmp", "--env", "HOME=/tmp"),
            *("--entrypoint", "python", image, "-P", "-"),
        ],
        input=Path(noise_job.__file__).read_text(encoding="utf-8"),
    )
    return done.stdout.strip()


def test_the_image_is_small_has_no_root_and_keeps_no_secret(docker: Engine, image: str) -> None:
    (described,) = json.loads(docker.docker("image", "inspect", image))
    assert described["Config"]["User"] == "10001:10001"
    assert described["Config"]["Healthcheck"]["Test"] == [
        "CMD",
        "phalanx",
        "--timeout",
        "4",
        "health",
    ]
    assert described["Size"] < 700e6
    assert CANARY not in docker.docker("history", "--no-trunc", image)
    assert CANARY not in json.dumps(described)
    # 1: nothing was found; 0 and 2 are a find and an error.
    searched = docker.run(
        [
            *(docker.docker_path, "run", "--rm", "--user", "0", "--network", "none"),
            *("--entrypoint", "grep", image, "-rlsF", CANARY),
            *("/opt", "/etc", "/var", "/tmp", "/root", "/home", "/usr/local", "/run"),
        ],
        check=False,
    )
    assert (searched.stdout, searched.returncode) == ("", 1)


@pytest.mark.parametrize("service", ["storage", "coordinator", "aggregator", "worker"])
def test_every_service_starts_from_the_image(docker: Engine, image: str, service: str) -> None:
    said = docker.docker(
        "run", "--rm", "--read-only", "--network", "none", image, service, "--help"
    )
    assert f"usage: phalanx {service}" in said


def test_what_is_loaded_late_is_in_the_image(docker: Engine, image: str) -> None:
    late = "import obstore, psycopg, pyarrow.csv, pyarrow.dataset, pyarrow.parquet, scipy.sparse"
    docker.docker(
        *("run", "--rm", "--read-only", "--network", "none", "--entrypoint", "python"),
        *(image, "-P", "-c", late),
    )


def storage_of(
    docker: Engine, image: str, postgres_url: str, blobs_url: str, variables: dict[str, str]
) -> tuple[str, str]:
    """Storage in a container whose network is this machine's; return the container and address."""
    address = f"127.0.0.1:{free_port()}"
    container = docker.docker(
        *("run", "--detach", "--read-only", "--tmpfs", "/tmp", "--network", "host"),
        *(part for name, value in variables.items() for part in ("--env", f"{name}={value}")),
        *(image, "storage", "--listen", address, "--metrics-listen", "127.0.0.1:0"),
        *("--metadata", postgres_url, "--blobs", blobs_url),
    ).strip()
    return container, address


def says(docker: Engine, container: str, address: str, *arguments: str) -> bool:
    """What `phalanx health` inside of the container ends with."""
    words = ("exec", container, "phalanx", "--timeout", "4", "health", address, *arguments)
    return docker.run([docker.docker_path, *words], check=False).returncode == 0


def test_storage_of_the_image_is_in_postgresql_and_s3(
    docker: Engine, image: str, postgres_server: PostgresServer, object_server: ObjectServer
) -> None:
    """What one container has stored another one finds, and each says when its servers are away."""
    name = f"image-{secrets.token_hex(4)}"
    with TcpProxy(postgres_server.address) as proxy:
        postgres_server.create_database(name)
        urls = (postgres_server.url(name, proxy.address), object_server.create_bucket(name))
        variables = object_server.environment
        first, address = storage_of(docker, image, urls[0], f"{urls[1]}/blobs", variables)
        wait_until(lambda: says(docker, first, address), "the first storage process")
        with SyncStorageClient(address) as client:
            digest = client.put_blob(b"kept by others")
        docker.docker("rm", "--force", first)
        assert any("/blobs/" in key for key in object_server.keys(name))

        second, address = storage_of(docker, image, urls[0], f"{urls[1]}/blobs", variables)
        wait_until(lambda: says(docker, second, address), "the second storage process")
        with SyncStorageClient(address) as client:
            assert client.get_blob(digest) == b"kept by others"
        proxy.refuse()
        proxy.reset()
        wait_until(lambda: not says(docker, second, address), "it to say that it is not ready")
        assert says(docker, second, address, "--service", "liveness")
        proxy.heal()
        wait_until(lambda: says(docker, second, address), "it to say that it is ready again")
        docker.docker("rm", "--force", second)


def test_containers_can_write_nothing_but_their_volumes(compose: Compose) -> None:
    wait_until(lambda: set(compose.health().values()) == {"healthy"}, "every service to be well")
    found = compose.containers()
    assert len(found) == 10
    for container in found.values():
        assert container["HostConfig"]["ReadonlyRootfs"], container["Name"]
        assert container["HostConfig"]["CapDrop"] == ["ALL"]
        assert container["HostConfig"]["Memory"] > 0
        assert container["HostConfig"]["NanoCpus"] > 0
        assert container["Config"]["User"] == "10001:10001"
    worker = next(iter(compose.containers("worker")))
    done = compose.docker.run(
        [compose.docker.docker_path, "exec", worker, "touch", "/opt/phalanx/planted"], check=False
    )
    assert "Read-only file system" in done.stderr


def test_each_kind_of_process_has_its_own_keys_and_no_other(compose: Compose) -> None:
    tokens = {"storage": ["tokens.json"], "coordinator-1": ["tokens.json"]}
    for service in ("storage", "coordinator-1", "aggregator", "worker"):
        container = next(iter(compose.containers(service)))
        listed = compose.docker.docker("exec", container, "ls", "/etc/phalanx/keys").split()
        assert listed == ["ca.pem", "node.key", "node.pem", *tokens.get(service, [])]
    written = compose.docker.run(
        [compose.docker.docker_path, "exec", container, "touch", "/etc/phalanx/keys/planted"],
        check=False,
    )
    assert "Read-only file system" in written.stderr


def test_nobody_is_let_in_without_keys(compose: Compose) -> None:
    for credentials in (None, grpc.ssl_channel_credentials(compose.ca.encode())):
        address = f"127.0.0.1:{compose.ports[0]}"
        with open_sync_channel(address, credentials) as channel:
            stub: Any = job_service_pb2_grpc.JobServiceStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                stub.ListJobs(job_service_pb2.ListJobsRequest(), timeout=GUARD_S)
        code = grpc.StatusCode.UNAUTHENTICATED if credentials else grpc.StatusCode.UNAVAILABLE
        assert refused.value.code() == code


def submit_by_grpc(compose: Compose) -> str:
    """As any client in any language does, and once more, as one that has lost the answer."""
    request = job_service_pb2.SubmitJobRequest(spec=ParseDict(job(), JobSpec()), request_id="once")
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(compose.ca.encode()),
        grpc.access_token_call_credentials(compose.token),
    )
    with grpc.secure_channel(f"127.0.0.1:{compose.ports[0]}", credentials) as channel:
        stub: Any = job_service_pb2_grpc.JobServiceStub(channel)
        first = stub.SubmitJob(request, timeout=GUARD_S).job.id
        assert stub.SubmitJob(request, timeout=GUARD_S).job.id == first
    return str(first)


def test_a_killed_worker_and_a_killed_leader_change_no_bit(
    compose: Compose, expected: str, tmp_path: Path
) -> None:
    with compose.connect(tmp_path) as cluster:
        wait_until(lambda: len(cluster.workers()) == 4, "four workers")
        add_noise(cluster)
        running = cluster.get(submit_by_grpc(compose))
        at_step(running, 20)

        worker = kill_one_with_shards(compose, cluster, running)
        wait_until(
            lambda: any(
                event.type == "WORKER_LOST" and worker in event.message
                for event in cluster.events(running.id)
            ),
            f"the loss of {worker}",
        )
        at_step(running, running.refresh().progress.step + 20)

        before = cluster.describe()
        compose.docker.docker("kill", *compose.containers(before.leader))
        wait_until(lambda: cluster.describe().leader not in {"", before.leader}, "another leader")
        assert cluster.describe().generation > before.generation
        at_step(running, running.refresh().progress.step + 20)

        result = running.wait(timeout_s=GUARD_S)
    assert result.steps == STEPS
    assert result.examples_lost == 0
    assert result.parameters_sha256 == expected
    there = [each for name in SERVICES[1:] for each in compose.containers(name).values()]
    dead = [each["Name"] for each in there if not each["State"]["Running"]]
    assert len(dead) == 2, "nobody else has died"


def at_step(job: Job, step: int) -> None:
    wait_until(lambda: job.refresh().progress.step >= step or job.done, f"step {step}")
    assert not job.done, "the job was over before the fault could be injected"


def kill_one_with_shards(compose: Compose, cluster: phalanx.Cluster, job: Job) -> str:
    """Kill the container of a worker that hosts shards of the job; return the worker's id."""
    worker = next(
        each.id for each in cluster.workers() if any(job.id == share.job_id for share in each.jobs)
    )
    compose.docker.docker("kill", worker.removeprefix("worker-"))
    return str(worker)


def test_more_workers_are_a_matter_of_one_command(compose: Compose, tmp_path: Path) -> None:
    """Those that were killed come back with it."""
    compose("up", "--detach", "--no-build", "--scale", "worker=8", *SERVICES)
    with compose.connect(tmp_path) as cluster:
        wait_until(lambda: len(ready_workers(cluster)) == 8, "eight workers")
    compose("up", "--detach", "--no-build", *SERVICES)


def ready_workers(cluster: phalanx.Cluster) -> list[str]:
    ready = cluster_service_pb2.Worker.STATE_READY
    return [each.id for each in cluster.workers() if each.state == ready]


def test_the_profile_chaos_kills_a_worker_and_brings_it_back(compose: Compose) -> None:
    compose("up", "--detach", "--no-build", *SERVICES)
    before = {
        name: each["State"]["StartedAt"] for name, each in compose.containers("worker").items()
    }
    compose("--profile", "chaos", "up", "--detach", "--no-build", "chaos")

    def ended() -> bool:
        (chaos,) = compose.containers("chaos").values()
        return bool(chaos["State"]["Status"] == "exited")

    wait_until(ended, "one kill")
    (chaos,) = compose.containers("chaos")
    lines = [json.loads(line) for line in compose.docker.docker("logs", chaos).splitlines()]
    assert [each["event"] for each in lines] == ["killed", "started"]
    assert lines[0]["container"] == lines[1]["container"]
    after = compose.containers("worker")
    assert after.keys() == before.keys()
    assert all(each["State"]["Running"] for each in after.values())
    assert any(each["State"]["StartedAt"] != before[name] for name, each in after.items())
