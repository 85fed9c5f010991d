"""Whole clusters in one thread and in virtual time: the same seed, the same run, to the last bit.

    with environment() as made:
        world = World(seed=7)
        network = Network(world)
        made.use(world, network)
        server = world.start("control-1", lambda: serve(config, stop))
        world.run(until_s=60.0)

`loop` runs asyncio programs on a clock that jumps; `network` carries their messages, late, in
order per stream, or not at all; `rpc` and `rpc_client` stand in for `grpc.aio`; `disk` forgets
what was not synced; `clocks` gives modules virtual clocks and seeded chance; `faults` draws what
goes wrong when. The programs are the ones that ship: they cannot tell. See docs/TESTING.md.
"""

from phalanx.testing.simulation.loop import Process, World
from phalanx.testing.simulation.network import Network

__all__ = ["Network", "Process", "World"]
