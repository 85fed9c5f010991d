import io
import json
import zipfile

import numpy as np
import pyarrow.parquet
import pytest

import phalanx
from phalanx.data.model_files import load_model_directory
from phalanx.errors import AlreadyExists, DataLoss, FailedPrecondition, InvalidArgument, NotFound
from phalanx.sdk.models import _safe_path
from phalanx.sdk.prediction import predict_file, predicted_rows
from phalanx.sdk.verification import verify_job

CSV = "size,colour\n1.5,red\n-2.0,blue\n0.25,red\n"


def spec(**changes):
    return {
        "name": "shapes",
        "data": {"name": "shapes", "shards": 2},
        "train": {
            "model": {"softmax_regression": {}},
            "batch_size": 0,
            "stop": {"steps": 5},
            **changes,
        },
    }


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    monkeypatch.setenv("PHALANX_CACHE", str(tmp_path / "cache"))
    with phalanx.LocalCluster(workers=0) as local:
        generator = np.random.default_rng(0)
        size = generator.normal(size=300)
        table = {
            "size": size.tolist(),
            "colour": generator.choice(["red", "blue"], 300).tolist(),
            "kind": np.where(size > 0, "big", "small").tolist(),
        }
        local.data.add("shapes", table, target="kind")
        yield local


@pytest.fixture
def job(cluster):
    job = cluster.submit(spec())
    job.wait(60)
    return job


@pytest.fixture
def model(cluster, job):
    return cluster.models.get("shapes")


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(CSV)
    return file


def test_csv_and_parquet_hold_the_same_predictions(model, rows, tmp_path):
    predicted = predict_file(model, rows, tmp_path / "out.csv")
    predict_file(model, rows, tmp_path / "out.parquet")
    assert predicted.rows == 3
    text = (tmp_path / "out.csv").read_text().splitlines()
    assert text[0] == "prediction,probability of big,probability of small"
    labels = [line.split(",")[0] for line in text[1:]]
    assert labels == model.predict(rows).tolist() == ["big", "small", "big"]
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.column("prediction").to_pylist() == labels
    probabilities = table.column("probability of big").to_pylist()
    assert probabilities == model.predict_probabilities(rows)[:, 0].tolist()


@pytest.mark.parametrize("shown_as", ["rows.csv", "link.csv"])
def test_predictions_do_not_overwrite_the_raw_rows(model, tmp_path, shown_as):
    raw = tmp_path / "rows.csv"
    raw.write_text(CSV)
    (tmp_path / "link.csv").symlink_to(raw)
    with pytest.raises(InvalidArgument, match="holds the raw rows"):
        predict_file(model, raw, tmp_path / shown_as)
    assert raw.read_text() == CSV


def test_many_rows_pass_in_blocks(model, tmp_path):
    file = tmp_path / "many.csv"
    file.write_text("size,colour\n" + "1.5,red\n" * 20_000)
    predict_file(model, file, tmp_path / "many.parquet")
    parquet = pyarrow.parquet.ParquetFile(tmp_path / "many.parquet")
    assert parquet.metadata.num_rows == 20_000
    assert parquet.metadata.num_row_groups > 1


def test_predictions_go_to_a_stream_and_to_json(model, rows):
    stream = io.BytesIO()
    predict_file(model, rows, stream)
    assert stream.getvalue().startswith(b"prediction,")
    nothing = io.BytesIO()
    with pytest.raises(NotFound):
        predict_file(model, rows.with_name("missing.csv"), nothing)
    assert nothing.getvalue() == b"", "no heading either"
    first = next(predicted_rows(model, rows))
    assert first["prediction"] == "big"
    assert set(first["probabilities"]) == {"big", "small"}
    json.dumps(first)


