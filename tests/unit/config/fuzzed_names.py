"""Texts that try to lead out of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

PIECES = (
    *("..", ".", "/", "//", "\\", "\0", "~", "-", "\n", ":", "@", " ", "%2e%2e", "%2f", "..%c0%af"),
    *("\u2024", "\uff0f", "\u2215", "\ufe52", "\u202e", "a", "Z", "0", "é", "etc", "f" * 62),
    *("a" * 130, ".data", "purelib", "wheels", "models", "con", "blobs"),
)
DIGITS = "0123456789abcdef"


def fuzzed_names(chance: Random, count: int) -> Iterator[str]:
    """So many texts: pieces put together, digests with something wrong, and any characters."""
    for _ in range(count):
        kind = chance.randrange(8)
        if kind < 5:
            yield "".join(chance.choices(PIECES, k=chance.randrange(1, 7)))
        elif kind < 7:
            yield _like_a_digest(chance)
        else:
            yield "".join(map(chr, chance.choices(range(0x250), k=chance.randrange(40))))


def _like_a_digest(chance: Random) -> str:
    text = "".join(chance.choices(DIGITS, k=64))
    at = chance.randrange(60)
    odd = chance.choice(("", "", "../", "/", "..", "\n", "\0", "A"))
    return text[:at] + odd + text[at + len(odd) :]
