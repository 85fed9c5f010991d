"""What can go wrong in a simulated cluster."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from phalanx.testing.simulation.faults import Begin, End, nothing
from phalanx.testing.simulation.network import Link
from storage.core.keys import is_digest
from tests.simulation.cluster import Cluster
from tests.simulation.moments import MOMENTS, Moments
from tests.simulation.parts import ALL_REDUCE

CLOCK_JUMP_S = 3600.0
STRIKES_SHARE = 0.4
TORN_SHARE, TORN_BETWEEN_S = 0.15, (0.0, 4.0)
"""Part of the runs in which a write is torn or lost, and when that begins to be waited for."""
DISK_KINDS = ("disk_full", "disk_failure")
ACTS = ("kill", "power_cut", "pause", "isolate", "reset")
"""What may be done to whoever is struck last in a run."""

Begun = tuple[str, End | None, float] | None


def fault_kinds() -> list[str]:
    """The name of every kind of fault."""
    nowhere: Any = SimpleNamespace(world=None, network=None)
    return list(Faults(nowhere, Moments(nowhere)).kinds())


class Faults:
    """The faults of one cluster, by kind; see `kinds`."""

    def __init__(self, cluster: Cluster, moments: Moments) -> None:
        self.cluster = cluster
        self.moments = moments
        self.struck = 0
        """Processes that were struck in the act."""
        self.met = Counter(dict.fromkeys(DISK_KINDS, 0))
        """Faults of the disk that something met: those that nothing did are none."""
        self.world = cluster.world
        self.network = cluster.network
        self._hung = 0
        self._bad = 0
        self._joined = 0
        self._rotten: set[str] = set()

    def kinds(self) -> dict[str, Begin]:
        """Every kind of fault."""
        cluster = self.cluster
        return {
            "kill_worker": lambda chance: self._kill(chance, cluster.workers),
            "kill_aggregator": lambda chance: self._kill(chance, cluster.aggregators),
            "kill_control": lambda chance: self._kill(chance, cluster.controls),
            "kill_storage": lambda chance: self._kill(chance, ["storage"]),
            "pause_worker": lambda chance: self._pause(chance, cluster.workers, 5.0),
            "pause_aggregator": lambda chance: self._pause(chance, cluster.aggregators, 5.0),
            "pause_control": lambda chance: self._pause(chance, cluster.controls, 6.0),
            "pause_storage": lambda chance: self._pause(chance, ["storage"], 3.0),
            "partition": self._partition,
            "one_way_partition": self._one_way,
            "isolation": self._isolate,
            "slow_link": self._slow_link,
            "slow_worker": self._slow_worker,
            "late_payloads": self._late_payloads,
            "control_without_storage": self._part_from_storage,
            "clogged_links": self._swizzle,
            "broken_connections": self._reset,
            "disk_full": self._disk_full,
            "disk_failure": self._disk_failure,
            "bit_rot": self._rot,
            "clock_jump": self._clock_jump,
            "hung_leaf": self._hang,
            "bad_leaf": self._bad_leaf,
            "worker_joins": self._join,
            "worker_leaves": self._leave,
            "control_hands_over": self._hand_over,
            "struck_in_the_act": self._strike,
        }

    # Processes

    def _alive(self, names: list[str]) -> list[str]:
        cluster = self.cluster
        return [n for n in names if cluster.is_alive(n) and not cluster.alive[n].paused]

    def _kill(self, chance: random.Random, names: list[str]) -> Begun:
        alive = self._alive(names)
        if not alive:
            return None
        name = chance.choice(alive)
        self.cluster.kill(name)
        return f"kill {name}", lambda: self.cluster.ensure(name), chance.uniform(0.05, 2.5)

    def _power_cut(self, chance: random.Random, names: list[str]) -> Begun:
        """All of a kind are gone at once, and what they had just sent is lost with them."""
        alive = [name for name in names if self.cluster.is_alive(name)]
        calls = list(self.network.calls.values())
        pairs = {(call.client.name, call.server.name) for call in calls}
        for first, second in sorted(pairs):
            if first in alive or second in alive:
                self.network.reset(first, second)
        for name in alive:
            self.cluster.kill(name)

        def end() -> None:
            for name in alive:
                self.cluster.ensure(name)

        return (f"no power for {'+'.join(alive)}", end, chance.uniform(0.05, 2.5))

    def _pause(self, chance: random.Random, names: list[str], longest_s: float) -> Begun:
        alive = self._alive(names)
        if not alive:
            return None
        name = chance.choice(alive)
        process = self.cluster.alive[name]
        self.world.pause(process)
        return f"pause {name}", lambda: self.world.resume(process), chance.uniform(0.1, longest_s)

    # Network

    def _everyone(self) -> list[str]:
        cluster = self.cluster
        return ["storage", *cluster.controls, *cluster.aggregators, *cluster.workers]

    def _pair(self, chance: random.Random) -> tuple[str, str]:
        first, second = chance.sample(self._everyone(), 2)
        return first, second

    def _blocked(self, links: list[Link]) -> Callable[[], None]:
        self.network.block(links)
        return lambda: self.network.unblock(links)

    def _partition(self, chance: random.Random) -> Begun:
        everyone = self._everyone()
        chance.shuffle(everyone)
        cut = chance.randint(1, len(everyone) - 1)
        links = [(a, b) for a in everyone[:cut] for b in everyone[cut:]]
        links += [(b, a) for a, b in links]
        what = f"{'+'.join(everyone[:cut])} | {'+'.join(everyone[cut:])}"
        return what, self._blocked(links), chance.uniform(0.2, 5.0)

    def _one_way(self, chance: random.Random) -> Begun:
        link = self._pair(chance)
        return f"{link[0]} -/-> {link[1]}", self._blocked([link]), chance.uniform(0.2, 5.0)

    def _isolate(self, chance: random.Random) -> Begun:
        return self._cut_off(chance, self._everyone())

    def _cut_off(self, chance: random.Random, names: list[str]) -> Begun:
        name = chance.choice(names)
        links = [(name, other) for other in self._everyone() if other != name]
        links += [(b, a) for a, b in links]
        return f"nobody reaches {name}", self._blocked(links), chance.uniform(0.2, 5.0)

    def _slow_link(self, chance: random.Random) -> Begun:
        first, second = self._pair(chance)
        links = [(first, second), (second, first)]
        factor = chance.choice([10.0, 50.0, 200.0])
        self.network.slow.update(dict.fromkeys(links, factor))

        def end() -> None:
            for link in links:
                self.network.slow.pop(link, None)

        return f"{first} - {second} {factor:g} times slower", end, chance.uniform(0.3, 5.0)

    def _swizzle(self, chance: random.Random) -> Begun:
        """Clog one link after another; release them in another order."""
        everyone = self._everyone()
        links = [(a, b) for a in everyone for b in everyone if a != b and chance.random() < 0.3]
        if not links:
            return None
        now_s = self.world.now_s
        for link in links:
            self.world.at(now_s + chance.uniform(0.0, 1.0), lambda link=link: self._clog(link))
        chance.shuffle(links)
        last_s = 0.0
        for link in links:
            last_s = chance.uniform(1.0, 3.0)
            self.world.at(now_s + last_s, lambda link=link: self.network.unblock([link]))
        return f"{len(links)} links", lambda: self.network.unblock(links), 3.1

    def _clog(self, link: Link) -> None:
        if not self.cluster.healed:
            self.network.block([link])

    def _reset(self, chance: random.Random) -> Begun:
        return self._break_off(chance, ["user-1", *self._everyone()])

    def _break_off(
        self, chance: random.Random, names: list[str], pair: tuple[str, ...] = ()
    ) -> Begun:
        calls = self.network.calls.values()
        pairs = sorted({(call.client.name, call.server.name) for call in calls})
        pairs = [each for each in pairs if not {*each}.isdisjoint(names)]
        if not pairs:
            return None
        first, second = pair if pair in pairs else chance.choice(pairs)
        broken = self.network.reset(first, second)
        return f"{first} - {second}, {broken} calls", None, 0.0

    def _slow_worker(self, chance: random.Random) -> Begun:
        name = chance.choice(self.cluster.workers)
        self.cluster.slowness[name] = 10.0
        end = lambda: self.cluster.slowness.pop(name, None)  # noqa: E731
        return f"{name} is 10 times slower", end, chance.uniform(1.0, 6.0)

    def _late_payloads(self, chance: random.Random) -> Begun:
        """What a worker computes does not reach some aggregators, or, where workers own the
        parameters, some of these; everything else of it works."""
        name = chance.choice(self.cluster.workers)
        owners = self.cluster.aggregators
        if any(shape.parts in ALL_REDUCE for shape in self.cluster.settings.shapes):
            owners = [each for each in self.cluster.workers if each != name] or owners
        cut = chance.sample(owners, chance.randint(1, len(owners)))
        what = f"payloads of {name} for {'+'.join(cut)} are stuck"
        return what, self._blocked([(name, each) for each in cut]), chance.uniform(0.3, 4.0)

    def _part_from_storage(self, chance: random.Random) -> Begun:
        """A control process that everybody reaches but storage: it may lead on and decide."""
        name = chance.choice(self.cluster.controls)
        links = [(name, "storage"), ("storage", name)]
        return f"{name} without storage", self._blocked(links), chance.uniform(0.5, 7.0)

    def lie_in_wait(self, chance: random.Random) -> None:
        """In a part of the runs, be there from the beginning: some moments come only once."""
        if chance.random() < STRIKES_SHARE:
            self._strike(chance)

    def lie_in_wait_for_a_write(self, chance: random.Random) -> None:
        """In a part of the runs, cut storage's power between the write of a blob and its sync."""
        moments, world = self.moments, self.world
        self.cluster.storage_machine.on_write = partial(moments.met, "blob_written")
        if chance.random() < TORN_SHARE:
            strike = partial(self._struck, chance, "blob_written", "storage", "kill")
            world.at(chance.uniform(*TORN_BETWEEN_S), lambda: moments.wait("blob_written", strike))

    def strike_at(self, what: str, chance: random.Random) -> None:
        """Strike again and again: "MOMENT KIND ACT"; for scenarios."""
        if what and not self.cluster.healed:
            moment, kind, act = what.split()

            def strike() -> None:
                self._struck(chance, moment, kind, act)
                self.world.at(self.world.now_s + 1.0, lambda: self.strike_at(what, chance))

            self.moments.wait(moment, strike)

    def _strike(self, chance: random.Random) -> Begun:
        """Harm a process at the very moment at which it has begun something."""
        for moment in chance.sample(sorted(MOMENTS), 3):
            kind = chance.choice(MOMENTS[moment])
            act = chance.choice(["kill", "kill", "pause", "isolate", "reset"])
            plan = partial(self._struck, random.Random(chance.random()), moment, kind, act)
            self.moments.wait(moment, plan)
        return None  # it is counted when it strikes

    def _struck(self, chance: random.Random, moment: str, kind: str, act: str) -> None:
        if not self.cluster.healed:
            self.struck += self.strike(chance, moment, kind, act)

    def strike(self, chance: random.Random, moment: str, kind: str, act: str) -> bool:
        """Harm a process of a kind, rather one of those that the moment is about; was there one?"""
        cluster = self.cluster
        names = {
            "control": cluster.controls,
            "aggregator": cluster.aggregators,
            "worker": cluster.workers,
            "user": ["user-1"],
            "storage": ["storage"],
        }[kind]
        actors = self.moments.actors(moment)
        begin = {
            "kill": self._kill,
            "power_cut": self._power_cut,
            "pause": lambda chance, names: self._pause(chance, names, 5.0),
            "isolate": self._cut_off,
            "reset": partial(self._break_off, pair=actors),
            "vanish": lambda chance, names: self._power_cut(chance, [chance.choice(names)]),
        }[act if kind != "user" else "reset"]
        meant = [name for name in actors if name in names]
        begun = begin(chance, meant if meant and act != "power_cut" else names)
        if begun is None:
            return False
        what, end, after_s = begun
        self.world.say(f"FAULT struck_in_the_act: at {moment} {what} for {after_s:.2f} s")
        self.world.at(self.world.now_s + after_s, end or nothing)
        return True

    # Storage

    def _disk_full(self, chance: random.Random) -> Begun:
        disk = self.cluster.storage_machine.disk
        disk.full, before = True, disk.refused

        def end() -> None:
            disk.full = False
            self.met["disk_full"] += disk.refused > before

        return "no room on storage's disk", end, chance.uniform(0.2, 3.0)

    def _disk_failure(self, chance: random.Random) -> Begun:
        if not self._alive(["storage"]):
            return None
        disk = self.cluster.storage_machine.disk
        disk.failing, before = True, disk.failed

        def end() -> None:
            disk.failing = False
            self.met["disk_failure"] += disk.failed > before
            self.cluster.ensure("storage")

        return "the next write to storage's disk fails", end, chance.uniform(0.3, 2.0)

    def _rot(self, chance: random.Random) -> Begun:
        """Flip a bit of a checkpoint that is not the last word on its job."""
        machine = self.cluster.storage_machine
        rows = machine.connection.execute(
            "SELECT DISTINCT r.digest FROM blob_references r JOIN checkpoints c "
            "ON r.kind = 'checkpoint' AND r.position = c.id AND r.owner = c.job_id "
            "WHERE c.whole = 1 AND c.final = 0 AND c.job_id NOT IN "
            "(SELECT job_id FROM checkpoints WHERE final = 1) ORDER BY r.digest"
        ).fetchall()
        there = [name for (name,) in rows if is_digest(name) and name not in self._rotten]
        there = [name for name in there if machine.disk.read(name)]
        if not there:
            return None
        name = chance.choice(there)
        self._rotten.add(name)
        machine.disk.damage(name, chance.randrange(1 << 20))
        return f"one bit of {name[:12]}", None, 0.0

    # The rest

    def _clock_jump(self, chance: random.Random) -> Begun:
        alive = self._alive(self._everyone())
        if not alive:
            return None
        name = chance.choice(alive)
        jump_s = chance.uniform(-CLOCK_JUMP_S, CLOCK_JUMP_S)
        self.cluster.alive[name].wall_offset_ns += int(jump_s * 1e9)
        return f"the wall clock of {name} jumps by {jump_s:.0f} s", None, 0.0

    def _hang(self, chance: random.Random) -> Begun:
        alive = self._alive(self.cluster.workers)
        if self._hung or not alive:
            return None  # twice the same leaf, and the job rightly fails
        self._hung += 1
        name = chance.choice(alive)
        self.cluster.machines.hung.add(name)
        return f"a leaf of {name} hangs", None, 0.0

    def _bad_leaf(self, chance: random.Random) -> Begun:
        alive = self._alive(self.cluster.workers)
        if self._bad or not alive:
            return None
        self._bad += 1
        name = chance.choice(alive)
        self.cluster.machines.bad.add(name)
        return f"a leaf of {name} is not finite", None, 0.0

    def _join(self, chance: random.Random) -> Begun:
        if self._joined >= 2:
            return None
        self._joined += 1
        name = f"worker-{len(self.cluster.workers) + 1}"
        self.cluster.workers.append(name)
        self.cluster.start(name)
        return f"{name} joins", nothing, 0.0

    def _leave(self, chance: random.Random) -> Begun:
        return self._stop(chance, self.cluster.workers)

    def _hand_over(self, chance: random.Random) -> Begun:
        return self._stop(chance, self.cluster.controls)

    def _stop(self, chance: random.Random, names: list[str]) -> Begun:
        """End a process in good order; start it again later, at the latest when all is healed."""
        alive = self._alive(names)
        if not alive:
            return None
        name = chance.choice(alive)
        process = self.cluster.alive[name]
        self.world.run_as(process, self.cluster.stops[name].set)
        return (
            f"{name} is told to stop",
            lambda: self.cluster.ensure(name),
            chance.uniform(1.0, 4.0),
        )
