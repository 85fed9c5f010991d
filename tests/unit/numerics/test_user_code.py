"""User code: loading it, keeping jobs apart, and saying what is wrong with it."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from phalanx.errors import InvalidArgument
from phalanx.models import Batch, DataSchema, Model, UserModel, build_model
from phalanx.models.base import make_layout
from phalanx.models.code import UserCode, deactivate_user_code
from phalanx.testing.datasets import regression, store
from phalanx.testing.plans import plan_for
from phalanx.training.local import train_in_process
from phalanx.v1.job_spec_pb2 import JobSpec

SCHEMA = DataSchema(4, 3, "float64")

NET = """
import numpy as np
from phalanx.models import UserModel
import part

class Net(UserModel):
    def __init__(self, schema, gain=1, **rest):
        super().__init__(schema, {"w": (schema.features, schema.classes), "b": (schema.classes,)})
        self.gain, self.rest = gain, rest

    def initial(self, seed):
        return {"w": np.full((4, 3), part.VALUE), "b": np.zeros(3)}

    def loss_and_gradients(self, parameters, features, targets):
        import late
        error = features @ parameters["w"] + parameters["b"] - np.eye(3)[targets]
        loss = late.FACTOR * 0.5 * float((error ** 2).sum())
        return loss, {"w": features.T @ error, "b": error.sum(axis=0)}

    def predictions(self, parameters, features):
        return features @ parameters["w"] + parameters["b"]
