"""Whether an upload is what was announced."""

from phalanx.errors import InvalidArgument


def check_upload(digest: str, size_bytes: int, expected_digest: str, expected_bytes: int) -> None:
    """Raise InvalidArgument (SIZE_MISMATCH, DIGEST_MISMATCH) if it is not.

    An expected digest of "" and a size of -1 expect nothing.
    """
    if expected_bytes not in (-1, size_bytes):
        raise InvalidArgument(
            f"{size_bytes} bytes came, not the {expected_bytes} that were announced",
            reason="SIZE_MISMATCH",
        )
    if expected_digest not in ("", digest):
        raise InvalidArgument(
            f"what came has the digest {digest}, not {expected_digest}: it was changed on its "
            "way, or the digest belongs to something else",
            reason="DIGEST_MISMATCH",
        )
