"""What happens in directed scenarios and in part of the swarm, besides the faults that are drawn.

Some of it is never healed: the work must end without whoever it struck.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from tests.simulation.cluster import Cluster
from tests.simulation.oracle import Oracle

SHARE = 0.15
"""Part of the swarm's runs that have a script, too."""

QUIET_SHARE = 0.05
"""Of half of those: most faults would break the streams, or end the processes, that must last."""

LAGS_S = 4.0
CONVERGES_S = 150.0
"""Where something is never healed, jobs wait for it again and again."""
MEETS_S = 3.0
RETURNS_S = 11.0
AWAY_S = 6.0
ORPHANS_EVERY_S = 0.4
ROTTEN_S = 0.5
DEAF_S, DEAF_EVERY_S = 1.95, 4.65
"""So long no member takes its session for dead: that takes four heartbeats without an answer. Each
time heartbeats are at another moment."""
UNHEARD_S = 4.0
FULL_S = 7.0
TURN_S = 2.5
HEARTBEAT_S = 0.5
_SPOILT_CHECKPOINTS = "UPDATE checkpoints SET manifest = x'00' WHERE whole = 1 AND final = 0"
_SPOILT_JOBS = "UPDATE jobs SET term = term + 1"


def drawn(settings: Any, chance: random.Random) -> Any:
    """The settings of a run of the swarm, in some of which something lasts, too."""
    possible = []
    if settings.workers > 1 and not settings.mixed:  # somebody is left who has the job's bits
        possible += ["stopped_worker", "stuck_payloads", "others_leave_a_laggard"]
        possible += ["dies_between_ranges"] * (settings.aggregators > 1)
    if settings.controls > 1:
        possible.append("two_leaders")
    if settings.script or not settings.lasting or not possible or chance.random() >= SHARE:
        return settings
    script, begins_s = chance.choice(possible), chance.uniform(0.5, 3.0)
    share = chance.choice([settings.share, QUIET_SHARE])
    faults_s = settings.faults_s
    if script == "two_leaders":
        faults_s = max(faults_s, begins_s + RETURNS_S + 1.0)
    return replace(
        settings,
        script=script,
        script_s=begins_s,
        faults_s=faults_s,
        share=share,
        converges_s=CONVERGES_S,
    )


def play(cluster: Cluster, name: str, oracle: Oracle, begins_s: float) -> None:
    """Plan a script; nothing is planned for an empty name."""
    if name:
        first = cluster.workers[0]
        begin = {
            "stopped_worker": lambda: _stop(cluster, first),
            "stuck_payloads": lambda: _cut(cluster, first),
            "others_leave_a_laggard": lambda: _lag(cluster, first),
            "dies_between_ranges": lambda: _die(cluster, oracle, first),
            "two_leaders": lambda: _part(cluster, oracle),
            "few_verifiers": lambda: _shrink(cluster),
            "workers_gone": lambda: cluster.lose(cluster.workers[:-1]),
            "checkpoints_rot": lambda: _rot(cluster, _SPOILT_CHECKPOINTS),
            "job_rots": lambda: _rot(cluster, _SPOILT_JOBS),
            "leaf_servers_die": lambda: _orphan(cluster),
            "disk_full": lambda: _fill(cluster),
            "leaders_die": lambda: _take_turns(cluster, oracle),
            "deaf_leader": lambda: _deafen(cluster, oracle),
            "unheard_aggregators": lambda: _part_from_aggregators(cluster, oracle),
            "hangs_at_once": lambda: cluster.machines.hung.add(first),
            "aggregators_gone": lambda: cluster.lose(cluster.aggregators[:-1]),
        }[name]
        cluster.world.at(begins_s, begin)


def _stop(cluster: Cluster, name: str) -> None:
    """A worker is stopped with all its sockets open, for good."""
    cluster.lost.add(name)
    if cluster.is_alive(name):
        cluster.world.pause(cluster.alive[name])


def _cut(cluster: Cluster, name: str) -> None:
    """What a worker computes never reaches an aggregator; control hears that it is well."""
    cluster.cut += [(name, aggregator) for aggregator in cluster.aggregators]
    cluster.network.block(cluster.cut)


def _lag(cluster: Cluster, name: str) -> None:
    """A worker is stopped for some versions; soon after it goes on the others are gone for good."""
    world = cluster.world
    if not cluster.is_alive(name):
        return
    process = cluster.alive[name]
    world.pause(process)
    world.at(world.now_s + LAGS_S, lambda: world.resume(process))
    world.at(world.now_s + LAGS_S + 0.5, lambda: cluster.lose(cluster.workers[1:]))