"""


@pytest.fixture(autouse=True)
def nothing_left_behind(no_user_code: None) -> Iterator[None]:
    modules, paths = set(sys.modules), list(sys.path)
    yield
    deactivate_user_code()
    assert sys.path == paths
    left = {name for name in set(sys.modules) - modules if name in {"net", "part", "late"}}
    assert left == set()


def write_code(folder: Path, value: float = 1.0, factor: float = 1.0, net: str = NET) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(net)
    (folder / "part.py").write_text(f"VALUE = {value}\n")
    (folder / "late.py").write_text(f"FACTOR = {factor}\n")
    return folder


def build(code: Path | None, entrypoint: str = "net:Net", **arguments: Any) -> Model:
    spec = JobSpec()
    spec.train.model.custom.entrypoint = entrypoint
    spec.train.model.custom.arguments.update(arguments)
    return build_model(spec, SCHEMA, code)


def batch() -> Batch:
    rng = np.random.default_rng(0)
    return Batch(rng.standard_normal((5, 4)), np.array([0, 1, 2, 1, 0]))


def test_a_model_of_several_files(tmp_path: Path) -> None:
    model = build(write_code(tmp_path, value=2.0))
    w = model.initial_parameters(0)
    assert w.tolist() == [2.0] * 12 + [0.0] * 3
    out = np.empty_like(w)
    sums = model.gradient(w, batch(), out)
    assert sums.count == 5
    assert [tensor.decay for tensor in model.layout.tensors] == [True, False]
    assert model.evaluation_sums == ("loss", "correct")
    loss, correct = model.evaluate(w, batch())
    assert loss == sums.loss_sum
    assert correct == (model.predict(w, batch().features).argmax(axis=1) == batch().targets).sum()


def test_arguments_arrive_as_what_they_were(tmp_path: Path) -> None:
    net = NET.replace("self.gain, self.rest = gain, rest", "self.seen.update(rest, gain=gain)")
    net = net.replace("class Net(UserModel):", "class Net(UserModel):\n    seen = {}")
    build(
        write_code(tmp_path, net=net),
        gain=128,
        ratio=0.5,
        name="x",
        flag=True,
        sizes=[1, 2.5],
        deep={"n": -3},
        big=2.0**60,
    )
    seen = sys.modules["net"].Net.seen
    expected = {"gain": 128, "ratio": 0.5, "name": "x", "flag": True}
    expected |= {"sizes": [1, 2.5], "deep": {"n": -3}, "big": 2.0**60}
    assert seen == expected
    kinds = [type(seen[name]) for name in ("gain", "flag", "big")]
    assert kinds == [int, bool, float]
    assert [type(value) for value in seen["sizes"]] == [int, float]


def test_jobs_with_files_of_the_same_name_do_not_see_each_other(tmp_path: Path) -> None:
    one = build(write_code(tmp_path / "one", value=1.0, factor=1.0))
    two = build(write_code(tmp_path / "two", value=5.0, factor=10.0))
    w, out = np.zeros(15), np.empty(15)
    for _ in range(2):
        assert one.initial_parameters(0)[0] == 1.0
        assert two.initial_parameters(0)[0] == 5.0
        # `late` is imported inside the leaf, not when the model is built.
        first = one.gradient(w, batch(), out).loss_sum
        late = sys.modules["late"]
        assert two.gradient(w, batch(), out).loss_sum == 10 * first
        assert sys.modules["late"] is not late
        one.gradient(w, batch(), out)
        assert sys.modules["late"] is late
        assert two.evaluate(w, batch())[0] == 10 * one.evaluate(w, batch())[0]
        assert one.predict(w, batch().features).shape == two.predict(w, batch().features).shape


def test_parameters_are_read_only_for_user_code(tmp_path: Path) -> None:
    net = NET.replace("import late", 'parameters["w"] += 1; import late')
    model = build(write_code(tmp_path, net=net))
    w = model.initial_parameters(0)
    with pytest.raises(ValueError, match="read-only"):
        model.gradient(w, batch(), np.empty_like(w))
    assert w.flags.writeable


@pytest.mark.parametrize("name", ["json.py", "statistics.py", "numpy", "phalanx.py"])
def test_files_that_would_hide_a_module_are_refused(tmp_path: Path, name: str) -> None:
    code = write_code(tmp_path)
    (code / name).mkdir() if "." not in name else (code / name).write_text("")
    with pytest.raises(InvalidArgument, match="name of a module that is in use") as caught:
        build(code)
    assert caught.value.reason == "MODULE_NAME_TAKEN"
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("entrypoint", "message"),
    [
        ("nowhere:Net", "there is no module 'nowhere'"),
        ("pkg.nowhere:Net", "there is no module 'pkg.nowhere'"),
        ("net:build", "no function 'build'; it has: Net$"),
        ("net", "not of the form module:function"),
        (":Net", "not of the form module:function"),
        ("needs:Net", "needs imports 'not_installed_anywhere'"),
    ],
)
def test_entrypoints_that_are_not_there(tmp_path: Path, entrypoint: str, message: str) -> None:
    code = write_code(tmp_path)
    (code / "needs.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(InvalidArgument, match=message):
        build(code, entrypoint)


def test_errors_of_user_code_pass_through_with_their_place(tmp_path: Path) -> None:
    code = write_code(tmp_path)
    (code / "broken.py").write_text("x = 1\nraise RuntimeError('my own')\n")
    (code / "typo.py").write_text("def Net(:\n")
    with pytest.raises(RuntimeError, match="my own") as caught:
        build(code, "broken:Net")
    assert caught.traceback[-1].path == code / "broken.py"
    with pytest.raises(SyntaxError):
        build(code, "typo:Net")
    with pytest.raises(TypeError, match="unexpected keyword argument 'no_such'"):
        build(
            write_code(tmp_path / "x", net=NET.replace(", **rest", "").replace(", rest", ", 0")),
            no_such=1,
        )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return object()", "returned a object without layout, evaluation_sums"),
        ("return None", "returned a NoneType without"),
        ("m = Net(schema); m.layout = 3; return m", "the layout names no tensors"),
        ("m = Net(schema); m.layout.element_count = 9; return m", "says 9 elements.*have 15"),
        ("m = Net(schema); m.layout.dtype = 'float32'; return m", "of float32.*asks for float64"),
        (
            "m = Net(schema); m.layout.tensors[0].workspace = True; return m",
            "net:build: the tensor 'w' is workspace, and one of the model's own stands after it",
        ),
        (
            "m = Net(schema); [setattr(t, 'workspace', True) for t in m.layout.tensors]; return m",
            "the layout names no tensors that the model is made of",
        ),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, body: str, message: str) -> None:
    code = write_code(tmp_path, net=f"{NET}\ndef build(schema):\n    {body}\n")
    with pytest.raises(InvalidArgument, match=message) as caught:
        build(code, "net:build")
    assert caught.value.reason == "NOT_A_MODEL"


class Answering(ModuleType):
    """Like some of PyTorch's it answers to any name, and so has a path that is none."""

    def __getattr__(self, name: str) -> Any:
        if name == "__file__":
            raise RuntimeError("asked for what is not there")
        return object()


