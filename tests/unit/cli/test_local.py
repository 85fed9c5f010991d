import contextlib
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from phalanx.cli.commands.local import signals_that_stop
from phalanx.errors import FailedPrecondition, InvalidArgument
from phalanx.local.cluster import LocalCluster
from phalanx.local.layout import Layout
from phalanx.local.options import LocalOptions
from phalanx.local.ports import check_free, free_ports
from phalanx.local.restarts import LONGEST_DELAY_S, STEADY_S, RestartPolicy
from phalanx.local.state import (
    ClusterState,
    Member,
    is_locked,
    lock,
    read_state,
    remove_state,
    unlock,
    write_state,
)


def test_the_first_restart_is_immediate_and_the_next_wait_longer():
    policy, now_s, waits = RestartPolicy(), 100.0, []
    for _ in range(8):
        policy, start_s = policy.after_death(now_s, now_s + 0.1)
        waits.append(start_s - (now_s + 0.1))
        now_s = start_s
    assert waits[0] == 0
    assert waits[1:] == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, LONGEST_DELAY_S, LONGEST_DELAY_S])


def test_a_process_that_lived_long_is_restarted_at_once_again():
    policy = RestartPolicy(deaths=6)
    policy, start_s = policy.after_death(50.0, 50.0 + STEADY_S)
    assert (policy.deaths, start_s) == (1, 50.0 + STEADY_S)


def test_free_ports_are_distinct():
    ports = free_ports(20)
    assert len(set(ports)) == 20
    check_free(ports[0])


def test_a_port_in_use_is_told_with_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(FailedPrecondition) as refused:
            check_free(port)
    assert refused.value.reason == "PORT_IN_USE"
    assert str(refused.value).startswith(f"port {port} is in use; give --port 0 or another")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"workers": -1}, {"aggregators": 0}, {"controls": 0}, {"slots": 0}, {"port": 70000}),
        {"link_roots": (Path(__file__),)},
        {"link_roots": (Path("nowhere/at/all"),)},
    ],
)
def test_wrong_sizes_are_refused(tmp_path, wrong):
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        LocalOptions(state_dir=tmp_path, **wrong)


def test_cores_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    slots = [LocalOptions(tmp_path, workers=n).slots_per_worker for n in (0, 1, 2, 3, 8, 20)]
    assert slots == [8, 8, 4, 2, 1, 1]
    assert LocalOptions(tmp_path, workers=4, slots=3).slots_per_worker == 3


def test_everybody_knows_everybody_before_anything_runs(tmp_path):
    port = free_ports(1)[0]
    options = LocalOptions(tmp_path, workers=2, aggregators=2, controls=2, port=port)
    layout = Layout.choose(options)
    plans = {plan.id: " ".join(plan.arguments) for plan in layout.members()}
    assert list(plans) == [
        *("storage", "control-1", "control-2", "aggregator-1", "aggregator-2"),
        *("worker-1", "worker-2"),
    ]
    assert layout.control_addresses[0] == f"127.0.0.1:{port}"
    for id, arguments in plans.items():
        assert layout.storage_address in arguments, id
        if id.startswith(("aggregator", "worker")):
            assert ",".join(layout.control_addresses) in arguments


@pytest.mark.parametrize("secure", [False, True])
def test_everybody_hears_of_all_replicas_of_storage(tmp_path, secure):
    places = {"PHALANX_STORAGE_METADATA": "postgresql://x/y", "PHALANX_STORAGE_BLOBS": "s3://x"}
    options = LocalOptions(
        tmp_path, storages=2, controls=2, environment=places, secure=secure, port=free_ports(1)[0]
    )
    layout = Layout.choose(options)
    one, other, *members = layout.members()
    assert [one.id, other.id] == ["storage-1", "storage-2"]
    for each, plan in zip(layout.storage_addresses, (one, other), strict=True):
        assert f"--listen {each} " in " ".join(plan.arguments)
    assert layout.storage_address == ",".join(layout.storage_addresses)
    for plan in members:
        assert f"--storage {layout.storage_address} " in " ".join(plan.arguments), plan.id
    assert layout.client_addresses[0].endswith(f":{options.port}")
    dialled = (*layout.storage_addresses, *layout.public_storage_addresses)
    assert len({*dialled, *layout.control_addresses, *layout.public_control_addresses}) == (
        8 if secure else 4
    )
    assert layout.client_storage_address.count(",") == 1


