"""The network between simulated processes: ordered pipes whose messages may be late or stuck.

A pipe is one direction of one stream. As with TCP nothing in it is lost, doubled or overtaken
while the stream lives; a blocked link keeps what is under way until it is opened again. Messages
of different streams, and of streams opened again, overtake each other freely. `Misdelivery` loses
answers, and has requests arrive late and again.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from phalanx.testing.simulation.loop import Process, World

Link = tuple[str, str]
"""Names of sender and receiver."""

LATENCY_S = (0.0001, 0.003)
_LEAST_S, _SPREAD_S = LATENCY_S[0], LATENCY_S[1] - LATENCY_S[0]


class Pipe:
    """One direction of a stream; `deliver` runs in the receiver, in order."""

    __slots__ = (
        "closed",
        "deliver",
        "exact",
        "last_s",
        "link",
        "network",
        "number",
        "owed",
        "queue",
        "receiver",
        "sender",
    )

    def __init__(
        self,
        network: Network,
        number: int,
        sender: Process,
        receiver: Process,
        deliver: Callable[[str, Any], None],
    ) -> None:
        self.network = network
        self.number = number
        self.sender = sender
        self.receiver = receiver
        self.link = (sender.name, receiver.name)
        self.deliver = deliver
        self.queue: deque[tuple[str, Any]] = deque()
        self.last_s = 0.0
        self.owed = 0
        self.closed = False
        self.exact = False
        """Whether the trace holds every byte; maps of protobuf come in any order."""

    def send(self, kind: str, content: Any = b"") -> None:
        """Send a message; a dead sender sends nothing."""
        if self.closed or not self.sender.alive:
            return
        self.push(kind, content)

    def push(self, kind: str, content: Any = b"") -> None:
        """Send on behalf of the sender's kernel, which outlives it."""
        network = self.network
        self.queue.append((kind, content))
        loop = network.loop
        arrives_s = loop.now_s + network.latency_s(self.link)
        self.last_s = max(self.last_s, arrives_s)
        loop.call_at_for(network.outside, self.last_s, self._arrives)

    def close(self) -> None:
        """Forget what is under way."""
        self.closed = True
        self.queue.clear()
        self.owed = 0
        self.network.stuck.pop(self.number, None)

    def open_again(self) -> None:
        """The link is free: what was stuck arrives."""
        owed, self.owed = self.owed, 0
        for _ in range(owed):
            self._arrives()

    def _arrives(self) -> None:
        if self.closed or not self.queue:
            return
        network = self.network
        if self.link in network.blocked or self.owed:
            if not self.owed:
                network.stuck[self.number] = self
            self.owed += 1
            return
        kind, content = self.queue.popleft()
        receiver = self.receiver
        if receiver.alive:
            network.delivered += 1
            network.loop.interrupt(receiver, self._deliver, kind, content)

    def _deliver(self, kind: str, content: Any) -> None:
        if self.closed:
            return
        data = b""
        if isinstance(content, bytes):
            data = content if self.exact else len(content).to_bytes(4, "little")
        self.network.world.note(self.number, kind.encode() + data)
        self.deliver(kind, content)


class Misdelivery:
    """Calls with one request that go otherwise than they should, in one of three ways.

    - *lost*: it is carried out, and the connection breaks before the answer arrives;
    - *late*: the connection breaks at once; yet the request arrives, after others sent since;
    - *twice*: it arrives again later on, from something that sends again what was answered.

    With `method` only calls of this one do.
    """

    KINDS = ("lost", "late", "twice")

    def __init__(
        self, chance: random.Random, share: float, latest_s: float = 3.0, method: str = ""
    ) -> None:
        self._chance = chance
        self._share = share
        self._latest_s = latest_s
        self._method = method

    def draw(self, path: str) -> str:
        """What happens to the next call, one of this path; empty: nothing."""
        if self._method and not path.endswith(f"/{self._method}"):
            return ""
        if self._chance.random() >= self._share:
            return ""
        return self._chance.choice(self.KINDS)

    def delay_s(self) -> float:
        """After which time a request arrives that is late, or comes again."""
        return self._chance.uniform(0.0, self._latest_s)


class Network:
    """Who can reach whom, and how fast."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.loop = world.loop
        self.outside = world.outside
        self._random = world.jitter.random
        self.blocked: set[Link] = set()
        self.slow: dict[Link, float] = {}
        self.stuck: dict[int, Pipe] = {}
        self.misdelivery: Misdelivery | None = None
        """What becomes of calls with one request; None: what should."""
        self.misdelivered: Counter[str] = Counter()
        """How many calls went so, by kind."""
        self.delivered = 0
        self.servers: dict[str, Any] = {}
        """Address → server, see `rpc`."""
        self.calls: dict[int, Any] = {}
        """Open calls by number, see `rpc`."""
        self.calls_made = 0
        self._pipes = 0

    def pipe(self, sender: Process, receiver: Process, deliver: Callable[[str, Any], None]) -> Pipe:
        """A new direction of a stream."""
        self._pipes += 1
        return Pipe(self, self._pipes, sender, receiver, deliver)

    def latency_s(self, link: Link) -> float:
        """How long the next message takes."""
        latency_s = _LEAST_S + self._random() * _SPREAD_S
        return latency_s * self.slow.get(link, 1.0) if self.slow else latency_s

    def is_blocked(self, first: str, second: str) -> bool:
        """Whether a connection between two processes cannot be made."""
        return (first, second) in self.blocked or (second, first) in self.blocked

    def block(self, links: Iterable[Link]) -> None:
        """Let nothing pass on these links."""
        for link in links:
            self.blocked.add(link)

    def unblock(self, links: Iterable[Link]) -> None:
        """Let what is stuck on these links arrive, link by link in the order given."""
        for link in links:
            self.blocked.discard(link)
            for pipe in [each for each in self.stuck.values() if each.link == link]:
                self.stuck.pop(pipe.number, None)
                pipe.open_again()

    def heal(self) -> None:
        """Make everything work again; what is late arrives nevertheless."""
        self.misdelivery = None
        self.slow.clear()
        self.unblock(sorted(self.blocked))

    def reset(self, first: str, second: str) -> int:
        """Break the connections between two processes; returns how many calls that broke."""
        broken = [
            call
            for call in self.calls.values()
            if {call.client.name, call.server.name} == {first, second}
        ]
        for call in broken:
            call.break_off()
        return len(broken)
