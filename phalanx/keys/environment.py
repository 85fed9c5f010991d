"""What processes that run other people's code, or read their files, get of an environment."""

from __future__ import annotations

from collections.abc import Mapping

SECRETS = frozenset(
    {
        *("PGPASSWORD", "PGPASSFILE", "PGSERVICEFILE", "PGSSLKEY", "PGSSLPASSWORD"),
        *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
        *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
        *("AWS_CONTAINER_AUTHORIZATION_TOKEN", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
        "PHALANX_TOKEN_FILE",
        # An URL may have the password of a database in it.
        *("PHALANX_METADATA", "PHALANX_STORAGE_METADATA"),
    }
)
"""Variables that are secrets of storage or of a person, or say where those are."""


def without_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without them."""
    return {name: value for name, value in environ.items() if name not in SECRETS}
