"""The tables, as a list of migrations: number n leads from version n to n + 1.

A migration that was released is never edited; a change is a new one at the end. Each runs in one
transaction together with the new version number.
"""

import sqlite3

from phalanx.errors import FailedPrecondition
from storage.backends.sql.rows import row_checksum

APPLICATION_ID = 0x50484C58  # "PHLX"

_FIRST = """
CREATE TABLE leases (
    name TEXT PRIMARY KEY,
    holder TEXT NOT NULL,
    token INTEGER NOT NULL,
    counter INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE streams (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    first_sequence INTEGER NOT NULL,
    next_sequence INTEGER NOT NULL
) STRICT;

CREATE TABLE records (
    stream INTEGER NOT NULL REFERENCES streams (id),
    sequence INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    payload BLOB NOT NULL,
    PRIMARY KEY (stream, sequence)
) STRICT;

CREATE TABLE jobs (
    job_id TEXT PRIMARY KEY,
    term INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- whole = 0: parts are missing. manifest: CheckpointManifest.
CREATE TABLE checkpoints (
    id INTEGER PRIMARY KEY,
    job_id TEXT NOT NULL REFERENCES jobs (job_id),
    term INTEGER NOT NULL,
    step INTEGER NOT NULL,
    final INTEGER NOT NULL,
    whole INTEGER NOT NULL,
    manifest BLOB NOT NULL,
    UNIQUE (job_id, term, step, final)
) STRICT;

-- kind: dataset or model. message: Dataset or ModelVersion.
CREATE TABLE versions (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    message BLOB NOT NULL,
    UNIQUE (kind, namespace, name, version)
) STRICT;

-- Outlives its versions, so that NAME@VERSION never comes to mean something else.
CREATE TABLE names (
    kind TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    next_version INTEGER NOT NULL,
    PRIMARY KEY (kind, namespace, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE pins (
    holder TEXT NOT NULL,
    kind TEXT NOT NULL,
    namespace TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (kind, namespace, name, version, holder)
) STRICT, WITHOUT ROWID;
CREATE INDEX pins_by_holder ON pins (holder);

-- Who names a blob. kind and owner: journal and stream id, checkpoint and job id, pin and holder;
-- dataset and model have no owner. position tells the references of one owner apart: sequence of
-- the record, id of the row.
CREATE TABLE blob_references (
    digest TEXT NOT NULL,
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (digest, kind, owner, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX blob_references_by_owner ON blob_references (kind, owner, position);

CREATE TABLE requests (
    kind TEXT NOT NULL,
    request_id TEXT NOT NULL,
    request_sha256 TEXT NOT NULL,
    response BLOB NOT NULL,
    create_s REAL NOT NULL,
    PRIMARY KEY (kind, request_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX requests_by_age ON requests (create_s);
"""

# Every row gets a checksum over all its columns (see ``rows``); row_checksum is a function of this
# program.
_SECOND = """
ALTER TABLE leases ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
UPDATE leases SET checksum =
    row_checksum('leases', name, holder, token, counter);
ALTER TABLE streams ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
UPDATE streams SET checksum =
    row_checksum('streams', name, id, first_sequence, next_sequence);
ALTER TABLE jobs ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET checksum =
    row_checksum('jobs', job_id, term);
ALTER TABLE checkpoints ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
UPDATE checkpoints SET checksum =
    row_checksum('checkpoints', job_id, term, step, final, id, whole, manifest);
ALTER TABLE blob_references ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
UPDATE blob_references SET checksum =
    row_checksum('blob_references', digest, kind, owner, position);
ALTER TABLE pins ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
UPDATE pins SET checksum =
    row_checksum('pins', kind, namespace, name, version, holder);
ALTER TABLE names ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
UPDATE names SET checksum =
    row_checksum('names', kind, namespace, name, next_version);
ALTER TABLE requests ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0;
UPDATE requests SET checksum =
    row_checksum('requests', kind, request_id, request_sha256, response, create_s);
"""

# 1: the holder has ended for good; what it pins can be deleted by force.
_THIRD = """
ALTER TABLE pins ADD COLUMN ended INTEGER NOT NULL DEFAULT 0;
UPDATE pins SET checksum =
    row_checksum('pins', kind, namespace, name, version, holder, ended);
"""

_FOURTH = """
-- One row: the time for which storage has run, in any process (see storage.core.elapsed).
CREATE TABLE elapsed (
    id INTEGER PRIMARY KEY,
    elapsed_s REAL NOT NULL,
    token TEXT NOT NULL,
    checksum INTEGER NOT NULL
) STRICT;

-- One row: which place holds the blobs (see storage.backends.sql.home).
CREATE TABLE home (
    id INTEGER PRIMARY KEY,
    place TEXT NOT NULL,
    token TEXT NOT NULL,
    settled INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) STRICT;

-- Objects of an object store. state: arriving, stored, corrupt or doomed. digest: of a blob that is
-- stored or corrupt, else empty. since_s: the elapsed time at which it was touched, or got its
-- state.
CREATE TABLE objects (
    key TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    state TEXT NOT NULL,
    since_s REAL NOT NULL,
    checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX objects_by_digest ON objects (digest) WHERE digest <> '';
CREATE INDEX objects_by_state ON objects (state, digest);
"""

_FIFTH = """
-- Who owns the ranges of a job in its term (see storage.backends.sql.owners). owners: TermOwners.
CREATE TABLE term_owners (
    job_id TEXT PRIMARY KEY,
    term INTEGER NOT NULL,
    owners BLOB NOT NULL,
    checksum INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""

MIGRATIONS: tuple[str, ...] = (_FIRST, _SECOND, _THIRD, _FOURTH, _FIFTH)


def migrate(connection: sqlite3.Connection, migrations: tuple[str, ...] = MIGRATIONS) -> None:
    """Bring the database to the newest version; raise FailedPrecondition if it is newer."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(migrations):
        raise FailedPrecondition(
            f"the state folder was written by a newer Phalanx (schema {version}; this one knows "
            f"{len(migrations)}): start that version, or choose another folder",
            reason="STATE_TOO_NEW",
        )
    connection.create_function("row_checksum", -1, row_checksum, deterministic=True)
    for number in range(version, len(migrations)):
        script = (
            f"BEGIN IMMEDIATE; {migrations[number]} PRAGMA user_version = {number + 1}; COMMIT;"
        )
        connection.executescript(script)
