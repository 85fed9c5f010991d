"""The tables in PostgreSQL, as a list of migrations: number n leads from version n to n + 1.

They are those of ``storage.backends.sqlite.schema``. A migration that was released is never edited;
a change is a new one at the end. All that are missing run in one transaction together with the new
version number, in the first replica that starts; the others wait for it. Replicas of the version
before go on meanwhile, so a migration only adds what they can do without.

Texts are compared byte by byte, whatever the locale of the database.
"""

from phalanx.errors import FailedPrecondition
from storage.backends.postgres.connection import PostgresConnection

MIGRATION_LOCK = 0x5048_4C58_0001
"""Number of the advisory lock that one migrating process holds."""

_FIRST = """
CREATE TABLE leases (
    name TEXT COLLATE "C" PRIMARY KEY,
    holder TEXT COLLATE "C" NOT NULL,
    token BIGINT NOT NULL,
    counter BIGINT NOT NULL,
    checksum BIGINT NOT NULL
);

CREATE TABLE streams (
    id BIGINT PRIMARY KEY,
    name TEXT COLLATE "C" NOT NULL UNIQUE,
    first_sequence BIGINT NOT NULL,
    next_sequence BIGINT NOT NULL,
    checksum BIGINT NOT NULL
);

CREATE TABLE records (
    stream BIGINT NOT NULL REFERENCES streams (id),
    sequence BIGINT NOT NULL,
    checksum BIGINT NOT NULL,
    payload BYTEA NOT NULL,
    PRIMARY KEY (stream, sequence)
);

CREATE TABLE jobs (
    job_id TEXT COLLATE "C" PRIMARY KEY,
    term BIGINT NOT NULL,
    checksum BIGINT NOT NULL
);

-- whole = 0: parts are missing. manifest: CheckpointManifest.
CREATE TABLE checkpoints (
    id BIGINT PRIMARY KEY,
    job_id TEXT COLLATE "C" NOT NULL REFERENCES jobs (job_id),
    term BIGINT NOT NULL,
    step BIGINT NOT NULL,
    final BIGINT NOT NULL,
    whole BIGINT NOT NULL,
    manifest BYTEA NOT NULL,
    checksum BIGINT NOT NULL,
    UNIQUE (job_id, term, step, final)
);

-- kind: dataset or model. message: Dataset or ModelVersion.
CREATE TABLE versions (
    id BIGINT PRIMARY KEY,
    kind TEXT COLLATE "C" NOT NULL,
    namespace TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    version BIGINT NOT NULL,
    checksum BIGINT NOT NULL,
    message BYTEA NOT NULL,
    UNIQUE (kind, namespace, name, version)
);

-- Outlives its versions, so that NAME@VERSION never comes to mean something else.
CREATE TABLE names (
    kind TEXT COLLATE "C" NOT NULL,
    namespace TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    next_version BIGINT NOT NULL,
    checksum BIGINT NOT NULL,
    PRIMARY KEY (kind, namespace, name)
);

CREATE TABLE pins (
    holder TEXT COLLATE "C" NOT NULL,
    kind TEXT COLLATE "C" NOT NULL,
    namespace TEXT COLLATE "C" NOT NULL,
    name TEXT COLLATE "C" NOT NULL,
    version BIGINT NOT NULL,
    -- 1: the holder has ended for good; what it pins can be deleted by force.
    ended BIGINT NOT NULL,
    checksum BIGINT NOT NULL,
    PRIMARY KEY (kind, namespace, name, version, holder)
);
CREATE INDEX pins_by_holder ON pins (holder);

-- Who names a blob; see the other schema.
CREATE TABLE blob_references (
    digest TEXT COLLATE "C" NOT NULL,
    kind TEXT COLLATE "C" NOT NULL,
    owner TEXT COLLATE "C" NOT NULL,
    position BIGINT NOT NULL,
    checksum BIGINT NOT NULL,
    PRIMARY KEY (digest, kind, owner, position)
);
CREATE INDEX blob_references_by_owner ON blob_references (kind, owner, position);

CREATE TABLE requests (
    kind TEXT COLLATE "C" NOT NULL,
    request_id TEXT COLLATE "C" NOT NULL,
    request_sha256 TEXT COLLATE "C" NOT NULL,
    response BYTEA NOT NULL,
    create_s DOUBLE PRECISION NOT NULL,
    checksum BIGINT NOT NULL,
    PRIMARY KEY (kind, request_id)
);
CREATE INDEX requests_by_age ON requests (create_s);

-- One row: the time for which storage has run, in any process (see storage.core.elapsed).
CREATE TABLE elapsed (
    id BIGINT PRIMARY KEY,
    elapsed_s DOUBLE PRECISION NOT NULL,
    token TEXT COLLATE "C" NOT NULL,
    checksum BIGINT NOT NULL
);

-- Which place holds the blobs (see storage.backends.sql.home).
CREATE TABLE home (
    id BIGINT PRIMARY KEY,
    place TEXT COLLATE "C" NOT NULL,
    token TEXT COLLATE "C" NOT NULL,
    settled BIGINT NOT NULL,
    checksum BIGINT NOT NULL
);

-- Objects of an object store. state: arriving, stored, corrupt or doomed. digest: of a blob that is
-- stored or corrupt, else empty. since_s: the elapsed time at which it was touched, or got its
-- state.
CREATE TABLE objects (
    key TEXT COLLATE "C" PRIMARY KEY,
    digest TEXT COLLATE "C" NOT NULL,
    size_bytes BIGINT NOT NULL,
    state TEXT COLLATE "C" NOT NULL,
    since_s DOUBLE PRECISION NOT NULL,
    checksum BIGINT NOT NULL
);
CREATE UNIQUE INDEX objects_by_digest ON objects (digest) WHERE digest <> '';
CREATE INDEX objects_by_state ON objects (state, digest);

-- The last transaction of each process that writes, by which it finds out what became of it.
CREATE TABLE outcomes (
    writer TEXT COLLATE "C" PRIMARY KEY,
    token TEXT COLLATE "C" NOT NULL
);
"""

_SECOND = """
-- Who owns the ranges of a job in its term (see storage.backends.sql.owners). owners: TermOwners.
CREATE TABLE term_owners (
    job_id TEXT COLLATE "C" PRIMARY KEY,
    term BIGINT NOT NULL,
    owners BYTEA NOT NULL,
    checksum BIGINT NOT NULL
);
"""

MIGRATIONS: tuple[str, ...] = (_FIRST, _SECOND)


def migrate(connection: PostgresConnection, migrations: tuple[str, ...] = MIGRATIONS) -> None:
    """Bring the database to the newest version, inside the caller's transaction.

    Raises FailedPrecondition (STATE_TOO_NEW) if it is newer.
    """
    connection.execute("SELECT pg_advisory_xact_lock(?)", (MIGRATION_LOCK,))
    connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version BIGINT NOT NULL)")
    row = connection.execute("SELECT max(version) FROM schema_version").fetchone()
    version = row[0] or 0
    if version > len(migrations):
        raise FailedPrecondition(
            f"the database was written by a newer Phalanx (schema {version}; this one knows "
            f"{len(migrations)}): start that version, or choose another database",
            reason="STATE_TOO_NEW",
        )
    if version == len(migrations):
        return
    for migration in migrations[version:]:
        connection.run_script(migration)
    connection.execute("DELETE FROM schema_version")
    connection.execute("INSERT INTO schema_version VALUES (?)", (len(migrations),))