def test_a_wrong_row_leaves_no_file(model, tmp_path):
    file = tmp_path / "wrong.csv"
    file.write_text(CSV + "much,red\n")
    with pytest.raises(InvalidArgument):
        predict_file(model, file, tmp_path / "out.csv")
    assert sorted(path.name for path in tmp_path.glob("*out*")) == []
    with pytest.raises(InvalidArgument, match="neither"):
        predict_file(model, file, tmp_path / "out.txt")


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_file_that_cannot_be_written_is_named_as_it_was_given(model, rows, tmp_path, ending):
    wanted = tmp_path / "nowhere" / f"out.{ending}"
    with pytest.raises(FileNotFoundError) as caught:
        predict_file(model, rows, wanted)
    assert caught.value.filename == str(wanted)
    taken = tmp_path / f"folder.{ending}"
    taken.mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        predict_file(model, rows, taken)
    assert (caught.value.filename, caught.value.filename2) == (str(taken), None)
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def test_rows_without_a_header_are_said_to_be_taken_by_position(model, rows, tmp_path):
    assert predict_file(model, rows, io.BytesIO()).remarks == ()
    rows.write_text(CSV.partition("\n")[2])
    assert predict_file(model, rows, io.BytesIO()).remarks == (
        "rows.csv has no header line: its columns are taken by position, as size, colour",
    )


def test_oddities_are_told(model, tmp_path):
    file = tmp_path / "odd.csv"
    file.write_text("size,colour,extra\n1.0,green,1\n")
    remarks = " ".join(predict_file(model, file, io.BytesIO()).remarks)
    assert "extra" in remarks
    assert "green" in remarks or "colour" in remarks


def test_a_model_is_downloaded_once(cluster, job):
    first = cluster.models.cached("shapes")
    before = first.stat().st_mtime_ns
    assert cluster.models.cached("shapes@1") == first
    assert first.stat().st_mtime_ns == before
    assert not list(first.parent.glob(".*"))


def test_a_download_never_replaces_a_folder(cluster, job, tmp_path):
    target = cluster.models.download("shapes", tmp_path / "deep" / "shapes")
    assert load_model_directory(target).name == "shapes"
    with pytest.raises(AlreadyExists):
        cluster.models.download("shapes", target)


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "", "a\0b", "a" * 300])
def test_a_model_cannot_write_outside_its_folder(path):
    with pytest.raises(DataLoss):
        _safe_path(path)


@pytest.mark.parametrize("field", ["namespace", "name", "parameters_sha256"])
def test_a_server_cannot_name_a_folder_outside_the_cache(cluster, job, monkeypatch, field):
    described = cluster.models.describe("shapes")
    setattr(described, field, "../../../../elsewhere")
    monkeypatch.setattr(cluster.models, "describe", lambda name: described)
    with pytest.raises(DataLoss, match="the server told of a model whose"):
        cluster.models.cached("shapes")


