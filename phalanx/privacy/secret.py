"""The secret of a private job: what its noise and the choice of its rows are made of.

Whoever knew the noise could take it off the model again, and whoever knew in which steps a row
took part would learn more of it than the accountant says. So neither is made of the spec's seed:
both come of 256 random bits. Workers, who see the rows anyway, get a key for the choice alone, from
which nothing of the noise follows.
"""

from __future__ import annotations

import hashlib
import secrets

SECRET_BYTES = 32
KEY_BYTES = 16


def new_secret() -> bytes:
    """Return the secret of a new job."""
    return secrets.token_bytes(SECRET_BYTES)


def sampler_key(secret: bytes) -> bytes:
    """Return the key by which rows are drawn; it tells nothing of the secret."""
    return hashlib.blake2b(b"sampler", digest_size=KEY_BYTES, key=secret).digest()


def noise_key(secret: bytes) -> bytes:
    """Return the key of the noise."""
    return hashlib.blake2b(b"noise", digest_size=SECRET_BYTES, key=secret).digest()
