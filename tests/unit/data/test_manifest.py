"""Manifests as JSON: canonical, complete, and refused when they are not manifests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.data.manifest import (
    ChunkInfo,
    Column,
    DatasetManifest,
    SourceFile,
    Statistics,
    label_from_text,
)
from phalanx.errors import DataLoss
from phalanx.testing.datasets import REPOSITORY
from phalanx.testing.properties import examples

numbers = st.floats(allow_nan=False, allow_infinity=False)
tuples = st.lists(numbers, max_size=3).map(tuple)
texts = st.text(max_size=8)
chunks = st.builds(
    ChunkInfo, digest=texts, rows=st.integers(0), size_bytes=st.integers(0), nonzeros=st.integers(0)
)
columns = st.builds(
    Column,
    name=texts,
    kind=st.sampled_from(["numeric", "categorical"]),
    vocabulary=st.lists(texts).map(tuple),
    missing=st.sampled_from(["error", "category", "mean"]),
    fill=tuples,
    missing_category=st.booleans(),
)
manifests = st.builds(
    DatasetManifest,
    format=st.sampled_from(["dense", "csr"]),
    dtype=st.sampled_from(["uint8", "float32", "float64"]),
    features=st.integers(0, 9),
    task=st.sampled_from(["classification", "regression"]),
    target=texts,
    splits=st.dictionaries(
        st.sampled_from(["train", "validation", "test"]), st.lists(chunks, max_size=3).map(tuple)
    ),
    statistics=st.builds(
        Statistics, count=st.integers(0), mean=tuples, std=tuples, minimum=tuples, maximum=tuples
    ),
    columns=st.lists(columns, max_size=3).map(tuple),
    classes=st.lists(texts, max_size=3).map(tuple),
    source=st.lists(st.builds(SourceFile, name=texts, size_bytes=st.integers(0))).map(tuple),
    notes=st.lists(texts).map(tuple),
    missing_markers=st.lists(texts).map(tuple),
)


@examples(25)
@given(manifests)
def test_a_manifest_comes_back_as_it_was_written(manifest: DatasetManifest) -> None:
    data = manifest.to_json()
    again = DatasetManifest.from_json(data)
    assert again == manifest
    assert again.to_json() == data


MANIFEST = DatasetManifest(
    format="dense",
    dtype="float32",
    features=4,
    task="classification",
    target="y",
    splits={
        "train": (ChunkInfo("aa", 3, 100), ChunkInfo("bb", 2, 70)),
        "test": (ChunkInfo("aa", 3, 100),),
    },
    statistics=Statistics(5),
    columns=(
        Column("age"),
        Column("job", "categorical", ("p", "q"), "category", missing_category=True),
    ),
    classes=("1", "2"),
    class_kind="integer",
)


def test_sums_and_names() -> None:
    assert MANIFEST.rows("train") == 5
    assert MANIFEST.rows("validation") == 0
    assert MANIFEST.rows_by_split() == {"train": 5, "test": 3}
    assert MANIFEST.size_bytes == 270
    assert MANIFEST.digests() == ("aa", "bb")
    assert MANIFEST.feature_names() == ("age", "job=p", "job=q", "job is missing")
    assert MANIFEST.labels() == (1, 2)


@pytest.mark.parametrize(
    ("text", "kind", "label"),
    [("a", "text", "a"), ("-1", "integer", -1), ("1.5", "number", 1.5), ("true", "boolean", True)],
)
def test_labels_are_what_they_were(text: str, kind: str, label: object) -> None:
    found = label_from_text(text, kind)  # type: ignore[arg-type]
    assert found == label
    assert type(found) is type(label)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"{}", b"\xff", MANIFEST.to_json()[:-1], b'{"version":1}'],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(DataLoss, match="not a data set manifest"):
        DatasetManifest.from_json(data)


def test_a_later_version_is_refused_with_what_to_do() -> None:
    document = json.loads(MANIFEST.to_json())
    document["version"] = 2
    with pytest.raises(DataLoss, match=r"manifest has version 2.*use a matching release"):
        DatasetManifest.from_json(json.dumps(document))


def test_an_unknown_field_is_refused() -> None:
    document = json.loads(MANIFEST.to_json())
    document["colour"] = "red"
    with pytest.raises(DataLoss, match="colour"):
        DatasetManifest.from_json(json.dumps(document))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("phalanx.data.manifest", ("numpy", "scipy", "pyarrow", "grpc")),
        ("phalanx.data.model_files", ("numpy", "scipy", "pyarrow", "grpc")),
        ("phalanx.data.reader", ("scipy", "pyarrow", "grpc")),
    ],
)
def test_services_that_only_pass_things_on_stay_light(
    tmp_path: Path, module: str, absent: tuple[str, ...]
) -> None:
    code = f"import sys, {module}; print(*[name for name in {absent!r} if name in sys.modules])"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.split() == []
