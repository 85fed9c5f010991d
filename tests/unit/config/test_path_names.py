"""Whatever turns a name of a message or a file into a path stays below its folder.

The long test tries a million names; PHALANX_FUZZ_SEED draws others.
"""

import functools
import os
import posixpath
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phalanx import ids
from phalanx.data.linked_files import folder_of
from phalanx.errors import PhalanxError
from phalanx.sdk.models import _folder_of, _safe_path
from phalanx.specs.validate import _code as violations_of_code
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.model_service_pb2 import ModelVersion
from phalanx.wheels import _inside, _members, write_code
from storage.core import keys
from tests.unit.config.fuzzed_names import fuzzed_names
from worker.cache import BlobCache

SEED = int(os.environ.get("PHALANX_FUZZ_SEED", "0")) or 20
ROOT = "/srv/root"
FEW, MILLION = 15_000, 1_000_000


def _blob_path(text: str) -> str:
    # What is asked of a cache is no more than its folder.
    cache = object.__new__(BlobCache)
    cache._blobs = Path(ROOT)
    return str(cache._path(text))


def _code_path(text: str) -> str:
    spec = JobSpec()
    spec.code.files[text] = ""
    if any(True for _ in violations_of_code(spec)):
        raise PhalanxError("refused")
    return posixpath.join(ROOT, str(_inside(text, "code.files")))


class _Archive:
    """As much of an archive as is looked at for its paths."""

    def __init__(self, name: str) -> None:
        entry = zipfile.ZipInfo("a")
        entry.filename = name
        self._entries = [entry]

    def infolist(self) -> list[zipfile.ZipInfo]:
        return self._entries


def _member_path(text: str) -> str:
    archive: Any = _Archive(text)
    return next((posixpath.join(ROOT, path) for path, _ in _members(archive, "w")), ROOT + "/-")


def _linked(text: str) -> str:
    path = f"{ROOT}/{text}"
    folder_of(path, [ROOT])
    return path


def _model_folder(field: str, text: str) -> str:
    fields: Any = {"namespace": "default", "name": "m", "version": 1, "parameters_sha256": "0" * 64}
    return str(_folder_of(Path(ROOT), ModelVersion(**{**fields, field: text})))


def _joined(check: Callable[[str, str], str], text: str) -> str:
    return posixpath.join(ROOT, check(text, "field"))


GATES: dict[str, Callable[[str], str]] = {
    "key": functools.partial(_joined, keys.check_key),
    "stream": functools.partial(_joined, keys.check_stream),
    "digest of storage": functools.partial(_joined, keys.check_digest),
    "file of a model": functools.partial(_joined, keys.check_file_path),
    "name": functools.partial(_joined, ids.check_name),
    "digest": lambda text: posixpath.join(ROOT, ids.check_blob_id(text)),
    "namespace": lambda text: posixpath.join(ROOT, ids.check_namespace(text)),
    "blob of a worker": _blob_path,
    "code of a job": _code_path,
    "file of a wheel": _member_path,
    "linked file": _linked,
    "downloaded file": lambda text: posixpath.join(ROOT, str(_safe_path(text))),
    "namespace of a cached model": functools.partial(_model_folder, "namespace"),
    "name of a cached model": functools.partial(_model_folder, "name"),
    "hash of a cached model": functools.partial(_model_folder, "parameters_sha256"),
}


ONLY_READ = frozenset({"linked file"})
"""Nothing is made there: a name that no disk takes is one of a file that is not there."""


def _tried(count: int, seed: int) -> dict[str, int]:
    """Put each name through one gate after the other; how many each let through."""
    passed = dict.fromkeys(GATES, 0)
    gates = [*GATES.items()]
    for number, text in enumerate(fuzzed_names(random.Random(seed), count)):
        for name, gate in (gates[number % len(gates)], gates[(number * 7 + 3) % len(gates)]):
            try:
                path = gate(text)
            except PhalanxError:
                continue
            passed[name] += 1
            whole = posixpath.normpath(path)
            assert whole.startswith(ROOT + "/"), (name, text)
            assert "\0" not in path, (name, text)
            fits = all(len(os.fsencode(part)) < 256 for part in whole.split("/"))
            assert fits or name in ONLY_READ, (name, text)
    return passed


def test_no_name_leads_out_of_its_folder() -> None:
    passed = _tried(FEW, SEED)
    assert all(passed.values()), f"nothing was let through: {passed}"


@pytest.mark.soak
def test_no_name_of_a_million_leads_out_of_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    passed = _tried(MILLION, SEED)
    with capsys.disabled():
        print(f"\nseed {SEED}, {MILLION:,} names, let through:", passed)
    assert all(passed.values()), passed


def test_what_is_written_is_written_below_the_folder(tmp_path: Path) -> None:
    """On a real disk: the code of jobs, with whatever their files are called."""
    root = tmp_path / "root"
    for text in fuzzed_names(random.Random(SEED), 1500):
        try:
            write_code(root, {text: b"x"}, {})
        except PhalanxError:
            continue
    assert [each.name for each in tmp_path.iterdir()] == ["root"]
    assert any(each.is_file() for each in root.rglob("*"))
