"""What a spec may say: every wrong field, by name, at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from phalanx import specs
from phalanx.errors import InvalidArgument, Unimplemented, Violation
from phalanx.v1.dataset_service_pb2 import Dataset
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.wheels import write_code

MakeDataset = Callable[..., Dataset]
BASE = "name: job\ndata: {name: fashion}\ntrain: {model: {mlp: {hidden: [8]}}, batch_size: 512}"


def edited(*settings: str) -> JobSpec:
    return specs.apply_sets(specs.load_yaml(BASE), settings)


def complaints(spec: JobSpec, dataset: Dataset) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        specs.prepare(spec, dataset)
    assert caught.value.reason == "SPEC_INVALID"
    return {each.field: each.message for each in caught.value.violations}


@pytest.mark.parametrize(
    ("setting", "field", "says"),
    [
        ("name=Job", "name", "a-z, 0-9 and -"),
        ("name=-x", "name", "is not allowed"),
        ("name=" + "x" * 41, "name", "at most 40"),
        ("namespace=a/b", "namespace", "is not allowed"),
        ("data.name=../etc", "data.name", "NAME, NAME@VERSION or NAMESPACE/NAME@VERSION"),
        ("data.name=fashion@0", "data.name", "NAME, NAME@VERSION or NAMESPACE/NAME@VERSION"),
        ("data.split=no such", "data.split", "no name of a split; use a-z"),
        ("data.split=nothing", "data.split", "it has: test, train"),
        ("data.shards=0", "data.shards", "at least 1"),
        ("data.shards=100000", "data.shards", "at most 65536"),
        ("data.target=other", "data.target", "was added with the target 'label'"),
        ("seed=-1", "seed", "at least 0"),
        ("seed=9007199254740992", "seed", "at most 9007199254740991"),
        ("priority=101", "priority", "at most 100"),
        ("retain=-1s", "retain", "must not be negative"),
        ("labels={'a b': c}", "labels.a b", "is not allowed"),
        ("output.model=../x", "output.model", "no name of a model; use a-z"),
        ("resources={min_workers: 3, max_workers: 2}", "resources.min_workers", "above max"),
        ("resources.memory_bytes=0", "resources.memory_bytes", "at least 1"),
        ("code.files={../net.py: x}", 'code.files["../net.py"]', "relative path"),
        ("code.files={/net.py: x}", 'code.files["/net.py"]', "relative path"),
        ("code.wheels=[abc]", "code.wheels[0]", "no digest"),
        ("train.batch_size=-1", "train.batch_size", "at least 0"),
        ("train.l2=-0.5", "train.l2", "at least 0"),
        ("train.l2=.inf", "train.l2", "finite"),
        ("train.dtype=float16", "train.dtype", "use float32 or float64"),
        ("train.model={}", "train.model", "is missing; choose"),
        ("train.model.mlp={}", "train.model.mlp.hidden", "is missing"),
        ("train.model.mlp.hidden=[8, 0]", "train.model.mlp.hidden[1]", "at least 1"),
        ("train.model.mlp.activation=gelu", "train.model.mlp.activation", "relu, tanh, sigmoid"),
        ("train.model.mlp.loss=hinge", "train.model.mlp.loss", "cross_entropy, squared_error"),
        ("train.model.mlp.loss=squared_error", "train.model.mlp.loss", "is for regression"),
        ("train.model={torch: {}}", "train.model.torch.module", "is missing"),
        ("train.model={torch: {module: net}}", "train.model.torch.module", "as net:build"),
        (
            "train.model={torch: {module: 'net:build', loss: hinge}}",
            "train.model.torch.loss",
            "huber_loss, poisson_nll_loss, or MODULE:FUNCTION for one of your own",
        ),
        (
            "train.model={torch: {module: 'net:build', loss: mse_loss}}",
            "train.model.torch.loss",
            "is for regression",
        ),
        ("resources.gpus=1", "resources.gpus", "mlp computes on CPUs"),
        (
            "train.model={custom: {entrypoint: x}}",
            "train.model.custom.entrypoint",
            "module:function",
        ),
        (
            "train.model={linear_regression: {}}",
            "train.model.linear_regression",
            "is for regression",
        ),
        ("train.model={logistic_regression: {}}", "train.model.logistic_regression", "2 classes"),
        (
            "train.optimizer={sgd: {learning_rate: -1}}",
            "train.optimizer.sgd.learning_rate",
            "above 0",
        ),
        (
            "train.optimizer={sgd: {learning_rate: 0}}",
            "train.optimizer.sgd.learning_rate",
            "above 0",
        ),
        ("train.optimizer={adam: {beta1: 1}}", "train.optimizer.adam.beta1", "below 1"),
        ("train.optimizer={sgd: {nesterov: true}}", "train.optimizer.sgd.nesterov", "momentum"),
        (
            "train.optimizer.schedule={step: {factor: 0.5}}",
            "train.optimizer.schedule.step.every_steps",
            "at least 1",
        ),
        (
            "train.optimizer.schedule={step: {every_steps: 5}}",
            "train.optimizer.schedule.step.factor",
            "above 0",
        ),
        ("train.stop.epochs=0", "train.stop.epochs", "above 0"),
        ("train.stop.steps=0", "train.stop.steps", "at least 1"),
        ("train.stop.wall_time=0s", "train.stop.wall_time", "longer than nothing"),
        (
            "train.stop.thresholds=[{metric: x, at_least: 1}]",
            "train.stop.thresholds[0].metric",
            "SPLIT",
        ),
        (
            "train.stop.thresholds=[{metric: test/loss}]",
            "train.stop.thresholds[0]",
            "needs a bound",
        ),
        (
            "train.stop.thresholds=[{metric: test/f1, at_least: 1}]",
            "train.stop.thresholds[0].metric",
            "test/loss, test/accuracy",
        ),
        (
            "train.stop.thresholds=[{metric: validation/loss, at_most: 1}]",
            "train.evaluation.split",
            "it has: test, train",
        ),
        ("train.stop.plateau={}", "train.stop.plateau.evaluations", "at least 1"),
        ("train.evaluation.split=validation", "train.evaluation.split", "it has: test, train"),
        ("train.evaluation.metrics=[auc]", "train.evaluation.metrics[0]", "loss, accuracy"),
        ("train.checkpoints.keep=0", "train.checkpoints.keep", "at least 1"),
        ("train.checkpoints.every=0s", "train.checkpoints.every", "longer than nothing"),
        (
            "train.start={model: '../x'}",
            "train.start.model",
            "NAME, NAME@VERSION or NAMESPACE/NAME@VERSION",
        ),
    ],
)
def test_each_wrong_value_is_named(
    make_dataset: MakeDataset, setting: str, field: str, says: str
) -> None:
    found = complaints(edited(setting), make_dataset())
    assert field in found, found
    assert says in found[field]


def test_everything_wrong_is_named_at_once(make_dataset: MakeDataset) -> None:
    spec = edited(
        "name=No", "train.l2=-1", "train.model.mlp.hidden=[0]", "data.target=x", "seed=-5"
    )
    assert set(complaints(spec, make_dataset())) == {
        "name",
        "train.l2",
        "train.model.mlp.hidden[0]",
        "data.target",
        "seed",
    }


def test_one_answer_tells_wrong_values_and_what_is_not_carried_out(
    make_dataset: MakeDataset,
) -> None:
    spec = edited("train.batch_size=-1", "resources.gpus=1", "data.shards=99999")
    fields = ["data.shards", "resources.gpus", "train.batch_size"]
    with pytest.raises(InvalidArgument) as caught:
        specs.prepare(spec, make_dataset())
    assert sorted(each.field for each in caught.value.violations) == fields
    # The same where the data set is not there.
    missing = Violation("data.name", "is not there")
    with pytest.raises(InvalidArgument) as caught:
        specs.check_spec(spec, also=[missing])
    assert sorted(each.field for each in caught.value.violations) == ["data.name", *fields]


def test_an_empty_spec_says_what_is_missing() -> None:
    with pytest.raises(InvalidArgument) as caught:
        specs.check_spec(JobSpec())
    assert [each.field for each in caught.value.violations] == ["name", "data.name", "train"]


@pytest.mark.parametrize(
    ("changes", "setting", "field"),
    [
        ({"rows": {"train": 5}}, "data.shards=6", "data.shards"),
        ({}, "data.shards=1000", "train.batch_size"),
        ({"classes": ["one"]}, "seed=1", "train.model.mlp"),
        (
            {"task": "regression", "classes": []},
            "train.model={softmax_regression: {}}",
            "train.model.softmax_regression",
        ),
    ],
)
def test_the_data_set_is_looked_at(
    make_dataset: MakeDataset, changes: dict[str, Any], setting: str, field: str
) -> None:
    assert field in complaints(edited(setting), make_dataset(**changes))


def test_a_cosine_needs_an_end(make_dataset: MakeDataset) -> None:
    spec = edited("train.optimizer.schedule={cosine: {}}", "train.stop={wall_time: 5m}")
    assert "train.optimizer.schedule.cosine" in complaints(spec, make_dataset())
    ended = edited("train.optimizer.schedule={cosine: {}}", "train.stop={wall_time: 5m, steps: 5}")
    specs.prepare(ended, make_dataset())


def test_code_has_a_size(make_dataset: MakeDataset) -> None:
    spec = edited()
    spec.code.files["net.py"] = "x" * (256 * 1024 + 1)
    assert "above 262144" in complaints(spec, make_dataset())["code.files"]


@pytest.mark.parametrize(
    ("path", "taken"),
    [
        ("n" * 245, True),
        ("n" * 246, False),
        ("n" * 246 + "/net.py", False),
        ("/".join(["n" * 170, "n" * 170, "n" * 170]), True),
        ("/".join(["n" * 170, "n" * 170, "n" * 171]), False),
    ],
)
def test_code_has_names_that_every_disk_takes(
    make_dataset: MakeDataset, tmp_path: Path, path: str, taken: bool
) -> None:
    spec = edited()
    spec.code.files[path] = "x"
    if taken:
        specs.prepare(spec, make_dataset())
        write_code(tmp_path, {path: b"x"}, {})
        assert (tmp_path / path).read_bytes() == b"x"
    else:
        assert "too long" in complaints(spec, make_dataset())[f'code.files["{path[:160]}"]']


@pytest.mark.parametrize(
    "setting",
    [
        "train.local={steps: 5, fragments: 2}",
    ],
)
def test_what_is_not_carried_out_is_refused_by_its_path(
    make_dataset: MakeDataset, setting: str
) -> None:
    with pytest.raises(Unimplemented) as caught:
        specs.prepare(edited(setting), make_dataset())
    path = setting.partition("=")[0]
    assert all(each.field.startswith(path) for each in caught.value.violations)
    assert "not carried out" in caught.value.message


def test_all_that_is_not_carried_out_is_named_at_once() -> None:
    spec = edited("train.local={steps: 5, fragments: 2}")
    inner = spec.train.model.mlp.SerializeToString() + b"\x78\x01"  # field 15
    spec.train.model.mlp.ParseFromString(inner)
    with pytest.raises(Unimplemented, match="and 1 more"):
        specs.check_spec(spec)


def test_a_module_takes_one_gpu_and_code_of_ones_own_any_number(make_dataset: MakeDataset) -> None:
    module = "train.model={torch: {module: 'net:build'}}"
    resolved = specs.prepare(edited(module, "resources.gpus=1"), make_dataset())
    assert resolved.train.model.torch.loss == "cross_entropy"
    assert (
        "use 1" in complaints(edited(module, "resources.gpus=2"), make_dataset())["resources.gpus"]
    )
    custom = "train.model={custom: {entrypoint: 'net:build'}}"
    specs.prepare(edited(custom, "resources.gpus=4"), make_dataset())


@pytest.mark.parametrize(
    "program",
    [
        {"forest": {"trees": 3}},
        {"cascade": {"c": 1.0, "gamma": 0.1}},
        {
            "sweep": {
                "base": {"train": {"model": {"mlp": {"hidden": [4]}}, "stop": {"steps": 5}}},
                "grid": {"train.l2": [0.1, 0.2]},
            }
        },
    ],
    ids=lambda program: next(iter(program)),
)
def test_programs_of_built_in_models_have_no_use_for_gpus(
    make_dataset: MakeDataset, program: dict[str, Any]
) -> None:
    document = {"name": "job", "data": {"name": "fashion"}, **program}
    specs.prepare(ParseDict(document, JobSpec()), make_dataset())
    found = complaints(ParseDict({**document, "resources": {"gpus": 1}}, JobSpec()), make_dataset())
    assert list(found) == ["resources.gpus"]
    assert f"{next(iter(program))} computes on CPUs" in found["resources.gpus"]


def test_fields_of_a_newer_version_are_refused() -> None:
    """A field that is unknown here must not be ignored: the job would not be what was asked for."""
    spec = edited()
    inner = spec.train.model.mlp.SerializeToString() + b"\x78\x01"  # field 15
    spec.train.model.mlp.ParseFromString(inner)
    with pytest.raises(Unimplemented, match="field number 15"):
        specs.check_spec(spec)


def test_a_default_written_out_is_accepted(make_dataset: MakeDataset) -> None:
    spec = edited(
        "train.parameter_server={}",
        "train.reduction={weighted_mean: {}}",
        "train.compression={}",
        "resources.gpus=0",
        "data.rows={}",
    )
    resolved = specs.prepare(spec, make_dataset())
    resolved.train.ClearField("compression")  # stays as it was written: empty, which is none
    without = specs.prepare(edited(), make_dataset())
    assert (resolved.data, resolved.train) == (without.data, without.train)


def test_specs_need_no_numeric_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys, phalanx.specs as s; s.load_yaml('name: a');"
        "sys.exit(any(m in sys.modules for m in ('numpy', 'scipy', 'pyarrow', 'grpc')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("train.asynchronous={}", "train.asynchronous"),
        ("train.stale={bound: 2}", "train.stale"),
        ("train.reduction={median: {}}", "train.reduction.median"),
        ("train.reduction={trimmed_mean: {trim: 1}}", "train.reduction.trimmed_mean"),
        ("train.reduction={krum: {faulty: 0}}", "train.reduction.krum"),
        ("train.reduction={clip_norm: 1.0}", "train.reduction.clip_norm"),
        ("train.compression={top_k: {fraction: 0.1}}", "train.compression.top_k"),
        ("train.compression={sign: {}}", "train.compression.sign"),
        ("train.verification={replicas: 3}", "train.verification"),
        ("train.verification={audit_fraction: 0.1}", "train.verification"),
        ("train.compression={cast_to: bfloat16}", "train.compression.cast_to"),
        ("train.compression={int8: {}}", "train.compression.int8"),
        ("train.compression={down_cast_to: float16}", "train.compression.down_cast_to"),
        ("reproducibility={tolerant: {}}", "reproducibility.tolerant"),
    ],
)
def test_what_does_not_go_with_all_reduce_is_refused_with_the_reason(
    make_dataset: MakeDataset, setting: str, path: str
) -> None:
    found = complaints(edited("train.all_reduce={}", setting), make_dataset())
    assert "all_reduce" in found[path]


def test_backup_shards_do_not_go_with_all_reduce(make_dataset: MakeDataset) -> None:
    spec = edited("train.all_reduce={}", "train.synchronous={backup_shards: 1}")
    spec.reproducibility.tolerant.SetInParent()
    found = complaints(spec, make_dataset())
    assert "all_reduce" in found["train.synchronous.backup_shards"]


@pytest.mark.parametrize(
    "setting",
    ["train.synchronous={}", "train.local={steps: 5}", "train.stale={bound: 0}"],
)
def test_what_goes_with_all_reduce(make_dataset: MakeDataset, setting: str) -> None:
    resolved = specs.prepare(edited("train.all_reduce={}", setting), make_dataset())
    assert resolved.train.WhichOneof("topology") == "all_reduce"