def test_exports(cluster, job, tmp_path):
    folder = cluster.models.cached("shapes")
    for ending in ("zip", "npz", "safetensors"):
        file = tmp_path / f"m.{ending}"
        assert cluster.models.export("shapes", str(file)) == file
        with pytest.raises(AlreadyExists):
            cluster.models.export("shapes@1", file)
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        assert set(archive.namelist()) == {"README.md", "model.json", "model.safetensors"}
    with np.load(tmp_path / "m.npz") as arrays:
        flat = np.concatenate([array.ravel() for array in arrays.values()])
    assert len(flat) == load_model_directory(folder).parameters.size
    assert (tmp_path / "m.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(InvalidArgument, match=r"\.zip"):
        cluster.models.export("shapes", tmp_path / "m.h5")
    with pytest.raises(NotFound):
        cluster.models.export("nothing", tmp_path / "m.npz")
    for ending in ("zip", "npz", "safetensors"):
        wanted = tmp_path / "nowhere" / f"m.{ending}"
        with pytest.raises(FileNotFoundError) as caught:
            cluster.models.export("shapes", wanted)
        assert caught.value.filename == str(wanted)


def test_an_export_computes_what_the_model_predicts(cluster, job, model, tmp_path):
    pytest.importorskip("skl2onnx", reason="no converter for this Python")
    runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime for this Python")
    file = cluster.models.export("shapes", tmp_path / "m.onnx")
    rows = {"size": [0.5, -3.0, 1.0], "colour": ["red", "blue", "green"]}
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    label, probabilities = session.run(None, {"features": model.prepare(rows)})
    assert label.tolist() == model.predict(rows).tolist()
    np.testing.assert_allclose(probabilities, model.predict_probabilities(rows), atol=1e-6)
    told = json.loads(session.get_modelmeta().custom_metadata_map["features"])
    assert told == ["size", "colour=blue", "colour=red"]
    with pytest.raises(AlreadyExists):
        cluster.models.export("shapes", file)


def test_a_model_as_an_object_of_scikit_learn(cluster, job, model):
    rows = {"size": [0.5, -3.0, 1.0], "colour": ["red", "blue", "green"]}
    estimator = cluster.models.to_sklearn("shapes@1")
    assert estimator.predict(model.prepare(rows)).tolist() == model.predict(rows).tolist()
    with pytest.raises(NotFound):
        cluster.models.to_sklearn("nothing")


@pytest.mark.parametrize("ending", ["joblib", "pkl", "pickle"])
def test_no_pickle_is_written(cluster, job, tmp_path, ending):
    with pytest.raises(InvalidArgument, match=r"to_sklearn\(NAME\)"):
        cluster.models.export("shapes", tmp_path / f"m.{ending}")
    assert list(tmp_path.glob("m.*")) == []


def test_verification_computes_the_same_bits(cluster, job):
    verdict = cluster.verify(job)
    assert verdict.equal
    assert verdict == cluster.verify(job.id)
    assert verdict.local_sha256 == job.result.parameters_sha256
    assert verdict.to_json()["equal"] is True


def test_verification_finds_other_bits(cluster, job, monkeypatch):
    stored = cluster.backend._jobs._jobs[job.id].job
    stored.result.parameters_sha256 = "0" * 64
    verdict = verify_job(cluster, job.id)
    assert not verdict.equal
    assert "fingerprint" in verdict.explanation


def test_only_a_finished_job_can_be_verified(cluster):
    job = cluster.submit(spec(stop={"steps": 10_000_000}))
    with pytest.raises(FailedPrecondition):
        verify_job(cluster, job.id)
    with pytest.raises(NotFound):
        verify_job(cluster, "nobody")
    job.cancel()


def _went_on(cluster, job, origin):
    """Let a finished job say that it went on from another one, as it would on a cluster."""
    stored = cluster.backend._jobs._jobs[job.id].job
    stored.spec.train.start.job = f"{origin.id}@2"
    return stored.spec.train.stop


def test_a_job_that_went_on_is_verified_from_the_very_beginning(cluster, job):
    first = cluster.submit(spec(start={"model": "shapes@1"}, stop={"steps": 2}))
    first.wait(60)
    whole = cluster.submit(spec(start={"model": "shapes@1"}))
    whole.wait(60)
    stop = _went_on(cluster, whole, first)
    # A rule that would have ended the first one earlier.
    stop.thresholds.add(metric="train/loss", at_most=1e9)
    verdict = verify_job(cluster, whole.id)
    assert verdict.equal
    assert verdict.steps == 5
    cluster.get(first.id).delete()
    with pytest.raises(FailedPrecondition, match=f"{first.id}, which is deleted"):
        verify_job(cluster, whole.id)


def test_verification_ends_where_a_clock_ended_the_job(cluster, job):
    stored = cluster.backend._jobs._jobs[job.id].job
    stored.spec.train.stop.wall_time.nanos = 1
    verdict = verify_job(cluster, job.id)
    assert verdict.equal
    assert verdict.steps == 5


def test_a_job_may_start_from_a_model(cluster, job):
    warm = cluster.submit(spec(start={"model": "shapes"})).wait(60)
    assert warm.parameters_sha256 != job.result.parameters_sha256
    assert warm.metrics["train/loss"] < job.result.metrics["train/loss"]
