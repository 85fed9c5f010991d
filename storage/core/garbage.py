"""Which blobs are garbage.

A blob is kept while anything names it: the manifest of a data set, a model, a checkpoint or a part
of one that is not whole yet, a pin, or any record of any journal. A young blob is kept in any case,
since its uploader has not yet had the time to name it.

References are found by their looks: 64 lower-case hexadecimal digits. What is no digest of a stored
blob does no harm, and no producer of manifests or records can forget to declare one.
"""

import re

_RUN = re.compile(rb"[0-9a-f]{64,}")
_DIGITS = 64
_LONG_RUN = 4 * _DIGITS


def find_digests(data: bytes) -> frozenset[str]:
    """Return everything in ``data`` that may be a blob's digest.

    Neighbouring bytes of a binary record can look like digits, so every window of a run counts;
    runs of more than 256 digits are no field with a neighbour but digests one after another, and
    count every 64 digits.
    """
    found: set[str] = set()
    for match in _RUN.finditer(data):
        run = match.group().decode("ascii")
        stride = 1 if len(run) <= _LONG_RUN else _DIGITS
        found.update(run[at : at + _DIGITS] for at in range(0, len(run) - _DIGITS + 1, stride))
        found.add(run[-_DIGITS:])
    return frozenset(found)


def is_old_enough(age_s: float, grace_s: float) -> bool:
    """Say whether an unnamed blob may go; one from the future (a clock set back) may not."""
    return age_s >= grace_s
