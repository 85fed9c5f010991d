"""Models: the mathematics of a leaf. ``build_model`` turns a spec into one."""

from __future__ import annotations

from pathlib import Path

from phalanx.errors import InvalidArgument, Unimplemented
from phalanx.models.base import Batch, DataSchema, LeafSums, Model
from phalanx.models.boosting import Boosting
from phalanx.models.custom import load_custom
from phalanx.models.dual_svm import DualSvm
from phalanx.models.k_means import KMeans
from phalanx.models.linear import LinearModel
from phalanx.models.losses import Hinge, Logistic, OutputLayer, Softmax, SquaredError
from phalanx.models.mlp import Mlp
from phalanx.models.passes import NormalEquations, Pca
from phalanx.models.split_features import SplitLinearModel
from phalanx.models.user import UserModel
from phalanx.optimizers import build_optimizer
from phalanx.specs.buffers import refuse_with_buffers
from phalanx.texts import number_of
from phalanx.v1 import job_spec_pb2

__all__ = ["Batch", "DataSchema", "LeafSums", "Model", "UserModel", "build_model"]


def build_model(
    spec: job_spec_pb2.JobSpec, schema: DataSchema, code_dir: Path | None = None
) -> Model:
    """Return the model of a resolved train spec.

    Args:
        spec: resolved job.
        schema: what the data looks like.
        code_dir: folder with the job's own code, for ``custom`` and ``torch``.

    Raises:
        InvalidArgument: the model does not fit the data, or the rest of the job.
        Unimplemented: a kind that is not carried out yet.
    """
    built = _build(spec, schema, code_dir)
    refuse_with_buffers(spec, built.layout)
    return built


def _build(spec: job_spec_pb2.JobSpec, schema: DataSchema, code_dir: Path | None) -> Model:
    model = spec.train.model
    match model.WhichOneof("kind"):
        case "linear_regression":
            _needs_regression(schema, "linear_regression")
            if spec.train.optimizer.HasField("closed_form") and schema.rows:
                return NormalEquations(schema, model.linear_regression.bias, spec.train.l2)
            return _linear(spec, schema, SquaredError(), model.linear_regression.bias)
        case "logistic_regression":
            _needs_two_classes(schema, "logistic_regression")
            return _linear(spec, schema, Logistic(), model.logistic_regression.bias)
        case "softmax_regression":
            _needs_classes(schema, "softmax_regression")
            return LinearModel(schema, schema.classes, Softmax(), model.softmax_regression.bias)
        case "linear_svm":
            _needs_two_classes(schema, "linear_svm")
            return _linear_svm(spec, schema)
        case "mlp":
            return _mlp(model.mlp, schema)
        case "boosting":
            return Boosting(schema, model.boosting)
        case "k_means":
            return KMeans(schema, model.k_means.clusters)
        case "pca":
            return Pca(schema, model.pca.components)
        case "custom":
            return load_custom(model.custom, schema, code_dir)
        case "torch":
            from phalanx.models.torch_module import load_torch

            return load_torch(spec, schema, code_dir)
        case None:
            raise InvalidArgument("train.model: no model is named")
        case other:
            raise Unimplemented(f"train.model.{other} is not carried out yet")


def _linear_svm(spec: job_spec_pb2.JobSpec, schema: DataSchema) -> Model:
    svm, train = spec.train.model.linear_svm, spec.train
    if train.optimizer.HasField("cocoa") and schema.rows:
        certified = train.evaluation.split == spec.data.split
        cocoa = train.optimizer.cocoa
        return DualSvm(schema, cocoa, train.l2, spec.seed, certified=certified)
    return LinearModel(schema, 1, Hinge(squared=svm.loss == "squared_hinge"), svm.bias)


def _linear(
    spec: job_spec_pb2.JobSpec, schema: DataSchema, output: OutputLayer, bias: bool
) -> Model:
    if not schema.features_of_shards:
        return LinearModel(schema, 1, output, bias)
    states = build_optimizer(spec.train, total_steps=0).state_names
    return SplitLinearModel(schema, output, bias, states)


def _mlp(mlp: job_spec_pb2.Mlp, schema: DataSchema) -> Model:
    output: OutputLayer
    if mlp.loss == "squared_error":
        _needs_regression(schema, "mlp with squared_error")
        outputs, output = 1, SquaredError()
    else:
        _needs_classes(schema, "mlp with cross_entropy")
        outputs, output = schema.classes, Softmax()
    return Mlp(schema, list(mlp.hidden), outputs, output, mlp.activation or "relu")


def _needs_regression(schema: DataSchema, what: str) -> None:
    if schema.classes:
        raise InvalidArgument(
            f"{what} predicts numbers, but the data has "
            f"{number_of(schema.classes, 'class', 'classes')}"
        )


def _needs_two_classes(schema: DataSchema, what: str) -> None:
    if schema.classes != 2:
        raise InvalidArgument(
            f"{what} needs 2 classes, the data has {schema.classes}; softmax_regression takes any "
            "number"
        )


def _needs_classes(schema: DataSchema, what: str) -> None:
    if schema.classes < 2:
        raise InvalidArgument(f"{what} needs 2 classes or more, the data has {schema.classes}")
