"""A real Docker engine for tests: the one that runs here, or one of our own that leaves nothing."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CALL_TIMEOUT_S = 600.0
START_TIMEOUT_S = 60.0
SUITE = "bookworm"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BASE_IMAGE = "phalanx-test-base:latest"


class Unavailable(Exception):
    """Why there is no engine here."""


class Engine:
    """Calls to an engine's command line."""

    def __init__(self, host: str, folder: Path) -> None:
        self.host = host
        self.docker_path = _docker_that_builds()
        self._environment = {
            **os.environ,
            "DOCKER_HOST": host,
            "DOCKER_BUILDKIT": "1",
            # No login and no plug-in of the developer.
            "DOCKER_CONFIG": str(folder / "docker-config"),
        }

    @property
    def socket(self) -> str:
        """The path of the engine's socket."""
        return self.host.removeprefix("unix://")

    def docker(self, *arguments: str, check: bool = True) -> str:
        """Run `docker`; return what it wrote to standard output."""
        return self.run([self.docker_path, *arguments], check=check).stdout

    def run(
        self,
        command: Sequence[str],
        *,
        check: bool = True,
        input: str | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program that speaks with this engine."""
        done = subprocess.run(
            command,
            input=input,
            capture_output=True,
            text=True,
            timeout=CALL_TIMEOUT_S,
            check=False,
            env={**self._environment, **variables},
            # A group of its own: Ctrl-C for the tests must not break it off half way.
            start_new_session=True,
        )
        if check and done.returncode:
            said = (done.stdout + done.stderr)[-4000:]
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{said}")
        return done


def compose_commands() -> dict[str, list[str]]:
    """Return the command lines of every kind of compose that is installed, by its name."""
    found = {}
    if path := shutil.which("docker-compose"):
        found["v1"] = [path]
    if docker := shutil.which("docker"):
        known = subprocess.run(
            [docker, "compose", "version"], capture_output=True, check=False, timeout=60
        )
        if known.returncode == 0:
            found["v2"] = [docker, "compose"]
    return found


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """An engine for as long as the block. Raises Unavailable, with the reason, without one."""
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    running = Engine(host, folder)
    if running.run([running.docker_path, "info"], check=False).returncode == 0:
        yield running
        return
    with _own_engine(folder) as own:
        yield own


@contextmanager
def _own_engine(folder: Path) -> Iterator[Engine]:
    if os.geteuid() != 0:
        raise Unavailable("no engine answers, and only root can start one")
    dockerd = shutil.which("dockerd")
    if dockerd is None:
        raise Unavailable("no engine answers, and there is no dockerd (Debian: docker.io)")
    if "-P FORWARD DROP" in _output("iptables", "-S", "FORWARD"):
        raise Unavailable("no engine answers, and the firewall lets no containers speak together")
    socket = folder / "docker.sock"
    log_path = folder / "dockerd.log"
    command = [
        *(dockerd, "--host", f"unix://{socket}", "--pidfile", str(folder / "dockerd.pid")),
        *("--data-root", str(folder / "data"), "--exec-root", str(folder / "exec")),
        # Nothing of the machine's own network is touched: no rule, no switch, no usual bridge.
        *("--iptables=false", "--ip-forward=false", "--ip-masq=false", "--bridge", "none"),
        *("--default-address-pool", "base=10.213.0.0/16,size=24"),
    ]
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        own = Engine(f"unix://{socket}", folder)
        until = time.monotonic() + START_TIMEOUT_S
        while own.run([own.docker_path, "info"], check=False).returncode:
            if process.poll() is not None or time.monotonic() > until:
                raise Unavailable(f"no engine can start here: {_last_line(log_path)}")
            time.sleep(0.2)
        yield own
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(START_TIMEOUT_S)
        # The engine leaves its network namespaces mounted, and pytest could not remove the folder.
        for mounted in (folder / "exec" / "netns").glob("*"):
            _output("umount", str(mounted))
        shutil.rmtree(folder / "data", ignore_errors=True)


def _last_line(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "it said nothing"


def _docker_that_builds() -> str:
    """Return a docker command with BuildKit: built in before 23, a plug-in since then."""
    candidates = [path for path in (shutil.which("docker"), "/usr/bin/docker") if path]
    for path in candidates:
        if not Path(path).exists():
            continue
        version = _output(path, "--version")
        major = re.search(r"version (\d+)\.", version)
        if major and (int(major[1]) < 23 or _output(path, "buildx", "version")):
            return path
    raise Unavailable("there is no docker command with BuildKit (Debian: docker.io)")


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout if done.returncode == 0 else ""


def base_image(own: Engine) -> str:
    """Return a base image that needs no registry: a new Debian, made once and kept.

    PHALANX_TEST_BASE_IMAGE names another one, which the engine has or may pull. Raises Unavailable.
    """
    if named := os.environ.get("PHALANX_TEST_BASE_IMAGE"):
        return named
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phalanx-tests"
    kept = cache / f"debian-{SUITE}-python3.tar"
    if not kept.exists():
        _make_base(cache, kept)
    own.docker("import", str(kept), BASE_IMAGE)
    return BASE_IMAGE


def _make_base(cache: Path, kept: Path) -> None:
    if os.geteuid() != 0:
        raise Unavailable("only root can make a base image; name one in PHALANX_TEST_BASE_IMAGE")
    debootstrap = shutil.which("debootstrap")
    if debootstrap is None:
        raise Unavailable("a base image is made with debootstrap, which is not installed")
    cache.mkdir(parents=True, exist_ok=True)
    root = cache / f"root-{os.getpid()}"
    try:
        done = subprocess.run(
            [
                *(debootstrap, "--variant=minbase"),
                *("--include=python3,python3-venv,ca-certificates", SUITE, str(root)),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=CALL_TIMEOUT_S,
        )
        if done.returncode:
            raise Unavailable(f"debootstrap made no base image: {done.stdout.strip()[-300:]}")
        for waste in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / waste, ignore_errors=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        with tarfile.open(unfinished, "w") as archive:
            archive.add(root, arcname=".")
        unfinished.replace(kept)
    finally:
        shutil.rmtree(root, ignore_errors=True)
