"""Lists of a cluster, which may not be whole while control is cut off from storage."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from phalanx.errors import IncompleteWarning
from phalanx.sdk.backend import Backend
from phalanx.sdk.methods import Method, RequestT

ItemT = TypeVar("ItemT")
_CALLER = 3
"""Whoever called the method that asks for a list: a warning names that line."""


class Listing(list[ItemT]):
    """A list, and in ``incomplete`` why something may be missing from it; empty where nothing
    is."""

    incomplete: str = ""


class Pages(Generic[ItemT]):
    """Asks for the pages of one list."""

    def __init__(self, backend: Backend) -> None:
        self.incomplete = ""
        self._backend = backend
        self._has_asked_again = False

    def ask(self, method: Method[RequestT, Any], request: RequestT) -> Any:
        """Return one page, if any address has one of a process that knows everything, of that."""
        page = self._backend.call(method, request, accept=self._accepts)
        self.incomplete = page.incomplete or self.incomplete
        return page

    def listing(self, items: Iterable[ItemT]) -> Listing[ItemT]:
        """Return all items, with a warning to the caller's caller if some may be missing."""
        found = Listing(items)
        found.incomplete = self.incomplete
        if found.incomplete:
            warnings.warn(found.incomplete, IncompleteWarning, stacklevel=_CALLER)
        return found

    def _accepts(self, page: Any) -> bool:
        """Refuse the first page that may not be whole: the next address may be the leader's."""
        if not page.incomplete or self._has_asked_again:
            return True
        self._has_asked_again = True
        return False
