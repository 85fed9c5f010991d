"""The benchmarks' output is theirs: gRPC's own lines stay out of it."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_VERBOSITY"))

os.environ.pop("GRPC_VERBOSITY", None)
sys.meta_path.insert(0, Watch())
import {module}
"""


@pytest.mark.parametrize("module", ["bench.echo", "bench.reliability.hostile"])
def test_grpc_is_told_to_be_quiet_before_it_is_loaded(module):
    program = PROGRAM.replace("{module}", module)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["NONE"]
