"""Settings of the storage service."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from phalanx.config import TokensConfig, absolute_paths, address, at_least, option, url_of
from phalanx.errors import Violation
from phalanx.quota_file import violations_of


@dataclass(frozen=True)
class StorageConfig(TokensConfig):
    """Keeps everything that must survive: journals, leases, checkpoints, data sets and models."""

    service: ClassVar[str] = "storage"

    listen: str = option(
        "127.0.0.1:7420", "Address to serve gRPC on; port 0 takes a free one.", check=address
    )
    state: Path | None = option(
        None,
        "Folder that holds everything, or what --metadata or --blobs do not name; one storage "
        "process at a time.",
    )
    metadata: str = option(
        "",
        "Where journals, leases and the catalog are: postgresql://HOST/DATABASE; empty for SQLite "
        "in the state folder. What it does not say (PGUSER, PGPASSWORD, …) is taken from the "
        "environment.",
        check=url_of("postgresql", "postgres"),
        secret=True,
    )
    blobs: str = option(
        "",
        "Where blobs are: s3://BUCKET/PREFIX; empty for the state folder. Credentials, region and "
        "endpoint (AWS_…) are taken from the environment.",
        check=url_of("s3"),
        secret=True,
    )
    reserve_bytes: int = option(
        32 * 1024 * 1024,
        "Refuse blobs while less of the disk is free, so that journals can still be written.",
        check=at_least(0),
    )
    namespace_bytes: int = option(
        0, "Data sets and models that a namespace may have; 0: no limit.", check=at_least(0)
    )
    quotas: Path | None = option(
        None,
        "JSON file with other limits for single namespaces, the one of control; it is read again "
        "when it changes.",
        common=True,
    )
    upload_bytes: int = option(
        1024**3,
        "What one upload of a person (a chunk of a data set, a wheel) may have, where callers are "
        "known; members of the cluster have no limit. 0: nobody has.",
        check=at_least(0),
    )
    code_bytes: int = option(
        16 * 1024**3,
        "What all wheels together may have that people add (`phalanx code add`); 0: no limit.",
        check=at_least(0),
    )
    link_root: tuple[str, ...] = option(
        (),
        "Folder below which linked files may lie (`data add --link`); again for more of them. "
        "Without one, nothing can be linked.",
        check=absolute_paths,
    )
    link_processes: int = option(
        3,
        "Chunks of linked files that are made at once, each by a process; those of one data set "
        "by all processes but one.",
        check=at_least(1),
    )
    gc_grace_s: float = option(
        3600.0, "Age at which a blob that nothing refers to is garbage.", check=at_least(0)
    )
    gc_interval_s: float = option(
        600.0,
        "Time between garbage collections; 0 for none but those asked for.",
        check=at_least(0),
    )

    scrub_interval_s: float = option(
        7 * 24 * 3600.0,
        "Time in which everything stored is read once to find damage; it takes longer where "
        "--scrub-bytes-per-s says so. 0 for never.",
        check=at_least(0),
    )
    scrub_bytes_per_s: float = option(
        20e6, "Bytes of blobs that scrubbing reads in a second.", check=at_least(1)
    )

    def violations(self) -> Sequence[Violation]:
        """Return what is wrong between fields."""
        found = [*super().violations(), *violations_of(self.quotas)]
        if self.state is None and not (self.metadata and self.blobs):
            text = "is required, unless --metadata and --blobs are given"
            found.append(Violation("state", text))
        return found
