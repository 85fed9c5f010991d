"""Pages of lists: a token is the place after which the next page begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from phalanx.errors import InvalidArgument, Violation

SIZE_DEFAULT = 100
SIZE_MAX = 1000

ItemT = TypeVar("ItemT")


class Page:
    """One page of a list that is ordered by (number, name). Raises InvalidArgument."""

    def __init__(self, size: int, token: str) -> None:
        if size < 0:
            message = "must not be negative"
            raise InvalidArgument(
                f"page_size {message}", violations=[Violation("page_size", message)]
            )
        self._size = min(size or SIZE_DEFAULT, SIZE_MAX)
        self._after = _parse(token) if token else None

    def take(
        self, items: Iterable[ItemT], key: Callable[[ItemT], tuple[int, str]]
    ) -> tuple[list[ItemT], str]:
        """Return the items of this page and the token of the next, empty if this is the last."""
        ordered = sorted(items, key=key)
        if self._after is not None:
            ordered = [item for item in ordered if key(item) > self._after]
        taken = ordered[: self._size]
        if len(ordered) <= self._size:
            return taken, ""
        number, name = key(taken[-1])
        return taken, f"{number}:{name}"


def _parse(token: str) -> tuple[int, str]:
    number, colon, name = token.partition(":")
    try:
        if colon:
            return int(number), name
    except ValueError:
        pass
    message = "is not a token of this list; begin again without it"
    raise InvalidArgument(f"page_token {message}", violations=[Violation("page_token", message)])
