"""Array formats in: NPZ, safetensors, idx, LIBSVM, and objects in memory."""

import gzip
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from phalanx.data.ingest import ingest, ingest_arrays
from phalanx.data.manifest import DatasetManifest
from phalanx.data.options import MEBIBYTE, PIECE_ROWS, IngestOptions
from phalanx.data.reader import ChunkReader
from phalanx.data.writer import CsrWriter, DirectoryBlobs
from phalanx.errors import InvalidArgument, NotFound, PhalanxError
from phalanx.testing import datasets
from phalanx.testing.properties import examples
from phalanx.training.sampler import RowSelection

IMAGES = np.random.default_rng(0).integers(0, 256, (30, 4, 3)).astype(np.uint8)
LABELS = (np.arange(30) % 3).astype(np.uint8)


def add(folder: Path, *paths: Path, **options: Any) -> DatasetManifest:
    return ingest(list(paths), IngestOptions(**options), DirectoryBlobs(folder / "blobs"))


def rows_of(
    folder: Path, manifest: DatasetManifest, split: str = "train", dtype: str = "float64"
) -> Any:
    reader = ChunkReader(manifest, split, DirectoryBlobs(folder / "blobs").path, dtype=dtype)
    return reader.rows(
        [RowSelection(index, np.arange(rows)) for index, rows in enumerate(reader.chunk_rows)]
    )


def error_of(folder: Path, *paths: Path, **options: Any) -> str:
    with pytest.raises(PhalanxError) as caught:
        add(folder, *paths, **options)
    return caught.value.message


def write_idx(path: Path, array: NDArray[Any], code: int = 8) -> Path:
    shape = b"".join(extent.to_bytes(4, "big") for extent in array.shape)
    data = bytes([0, 0, code, array.ndim]) + shape + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