def test_replicas_of_storage_need_a_place_that_they_share(tmp_path):
    with pytest.raises(InvalidArgument, match="PHALANX_STORAGE_METADATA"):
        LocalOptions(tmp_path, storages=2)


def test_storage_hears_of_the_folders_to_link_from(tmp_path, monkeypatch):
    (tmp_path / "one,two").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    roots = (Path("data"), tmp_path)
    storage, *others = Layout.choose(LocalOptions(tmp_path, link_roots=roots)).members()
    flags = " ".join(storage.arguments)
    assert f"--link-root {tmp_path}/data --link-root {tmp_path} " in flags
    assert not any("--link-root" in other.arguments for other in others)
    with pytest.raises(InvalidArgument, match="has a comma"):
        LocalOptions(tmp_path, link_roots=(Path("one,two"),))


def state_of(pid):
    member = Member("worker", "worker-1", 7, "", "", 2, "log")
    return ClusterState(pid, "127.0.0.1:1", "127.0.0.1:2", "0.1.0", 0.0, True, (member,))


def test_the_state_of_a_living_cluster_can_be_read(tmp_path):
    assert read_state(tmp_path) is None
    with lock(tmp_path):
        write_state(tmp_path, state_of(os.getpid()))
        assert read_state(tmp_path) == state_of(os.getpid())
        remove_state(tmp_path)
        assert read_state(tmp_path) is None


def test_the_file_of_a_dead_cluster_means_nothing(tmp_path):
    lock(tmp_path).close()
    write_state(tmp_path, state_of(os.getpid()))
    assert not is_locked(tmp_path)
    assert read_state(tmp_path) is None


def test_two_clusters_never_share_a_folder(tmp_path):
    with lock(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(FailedPrecondition, match="phalanx down"):
            lock(tmp_path)
    lock(tmp_path).close()


def test_clients_find_the_cluster_of_this_machine(tmp_path):
    from phalanx.sdk.discovery import resolve_addresses

    environ = {"PHALANX_STATE": str(tmp_path)}
    with lock(tmp_path):
        write_state(tmp_path, state_of(os.getpid()))
        assert resolve_addresses(None, environ) == ("127.0.0.1:1",)
    (tmp_path / "cluster.json").write_text(json.dumps({"pid": 2**22 + 1, "address": "a:1"}))
    assert resolve_addresses(None, environ) == ("127.0.0.1:7410",)


@pytest.mark.parametrize("command", ["down", "status"])
def test_without_a_cluster_there_is_nothing_to_stop_or_show(offline, command):
    outcome = offline("--timeout", "2", command)
    assert outcome.code == (3 if command == "down" else 4)
    assert "phalanx up" in outcome.err


@contextlib.contextmanager
def a_fork_that_lives():
    """Fork this program, as multiprocessing and data loaders do; the copy ends with the block."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_folder_is_free_again_although_a_fork_of_the_program_lives_on(tmp_path):
    held = lock(tmp_path)
    with a_fork_that_lives():
        unlock(held)
        assert not is_locked(tmp_path)


def test_a_fork_of_the_program_does_not_end_its_cluster():
    with LocalCluster(workers=0) as cluster:
        pid = os.fork()
        if pid == 0:
            try:
                cluster.close()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        assert cluster.state_dir.exists()
    assert not cluster.state_dir.exists()


def test_a_cluster_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in signals_that_stop()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert signal.SIGHUP in signals_that_stop()
    finally:
        signal.signal(signal.SIGHUP, before)
