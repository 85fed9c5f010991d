"""Words of messages that depend on a number, or on how many things there are to name."""

from __future__ import annotations

from collections.abc import Sequence

_LEFT_OUT = " … "


def number_of(count: int, noun: str, plural: str = "") -> str:
    """Return the number with its noun: ``1 shard``, ``2,048 shards``, ``0 leaves``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def verb_for(count: int, one: str, many: str) -> str:
    """Return the form of a verb that goes with a number: ``is`` for 1, else ``are``."""
    return one if count == 1 else many


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return the first of the names, and how many there are where these are not all."""
    shown = ", ".join(names[:most])
    return f"{shown}, … ({len(names):,} in all)" if len(names) > most else shown


def shortened(text: str, most: int) -> str:
    """Return a text of at most so many characters: of a longer one its beginning and its end."""
    if len(text) <= most:
        return text
    end = (most - len(_LEFT_OUT)) // 2
    return f"{text[: most - len(_LEFT_OUT) - end]}{_LEFT_OUT}{text[-end:]}"