class TestNpz:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("keys", [("X", "y"), ("x", "labels"), ("features", "target")])
    def test_arrays_are_found_by_their_usual_names(
        self, tmp_path: Path, save: Any, keys: tuple[str, str]
    ) -> None:
        save(tmp_path / "a.npz", **dict(zip(keys, (IMAGES, LABELS), strict=True)))
        manifest = add(tmp_path, tmp_path / "a.npz")
        assert (manifest.features, manifest.dtype) == (12, "uint8")
        assert manifest.classes == ("0", "1", "2")
        batch = rows_of(tmp_path, manifest)
        assert batch.features.tolist() == IMAGES.reshape(30, 12).tolist()
        assert batch.targets.tolist() == LABELS.tolist()

    def test_arrays_are_named_by_options(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", pixels=IMAGES, what=LABELS, X=IMAGES[:5], y=LABELS[:5])
        manifest = add(tmp_path, tmp_path / "a.npz", features_key="pixels", target_key="what")
        assert manifest.rows("train") == 30
        message = error_of(tmp_path, tmp_path / "a.npz", features_key="colours")
        assert "a.npz has no array 'colours'; it has pixels, what, X, y" in message

    def test_a_test_part_in_the_file_becomes_the_test_split(self, tmp_path: Path) -> None:
        np.savez(
            tmp_path / "a.npz", x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:7], y_test=LABELS[:7]
        )
        manifest = add(tmp_path, tmp_path / "a.npz")
        assert manifest.rows_by_split() == {"train": 30, "test": 7}
        assert "hold a test split already" in error_of(tmp_path, tmp_path / "a.npz", test=0.1)

    def test_the_test_parts_of_several_files_are_one_split(self, tmp_path: Path) -> None:
        pair = {"x_train": IMAGES, "y_train": LABELS}
        test = {"x_test": IMAGES[:7], "y_test": LABELS[:7]}
        np.savez(tmp_path / "a.npz", **pair, **test)
        np.savez(tmp_path / "b.npz", **pair, **test)
        manifest = add(tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
        assert manifest.rows_by_split() == {"train": 60, "test": 14}
        np.savez(tmp_path / "b.npz", **pair)
        message = error_of(tmp_path, tmp_path / "a.npz", tmp_path / "b.npz")
        assert message.startswith("b.npz brings no test split, and another of the files does")

    def test_fortran_order_text_labels_and_flags(self, tmp_path: Path) -> None:
        values = np.asfortranarray(np.arange(60, dtype=np.float64).reshape(30, 2))
        words = np.array(["yes", "no", "maybe"])[LABELS]
        np.savez(tmp_path / "a.npz", X=values, y=words)
        manifest = add(tmp_path, tmp_path / "a.npz")
        assert manifest.classes == ("maybe", "no", "yes")
        assert rows_of(tmp_path, manifest).features.tolist() == values.tolist()
        np.savez(tmp_path / "b.npz", X=values, y=LABELS == 0)
        flags = add(tmp_path, tmp_path / "b.npz")
        assert flags.labels() == (False, True)
        assert rows_of(tmp_path, flags).targets.tolist() == (LABELS == 0).astype(int).tolist()

    def test_pickles_are_refused(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", X=IMAGES, y=np.array([{}] * 30))
        assert "'y' holds Python objects (a pickle)" in error_of(tmp_path, tmp_path / "a.npz")

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"X": IMAGES}, "has the arrays X; say which one holds the target with target_key="),
            ({"y": LABELS}, "say which one holds the features with features_key="),
            ({"X": IMAGES, "y": LABELS[:5]}, "30 rows of features, but 5 targets"),
            ({"X": LABELS, "y": LABELS}, "'X' have shape (30,); rows by features are needed"),
            ({"X": IMAGES, "y": IMAGES}, "targets have shape (30, 4, 3); one per row is needed"),
            ({"X": IMAGES * 1j, "y": LABELS}, "features of type complex128 are not real numbers"),
        ],
    )
    def test_what_does_not_fit_is_named(
        self, tmp_path: Path, arrays: dict[str, Any], message: str
    ) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        assert message in error_of(tmp_path, tmp_path / "a.npz")

    def test_files_that_are_damaged_or_something_else(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        np.savez(path, X=np.ones((100_000, 2)), y=np.arange(100_000) % 2)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        assert "a.npz is not an NPZ file" in error_of(tmp_path, path)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("X.npy", b"not an array")
        assert "a.npz is not an NPZ file" in error_of(tmp_path, path)
        offset = data.index(b"\x93NUMPY") + 1_500_000
        path.write_bytes(data[:offset] + b"\xff\x00\xff" + data[offset + 3 :])
        assert "a.npz is damaged" in error_of(tmp_path, path)


class TestSafetensors:
    @pytest.mark.parametrize("dtype", ["uint8", "int16", "float16", "float32", "float64"])
    def test_types_of_features(self, tmp_path: Path, dtype: str) -> None:
        features = IMAGES.astype(dtype)
        data = {"features": features, "targets": LABELS.astype(np.int64)}
        safetensors.numpy.save_file(data, tmp_path / "a.safetensors")
        manifest = add(tmp_path, tmp_path / "a.safetensors")
        assert manifest.dtype == ("uint8" if dtype == "uint8" else "float32")
        assert rows_of(tmp_path, manifest).features.tolist() == IMAGES.reshape(30, 12).tolist()

    def test_float64_is_kept_when_asked(self, tmp_path: Path) -> None:
        features = np.random.default_rng(1).normal(size=(30, 2))
        data = {"X": features, "y": features[:, 0].copy()}
        safetensors.numpy.save_file(data, tmp_path / "a.safetensors")
        manifest = add(tmp_path, tmp_path / "a.safetensors", dtype="float64")
        assert rows_of(tmp_path, manifest).features.tolist() == features.tolist()
        assert rows_of(tmp_path, manifest).targets.tolist() == features[:, 0].tolist()
        rounded = add(tmp_path, tmp_path / "a.safetensors")
        expected = features.astype(np.float32).tolist()
        assert rows_of(tmp_path, rounded).features.tolist() == expected

    def test_several_files_and_their_widths(self, tmp_path: Path) -> None:
        for name, part in (("a", IMAGES[:10]), ("b", IMAGES[10:])):
            data = {"X": part, "y": LABELS[: len(part)]}
            safetensors.numpy.save_file(data, tmp_path / f"{name}.safetensors")
        paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        assert add(tmp_path, *paths).rows("train") == 30
        data = {"X": IMAGES[:, :2].copy(), "y": LABELS}
        safetensors.numpy.save_file(data, tmp_path / "b.safetensors")
        assert "differ in width: 6, 12 features" in error_of(tmp_path, *paths)

    def test_files_that_are_damaged_or_lack_tensors(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        safetensors.numpy.save_file({"pixels": IMAGES}, path)
        message = error_of(tmp_path, path)
        assert "a.safetensors has the tensors pixels; say which one holds the features" in message
        assert "no tensor 'y'" in error_of(tmp_path, path, features_key="pixels", target_key="y")
        path.write_bytes(path.read_bytes()[:-9])
        assert "a.safetensors is not a safetensors file" in error_of(tmp_path, path)
        path.write_bytes(b"")
        assert "a.safetensors is not a safetensors file" in error_of(tmp_path, path)

    def test_a_type_that_numpy_lacks_matters_only_where_it_is_used(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        safetensors.numpy.save_file(
            {"features": IMAGES, "targets": LABELS, "other": np.zeros(3, np.float16)}, path
        )
        path.write_bytes(path.read_bytes().replace(b'"F16"', b'"F07"'))
        assert add(tmp_path, path).rows("train") == len(LABELS)
        message = error_of(tmp_path, path, features_key="other")
        assert "tensor 'other' has type F07; those that can be read are BOOL" in message


class TestIdx:
    def test_a_folder_with_the_names_of_mnist(self, tmp_path: Path) -> None:
        folder = tmp_path / "mnist"
        folder.mkdir()
        write_idx(folder / "train-images-idx3-ubyte.gz", IMAGES)
        write_idx(folder / "train-labels-idx1-ubyte.gz", LABELS)
        write_idx(folder / "t10k-images-idx3-ubyte", IMAGES[:6])
        write_idx(folder / "t10k-labels-idx1-ubyte", LABELS[:6])
        manifest = add(tmp_path, folder, validation=0.1)
        assert manifest.rows_by_split() == {"train": 27, "validation": 3, "test": 6}
        assert manifest.dtype == "uint8"
        assert manifest.source[0].name == "train-images-idx3-ubyte.gz"
        batch = rows_of(tmp_path, manifest, "test")
        assert batch.features.tolist() == IMAGES[:6].reshape(6, 12).tolist()
        assert batch.targets.tolist() == LABELS[:6].tolist()

    def test_images_find_their_labels(self, tmp_path: Path) -> None:
        images = write_idx(tmp_path / "a-images-idx3-ubyte", IMAGES)
        message = error_of(tmp_path, images)
        assert "a-images-idx3-ubyte: name the file of its labels too" in message
        labels = write_idx(tmp_path / "a-labels-idx1-ubyte", LABELS)
        assert add(tmp_path, images) == add(tmp_path, labels, images)

    def test_files_are_known_by_their_content(self, tmp_path: Path) -> None:
        images = write_idx(tmp_path / "pictures.gz", IMAGES)
        labels = write_idx(tmp_path / "names.gz", LABELS)
        test = (
            write_idx(tmp_path / "p2.gz", IMAGES[:4]),
            write_idx(tmp_path / "n2.gz", LABELS[:4]),
        )
        manifest = add(tmp_path, images, labels, test=test)
        assert manifest.rows_by_split() == {"train": 30, "test": 4}

    def test_other_types(self, tmp_path: Path) -> None:
        values = np.arange(60).reshape(30, 2) - 7
        images = write_idx(tmp_path / "x-images-idx3", values.astype(">f4"), 0x0D)
        labels = write_idx(tmp_path / "x-labels-idx1", LABELS.astype(">i4"), 0x0C)
        manifest = add(tmp_path, images, labels)
        assert manifest.dtype == "float32"
        assert rows_of(tmp_path, manifest).features.tolist() == values.tolist()

    def test_many_labels_are_classes_all_the_same(self, tmp_path: Path) -> None:
        labels = write_idx(tmp_path / "x-labels-idx1", np.arange(30, dtype=np.uint8))
        images = write_idx(tmp_path / "x-images-idx3", IMAGES)
        assert len(add(tmp_path, images, labels).classes) == 30

    def test_what_does_not_fit_is_named(self, tmp_path: Path) -> None:
        images = write_idx(tmp_path / "x-images-idx3", IMAGES)
        labels = write_idx(tmp_path / "x-labels-idx1", LABELS[:29])
        message = error_of(tmp_path, images, labels)
        assert message.endswith("30 rows of features, but 29 targets")
        assert "not 3" in error_of(tmp_path, images, labels, labels)
        assert "holds labels" in error_of(tmp_path, images, images)
        write_idx(labels, LABELS)
        images.write_bytes(images.read_bytes()[:-13])
        assert "x-images-idx3 ends after row 28 of 30" in error_of(tmp_path, images, labels)
        images.write_bytes(b"PK\x03\x04")
        assert "x-images-idx3 is not an idx file" in error_of(tmp_path, images, labels)
        images.write_bytes(b"\0\0\x08\x03\0\0")
        assert "its header is cut off" in error_of(tmp_path, images, labels)


LIBSVM = """+1 1:0.5 3:2 # a comment
-1 2:1e-1

-1
+1 5:-3 6:.25
"""


class TestLibsvm:
    def write(self, folder: Path, text: str, name: str = "a.svm") -> Path:
        path = folder / name
        path.write_text(text)
        return path

    @pytest.mark.parametrize("block_bytes", [64, 1 << 20])
    def test_rows_and_labels(self, tmp_path: Path, block_bytes: int) -> None:
        manifest = add(tmp_path, self.write(tmp_path, LIBSVM), block_bytes=block_bytes)
        assert (manifest.format, manifest.features) == ("csr", 6)
        assert manifest.classes == ("-1", "1")
        batch = rows_of(tmp_path, manifest)
        assert batch.features.toarray().tolist() == [
            [0.5, 0, 2, 0, 0, 0],
            [0, np.float32(0.1), 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, -3, 0.25],
        ]
        assert batch.targets.tolist() == [1, 0, 0, 1]
        assert manifest.splits["train"][0].nonzeros == 5

    def test_compressed_windows_line_ends_and_no_last_line_feed(self, tmp_path: Path) -> None:
        expected = add(tmp_path, self.write(tmp_path, LIBSVM))
        windows = self.write(tmp_path, LIBSVM.replace("\n", "\r\n").rstrip())
        assert add(tmp_path, windows).splits == expected.splits
        packed = tmp_path / "a.svm.gz"
        packed.write_bytes(gzip.compress(LIBSVM.encode()))
        assert add(tmp_path, packed).splits == expected.splits

    def test_dense_storage_on_request(self, tmp_path: Path) -> None:
        manifest = add(tmp_path, self.write(tmp_path, LIBSVM), layout="dense")
        assert manifest.format == "dense"
        assert rows_of(tmp_path, manifest).features[3].tolist() == [0, 0, 0, 0, -3, 0.25]

    def test_width_by_option_and_across_splits(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, LIBSVM)
        assert add(tmp_path, path, feature_count=10).features == 10
        test = self.write(tmp_path, "1 1:1\n-1 9:1\n", "test.svm")
        message = error_of(tmp_path, path, test=test)
        assert (
            "test.svm, line 2, index 9: the train data has 6 features; say feature_count="
            in message
        )
        manifest = add(tmp_path, path, test=test, feature_count=9)
        assert rows_of(tmp_path, manifest, "test").features.shape == (2, 9)
        narrow = error_of(tmp_path, path, feature_count=4)
        assert "a.svm, line 5, index 5: indices go up to 4" in narrow

    @pytest.mark.parametrize("block_bytes", [64, 1 << 20])
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (LIBSVM + "1 3:x\n", "a.svm, line 6: '3:x' is not index:value"),
            (
                LIBSVM + "1 1:2 3:\n-1 2:1\n1 1:1 2:2 3:3\n",
                "a.svm, line 6: '3:' is not index:value",
            ),
            (LIBSVM + "1 3:1 4\n", "a.svm, line 6: '4' is not index:value"),
            (LIBSVM + "1 2:1:2\n", "a.svm, line 6: '2:1:2' is not index:value"),
            (LIBSVM + "1 qid:3 1:2\n", "a.svm, line 6: 'qid:3' is not index:value"),
            (LIBSVM + "1 2:1\r3:1\n", "a.svm, line 6: '2:1\\r3:1' is not index:value"),
            (LIBSVM + "1 2:1\f\n", "a.svm, line 6: '2:1\\x0c' is not index:value"),
            (LIBSVM + "1 1:nan\n", "a.svm, line 6: '1:nan' is not index:value"),
            (LIBSVM + "cat 1:2\n", "a.svm, line 6: the label 'cat' is not a number"),
            (LIBSVM + "1,2 1:2\n", "a.svm, line 6: the label '1,2' is not a number"),
            (LIBSVM + "1 0:2\n", "a.svm, line 6, index 0: indices count from 1"),
            (LIBSVM + "1 3:2 2:1\n", "a.svm, line 6, index 2: the indices of a line must rise"),
            (LIBSVM + "1 2:2 2:1\n", "a.svm, line 6, index 2: the indices of a line must rise"),
            (LIBSVM + f"1 {'9' * 400}:2 {'9' * 401}:1\n", "line 6, index inf: indices go up to"),
            (LIBSVM + "1 99999999999:2\n", "indices go up to 2147483647"),
            (LIBSVM + "1 1:1e999\n", "a.svm, line 6, index 1: the value is too large"),
            (LIBSVM + "1 1:1e39\n", "a.svm, line 6, feature x1: 1e+39 is too large for float32"),
            ("", "the train split has no rows"),
            ("1\n-1\n", "the data has no features"),
        ],
    )
    def test_errors_name_the_line(
        self, tmp_path: Path, text: str, message: str, block_bytes: int
    ) -> None:
        path = self.write(tmp_path, text)
        assert message in error_of(tmp_path, path, block_bytes=block_bytes)

    @examples(30)
    @given(
        rows=st.lists(
            st.dictionaries(st.integers(1, 30), st.floats(-1e9, 1e9), max_size=8), min_size=3
        ),
        block_bytes=st.integers(64, 900),
    )
    def test_what_is_written_is_read_whatever_the_size_of_blocks(
        self, tmp_path: Path, rows: list[dict[int, float]], block_bytes: int
    ) -> None:
        rows[0][1] = 1.0
        lines = [
            " ".join([str(number % 2), *(f"{key}:{row[key]!r}" for key in sorted(row))])
            for number, row in enumerate(rows)
        ]
        path = self.write(tmp_path, "\n".join(lines))
        options: dict[str, Any] = {"dtype": "float64", "block_bytes": block_bytes}
        manifest = add(tmp_path, path, feature_count=30, chunk_bytes=1024, **options)
        expected = np.zeros((len(rows), 30))
        for number, row in enumerate(rows):
            for key, value in row.items():
                expected[number, key - 1] = value
        assert rows_of(tmp_path, manifest).features.toarray().tolist() == expected.tolist()


class TestMemory:
    def add(self, folder: Path, features: Any, targets: Any, **options: Any) -> DatasetManifest:
        named = {
            key: options.pop(key)
            for key in ("feature_names", "test", "validation")
            if key in options and not isinstance(options[key], float)
        }
        sink = DirectoryBlobs(folder / "blobs")
        return ingest_arrays(features, targets, IngestOptions(**options), sink, **named)

    def test_arrays_with_names_and_splits(self, tmp_path: Path) -> None:
        features, targets = datasets.classification(rows=50, features=2)
        manifest = self.add(
            tmp_path,
            features,
            targets.tolist(),
            feature_names=("length", "width"),
            test=(features[:9], targets[:9]),
            validation=0.2,
        )
        assert manifest.feature_names() == ("length", "width")
        assert manifest.rows_by_split() == {"train": 40, "validation": 10, "test": 9}
        np.testing.assert_array_equal(rows_of(tmp_path, manifest, "test").features, features[:9])

    @pytest.mark.parametrize("kind", ["csr_matrix", "csc_array", "coo_array"])
    def test_sparse_matrices_stay_sparse(self, tmp_path: Path, kind: str) -> None:
        features, targets = datasets.sparse_classification(rows=80)
        manifest = self.add(tmp_path, getattr(scipy.sparse, kind)(features), targets)
        assert manifest.format == "csr"
        batch = rows_of(tmp_path, manifest)
        assert batch.features.toarray().tolist() == features.toarray().tolist()

    def test_frames_are_tables(self, tmp_path: Path) -> None:
        class Frame:
            """What pandas and polars have in common."""

            columns = ("age", "job", "member")

            def __getitem__(self, name: str) -> list[Any]:
                values = {
                    "age": [3, None, 5],
                    "job": ["a", "b", None],
                    "member": [True, False, True],
                }
                return values[name]

        manifest = self.add(tmp_path, Frame(), [1.5, 2.5, 3.5], missing="category")
        assert manifest.target == "target"
        assert manifest.task == "regression"
        names = ("age", "job=a", "job=b", "job is missing", "member")
        assert manifest.feature_names() == names
        assert rows_of(tmp_path, manifest).features.tolist() == [
            [3, 1, 0, 0, 1],
            [4, 0, 1, 0, 0],
            [5, 0, 0, 1, 1],
        ]

    def test_a_frame_may_hold_its_target(self, tmp_path: Path) -> None:
        frame = {"x": [1, 2, 3], "y": [True, False, True]}
        manifest = self.add(tmp_path, frame, None, target="y")
        assert manifest.labels() == (False, True)
        with pytest.raises(InvalidArgument, match="the frame has a column 'target'"):
            self.add(tmp_path, {"target": [1, 2], "x": [1, 2]}, [1, 2])
        with pytest.raises(InvalidArgument, match="arrays need targets"):
            self.add(tmp_path, np.ones((3, 2)), None)

    def test_arrays_of_objects_are_tables(self, tmp_path: Path) -> None:
        array = np.array([[1, "a"], [2, "b"], [None, "a"]], dtype=object)
        manifest = self.add(tmp_path, array, ["p", "q", "p"], missing="mean")
        assert manifest.feature_names() == ("x1", "x2=a", "x2=b")
        assert rows_of(tmp_path, manifest).features[2].tolist() == [1.5, 1, 0]

    @pytest.mark.parametrize(
        ("value", "options", "message"),
        [
            (np.nan, {}, "the data, row 2, feature x3: the value is missing"),
            (np.inf, {}, "the data, row 2, feature x3: inf is not finite"),
            (-np.inf, {"missing": "mean"}, "the data, row 2, feature x3: -inf is not finite"),
            (1e39, {}, "the data, row 2, feature x3: 1e+39 is too large for float32"),
        ],
    )
    def test_bad_numbers_are_named_by_row_and_feature(
        self, tmp_path: Path, value: float, options: dict[str, Any], message: str
    ) -> None:
        features = np.ones((4, 3))
        features[1, 2] = value
        with pytest.raises(InvalidArgument) as caught:
            self.add(tmp_path, features, [0, 1, 0, 1], **options)
        assert caught.value.message.startswith(message)
        with pytest.raises(InvalidArgument, match="row 2, feature x3"):
            self.add(tmp_path, scipy.sparse.csr_array(features), [0, 1, 0, 1], **options)

    def test_missing_numbers_become_the_mean_of_the_train_split(self, tmp_path: Path) -> None:
        features = np.array([[1.0, np.nan], [3.0, 4.0], [np.nan, 8.0]])
        test = np.array([[np.nan, np.nan]])
        manifest = self.add(tmp_path, features, [0, 1, 0], missing="mean", test=(test, [1]))
        assert [column.fill for column in manifest.columns] == [(2.0,), (6.0,)]
        assert rows_of(tmp_path, manifest).features.tolist() == [[1, 6], [3, 4], [2, 8]]
        assert rows_of(tmp_path, manifest, "test").features.tolist() == [[2, 6]]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_targets_must_be_there(self, tmp_path: Path, value: float) -> None:
        with pytest.raises(InvalidArgument, match="the data, row 2, target: "):
            self.add(tmp_path, np.ones((3, 2)), [1.5, value, 2.5])

    @pytest.mark.parametrize(
        ("features", "targets", "message"),
        [
            (np.ones((3, 2)), [1, 2], "3 rows of features, but 2 targets"),
            (np.ones(3), [1, 2, 3], "rows by features are needed"),
            (np.ones((3, 0)), [1, 2, 3], "the data has no features"),
            (np.ones((3, 2)), 1, "3 rows of features, but 0 targets"),
            ([[1, 2], [3]], [1, 2], "the data: rows are not of one length"),
            (
                np.ma.masked_equal(np.arange(6).reshape(3, 2), 3),
                [1, 2, 1],
                "row 2, feature x2: the",
            ),
            ({"a": [1, 2], "b": [1]}, [1, 2], "the columns are not of one length"),
            ({"a": [1, 2], "b": [{}, 1]}, [1, 2], "row 1, column 'b': a dict cannot be a feature"),
        ],
    )
    def test_shapes_that_do_not_fit(
        self, tmp_path: Path, features: Any, targets: Any, message: str
    ) -> None:
        with pytest.raises(InvalidArgument, match=message):
            self.add(tmp_path, features, targets)

    def test_splits_of_one_kind_and_width(self, tmp_path: Path) -> None:
        features, targets = datasets.classification(rows=20)
        with pytest.raises(InvalidArgument, match="the splits differ in width: 8 and 7"):
            self.add(tmp_path, features, targets, test=(features[:, :7], targets))
        with pytest.raises(InvalidArgument, match="all splits must come as tables"):
            self.add(tmp_path, features, targets, test=({"a": targets}, targets))
        with pytest.raises(InvalidArgument, match="the test split is given twice"):
            ingest_arrays(
                features,
                targets,
                IngestOptions(test=0.5),
                DirectoryBlobs(tmp_path),
                test=(features, targets),
            )

    def test_bytes_stay_bytes_only_if_all_splits_are(self, tmp_path: Path) -> None:
        test = IMAGES[:3].astype(np.float64) + 0.5
        manifest = self.add(tmp_path, IMAGES, LABELS, test=(test, LABELS[:3]))
        assert manifest.dtype == "float32"
        assert rows_of(tmp_path, manifest, "test").features.tolist() == test.reshape(3, 12).tolist()


def test_chunks_hold_as_many_rows_as_fit_and_depend_on_nothing_else(tmp_path: Path) -> None:
    features, targets = datasets.classification(rows=1000, features=7)
    manifest = datasets.store(tmp_path, features, targets, chunk_bytes=2048).manifest
    rows = [chunk.rows for chunk in manifest.splits["train"]]
    assert rows == [2048 // 36] * 17 + [1000 - 17 * 56]
    assert all(
        (tmp_path / chunk.digest).stat().st_size == chunk.size_bytes
        for chunk in manifest.splits["train"]
    )
    assert manifest.size_bytes == sum(chunk.size_bytes for chunk in manifest.splits["train"])


@pytest.mark.parametrize(
    ("features", "rows"),
    [
        (4, MEBIBYTE // 24 + 1),  # small rows: until there is 1 MiB of them
        (128, PIECE_ROWS),
        (2000, 4 * MEBIBYTE // 8008),  # large rows: as many as fit into 4 MiB
    ],
)
def test_by_default_a_chunk_is_what_the_sampler_keeps_together(
    tmp_path: Path, features: int, rows: int
) -> None:
    dense = np.ones((2 * rows + 3, features), np.float32)
    manifest = datasets.store(tmp_path, dense, np.arange(len(dense)) % 2).manifest
    assert [chunk.rows for chunk in manifest.splits["train"]] == [rows, rows, 3]


@pytest.mark.parametrize(
    ("nonzeros", "rows"),
    [(4, MEBIBYTE // 44 + 1), (128, PIECE_ROWS), (1000, 4 * MEBIBYTE // 8012)],
)
@pytest.mark.parametrize("block_rows", [1000, 10_000_000])
def test_so_is_a_sparse_one_however_the_rows_come(
    tmp_path: Path, nonzeros: int, rows: int, block_rows: int
) -> None:
    sink = DirectoryBlobs(tmp_path)
    writer = CsrWriter(sink, "float32", "int64", IngestOptions().chunk_size(), classes=2)
    count = 2 * rows + 3
    some = scipy.sparse.csr_array(np.ones((count, nonzeros), np.float32))
    targets = np.arange(count) % 2
    for first in range(0, count, block_rows):
        block = slice(first, first + block_rows)
        writer.add(some[block], targets[block])
    assert [chunk.rows for chunk in writer.finish()] == [rows, rows, 3]


def test_a_row_that_no_chunk_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="a row of 5,000,000 features takes 20000008 bytes"):
        datasets.store(tmp_path, np.zeros((2, 5_000_000), np.float32), [0, 1])
    wide = scipy.sparse.csr_array(np.ones((2, 1000), np.float32))
    stored = datasets.store(tmp_path, wide, [0, 1], chunk_bytes=1024)
    assert [chunk.rows for chunk in stored.manifest.splits["train"]] == [1, 1]


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("largest", [1e160, 1e308])
def test_numbers_without_a_standard_deviation_are_refused_by_name(
    tmp_path: Path, sparse: bool, largest: float
) -> None:
    features = np.ones((6, 3))
    features[::2, 1] = -largest
    rows: Any = scipy.sparse.csr_array(features) if sparse else features
    options = IngestOptions(dtype="float64")
    with pytest.raises(InvalidArgument, match=r"feature x2 has values up to 1e\+.*divide"):
        ingest_arrays(rows, np.arange(6) % 2, options, DirectoryBlobs(tmp_path))


def test_an_unknown_path_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        add(tmp_path, tmp_path / "none.npz")
    with pytest.raises(InvalidArgument, match="name at least one file"):
        add(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no file in" in error_of(tmp_path, tmp_path / "empty")
