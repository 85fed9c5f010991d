"""What ties a node to that which it writes, for each method that nodes may call.

The table in docs/GUARANTEES.md is this one. A method that nodes may call and that is not here fails
a test, as one without a rule does: whoever adds it says what keeps one node from the work of
another.
"""

from __future__ import annotations

from collections.abc import Mapping

from phalanx.keys.caller import Service
from phalanx.keys.policy import RULES

LEADER = "control alone may, and its writes carry the number of its lease"
READS = "it only reads"
RESULTS = "results of tasks of a job whose range 0 is its own in the term, as control told storage"

TIES: Mapping[str, str] = {
    "DatasetService/GetDataset": READS,
    "ModelService/CreateModel": "control alone may, and a version is never written twice",
    "ModelService/GetModel": READS,
    "StorageService/PutBlob": "the content is the name: nobody can write anything else under it",
    "StorageService/GetBlob": READS,
    "StorageService/CheckBlobs": READS,
    "StorageService/ComposeBlob": "as `PutBlob`",
    "StorageService/AppendJournal": LEADER,
    "StorageService/AppendJournals": f"as `AppendJournal`; an aggregator: {RESULTS}",
    "StorageService/ReadJournal": f"{READS}; an aggregator: {RESULTS}",
    "StorageService/TruncateJournal": LEADER,
    "StorageService/DeleteJournal": LEADER,
    "StorageService/AcquireLease": "the lease's own rules: who holds it loses it by silence only",
    "StorageService/RenewLease": "the number of the lease",
    "StorageService/ReleaseLease": "the number of the lease",
    "StorageService/GetLease": READS,
    "StorageService/RaiseTerm": LEADER,
    "StorageService/GetJobRow": READS,
    "StorageService/DeleteJobRow": LEADER,
    "StorageService/CommitCheckpoint": "the range of the part is its own in the term, as control "
    "told storage",
    "StorageService/ListCheckpoints": READS,
    "StorageService/SetPins": f"as `AppendJournal`; an aggregator: {RESULTS}",
    "StorageService/ListPins": READS,
    "StorageService/CollectGarbage": "nothing that is named or young is collected, whoever asks",
    "CoordinationService/Session": "its id is its own; it is heard of jobs that this leader gave "
    "it, and of those that it brings along if it shows that they were given to it",
    "AggregationService/Exchange": "its id is its own; it shows, sealed by control or by an owner "
    "of a range, which nodes it was given in the term, and contributes nothing else; decisions of "
    "the root that it carries are sealed by that",
    "TaskService/Work": "its id is its own, and it shows that it was given the job in the term; "
    "results count of attempts that were handed to it",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": READS,
}


def node_methods() -> list[str]:
    """Return the methods that nodes may call, as they are named here."""
    return [_short(path) for path, rule in RULES.items() if rule.nodes and not rule.public]


def table() -> str:
    """Return the table of the documentation."""
    rows = ["| Method | Nodes | What ties the caller to what it writes |", "|---|---|---|"]
    for path, rule in RULES.items():
        if rule.nodes and not rule.public:
            nodes = ", ".join(service for service in Service if service in rule.nodes)
            name = _short(path)
            rows.append(f"| `{name.rpartition('.')[2]}` | {nodes} | {TIES[name]} |")
    return "\n".join(rows)


def _short(path: str) -> str:
    return path.removeprefix("phalanx.v1.")
