"""The keys of a cluster on one machine, in its state folder."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from phalanx.files import replace_content
from phalanx.keys import tokens
from phalanx.keys.caller import CODE, Role
from phalanx.sdk.keys import CA_FILE, TOKEN_FILE

TOKENS_FILE = "tokens.json"
_ADMIN = "admin"
_RENEWED_BEFORE = timedelta(days=30)


def make_keys(folder: Path) -> None:
    """Make what is missing: an authority, certificates, and a token for whoever owns the folder.

    Certificates that end soon are made anew. Raises FailedPrecondition.
    """
    # It is large, and only this needs it.
    from phalanx.keys import folder as keys

    if not (folder / CA_FILE).exists():
        keys.init(folder)
    ends = min(issued.not_after for issued in keys.listing(folder))
    if ends < datetime.now(UTC) + _RENEWED_BEFORE:
        keys.renew(folder)
    if not (folder / TOKEN_FILE).exists():
        if (folder / TOKENS_FILE).exists() and any(
            entry.name == _ADMIN for entry in tokens.entries_of(folder / TOKENS_FILE)
        ):
            tokens.revoke(folder / TOKENS_FILE, _ADMIN)
        token = tokens.create(folder / TOKENS_FILE, _ADMIN, Role.ADMIN, permissions=[CODE])
        replace_content(folder / TOKEN_FILE, f"{token}\n".encode(), mode=0o600)
