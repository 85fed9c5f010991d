"""`import phalanx` is light, and control never loads what only tensors need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
HEAVY = {"grpc", "google.protobuf", "matplotlib", "numpy", "pyarrow", "scipy", "torch", "typer"}

FORKED = """
import importlib
from phalanx.local.layout import IMPORTS as MEMBERS
from worker.leaf.server import IMPORTS
for names in (IMPORTS, *MEMBERS.values()):
    for name in names:
        importlib.import_module(name)
"""
"""What is loaded where leaf processes are forked. A fork of a process that used CUDA cannot."""


def _loaded_by(statement: str) -> set[str]:
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    return set(json.loads(_output_of(program).splitlines()[-1]))


def _output_of(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    ).stdout


@pytest.mark.parametrize(
    ("statement", "refused"),
    [
        ("import phalanx", HEAVY),
        ("import phalanx.errors, phalanx.config, phalanx.ids", HEAVY),
        ("import coordinator.control.main", {"numpy", "pyarrow", "scipy"}),
        ("import phalanx.rpc.server, phalanx.rpc.process", {"numpy", "pyarrow", "scipy"}),
        (FORKED, {"torch"}),
    ],
)
def test_heavy_modules_are_not_loaded(statement: str, refused: set[str]) -> None:
    assert _loaded_by(statement) & refused == set()


def test_a_heavy_module_would_be_seen() -> None:
    assert "numpy" in _loaded_by("import numpy") & HEAVY


@pytest.mark.parametrize(
    "module",
    ["phalanx.sdk.transport", "coordinator.control.main", "worker.main", "storage.__main__"],
)
def test_grpc_is_told_to_keep_its_own_lines_to_itself_before_it_is_loaded(module: str) -> None:
    program = f"""
import os, sys
from importlib.abc import MetaPathFinder

class Look(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_VERBOSITY"))

sys.meta_path.insert(0, Look())
import {module}, grpc
"""
    assert _output_of(program) == "NONE\n"
