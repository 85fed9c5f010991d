"""Phalanx: fault-tolerant training of machine-learning models on ordinary, unreliable machines.

    import phalanx

    with phalanx.LocalCluster(workers=4) as cluster:      # or phalanx.connect()
        cluster.data.add("fashion", images, labels, test=0.2)
        job = cluster.submit(phalanx.load("job.yaml"))
        result = job.wait(timeout_s=600)
        model = cluster.models.get(result.model)
    labels = model.predict(frame)

Importing this package loads neither NumPy nor gRPC; each name below is loaded when it is first
used.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phalanx.errors import IncompleteWarning as IncompleteWarning
    from phalanx.errors import PhalanxError as PhalanxError
    from phalanx.local.cluster import LocalCluster as LocalCluster
    from phalanx.sdk.cluster import Cluster as Cluster
    from phalanx.sdk.cluster import connect as connect
    from phalanx.sdk.job import Job as Job
    from phalanx.sdk.job import JobCancelled as JobCancelled
    from phalanx.sdk.job import JobFailed as JobFailed
    from phalanx.sdk.job_files import load as load
    from phalanx.sdk.values import Result as Result
    from phalanx.sdk.values import Update as Update

__version__ = "0.1.0"

# gRPC's C core writes its own unstructured lines to standard error; what matters in them is also in
# the errors that calls raise. It reads the variable once, when gRPC is first imported: whatever of
# this package imports it comes after this.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

_HOME_OF_NAME = {
    "Cluster": "phalanx.sdk.cluster",
    "IncompleteWarning": "phalanx.errors",
    "Job": "phalanx.sdk.job",
    "JobCancelled": "phalanx.sdk.job",
    "JobFailed": "phalanx.sdk.job",
    "LocalCluster": "phalanx.local.cluster",
    "PhalanxError": "phalanx.errors",
    "Result": "phalanx.sdk.values",
    "Update": "phalanx.sdk.values",
    "connect": "phalanx.sdk.cluster",
    "load": "phalanx.sdk.job_files",
}

__all__ = [
    "Cluster",
    "IncompleteWarning",
    "Job",
    "JobCancelled",
    "JobFailed",
    "LocalCluster",
    "PhalanxError",
    "Result",
    "Update",
    "__version__",
    "connect",
    "load",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF_NAME.get(name)
    if home is None:
        raise AttributeError(f"module 'phalanx' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
