"""What the simulator's jobs are composed of: the `train` documents that are drawn, by name."""

from __future__ import annotations

from typing import Any

PARTS: dict[str, dict[str, Any]] = {
    "": {},
    "median": {"reduction": {"median": {}}},
    "trimmed mean": {"reduction": {"trimmed_mean": {"trim": 1}}},
    "krum": {"reduction": {"krum": {"faulty": 0, "keep": 2}}},
    "clip": {"reduction": {"clip_norm": 9.0}},
    "bfloat16": {"compression": {"cast_to": "bfloat16"}},
    "int8": {"compression": {"int8": {"bucket": 16}}},
    "float16, down too": {"compression": {"cast_to": "float16", "down_cast_to": "float16"}},
    "top-k": {"compression": {"top_k": {"fraction": 0.2}}},
    "top-k, down bfloat16, local": {
        "compression": {"top_k": {"fraction": 0.05}, "down_cast_to": "bfloat16"},
        "local": {"steps": 2, "outer": {"sgd": {"learning_rate": 0.7, "momentum": 0.5}}},
    },
    "sign": {"compression": {"sign": {}}},
    "clipped gradient": {"optimizer": {"clip_norm": 0.5}},
    "int8, krum": {
        "compression": {"int8": {"bucket": 16}, "down_cast_to": "bfloat16"},
        "reduction": {"krum": {"faulty": 0, "keep": 2}},
    },
    "local": {"local": {"steps": 3, "outer": {"sgd": {"learning_rate": 1.0}}}},
    "local, outer momentum": {
        "local": {"steps": 2, "outer": {"sgd": {"learning_rate": 0.7, "momentum": 0.5}}}
    },
    "local, int8, median": {
        "local": {"steps": 2, "outer": {"sgd": {"learning_rate": 1.0}}},
        "compression": {"int8": {"bucket": 16}},
        "reduction": {"median": {}},
    },
    "1 backup": {"synchronous": {"backup_shards": 1}},
    "2 backups, bfloat16": {
        "synchronous": {"backup_shards": 2},
        "compression": {"cast_to": "bfloat16"},
    },
    "1 backup, clip": {"synchronous": {"backup_shards": 1}, "reduction": {"clip_norm": 9.0}},
}
"""What jobs are composed of besides the tree and vectors as they are."""

STATEFUL = ("sign", "top-k", "top-k, down bfloat16, local")  # whose nodes have a state

INNER: dict[str, dict[str, Any]] = {
    "local, inner state": {
        "local": {"steps": 4, "outer": {"sgd": {"learning_rate": 0.7, "momentum": 0.5}}}
    },
    "local, inner state, median": {
        "local": {"steps": 4, "outer": {"sgd": {"learning_rate": 1.0}}},
        "reduction": {"median": {}},
    },
    "local, inner state, top-k": {
        "local": {"steps": 4, "outer": {"sgd": {"learning_rate": 1.0}}},
        "compression": {"top_k": {"fraction": 0.2}, "down_cast_to": "float16"},
    },
    "local, inner state, 12 steps": {
        "local": {"steps": 12, "outer": {"sgd": {"learning_rate": 1.0}}}
    },
}
"""Parts of jobs whose shards' own optimizers remember their steps."""

ONE_BY_ONE: dict[str, dict[str, Any]] = {
    "asynchronous": {"asynchronous": {"plain": {}}},
    "asynchronous, log": {"asynchronous": {"scaled": {}, "replay_log": True}},
    "asynchronous, barrier": {"asynchronous": {"scaled": {}, "barrier_every_clocks": 5}},
    "asynchronous, int8, clipped gradient": {
        "asynchronous": {"plain": {}},
        "compression": {"int8": {"bucket": 16}, "down_cast_to": "bfloat16"},
        "optimizer": {"clip_norm": 0.5},
    },
    "delay compensated, log": {
        "asynchronous": {"delay_compensated": {"strength": 0.5}, "replay_log": True}
    },
    "stale 1": {"stale": {"bound": 1, "replay_log": True}},
    "stale 3, bfloat16": {"stale": {"bound": 3}, "compression": {"cast_to": "bfloat16"}},
}
"""Parts of jobs whose contributions commit one by one."""

VERIFIED: dict[str, dict[str, Any]] = {
    "3 replicas": {"verification": {"replicas": 3}},
    "3 replicas, int8, median": {
        "verification": {"replicas": 3},
        "compression": {"int8": {"bucket": 16}},
        "reduction": {"median": {}},
    },
    "3 replicas, local": {
        "verification": {"replicas": 3},
        "local": {"steps": 2, "outer": {"sgd": {"learning_rate": 1.0}}},
    },
    "audit": {"verification": {"audit_fraction": 0.3}},
}
"""The same for jobs whose contributions are compared: these need enough workers."""

ALL_REDUCE: dict[str, dict[str, Any]] = {
    "all-reduce": {"all_reduce": {}},
    "all-reduce, clipped gradient": {"all_reduce": {}, "optimizer": {"clip_norm": 0.5}},
    "all-reduce, local": {
        "all_reduce": {},
        "local": {"steps": 2, "outer": {"sgd": {"learning_rate": 0.7, "momentum": 0.5}}},
    },
}
"""Parts of jobs whose workers own the parameters."""

PRIVATE: dict[str, dict[str, Any]] = {
    "private": {"privacy": {"clip_norm": 1.0, "noise_multiplier": 0.5, "delta": 1e-5}},
    "private, 3 replicas": {
        "privacy": {"clip_norm": 2.0, "noise_multiplier": 0.25, "delta": 1e-5},
        "verification": {"replicas": 3},
    },
}
"""Parts of jobs whose rows come by chance and whose steps have noise."""

UPDATING: dict[str, dict[str, Any]] = {
    "k-means": {"model": {"k_means": {"clusters": 3}}},
    "boosting": {
        "model": {
            "boosting": {
                "trees": 8,
                "learning_rate": 0.3,
                "depth": 2,
                "bins": 4,
                "l2": 1.0,
                "min_leaf_rows": 1,
            }
        },
    },
    "cocoa": {"model": {"linear_svm": {}}, "optimizer": {"cocoa": {}}},
    "cocoa, 3 replicas": {
        "model": {"linear_svm": {}},
        "optimizer": {"cocoa": {}},
        "verification": {"replicas": 3},
    },
    "columns": {},
    "columns, clipped gradient": {"optimizer": {"clip_norm": 0.5}},
    "columns, 3 replicas": {"verification": {"replicas": 3}},
}
"""Parts of jobs whose versions no elementwise optimizer makes, see `updating`; of columns also that
their shards are groups of these, which `data` says."""

ALL_PARTS = PARTS | INNER | ONE_BY_ONE | VERIFIED | ALL_REDUCE | PRIVATE | UPDATING
