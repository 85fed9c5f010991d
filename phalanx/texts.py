"""Words of messages that depend on a number."""

from __future__ import annotations


def number_of(count: int, noun: str, plural: str = "") -> str:
    """Return the number with its noun: ``1 shard``, ``2,048 shards``, ``0 leaves``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def verb_for(count: int, one: str, many: str) -> str:
    """Return the form of a verb that goes with a number: ``is`` for 1, else ``are``."""
    return one if count == 1 else many
