"""Trained models as fitted objects of scikit-learn.

There is one where scikit-learn has a class that computes the same: each kind of model that has a
counterpart is a function here and a line in ``_CONVERSIONS``. Attributes without documentation are
those that ``fit`` sets and predicting needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.json_format import ParseDict, ParseError
from numpy.typing import NDArray

from phalanx.cascades.model import CLASSES, COEFFICIENTS, INTERCEPTS, PLACES, VECTORS
from phalanx.data.model_files import DESCRIPTION_FILE, load_model_directory
from phalanx.errors import DataLoss, InvalidArgument
from phalanx.exports.trees import tree_of
from phalanx.forests.tables import TREE
from phalanx.learn import need_scikit_learn
from phalanx.models.base import views
from phalanx.models.k_means import CENTERS
from phalanx.models.linear import BIAS, WEIGHTS
from phalanx.models.passes import COMPONENTS, MEAN, VARIANCES
from phalanx.programs.forest import tree_arguments
from phalanx.texts import listed
from phalanx.v1.job_spec_pb2 import JobSpec

if TYPE_CHECKING:
    from phalanx.data.predict import LoadedModel

Array = NDArray[Any]

_ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "sigmoid": "logistic"}
"""Names here → those of scikit-learn."""


@dataclass(frozen=True)
class Trained:
    """What a conversion starts from.

    ``tensors`` are copies. ``classes`` are the labels in the order of the outputs.
    """

    spec: JobSpec
    tensors: dict[str, Array]
    classes: Array
    features: int
    steps: int
    sparse: bool


@dataclass(frozen=True)
class Converted:
    """A model in the terms of scikit-learn: scaled first, where there is a scaler.

    ``dtype`` is the type of rows that it computes in; ``one_dtype`` says that it takes no other.
    """

    scaler: Any | None
    estimator: Any
    dtype: str
    features: int
    one_dtype: bool


def kind_of(spec: JobSpec) -> str:
    """Return what a job trains: the kind of its model, or else its program."""
    program = spec.WhichOneof("program") or ""
    return (spec.train.model.WhichOneof("kind") or "") if program == "train" else program


def model_kind(model: LoadedModel) -> str:
    """Return the kind of a model that is loaded."""
    return kind_of(_spec_of(model.document))


def kind_in(folder: Path) -> str:
    """Return the kind of a model that is not loaded; raises DataLoss for a damaged one."""
    return kind_of(_description(folder)[1])


def load_convertible(folder: Path) -> LoadedModel:
    """Load a model of which scikit-learn has a counterpart; code of the model's own is not run.

    Raises InvalidArgument (NO_COUNTERPART) for any other model, NotFound and DataLoss.
    """
    _conversion(*_description(folder))
    return load_model_directory(folder)


def _description(folder: Path) -> tuple[str, JobSpec]:
    """The name of a model, and the job that trained it."""
    path = folder / DESCRIPTION_FILE
    try:
        document = json.loads(path.read_bytes())
        return str(document["name"]), _spec_of(document)
    except (ValueError, KeyError, TypeError, ParseError) as error:
        raise DataLoss(f"{path} is damaged: {error!r}") from error


def estimator_of(model: LoadedModel, classes: Array | None = None) -> Any:
    """Return a fitted object of scikit-learn that predicts what a model predicts.

    It takes rows as ``LoadedModel.prepare`` returns them, and shares no memory with the model.

    Args:
        model: what to convert.
        classes: labels to predict instead of the model's own, in the same order.

    Raises:
        InvalidArgument: scikit-learn has no class that computes the same.
        FailedPrecondition: scikit-learn is not installed.
    """
    found = convert(model, classes)
    from sklearn.pipeline import Pipeline

    steps = [] if found.scaler is None else [("standardise", found.scaler)]
    if steps or found.one_dtype:
        # A scaler computes in the type of its rows, which may be a shorter one.
        steps.insert(0, ("dtype", _cast(found)))
    return Pipeline([*steps, ("model", found.estimator)]) if steps else found.estimator


def convert(model: LoadedModel, classes: Array | None = None) -> Converted:
    """Convert a model; see ``estimator_of``."""
    spec = _spec_of(model.document)
    conversion = _conversion(model.name, spec)
    need_scikit_learn("an object of scikit-learn", where="")
    tensors = views(model.model.layout, np.array(model.parameters))
    features, steps = int(model.document["features"]), int(model.document["steps"])
    labels = model.classes if classes is None else np.asarray(classes)
    sparse = model.document["feature_format"] == "csr"
    estimator = conversion(Trained(spec, tensors, labels, features, steps, sparse))
    return Converted(
        scaler=_scaler(model, features) if model.standardises else None,
        estimator=_fitted(estimator, n_features_in_=features),
        # What trees compare, whatever their thresholds are.
        dtype="float32" if kind_of(spec) == "forest" else str(model.parameters.dtype),
        features=features,
        one_dtype=kind_of(spec) in _OF_ONE_DTYPE,
    )


def _spec_of(document: dict[str, Any]) -> JobSpec:
    return ParseDict(document["spec"], JobSpec(), ignore_unknown_fields=True)


def _conversion(name: str, spec: JobSpec) -> Callable[[Trained], Any]:
    kind = kind_of(spec)
    found = _CONVERSIONS.get(kind)
    if found is None:
        raise InvalidArgument(
            f"{name} is of the kind {kind}, which no class of scikit-learn computes; there is one "
            f"for {listed(list(_CONVERSIONS))}",
            reason="NO_COUNTERPART",
        )
    return found


def _cast(found: Converted) -> Any:
    from sklearn.preprocessing import FunctionTransformer

    # Of the standard library, so that whoever loads the object needs scikit-learn only.
    step = FunctionTransformer(
        methodcaller("astype", found.dtype),
        validate=True,
        accept_sparse=True,
        feature_names_out="one-to-one",
    )
    return _fitted(step, n_features_in_=found.features)


def _scaler(model: LoadedModel, features: int) -> Any:
    from sklearn.preprocessing import StandardScaler

    standardisation = model.document["standardisation"]
    std = np.array(standardisation["std"], np.float64)
    return _fitted(
        StandardScaler(with_mean=model.document["feature_format"] != "csr"),
        mean_=np.array(standardisation["mean"], np.float64),
        var_=np.square(std),
        scale_=np.where(std > 0, std, 1.0),
        n_features_in_=features,
    )


def _fitted(estimator: Any, **attributes: Any) -> Any:
    """Give an estimator what ``fit`` would have given it."""
    vars(estimator).update(attributes)
    return estimator


def _linear_regression(trained: Trained) -> Any:
    from sklearn.linear_model import LinearRegression

    weights, bias = trained.tensors[WEIGHTS], trained.tensors.get(BIAS)
    return _fitted(
        LinearRegression(fit_intercept=bias is not None),
        coef_=weights,
        intercept_=weights.dtype.type(0) if bias is None else bias[0],
    )


def _logistic_regression(trained: Trained) -> Any:
    weights, bias = trained.tensors[WEIGHTS], trained.tensors.get(BIAS)
    return _classifier(trained, weights[np.newaxis], bias)


def _softmax_regression(trained: Trained) -> Any:
    weights, bias = trained.tensors[WEIGHTS].T, trained.tensors.get(BIAS)
    if len(trained.classes) == 2:
        weights, bias = _log_odds(weights), None if bias is None else _log_odds(bias)
    return _classifier(trained, weights, bias)


def _classifier(trained: Trained, weights: Array, bias: Array | None) -> Any:
    from sklearn.linear_model import LogisticRegression

    return _fitted(
        LogisticRegression(fit_intercept=bias is not None),
        classes_=trained.classes,
        coef_=np.ascontiguousarray(weights),
        intercept_=np.zeros(len(weights), weights.dtype) if bias is None else bias,
        n_iter_=np.array([trained.steps], np.int32),
    )


def _linear_svm(trained: Trained) -> Any:
    from sklearn.svm import LinearSVC

    weights, bias = trained.tensors[WEIGHTS], trained.tensors.get(BIAS)
    return _fitted(
        LinearSVC(
            loss=trained.spec.train.model.linear_svm.loss or "hinge",
            fit_intercept=bias is not None,
        ),
        classes_=trained.classes,
        coef_=weights[np.newaxis],
        intercept_=np.zeros(1, weights.dtype) if bias is None else bias,
        n_iter_=trained.steps,
    )


def _mlp(trained: Trained) -> Any:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    tensors = list(trained.tensors.values())
    weights, biases = tensors[0::2], tensors[1::2]
    spec = trained.spec.train.model.mlp
    known = {
        "hidden_layer_sizes": tuple(spec.hidden),
        "activation": _ACTIVATIONS[spec.activation or "relu"],
    }
    if not len(trained.classes):
        estimator = _fitted(MLPRegressor(**known), out_activation_="identity")
    else:
        last = "softmax"
        if len(trained.classes) == 2:
            last = "logistic"
            weights[-1] = np.ascontiguousarray(_log_odds(weights[-1].T).T)
            biases[-1] = _log_odds(biases[-1])
        estimator = _fitted(
            MLPClassifier(**known),
            out_activation_=last,
            classes_=trained.classes,
            _label_binarizer=_label_binarizer(trained.classes),
        )
    return _fitted(
        estimator,
        coefs_=weights,
        intercepts_=biases,
        n_layers_=len(weights) + 1,
        n_outputs_=weights[-1].shape[1],
        n_iter_=trained.steps,
    )


def _label_binarizer(classes: Array) -> Any:
    """From outputs to labels of any kind, in their order; one that is fitted to labels sorts them
    and refuses fractions."""
    from sklearn.preprocessing import LabelBinarizer

    return _fitted(LabelBinarizer().fit(np.arange(len(classes))), classes_=classes)


def _k_means(trained: Trained) -> Any:
    from sklearn.cluster import KMeans

    centers = trained.tensors[CENTERS]
    return _fitted(
        KMeans(n_clusters=len(centers), n_init=1),
        cluster_centers_=centers,
        n_iter_=trained.steps,
        _n_threads=1,
    )


def _pca(trained: Trained) -> Any:
    from sklearn.decomposition import PCA

    components = trained.tensors[COMPONENTS]
    return _fitted(
        PCA(n_components=len(components)),
        components_=components,
        mean_=trained.tensors[MEAN],
        explained_variance_=trained.tensors[VARIANCES],
        n_components_=len(components),
    )


def _forest(trained: Trained) -> Any:
    from sklearn import ensemble, tree

    count = len(trained.classes)
    kind, forest = tree.DecisionTreeRegressor, ensemble.RandomForestRegressor
    outputs: dict[str, Any] = {"n_outputs_": 1}
    labels = {}
    if count:
        kind, forest = tree.DecisionTreeClassifier, ensemble.RandomForestClassifier
        outputs["n_classes_"] = count
        labels["classes_"] = trained.classes
    arguments = tree_arguments(trained.spec.forest.tree.fields)
    trees = [
        _fitted(
            kind(**arguments),
            tree_=tree_of(table, trained.features),
            n_features_in_=trained.features,
            # Trees of a forest know classes by number.
            **({"classes_": np.arange(count, dtype=np.float64)} if count else {}),
            **outputs,
        )
        for name, table in trained.tensors.items()
        if name.startswith(TREE)
    ]
    # How a split is found is a matter of each tree.
    arguments.pop("splitter", None)
    known = {"n_estimators": len(trees), "random_state": trained.spec.seed, **arguments}
    return _fitted(forest(**known), estimator_=kind(), estimators_=trees, **labels, **outputs)


def _machine(trained: Trained) -> Any:
    from scipy.sparse import csr_matrix
    from sklearn.svm import SVC

    tensors, cascade = trained.tensors, trained.spec.cascade
    # libsvm has the vectors of each class together, and of two classes the signs of the first.
    places = tensors[PLACES].astype(np.int64)
    order = np.argsort(places, kind="stable")
    present = tensors[CLASSES].astype(np.int64)
    coefficients, intercepts = tensors[COEFFICIENTS][:, order], tensors[INTERCEPTS]
    sign = -1.0 if len(present) == 2 else 1.0
    vectors: Any = np.ascontiguousarray(tensors[VECTORS][order])
    table: Callable[[Array], Any] = np.ascontiguousarray
    if trained.sparse:  # one that was fitted to dense rows takes no sparse ones
        vectors, table = csr_matrix(vectors), _with_zeros
    nothing = np.empty(0)
    return _fitted(
        SVC(C=cascade.c, gamma=cascade.gamma),
        classes_=trained.classes[present],
        support_=np.arange(len(order), dtype=np.int32),
        support_vectors_=vectors,
        _n_support=np.bincount(places, minlength=len(present)).astype(np.int32),
        dual_coef_=table(coefficients),
        intercept_=intercepts,
        _dual_coef_=table(sign * coefficients),
        _intercept_=sign * intercepts,
        _gamma=cascade.gamma,
        _sparse=trained.sparse,
        _effective_probability=False,
        _probA=nothing,
        _probB=nothing,
        class_weight_=np.ones(len(present)),
        shape_fit_=(len(order), trained.features),
        fit_status_=0,
    )


def _with_zeros(coefficients: Array) -> Any:
    """A table as libsvm takes it of sparse rows: by its places, zeros as well."""
    from scipy.sparse import csr_matrix

    rows, count = coefficients.shape
    columns, ends = np.tile(np.arange(count), rows), np.arange(0, rows * count + 1, max(1, count))
    return csr_matrix((coefficients.ravel(), columns, ends), coefficients.shape)


def _log_odds(scores: Array) -> Array:
    """What makes the score of class 1, less that of class 0: one sigmoid instead of a softmax."""
    return scores[1:] - scores[:1]


_CONVERSIONS: dict[str, Callable[[Trained], Any]] = {
    "linear_regression": _linear_regression,
    "logistic_regression": _logistic_regression,
    "softmax_regression": _softmax_regression,
    "linear_svm": _linear_svm,
    "mlp": _mlp,
    "k_means": _k_means,
    "pca": _pca,
    "forest": _forest,
    "cascade": _machine,
}
"""Kinds of models, and what makes an object of each; everything else has no counterpart."""

_OF_ONE_DTYPE = ("k_means",)
"""Kinds whose objects take rows of no other type than the one they compute in."""