def _shrink(cluster: Cluster) -> None:
    """For a while there are too few honest workers to agree on anything."""
    name = cluster.workers[-1]
    if cluster.is_alive(name):
        cluster.kill(name)
    cluster.world.at(cluster.world.now_s + AWAY_S, lambda: cluster.ensure(name))


def _rot(cluster: Cluster, spoil: str) -> None:
    """Rows of storage lose some bits, and then whoever has the parameters is gone."""
    cluster.storage_machine.connection.execute(spoil)
    for name in cluster.aggregators:
        if cluster.is_alive(name):
            cluster.kill(name)
        cluster.world.at(cluster.world.now_s + ROTTEN_S, lambda name=name: cluster.ensure(name))


def _orphan(cluster: Cluster) -> None:
    """Again and again the processes that start leaf processes are killed, one after another."""
    world = cluster.world
    if cluster.healed:
        return
    for number, name in enumerate(cluster.workers):
        world.at(
            world.now_s + number * ORPHANS_EVERY_S, lambda name=name: _end_server(cluster, name)
        )
    world.at(world.now_s + len(cluster.workers) * ORPHANS_EVERY_S, lambda: _orphan(cluster))


def _fill(cluster: Cluster) -> None:
    """For longer than any append is waited for, storage answers that its disk is full."""
    disk = cluster.storage_machine.disk
    disk.full = True

    def end() -> None:
        disk.full = False

    cluster.world.at(cluster.world.now_s + FULL_S, end)


def _take_turns(cluster: Cluster, oracle: Oracle) -> None:
    """Again and again the leader is killed; it is back once another one leads."""
    name, world = oracle.leader(), cluster.world
    if not cluster.healed:
        if cluster.is_alive(name):
            cluster.kill(name)
        world.at(world.now_s + TURN_S, lambda: cluster.ensure(name))
        world.at(world.now_s + 2 * TURN_S, lambda: _take_turns(cluster, oracle))


def _cut_for(cluster: Cluster, leader: str, members: list[str], for_s: float) -> None:
    """Nothing passes between control's leader and some members; all else works."""
    world, network = cluster.world, cluster.network
    links = [link for each in members for link in ((each, leader), (leader, each))]
    network.block(links)
    world.at(world.now_s + for_s, lambda: network.unblock(links))


def _deafen(cluster: Cluster, oracle: Oracle) -> None:
    """Again and again the leader hears nobody for almost as long as its members wait for it."""
    world, network, leader = cluster.world, cluster.network, oracle.leader()
    members = [*cluster.workers, *cluster.aggregators]
    # Sessions that are opened one by one have their heartbeats at different moments.
    apart_s = HEARTBEAT_S / len(members)
    for number, name in enumerate(members):
        world.at(world.now_s + number * apart_s, lambda name=name: network.reset(name, leader))

    def cut() -> None:
        if not cluster.healed:
            _cut_for(cluster, leader, members, DEAF_S)
            world.at(world.now_s + DEAF_EVERY_S, cut)

    world.at(world.now_s + DEAF_EVERY_S - DEAF_S, cut)


def _part_from_aggregators(cluster: Cluster, oracle: Oracle) -> None:
    """The leader hears of no aggregator for longer than a lease, and of all workers."""
    _cut_for(cluster, oracle.leader(), cluster.aggregators, UNHEARD_S)


def _end_server(cluster: Cluster, name: str) -> None:
    if cluster.is_alive(name):
        cluster.world.run_as(cluster.alive[name], lambda: cluster.machines.end_leaf_server(name))


def _die(cluster: Cluster, oracle: Oracle, name: str) -> None:
    """A worker has delivered to one range and not to another, and is gone for good."""
    link = (name, cluster.aggregators[-1])
    cluster.network.block([link])

    def die() -> None:
        cluster.network.reset(*link)
        cluster.network.unblock([link])
        cluster.lose([name])

    oracle.moments.wait("range_ahead", die)


def _part(cluster: Cluster, oracle: Oracle) -> None:
    """A leader without storage leads on; members that have met its successor come back to it."""
    world, network = cluster.world, cluster.network
    old = oracle.leader()
    members = [*cluster.workers, *cluster.aggregators]
    links = [link for member in members for link in ((member, old), (old, member))]
    network.block([(old, "storage"), ("storage", old)])

    def leave() -> None:
        network.block(links)
        for member in members:
            network.reset(member, old)

    def come_back() -> None:
        network.unblock(links)
        for name in cluster.controls:
            if name != old and cluster.is_alive(name):
                cluster.kill(name)

    world.at(world.now_s + MEETS_S, leave)
    world.at(world.now_s + RETURNS_S, come_back)
