"""Whom control takes for lost since nothing was heard of them, and when it heard nobody at all."""

from __future__ import annotations

from typing import Any

from coordinator.control.core import membership
from phalanx.testing.simulation.clocks import Environment
from tests.simulation.oracle import LEASE_TTL_S, Oracle

FEW = 3
"""Of fewer members nobody can say whose fault it is that they are silent."""


class Silence:
    """What silence made of the members of one run."""

    def __init__(self, oracle: Oracle, *, loses_nobody: bool) -> None:
        self.lost = 0
        """Members that were taken for lost since they were silent."""
        self.deaf = 0
        """Times at which a leader of enough members came to hear none of them."""
        self._oracle = oracle
        self._loses_nobody = loses_nobody
        self._is_deaf: dict[int, bool] = {}

    def _declares(self, member: Any) -> None:
        self.lost += 1
        name = self._oracle.world.loop.current.name
        self._oracle.demand(
            not self._loses_nobody, f"{name} takes {member.id} for lost, which was only unheard"
        )

    def _looks(self, core: Any) -> None:
        heard_s = [member.heard_s for member in core.sessions.values()]
        silent_s = core.now.monotonic_s - max(heard_s, default=core.now.monotonic_s)
        deaf = len(heard_s) >= FEW and silent_s > LEASE_TTL_S / 2
        self.deaf += deaf and not self._is_deaf.get(core.generation, False)
        self._is_deaf[core.generation] = deaf

    def install(self, environment: Environment) -> None:
        """Look at what control makes of silence."""
        declare_lost, check_silence = membership._declare_lost, membership.check_silence

        def declaring(core: Any, member: Any) -> None:
            self._declares(member)
            declare_lost(core, member)

        def checking(core: Any) -> None:
            self._looks(core)
            check_silence(core)

        environment.replace(membership, "_declare_lost", declaring)
        environment.replace(membership, "check_silence", checking)