def test_modules_that_answer_to_any_name_are_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "answering", Answering("answering"))
    build(write_code(tmp_path))
    deactivate_user_code()
    assert "answering" in sys.modules


def test_a_folder_that_is_gone_keeps_no_module(tmp_path: Path) -> None:
    code = UserCode(write_code(tmp_path))
    code.activate()
    assert str(tmp_path) in sys.path
    sys.path.remove(str(tmp_path))
    code.deactivate()
    code.deactivate()
    assert UserCode.active is None


class Mean(UserModel):
    """Predicts one number for all rows."""

    def __init__(self, schema: DataSchema, **options: Any) -> None:
        super().__init__(schema, {"m": ()}, **options)

    def initial(self, seed: int) -> Mapping[str, Any]:
        return {"m": 0.0}

    def loss_and_gradients(
        self, parameters: Mapping[str, Any], features: Any, targets: Any
    ) -> tuple[float, Mapping[str, Any]]:
        error = parameters["m"] - targets
        return 0.5 * float(error @ error), {"m": error.sum()}

    def predictions(self, parameters: Mapping[str, Any], features: Any) -> Any:
        return np.full(features.shape[0], parameters["m"])


REGRESSION = DataSchema(4, 0, "float64")


MEAN = """
import numpy as np
from phalanx.models import UserModel

class Net(UserModel):
    def __init__(self, schema):
        super().__init__(schema, {"m": ()})

    def initial(self, seed):
        return {"m": 0.0}

    def loss_and_gradients(self, parameters, features, targets):
        error = parameters["m"] - targets
        return 0.5 * float(error @ error), {"m": error.sum()}
"""


def test_a_job_may_have_a_tensor_that_is_one_number(tmp_path: Path) -> None:
    code = write_code(tmp_path / "code", net=MEAN)
    stored = store(tmp_path / "data", *regression(60, 4))
    train = {
        "model": {"custom": {"entrypoint": "net:Net"}},
        "optimizer": {"sgd": {"learning_rate": 0.5}},
        "stop": {"steps": 3},
    }
    plan = plan_for(stored, train, data={"name": "data", "shards": 2})
    result = train_in_process(plan, stored.manifest, stored.fetch, code_dir=code)
    assert result.steps == 3
    assert [list(tensor.shape) for tensor in result.layout.tensors] == [[]]


def test_regression_sums_come_from_predictions() -> None:
    model = Mean(REGRESSION)
    sums = dict(
        zip(
            model.evaluation_sums,
            model.evaluate(np.array([1.0]), Batch(np.eye(4)[:2], np.array([3.0, 0.0]))),
            strict=True,
        )
    )
    assert sums == {
        "loss": 2.5,
        "squared_error": 5.0,
        "absolute_error": 3.0,
        "target": 3.0,
        "target_squared": 9.0,
    }


def test_decay_is_chosen_by_name_or_by_shape() -> None:
    assert not Mean(REGRESSION).layout.tensors[0].decay
    assert Mean(REGRESSION, decay=["m"]).layout.tensors[0].decay
    with pytest.raises(InvalidArgument, match=r"decay names \['x'\]"):
        Mean(REGRESSION, decay=["x"])


def wrong(**methods: Any) -> UserModel:
    kind = type("Wrong", (Mean,), methods)
    model: UserModel = kind(REGRESSION)
    return model


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (3.0, "must return .loss sum, gradients."),
        ((np.zeros(2), {"m": 1.0}), "must return .loss sum, gradients."),
        ((1.0, [2.0]), "returned the tensors list; the model has .'m'."),
        ((1.0, {"m": 1.0, "x": 2.0}), "returned the tensors .'m', 'x'."),
        ((1.0, {"m": np.zeros(3)}), r"'m' with shape \(3,\) instead of \(\)"),
    ],
)
def test_wrong_gradients_are_named(result: Any, message: str) -> None:
    model = wrong(loss_and_gradients=lambda *_: result)
    with pytest.raises(InvalidArgument, match=message):
        model.gradient(np.zeros(1), Batch(np.eye(4), np.zeros(4)), np.zeros(1))


