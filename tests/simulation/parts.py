"""Parts of jobs whose workers own the parameters; see `jobs.ALL_PARTS`."""

from __future__ import annotations

from typing import Any

ALL_REDUCE: dict[str, dict[str, Any]] = {
    "all-reduce": {"all_reduce": {}},
    "all-reduce, clipped gradient": {"all_reduce": {}, "optimizer": {"clip_norm": 0.5}},
    "all-reduce, local": {
        "all_reduce": {},
        "local": {"steps": 2, "outer": {"sgd": {"learning_rate": 0.7, "momentum": 0.5}}},
    },
}
