"""The decisions of control: events and the time in, effects out; no clock, socket, random or file.

    core = Core(CoreConfig(), generation=7, facts=facts)
    for effect in handle(core, event, now):
        ...  # see `effects` on what must be durable before which effect

`facts` is the durable state, built only by applying journal records; everything else is rebuilt
from what members say when they connect. `invariants.check(core)` holds after every event.
"""