def test_wrong_measurements_and_predictions_are_named() -> None:
    rows = Batch(np.eye(4), np.zeros(4))
    with pytest.raises(InvalidArgument, match=r"predictions returned shape \(3,\) instead of"):
        wrong(predictions=lambda *_: np.zeros(3)).predict(np.zeros(1), rows.features)
    with pytest.raises(InvalidArgument, match=r"evaluation returned \['x'\]"):
        wrong(evaluation=lambda *_: {"x": 1.0}).evaluate(np.zeros(1), rows)
    with pytest.raises(InvalidArgument, match=r"must define evaluation\(\)"):
        wrong(evaluation_sums=("loss", "x")).evaluate(np.zeros(1), rows)
    silent = wrong(predictions=UserModel.predictions)
    assert silent.evaluation_sums == ("loss",)
    assert silent.evaluate(np.zeros(1), rows).tolist() == [0.0]
    with pytest.raises(InvalidArgument, match="Wrong cannot predict"):
        silent.predict(np.zeros(1), rows.features)


@pytest.mark.parametrize(
    ("tensors", "dtype", "message"),
    [
        ([], "float32", "distinct names"),
        ([("w", (2,), True), ("w", (3,), True)], "float32", "distinct names"),
        ([("w", (0, 2), True)], "float32", "sizes start at 1"),
        ([("w", (2,), True)], "float16", "'float16' is not one of"),
    ],
)
def test_layouts_that_cannot_be(tensors: Any, dtype: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make_layout(tensors, dtype)


CALLS = """
import os, sys
from pathlib import Path
import numpy as np
from phalanx.calls import CallWork
from phalanx.models import Batch, DataSchema, build_model
from phalanx.v1.job_spec_pb2 import JobSpec
from phalanx.v1.training_pb2 import JobPlan

folder, what = Path(sys.argv[1]), sys.argv[2]
spec = JobSpec()
if what == "task":
    spec.tasks.entrypoint = "net:task"
    spec.tasks.arguments.add()
    work = CallWork(JobPlan(spec=spec.SerializeToString()), folder)
    work.describe()
    work.call(0)
else:
    spec.train.model.custom.entrypoint = "net:build"
    spec.train.model.custom.arguments["what"] = what
    model = build_model(spec, DataSchema(4, 3, "float64"), folder)
    w = model.initial_parameters(0)
    model.gradient(w, Batch(np.zeros((5, 4)), np.zeros(5, int)), w)
# Not through Python, which holds lines back for a pipe.
os.write(1, b"went on\\n")
"""

FORKING = """
import os, sys
if {at_import}:
    os.fork()

def twice(ends):
    child = os.fork()
    if child == 0:
        if ends == "raise":
            raise ValueError("the copy fails")
        if ends == "leave":
            sys.exit(3)
        return
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(1, f"copy ended with {{code}}\\n".encode())

def task():
    twice("")

def build(schema, what):
    from phalanx.models import UserModel

    class Net(UserModel):
        def initial(self, seed):
            return {{"w": [0.0]}}

        def loss_and_gradients(self, parameters, features, targets):
            if what != "build":
                twice(what)
            return 0.0, {{"w": [0.0]}}

    if what == "build":
        twice("")
    return Net(schema, {{"w": (1,)}})
"""


@pytest.mark.parametrize(
    ("what", "code"), [("task", 0), ("build", 0), ("return", 0), ("raise", 1), ("leave", 3)]
)
def test_a_copy_that_user_code_forks_ends_with_the_call(
    tmp_path: Path, what: str, code: int
) -> None:
    (tmp_path / "net.py").write_text(FORKING.format(at_import=False))
    command = [sys.executable, "-c", CALLS, str(tmp_path), what]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.splitlines() == [f"copy ended with {code}", "went on"]
    assert ("ValueError: the copy fails" in ended.stderr) is (what == "raise")


def test_a_copy_that_user_code_forks_while_it_is_imported_ends_with_that(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FORKING.format(at_import=True))
    command = [sys.executable, "-c", CALLS, str(tmp_path), "task"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.splitlines() == ["copy ended with 0", "went on"]
